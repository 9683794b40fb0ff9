"""Distances and angles in weight space, computed from coefficients and inner products."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from tqdm.auto import tqdm

from merge.gram import gram_matrix
from soups.session import Session

# Of a tensor, as many elements of every ingredient are in memory at once.
SLICE = 1 << 16
# Three points whose triangle is this flat, height over side, are on one line.
FLAT = 1e-6

Point = Float64[np.ndarray, "ingredients tensors"]
Grams = Float64[np.ndarray, "tensors ingredients ingredients"]


def weight_grams(session: Session) -> Grams:
    """`⟨w_k − o, w_l − o⟩` in each mixed tensor, in float64; o is the base, else an ingredient.

    Every checkpoint is read once, in small slices. Norm buffers do not count.
    """
    zoo = session.zoo
    sources = [zoo.base or zoo.checkpoints[0], *zoo.checkpoints]
    grams = np.zeros((len(session.numels), len(zoo.checkpoints), len(zoo.checkpoints)))
    names = tqdm(session.numels.items(), desc=session.row, disable=not session.progress)
    for gram, (name, numel) in zip(grams, names, strict=True):
        for start in range(0, numel, SLICE):
            stop = min(start + SLICE, numel)
            values = torch.empty(len(sources), stop - start, dtype=torch.float64)
            for row, source in zip(values, sources, strict=True):
                source.read(zoo.stored(source, name), out=row, start=start, stop=stop)
            gram += gram_matrix("deltas", values[0], [*values[1:]]).numpy()
    return grams


def inner(a: Point, b: Point, grams: Grams) -> float:
    """`⟨a, b⟩` of two differences of points: `Σ_t a[:, t]ᵀ gram_t b[:, t]`."""
    return float(np.einsum("kt,tkl,lt->", a, grams, b, optimize=True))


def distance(a: Point, b: Point, grams: Grams) -> float:
    """The Euclidean distance of two points over all mixed weights."""
    return max(inner(a - b, a - b, grams), 0.0) ** 0.5


@dataclass(frozen=True)
class Frame:
    """A plane in weight space: `origin + x·right + y·up`, with `right` and `up` orthonormal."""

    origin: Point
    right: Point
    up: Point
    grams: Grams

    @classmethod
    def through(cls, a: Point, b: Point, c: Point, grams: Grams) -> Frame | None:
        """By Gram-Schmidt: a at (0, 0), b on the x axis, c above it; None where they are on one
        line."""
        right = b - a
        length = distance(a, b, grams)
        side = max(length, distance(a, c, grams))
        if length <= FLAT * side:
            return None
        right = right / length
        up = (c - a) - inner(c - a, right, grams) * right
        # Once more: of a flat triangle, rounding has left something along the axis.
        up = up - inner(up, right, grams) * right
        height = max(inner(up, up, grams), 0.0) ** 0.5
        if height <= FLAT * side:
            return None
        return cls(a, right, up / height, grams)

    def place(self, point: Point) -> tuple[float, float, float]:
        """x and y of the point's projection, and its distance from the plane."""
        apart = point - self.origin
        x, y = inner(apart, self.right, self.grams), inner(apart, self.up, self.grams)
        return x, y, distance(apart, x * self.right + y * self.up, self.grams)
