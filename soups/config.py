"""What `soups.learn` and `soups.finetune` are told; imports no torch."""

from __future__ import annotations

import difflib
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
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
from fleet.training.halving import Halving
from inputs.config import ByteSize, DataConfig, ModelConfig, Settings, nearest
from soups.learners.registry import BestSingle, Greedy, LearnerSettings, Pooled, Uniform
from soups.reports.registry import ReportSettings

_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$"
RowName = Annotated[str, Field(pattern=_NAME)]


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
    """How a zoo is made: the base's recipe, then `ingredients` recipes from a space."""

    base: Recipe = Recipe()
    """How the base is trained, where `zoo.base` does not name one."""
    ingredients: PositiveInt = 16
    """How many recipes; a grid without it has all combinations."""
    search: Literal["random", "grid"] = "random"
    """`random` draws each key of each ingredient by itself, so that a larger zoo begins with the
    smaller one; `grid` takes every combination of the lists, the last list fastest."""
    recipe: dict[str, Any] = {}
    """Keys of a recipe, each with one value, a list of choices or, for a random search, a range
    `{low: 1e-5, high: 1e-3, log: true}`. One that is not named has its default; `seed` is drawn."""
    checkpoints_every: PositiveInt | None = None
    """One more ingredient after every so many epochs of each run."""
    halving: Halving | None = None
    """Bad recipes are stopped early, and leave no ingredient."""
    seed: NonNegativeInt = 0
    """Draws the recipes."""
    joint: bool = True
    """Train all at once, as many as the memory budget allows; else one after another. It changes no
    weights by more than rounding."""
    save_every: PositiveFloat = 10.0
    """Minutes after which what is under way is saved, for a killed run to go on from."""
    tensorboard: bool = False
    """Write event files for TensorBoard into the zoo's folder."""

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


def choices(field: str, value: Any) -> list[Any] | None:
    """The choices that a list in a space stands for; None for what is one value or a Range.

    Where the field itself is a list of names, so is a list of names: only lists of those are
    choices.
    """
    if not isinstance(value, list):
        return None
    known = Recipe.model_fields.get(field)
    if known is not None and isinstance(known.default, tuple):
        return value if any(isinstance(choice, list | tuple) for choice in value) else None
    return value


def _combinations(recipe: Any) -> int:
    lists = [choices(*item) for item in recipe.items()] if isinstance(recipe, dict) else []
    return max(1, math.prod(len(values) for values in lists if values is not None))


def _checked_space(field: str, value: Any, problems: list[str]) -> Any:
    """What one field of a recipe may be; adds to `problems` what is wrong with it."""
    if field not in Recipe.model_fields:
        near = difflib.get_close_matches(field, Recipe.model_fields, n=1)
        known = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(Recipe.model_fields)}"
        problems.append(f"`{field}` is not a field of a recipe; {known}")
        return value
    listed = choices(field, value)
    possible = [value] if listed is None else listed
    if not possible:
        problems.append(f"{field}: the list is empty; give it choices")
    if isinstance(value, dict):
        try:
            value = Range.model_validate(value)
        except ValidationError as error:
            problems.extend(_sentences(error, (field,)))
            return value
    if isinstance(value, Range):
        default = Recipe.model_fields[field].default
        if isinstance(default, bool | str | tuple):
            problems.append(f"{field}: a range is for numbers; list the choices")
            return value
        possible = [value.low, value.high]
    for choice in possible:
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
    """The ingredients: a folder, or a list of files, folders, globs and Hub ids."""

    path: Path
    """The folder that the ingredients are in, or that they are made into."""
    ingredients: list[str] | None = None
    """Files, folders and globs inside of `path`, other paths, or Hub ids; without it every
    checkpoint in `path`."""
    subset: Annotated[int, Field(ge=2)] | None = None
    """Take so many of the ingredients, drawn by the run's seed; they keep their order."""
    base: str | None = None
    """The checkpoint that they were fine-tuned from; without it the one in `path` that is called
    `base`, if there is one and `ingredients` are not listed."""
    skip: list[str] = []
    """Globs of tensors that are not mixed; they are the base's, or the first ingredient's."""
    ema: bool = False
    """Read the averaged weights of files that hold both."""
    check_finite: bool = True
    """Refuse ingredients with values that are not finite in tensors that are mixed."""
    finetune: FinetuneConfig | None = None
    """How the zoo is made where it is missing."""


class References(Settings):
    """Rows of the table that are not soups."""

    ensembles: bool = True
    """The mean logits of all ingredients, and of the members of greedy."""
    finetuned: bool = True
    """The best single and the uniform soup, fine-tuned on *select* for as many steps as the longest
    learner took."""
    lrs: Annotated[list[PositiveFloat], Field(min_length=1)] = [1e-4, 1e-3]
    """The learning rates of `finetuned`; the one that is best on *tune* stands in the table."""


def _labels(axis: Any) -> Any:
    """An axis as label → overrides, whichever way it was written."""
    if not isinstance(axis, dict):
        return axis
    if not {"keys", "values"} & set(axis):  # in YAML, 16 is a number also where it is a name
        return {str(k) if isinstance(k, int | float) else k: own for k, own in axis.items()}
    keys, values = axis.get("keys"), axis.get("values")
    keys = [keys] if isinstance(keys, str) else keys
    if set(axis) != {"keys", "values"} or not isinstance(keys, list) or not keys:
        raise ValueError(
            "wanted `keys` (a dotted key, or several that all get the value) and `values` (a "
            "list), or a mapping from labels to overrides"
        )
    if not isinstance(values, list):
        raise ValueError("`values`: wanted a list")
    odd = [v for v in values if not _can_be_a_folder(v)]
    if odd:
        raise ValueError(
            f"`values`: {odd[0]!r} cannot be the name of a folder; write this axis as a mapping "
            "from labels to overrides"
        )
    labels = {str(value): dict.fromkeys(keys, value) for value in values}
    if len(labels) < len(values):
        raise ValueError(f"`values`: {', '.join(map(str, values))} has one value twice")
    return labels


def _can_be_a_folder(value: Any) -> bool:
    return isinstance(value, bool | int | float | str) and bool(re.fullmatch(_NAME, str(value)))


Axis = Annotated[
    dict[RowName, dict[str, Any]], BeforeValidator(_labels), Field(min_length=1, title="axis")
]
# A sweep says these itself.
_OF_THE_SWEEP = ("sweep", "name", "output")


class SweepConfig(Settings):
    """Many runs of one config: every combination of the axes' labels is a run."""

    axes: Annotated[dict[RowName, Axis], Field(min_length=1)]
    """Axis → label → overrides (dotted keys or nested mappings, which are merged into those that
    are there); or axis → `{keys: …, values: […]}`: each value is given to all of the keys, and is
    the label."""
    workers: PositiveInt = 1
    """How many runs go on at once; they share the cores, and each has the config's memory budget
    for itself."""
    keep_soups: bool = False
    """Keep the cooked soups too; else coefficients alone, from which they can be cooked again."""
    compare: list[RowName] = ["greedy"]
    """The learners' rows that all others are compared with, on *report*."""
    repeats: str = "split"
    """The axis whose labels are draws of the same thing, such as splits."""
    seeds: str = "seed"
    """The axis whose labels are learners' own seeds on one draw."""
    zoos: str = "zoo"
    """The axis whose labels are zoos; they are compared apart, and together."""

    @model_validator(mode="after")
    def _axes_that_are_apart(self) -> SweepConfig:
        for field in ("repeats", "seeds", "zoos"):
            name = getattr(self, field)
            if field in self.model_fields_set and name not in self.axes:
                raise ValueError(f"`{field}`: there is no axis {name!r}{nearest(name, self.axes)}")
        problems: list[str] = []
        setter: dict[str, str] = {}
        for axis, labels in self.axes.items():
            keys = {key for values in labels.values() for key in settings_of(values)}
            for key in sorted(keys):
                if key.partition(".")[0] in _OF_THE_SWEEP:
                    problems.append(f"axes.{axis}: sets `{key}`, which a sweep does itself")
                for other, by in setter.items():
                    if overlap(key, other):
                        problems.append(f"axes {by} and {axis} both set `{key}`")
            setter |= dict.fromkeys(keys, axis)
        if problems:
            raise ValueError("; ".join(problems))
        return self


def settings_of(overrides: dict[str, Any]) -> dict[str, Any]:
    """An axis's overrides as dotted keys, each as deep as mappings go, and their values."""
    flat: dict[str, Any] = {}
    for key, value in overrides.items():
        if isinstance(value, dict) and value:
            flat |= {f"{key}.{inner}": found for inner, found in settings_of(value).items()}
        else:
            flat[key] = value
    return flat


def overlap(a: str, b: str) -> bool:
    """Whether one dotted key is the other, or inside of it."""
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")


class LearnConfig(Settings):
    """One run of `soups.learn`: every row under `learners` becomes a row of the leaderboard.

    Where there are no `learners`, they are the classics and `pooled`.
    """

    name: RowName
    """The run's folder inside of `output`."""
    seed: NonNegativeInt = 0
    """What learners, `zoo.subset` and intervals draw; splits and fine-tuning have seeds of their
    own."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`; `auto` is the GPU where there is one."""
    output: Path = Path("results")
    """The folder that runs are put into."""
    memory_budget: ByteSize = ByteSize(4 * 2**30)
    """The most memory that the run may take, what the process holds anyway included. The plan is
    made to fit: how many ingredients a learner holds, how many models are trained at once."""
    norm_buffers: Literal["uniform", "convex", "recalibrate"] = "uniform"
    """BatchNorm's running statistics, in learning, evaluating and cooking: mixed once with equal
    weights (`uniform`), by the coefficients clipped to be convex (`convex`), or estimated again on
    *fit* (`recalibrate`)."""
    train_mode: bool = False
    """Learners by gradient descent run the model as in training: with dropout, and norms by the
    batch."""
    eval_batch_size: PositiveInt = 512
    """Images in a batch where nothing is trained."""
    model: ModelConfig
    """What the checkpoints are of."""
    data: DataConfig
    """The images."""
    zoo: ZooConfig
    """The ingredients."""
    learners: Annotated[dict[RowName, LearnerSettings], Field(min_length=1)] = {
        "best_single": BestSingle(),
        "uniform": Uniform(),
        "greedy": Greedy(),
        "pooled": Pooled(),
    }
    """Row → learner; a row without a `type` is of the type that it is called."""
    references: References = References()
    """Rows that are no soups."""
    out_of_fold: NonNegativeInt = 5
    """Every learner is cross-fitted on so many folds of *select*, for its accuracy on images that
    it has not seen; 0 turns that off."""
    reports: dict[RowName, ReportSettings] = {}
    """Name → report: a table and a picture of its own. One without a `type` is of the type that it
    is called."""
    pictures: bool = True
    """Draw the learners and the leaderboard, and write `leaderboard.html`."""

    @model_validator(mode="before")
    @classmethod
    def _one_run(cls, values: Any) -> Any:
        if isinstance(values, dict) and "sweep" in values:
            raise ValueError("`sweep` makes many runs of this; only `python -m soups.learn` can")
        return values

    @field_validator("out_of_fold")
    @classmethod
    def _not_one_fold(cls, folds: int) -> int:
        if folds == 1:
            raise ValueError("one fold leaves no images to learn from; 0 turns it off")
        return folds

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
