"""Coefficients whose columns sum to one, inside a box: where the searches walk."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float64
from scipy.linalg import helmert

HALVINGS = 80
ROUNDING = 1e-9


class Hyperplane:
    """The candidates around a start: `A = start + Q·x`, each column's sum one, in the box.

    Q [ingredients, ingredients − 1] has orthonormal columns that sum to zero, so lengths in x are
    lengths in the coefficients, and every x is on the hyperplane.
    """

    def __init__(
        self, start: Float64[np.ndarray, "ingredients groups"], bounds: tuple[float, float]
    ) -> None:
        self.start, self.bounds = start, bounds
        self._basis = helmert(len(start)).T if len(start) > 1 else np.zeros((1, 0))

    @property
    def dimensions(self) -> int:
        """(ingredients − 1) · groups."""
        return self._basis.shape[1] * self.start.shape[1]

    def candidates(
        self, points: Float64[np.ndarray, "candidates dimensions"]
    ) -> Float64[np.ndarray, "candidates ingredients groups"]:
        """The coefficients at these points, projected into the box."""
        moved = points.reshape(len(points), self._basis.shape[1], self.start.shape[1])
        return into_box(self.start + self._basis @ moved, self.bounds)

    def points(
        self, candidates: Float64[np.ndarray, "candidates ingredients groups"]
    ) -> Float64[np.ndarray, "candidates dimensions"]:
        """Where these candidates are."""
        return (self._basis.T @ (candidates - self.start)).reshape(len(candidates), -1)


def into_box(
    candidates: Float64[np.ndarray, "candidates ingredients groups"], bounds: tuple[float, float]
) -> Float64[np.ndarray, "candidates ingredients groups"]:
    """The nearest candidates with entries in `bounds` and columns that sum to one.

    `clip(a − τ, low, high)` with the τ of each column for which it does, by halving; a column
    that has both stays as it is. A box with low ≤ 0 and high ≥ 1 always has such candidates.
    """
    low, high = bounds
    inside = ((candidates >= low) & (candidates <= high)).all(axis=1, keepdims=True)
    inside &= np.abs(candidates.sum(axis=1, keepdims=True) - 1) <= ROUNDING
    if inside.all():
        return whole_columns(candidates)
    below = candidates.min(axis=1, keepdims=True) - high
    above = candidates.max(axis=1, keepdims=True) - low
    for _ in range(HALVINGS):
        shift = (below + above) / 2
        too_much = np.clip(candidates - shift, low, high).sum(axis=1, keepdims=True) > 1
        below, above = np.where(too_much, shift, below), np.where(too_much, above, shift)
    return whole_columns(np.where(inside, candidates, np.clip(candidates - above, low, high)))


def whole_columns(
    candidates: Float64[np.ndarray, "candidates ingredients groups"],
) -> Float64[np.ndarray, "candidates ingredients groups"]:
    """Columns that sum to one but for their rounding: the largest entry has what others leave."""
    whole = candidates.copy()
    for matrix in whole:
        for column in matrix.T:
            largest = int(column.argmax())
            column[largest] += 1 - math.fsum(column)
    return whole
