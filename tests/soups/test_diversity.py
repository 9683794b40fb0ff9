"""How alike ingredients err."""

import itertools

import numpy as np
import pytest

from soups.diversity import diversity
from soups.errors import SoupError


def by_pairs(right: np.ndarray) -> tuple[float, float]:
    """The mean over all pairs of the share of rows where they agree, and ρ by its definition."""
    errors = 1.0 - right
    pairs = [*itertools.combinations(range(len(right)), 2)]
    agreement = np.mean([(right[a] == right[b]).mean() for a, b in pairs])
    covariance = np.mean([np.cov(errors[a], errors[b], ddof=0)[0, 1] for a, b in pairs])
    return float(agreement), float(covariance / errors.var(axis=1).mean())


@pytest.mark.parametrize("count", [2, 5, 9])
def test_it_is_the_mean_over_pairs(count):
    rng = np.random.default_rng(count)
    right = (rng.random((count, 300)) + 0.5 * rng.random(300)) < rng.random((count, 1)) + 0.3
    found = diversity(right)
    agreement, correlation = by_pairs(right)
    assert found.agreement == pytest.approx(agreement)
    assert found.error_correlation == pytest.approx(correlation)
    assert found.effective_size == pytest.approx(count / (1 + (count - 1) * correlation))


def test_two_by_hand():
    # Kuncheva & Whitaker's table of a pair: 4 both right, 2 and 1 by one alone, 3 both wrong. The
    # disagreement is 3/10; the covariance 0.4 - 0.6·0.5, the mean variance (0.24 + 0.25)/2.
    first = np.repeat([True, True, False, False], [4, 2, 1, 3])
    second = np.repeat([True, False, True, False], [4, 2, 1, 3])
    found = diversity(np.stack([first, second]))
    assert found.agreement == pytest.approx(0.7)
    assert found.error_correlation == pytest.approx(0.1 / 0.245)
    assert found.effective_size == pytest.approx(2 / (1 + 0.1 / 0.245))


def test_independent_errors_are_worth_their_number_and_copies_one():
    rng = np.random.default_rng(0)
    independent = diversity(rng.random((8, 200_000)) < 0.7)
    assert independent.effective_size == pytest.approx(8, rel=0.03)
    assert independent.error_correlation == pytest.approx(0, abs=0.01)
    copies = diversity(np.tile(rng.random(100) < 0.7, (8, 1)))
    assert (copies.agreement, copies.error_correlation) == (1.0, pytest.approx(1.0))
    assert copies.effective_size == pytest.approx(1.0)


def test_the_effective_size_is_how_many_independent_ones_average_like_it():
    """Simulated: the mean error of 4 that share causes varies as that of K_eff that do not."""
    rng = np.random.default_rng(0)
    common = rng.random(100_000) < 0.2
    right = ~np.where(rng.random((4, 100_000)) < 0.5, common, rng.random((4, 100_000)) < 0.2)
    found = diversity(right)
    assert found.effective_size is not None
    spread = (1 - right.mean(axis=0)).var()
    assert spread == pytest.approx(0.16 / found.effective_size, rel=0.02)
    # Two share an error with probability 1/4 by the common cause.
    assert found.error_correlation == pytest.approx(0.25, abs=0.01)


def test_where_no_ingredient_errs_there_is_no_size():
    assert vars(diversity(np.ones((3, 5), dtype=bool))) == {
        "agreement": 1.0,
        "error_correlation": None,
        "effective_size": None,
    }
    opposite = np.array([[True, False], [False, True]])
    found = diversity(opposite)
    assert (found.agreement, found.error_correlation) == (0.0, -1.0)
    assert found.effective_size is None


@pytest.mark.parametrize("shape", [(1, 5), (2, 0)])
def test_too_few_are_refused(shape):
    with pytest.raises(SoupError, match="wanted two or more ingredients"):
        diversity(np.ones(shape, dtype=bool))
