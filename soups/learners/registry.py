"""Learner name → its settings and where its function lives; imports no torch.

A new learner is a settings class here, with its name as `type`, a row in LEARNERS, and a function
`(session, settings) -> Coefficients`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator

from inputs.config import ByteSize, Settings

Grouping = Literal["model", "block", "layer", "tensor"]
Precision = Literal["fp32", "bf16", "int8", "int4", "sign"]
Metric = Literal["accuracy", "loss", "worst_class"]
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

    `block_size` is chosen by the memory budget where it is not given. `precision` is how the rows
    of a block are held, so that more of them fit; the soup is cooked from the originals all the
    same, and the run says what was lost.
    """

    lr: PositiveFloat = 0.01
    init: Literal["mean_all", "first_block"] = "mean_all"
    rows: Literal["relative", "unit"] = "relative"
    block_size: PositiveInt | None = None
    precision: Precision = "fp32"
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


class GreedyFull(Settings):
    """Selection over all ingredients at each step, forward and backward, chosen by cross-fitting.

    Walks of single additions and removals are found on all folds of *select* but one, `patience`
    moves past their best; which walk, and how many of its moves, is decided on the folds that were
    left out. `rule: one_se` takes the fewest moves within one standard error of the best. With
    `replacement` an ingredient may be added again, so it weighs more.
    """

    type: Literal["greedy_full"] = "greedy_full"
    metric: Literal["accuracy", "loss"] = "accuracy"
    folds: Annotated[int, Field(ge=2)] = 5
    rule: Literal["best", "one_se"] = "one_se"
    replacement: bool = False
    patience: PositiveInt = 3


class Search(Settings):
    """What learners that only score candidates share.

    They make `metric` best on *select* (of equals, the one with the lower loss), from `start`, on
    the hyperplane of coefficients that sum to one within `bounds`. `images`: how many of *select*
    a generation or step sees; what is returned is chosen on all of it and never worse than `start`.
    """

    groups: Grouping | ByteSize = "model"
    metric: Metric = "loss"
    start: Literal["uniform", "greedy"] = "uniform"
    bounds: tuple[float, float] = (-0.5, 1.5)
    images: PositiveInt | None = None

    @field_validator("bounds")
    @classmethod
    def _around_the_ingredients(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        if not bounds[0] <= 0 <= 1 <= bounds[1]:
            raise ValueError("the box must hold every ingredient: low at most 0, high at least 1")
        return bounds


class RandomSearch(Search):
    """Random soups, from sparse to dense, and random steps from the best one so far.

    Weights are Dirichlet with a concentration drawn on a log scale from `concentration`; a `local`
    share of each population lies on lines from the best so far to such soups.
    """

    type: Literal["random_search"] = "random_search"
    evaluations: PositiveInt = 1000
    population: PositiveInt = 32
    concentration: tuple[PositiveFloat, PositiveFloat] = (0.05, 20.0)
    local: Annotated[float, Field(ge=0, le=1)] = 0.5


class CmaEs(Search):
    """CMA-ES (1604.00772); its diagonal form where the coefficients are many.

    `sigma` is the distance of the first candidates from the start, in each group; 1 is that of an
    ingredient from nothing. Stops early once no coefficient differs by `tolerance` within a
    population.
    """

    type: Literal["cmaes"] = "cmaes"
    evaluations: PositiveInt = 1000
    population: Annotated[int, Field(ge=4)] = 24
    sigma: PositiveFloat = 0.3
    covariance: Literal["auto", "full", "diagonal"] = "auto"
    tolerance: NonNegativeFloat = 1e-3


class ZerothOrder(Search):
    """Descent along two-point differences in random directions (SPSA; MeZO, 2305.17333).

    All candidates of a step, two for each direction, at distance `epsilon` in each group, are one
    pass. Directions of a step are orthogonal, as far as there are so many.
    """

    type: Literal["zeroth_order"] = "zeroth_order"
    images: PositiveInt | None = 128
    steps: PositiveInt = 60
    directions: PositiveInt = 16
    epsilon: PositiveFloat = 0.1
    lr: PositiveFloat = 0.02
    optimizer: Literal["adam", "sgd"] = "adam"


LearnerSettings = Annotated[
    BestSingle
    | Uniform
    | Greedy
    | GreedyFull
    | WiseFT
    | Learned
    | LearnedLayerwise
    | Mehl
    | MehlLayerwise
    | RandomSearch
    | CmaEs
    | ZerothOrder,
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
    "greedy_full": Learner(GreedyFull, "soups.learners.greedy_full:greedy_full"),
    "wise_ft": Learner(WiseFT, "soups.learners.selection:wise_ft"),
    "learned": Learner(Learned, "soups.learners.learned:learned"),
    "learned_layerwise": Learner(LearnedLayerwise, "soups.learners.learned:learned"),
    "mehl": Learner(Mehl, "soups.learners.mehl:mehl"),
    "mehl_layerwise": Learner(MehlLayerwise, "soups.learners.mehl:mehl"),
    "random_search": Learner(RandomSearch, "soups.learners.search:random_search"),
    "cmaes": Learner(CmaEs, "soups.learners.search:cmaes"),
    "zeroth_order": Learner(ZerothOrder, "soups.learners.zeroth_order:zeroth_order"),
}
