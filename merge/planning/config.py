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
    """A checkpoint and its parameters."""

    model: str
    """A local path, an id of the Hub, or `base+adapter`."""
    parameters: Parameters = {}
    """Settings of the method for this model."""


class SliceSource(Settings):
    """The layers [first, last) of a checkpoint."""

    model: str
    """A checkpoint, as in `models`."""
    layer_range: LayerRange
    """[first, last): counted from 0, the last one not included."""
    parameters: Parameters = {}
    """Settings of the method for this source."""


class OutputSlice(Settings):
    """A run of layers of the result, merged from as many layers of each source."""

    sources: list[SliceSource] = Field(min_length=1)
    """The layers that are merged; of each source equally many."""
    base_model: str | None = None
    """The base of this slice; without it that of the config."""
    parameters: Parameters = {}
    """Settings of the method for this slice."""
    residual_weight: _unsupported("mergekit does not use it either; take it out") = None  # type: ignore[valid-type]
    """A key of mergekit's that mergekit does not use either."""


class MethodRule(Settings):
    """Another merge method, and parameters, for the tensors whose names match the glob."""

    match: str
    """A glob of tensor names, as the result has them; the first rule that matches counts."""
    merge_method: str
    """The method for these tensors."""
    parameters: Parameters = {}
    """Its settings, stronger than all others."""


class AlignConfig(Settings):
    """Permutation of the models' units to those of a reference, before they are merged."""

    model: ModelConfig
    """What the checkpoints are of."""
    reference: Literal["base", "first"] = "first"
    """Whose units stay: the base's or the first model's."""
    iterations: PositiveInt = 100
    """The most rounds of matching, in each of which every group of units is matched once."""
    classes: PositiveInt | None = None
    """How many classes the model has, where `data` does not say."""
    image: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    """[channels, height, width] of what the model sees, where `data` does not say."""
    data: DataConfig | None = None
    """Images of the model's task."""
    recalibrate: bool = False
    """Estimate norm buffers again after the merge, on *fit* of `data`."""

    @model_validator(mode="after")
    def _knows_its_input(self) -> AlignConfig:
        if self.image is None and self.data is None:
            raise ValueError("give `image: [channels, height, width]`, or `data`")
        if self.recalibrate and self.data is None:
            raise ValueError("`recalibrate` estimates norm buffers on images; give `data`")
        return self


class StatisticsConfig(Settings):
    """What `fisher` and `regmean` gather first, on images."""

    model: ModelConfig
    """What the checkpoints are of."""
    data: DataConfig
    """Images of the models' task."""
    split: Literal["fit", "tune", "select"] = "fit"
    """Which of their splits."""
    examples: PositiveInt = 256
    """How many images."""
    batch_size: PositiveInt = 32
    """Images that are run at once."""
    labels: Literal["sampled", "true"] = "sampled"
    """For `fisher`: whether an image's label is drawn from the model's own softmax, or is the true
    one."""


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
    it are `coefficients`, `methods`, `skip`, `only`, `align`, `statistics`, `seed`, `memory_budget`
    and `device`.
    """

    merge_method: str | None = None
    """A name of [methods.md](methods.md); not with `coefficients`."""
    base_model: str | None = None
    """What the models were fine-tuned from, for methods that use a base."""
    models: list[ModelEntry] = []
    """What is merged."""
    slices: list[OutputSlice] = []
    """Instead of `models`: runs of layers, one after the other."""
    coefficients: Path | None = None
    """A learned soup, whose ingredients `models` lists in order."""
    parameters: Parameters = {}
    """Settings of the method: numbers, lists over the layers, or lists of `{filter: …, value: …}`.
    """
    methods: list[MethodRule] = []
    """Other methods for some tensors."""
    skip: list[str] = []
    """Globs of tensors that are carried unmerged: the base's, or the first model's."""
    only: list[str] = []
    """Globs of the tensors that are merged; all others are carried. Not with `skip`."""
    dtype: Dtype | None = None
    """The dtype of the result; without it that which holds all models' exactly. Sums are in float32
    or wider."""
    out_dtype: Dtype | None = None
    """The same; stronger than `dtype`."""
    tokenizer_source: str | None = None
    """Whose tokenizer files are copied: `base`, or one of the models."""
    align: AlignConfig | None = None
    """Permute units before merging."""
    statistics: StatisticsConfig | None = None
    """What methods with data are given."""
    seed: NonNegativeInt = 0
    """What methods with random numbers draw."""
    memory_budget: ByteSize = ByteSize(512 * 2**20)
    """Bounds the bytes of tensors in flight, torch itself beside it."""
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    """Where tensors are merged; `auto` is the GPU where there is one."""
    tokenizer: _unsupported(  # type: ignore[valid-type]
        "embeddings are not rearranged for another vocabulary; merge models that share one, and "
        "say which model's tokenizer is copied with tokenizer_source"
    ) = None
    """A key of mergekit's: embeddings are not rearranged for another vocabulary."""
    chat_template: _unsupported(  # type: ignore[valid-type]
        "tokenizer files are copied as they are; take it out, and edit the copy"
    ) = None
    """A key of mergekit's: tokenizer files are copied as they are."""
    modules: _unsupported(  # type: ignore[valid-type]
        "tensors are matched by name, whatever the module; use models, with methods for other "
        "settings by name"
    ) = None
    """A key of mergekit's: tensors are matched by name, whatever the module."""

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
