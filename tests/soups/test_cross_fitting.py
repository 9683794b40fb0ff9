"""Cross-fitting: soups learned without each fold and scored on it, and what the table says."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import log_softmax

import soups.cross_fitting
import soups.learners.mehl
import soups.learners.selection
from inputs.randomness import generator
from soups.cross_fitting import cross_fit, paired_standard_error
from soups.entries import free_coefficients
from soups.errors import SoupError
from soups.evaluate import predict
from soups.folds import split_folds
from soups.learners.registry import LEARNERS, Uniform
from soups.pipeline import run
from soups.session import IngredientScores, Session
from tests.soups.conftest import make_config, open_session

SETTINGS = {
    "uniform": {},
    "greedy": {},
    "wise_ft": {"soup": "greedy"},
    "learned_layerwise": {"epochs": 1, "batch_size": 64, "lr": 0.5},
    "mehl_layerwise": {"inner_epochs": 1, "batch_size": 64, "block_size": 2},
}


def session_of(kitchen: Path, folder: Path, row: str, **changes) -> Session:
    """A session with scored ingredients, begun for the row with a folder."""
    session = open_session(kitchen, folder, **changes)
    session.ingredients = IngredientScores.of(session.evaluate_ingredients().right, 0.0)
    session.block_sizes = {row: 2}
    session.progress = False
    session.begin(row, folder / "work")
    return session


def learner_of(row: str):
    return LEARNERS[row].settings.model_validate(SETTINGS[row]), LEARNERS[row].function()


@pytest.mark.parametrize("rule", ["uniform", "convex"])
@pytest.mark.parametrize("row", SETTINGS)
def test_each_image_is_judged_by_the_soup_learned_without_its_fold(
    kitchen: Path, tmp_path: Path, row: str, rule: str
):
    session = session_of(kitchen, tmp_path, row, norm_buffers=rule)
    settings, learner = learner_of(row)
    found = cross_fit(session, settings, learner, 3)
    labels = session.select.labels
    seen = torch.zeros(len(labels), dtype=torch.int64)
    for fold, rows in enumerate(split_folds(labels, 3, generator(session.seed, "out_of_fold"))):
        rest = torch.tensor(sorted(set(range(len(labels))) - set(rows.tolist())))
        with session.on(rest, f"fold_{fold}") as inner:
            soup = learner(inner, settings)
        session.load(soup)
        logits = predict(session.model, session.select.subset(rows), batch_size=512)
        logits = soup.temperature * logits.double().numpy()
        losses = -log_softmax(logits, axis=1)[np.arange(len(rows)), labels[rows]]
        np.testing.assert_allclose(found.losses[rows], losses, rtol=1e-4, atol=1e-5)
        clear = np.diff(np.sort(logits, axis=1)[:, -2:])[:, 0] > 1e-4
        right = logits.argmax(axis=1) == labels[rows].numpy()
        np.testing.assert_array_equal(found.right[rows][clear], right[clear])
        seen[rows] += 1
    assert (seen == 1).all()
    assert found.accuracy == found.right.mean()
    assert found.loss == pytest.approx(found.losses.astype(np.float64).mean(), rel=1e-12)
    assert found.folds == 3


def test_equal_soups_are_scored_together_and_everything_is_counted(kitchen: Path, tmp_path: Path):
    session = session_of(kitchen, tmp_path, "uniform")
    calls = []
    original = session.chunks

    def chunks(models, sets, **others):
        calls.append(len(sets[0]))
        return original(models, sets, **others)

    session.chunks = chunks  # type: ignore[method-assign]
    cross_fit(session, *learner_of("uniform"), 5)
    assert calls == [449]
    assert session.examples_forward == 449
    session.begin("mehl_layerwise", tmp_path / "mehl")
    session.block_sizes = {"mehl_layerwise": 2}
    cross_fit(session, *learner_of("mehl_layerwise"), 5)
    # Three blocks, each one pass over four fifths of the images in every fold; then the scores.
    assert session.examples_backward == 3 * 4 * 449
    assert session.examples_forward == (3 * 4 + 1) * 449


def test_killed_in_a_fold_it_goes_on_to_the_same_bits(
    kitchen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    row = "mehl_layerwise"
    settings, learner = learner_of(row)
    whole = cross_fit(session_of(kitchen, tmp_path / "whole", row), settings, learner, 2)
    session = session_of(kitchen, tmp_path / "killed", row)
    original, saved = soups.learners.mehl.save_progress, []

    def save_and_die(folder, mixture, progress):
        original(folder, mixture, progress)
        saved.append(folder.name)
        if saved.count("fold_1") == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(soups.learners.mehl, "save_progress", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        cross_fit(session, settings, learner, 2)
    assert saved == ["fold_0"] * 3 + ["fold_1"] * 2
    session.begin(row, tmp_path / "killed" / "work")
    found = cross_fit(session, settings, learner, 2)
    assert saved[5:] == ["fold_1"]
    np.testing.assert_array_equal(found.losses, whole.losses)
    assert session.examples_backward == 3 * 449


def test_more_folds_than_images_are_refused(kitchen: Path, tmp_path: Path):
    session = session_of(kitchen, tmp_path, "uniform")
    with pytest.raises(SoupError, match="found 450 for 449 images"):
        cross_fit(session, *learner_of("uniform"), 450)


def test_the_standard_error_is_that_of_the_paired_difference():
    rng = np.random.default_rng(0)
    a, b = rng.random(50) < 0.8, rng.random(50) < 0.7
    apart = [int(x) - int(y) for x, y in zip(a, b, strict=True)]
    mean = sum(apart) / 50
    wanted = (sum((x - mean) ** 2 for x in apart) / 49 / 50) ** 0.5
    assert paired_standard_error(a, b) == pytest.approx(wanted, rel=1e-12)
    assert paired_standard_error(a, a) == 0


@pytest.mark.parametrize(
    ("row", "settings", "wanted"),
    [
        ("uniform", {}, 0),
        ("best_single", {}, 4),
        ("greedy", {}, 4),
        ("greedy_full", {}, 4),
        ("wise_ft", {}, 1),
        ("wise_ft", {"soup": "greedy"}, 5),
        ("learned", {}, 4),
        ("mehl_layerwise", {"groups": "layer"}, 20),
        ("cmaes", {"groups": "tensor"}, 32),
    ],
)
def test_free_coefficients(kitchen: Path, tmp_path: Path, row: str, settings: dict, wanted: int):
    session = open_session(kitchen, tmp_path)
    settings = LEARNERS[row].settings.model_validate(settings)
    groups = session.groups(settings)
    soup = session.coefficients(groups, np.full((5, len(groups)), 0.2), settings)
    assert free_coefficients(settings, soup, {}, session.numels) == wanted
    assert free_coefficients(settings, soup, {"free_coefficients": 7}, session.numels) == 7


# --- in a run ------------------------------------------------------------------------------------


def learn(kitchen: Path, folder: Path, learners: dict, **changes) -> Path:
    config = make_config(kitchen, output=folder, learners=learners, **changes)
    run(config, root=kitchen, fresh=False, progress=False, say=lambda text: None)
    return folder / "small"


def test_a_run_says_what_its_rows_reach_out_of_fold(kitchen: Path, tmp_path: Path):
    learners = {row: SETTINGS[row] for row in ("uniform", "learned_layerwise")}
    folder = learn(kitchen, tmp_path, learners, out_of_fold=3)
    table = pd.read_csv(folder / "leaderboard.csv").set_index("learner")
    record = json.loads((folder / "run.json").read_text())
    with np.load(folder / "predictions.npz") as arrays:
        in_sample = {row: arrays[f"{row}/select"] for row in learners}
    for row in learners:
        path = folder / "work" / "out_of_fold" / row / "predictions.npz"
        with np.load(path) as arrays:
            right = arrays[f"{row}/select"]
        line = table.loc[row]
        assert line["out_of_fold_accuracy"] == right.mean()
        error = paired_standard_error(in_sample[row], right)
        assert line["out_of_fold_standard_error"] == pytest.approx(error, rel=1e-12)
        assert line["out_of_fold_folds"] == 3
        found = record["out_of_fold"][row]
        assert (found["accuracy"], found["folds"]) == (right.mean(), 3)
        assert sorted(p.name for p in path.parent.iterdir()) == ["predictions.npz"]
    # Each fold is learned without a third of the images; the scores of all are one more pass.
    assert record["out_of_fold"]["learned_layerwise"]["backward_passes"] == 2
    assert record["out_of_fold"]["learned_layerwise"]["forward_passes"] == 3
    assert record["learners"]["learned_layerwise"]["forward_passes"] == 1
    assert table.loc["learned_layerwise", "forward_passes"] == 1
    assert "out of fold %" in (folder / "leaderboard.md").read_text()


def test_learners_that_cross_fit_themselves_are_not_cross_fitted_again(
    kitchen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    right = np.arange(449) % 5 > 0

    def itself(session, settings):
        session.record["out_of_fold"] = {
            "accuracy": right.mean(),
            "loss": 0.25,
            "folds": 4,
            "right": right,
        }
        session.record["weights"] = [
            {"ingredient": "01", "weight": 0.2, "standard_error": 0.1, "low": 0.0, "high": 0.4}
        ]
        return soups.learners.selection.uniform(session, Uniform())

    def refused(*_):
        raise AssertionError("cross-fitted again")

    monkeypatch.setattr(soups.learners.selection, "best_single", itself)
    monkeypatch.setattr(soups.cross_fitting, "cross_fit", refused)
    learners = {"best_single": {}, "greedy_full": {"folds": 2, "patience": 1}}
    for _ in range(2):
        folder = learn(kitchen, tmp_path, learners)
        table = pd.read_csv(folder / "leaderboard.csv").set_index("learner")
        line = table.loc["best_single"]
        assert line["out_of_fold_accuracy"] == right.mean()
        assert (line["out_of_fold_loss"], line["out_of_fold_folds"]) == (0.25, 4)
        assert table["out_of_fold_own"].all()
        with np.load(folder / "predictions.npz") as arrays:
            error = paired_standard_error(arrays["best_single/select"], right)
        assert line["out_of_fold_standard_error"] == pytest.approx(error, rel=1e-12)
        full = table.loc["greedy_full"]
        assert 0.5 < full["out_of_fold_accuracy"] <= 1
        assert full["out_of_fold_folds"] == 2
        assert np.isnan(full["out_of_fold_standard_error"])
    record = json.loads((folder / "run.json").read_text())["learners"]["best_single"]["record"]
    assert record["out_of_fold"].keys() == {"accuracy", "loss", "folds"}


def test_a_finished_row_is_not_cross_fitted_again_unless_the_folds_change(
    kitchen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    found = []

    def counted(session, settings, learner, folds):
        found.append((session.row, folds))
        return cross_fit(session, settings, learner, folds)

    monkeypatch.setattr(soups.cross_fitting, "cross_fit", counted)
    learners = {row: SETTINGS[row] for row in ("uniform", "greedy")}
    for folds in (2, 2, 3):
        folder = learn(kitchen, tmp_path, learners, out_of_fold=folds)
    assert found == [("uniform", 2), ("greedy", 2), ("uniform", 3), ("greedy", 3)]
    first = (folder / "leaderboard.md").read_bytes()
    learn(kitchen, tmp_path, learners, out_of_fold=3)
    assert (folder / "leaderboard.md").read_bytes() == first


def test_without_folds_nothing_is_cross_fitted(kitchen: Path, tmp_path: Path):
    folder = learn(kitchen, tmp_path, {"uniform": {}}, out_of_fold=0)
    assert "out of fold" not in (folder / "leaderboard.md").read_text()
    assert not (folder / "pictures" / "overfitting.png").exists()
    assert "out_of_fold" not in json.loads((folder / "run.json").read_text())


def test_one_fold_is_refused(kitchen: Path):
    with pytest.raises(ValueError, match="one fold leaves no images to learn from"):
        make_config(kitchen, out_of_fold=1)
