"""What a build of a store is told; imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, TypeAdapter, ValidationError, model_validator

from fleet.errors import FleetError
from inputs.config import ByteSize, DataConfig, ModelConfig, Settings
from inputs.zoo_files import RECORD_FILE, SUFFIXES, holds_checkpoint

Level = Literal["general", "domain", "task"]
EncodingName = Literal["plain", "changed", "low_rank", "sparse", "int8", "int4", "sign", "emr"]
Fraction = Annotated[float, Field(ge=0, le=1)]


class AccuracyConfig(Settings):
    """How much accuracy a variant may lose."""

    lost: Fraction = 0.005
    """The most accuracy that a variant may lose, as a fraction: 0.005 is half a point."""
    split: Literal["fit", "tune", "select"] = "select"
    """The images that it is measured on."""


class DomainConfig(Settings):
    """The variants of a domain, and what is taken for their mean."""

    variants: list[str]
    """Their names."""
    checkpoint: Path | None = None
    """A checkpoint (a soup, say) that is taken for the domain instead of their mean."""


class HowToStore(Settings):
    """How closely tensors are kept: by one of `tolerance`, `exact` and `accuracy`."""

    tolerance: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The largest ‖ŵ − w‖ of each tensor, relative to ‖w − base‖."""
    exact: bool = False
    """Keep every bit."""
    accuracy: AccuracyConfig | None = None
    """Take the widest tolerance that keeps the accuracy; measured on `data`."""
    encodings: list[EncodingName] | None = None
    """Those that may be taken, and `plain`; without it all."""
    memory_budget: ByteSize = ByteSize(1 << 30)
    """Bounds the bytes of the tensors that are held at a time."""
    leave_out: list[Level] = []
    """Levels to do without, to see what each contributes: without `general` tensors that equal the
    base's are stored too, without `domain` there are no nodes, without `task` every changed tensor
    is plain."""

    @model_validator(mode="after")
    def _one_measure(self) -> HowToStore:
        given = [self.tolerance is not None, self.exact, self.accuracy is not None]
        if sum(given) != 1:
            raise ValueError(
                "give one of `tolerance` (a relative error), `exact: true` and `accuracy` "
                f"({{lost: 0.005}}), found {sum(given)} of them"
            )
        return self


class BuildConfig(HowToStore):
    """A base and its variants, to be put into one store."""

    base: str
    """The checkpoint that the variants were fine-tuned from."""
    variants: Path | list[Path] | dict[str, Path]
    """A folder of checkpoints and folders of adapters, LoRA or bottlenecks (one that is called
    `base` is none), a list of paths, or names with paths."""
    domains: Literal["auto", "none"] | PositiveInt | dict[str, list[str] | DomainConfig] = "auto"
    """`auto` finds a tree of them, a number cuts it into so many, names with variants give them,
    `none` has none."""
    model: ModelConfig | None = None
    """What the checkpoints are of; kept with the base for those who serve it."""
    data: DataConfig | None = None
    """Images to measure accuracies on; their size and normalisation are kept with the base."""

    @model_validator(mode="after")
    def _data_for_accuracy(self) -> BuildConfig:
        if self.accuracy is not None and (self.model is None or self.data is None):
            raise ValueError("`accuracy` is measured on images: give `model` and `data` too")
        return self

    def paths(self) -> dict[str, Path]:
        """The variants by name, sorted where a folder is given; FleetError for none, or two."""
        if isinstance(self.variants, dict):
            return dict(self.variants)
        found = self.variants
        if isinstance(found, Path):
            if not found.is_dir():
                raise FleetError(f"variants: there is no folder {found}; give one of checkpoints")
            same = Path(self.base).resolve()
            found = [entry for entry in sorted(found.iterdir()) if _is_variant(entry, same)]
        if not found:
            raise FleetError(
                f"variants: {self.variants} holds no checkpoint ({', '.join(sorted(SUFFIXES))}, "
                "or folders that hold one); put the fine-tuned models there"
            )
        named: dict[str, Path] = {}
        for path in found:
            name = path.stem if path.suffix in SUFFIXES else path.name
            if name in named:
                raise FleetError(
                    f"variants: {named[name]} and {path} would both be called {name!r}; name them "
                    "(variants: {name: path})"
                )
            named[name] = path
        return named


def zoo_config(folder: Path, **settings: Any) -> BuildConfig:
    """The build of a zoo: its `base`, every other checkpoint, and what its record says of them.

    `settings` replace or add to that; FleetError where there is no base.
    """
    if not folder.is_dir():
        raise FleetError(f"{folder}: there is no such folder; give a zoo, a folder of checkpoints")
    bases = [entry for entry in sorted(folder.iterdir()) if entry.stem == "base"]
    if not bases and "base" not in settings:
        raise FleetError(
            f"{folder}: has no base (base.safetensors); say what its checkpoints were fine-tuned "
            "from, with a config (base: …, variants: …)"
        )
    found: dict[str, Any] = {"variants": folder, **_recorded(folder / RECORD_FILE)}
    if bases:
        found["base"] = str(bases[0])
    return BuildConfig.model_validate({**found, **settings})


def _recorded(file: Path) -> dict[str, Any]:
    """Model and data of a zoo that was made here; nothing of another."""
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_bytes())
        images = record["images"]
        data = {**record["data"], "mean": images["mean"], "std": images["std"]}
        model = {key: value for key, value in record["model"].items() if key != "code"}
        return {
            "model": TypeAdapter(ModelConfig).validate_python(model),
            "data": DataConfig.model_validate(data),
        }
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise FleetError(
            f"{file}: is not the record of a zoo ({type(error).__name__}: {error}); put it aside, "
            "or build with a config (base: …, variants: …)"
        ) from error


def _is_variant(entry: Path, base: Path) -> bool:
    return entry.stem != "base" and entry.resolve() != base and holds_checkpoint(entry)
