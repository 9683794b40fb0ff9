"""YAML → OmegaConf → frozen pydantic models; errors name the path and the nearest right name.

Nothing here imports torch: a config is read and refused in well under a second.
"""

from __future__ import annotations

import copy
import difflib
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError
from pydantic_core.core_schema import ErrorType
from yaml import MappingNode, MarkedYAMLError, SafeLoader, YAMLError, compose

from inputs.errors import InputError

__all__ = [
    "ByteSize",
    "ConfigTree",
    "DataConfig",
    "FactoryModel",
    "ModelConfig",
    "OpenClipModel",
    "Settings",
    "SplitConfig",
    "TimmModel",
    "checked",
    "explain",
    "load_config",
    "nearest",
    "read_config",
    "with_known_keys",
]

_UNKNOWN_KEY = "unknown_key"
_PYDANTIC_TYPES = frozenset(get_args(ErrorType))


def nearest(found: object, known: Iterable[str]) -> str:
    """The end of a message on an unknown name: "; did you mean 'x'?", or all the known names."""
    names = list(known)
    close = difflib.get_close_matches(str(found), names, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(map(repr, names))}" if names else ""


class Settings(BaseModel):
    """A frozen group of settings in which every key must be known."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    @model_validator(mode="wrap")
    @classmethod
    def _name_the_nearest_key(cls, value: Any, handler: Callable[[Any], Any]) -> Any:
        """Say at an unknown key which one was meant.

        This model knows its keys; whoever reports the error may not, since a field typed Any is
        checked against a model that a validator chose.
        """
        try:
            return handler(value)
        except ValidationError as error:
            known = [field.alias or name for name, field in cls.model_fields.items()]
            raise ValidationError.from_exception_data(
                error.title,
                [with_known_keys(one, known) for one in error.errors(include_url=False)],
            ) from None


def with_known_keys(error: ErrorDetails, known: list[str]) -> InitErrorDetails:
    """The error again, to be raised with others; an unknown key is told the nearest known one."""
    kind: str | PydanticCustomError = error["type"]
    if kind == "extra_forbidden" and len(error["loc"]) == 1:
        text = f"unknown key{nearest(error['loc'][0], known) or '; there are no keys here'}"
        kind = PydanticCustomError(_UNKNOWN_KEY, text)  # type: ignore[arg-type]
    elif kind not in _PYDANTIC_TYPES:
        kind = PydanticCustomError(error["type"], error["msg"])  # type: ignore[arg-type]
    return InitErrorDetails(
        type=kind, loc=error["loc"], input=error["input"], ctx=error.get("ctx", {})
    )


class TimmModel(Settings):
    """Any timm model: `timm.create_model(name, num_classes=…, **kwargs)`."""

    source: Literal["timm"]
    name: str
    """As `timm.create_model` takes it."""
    kwargs: dict[str, Any] = {}
    """Further arguments of `timm.create_model`, such as `pretrained: true`; the number of classes
    and of channels follows from the data."""


class OpenClipModel(Settings):
    """An open_clip vision tower with a linear head.

    Tensor names are those of the public 72-model CLIP zoo (2203.05482): `model.visual.*`,
    `classification_head.*`.
    """

    source: Literal["open_clip"]
    name: str
    """One of `open_clip.list_models()`."""
    kwargs: dict[str, Any] = {}
    """Keys that replace those of the model's published config; those of its `vision_cfg` one by
    one."""
    normalize_features: bool = True
    """Whether the tower's features are divided by their length before the head."""
    head_weights: Path | None = None
    """A checkpoint with one [classes, dim] tensor, a zero-shot head; without it the head is drawn
    at random."""
    logit_scale: PositiveFloat = 100.0
    """What `head_weights` are multiplied by, so that the head alone gives the logits."""


class FactoryModel(Settings):
    """A user's own model: this is the one setting that names code to run.

    The factory is called as `function(num_classes=…, **kwargs)` and returns a `torch.nn.Module`.
    """

    source: Literal["factory"]
    factory: str
    """`path/to/file.py:function` (relative to the config) or `package.module:function`."""
    kwargs: dict[str, Any] = {}
    """What the function is called with beside `num_classes`."""


ModelConfig = Annotated[TimmModel | OpenClipModel | FactoryModel, Field(discriminator="source")]


class SplitConfig(Settings):
    """Which images make one split: a `count` or a `fraction` of a split of the source.

    With neither, the split is all of it. Splits that are taken from one are disjoint.
    """

    source: str = Field(alias="from")
    """Which split of the source, by its name there; that of the digits is `all`, that of a folder
    without folders of splits `train`."""
    count: PositiveInt | None = None
    """So many images of it."""
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """This part of its images, rounded down."""

    @model_validator(mode="after")
    def _one_size(self) -> SplitConfig:
        if self.count is not None and self.fraction is not None:
            raise ValueError("give `count` or `fraction`, not both")
        return self


Severity = Annotated[int, Field(ge=1, le=5)]


class DataConfig(Settings):
    """Images and their splits."""

    path: str
    """`digits` (embedded), a Hub id (`id@revision` for one revision), a folder of class folders, or
    a folder or file of parquet."""
    size: PositiveInt | None = None
    """Height and width, in pixels, that the model sees: the shorter side is scaled to it, and the
    middle taken. Without it images stay as they are, and must all be of one size."""
    channels: Literal[1, 3] = 3
    """1 is grey, 3 is RGB."""
    mean: tuple[float, ...] = (0.5,)
    """The model sees (pixel − mean) / std, for pixels on [0, 1]: one number, or one for each
    channel."""
    std: tuple[PositiveFloat, ...] = (0.5,)
    """See `mean`."""
    image_column: str | None = None
    """The column of a table that has the images; without it the only one that can."""
    label_column: str | None = None
    """The column that has the labels; without it the only one that can."""
    fit: SplitConfig
    """The images that ingredients are fine-tuned on. Its source says which classes there are."""
    tune: SplitConfig
    """The images that a fine-tuning's own stopping may look at."""
    select: SplitConfig
    """The images that coefficients are learned and learners are chosen on."""
    report: SplitConfig
    """The images for the table; code that learns cannot reach them."""
    shifts: dict[
        Literal["noise", "blur", "rotation", "contrast"],
        Annotated[list[Severity], Field(min_length=1)],
    ] = {}
    """Extra report sets: a corruption (`noise`, `blur`, `rotation`, `contrast`) and its severities.
    """
    cache: Path = Path(".cache/images")
    """A folder that keeps decoded images, where they take at most a quarter of the memory budget.
    """
    split_seed: NonNegativeInt = 0
    """Draws which images each split has; and what `shifts` draw."""
    select_seed: NonNegativeInt | None = None
    """Draws *select* anew from what *fit* and *tune* leave; these, and so the zoo, stay as
    `split_seed` has them."""

    @model_validator(mode="after")
    def _per_channel(self) -> DataConfig:
        check_per_channel(self.channels, mean=self.mean, std=self.std)
        return self


def check_per_channel(channels: int, **given: Sequence[float]) -> None:
    """ValueError unless each of `given` has one number, or one for each channel."""
    for name, values in given.items():
        if len(values) not in (1, channels):
            raise ValueError(
                f"`{name}` has {len(values)} numbers; wanted 1, or one for each of the "
                f"{channels} channels"
            )


SettingsT = TypeVar("SettingsT", bound=Settings)


@dataclass(frozen=True)
class ConfigTree:
    """A config file with overrides on top, not yet checked against a schema.

    `given` maps a key to the override that set it, and `made` each part of such a key that the file
    does not have; `problems` says which overrides cannot be read.
    """

    file: Path
    tree: DictConfig
    given: dict[str, str]
    problems: tuple[str, ...]
    made: dict[str, str] = field(default_factory=dict)

    def where(self, key: str) -> str:
        """What a value comes from: an override, or the file."""
        for name, override in (*reversed(self.given.items()), *reversed(self.made.items())):
            if f"{key}.".startswith(f"{name}."):
                return f"override {override!r}"
        return str(self.file)

    def with_values(self, values: Mapping[str, Any], *, without: Sequence[str] = ()) -> ConfigTree:
        """A copy with these values at dotted keys, and `without` some of its own keys."""
        tree = copy.deepcopy(self.tree)
        for key in without:
            tree.pop(key, None)
        for key, value in values.items():
            OmegaConf.update(tree, key, value, merge=False, force_add=True)
        return replace(self, tree=tree)

    def check(self, schema: type[SettingsT]) -> tuple[SettingsT | None, dict[str, str]]:
        """The checked config, or None, and what is wrong by key ("" for the whole)."""
        broken: dict[str, str] = {}
        data = _plain(self.tree, (), broken)
        try:
            return schema.model_validate(data), broken
        except ValidationError as error:
            found = explain(error, data)
        later = {
            key: text
            for key, text in found.items()
            if not any(f"{key}.".startswith(f"{known}.") for known in broken)
        }
        return None, broken | later


def load_config(path: str | Path, overrides: Sequence[str], schema: type[SettingsT]) -> SettingsT:
    """The checked config at `path` with `key=value` overrides (OmegaConf dot lists) on top.

    An override replaces what the file has for the key, also where that is a mapping.

    Raises InputError with every problem found: file, key, what was found and what is allowed.
    """
    return checked(read_config(path, overrides), schema)


def read_config(path: str | Path, overrides: Sequence[str]) -> ConfigTree:
    """The config at `path` with the overrides on top; InputError for what is not YAML."""
    file = Path(path)
    tree = _read_yaml(file)
    problems: list[str] = []
    given: dict[str, str] = {}
    made: dict[str, str] = {}
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key.strip("."):
            problems.append(f"override {override!r}: wanted key=value")
            continue
        parts = key.split(".")
        above = [".".join(parts[:depth]) for depth in range(1, len(parts))]
        try:
            new = [part for part in above if _is_absent(tree, part)]
            value = OmegaConf.select(OmegaConf.from_dotlist([override]), key)
            OmegaConf.update(tree, key, value, merge=False, force_add=True)
        except (OmegaConfBaseException, YAMLError, ValueError, TypeError, AttributeError) as error:
            problems.append(f"override {override!r}: {_one_line(error)}")
        else:
            given[key] = override
            made |= dict.fromkeys(new, override)
    return ConfigTree(file, tree, given, tuple(problems), made)


def _is_absent(tree: DictConfig, key: str) -> bool:
    return OmegaConf.select(tree, key, throw_on_resolution_failure=False) is None


def checked(read: ConfigTree, schema: type[SettingsT]) -> SettingsT:
    """The config as `schema` has it; InputError with every problem."""
    config, found = read.check(schema)
    problems = [*read.problems]
    for key, text in found.items():
        problems.append(f"{read.where(key)}: {key}: {text}" if key else f"{read.file}: {text}")
    if config is None or problems:
        raise InputError("\n".join(problems))
    return config


def _read_yaml(file: Path) -> DictConfig:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        folder = file.parent if file.parent.is_dir() else Path()
        known = sorted(str(other) for other in folder.glob("*.y*ml"))
        raise InputError(f"{file}: no such config file{nearest(file, known)}") from error
    except IsADirectoryError as error:
        known = sorted(str(other) for other in file.glob("*.y*ml"))
        raise InputError(f"{file}: is a folder, wanted a YAML file{nearest('', known)}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: is not a text file in UTF-8 ({error.reason})") from error
    try:
        root = compose(text, Loader=SafeLoader)
        if root is not None and not isinstance(root, MappingNode):
            raise InputError(f"{file}: wanted a mapping of `key: value` lines, found a {root.id}")
        tree = OmegaConf.load(io.StringIO(text))
    except MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(f"{file}{place}: is not YAML: {error.problem}") from error
    except (YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{file}: is not YAML: {_one_line(error)}") from error
    assert isinstance(tree, DictConfig)
    return tree


def _plain(node: DictConfig | ListConfig, at: tuple[str, ...], broken: dict[str, str]) -> Any:
    """`node` as dicts and lists, interpolations resolved; those that fail go to `broken`."""

    def child(key: Any) -> Any:
        path = (*at, str(key))
        try:
            value = node[key]
            if isinstance(value, DictConfig | ListConfig):
                return _plain(value, path, broken)
        except (OmegaConfBaseException, RecursionError) as error:
            broken[".".join(path)] = _one_line(error)
            return None
        return value

    if isinstance(node, ListConfig):
        return [child(index) for index in range(len(node))]
    return {key: child(key) for key in node}


def explain(error: ValidationError, data: Any) -> dict[str, str]:
    """Key → what is wrong with it, in the words of a config; alternatives are joined by 'or'."""
    texts: dict[str, list[str]] = {}
    for one in error.errors(include_url=False):
        key = _key_in(one["loc"], data)
        context = one.get("ctx", {})
        if one["type"] == "union_tag_invalid":
            key = f"{key}.{context['discriminator'].strip(chr(39))}"
            text = _choice(context["tag"], context["expected_tags"])
        elif one["type"] == "union_tag_not_found":
            key = f"{key}.{context['discriminator'].strip(chr(39))}"
            text = "missing; this key is required"
        elif one["type"] in ("missing", _UNKNOWN_KEY):
            text = one["msg"].replace("Field required", "missing; this key is required")
        elif one["type"].startswith("byte_size"):
            text = f"found {one['input']!r}; wanted bytes, such as 4GiB"
        elif "expected" in context:
            text = _choice(one["input"], context["expected"])
        else:
            text = _sentence(one["msg"], one["input"])
        texts.setdefault(key, [])
        if text not in texts[key]:
            texts[key].append(text)
    # Of a union's branches, one with a near name is the one that was meant.
    meant = {key: [text for text in many if "did you mean" in text] for key, many in texts.items()}
    return {key: ", or ".join(meant[key] or many) for key, many in texts.items()}


def _key_in(location: tuple[int | str, ...], data: Any) -> str:
    """The dotted key, without the parts that name a branch of a union and so are not in `data`."""
    parts = []
    for index, part in enumerate(location):
        inside = range(len(data)) if isinstance(data, list) else data
        if isinstance(data, Mapping | list) and part in inside:
            data = data[part]  # type: ignore[index]
        elif not isinstance(data, Mapping) or index + 1 < len(location):
            continue
        parts.append(str(part))
    return ".".join(parts)


def _choice(found: Any, expected: str) -> str:
    names = re.findall(r"'([^']*)'", expected)
    close = difflib.get_close_matches(str(found), names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"found {found!r}; wanted {expected}{hint}"


def _sentence(message: str, found: Any) -> str:
    message = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    shown = "" if isinstance(found, Mapping) else f"found {_short(found)}"
    if message.startswith("Input should be "):
        wanted = message.removeprefix("Input should be ")
        wanted = re.sub(r"^(?=less|greater)", "a number ", wanted)
        wanted = f"wanted {wanted}"
        return f"{shown}; {wanted}" if shown else f"found a mapping; {wanted}"
    return f"{message} ({shown})" if shown and _short(found) not in message else message


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split("\n    full_key:")[0].split())
