"""Coefficients as a linear function of few numbers around one soup; weights with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from soups.learners.conclusion import described_weight
from soups.learners.hyperplane import into_box
from soups.learners.shape import Shape
from soups.second_order.evidence import intervals


@dataclass(frozen=True)
class Plane:
    """`A = start + P(u · features)`, θ the numbers u of one ingredient after another."""

    shape: Shape
    start: Float64[np.ndarray, "ingredients groups"]
    bounds: tuple[float, float]

    @property
    def ingredients(self) -> int:
        return len(self.start)

    @property
    def numbers(self) -> int:
        """The length of θ."""
        return self.ingredients * self.shape.numbers

    def soup(
        self, theta: Float64[np.ndarray, " numbers"]
    ) -> Float64[np.ndarray, "ingredients groups"]:
        """The coefficients at θ, projected into the box."""
        return into_box(self._anywhere(theta)[None], self.bounds)[0]

    def inside(self, theta: Float64[np.ndarray, " numbers"]) -> bool:
        """Whether the coefficients at θ are in the box as they are."""
        low, high = self.bounds
        soup = self._anywhere(theta)
        return bool(((soup >= low) & (soup <= high)).all())

    def _anywhere(
        self, theta: Float64[np.ndarray, " numbers"]
    ) -> Float64[np.ndarray, "ingredients groups"]:
        numbers = torch.from_numpy(theta).view(self.ingredients, -1)
        return self.shape.soup(self.start, numbers)

    def penalties(
        self, squares: Float[Tensor, "ingredients groups"]
    ) -> Float64[np.ndarray, "levels numbers numbers"]:
        """A quadratic form for each level: ρ of each of its numbers, as `Shape.pull` has them."""
        pull = self.shape.pull(squares)
        return np.stack(
            [
                np.diag((pull * (self.shape.ladder == step)).double().flatten().numpy())
                for step in self.shape.ladder.unique()
            ]
        )

    def weights(
        self,
        names: Sequence[str],
        theta: Float64[np.ndarray, " numbers"],
        covariance: Float64[np.ndarray, "numbers numbers"],
    ) -> list[dict[str, Any]]:
        """Each ingredient's weight, its mean over groups, with the 95% interval."""
        over_groups = self.shape.features.double().mean(dim=1).numpy()[None]
        linear = np.kron(self.without_mean, over_groups)
        moved, errors, low, _ = intervals(theta, covariance, linear=linear)
        weights = self.start.mean(axis=1) + moved
        columns = zip(names, weights.tolist(), errors.tolist(), (moved - low).tolist(), strict=True)
        return [described_weight(*column) for column in columns]

    @property
    def without_mean(self) -> Float64[np.ndarray, "ingredients ingredients"]:
        """P"""
        return np.eye(self.ingredients) - 1 / self.ingredients
