"""What `soups.learn` and `soups.finetune` are told; imports no torch."""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from fleet.recipes import Recipe
from inputs.config import ByteSize, DataConfig, ModelConfig, Settings
from soups.learners.registry import LearnerSettings
from soups.reports.registry import ReportSettings

RowName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")]


class Range(Settings):
    """A number drawn uniformly between `low` and `high` (both included), on a log scale if asked.

    For a field that counts something (epochs, batch_size, …) a whole number is drawn.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.low > self.high:
            raise ValueError(f"low is {self.low:g}, above high, {self.high:g}; swap them")
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low:g}; a log scale needs a low above 0")
        return self


class FinetuneConfig(Settings):
    """How a zoo is made: the base's recipe, then `ingredients` recipes from a space.

    `recipe` maps fields of a Recipe to one value, a list of choices, or a Range (random search
    only); a field that is not named has Recipe's default, but `seed` differs from ingredient to
    ingredient unless it is named. A random search draws each field of each ingredient by itself,
    so a larger zoo begins with the smaller one. A grid takes every combination of the lists, the
    last list fastest; `ingredients` cuts it short. `checkpoints_every` makes one more ingredient
    after every so many epochs of each run.
    """

    base: Recipe = Recipe()
    ingredients: PositiveInt = 16
    search: Literal["random", "grid"] = "random"
    recipe: dict[str, Any] = {}
    checkpoints_every: PositiveInt | None = None
    seed: NonNegativeInt = 0

    @field_validator("recipe")
    @classmethod
    def _known_space(cls, recipe: dict[str, Any]) -> dict[str, Any]:
        problems: list[str] = []
        space = {field: _checked_space(field, value, problems) for field, value in recipe.items()}
        if problems:
            raise ValueError("; ".join(problems))
        return space

    @model_validator(mode="before")
    @classmethod
    def _whole_grid(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("search") == "grid":
            return {"ingredients": _combinations(values.get("recipe")), **values}
        return values

    @model_validator(mode="after")
    def _grid_of_lists(self) -> FinetuneConfig:
        if self.search == "random":
            return self
        ranges = [field for field, value in self.recipe.items() if isinstance(value, Range)]
        if ranges:
            raise ValueError(
                f"recipe: {', '.join(ranges)}: a grid takes values and lists, not ranges; "
                "list the values or set search: random"
            )
        combinations = _combinations(self.recipe)
        if self.ingredients > combinations:
            raise ValueError(
                f"the grid has {combinations} combinations, fewer than the {self.ingredients} "
                "ingredients; lengthen its lists or leave `ingredients` out"
            )
        return self


def _combinations(recipe: Any) -> int:
    lists = recipe.values() if isinstance(recipe, dict) else ()
    return max(1, math.prod(len(value) for value in lists if isinstance(value, list)))


def _checked_space(field: str, value: Any, problems: list[str]) -> Any:
    """What one field of a recipe may be; adds to `problems` what is wrong with it."""
    if field not in Recipe.model_fields:
        near = difflib.get_close_matches(field, Recipe.model_fields, n=1)
        known = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(Recipe.model_fields)}"
        problems.append(f"`{field}` is not a field of a recipe; {known}")
        return value
    choices = value if isinstance(value, list) else [value]
    if not choices:
        problems.append(f"{field}: the list is empty; give it choices")
    if isinstance(value, dict):
        try:
            value = Range.model_validate(value)
        except ValidationError as error:
            problems.extend(_sentences(error, (field,)))
            return value
    if isinstance(value, Range):
        default = Recipe.model_fields[field].default
        if isinstance(default, bool | str):
            problems.append(f"{field}: a range is for numbers; list the choices")
            return value
        choices = [value.low, value.high]
    for choice in choices:
        try:
            Recipe.model_validate({field: choice})
        except ValidationError as error:
            problems.extend(_sentences(error))
    return value


def _sentences(error: ValidationError, where: tuple[str, ...] = ()) -> list[str]:
    return [
        f"{'.'.join([*where, *map(str, problem['loc'])])}: "
        f"{problem['msg'].removeprefix('Value error, ')}, found {problem['input']!r}"
        for problem in error.errors()
    ]


class ZooConfig(Settings):
    """The ingredients: a folder, or a list of files, folders, globs and Hub ids.

    `base` is the checkpoint that they were fine-tuned from, where it is known. `skip` names (as
    globs) tensors that are left out of the mixing. `finetune` makes the zoo where it is missing.
    """

    path: Path
    ingredients: list[str] | None = None
    base: str | None = None
    skip: list[str] = []
    ema: bool = False
    check_finite: bool = True
    finetune: FinetuneConfig | None = None


class References(Settings):
    """Rows of the table that are not soups.

    `ensembles`: the mean logits of all ingredients, and of greedy's members. `finetuned`: the best
    single and the uniform soup, fine-tuned on *select* for as many steps as the longest learner
    took, with each of `lrs`; the one that is best on *tune* stands in the table.
    """

    ensembles: bool = True
    finetuned: bool = True
    lrs: Annotated[list[PositiveFloat], Field(min_length=1)] = [1e-4, 1e-3]


class LearnConfig(Settings):
    """One run of `soups.learn`: every row under `learners` becomes a row of the leaderboard, and
    every row under `reports` a table and a picture of its own."""

    name: RowName
    seed: NonNegativeInt = 0
    device: str = "auto"
    output: Path = Path("results")
    memory_budget: ByteSize = ByteSize(4 * 2**30)
    norm_buffers: Literal["uniform", "convex", "recalibrate"] = "uniform"
    train_mode: bool = False
    eval_batch_size: PositiveInt = 512
    model: ModelConfig
    data: DataConfig
    zoo: ZooConfig
    learners: Annotated[dict[RowName, LearnerSettings], Field(min_length=1)]
    references: References = References()
    reports: dict[RowName, ReportSettings] = {}

    @field_validator("learners", "reports", mode="before")
    @classmethod
    def _type_from_name(cls, rows: Any) -> Any:
        """A row without a `type` is of the type that it is called."""
        if not isinstance(rows, dict):
            return rows
        return {
            name: {"type": name, **(settings or {})}
            if isinstance(settings, dict | None)
            else settings
            for name, settings in rows.items()
        }
