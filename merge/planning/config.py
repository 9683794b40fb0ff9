"""What a merge is told: mergekit's shape of a config, and what goes beyond it; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ByteSize,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from inputs.config import DataConfig, ModelConfig, Settings, explain, with_known_keys
from merge.errors import MergeError
from merge.method import Method
from merge.planning.checks import config_without, details
from merge.planning.parameters import read_cases
from merge.registry import METHODS

__all__ = [
    "AlignConfig",
    "Group",
    "MergeConfig",
    "MethodRule",
    "ModelEntry",
    "OutputSlice",
    "SliceSource",
    "StatisticsConfig",
    "parse_config",
    "split_reference",
]


def _unsupported(why: str) -> Any:
    """A key of mergekit's that is refused, unless it is null; `why` ends with what to do."""

    def refuse(value: Any) -> None:
        if value is not None:
            raise PydanticCustomError("unsupported", f"is not supported: {why}")  # type: ignore[arg-type]

    return Annotated[None, BeforeValidator(refuse)]


def _check_shape(setting: Any) -> Any:
    read_cases(setting)
    return setting


def _none_is_empty(value: Any) -> Any:
    return {} if value is None else value


def _without_torch(name: Any) -> Any:
    return name.removeprefix("torch.") if isinstance(name, str) else name


def _check_pair(value: Any) -> Any:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError("wanted two numbers, [first, last): from the first to before the last")
    return value


Parameters = Annotated[
    dict[str, Annotated[Any, AfterValidator(_check_shape)]], BeforeValidator(_none_is_empty)
]
Dtype = Annotated[
    Literal["float32", "float16", "bfloat16", "float64"], BeforeValidator(_without_torch)
]

LayerRange = Annotated[tuple[NonNegativeInt, NonNegativeInt], BeforeValidator(_check_pair)]


class ModelEntry(Settings):
    """A checkpoint (a local path, an id of the Hub, `base+adapter`) and its parameters."""

    model: str
    parameters: Parameters = {}


class SliceSource(Settings):
    """The layers [first, last) of a checkpoint; `layer_range` counts from 0."""

    model: str
    layer_range: LayerRange
    parameters: Parameters = {}


class OutputSlice(Settings):
    """A run of layers of the result, merged from as many layers of each source."""

    sources: list[SliceSource] = Field(min_length=1)
    base_model: str | None = None
    parameters: Parameters = {}
    residual_weight: _unsupported("mergekit does not use it either; take it out") = None  # type: ignore[valid-type]


class MethodRule(Settings):
    """Another merge method, and parameters, for the tensors whose names match the glob."""

    match: str
    merge_method: str
    parameters: Parameters = {}


class AlignConfig(Settings):
    """Permutation of the models' units to those of a reference, before they are merged.

    `model` is what the checkpoints are of; `image` is [channels, height, width] of what it sees,
    which `data` says otherwise. `recalibrate` estimates norm buffers again on *fit* of `data`.
    """

    model: ModelConfig
    reference: Literal["base", "first"] = "first"
    iterations: PositiveInt = 100
    classes: PositiveInt | None = None
    image: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    data: DataConfig | None = None
    recalibrate: bool = False

    @model_validator(mode="after")
    def _knows_its_input(self) -> AlignConfig:
        if self.image is None and self.data is None:
            raise ValueError("give `image: [channels, height, width]`, or `data`")
        if self.recalibrate and self.data is None:
            raise ValueError("`recalibrate` estimates norm buffers on images; give `data`")
        return self


class StatisticsConfig(Settings):
    """What `fisher` and `regmean` gather first: over so many examples of a split of `data`."""

    model: ModelConfig
    data: DataConfig
    split: Literal["fit", "tune", "select"] = "fit"
    examples: PositiveInt = 256
    batch_size: PositiveInt = 32
    labels: Literal["sampled", "true"] = "sampled"


@dataclass(frozen=True)
class Group:
    """Checkpoints whose tensors are merged with each other: those of `models`, or of a slice.

    `references` are theirs, without a base that is not listed among them; `own` are their
    parameters, `shared` those for all of them, the strongest first; `at` is the group's key.
    """

    references: tuple[str, ...]
    own: tuple[Mapping[str, Any], ...]
    shared: tuple[Mapping[str, Any], ...]
    base: str | None
    base_is_model: bool
    at: tuple[int | str, ...]
    layer_ranges: tuple[tuple[int, int], ...] = ()

    @property
    def all_references(self) -> tuple[str, ...]:
        """The checkpoints that are read: with a base that is not listed, which comes last."""
        unlisted = self.base is not None and self.base not in self.references
        if self.layer_ranges or not unlisted or self.base is None:
            return self.references
        return (*self.references, self.base)

    def roles(self, method: Method) -> tuple[str | None, tuple[str, ...]]:
        """Which checkpoint is the base for this method, and which are its models.

        A base that the method uses is no model, listed or not. For one that does not, it is a
        model where it is listed, or where no method of this config uses it (mergekit's rule).
        """
        if method.base != "ignored":
            return self.base, tuple(ref for ref in self.references if ref != self.base)
        return None, self.all_references if self.base_is_model else self.references


class MergeConfig(Settings):
    """Which checkpoints are merged, and how.

    As mergekit has it: parameters of a slice's source or a model are stronger than those of the
    slice, and these than the global ones; those of a rule in `methods` are stronger still. Beyond
    it: `skip` (or all but `only`) names tensors by globs that are carried unmerged; `methods`
    gives tensors another method; `coefficients` is a learned soup, whose ingredients `models`
    lists in order. `memory_budget` bounds the bytes of tensors in flight, torch itself beside it.
    """

    merge_method: str | None = None
    base_model: str | None = None
    models: list[ModelEntry] = []
    slices: list[OutputSlice] = []
    coefficients: Path | None = None
    parameters: Parameters = {}
    methods: list[MethodRule] = []
    skip: list[str] = []
    only: list[str] = []
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    tokenizer_source: str | None = None
    align: AlignConfig | None = None
    statistics: StatisticsConfig | None = None
    seed: NonNegativeInt = 0
    memory_budget: ByteSize = ByteSize(512 * 2**20)
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    tokenizer: _unsupported(  # type: ignore[valid-type]
        "embeddings are not rearranged for another vocabulary; merge models that share one, and "
        "say which model's tokenizer is copied with tokenizer_source"
    ) = None
    chat_template: _unsupported(  # type: ignore[valid-type]
        "tokenizer files are copied as they are; take it out, and edit the copy"
    ) = None
    modules: _unsupported(  # type: ignore[valid-type]
        "tensors are matched by name, whatever the module; use models, with methods for other "
        "settings by name"
    ) = None

    @model_validator(mode="wrap")
    @classmethod
    def _all_at_once(cls, value: Any, handler: Callable[[Any], Any]) -> Any:
        """Report what the fields are and what they mean together in one error."""
        problems: list[InitErrorDetails] = []
        try:
            config = handler(value)
        except ValidationError as error:
            found = error.errors(include_url=False)
            problems = [with_known_keys(one, []) for one in found]
            config = config_without(value, [one["loc"] for one in found], handler)
        if config is not None:
            wrong = [one.get("loc") for one in problems]
            problems += [one for one in details(config) if one.get("loc") not in wrong]
        if problems:
            raise ValidationError.from_exception_data(cls.__name__, problems)
        return config

    @property
    def references(self) -> tuple[str, ...]:
        """Every checkpoint that the config names, once: the base first, then in order."""
        named = [self.base_model, *(slice_.base_model for slice_ in self.slices)]
        named += [entry.model for entry in self.models]
        named += [source.model for slice_ in self.slices for source in slice_.sources]
        return tuple(dict.fromkeys(ref for ref in named if ref is not None))

    @property
    def methods_in_use(self) -> tuple[Method, ...]:
        """The known methods that this config names: the main one, then those of the rules."""
        named = [self.merge_method, *(rule.merge_method for rule in self.methods)]
        return tuple(dict.fromkeys(METHODS[name] for name in named if name in METHODS))

    @property
    def groups(self) -> tuple[Group, ...]:
        """The one group of `models`, or one for each of the slices, in order."""
        unused = all(method.base == "ignored" for method in self.methods_in_use)
        if not self.slices:
            return (
                Group(
                    tuple(entry.model for entry in self.models),
                    tuple(entry.parameters for entry in self.models),
                    (self.parameters,),
                    self.base_model,
                    unused,
                    ("models",),
                ),
            )
        return tuple(
            Group(
                tuple(source.model for source in slice_.sources),
                tuple(source.parameters for source in slice_.sources),
                (slice_.parameters, self.parameters),
                slice_.base_model or self.base_model,
                unused,
                ("slices", k),
                tuple(source.layer_range for source in slice_.sources),
            )
            for k, slice_ in enumerate(self.slices)
        )


def parse_config(data: object) -> MergeConfig:
    """The checked config from a mapping; MergeError with every problem found."""
    try:
        return MergeConfig.model_validate(data)
    except ValidationError as error:
        found = explain(error, data).items()
        lines = [f"{key}: {text}" if key else text for key, text in found]
        raise MergeError("merge config: " + "\n".join(lines)) from error


def split_reference(reference: str) -> tuple[str, str | None]:
    """`base+adapter` as its two parts; a local path with a plus in its name stays one.

    Raises MergeError where it cannot be told which plus stands between the two.
    """
    if "+" not in reference or Path(reference).exists():
        return reference, None
    cuts = [match.start() for match in re.finditer(r"\+", reference)]
    pairs = [(reference[:cut], reference[cut + 1 :]) for cut in cuts]
    pairs = [pair for pair in pairs if all(pair)]
    local = [pair for pair in pairs if Path(pair[0]).exists()]
    chosen = local if len(local) == 1 else pairs
    if len(chosen) != 1:
        raise MergeError(
            f"{reference!r}: wanted a checkpoint, or `checkpoint+adapter` with both parts; rename "
            "what has a plus in its own name"
        )
    return chosen[0]
