"""Trials out of fold: greedy's walks, whose logits are whose, losses; against plain loops."""

import logging

import numpy as np
import pytest
import torch

from soups.learners.registry import Greedy, Pooled
from soups.learners.selection import greedy_members
from soups.learners.trials import (
    Folds,
    Gain,
    Trial,
    greedy_on_folds,
    logits_of,
    logits_of_folds,
    mean_of,
    try_starts,
)
from tests.soups.learners.float64 import soup_logits
from tests.soups.learners.test_learners import session_of


def begun(kitchen, tmp_path, **changes):
    """A session with scored ingredients, begun for `pooled`."""
    session, _ = session_of(kitchen, tmp_path, "pooled", {"groups": "layer"}, **changes)
    return session, session.groups(Pooled(groups="layer"))


def random_soups(groups, count, *, seed=0):
    """Columns that sum to one, some entries negative."""
    soups = np.random.default_rng(seed).normal(0.2, 0.2, size=(count, 5, len(groups)))
    return soups + (1 - soups.sum(1, keepdims=True)) / 5


@pytest.mark.parametrize("wanted", [2, 5])
def test_greedy_on_folds_is_greedy_on_each(kitchen, tmp_path, wanted):
    session, _ = begun(kitchen, tmp_path)
    for seed in (0, 1, 2):
        session.seed = seed
        session.found.clear()
        folds = Folds(session, wanted)
        found = greedy_on_folds(session, folds)
        assert len(found) == wanted + 1
        for rows, members in zip(folds.learned_on, found[:-1], strict=True):
            with session.on(rows, "fold") as inner:
                assert tuple(sorted(greedy_members(inner, Greedy()))) == members
        assert tuple(sorted(greedy_members(session, Greedy()))) == found[-1]


def test_greedy_on_folds_of_some_images_knows_only_these(kitchen, tmp_path):
    session, _ = begun(kitchen, tmp_path)
    rows = torch.arange(3, 449, 2).flip(0)
    with session.on(rows, "some") as inner:
        folds = Folds(inner, 3)
        found = greedy_on_folds(inner, folds)
        for own, members in zip([*folds.learned_on, torch.arange(len(rows))], found, strict=True):
            with inner.on(own, "fold") as innermost:
                assert tuple(sorted(greedy_members(innermost, Greedy()))) == members


def test_walks_share_what_is_known_and_are_counted_again_by_the_next_learner(kitchen, tmp_path):
    session, groups = begun(kitchen, tmp_path)
    images = len(session.select)
    folds = Folds(session, 4)
    first = try_starts(session, groups, folds)
    whole, rest = divmod(session.examples_forward, images)
    assert rest == 0
    # The ingredients; soups of two or more of five; two trials.
    assert 5 + 1 + 2 <= whole <= 5 + min(26, 5 * 4) + 2
    spent = session.examples_forward
    session.begin("another", None)
    second = try_starts(session, groups, folds)
    assert session.examples_forward == spent
    for name in first[0]:
        assert np.array_equal(first[0][name], second[0][name])
    for one, other in zip(first[1], second[1], strict=True):
        assert torch.equal(one.logits, other.logits)


def test_folds_are_those_of_every_learner_and_hold_out_each_image_once(kitchen, tmp_path):
    session, _ = begun(kitchen, tmp_path)
    folds = Folds(session, 4)
    images = len(session.select)
    assert torch.cat(folds.held_out).sort().values.tolist() == list(range(images))
    for held_out, learned_on in zip(folds.held_out, folds.learned_on, strict=True):
        assert sorted([*held_out.tolist(), *learned_on.tolist()]) == list(range(images))
    session.begin("another", None)
    for own, others in zip(folds.held_out, Folds(session, 4).held_out, strict=True):
        assert own.equal(others)


def test_fewer_folds_where_a_class_has_few_images_and_that_is_said(kitchen, tmp_path, caplog):
    session, _ = begun(kitchen, tmp_path)
    labels = session.select.labels
    few = (labels == 3).nonzero()[:3, 0]
    rows = torch.cat([few, (labels != 3).nonzero()[:, 0]])
    with session.on(rows, "few") as inner, caplog.at_level(logging.WARNING):
        assert len(Folds(inner, 5)) == 3
    assert "learners.pooled/few.folds: 3 folds instead of 5" in caplog.text


@pytest.mark.parametrize("rule", ["uniform", "convex"])
def test_each_images_logits_are_of_the_soup_of_its_own_fold(kitchen, tmp_path, rule):
    session, groups = begun(kitchen, tmp_path, norm_buffers=rule)
    folds, spent = Folds(session, 4), session.examples_forward
    soups = random_soups(groups, 4)
    soups[2] = soups[0]
    found = logits_of_folds(session, groups, folds, soups)
    assert session.examples_forward - spent == len(session.select)
    wanted = torch.full(found.shape, torch.nan, dtype=torch.float64)
    for rows, soup in zip(folds.held_out, soups, strict=True):
        images = session.select.subset(rows)
        wanted[rows] = soup_logits(session, groups, torch.from_numpy(soup), images).detach()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    # Another fold's soup would be far from it.
    other = soup_logits(session, groups, torch.from_numpy(soups[1]), session.select)
    assert (other[folds.held_out[0]] - found[folds.held_out[0]]).abs().max() > 0.1


def test_the_logits_of_a_soup_are_in_the_order_of_the_images(kitchen, tmp_path):
    session, groups = begun(kitchen, tmp_path)
    (soup,) = random_soups(groups, 1)
    images = session.select.subset(torch.tensor([7, 400, 3, 3, 120]))
    spent = session.examples_forward
    found = logits_of(session, groups, soup, images)
    assert session.examples_forward - spent == 5
    wanted = soup_logits(session, groups, torch.from_numpy(soup), images).detach()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_starts_are_uniform_and_greedy_of_each_fold(kitchen, tmp_path):
    session, groups = begun(kitchen, tmp_path)
    folds = Folds(session, 3)
    starts, trials = try_starts(session, groups, folds)
    members = greedy_on_folds(session, folds)
    assert list(starts) == [trial.name for trial in trials] == ["uniform", "greedy"]
    assert starts["uniform"].shape == starts["greedy"].shape == (4, 5, len(groups))
    assert (starts["uniform"] == 1 / 5).all()
    for view, own in enumerate(members):
        assert (starts["greedy"][view] == mean_of(own, 5)).all()
    for trial in trials:
        assert np.array_equal(trial.soups, starts[trial.name][:-1])
        for rows, soup in zip(folds.held_out, trial.soups, strict=True):
            images = session.select.subset(rows)
            wanted = soup_logits(session, groups, torch.from_numpy(soup), images).detach()
            torch.testing.assert_close(trial.logits[rows].double(), wanted, rtol=1e-4, atol=1e-4)


def crafted(seed, *, rows=80, classes=4):
    stream = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=stream)
    logits = 3 * torch.randn(rows, classes, generator=stream)
    logits[torch.arange(rows), labels] += 2
    return Trial("crafted", 1, np.full((2, 3, 1), 1 / 3), logits, labels)


@pytest.mark.parametrize("seed", range(3))
def test_the_losses_are_those_of_the_best_temperature(seed):
    trial = crafted(seed)

    def by_hand(beta):
        scaled = beta * trial.logits.double().numpy()
        log_sums = np.log(np.exp(scaled).sum(1))
        return log_sums - scaled[np.arange(len(scaled)), trial.labels.numpy()]

    np.testing.assert_allclose(trial.losses, by_hand(trial.temperature), rtol=1e-12)
    assert trial.mean_loss() == pytest.approx(by_hand(trial.temperature).mean(), rel=1e-12)
    for factor in (0.99, 1.01):
        assert by_hand(factor * trial.temperature).mean() > trial.mean_loss()
    assert np.array_equal(trial.right, (trial.logits.argmax(1) == trial.labels).numpy())
    assert trial.described() == {
        "trial": "crafted",
        "accuracy": trial.right.mean(),
        "loss": trial.mean_loss(),
        "temperature": trial.temperature,
    }


def test_a_gain_has_the_standard_error_of_paired_differences():
    one, other = crafted(0), crafted(1)
    gain = Gain.of(one.right.astype(float) - other.right)
    differences = [int(a) - int(b) for a, b in zip(one.right, other.right, strict=True)]
    mean = sum(differences) / len(differences)
    variance = sum((d - mean) ** 2 for d in differences) / (len(differences) - 1)
    assert gain.mean == pytest.approx(mean, abs=1e-15)
    assert gain.standard_error == pytest.approx((variance / len(differences)) ** 0.5, rel=1e-12)
    assert Gain.of(one.losses - one.losses) == Gain(0.0, 0.0)
