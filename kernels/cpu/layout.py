"""The model axis: how many models there are, and where it may be merged into other axes."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor


def models_of(*operands: Tensor | None) -> int:
    """The number of models: the longest first axis."""
    return max(len(operand) for operand in operands if operand is not None)


@overload
def each(operand: Tensor, models: int) -> tuple[Tensor, ...]: ...
@overload
def each(operand: None, models: int) -> tuple[None, ...]: ...
def each(operand: Tensor | None, models: int) -> tuple[Tensor | None, ...]:
    """One slice per model; a shared operand is every model's."""
    if operand is None:
        return (None,) * models
    return operand.unbind(0) if len(operand) == models else operand.unbind(0) * models


def expanded(operand: Tensor, models: int) -> Tensor:
    """The operand with a model axis of full length, without a copy."""
    return operand if len(operand) == models else operand.expand(models, *operand.shape[1:])


def beside(operand: Tensor, dim: int, axis: int) -> Tensor:
    """[models, n] as the operand's `axis` of a tensor with `dim` axes, ready to broadcast."""
    shape = [1] * dim
    shape[0], shape[axis] = operand.shape
    return operand.reshape(shape)


def plus(y: Tensor, bias: Tensor | None, axis: int) -> Tensor:
    """`y` with each model's bias added along `axis`."""
    return y if bias is None else y + beside(bias, y.dim(), axis)


def unfolded(y: Tensor, axis: int, models: int) -> Tensor:
    """A result whose `axis` holds models and something else, with the model axis in front.

    Nothing else refers to its memory, so autograd need not know that it is a view: to write into
    one costs several copies in the backward pass.
    """
    if models > 1 and axis > 0:
        return y.unflatten(axis, (models, -1)).transpose(0, axis)
    rows = (y.shape[0],) if axis else (y.shape[0] // models,)
    return torch.ops.aten._unsafe_view(y, (models, *rows, *y.shape[1:]))
