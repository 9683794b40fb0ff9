"""Shows tensors to what measures them, in blocks that depend on nothing but their shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from merge.method import Method, MethodSettings, Reach
from merge.part import Part

# Elements that are shown at a time on a CPU (a histogram of them costs little, and they stay in
# the cache), and elsewhere.
BLOCK = 1 << 17
DEVICE_BLOCK = 1 << 22

See = Callable[[int, Tensor, Tensor], None]
"""(flat place of the first element, the base's block, the model's block)"""


@runtime_checkable
class Measure(Protocol):
    """What a method measures of a model: see `Method`."""

    @property
    def passes(self) -> tuple[See, ...]:
        """What is to be shown every block, in order, one after the other."""
        ...

    def result(self) -> Any:
        """What was measured; to be asked after all passes."""
        ...


def new_measure(
    method: Method, settings: Sequence[MethodSettings], model: int, *, numel: int, part: Part
) -> Measure:
    """What measures the tensors of one model, `numel` elements in all."""
    place = {"part": part, "model": model} if method.takes_part else {}
    values = {name: getattr(settings[model], name) for name in method.settings.model_fields}
    return method.load(method.measure or "")(numel=numel, **values, **place)


def row_numel(shape: Sequence[int]) -> int:
    """Elements of one row, along the first axis; all of a tensor of fewer than two axes."""
    return max(math.prod(shape if len(shape) < 2 else shape[1:]), 1)


def block_numel(shape: Sequence[int], acts_on: Reach, device: torch.device) -> int:
    """Elements of one block: of whole rows where the method acts on those."""
    block = BLOCK if device.type == "cpu" else DEVICE_BLOCK
    row = row_numel(shape) if acts_on == "rows" else 1
    return max(block // row, 1) * row


def show(
    see: See,
    base: Shaped[Tensor, ...],
    tensor: Shaped[Tensor, ...],
    shape: Sequence[int],
    acts_on: Reach,
    *,
    dtype: torch.dtype,
    start: int = 0,
) -> None:
    """Show the tensor of this shape, or the flat part of it from `start` on, block by block.

    A block has the `dtype`; it is flat, or of whole rows where the method acts on those. Sums over
    it have the same bits however a tensor is cut, if each part starts at a multiple of a block.
    """
    old, new = base.reshape(-1), tensor.reshape(-1)
    step = block_numel(shape, acts_on, tensor.device)
    for place in range(0, new.numel(), step):
        part = slice(place, place + step)
        see(start + place, *(shaped(x[part].to(dtype), shape, acts_on) for x in (old, new)))


def shaped(flat: Float[Tensor, " n"], shape: Sequence[int], acts_on: Reach) -> Float[Tensor, ...]:
    """Flat elements of a tensor of this shape as the method takes them: flat, or as whole rows."""
    if acts_on != "rows" or len(shape) == 1:
        return flat
    return flat.view(flat.numel() // row_numel(shape), *shape[1:]) if shape else flat.view(())
