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
    if it does no harm."""

    type: Literal["greedy"] = "greedy"
    accept: Literal["gt", "ge"] = "ge"
    """An ingredient is kept if accuracy on *select* does not fall (`ge`, as published), or rises
    (`gt`)."""

    def effort(self, ingredients: int, select: int) -> Effort:
        # Some are scored ahead for nothing.
        trials = ingredients - 1 + (ingredients - 1) // 2
        ahead = 1 + (ingredients - 1) // 2
        return Effort(trials, trials * select, ahead, 2 * trials, scored=True)


class WiseFT(Scoring):
    """WiSE-FT (2109.01903): the line from the base to a soup; the best position on *select* wins,
    of equals the one nearer to the soup."""

    type: Literal["wise_ft"] = "wise_ft"
    soup: Literal["uniform", "greedy"] = "uniform"
    """Where the line ends: at the mean of all ingredients, or of greedy's."""
    alphas: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=1)] = [
        i / 10 for i in range(11)
    ]
    """The positions that are tried: 0 is the base, 1 the soup."""

    def effort(self, ingredients: int, select: int) -> Effort:
        soup = Greedy().effort(ingredients, select) if self.soup == "greedy" else Effort()
        alphas = len(self.alphas)
        return soup + Effort(alphas, alphas * select, alphas, ingredients + 1)


class Descent(Settings):
    """It is learned by gradient descent on *select*."""

    batch_size: PositiveInt = 128
    """Images of *select* in a step."""
    label_smoothing: Fraction = 0.0
    """The part of each target that is spread evenly over the classes."""
    clip_norm: PositiveFloat | None = None
    """A gradient in the coefficients with a larger L2 norm is scaled down to it."""


class LearnedSettings(Descent):
    """Softmax over ingredients and a logit temperature, by AdamW."""

    lr: PositiveFloat = 0.05
    """AdamW's, the same in every step."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's, on the softmax's logits and the log of the temperature."""
    epochs: PositiveInt = 5
    """Passes over *select*."""


class Learned(LearnedSettings):
    """Learned-Soup (2203.05482): one softmax over the ingredients."""

    type: Literal["learned"] = "learned"


class LearnedLayerwise(LearnedSettings):
    """Learned-Soup+: one softmax per group."""

    type: Literal["learned_layerwise"] = "learned_layerwise"
    groups: Grouping | ByteSize = "tensor"
    """Which tensors share a coefficient: all (`model`), those below one numbered module (`block`),
    those of one module (`layer`), none (`tensor`), or neighbours up to so many bytes."""


class MehlSettings(Descent):
    """Block-coordinate descent on the hyperplane of the ingredients (2407.03641)."""

    lr: PositiveFloat = 0.01
    """AdamW's after the warm-up."""
    init: Literal["mean_all", "first_block"] = "mean_all"
    """Where descent begins: at the mean of all ingredients, or of the first block."""
    rows: Literal["relative", "unit"] = "relative"
    """What descent counts a step in: an ingredient's distance from the centre (`relative`), or the
    same length for all (`unit`)."""
    block_size: PositiveInt | None = None
    """How many ingredients are held at a time; without it as many as the memory budget allows."""
    precision: Precision = "fp32"
    """How the rows of a block are held, so that more of them fit; the soup is cooked from the
    originals all the same, and the run says what was lost."""
    inner_epochs: PositiveInt = 5
    """Passes over *select* with each block."""
    outer_epochs: PositiveInt = 1
    """Passes over the ingredients, each in a new order."""
    warmup: Fraction = 0.2
    """The fraction of a block's steps in which lr rises linearly; it falls as half a cosine."""


class Mehl(MehlSettings):
    """MEHL-Soup: one coefficient per ingredient."""

    type: Literal["mehl"] = "mehl"


class MehlLayerwise(MehlSettings):
    """MEHL-Soup+: one coefficient per ingredient and group."""

    type: Literal["mehl_layerwise"] = "mehl_layerwise"
    groups: Grouping | ByteSize = "tensor"
    """Which tensors share a coefficient: all (`model`), those below one numbered module (`block`),
    those of one module (`layer`), none (`tensor`), or neighbours up to so many bytes."""


class CrossFittedSettings(Settings):
    """It tries itself on `folds` of *select*, and gives way to greedy unless it passes the `gate`.

    What passes was chosen on the same images, so its numbers out of fold are a little too good.
    """

    groups: Grouping | ByteSize = "layer"
    """Which tensors share a coefficient: all (`model`), those below one numbered module (`block`),
    those of one module (`layer`), none (`tensor`), or neighbours up to so many bytes."""
    folds: Annotated[int, Field(ge=2)] = 5
    """Parts of *select*; what is learned without one of them is judged on it."""
    gate: NonNegativeFloat = 0.0
    """Greedy stays unless the best trial is better out of fold by more than so many paired standard
    errors. By loss, 0 takes the trial with the lowest, greedy's among them."""
    gate_by: Literal["loss", "accuracy"] = "loss"
    """What is compared: the loss after a temperature, or the accuracy."""
    bounds: tuple[float, float] = (-0.5, 1.5)
    """The box that every coefficient stays in; it must hold 0 and 1."""

    _box = field_validator("bounds")(around_the_ingredients)


class Pooled(CrossFittedSettings, Descent):
    """Few numbers for each ingredient, cross-fitted, and greedy where they do not help."""

    type: Literal["pooled"] = "pooled"
    batch_size: PositiveInt = 64
    lr: PositiveFloat = 0.02
    """Adam's; after five steps of warm-up it stays, and falls over the second half of the steps."""
    starts: Annotated[list[Start], Field(min_length=1)] = ["uniform"]
    """Where the coefficients begin: the one of these soups with the lower loss out of fold."""
    levels: Annotated[list[Level], Field(min_length=1)] = ["depth"]
    """What is learned, each of them tried: one number for each ingredient (`ingredient`), two more
    for how it goes on with depth (`depth`), one more for each group (`group`)."""
    penalties: Annotated[list[NonNegativeFloat], Field(min_length=1)] = [1000.0, 300.0, 100.0]
    """λ, how strongly coefficients are held at their start; tried from the largest down."""
    steps: Annotated[int, Field(ge=2)] = 30
    """Steps with each of the penalties."""
    temperature: bool = True
    """Learn the logits' scale along."""
    flip: bool = False
    """Mirror each image of *select* left to right with probability ½."""
    shift: NonNegativeInt = 0
    """Move each image by up to so many pixels each way."""
    refit: bool = False
    """Learn the answer on all of *select*; else it is the mean of what the folds learned."""
    block_size: PositiveInt | None = None
    """How many ingredients are held at a time; without it as many as the memory budget allows."""

    @field_validator("penalties")
    @classmethod
    def _falling(cls, penalties: list[float]) -> list[float]:
        return sorted(set(penalties), reverse=True)


class PooledNewton(CrossFittedSettings):
    """The numbers of `pooled` by Gauss–Newton steps, their penalty by evidence, with intervals."""

    type: Literal["pooled_newton"] = "pooled_newton"
    level: Level = "depth"
    """What is learned, as in `levels` of `pooled`."""
    linearisations: PositiveInt = 1
    """Steps, each a pass over *select* for the derivatives of the logits, at the cost of one
    forward for each ingredient and a backward for each class."""
    block_size: PositiveInt | None = None
    """The derivatives of how many ingredients are computed at a time; without it as many as the
    memory budget allows."""


class GreedyFull(Scoring):
    """Selection over all ingredients at each step, forward and backward, chosen by cross-fitting.

    Walks of single additions and removals are found on all folds of *select* but one; which walk,
    and how many of its moves, is decided on the folds that were left out.
    """

    type: Literal["greedy_full"] = "greedy_full"
    metric: Literal["accuracy", "loss"] = "accuracy"
    """What makes one soup better than another; the other of the two decides between equals."""
    folds: Annotated[int, Field(ge=2)] = 5
    """Parts of *select* for the cross-fitting."""
    rule: Literal["best", "one_se"] = "one_se"
    """`best` takes what is best out of fold, `one_se` the fewest moves of that walk that are within
    one standard error of it, and no worse than greedy."""
    replacement: bool = False
    """An ingredient may be added again, so that it weighs more."""
    patience: PositiveInt = 3
    """A walk ends after so many moves without a better soup."""

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
    """It only scores candidates, on the hyperplane of coefficients that sum to one."""

    groups: Grouping | ByteSize = "model"
    """Which tensors share a coefficient: all (`model`), those below one numbered module (`block`),
    those of one module (`layer`), none (`tensor`), or neighbours up to so many bytes."""
    metric: Metric = "loss"
    """What is made best on *select*; of equals, the soup with the lower loss."""
    start: Literal["uniform", "greedy"] = "uniform"
    """Where the search begins: at the mean of all ingredients, or of greedy's."""
    images: PositiveInt | None = None
    """How many images of *select*, drawn anew, a generation or step sees; without it all. What is
    returned is chosen on all of it, and never worse than the start."""

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
    """Its coefficients stay within `bounds`."""

    bounds: tuple[float, float] = (-0.5, 1.5)
    """The box that every coefficient stays in; it must hold 0 and 1."""

    _box = field_validator("bounds")(around_the_ingredients)


class RandomSearch(Search):
    """Random soups, from sparse to dense, and random steps from the best one so far."""

    type: Literal["random_search"] = "random_search"
    evaluations: PositiveInt = 1000
    """How many candidates are scored, rounded up to whole populations."""
    population: PositiveInt = 32
    """Candidates in one pass."""
    concentration: tuple[PositiveFloat, PositiveFloat] = (0.05, 20.0)
    """[low, high]: a soup's weights are Dirichlet with a concentration drawn between these on a log
    scale; a low one makes few ingredients count."""
    local: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The part of each population that lies on lines from the best so far to such soups."""

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
    """CMA-ES (1604.00772); its diagonal form where the coefficients are many."""

    type: Literal["cmaes"] = "cmaes"
    evaluations: PositiveInt = 1000
    """The most candidates that are scored, rounded up to whole populations."""
    population: Annotated[int, Field(ge=4)] = 24
    """Candidates in one pass."""
    sigma: PositiveFloat = 0.3
    """The distance of the first candidates from the start, in each group; 1 is that of an
    ingredient from nothing."""
    covariance: Literal["auto", "full", "diagonal"] = "auto"
    """A full matrix, its diagonal alone, or the diagonal where there are more than 100 coefficients
    (`auto`)."""
    tolerance: NonNegativeFloat = 1e-3
    """Stop once no coefficient differs by so much within a population."""

    def effort(self, ingredients: int, select: int) -> Effort:
        count = -(-self.evaluations // self.population)
        return self.passes(ingredients, select, count, self.population)


class ZerothOrder(BoundedSearch):
    """Descent along two-point differences in random directions (SPSA; MeZO, 2305.17333).

    All candidates of a step are one pass.
    """

    type: Literal["zeroth_order"] = "zeroth_order"
    images: PositiveInt | None = 128
    steps: PositiveInt = 60
    """How many."""
    directions: PositiveInt = 16
    """Directions of a step, with two candidates each; orthogonal, as far as there are so many."""
    epsilon: PositiveFloat = 0.1
    """The distance of candidates from where the step begins, in each group."""
    lr: PositiveFloat = 0.02
    """That of the first step; it falls to 0 as half a cosine."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """What turns the differences into a step."""

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
