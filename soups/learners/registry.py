"""Learner name → its settings and where its function lives; imports no torch.

A new learner is a settings class here, with its name as `type`, a row in LEARNERS, and a function
`(session, settings) -> Coefficients`. What it will cost is planned from its `effort`, for learners
by gradient descent in `soups.plan`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from inputs.config import ByteSize, Settings
from soups.registered import Registered

Grouping = Literal["model", "block", "layer", "tensor"]
Precision = Literal["fp32", "bf16", "int8", "int4", "sign"]
Metric = Literal["accuracy", "loss", "worst_class"]
Start = Literal["uniform", "greedy"]
Level = Literal["ingredient", "depth", "group"]
Fraction = Annotated[float, Field(ge=0, lt=1)]

# Winners on different images cannot be compared: so many of the last are scored again.
FINALISTS = 16


def around_the_ingredients(bounds: tuple[float, float]) -> tuple[float, float]:
    """The bounds of a box of coefficients; ValueError where an ingredient is outside."""
    if not bounds[0] <= 0 <= 1 <= bounds[1]:
        raise ValueError("the box must hold every ingredient: low at most 0, high at least 1")
    return bounds


@dataclass(frozen=True)
class Effort:
    """What a learner that scores candidates does at most, or about where the scores decide.

    `candidates` on `examples` images in all, `at_once` of them in one call; `reads` sources, where
    they are not held in memory. `scored`: whether it asks for the ingredients' own accuracies.
    """

    candidates: int = 0
    examples: int = 0
    at_once: int = 0
    reads: int = 0
    scored: bool = False

    def __add__(self, other: Effort) -> Effort:
        return Effort(
            self.candidates + other.candidates,
            self.examples + other.examples,
            max(self.at_once, other.at_once),
            self.reads + other.reads,
            self.scored or other.scored,
        )


class Scoring(Settings):
    """What learners that score candidates, or nothing, share."""

    @abstractmethod
    def effort(self, ingredients: int, select: int) -> Effort:
        """What it does with so many ingredients and images."""


class BestSingle(Scoring):
    """The ingredient with the best accuracy on *select*."""

    type: Literal["best_single"] = "best_single"

    def effort(self, ingredients: int, select: int) -> Effort:
        return Effort(scored=True)


class Uniform(Scoring):
    """The plain mean of all ingredients (2203.05482)."""

    type: Literal["uniform"] = "uniform"

    def effort(self, ingredients: int, select: int) -> Effort:
        return Effort()


class Greedy(Scoring):
    """Greedy soup (2203.05482, recipe 1): ingredients in order of accuracy on *select*, each kept
    if accuracy on *select* does not fall (`ge`, as published) or rises (`gt`)."""

    type: Literal["greedy"] = "greedy"
    accept: Literal["gt", "ge"] = "ge"

    def effort(self, ingredients: int, select: int) -> Effort:
        # Some are scored ahead for nothing.
        trials = ingredients - 1 + (ingredients - 1) // 2
        ahead = 1 + (ingredients - 1) // 2
        return Effort(trials, trials * select, ahead, 2 * trials, scored=True)


class WiseFT(Scoring):
    """WiSE-FT (2109.01903): the line from the base to a soup; the best `alpha` on *select* wins."""

    type: Literal["wise_ft"] = "wise_ft"
    soup: Literal["uniform", "greedy"] = "uniform"
    alphas: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=1)] = [
        i / 10 for i in range(11)
    ]

    def effort(self, ingredients: int, select: int) -> Effort:
        soup = Greedy().effort(ingredients, select) if self.soup == "greedy" else Effort()
        alphas = len(self.alphas)
        return soup + Effort(alphas, alphas * select, alphas, ingredients + 1)


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


class CrossFittedSettings(Settings):
    """What learners that try themselves on `folds` of *select* share.

    `gate`: greedy stays unless the best trial's loss out of fold (after a temperature), or its
    accuracy (`gate_by`), is better by more than so many paired standard errors. By loss, 0 takes
    the trial with the lowest, greedy's among them. The trial was chosen on the same images, so its
    numbers out of fold are a little too good.
    `bounds` is the box that every coefficient stays in.
    """

    groups: Grouping | ByteSize = "layer"
    folds: Annotated[int, Field(ge=2)] = 5
    gate: NonNegativeFloat = 0.0
    gate_by: Literal["loss", "accuracy"] = "loss"
    bounds: tuple[float, float] = (-0.5, 1.5)

    _box = field_validator("bounds")(around_the_ingredients)


class Pooled(CrossFittedSettings, Descent):
    """Few numbers for each ingredient, cross-fitted, and greedy where they do not help.

    The coefficients begin from one of `starts`. Each of `levels` is tried with each of the
    `penalties` in turn, `steps` for each: `ingredient` has one number for each ingredient, `depth`
    two more for how it goes on with depth, `group` one more for each group. `flip` and `shift`
    (pixels) augment *select*; `temperature`: whether the logits' scale is learned along; `refit`:
    whether the answer is learned on all of *select*, and not the mean of what the folds learned.
    """

    type: Literal["pooled"] = "pooled"
    batch_size: PositiveInt = 64
    lr: PositiveFloat = 0.02
    starts: Annotated[list[Start], Field(min_length=1)] = ["uniform"]
    levels: Annotated[list[Level], Field(min_length=1)] = ["depth"]
    penalties: Annotated[list[NonNegativeFloat], Field(min_length=1)] = [1000.0, 300.0, 100.0]
    steps: Annotated[int, Field(ge=2)] = 30
    temperature: bool = True
    flip: bool = False
    shift: NonNegativeInt = 0
    refit: bool = False
    block_size: PositiveInt | None = None

    @field_validator("penalties")
    @classmethod
    def _falling(cls, penalties: list[float]) -> list[float]:
        return sorted(set(penalties), reverse=True)


class PooledNewton(CrossFittedSettings):
    """The numbers of `pooled` by Gauss–Newton steps, their penalty by evidence, with intervals.

    `level` as in `pooled`; each of `linearisations` is a pass over *select* for the derivatives of
    the logits, at the cost of one forward for each ingredient and a backward for each class.
    """

    type: Literal["pooled_newton"] = "pooled_newton"
    level: Level = "depth"
    linearisations: PositiveInt = 1
    block_size: PositiveInt | None = None


class GreedyFull(Scoring):
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

    def effort(self, ingredients: int, select: int) -> Effort:
        # Two walks for each fold and one for all, of three moves and those that found nothing more,
        # and greedy's; without replacement they share the subsets, which may be few.
        views, moves = self.folds + 1, 3 + self.patience
        around = ingredients * (2 if self.replacement else 1)
        at_once = max(ingredients + 1, views * (2 * around + 1))
        candidates = ingredients + 1 + views * (2 * moves * around + ingredients - 1)
        if not self.replacement:
            at_once, candidates = (min(n, 2**ingredients - 1) for n in (at_once, candidates))
        return Effort(candidates, candidates * select, at_once, (2 * moves + 1) * ingredients)


class Search(Scoring):
    """What learners that only score candidates share.

    They make `metric` best on *select* (of equals, the one with the lower loss), from `start`, on
    the hyperplane of coefficients that sum to one. `images`: how many of *select* a generation or
    step sees; what is returned is chosen on all of it and never worse than `start`.
    """

    groups: Grouping | ByteSize = "model"
    metric: Metric = "loss"
    start: Literal["uniform", "greedy"] = "uniform"
    images: PositiveInt | None = None

    def passes(self, ingredients: int, select: int, count: int, population: int) -> Effort:
        """The start, so many populations, and the finalists on all of *select*."""
        start = Greedy().effort(ingredients, select) if self.start == "greedy" else Effort()
        seen = min(self.images or select, select)
        finalists = 3 if seen == select else FINALISTS + 2
        return start + Effort(
            count * population + finalists,
            count * population * seen + finalists * select,
            max(population, finalists),
            (count + 1) * ingredients,
        )


class BoundedSearch(Search):
    """A search among coefficients within `bounds`."""

    bounds: tuple[float, float] = (-0.5, 1.5)

    _box = field_validator("bounds")(around_the_ingredients)


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

    @field_validator("concentration")
    @classmethod
    def _from_low_to_high(cls, concentration: tuple[float, float]) -> tuple[float, float]:
        if concentration[0] > concentration[1]:
            raise ValueError("the first must be at most the second: from sparse to dense")
        return concentration

    def effort(self, ingredients: int, select: int) -> Effort:
        count = -(-self.evaluations // self.population)
        return self.passes(ingredients, select, count, self.population)


class CmaEs(BoundedSearch):
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

    def effort(self, ingredients: int, select: int) -> Effort:
        count = -(-self.evaluations // self.population)
        return self.passes(ingredients, select, count, self.population)


class ZerothOrder(BoundedSearch):
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

    def effort(self, ingredients: int, select: int) -> Effort:
        return self.passes(ingredients, select, self.steps, 2 * self.directions)


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
    | Pooled
    | PooledNewton
    | RandomSearch
    | CmaEs
    | ZerothOrder,
    Field(discriminator="type"),
]


LEARNERS: dict[str, Registered] = {
    "best_single": Registered(BestSingle, "soups.learners.selection:best_single"),
    "uniform": Registered(Uniform, "soups.learners.selection:uniform"),
    "greedy": Registered(Greedy, "soups.learners.selection:greedy"),
    "greedy_full": Registered(GreedyFull, "soups.learners.greedy_full:greedy_full"),
    "wise_ft": Registered(WiseFT, "soups.learners.selection:wise_ft"),
    "learned": Registered(Learned, "soups.learners.learned:learned"),
    "learned_layerwise": Registered(LearnedLayerwise, "soups.learners.learned:learned"),
    "mehl": Registered(Mehl, "soups.learners.mehl:mehl"),
    "mehl_layerwise": Registered(MehlLayerwise, "soups.learners.mehl:mehl"),
    "pooled": Registered(Pooled, "soups.learners.pooled:pooled"),
    "pooled_newton": Registered(PooledNewton, "soups.learners.pooled_newton:pooled_newton"),
    "random_search": Registered(RandomSearch, "soups.learners.search:random_search"),
    "cmaes": Registered(CmaEs, "soups.learners.search:cmaes"),
    "zeroth_order": Registered(ZerothOrder, "soups.learners.zeroth_order:zeroth_order"),
}
