"""What a cross-fitted learner ends with, from crafted trials."""

import logging

import numpy as np
import pytest
import torch
from scipy.stats import t as students_t

from soups.learners.conclusion import conclude, jackknife, warn_of_identical
from soups.learners.registry import Pooled
from soups.learners.trials import Trial
from tests.soups.conftest import open_session

ROWS, CLASSES = 60, 4
LABELS = torch.arange(ROWS) % CLASSES


@pytest.fixture
def session(kitchen, tmp_path):
    session = open_session(kitchen, tmp_path)
    session.begin("row", None)
    return session


def trial(name, wrong, *, numbers=1, soups=None, doubt=0.0):
    """Right but on the `wrong` images; on those, `doubt` is how near it was to the label."""
    logits = 2.0 * torch.nn.functional.one_hot(LABELS, CLASSES).float()
    wrong = torch.tensor(sorted(wrong), dtype=torch.int64)
    logits[wrong] = logits[wrong].roll(1, dims=1)
    logits[wrong, LABELS[wrong]] = 2.0 * doubt
    if soups is None:
        soups = np.full((3, 5, 5), 1 / 5)
    return Trial(name, numbers, soups, logits, LABELS)


def soups_of(seed, groups=5):
    soups = np.random.default_rng(seed).normal(size=(3, 5, groups))
    return soups + (1 - soups.sum(1, keepdims=True)) / 5


def settle(session, trials, *, finished=None, weights=None, **settings):
    settings = Pooled(groups="layer", **settings)
    groups = session.groups(settings)
    return conclude(session, settings, groups, trials, finished or {}, weights or {})


# Wrong together on some, apart on others: four gained and one lost.
GREEDY = {0, 1, 2, 10, 11, 12, 13}
LEARNED = {0, 1, 2, 20}


def boundary(by):
    """The gate that the learned trial just does not pass."""
    greedy, learned = trial("greedy", GREEDY), trial("learned", LEARNED)
    apart = greedy.losses - learned.losses
    if by == "accuracy":
        apart = np.zeros(ROWS)
        apart[[10, 11, 12, 13]], apart[20] = 1, -1
    spread = ((apart - apart.mean()) ** 2).sum() / (ROWS - 1)
    return apart.mean() / np.sqrt(spread / ROWS), apart.mean()


@pytest.mark.parametrize("by", ["loss", "accuracy"])
def test_greedy_stays_up_to_the_gate_and_not_past_it(session, by):
    gate, gain = boundary(by)
    learned_soups = soups_of(0)
    trials = [
        trial("uniform", GREEDY | {30, 31}, numbers=0),
        trial("greedy", GREEDY),
        trial("learned", LEARNED, numbers=3, soups=learned_soups),
    ]
    greedy = np.full((4, 5, 5), 1 / 5)
    greedy[-1] = [[0.5]] * 2 + [[0.0]] * 3
    for factor, kept in ((1 + 1e-9, "greedy"), (1 - 1e-9, "learned")):
        found = settle(session, trials, finished={"greedy": greedy}, gate=gate * factor, gate_by=by)
        assert session.record["gate"]["kept"] == kept
        assert session.record["best_trial"] == "learned"
        own = session.record["gate"]["gains_on_greedy"][by]
        assert own["mean"] == pytest.approx(gain, rel=1e-12)
        assert own["mean"] / own["standard_error"] == pytest.approx(gate, rel=1e-12)
        columns = found.matrix[:, : len(found.groups) - 1]  # but the norm buffers'
        if kept == "greedy":
            assert columns.tolist() == greedy[-1][:, :1].tolist()
        else:
            np.testing.assert_allclose(columns, learned_soups.mean(0), rtol=1e-12)


def test_as_good_as_greedy_is_not_better(session):
    """At a gate of no standard errors a gain of nothing leaves greedy."""
    trials = [trial("greedy", GREEDY), trial("learned", {3, 4, 5, 14, 15, 16, 17}, doubt=0.9)]
    settle(session, trials, gate=0.0, gate_by="accuracy")
    assert session.record["best_trial"] == "learned"
    assert session.record["gate"]["kept"] == "greedy"
    assert session.record["gate"]["gains_on_greedy"]["accuracy"]["mean"] == 0
    settle(session, [trial("greedy", GREEDY), trial("learned", GREEDY)], gate=0.0, gate_by="loss")
    assert session.record["gate"]["kept"] == "greedy"


def test_at_a_gate_of_nothing_the_lowest_loss_is_taken_whatever_its_accuracy(session):
    learned = trial("learned", GREEDY | {40, 41}, numbers=3, soups=soups_of(1), doubt=0.95)
    trials = [trial("greedy", GREEDY), learned]
    settle(session, trials, gate=0.0)
    assert session.record["gate"]["kept"] == "learned"
    assert session.record["gate"]["gains_on_greedy"]["accuracy"]["mean"] == pytest.approx(-2 / ROWS)
    settle(session, trials, gate=0.0, gate_by="accuracy")
    assert session.record["gate"]["kept"] == "greedy"


def test_the_record_says_what_was_tried_and_what_is_taken(session):
    uniform = trial("uniform", GREEDY | {30}, numbers=0)
    greedy = trial("greedy", GREEDY)
    learned = trial("learned", LEARNED, numbers=3, soups=soups_of(2))
    settle(session, [uniform, greedy, learned], gate=0.0)
    record = session.record
    assert [entry["trial"] for entry in record["trials"]] == ["uniform", "greedy", "learned"]
    for entry, own in zip(record["trials"], (uniform, greedy, learned), strict=True):
        assert entry == own.described()
    assert record["gate"]["standard_errors_wanted"] == 0.0
    assert record["out_of_fold"] == {
        "accuracy": 1 - len(LEARNED) / ROWS,
        "loss": learned.mean_loss(),
        "folds": 3,
        "right": [i not in LEARNED for i in range(ROWS)],
    }
    assert record["free_coefficients"] == 3 * 4
    assert [entry["ingredient"] for entry in record["weights"]] == list(session.zoo.names)
    settle(session, [uniform, greedy, learned], gate=1e9)
    assert session.record["free_coefficients"] == 4
    assert session.record["out_of_fold"]["accuracy"] == 1 - len(GREEDY) / ROWS
    worse = [trial("greedy", range(30)), uniform]
    settle(session, worse, gate=0.0)
    assert session.record["gate"]["kept"] == "uniform"
    assert session.record["free_coefficients"] == 0


def test_what_is_finished_is_taken_rather_than_the_mean_and_known_weights_stay(session):
    learned = trial("learned", LEARNED, numbers=3, soups=soups_of(3))
    of_all = soups_of(4)
    known = [{"ingredient": "said", "weight": 0.5}]
    trials = [trial("greedy", GREEDY), learned]
    found = settle(
        session, trials, gate=0.0, finished={"learned": of_all}, weights={"learned": known}
    )
    np.testing.assert_array_equal(found.matrix[:, :5], of_all[-1])
    assert session.record["weights"] == known
    settle(session, trials, gate=1e9, weights={"learned": known})
    assert session.record["weights"] != known


def test_columns_that_are_all_the_same_become_one(session):
    finished = {"greedy": np.full((4, 5, 5), 1 / 5)}
    found = settle(session, [trial("greedy", GREEDY)], finished=finished, gate=0.0)
    assert next(iter(found.groups)) == "model"
    assert (found.matrix[:, 0] == 1 / 5).all()


def test_only_what_is_learned_has_a_temperature(session):
    learned = trial("learned", LEARNED, numbers=3, soups=soups_of(5))
    assert learned.temperature != pytest.approx(1, abs=0.1)
    trials = [trial("greedy", GREEDY), learned]
    assert settle(session, trials, gate=0.0).temperature == learned.temperature
    assert settle(session, trials, gate=1e9).temperature == 1
    uniform = trial("uniform", LEARNED, numbers=0)
    assert settle(session, [trials[0], uniform], gate=0.0).temperature == 1


def test_what_is_learned_with_one_number_has_a_temperature_too(session):
    learned = trial("uniform + ingredient, λ = 1", LEARNED, numbers=1, soups=soups_of(6))
    found = settle(session, [trial("greedy", GREEDY), learned], gate=0.0)
    assert session.record["gate"]["kept"] == learned.name
    assert found.temperature == learned.temperature


@pytest.mark.parametrize("folds", [2, 5])
def test_the_interval_is_that_of_the_delete_a_group_jackknife(folds):
    stream = np.random.default_rng(folds)
    soup, soups = stream.normal(size=(4, 3)), stream.normal(size=(folds, 4, 3))
    names = ["a", "b", "c", "d"]
    for k, found in enumerate(jackknife(names, soup, soups)):
        of_folds = [float(soups[f, k].mean()) for f in range(folds)]
        mean = sum(of_folds) / folds
        variance = (folds - 1) / folds * sum((a - mean) ** 2 for a in of_folds)
        weight, reach = soup[k].mean(), students_t.ppf(0.975, folds - 1) * variance**0.5
        assert found["ingredient"] == names[k]
        assert found["weight"] == pytest.approx(weight)
        assert found["standard_error"] == pytest.approx(variance**0.5)
        assert (found["low"], found["high"]) == pytest.approx((weight - reach, weight + reach))


def test_the_jackknife_of_a_mean_is_its_standard_error():
    """Of the mean of n numbers in as many folds: s/√n, as in any textbook."""
    numbers = np.random.default_rng(0).normal(size=12)
    without = np.array([np.delete(numbers, i).mean() for i in range(12)])
    (found,) = jackknife(["a"], np.array([[numbers.mean()]]), without[:, None, None])
    assert found["standard_error"] == pytest.approx(numbers.std(ddof=1) / np.sqrt(12))


def test_ingredients_that_are_the_same_file_are_named(kitchen, tmp_path, caplog):
    zoo = kitchen / "zoo"
    (tmp_path / "twin.safetensors").write_bytes((zoo / "01.safetensors").read_bytes())
    paths = [zoo / "00.safetensors", zoo / "01.safetensors", tmp_path / "twin.safetensors"]
    names = {"path": zoo, "ingredients": [str(path) for path in paths]}
    session = open_session(kitchen, tmp_path / "out", zoo=names)
    session.begin("row", None)
    with caplog.at_level(logging.WARNING):
        warn_of_identical(session)
    assert "row: 01, twin are the same model" in caplog.text
    caplog.clear()
    warn_of_identical(open_session(kitchen, tmp_path / "plain"))
    assert not caplog.records
