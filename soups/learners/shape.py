"""How few numbers make a matrix of coefficients: one for each ingredient, and how it goes on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from soups.learners.registry import Level
from soups.norms import Groups

WAVES = 2
# How much more the numbers of a finer level are held back.
LADDER = {"depth": 10.0, "group": 100.0}


@dataclass(frozen=True)
class Shape:
    """`A = start + P(u · features)`: what the columns of u say of the groups.

    Features [numbers, groups]: ones, then `cos(π r d_g)` with the depth d_g of group g from 0
    (first) to 1 (last), then one for each group; `ladder` is the penalty of each.
    """

    features: Float[Tensor, "numbers groups"]
    ladder: Float[Tensor, " numbers"]
    own_groups: int

    @classmethod
    def of(cls, level: Level, groups: Groups) -> Shape:
        """The numbers of a level: `ingredient` has one, `depth` three, `group` one more for each
        group."""
        count = len(groups)
        depth = torch.linspace(0, 1, count) if count > 1 else torch.zeros(1)
        features, ladder = [torch.ones(1, count)], [1.0]
        if level != "ingredient" and count > 1:
            features += [torch.cos(torch.pi * r * depth)[None] for r in range(1, WAVES + 1)]
            ladder += [LADDER["depth"]] * WAVES
        own = count if level == "group" and count > 1 else 0
        if own:
            features.append(torch.eye(count))
            ladder += [LADDER["group"]] * own
        return cls(torch.cat(features), torch.tensor(ladder), own)

    @property
    def numbers(self) -> int:
        """How many there are for each ingredient."""
        return len(self.features)

    def spread(self, numbers: Tensor) -> Float[Tensor, "ingredients groups"]:
        """What the numbers say of each group, before P."""
        return numbers @ self.features.to(numbers)

    def gather(self, gradient: Float[Tensor, "block groups"]) -> Float[Tensor, "block numbers"]:
        """The gradient in the numbers, of that in the coefficients."""
        return gradient @ self.features.to(gradient).T

    def soup(
        self, start: Float64[np.ndarray, "ingredients groups"], numbers: Tensor
    ) -> Float64[np.ndarray, "ingredients groups"]:
        """`start + P(u · features)`, where P takes the mean over ingredients off each column."""
        moved = self.spread(numbers.double().cpu()).numpy()
        return start + moved - moved.mean(axis=0)

    def pull(
        self, squares: Float[Tensor, "ingredients groups"]
    ) -> Float[Tensor, "ingredients numbers"]:
        """The penalty of each number: its step of the ladder times ρ.

        ρ_k is the squared length of ingredient k's row relative to the mean over ingredients,
        ρ_{k,g} that of its part in group g relative to the same mean.
        """
        whole = squares.sum(dim=1, keepdim=True)
        mean = whole.mean().clamp_min(torch.finfo(whole.dtype).tiny)
        shared = (whole / mean).expand(-1, self.numbers - self.own_groups)
        own = (squares / mean)[:, : self.own_groups]
        return torch.cat([shared, own], dim=1) * self.ladder
