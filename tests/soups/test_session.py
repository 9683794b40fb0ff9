"""What learners are handed: counts, groups, the same weights as cooking, tied parameters."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from soups.cross_fitting import score_soup
from soups.errors import SoupError
from soups.evaluate import Scores
from soups.kitchen import cook_soup
from soups.learners.registry import LEARNERS, MehlLayerwise, Uniform
from soups.meter import Meter
from soups.pipeline import open_run
from soups.record import fingerprint
from soups.session import IngredientScores
from tests.soups.conftest import make_config, open_session

TIED = """
from torch import nn


class Tied(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.head = nn.Linear(64, num_classes)

    def forward(self, images):
        hidden = self.first(images.flatten(1)).relu()
        return self.head(self.second(hidden).relu())
"""


@pytest.mark.parametrize("rule", ["uniform", "convex", "recalibrate"])
def test_load_gives_the_weights_that_cooking_writes(kitchen: Path, tmp_path: Path, rule: str):
    session = open_session(kitchen, tmp_path, norm_buffers=rule)
    settings = MehlLayerwise(groups="layer")
    groups = session.groups(settings)
    matrix = np.random.default_rng(0).dirichlet(np.full(5, 3.0), size=len(groups)).T
    coefficients = session.coefficients(groups, matrix, settings)
    session.load(coefficients)
    loaded = {n: t.clone() for n, t in session.model.state_dict().items()}
    cook_soup(session, coefficients, tmp_path / "soup.safetensors", memory_budget=2**28)
    cooked = load_file(tmp_path / "soup.safetensors")
    assert cooked.keys() == loaded.keys()
    for name, tensor in session.model.state_dict().items():
        assert cooked[name].equal(tensor), name
        if "tracked" not in name:
            assert loaded[name].equal(tensor), name


def test_what_a_row_has_cost_is_counted_from_its_beginning(kitchen: Path, tmp_path: Path):
    session = open_session(kitchen, tmp_path)
    session.accuracy()
    session.begin("row", tmp_path)
    session.accuracy(session.probe(100))
    steps = sum(1 for _ in session.epoch(100, torch.Generator().manual_seed(0)))
    with Meter(session.device) as meter:
        pass
    spent = session.spent(meter)
    assert steps == spent["steps"] == 5
    assert spent["forward_passes"] == pytest.approx((100 + 449) / 449)
    assert spent["backward_passes"] == 1
    assert session.record == {}


def scored_session(kitchen: Path, folder: Path):
    """A session whose ingredients are scored, begun for `row`."""
    session = open_session(kitchen, folder)
    session.begin("row", folder)
    session.ingredients = IngredientScores.of(session.evaluate_ingredients().right, 2.0)
    session.begin("row", folder)
    return session


def test_a_session_on_some_images_is_one_on_them_alone(kitchen: Path, tmp_path: Path):
    session = scored_session(kitchen, tmp_path)
    rows = torch.arange(0, 449, 3).flip(0)
    session.block_sizes = {"row": 2}
    candidates = np.random.default_rng(0).dirichlet(np.ones(5), size=3)[:, :, None]
    whole = session.evaluate(candidates, session.whole_model())
    session.begin("row", tmp_path)
    with session.on(rows, "some") as inner:
        assert (inner.row, inner.folder, inner.block_sizes["row/some"]) == ("row/some", None, 2)
        assert inner.model is session.model
        assert inner.sources is session.sources
        assert inner.passes is session.passes
        scores = inner.evaluate(candidates, inner.whole_model())
        assert scores.right.equal(whole.right[:, rows])
        torch.testing.assert_close(scores.losses, whole.losses[:, rows], rtol=1e-5, atol=1e-6)
        wanted = inner.evaluate_ingredients().accuracies.tolist()
        assert inner.ingredient_accuracies() == pytest.approx(wanted, abs=1e-12)
        assert wanted != pytest.approx(session.ingredients.accuracies)
        inner.record["said"] = "inside"
        assert sum(len(labels) for _, labels in inner.epoch(64, torch.Generator())) == len(rows)
    assert session.record == {}
    assert len(session.select) == 449
    assert session.steps == 3
    assert session.examples_backward == len(rows)
    # Three candidates, five ingredients and an epoch on the rows; the ingredients' scores on all.
    assert session.examples_forward == 9 * len(rows) + 5 * 449


def test_sessions_within_sessions_know_their_images(kitchen: Path, tmp_path: Path):
    session = scored_session(kitchen, tmp_path)
    outer, within = torch.arange(5, 400, 2), torch.tensor([3, 90, 17, 4])
    with session.on(outer, "a") as first:
        with first.on(within, "b") as second:
            assert second.row == "row/a/b"
            assert second.select.labels.equal(session.select.labels[outer[within]])
            right = second.evaluate_ingredients().right
            assert second.ingredient_accuracies() == right.double().mean(1).tolist()
        assert first.ingredient_accuracies() != right.double().mean(1).tolist()
    assert session.examples_forward == 5 * 4 + 5 * 449


def test_the_ingredients_scores_are_counted_once_by_a_row(kitchen: Path, tmp_path: Path):
    session = scored_session(kitchen, tmp_path)
    for start in (0, 100):
        with session.on(torch.arange(start, start + 100), f"{start}") as inner:
            inner.ingredient_accuracies()
    session.ingredient_accuracies()
    assert session.examples_forward == 5 * 449
    assert session.shared_seconds == 2.0
    session.begin("another", None)
    session.ingredient_accuracies()
    assert session.examples_forward == 5 * 449


def test_what_is_found_once_is_counted_every_time_and_found_again_on_some_images(
    kitchen: Path, tmp_path: Path
):
    session = scored_session(kitchen, tmp_path)
    calls = []

    def find():
        session.accuracy(session.probe(100))
        session.shared_seconds += 5.0
        calls.append(session.row)
        return len(calls)

    assert session.once("that", find) == 1
    seconds = session.shared_seconds
    assert session.examples_forward == 100
    assert session.once("that", find) == 1
    assert session.once("another", find) == 2
    assert session.examples_forward == 300
    session.begin("next", None)
    assert session.once("that", find) == 1
    assert session.examples_forward == 100
    # What others have counted is counted, and the time that finding it took.
    assert session.shared_seconds >= seconds >= 5.0
    with session.on(torch.arange(50), "some") as inner:
        assert inner.once("that", find) == 3
        assert inner.once("that", find) == 4
    assert session.once("that", find) == 1
    assert calls == ["row", "row", "next", "next"]


def test_a_learner_on_some_images_learns_what_it_would_from_them_alone(
    kitchen: Path, tmp_path: Path
):
    session = scored_session(kitchen, tmp_path)
    rows = torch.arange(40, 240)
    settings = LEARNERS["greedy"].settings()
    with session.on(rows, "part") as inner:
        found = LEARNERS["greedy"].function()(inner, settings)
    session.select = session.select.subset(rows)
    session.ingredients = IngredientScores.of(session.evaluate_ingredients().right, 0.0)
    session.begin("row/part", None)
    alone = LEARNERS["greedy"].function()(session, settings)
    assert found.matrix.tolist() == alone.matrix.tolist()


def test_a_session_on_no_images_or_unknown_scores_is_refused(kitchen: Path, tmp_path: Path):
    session = open_session(kitchen, tmp_path)
    session.begin("row", None)
    with (
        pytest.raises(SoupError, match="empty has no images"),
        session.on(torch.arange(0), "empty"),
    ):
        pass
    session.ingredients = IngredientScores((0.1,) * 5, 0.0)
    with session.on(torch.arange(9), "some") as inner, pytest.raises(SoupError, match="each image"):
        inner.ingredient_accuracies()


def test_a_renamed_ingredient_is_another_input(kitchen: Path, tmp_path: Path):
    paths = [kitchen / "zoo" / f"{k:02d}.safetensors" for k in (0, 1)]
    inputs = []
    for name in ("a", "b"):
        renamed = tmp_path / f"{name}.safetensors"
        renamed.write_bytes(paths[1].read_bytes())
        config = make_config(
            kitchen,
            output=tmp_path / name,
            zoo={"path": kitchen / "zoo", "ingredients": [str(paths[0]), str(renamed)]},
        )
        folder, cpu = tmp_path / name, torch.device("cpu")
        this = open_run(config, folder, cpu, root=kitchen, fresh=False, progress=False)
        inputs.append(fingerprint(this.inputs))
    assert inputs[0] != inputs[1]


def test_groups_are_the_whole_model_where_settings_do_not_say(kitchen: Path, tmp_path: Path):
    session = open_session(kitchen, tmp_path)
    assert list(session.groups(Uniform())) == ["model"]
    assert session.groups(Uniform()) == session.whole_model()
    assert list(session.groups(MehlLayerwise(groups="layer"))) == ["0", "1", "3", "4", "9"]


def tied_zoo(folder: Path) -> None:
    """A base and three ingredients around it; one names the tied weight twice, as torch does."""
    (folder / "net.py").write_text(TIED)
    scope: dict = {}
    exec(TIED, scope)
    torch.manual_seed(0)
    model = scope["Tied"](10)
    centre = {name: tensor.clone() for name, tensor in model.named_parameters()}
    (folder / "zoo").mkdir()
    for k, name in enumerate(("base", "00", "01", "02")):
        tensors = {n: t + 0.02 * k * torch.randn_like(t) for n, t in centre.items()}
        tensors = {n: t.detach() for n, t in tensors.items()}
        if name == "01":
            tensors["second.weight"] = tensors["first.weight"]
            torch.save(tensors, folder / "zoo" / f"{name}.pt")
        else:
            save_file(tensors, folder / "zoo" / f"{name}.safetensors")


@pytest.mark.parametrize("row", LEARNERS)
def test_tied_parameters_are_mixed_once_and_stay_tied(tmp_path: Path, row: str):
    tied_zoo(tmp_path)
    quick = {
        "learned": {"epochs": 1, "batch_size": 64},
        "learned_layerwise": {"epochs": 1, "batch_size": 64},
        "mehl": {"inner_epochs": 1, "batch_size": 64, "block_size": 2},
        "mehl_layerwise": {"inner_epochs": 1, "batch_size": 64, "block_size": 2},
    }
    model = {"source": "factory", "factory": "net.py:Tied"}
    session = open_session(tmp_path, tmp_path / "out", model=model, zoo={"path": tmp_path / "zoo"})
    assert "second.weight" not in session.numels
    settings = LEARNERS[row].settings.model_validate(quick.get(row, {}))
    session.block_sizes[row] = 2
    session.ingredients = IngredientScores.of(session.evaluate_ingredients().right, 0.0)
    session.begin(row, tmp_path / "work")
    coefficients = LEARNERS[row].function()(session, settings)
    assert session.model.first.weight is session.model.second.weight
    cook_soup(session, coefficients, tmp_path / "soup.safetensors", memory_budget=2**28)
    cooked = load_file(tmp_path / "soup.safetensors")
    column = coefficients.column("first.weight")
    parts = [*column, 1 - column.sum()] if coefficients.base else [*column]
    sources = [*session.zoo.checkpoints, session.zoo.base]
    wanted = sum(a * k.read("first.weight").double() for a, k in zip(parts, sources, strict=False))
    torch.testing.assert_close(cooked["first.weight"].double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(session.model.second.weight.detach(), cooked["first.weight"])
    rows = torch.arange(0, 449, 2)
    scores = score_soup(session, coefficients, rows)
    logits = coefficients.temperature * session.logits(session.select.subset(rows))
    wanted = Scores.of(logits[None], session.select.labels[rows]).losses
    torch.testing.assert_close(scores.losses, wanted, rtol=1e-4, atol=1e-5)
    if "second.weight" in cooked:
        assert cooked["second.weight"].equal(cooked["first.weight"])
