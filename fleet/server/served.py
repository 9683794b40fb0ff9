"""Which model a store's variants are weights of, and what it takes; imports no torch by itself."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveFloat, PositiveInt, ValidationError, model_validator

from fleet.errors import FleetError
from fleet.server.limits import Limits
from inputs.config import (
    FactoryModel,
    ModelConfig,
    Settings,
    TimmModel,
    check_per_channel,
    explain,
)

if TYPE_CHECKING:
    from torch import nn

    from fleet.server.model_inputs import ModelInputs

__all__ = ["ServedData", "ServedModel", "build_served"]

_SAY = "say it with --model CONFIG.yaml (keys: model, data)"


class ServedData(Settings):
    """What the model sees: images of `size` and `channels`, `mean` and `std`; how many classes."""

    size: PositiveInt | None = None
    channels: Literal[1, 3] = 3
    mean: tuple[float, ...] = (0.5,)
    std: tuple[PositiveFloat, ...] = (0.5,)
    classes: PositiveInt

    @model_validator(mode="before")
    @classmethod
    def _count_names(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and isinstance(value.get("classes"), list | tuple):
            return {**value, "classes": len(value["classes"])}
        return value

    @model_validator(mode="after")
    def _per_channel(self) -> ServedData:
        check_per_channel(self.channels, mean=self.mean, std=self.std)
        return self


class ServedModel(Settings):
    """The architecture of the base and its inputs, as a store's base record describes them."""

    model: ModelConfig
    data: ServedData

    @classmethod
    def from_about(cls, about: Mapping[str, Any], where: str, timm: str | None) -> ServedModel:
        """From a store's base record; `timm` replaces the name of its model.

        Raises FleetError where the record does not say it, or names code to run: a store that
        comes from elsewhere runs none.
        """
        model = {"source": "timm", "name": timm} if timm else about.get("model")
        data = about.get("data")
        missing = [name for name, found in (("model", model), ("data", data)) if not found]
        if missing:
            raise FleetError(
                f"{where}: its base record does not say {' and '.join(missing)}; {_SAY}"
            )
        known = ServedData.model_fields
        if isinstance(data, Mapping):
            data = {key: value for key, value in data.items() if key in known}
        described = {"model": model, "data": data}
        try:
            served = cls.model_validate(described)
        except ValidationError as error:
            problems = "\n".join(
                f"{where}: base record: {key}: {text}"
                for key, text in explain(error, described).items()
            )
            raise FleetError(f"{problems}\n{_SAY}") from error
        if isinstance(served.model, FactoryModel):
            raise FleetError(
                f"{where}: its base is made by code, {served.model.factory!r}, which is not run "
                f"because a store names it; {_SAY}"
            )
        return served


def build_served(served: ServedModel, root: Path, limits: Limits) -> tuple[nn.Module, ModelInputs]:
    """The model, with any weights, and what it takes; relative paths start from `root`.

    Token ids if its forward has `input_ids`, images otherwise. Raises InputError as `build_model`
    does, and FleetError where the size of the images, or of the vocabulary, is not known.
    """
    from fleet.server.images import Preprocessing
    from fleet.server.model_inputs import ImageInputs, TokenInputs
    from inputs.models import build_model

    data = served.data
    model = build_model(
        served.model, classes=data.classes, channels=data.channels, root=root
    ).eval()
    if "input_ids" in inspect.signature(model.forward).parameters:
        return model, TokenInputs(*_vocabulary(model))
    size = data.size
    if size is None and isinstance(served.model, TimmModel):
        size = _published_size(model)
    if size is None:
        raise FleetError(f"the base's images: their size is not known (data.size); {_SAY}")
    preprocessing = Preprocessing(data.channels, size, data.mean, data.std, limits.max_pixels)
    return model, ImageInputs(preprocessing)


def _published_size(model: Any) -> int | None:
    size = getattr(model, "pretrained_cfg", {}).get("input_size")
    return None if size is None else int(size[-1])


def _vocabulary(model: Any) -> tuple[int, int, int]:
    """(ids, most tokens, token types) of a model with a config as transformers writes it."""
    config = getattr(model, "config", None)
    numbers = [
        getattr(config, name, None)
        for name in ("vocab_size", "max_position_embeddings", "type_vocab_size")
    ]
    if not isinstance(numbers[0], int) or not isinstance(numbers[1], int):
        raise FleetError(
            f"the base, {type(model).__name__}, takes token ids but does not say which: wanted "
            "model.config with vocab_size and max_position_embeddings, as in transformers"
        )
    return numbers[0], numbers[1], numbers[2] if isinstance(numbers[2], int) else 0
