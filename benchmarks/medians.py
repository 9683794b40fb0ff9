"""How sure the median of a few turns is."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb


def interval(values: Sequence[float]) -> tuple[float, float]:
    """An interval that holds the median of such values with at least 95 % (of order statistics)."""
    ordered, count = sorted(values), len(values)
    below, outside = 0, 0.0
    while below < count // 2:
        outside += 2 * comb(count, below) / 2**count
        if outside > 0.05:
            break
        below += 1
    place = max(0, below - 1)
    return ordered[place], ordered[count - 1 - place]
