"""Whether one row is right more often than another on the same images, among many comparisons.

Imports no torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from scipy.special import bdtr

from soups.statistics import (
    Correct,
    Interval,
    accuracy,
    paired_difference_interval,
    wins_and_losses,
)

LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """A row's accuracy minus that of the row `baseline` on the same images, a fraction.

    `interval` is the 95% paired bootstrap interval; `p` that of the exact McNemar test; `p_holm`
    the same after Holm's correction for all rows that were compared with this baseline.
    """

    baseline: str
    value: float
    interval: Interval
    p: float
    p_holm: float

    @property
    def significant(self) -> bool:
        """Whether the corrected p is at most 5%."""
        return is_significant(self.p_holm)


def mcnemar(correct_a: Correct, correct_b: Correct) -> float:
    """The two-sided p of the exact McNemar test on the same rows (McNemar 1947).

    Of the rows that just one of the two has right, as many fall to each side as heads to tosses of
    a fair coin, if the two are equally good: twice the smaller tail of Binomial(n, ½), at most 1,
    which it is where no row tells them apart.
    """
    wins, losses = wins_and_losses(correct_a, correct_b)
    return min(1.0, 2 * float(bdtr(min(wins, losses), wins + losses, 0.5)))


def holm(p_values: Sequence[float]) -> Float64[np.ndarray, " tests"]:
    """p-values corrected for their number: at level α, the chance that any true hypothesis is
    rejected is at most α, however the tests depend on each other (Holm 1979).

    The k-th smallest of m becomes the largest of (m − j + 1) · p_(j) over j ≤ k, at most 1.
    """
    values = np.asarray(p_values, dtype=np.float64)
    order = values.argsort(kind="stable")
    corrected = np.empty_like(values)
    factors = np.arange(len(values), 0, -1)
    corrected[order] = np.maximum.accumulate(factors * values[order]).clip(max=1.0)
    return corrected


def is_significant(p: float) -> bool:
    return p <= 1 - LEVEL


def differences(right: Mapping[str, Correct], baseline: str, *, seed: int) -> dict[str, Difference]:
    """Every other row compared with `baseline`; the corrections are for all of them together."""
    against = right[baseline]
    others = {row: own for row, own in right.items() if row != baseline}
    p_values = [mcnemar(own, against) for own in others.values()]
    return {
        row: Difference(
            baseline=baseline,
            value=accuracy(own) - accuracy(against),
            interval=paired_difference_interval(own, against, level=LEVEL, seed=seed),
            p=p,
            p_holm=float(corrected),
        )
        for (row, own), p, corrected in zip(others.items(), p_values, holm(p_values), strict=True)
    }


def tied_with_best(right: Mapping[str, Correct]) -> set[str]:
    """The rows that these images do not tell from the most accurate one, which is among them.

    Those whose exact McNemar test against it is not significant after Holm's correction for all
    pairs of rows: the best was chosen on the same images, and could have been any of them.
    """
    best = max(right, key=lambda row: accuracy(right[row]))
    pairs = list(itertools.combinations(right, 2))
    corrected = holm([mcnemar(right[a], right[b]) for a, b in pairs])
    worse = {
        row
        for pair, p in zip(pairs, corrected, strict=True)
        if best in pair and is_significant(float(p))
        for row in pair
    }
    return {best} | (set(right) - worse)
