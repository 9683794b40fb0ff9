"""What `python -m merge adapters` is told; imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from inputs.config import Settings

__all__ = ["AdapterMergeConfig"]


class AdapterParameters(Settings):
    """The factor on an adapter's change."""

    weight: float = Field(default=1.0, allow_inf_nan=False)
    """1 is the adapter's change as it is."""


class AdapterEntry(Settings):
    """An adapter and how much it counts."""

    model: str
    """The folder that PEFT has written."""
    parameters: AdapterParameters = AdapterParameters()
    """How much it counts."""


class AdapterMergeConfig(Settings):
    """LoRA adapters to merge into one."""

    merge_method: str
    """`cat` (exact, of rank Σ r), `linear` (the same sum, of the least rank) or `svd` (cut to
    `rank`), by the factors alone; or a merge method on differences to a base."""
    models: list[AdapterEntry] = Field(min_length=1)
    """What is merged."""
    parameters: dict[str, Any] = {}
    """Settings of a merge method; `cat`, `linear` and `svd` have none."""
    rank: PositiveInt | None = None
    """The rank of every module of the result; without it the largest of the adapters' ranks, of
    `linear` as much as the sum needs. Not with `cat`."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """The dtype of the result."""
    seed: NonNegativeInt = 0
    """What methods with random numbers draw."""
