"""What `python -m merge adapters` is told; imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from inputs.config import Settings

__all__ = ["AdapterMergeConfig"]


class AdapterParameters(Settings):
    """The factor on an adapter's change."""

    weight: float = Field(default=1.0, allow_inf_nan=False)


class AdapterEntry(Settings):
    """An adapter: the folder that PEFT has written."""

    model: str
    parameters: AdapterParameters = AdapterParameters()


class AdapterMergeConfig(Settings):
    """LoRA adapters to merge into one.

    `merge_method` is `cat`, `linear` or `svd`, by the factors alone, or a merge method on
    differences to a base, with its `parameters`. `rank` is that of the result.
    """

    merge_method: str
    models: list[AdapterEntry] = Field(min_length=1)
    parameters: dict[str, Any] = {}
    rank: PositiveInt | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    seed: NonNegativeInt = 0
