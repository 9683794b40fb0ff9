"""Learner name → its settings and where its function lives; imports no torch.

A new learner is a settings class here, with its name as `type`, a row in LEARNERS, and a function
`(session, settings) -> Coefficients`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from inputs.config import ByteSize, Settings

Grouping = Literal["model", "block", "layer", "tensor"]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class BestSingle(Settings):
    """The ingredient with the best accuracy on *select*."""

    type: Literal["best_single"] = "best_single"


class Uniform(Settings):
    """The plain mean of all ingredients (2203.05482)."""

    type: Literal["uniform"] = "uniform"


class Greedy(Settings):
    """Greedy soup (2203.05482, recipe 1): ingredients in order of accuracy on *select*, each kept
    if accuracy on *select* does not fall (`ge`, as published) or rises (`gt`)."""

    type: Literal["greedy"] = "greedy"
    accept: Literal["gt", "ge"] = "ge"


class WiseFT(Settings):
    """WiSE-FT (2109.01903): the line from the base to a soup; the best `alpha` on *select* wins."""

    type: Literal["wise_ft"] = "wise_ft"
    soup: Literal["uniform", "greedy"] = "uniform"
    alphas: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=1)] = [
        i / 10 for i in range(11)
    ]


class Descent(Settings):
    """What learners by gradient descent on *select* share."""

    batch_size: PositiveInt = 128
    label_smoothing: Fraction = 0.0
    clip_norm: PositiveFloat | None = None


class LearnedSettings(Descent):
    """Softmax over ingredients and a logit temperature, by AdamW."""

    lr: PositiveFloat = 0.05
    weight_decay: NonNegativeFloat = 0.0
    epochs: PositiveInt = 5


class Learned(LearnedSettings):
    """Learned-Soup (2203.05482): one softmax over the ingredients."""

    type: Literal["learned"] = "learned"


class LearnedLayerwise(LearnedSettings):
    """Learned-Soup+: one softmax per group."""

    type: Literal["learned_layerwise"] = "learned_layerwise"
    groups: Grouping | ByteSize = "tensor"


class MehlSettings(Descent):
    """Block-coordinate descent on the hyperplane of the ingredients (2407.03641).

    `block_size` is chosen by the memory budget where it is not given.
    """

    lr: PositiveFloat = 0.01
    init: Literal["mean_all", "first_block"] = "mean_all"
    rows: Literal["relative", "unit"] = "relative"
    block_size: PositiveInt | None = None
    inner_epochs: PositiveInt = 5
    outer_epochs: PositiveInt = 1
    warmup: Fraction = 0.2


class Mehl(MehlSettings):
    """MEHL-Soup: one coefficient per ingredient."""

    type: Literal["mehl"] = "mehl"


class MehlLayerwise(MehlSettings):
    """MEHL-Soup+: one coefficient per ingredient and group."""

    type: Literal["mehl_layerwise"] = "mehl_layerwise"
    groups: Grouping | ByteSize = "tensor"


LearnerSettings = Annotated[
    BestSingle | Uniform | Greedy | WiseFT | Learned | LearnedLayerwise | Mehl | MehlLayerwise,
    Field(discriminator="type"),
]


@dataclass(frozen=True)
class Learner:
    """Settings and, as `module:function`, what takes `(session, settings)` to coefficients."""

    settings: type[Settings]
    where: str

    def function(self) -> Callable:
        """The learner itself; the first call imports torch."""
        module, function = self.where.split(":")
        return getattr(import_module(module), function)


LEARNERS: dict[str, Learner] = {
    "best_single": Learner(BestSingle, "soups.learners.selection:best_single"),
    "uniform": Learner(Uniform, "soups.learners.selection:uniform"),
    "greedy": Learner(Greedy, "soups.learners.selection:greedy"),
    "wise_ft": Learner(WiseFT, "soups.learners.selection:wise_ft"),
    "learned": Learner(Learned, "soups.learners.learned:learned"),
    "learned_layerwise": Learner(LearnedLayerwise, "soups.learners.learned:learned"),
    "mehl": Learner(Mehl, "soups.learners.mehl:mehl"),
    "mehl_layerwise": Learner(MehlLayerwise, "soups.learners.mehl:mehl"),
}
