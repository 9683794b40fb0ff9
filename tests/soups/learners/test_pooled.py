"""Descents in few numbers: weights and gradients in float64, being killed, odd zoos."""

import logging

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from tqdm.auto import tqdm

from merge.checkpoints import open_checkpoint
from soups.errors import SoupError
from soups.learners import pooled as module
from soups.learners.pooled import _Descents, _State
from soups.learners.shape import LADDER, WAVES, Shape
from soups.learners.trials import Folds, try_starts
from soups.session import IngredientScores
from tests.soups.learners.float64 import soup_logits, soup_weights, squared_lengths
from tests.soups.learners.synthetic import KilledError
from tests.soups.learners.test_learners import learn, session_of

QUICK = {
    "groups": "layer",
    "steps": 4,
    "levels": ["depth"],
    "penalties": [10.0, 1.0],
    "folds": 2,
    "gate": 0.0,
}


# With which a soup is learned that has a lower loss out of fold than greedy's.
LEARNS = {"steps": 20, "lr": 0.05, "penalties": [10.0, 1.0]}


def begun(kitchen, tmp_path, **settings):
    """A session begun for `pooled` with quick settings, and these."""
    return session_of(kitchen, tmp_path, "pooled", QUICK | settings)


def descents_of(session, settings, size):
    """The descents in blocks of that size, their groups and folds."""
    session.block_sizes = {session.row: size}
    groups, folds = session.groups(settings), Folds(session, settings.folds)
    return _Descents(session, settings, groups, folds), groups, folds


def random_columns(groups, *, seed=0):
    """Columns over five ingredients that sum to one, some entries negative."""
    soup = np.random.default_rng(seed).normal(0.2, 0.2, size=(5, len(groups)))
    return soup + (1 - soup.sum(0)) / 5


def assert_weights(session, groups, soup):
    """The model has the weights Σ_k A[k, g] w_k."""
    wanted = soup_weights(session, groups, torch.from_numpy(soup))
    assert wanted.keys() == dict(session.model.named_parameters()).keys()
    for name, weights in wanted.items():
        own = session.model.get_parameter(name).detach().double()
        assert (own - weights).norm() <= 2e-6 * weights.norm(), name


# --- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_weights_are_the_coefficients_times_the_originals(kitchen, tmp_path, size):
    session, settings = begun(kitchen, tmp_path)
    descents, groups, _ = descents_of(session, settings, size)
    with descents:
        for seed in range(3):
            soup = random_columns(groups, seed=seed)
            descents._give(torch.from_numpy(soup))
            assert_weights(session, groups, soup)
        # A block begins where all coefficients lead, and moves along its own ingredients.
        for number, members in enumerate(descents.blocks):
            soup = random_columns(groups, seed=9 + number)
            descents._enter(number, torch.from_numpy(soup))
            own = torch.from_numpy(soup[members.start : members.stop]).float()
            if len(descents.blocks) == 1:
                descents._load(0)
            descents.mixture.apply(own)
            assert_weights(session, groups, soup)


def test_lengths_are_those_of_ingredient_less_mean_in_whatever_blocks(kitchen, tmp_path):
    session, settings = begun(kitchen, tmp_path)
    for size in (1, 2, 5):
        descents, groups, _ = descents_of(session, settings, size)
        with descents:
            wanted = squared_lengths(session, groups)
            torch.testing.assert_close(descents._squares.double(), wanted, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("rule", ["uniform", "convex"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_after_a_descent_the_model_is_the_soup_and_its_logits_are_kept(
    kitchen, tmp_path, monkeypatch, size, rule
):
    session, settings = session_of(kitchen, tmp_path, "pooled", QUICK, norm_buffers=rule)
    descents, groups, folds = descents_of(session, settings, size)
    shape = Shape.of("depth", groups)
    start = np.stack([random_columns(groups, seed=fold) for fold in range(len(folds))])
    held_out, given = _Descents._held_out, []

    def checked(self, fold, soup):
        logits = held_out(self, fold, soup)
        assert_weights(session, groups, soup)
        given.append(soup)
        return logits

    monkeypatch.setattr(_Descents, "_held_out", checked)
    with descents, tqdm(disable=True) as bar:
        trials = descents.path("uniform", "depth", start, bar)
    assert len(given) == len(folds) * len(settings.penalties)
    for trial, penalty in zip(trials, settings.penalties, strict=True):
        assert trial.name == f"uniform + depth, λ = {penalty:g}"
        assert trial.numbers == shape.numbers
        for fold, soup in enumerate(trial.soups):
            images = session.select.subset(folds.held_out[fold])
            wanted = soup_logits(session, groups, torch.from_numpy(soup), images)
            found = trial.logits[folds.held_out[fold]].double()
            torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=1e-4)
            # What was learned is what the numbers can say: no more than waves over depth.
            moved = soup - start[fold]
            waves = np.linalg.lstsq(shape.features.double().numpy().T, moved.T, rcond=None)[0]
            np.testing.assert_allclose(
                shape.features.double().numpy().T @ waves, moved.T, atol=1e-6
            )
            assert np.abs(moved).max() > 1e-3


def test_norm_buffers_are_those_of_the_soup_while_it_is_learned(kitchen, tmp_path, monkeypatch):
    session, settings = begun(kitchen, tmp_path, penalties=[1.0])
    descents, groups, folds = descents_of(session, settings, 5)
    greedy = np.repeat([[0.5], [0.0], [0.0], [0.5], [0.0]], len(groups), axis=1)
    seen = []

    class Watched(torch.optim.Adam):
        def step(self, closure=None):
            seen.append({n: b.clone() for n, b in session.model.named_buffers()})
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "Adam", Watched)
    with descents, tqdm(disable=True) as bar:
        descents.path("greedy", "depth", np.stack([greedy] * len(folds)), bar)
    scored = dict(session.model.named_buffers())
    for name in session.norms.names:
        torch.testing.assert_close(seen[-1][name], scored[name])


# --- the gradient --------------------------------------------------------------------------------


def pull_by_hand(squares, level):
    """ρ_k, 10 ρ_k for each wave, 100 ρ_{k,g} for each group."""
    mean = squares.sum() / len(squares)
    whole = squares.sum(1, keepdim=True) / mean
    parts = [whole]
    if level != "ingredient":
        parts += [LADDER["depth"] * whole] * WAVES
    if level == "group":
        parts.append(LADDER["group"] * squares / mean)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("level", ["ingredient", "depth", "group"])
@pytest.mark.parametrize("rule", ["uniform", "convex"])
def test_a_step_goes_down_the_gradient_of_the_whole_objective(
    kitchen, tmp_path, monkeypatch, level, rule
):
    """In the block's numbers and log β, against float64 autograd through the weighted sum."""
    own = {"batch_size": 449, "steps": 2, "label_smoothing": 0.1, "temperature": True}
    session, settings = session_of(kitchen, tmp_path, "pooled", QUICK | own, norm_buffers=rule)
    descents, groups, folds = descents_of(session, settings, 2)
    shape = Shape.of(level, groups)
    start = random_columns(groups, seed=4)
    stream = torch.Generator().manual_seed(1)
    state = _State(0.1 * torch.randn(5, shape.numbers, generator=stream), 0.3)
    penalty, block = 40.0, 1
    steps = []

    class Recorded(torch.optim.Adam):
        def step(self, closure=None):
            (group,) = self.param_groups
            steps.append([(p.detach().clone(), p.grad.clone()) for p in group["params"]])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "Adam", Recorded)
    with descents, tqdm(disable=True) as bar, session.on(folds.learned_on[0], "fold") as inner:
        descents._descend(inner, shape, start, state, penalty, block, bar)
        images = inner.select
    assert len(steps) == 2
    members = list(descents.blocks[block])
    assert steps[0][0][0].equal(state.numbers[members])
    for (numbers, gradient), (log_beta, of_beta) in steps:
        all_numbers = state.numbers.double().clone()
        all_numbers[members] = numbers.double()
        all_numbers.requires_grad_()
        beta = log_beta.double().requires_grad_()
        moved = all_numbers @ shape.features.double()
        soup = torch.from_numpy(start) + moved - moved.mean(0)
        # Norm buffers are constants in a step, also where they follow the coefficients.
        logits = soup_logits(session, groups, soup, images, fixed_buffers=True)
        loss = F.cross_entropy(beta.exp() * logits, images.labels, label_smoothing=0.1)
        pull = pull_by_hand(squared_lengths(session, groups), level)
        penalised = penalty / (2 * len(images)) * (pull * all_numbers**2).sum()
        wanted, wanted_of_beta = torch.autograd.grad(loss + penalised, [all_numbers, beta])
        most = wanted[members].abs().max().item()
        torch.testing.assert_close(gradient.double(), wanted[members], rtol=2e-4, atol=2e-4 * most)
        torch.testing.assert_close(of_beta.double(), wanted_of_beta, rtol=1e-3, atol=1e-5)


# --- being killed --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "changes", "deaths"),
    [
        # In the first fold, between two λ of the second, and between two λ of all of *select*.
        ("uniform", LEARNS | {"refit": True}, (1, 4, 6)),
        # In the second block of the second level's last fold.
        ("recalibrate", {"block_size": 3, "levels": ["ingredient", "depth"], "shift": 1}, (14,)),
    ],
)
def test_it_goes_on_after_any_fold_to_the_same_bits_and_counts(
    kitchen, tmp_path, monkeypatch, rule, changes, deaths
):
    settings = QUICK | {"batch_size": 100} | changes

    def start(folder):
        return session_of(kitchen, folder, "pooled", settings, norm_buffers=rule)

    def counts(session):
        return session.examples_forward, session.examples_backward, session.steps

    session, own = start(tmp_path / "whole")
    whole = learn(session, own).to_json()
    record, spent = session.record, counts(session)
    if own.refit:
        assert "depth" in record["gate"]["kept"]
    descend = _Descents._descend
    for die_at in deaths:
        calls = 0

        def dying(*arguments, die_at=die_at):
            nonlocal calls
            calls += 1
            if calls == die_at:
                raise KilledError
            return descend(*arguments)

        folder = tmp_path / f"killed{die_at}"
        monkeypatch.setattr(_Descents, "_descend", dying)
        with pytest.raises(KilledError):
            learn(*start(folder))
        monkeypatch.setattr(_Descents, "_descend", descend)
        session, own = start(folder)
        assert learn(session, own).to_json() == whole
        assert session.record == record
        assert counts(session) == spent


@pytest.mark.parametrize("refit", [False, True])
def test_what_is_finished_is_not_learned_again(kitchen, tmp_path, monkeypatch, refit):
    session, settings = begun(kitchen, tmp_path, refit=refit, **LEARNS)
    whole = learn(session, settings).to_json()
    spent = session.examples_forward, session.examples_backward, session.steps

    def never(*_):
        raise KilledError

    monkeypatch.setattr(_Descents, "_descend", never)
    session, settings = begun(kitchen, tmp_path, refit=refit, **LEARNS)
    assert learn(session, settings).to_json() == whole
    assert (session.examples_forward, session.examples_backward, session.steps) == spent


@pytest.mark.parametrize("refit", [False, True])
def test_the_answer_is_the_mean_of_the_folds_or_learned_on_all_images(
    kitchen, tmp_path, monkeypatch, refit
):
    seen, paths = [], []
    conclude, descend_path = module.conclude, _Descents._descend_path

    def watched(*arguments, **named):
        seen.append(arguments)
        return conclude(*arguments, **named)

    def watched_path(self, inner, shape, start, bar):
        soups = descend_path(self, inner, shape, start, bar)
        paths.append((len(inner.select), soups))
        return soups

    monkeypatch.setattr(module, "conclude", watched)
    monkeypatch.setattr(_Descents, "_descend_path", watched_path)
    session, settings = begun(kitchen, tmp_path, refit=refit, **LEARNS)
    found = learn(session, settings)
    ((_, _, _, trials, *_),) = seen
    kept = session.record["gate"]["kept"]
    best = min(trials, key=lambda trial: trial.losses.mean())
    assert kept == best.name
    number = ["uniform + depth, λ = 10", "uniform + depth, λ = 1"].index(kept)
    folds = np.stack([soups[number] for images, soups in paths if images < 449])
    assert np.array_equal(folds, best.soups)
    whole = [soups[number] for images, soups in paths if images == 449]
    assert len(whole) == refit
    wanted = whole[0] if refit else folds.mean(0)
    columns = found.matrix[:, : len(found.groups) - 1]
    np.testing.assert_allclose(columns, wanted, rtol=0, atol=1e-15)
    assert found.temperature == best.temperature


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 5])
def test_in_whatever_blocks_columns_sum_to_one_in_the_box(kitchen, tmp_path, size):
    tight = {"bounds": (0.0, 1.0), "lr": 0.5, "penalties": [0.0]}
    session, settings = begun(kitchen, tmp_path, block_size=size, **tight)
    found = learn(session, settings)
    columns = found.matrix[:, : len(found.groups) - 1]
    np.testing.assert_allclose(columns.sum(0), 1, atol=1e-12)
    assert columns.min() >= -1e-12
    assert columns.max() <= 1 + 1e-12
    if session.record["gate"]["kept"] not in ("uniform", "greedy"):
        assert np.ptp(columns, axis=1).max() > 0


def test_the_loss_falls_and_more_penalty_moves_less(kitchen, tmp_path):
    session, settings = begun(
        kitchen, tmp_path, steps=16, penalties=[1e6, 1e3, 0.0], temperature=False, lr=0.02
    )
    descents, groups, folds = descents_of(session, settings, 5)
    start = np.full((len(folds), 5, len(groups)), 1 / 5)
    with descents, tqdm(disable=True) as bar:
        trials = descents.path("uniform", "depth", start, bar)
    moved = [np.abs(trial.soups - start).sum() for trial in trials]
    assert moved[0] < 0.02 * moved[2]
    assert moved[0] < moved[1] < moved[2]
    for fold, rows in enumerate(folds.learned_on):
        images = session.select.subset(rows)
        losses = [
            F.cross_entropy(
                soup_logits(session, groups, torch.from_numpy(soup), images), images.labels
            ).item()
            for soup in (start[fold], trials[2].soups[fold])
        ]
        assert losses[1] < losses[0]


@pytest.mark.parametrize("start", ["uniform", "greedy"])
def test_it_begins_at_its_start(kitchen, tmp_path, start):
    """Held back by all means it stays there, whatever is out of fold."""
    session, settings = begun(
        kitchen, tmp_path, starts=[start], penalties=[1e12], lr=1e-7, levels=["ingredient", "group"]
    )
    learn(session, settings)
    names = [entry["trial"] for entry in session.record["trials"]]
    assert names == [
        "uniform",
        "greedy",
        f"{start} + ingredient, λ = 1e+12",
        f"{start} + group, λ = 1e+12",
    ]
    losses = {entry["trial"]: entry["loss"] for entry in session.record["trials"]}
    assert losses[names[3]] == pytest.approx(losses[start], rel=0.3)
    if start == "uniform":
        assert losses[names[3]] == pytest.approx(losses[start], rel=1e-4)


def test_of_two_starts_the_better_one_out_of_fold_is_taken(kitchen, tmp_path):
    session, settings = begun(kitchen, tmp_path, starts=["uniform", "greedy"])
    learn(session, settings)
    losses = {entry["trial"]: entry["loss"] for entry in session.record["trials"]}
    better = min(("uniform", "greedy"), key=lambda name: losses[name])
    assert all(name.startswith(better) for name in losses if "+" in name)
    assert len(losses) == 4


@pytest.mark.parametrize("augment", [{"flip": True}, {"shift": 2}, {"flip": True, "shift": 1}])
def test_augmenting_changes_what_is_learned_and_not_what_is_scored(
    kitchen, tmp_path, monkeypatch, augment
):
    calls = []
    plain = module.flip_and_shift

    def watched(images, *, flip, shift, generator):
        calls.append((flip, shift))
        return plain(images, flip=flip, shift=shift, generator=generator)

    monkeypatch.setattr(module, "flip_and_shift", watched)
    one = begun(kitchen, tmp_path / "plain")
    first = learn(*one)
    assert calls == []
    other = begun(kitchen, tmp_path / "augmented", **augment)
    second = learn(*other)
    assert set(calls) == {(augment.get("flip", False), augment.get("shift", 0))}
    assert len(calls) == other[0].steps
    trials = [session.record["trials"] for session, _ in (one, other)]
    assert trials[0][:2] == trials[1][:2]
    assert trials[0][2:] != trials[1][2:]
    assert first.to_json() != second.to_json()


def test_the_scale_of_the_logits_is_learned_only_when_asked(kitchen, tmp_path, monkeypatch):
    found = []

    class Watched(torch.optim.Adam):
        def __init__(self, parameters, **settings):
            parameters = list(parameters)
            found.append(len(parameters))
            super().__init__(parameters, **settings)

    monkeypatch.setattr(torch.optim, "Adam", Watched)
    learn(*begun(kitchen, tmp_path / "with", temperature=True))
    learn(*begun(kitchen, tmp_path / "without", temperature=False))
    half = len(found) // 2
    assert found == [2] * half + [1] * half


def test_a_loss_that_is_not_finite_names_the_learning_rate(kitchen, tmp_path):
    session, settings = begun(kitchen, tmp_path, lr=1e30)
    with pytest.raises(
        SoupError, match=r"learners\.pooled: the loss .* lower learners\.pooled\.lr"
    ):
        learn(session, settings)


# --- odd zoos and splits -------------------------------------------------------------------------


def zoo_of(kitchen, *paths):
    """The zoo section of a config with these ingredients, named by number or path."""
    folder = kitchen / "zoo"
    files = [
        folder / f"{path:02d}.safetensors" if isinstance(path, int) else path for path in paths
    ]
    return {"path": folder, "ingredients": [str(file) for file in files]}


def test_twins_are_named_and_share_their_weight(kitchen, tmp_path, caplog):
    (tmp_path / "twin.safetensors").write_bytes((kitchen / "zoo" / "01.safetensors").read_bytes())
    zoo = zoo_of(kitchen, 0, 1, 3, tmp_path / "twin.safetensors")
    session, settings = session_of(kitchen, tmp_path / "out", "pooled", QUICK, zoo=zoo)
    with caplog.at_level(logging.WARNING):
        found = learn(session, settings)
    assert "01, twin are the same model" in caplog.text
    assert np.isfinite(found.matrix).all()
    assert np.isfinite([entry["loss"] for entry in session.record["trials"]]).all()
    if session.record["gate"]["kept"] not in ("uniform", "greedy"):
        columns = found.matrix[:, : len(found.groups) - 1]
        np.testing.assert_allclose(columns[1], columns[3], atol=1e-5)
        assert np.abs(columns[1] - columns[0]).max() > 1e-4


def test_a_zoo_of_one_model_many_times_is_that_model(kitchen, tmp_path, caplog):
    zoo = zoo_of(kitchen, 1, 1, 1)
    session, settings = session_of(kitchen, tmp_path, "pooled", QUICK, zoo=zoo)
    with caplog.at_level(logging.WARNING):
        found = learn(session, settings)
    assert "all ingredients are the same" in caplog.text
    assert np.isfinite(found.matrix).all()


def test_few_images_make_fewer_folds_and_that_is_said(kitchen, tmp_path, caplog):
    session, settings = begun(kitchen, tmp_path, folds=5)
    labels = session.select.labels
    rows = torch.cat([(labels == c).nonzero()[:3, 0] for c in range(10)])
    session.select = session.select.subset(rows)
    session.ingredients = IngredientScores.of(session.evaluate_ingredients().right, 0.0)
    with caplog.at_level(logging.WARNING):
        found = learn(session, settings)
    assert "learners.pooled.folds: 3 folds instead of 5" in caplog.text
    assert session.record["out_of_fold"]["folds"] == 3
    assert np.isfinite(found.matrix).all()


def test_the_order_of_the_ingredients_does_not_matter(kitchen, tmp_path):
    found = []
    for order in ([0, 1, 2, 3, 4], [3, 0, 4, 2, 1]):
        session, settings = session_of(
            kitchen,
            tmp_path / str(order[0]),
            "pooled",
            QUICK | {"penalties": [1.0]},
            zoo=zoo_of(kitchen, *order),
        )
        descents, groups, folds = descents_of(session, settings, 5)
        start = np.full((len(folds), 5, len(groups)), 1 / 5)
        with descents, tqdm(disable=True) as bar:
            (trial,) = descents.path("uniform", "depth", start, bar)
        found.append({k: trial.soups[:, row] for row, k in enumerate(order)})
    for k, own in found[0].items():
        np.testing.assert_allclose(own, found[1][k], atol=2e-4)
        assert np.abs(own - 1 / 5).max() > 1e-3


def test_a_ruined_ingredient_loses_weight_where_it_is_ruined(kitchen, tmp_path):
    """The head of one ingredient is shuffled: with depth its weight there falls below others'."""
    with open_checkpoint(kitchen / "zoo" / "02.safetensors") as good:
        ruined = {name: good.read(name) for name in good.tensors}
    order = torch.tensor([3, 7, 0, 9, 1, 8, 2, 5, 4, 6])
    ruined["9.weight"], ruined["9.bias"] = ruined["9.weight"][order], ruined["9.bias"][order]
    save_file(ruined, tmp_path / "ruined.safetensors")
    zoo = zoo_of(kitchen, 0, 1, 3, 4, tmp_path / "ruined.safetensors")
    settings = QUICK | {"steps": 50, "penalties": [10.0], "lr": 0.02}
    session, settings = session_of(kitchen, tmp_path / "out", "pooled", settings, zoo=zoo)
    descents, groups, folds = descents_of(session, settings, 5)
    _, (uniform, _) = try_starts(session, groups, folds)
    with descents, tqdm(disable=True) as bar:
        (trial,) = descents.path("uniform", "depth", uniform.soups, bar)
    assert trial.mean_loss() < uniform.mean_loss() - 0.03
    head = trial.soups[:, :, -1]
    assert head[:, -1].max() < 0.1
