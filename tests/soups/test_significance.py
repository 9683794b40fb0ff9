"""Tests of two rows and of many: against published tables, and where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from soups.errors import SoupError
from soups.significance import differences, holm, mcnemar, tied_with_best
from soups.statistics import paired_difference_interval


def outcomes(both: int, only_a: int, only_b: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Who is right on rows of which so many are of each kind."""
    counts = [both, only_a, only_b, neither]
    a, b = np.repeat([True, True, False, False], counts), np.repeat([True, False] * 2, counts)
    return a, b


@pytest.mark.parametrize(
    ("table", "p"),
    [
        # Armitage & Berry, Statistical Methods in Medical Research, 1994, p. 127: 50 specimens of
        # sputum on two culture media; the exact p as StatsDirect's manual has it.
        ((20, 12, 2, 16), pytest.approx(0.0129, abs=5e-5)),
        # The example of R's package exact2x2 (Fay 2010, its vignette on McNemar's test).
        ((21, 9, 2, 12), pytest.approx(0.06543, abs=5e-6)),
        # Agresti, Categorical Data Analysis, 1990, p. 350: approval of the president, twice; the
        # exact p as R's binom.test and exact2x2 print it.
        ((794, 150, 86, 570), pytest.approx(3.716e-05, abs=5e-9)),
        ((10, 0, 0, 10), 1.0),
        ((10, 1, 0, 10), 1.0),
        ((10, 6, 0, 10), 2 / 64),
    ],
)
def test_mcnemar_of_published_tables(table, p):
    a, b = outcomes(*table)
    assert mcnemar(a, b) == p
    assert mcnemar(b, a) == p


@given(wins=st.integers(0, 3000), losses=st.integers(0, 3000))
def test_mcnemar_is_scipy_s_binomial_test(wins, losses):
    a, b = outcomes(1, wins, losses, 0)
    expected = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert mcnemar(a, b) == pytest.approx(expected, rel=1e-9, abs=1e-290)


def test_mcnemar_wants_the_same_rows():
    with pytest.raises((SoupError, TypeError)):
        mcnemar(np.ones(3, dtype=bool), np.ones(2, dtype=bool))


@pytest.mark.parametrize(
    ("p_values", "corrected"),
    [
        # Wikipedia, Holm–Bonferroni method, and R's p.adjust(c(.01, .04, .03, .005), "holm").
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        # The example in the documentation of pingouin's multicomp(method="holm").
        ([0.50, 0.003, 0.32, 0.054, 0.0003], [0.64, 0.012, 0.64, 0.162, 0.0015]),
        # That of stdlib's padjust.
        ([0.319, 0.201, 0.4, 0.374, 0.113], [0.957, 0.804, 0.957, 0.957, 0.565]),
        ([0.5], [0.5]),
        ([], []),
    ],
)
def test_holm_of_published_examples(p_values, corrected):
    assert holm(p_values) == pytest.approx(corrected)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_laws(p_values):
    corrected = holm(p_values)
    assert (corrected >= p_values).all()
    assert (corrected <= np.minimum(1, len(p_values) * np.array(p_values))).all()
    order = np.argsort(p_values)
    assert (np.diff(corrected[order]) >= 0).all()
    for level in (0.01, 0.05, 0.3):
        # Step by step, as Holm has it: stop at the first that is not small enough.
        kept = 0
        for j, p in enumerate(np.sort(p_values)):
            if (len(p_values) - j) * p > level:
                break
            kept += 1
        assert (corrected <= level).sum() == kept


def test_differences_are_corrected_for_all_rows_of_their_baseline():
    rng = np.random.default_rng(0)
    right = {name: rng.random(500) < p for name, p in (("a", 0.7), ("b", 0.75), ("c", 0.9))}
    found = differences(right, "a", seed=3)
    assert [*found] == ["b", "c"]
    raw = [mcnemar(right[name], right["a"]) for name in found]
    assert [one.p for one in found.values()] == raw
    assert [one.p_holm for one in found.values()] == holm(raw).tolist()
    for name, one in found.items():
        assert one.baseline == "a"
        assert one.value == pytest.approx(right[name].mean() - right["a"].mean())
        assert one.interval == paired_difference_interval(right[name], right["a"], seed=3)
    assert found["c"].significant
    assert differences({"a": right["a"]}, "a", seed=0) == {}


def alike(rng: np.random.Generator, rows: int, images: int, accuracy: float = 0.8) -> dict:
    """Rows that are equally good, and right on mostly the same images."""
    shared = rng.random(images) < accuracy
    own = rng.random((rows, images)) < accuracy
    right = np.where(rng.random((rows, images)) < 0.3, own, shared)
    return dict(zip(map(str, range(rows)), right, strict=True))


def test_of_equally_good_rows_few_tables_call_any_worse_or_better():
    """The chance that any of ten is called different is at most 5%, though the best is chosen."""
    tables = 200
    untied = different = 0
    for seed in range(tables):
        right = alike(np.random.default_rng(seed), 10, 400)
        untied += len(tied_with_best(right)) < 10
        different += min(holm([mcnemar(own, right["0"]) for own in right.values()])) <= 0.05
    # Three standard deviations above 5% of 200 are 19.
    assert untied <= 19
    assert different <= 19


def test_a_worse_row_is_not_tied_and_a_better_one_is_found():
    rng = np.random.default_rng(1)
    right = alike(rng, 6, 3000)
    right["worse"] = right["0"] & (rng.random(3000) < 0.95)
    assert tied_with_best(right) == {*map(str, range(6))}
    assert tied_with_best({"a": right["0"]}) == {"a"}
    found = differences(right, "worse", seed=0)
    assert all(one.significant and one.value > 0 for one in found.values())
