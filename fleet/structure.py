"""Tensors inside of tuples, dicts and dataclasses: taken out, and put back."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fleet.errors import FleetError

PLAIN = (bool, int, float, complex, str, bytes, type(None), Enum, torch.dtype, torch.device)
Rebuild = Callable[[Sequence[Tensor]], Any]


def take_apart(value: Any) -> tuple[list[Tensor], Rebuild]:
    """The tensors in `value`, and the function that puts others in their places.

    Knows what torch's pytree knows (tuples, lists, dicts, the outputs of transformers) and
    dataclasses. Raises FleetError for any other object, since it may hold tensors unseen.
    """
    if isinstance(value, Tensor):
        return [value], operator.itemgetter(0)
    leaves, spec = pytree.tree_flatten(value)
    tensors: list[Tensor] = []
    fillers = [_filler(leaf, tensors) for leaf in leaves]

    def rebuild(others: Sequence[Tensor]) -> Any:
        stream = iter(others)
        return pytree.tree_unflatten([fill(stream) for fill in fillers], spec)

    return tensors, rebuild


def _filler(leaf: Any, tensors: list[Tensor]) -> Callable[[Iterator[Tensor]], Any]:
    if isinstance(leaf, Tensor):
        tensors.append(leaf)
        return next
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        fields = [field.name for field in dataclasses.fields(leaf) if field.init]
        inner, rebuild = take_apart({name: getattr(leaf, name) for name in fields})
        tensors.extend(inner)
        count = len(inner)
        return lambda stream: dataclasses.replace(
            leaf, **rebuild([next(stream) for _ in range(count)])
        )
    if isinstance(leaf, PLAIN):
        return lambda stream: leaf
    raise FleetError(
        f"the model returns a {type(leaf).__name__}, in which tensors cannot be found; wanted "
        "tensors in tuples, lists, dicts or dataclasses"
    )
