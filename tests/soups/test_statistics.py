from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import softmax
from sklearn.metrics import brier_score_loss

from soups.errors import SoupError
from soups.statistics import (
    TEMPERATURES,
    accuracy,
    bootstrap_interval,
    brier_score,
    correctness,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    paired_difference_interval,
    worst_class_accuracy,
)

# Either we or, where shapes are checked, jaxtyping refuses.
REFUSED = (SoupError, TypeError)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def calibrated(rng: np.random.Generator, rows: int, classes: int = 10, scale: float = 2.0):
    """Logits, and labels that are drawn from their own softmax."""
    logits = rng.normal(0, scale, (rows, classes))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    return logits, labels


def test_accuracies_of_known_outcomes():
    correct = np.array([True, True, False, True, False, True])
    labels = np.array([0, 0, 0, 2, 2, 3])
    assert accuracy(correct) == pytest.approx(4 / 6)
    # Class 1 has no rows: it is not the worst.
    assert worst_class_accuracy(correct, labels, 4) == 0.5


@pytest.mark.parametrize("array", [np.asarray, torch.as_tensor])
def test_numpy_and_torch_give_the_same(array, rng):
    logits, labels = calibrated(rng, 50)
    assert correctness(array(logits), array(labels)).tolist() == (
        (logits.argmax(axis=1) == labels).tolist()
    )
    for statistic in (negative_log_likelihood, expected_calibration_error, fit_temperature):
        assert statistic(array(logits), array(labels)) == statistic(logits, labels)


def test_the_first_of_equal_logits_decides():
    assert correctness(np.zeros((2, 3)), np.array([0, 1])).tolist() == [True, False]


def test_likelihood_is_that_of_torch(rng):
    logits, labels = calibrated(rng, 200)
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels))
    assert negative_log_likelihood(logits, labels) == pytest.approx(expected.item(), rel=1e-12)


def test_likelihood_of_huge_logits_is_finite():
    logits = np.array([[1e5, 0.0], [0.0, -1e5]])
    assert negative_log_likelihood(logits, np.array([1, 0])) == pytest.approx(5e4)


@given(shift=st.floats(-1e3, 1e3))
def test_likelihood_and_calibration_ignore_a_constant(shift):
    logits, labels = calibrated(np.random.default_rng(3), 40)
    for statistic in (negative_log_likelihood, expected_calibration_error):
        assert statistic(logits + shift, labels) == pytest.approx(
            statistic(logits, labels), rel=1e-6, abs=1e-9
        )


def test_brier_score_by_hand():
    # Brier 1950: of a sure forecast 0 or 2, of one that knows nothing of two classes ½.
    sure = np.array([[1e3, 0.0], [0.0, 1e3], [0.0, 0.0]])
    assert brier_score(sure[:1], np.array([0])) == 0
    assert brier_score(sure[:1], np.array([1])) == 2
    assert brier_score(sure[2:], np.array([1])) == 0.5
    assert brier_score(sure, np.array([0, 0, 0])) == pytest.approx((0 + 2 + 0.5) / 3)


def test_brier_score_of_two_classes_is_twice_that_of_scikit_learn(rng):
    logits, labels = calibrated(rng, 300, classes=2)
    probabilities = softmax(logits, axis=1)[:, 1]
    assert brier_score(logits, labels) == pytest.approx(2 * brier_score_loss(labels, probabilities))


def test_brier_score_is_proper(rng):
    logits, labels = calibrated(rng, 20_000)
    best = brier_score(logits, labels)
    assert all(brier_score(factor * logits, labels) > best for factor in (0.7, 1.4))


def test_calibration_error_by_hand():
    # Confidences 0.9 (right), 0.9 (wrong), 0.6 (right): |1 - 1.8| and |1 - 0.6| over three rows.
    logits = np.log([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4]])
    assert expected_calibration_error(logits, np.array([0, 1, 0])) == pytest.approx(1.2 / 3)


def test_calibration_error_of_one_bin_is_overconfidence():
    logits = np.log([[0.8, 0.2], [0.7, 0.3]])
    error = expected_calibration_error(logits, np.array([0, 1]), bins=1)
    assert error == pytest.approx(abs(0.5 - 0.75))


def test_a_calibrated_model_has_little_error_and_an_overconfident_one_much(rng):
    logits, labels = calibrated(rng, 20_000)
    assert expected_calibration_error(logits, labels) < 0.015
    assert expected_calibration_error(4 * logits, labels) > 0.1


@pytest.mark.parametrize("factor", [0.2, 1.0, 5.0])
def test_temperature_undoes_a_scale(factor, rng):
    logits, labels = calibrated(rng, 20_000)
    assert fit_temperature(logits * factor, labels) * factor == pytest.approx(1.0, rel=0.03)


def test_temperature_is_where_the_loss_has_no_slope(rng):
    logits, labels = calibrated(rng, 300)
    beta = fit_temperature(logits, labels)
    probabilities = torch.softmax(torch.tensor(logits) * beta, dim=1).numpy()
    slope = ((probabilities * logits).sum(axis=1) - logits[np.arange(300), labels]).mean()
    assert abs(slope) < 1e-5
    assert fit_temperature(7 * logits, labels) == pytest.approx(beta / 7, rel=1e-4)


def test_temperature_stays_in_its_range():
    sure, labels = np.eye(3) - 0.5, np.arange(3)
    assert 30 < fit_temperature(sure, labels) <= TEMPERATURES[1]
    assert fit_temperature(-sure, labels) == pytest.approx(TEMPERATURES[0], rel=1e-3)


def brute_force(values: np.ndarray, resamples: int = 20_000) -> np.ndarray:
    draws = np.random.default_rng(1).integers(len(values), size=(resamples, len(values)))
    return np.quantile(values[draws].mean(axis=1), [0.025, 0.975])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
def test_interval_is_that_of_resampled_rows(p, rng):
    correct = rng.random(150) < p
    found = bootstrap_interval(correct, resamples=20_000, seed=0)
    # Both are quantiles of one discrete distribution with steps of 1/150.
    assert found == pytest.approx(brute_force(correct.astype(float)), abs=1.01 / 150)


def test_interval_is_that_of_the_binomial(rng):
    correct = rng.random(2000) < 0.8
    exact = stats.binom.ppf([0.025, 0.975], 2000, correct.mean()) / 2000
    assert bootstrap_interval(correct, resamples=50_000, seed=3) == pytest.approx(exact, abs=0.0011)


def test_paired_interval_is_that_of_resampled_rows(rng):
    a, b = rng.random(200) < 0.85, rng.random(200) < 0.8
    found = paired_difference_interval(a, b, resamples=20_000, seed=0)
    expected = brute_force(a.astype(float) - b.astype(float))
    assert found == pytest.approx(expected, abs=1.01 / 200)


def test_pairing_makes_the_interval_narrower(rng):
    a = rng.random(1000) < 0.8
    b = a.copy()
    b[:10] = ~b[:10]
    paired = paired_difference_interval(a, b, seed=0)
    alone = bootstrap_interval(a, seed=0)
    assert paired.high - paired.low < (alone.high - alone.low) / 3


@given(outcomes=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
@settings(max_examples=40)
def test_paired_interval_laws(outcomes):
    a, b = np.array(outcomes).T
    forward = paired_difference_interval(a, b, seed=5)
    assert -1 <= forward.low <= forward.high <= 1
    assert paired_difference_interval(a, a, seed=5) == (0, 0)
    backward = paired_difference_interval(b, a, seed=5, resamples=20_000)
    forward = paired_difference_interval(a, b, seed=5, resamples=20_000)
    step = 1.01 / len(a) + 0.01
    assert backward.low == pytest.approx(-forward.high, abs=step)


def test_the_seed_decides_and_levels_nest(rng):
    correct = rng.random(300) < 0.7
    assert bootstrap_interval(correct, seed=1) == bootstrap_interval(correct, seed=1)
    assert bootstrap_interval(correct, seed=1) != bootstrap_interval(correct, seed=2, resamples=77)
    wide = bootstrap_interval(correct, seed=1, level=0.99)
    narrow = bootstrap_interval(correct, seed=1, level=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize("right", [True, False])
def test_interval_of_outcomes_that_are_all_alike_is_a_point(right):
    assert bootstrap_interval(np.full(20, right), seed=0) == (float(right), float(right))


TABLES = 1000


@pytest.mark.parametrize(("rows", "p"), [(500, 0.8), (539, 0.96), (10_000, 0.64)])
def test_a_nominal_95_percent_covers_the_accuracy(rows, p, rng):
    covered = 0
    for k in range(TABLES):
        low, high = bootstrap_interval(rng.random(rows) < p, resamples=1000, seed=k)
        covered += low <= p <= high
    assert 0.93 <= covered / TABLES <= 0.97


@pytest.mark.parametrize(
    ("rows", "won", "lost"), [(500, 0.06, 0.04), (539, 0.02, 0.02), (10_000, 0.05, 0.045)]
)
def test_a_nominal_95_percent_covers_the_difference(rows, won, lost, rng):
    covered = 0
    for k in range(TABLES):
        drawn = rng.random(rows)
        both = drawn > 0.5
        a, b = both | (drawn < won), both | ((drawn >= won) & (drawn < won + lost))
        low, high = paired_difference_interval(a, b, resamples=1000, seed=k)
        covered += low <= won - lost <= high
    assert 0.93 <= covered / TABLES <= 0.97


def test_ten_thousand_rows_take_milliseconds(rng):
    a, b = rng.random(10_000) < 0.8, rng.random(10_000) < 0.8
    start = time.perf_counter()
    bootstrap_interval(a, seed=0)
    paired_difference_interval(a, b, seed=0)
    # Drawing 2000 x 10,000 rows takes over 0.3 s.
    assert time.perf_counter() - start < 0.1


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.array([[0.0, np.nan]]), np.array([0]), "1 of 2 are not finite, the first in row 0"),
        (np.array([[0.0, 1.0], [np.inf, 0.0]]), np.array([0, 0]), "the first in row 1"),
        (np.zeros((2, 3)), np.array([0, 3]), "from 0 to 3; wanted integers from 0 to 2"),
        (np.zeros((2, 3)), np.array([-1, 0]), "from -1 to 0"),
        (np.zeros((0, 3)), np.zeros(0, dtype=int), "at least one row"),
    ],
)
@pytest.mark.parametrize(
    "statistic",
    [
        negative_log_likelihood,
        expected_calibration_error,
        brier_score,
        fit_temperature,
        correctness,
    ],
)
def test_broken_logits_are_refused(statistic, logits, labels, message):
    with pytest.raises(SoupError, match=message):
        statistic(logits, labels)


@pytest.mark.parametrize(
    "call",
    [
        lambda: negative_log_likelihood(np.zeros((3, 2)), np.zeros(2, dtype=int)),
        lambda: negative_log_likelihood(np.zeros(3), np.zeros(3, dtype=int)),
        lambda: fit_temperature(np.zeros((3, 2)), np.zeros(3)),
        lambda: accuracy(np.zeros(0, dtype=bool)),
        lambda: accuracy(np.zeros((2, 2), dtype=bool)),
        lambda: accuracy(np.array([0.0, 1.0])),
        lambda: worst_class_accuracy(np.ones(3, dtype=bool), np.zeros(2, dtype=int), 2),
        lambda: worst_class_accuracy(np.ones(2, dtype=bool), np.array([0, 2]), 2),
        lambda: paired_difference_interval(np.ones(3, dtype=bool), np.ones(2, dtype=bool), seed=0),
        lambda: bootstrap_interval(np.ones(3, dtype=bool), level=95, seed=0),
    ],
)
def test_wrong_shapes_and_types_are_refused(call):
    with pytest.raises(REFUSED):
        call()
