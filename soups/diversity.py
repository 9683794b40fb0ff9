"""How alike a zoo's ingredients err, and how many independent ones they are worth.

An ingredient's error on an image is 1 where it is wrong, else 0. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from soups.errors import SoupError


@dataclass(frozen=True)
class Diversity:
    """`agreement`: the share of images on which two ingredients are both right or both wrong, the
    mean over all pairs (one minus the disagreement measure of Kuncheva & Whitaker 2003).

    `error_correlation`: ρ, the mean covariance of two ingredients' errors over their mean variance.
    `effective_size`: K / (1 + (K − 1)·ρ), which of K ingredients is the number of models with
    independent errors whose mean error varies as little (Tumer & Ghosh 1996, where ρ is the factor
    by which averaging falls short). None where no ingredient is ever wrong, or all always are; the
    size also where the same number is wrong on every image, which no number of independent models
    could do.
    """

    agreement: float
    error_correlation: float | None
    effective_size: float | None


def diversity(right: Bool[np.ndarray, "ingredients rows"]) -> Diversity:
    """The diversity of two or more ingredients; SoupError for fewer, or without rows."""
    outcomes = np.asarray(right)
    if outcomes.ndim != 2 or outcomes.shape[0] < 2 or outcomes.shape[1] < 1:
        raise SoupError(
            f"diversity: found outcomes {list(outcomes.shape)}; wanted two or more ingredients on "
            "at least one row"
        )
    count = len(outcomes)
    errors = 1.0 - outcomes.astype(np.float64)
    wrong = errors.sum(axis=0)
    # On an image that w of them have wrong, w(w − 1) + (K − w)(K − w − 1) ordered pairs agree.
    alike = wrong * (wrong - 1) + (count - wrong) * (count - wrong - 1)
    agreement = float(alike.mean() / (count * (count - 1)))
    variance = float(errors.var(axis=1).mean())
    if variance == 0:
        return Diversity(agreement, None, None)
    # The variance of the sum is K variances and K(K − 1) covariances.
    of_mean = float((wrong / count).var())
    correlation = (count * of_mean / variance - 1) / (count - 1)
    return Diversity(agreement, correlation, variance / of_mean if of_mean > 0 else None)
