"""Laws that every registered learner keeps, on a real zoo with BatchNorm."""

import numpy as np
import pytest
import torch

from merge.coefficients import Coefficients
from soups.deltas import Mixture
from soups.ingredients import find_ingredients
from soups.learners.registry import LEARNERS
from soups.pipeline import open_run, run
from tests.soups.conftest import load_checkpoint, make_config

QUICK = {
    "learned": {"epochs": 1, "batch_size": 64},
    "learned_layerwise": {"epochs": 1, "batch_size": 64},
    "greedy_full": {"folds": 2, "patience": 1},
    "random_search": {"evaluations": 8, "population": 4},
    "cmaes": {"evaluations": 12, "population": 6, "groups": "layer"},
    "zeroth_order": {"steps": 2, "directions": 2, "images": 64, "groups": "layer"},
    "pooled": {"steps": 4, "penalties": [10.0, 1.0], "folds": 2, "block_size": 2},
    "pooled_newton": {"folds": 2},
    "mehl": {"inner_epochs": 1, "batch_size": 64, "block_size": 2},
    "mehl_layerwise": {"inner_epochs": 1, "batch_size": 64, "block_size": 2},
}
GRADIENT = ("learned", "learned_layerwise", "mehl", "mehl_layerwise")
RULES = ["uniform", "convex", "recalibrate"]


def session_of(kitchen, tmp_path, row, settings=None, **changes):
    """A session over the small zoo, begun for one row, and that row's settings."""
    config = make_config(
        kitchen, output=tmp_path, learners={row: settings or QUICK.get(row, {})}, **changes
    )
    opened = open_run(
        config, tmp_path, torch.device("cpu"), root=kitchen, fresh=False, progress=False
    )
    opened.score_ingredients()
    session = opened.session
    session.block_sizes = {row: config.learners[row].model_dump().get("block_size")}
    session.begin(row, tmp_path / "work" / row)
    return session, config.learners[row]


def learn(session, settings) -> Coefficients:
    return LEARNERS[settings.type].function()(session, settings)


@pytest.fixture(scope="module")
def learned(kitchen, tmp_path_factory):
    """For a row and a rule of norm buffers: session, coefficients, the weights held at the end."""
    made = {}

    def made_once(row, rule):
        if (row, rule) not in made:
            folder = tmp_path_factory.mktemp("learned")
            made[row, rule] = _learned(kitchen, folder, row, rule)
        return made[row, rule]

    return made_once


def _learned(kitchen, folder, row, rule):
    held = {}

    def close(mixture, original=Mixture.close):
        held.update({n: p.detach().clone() for n, p in mixture.model.named_parameters()})
        original(mixture)

    session, settings = session_of(kitchen, folder, row, norm_buffers=rule)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mixture, "close", close)
        coefficients = learn(session, settings)
    if settings.type not in GRADIENT:
        # These try many weights and hold none at the end: what they chose is what is loaded.
        session.load(coefficients)
        held = {n: p.detach().clone() for n, p in session.model.named_parameters()}
    return session, coefficients, held


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("row", LEARNERS)
def test_coefficients_times_originals_are_the_weights_that_the_learner_held(learned, row, rule):
    session, coefficients, held = learned(row, rule)
    sources = [*session.zoo.checkpoints, session.zoo.base]
    for name, weights in held.items():
        column = coefficients.column(name)
        parts = [*column, 1 - column.sum()] if coefficients.base else column
        wanted = sum(a * k.read(name).double() for a, k in zip(parts, sources, strict=False))
        assert (weights.double() - wanted).norm() <= 1e-6 * wanted.norm(), name


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("row", LEARNERS)
def test_columns_sum_to_one_and_buffers_keep_their_rule(learned, row, rule):
    _, coefficients, _ = learned(row, rule)
    buffers = [g for g in coefficients.groups if g.startswith("norm buffers")]
    assert buffers
    for group, column in zip(coefficients.groups, coefficients.matrix.T, strict=True):
        if coefficients.base is None:
            assert column.sum() == pytest.approx(1, abs=1e-9)
        if group in buffers:
            assert (column >= 0).all()
            assert column.sum() <= 1 + 1e-9
            if rule != "convex" and coefficients.base is None:
                assert len(set(column[column > 0])) == 1


@pytest.mark.parametrize("row", LEARNERS)
def test_equal_ingredients_give_that_ingredient(kitchen, tmp_path, row):
    path = str(kitchen / "zoo" / "00.safetensors")
    zoo = {"path": kitchen / "zoo", "ingredients": [path, path, path], "base": path}
    session, settings = session_of(kitchen, tmp_path, row, zoo=zoo)
    session.load(learn(session, settings))
    loaded = {n: t.clone() for n, t in session.model.state_dict().items()}
    load_checkpoint(session, session.zoo.checkpoints[0])
    for name, tensor in session.model.state_dict().items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("row", LEARNERS)
def test_learning_again_gives_the_same_bits_and_leaves_the_ingredients_alone(
    kitchen, tmp_path, learned, row
):
    before = {p: p.read_bytes() for p in (kitchen / "zoo").iterdir()}
    _, first, _ = learned(row, "uniform")
    torch.manual_seed(12345)
    second = learn(*session_of(kitchen, tmp_path / "b", row))
    assert first.to_json() == second.to_json()
    assert before == {p: p.read_bytes() for p in (kitchen / "zoo").iterdir()}


@pytest.mark.parametrize("row", ["best_single", "uniform", "greedy", "greedy_full"])
def test_the_order_of_the_ingredients_does_not_matter(kitchen, tmp_path, row):
    paths, base = find_ingredients(make_config(kitchen).zoo)
    chosen = {}
    for order in (paths, paths[::-1]):
        zoo = {"path": kitchen / "zoo", "ingredients": order, "base": base}
        session, settings = session_of(kitchen, tmp_path / str(order is paths), row, zoo=zoo)
        if len(set(session.ingredients.accuracies)) < len(order):
            pytest.skip("two ingredients are equally accurate, and the first of equals wins")
        found = learn(session, settings)
        names = [ingredient.name for ingredient in found.ingredients]
        chosen[order is paths] = dict(zip(names, found.matrix[:, 0], strict=True))
    assert chosen[True] == chosen[False]


def test_greedy_equals_selection_one_by_one(kitchen, tmp_path):
    session, settings = session_of(kitchen, tmp_path, "greedy")
    members = np.flatnonzero(learn(session, settings).matrix[:, 0]).tolist()
    accuracies = session.ingredients.accuracies
    kept, best = [], -1.0
    for k in sorted(range(len(accuracies)), key=lambda k: -accuracies[k]):
        matrix = np.zeros((len(accuracies), 1))
        matrix[[*kept, k]] = 1 / (len(kept) + 1)
        session.load(session.coefficients(session.whole_model(), matrix, settings))
        accuracy = session.accuracy()
        if accuracy >= best:
            kept, best = [*kept, k], accuracy
    assert members == sorted(kept)


def test_mehl_descends_and_a_ruined_ingredient_loses_weight(kitchen, tmp_path):
    """The head of one ingredient is shuffled: it must end below its share of 1/K."""
    from safetensors.torch import save_file

    from merge.checkpoints import open_checkpoint

    with open_checkpoint(kitchen / "zoo" / "02.safetensors") as good:
        ruined = {name: good.read(name) for name in good.tensors}
    order = torch.tensor([3, 7, 0, 9, 1, 8, 2, 5, 4, 6])
    ruined["9.weight"], ruined["9.bias"] = ruined["9.weight"][order], ruined["9.bias"][order]
    save_file(ruined, tmp_path / "ruined.safetensors")
    others = [str(kitchen / "zoo" / f"{k:02d}.safetensors") for k in (0, 1, 3, 4)]
    zoo = {"path": kitchen / "zoo", "ingredients": [*others, str(tmp_path / "ruined.safetensors")]}
    settings = {"batch_size": 64, "block_size": 5}
    session, settings = session_of(kitchen, tmp_path, "mehl_layerwise", settings, zoo=zoo)
    coefficients = learn(session, settings)
    learned = session.load(coefficients) or session.accuracy()
    session.load(learn(*session_of(kitchen, tmp_path / "u", "uniform", zoo=zoo)))
    assert learned > session.accuracy()
    assert coefficients.column("9.weight")[-1] < 1 / 5


@pytest.mark.parametrize("init", ["mean_all", "first_block"])
@pytest.mark.parametrize("rows", ["relative", "unit"])
def test_mehl_goes_on_after_any_block_to_the_same_bits(kitchen, tmp_path, monkeypatch, init, rows):
    from soups.learners import mehl as module

    settings = {
        "inner_epochs": 1,
        "batch_size": 64,
        "block_size": 2,
        "outer_epochs": 2,
        "init": init,
        "rows": rows,
        "lr": 0.01 if rows == "relative" else 0.05,
    }
    whole = learn(*session_of(kitchen, tmp_path / "whole", "mehl_layerwise", settings))

    class KilledError(Exception):
        pass

    saved = module.save_progress
    for stop_after in (1, 4):
        folder = tmp_path / f"killed{stop_after}"

        def save_and_die(*arguments, stop_after=stop_after):
            saved(*arguments)
            if arguments[2].blocks_done == stop_after:
                raise KilledError

        monkeypatch.setattr(module, "save_progress", save_and_die)
        with pytest.raises(KilledError):
            learn(*session_of(kitchen, folder, "mehl_layerwise", settings))
        monkeypatch.setattr(module, "save_progress", saved)
        session, again = session_of(kitchen, folder, "mehl_layerwise", settings)
        assert learn(session, again).to_json() == whole.to_json()


def test_train_mode_turns_dropout_on_only_when_asked(kitchen, tmp_path):
    plain = learn(*session_of(kitchen, tmp_path / "a", "mehl"))
    trained = learn(*session_of(kitchen, tmp_path / "b", "mehl", train_mode=True))
    assert not np.array_equal(plain.matrix, trained.matrix)


@pytest.mark.parametrize("rule", RULES)
def test_the_cooked_soup_scores_what_the_learner_last_scored(kitchen, tmp_path, rule):
    learners = {row: QUICK.get(row, {}) for row in LEARNERS}
    config = make_config(kitchen, output=tmp_path, learners=learners, norm_buffers=rule)
    rows = run(config, root=kitchen, fresh=False, progress=False, say=lambda text: None)
    import json

    steps = json.loads((tmp_path / "small" / "work" / "steps.json").read_text())
    for row in rows:
        assert row.select.accuracy == steps[f"learn/{row.learner}"]["result"]["select_accuracy"]
