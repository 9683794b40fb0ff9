"""Tensors inside of tuples, dicts and dataclasses: taken out, and put back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fleet.errors import FleetError

PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    Enum,
    torch.dtype,
    torch.device,
    torch.Size,
)


@dataclass(frozen=True)
class Rebuild:
    """Puts tensors where others were taken out; `plain` is all that was there beside them."""

    plain: tuple[Any, ...]
    _spec: pytree.TreeSpec | None
    _fillers: Sequence[Callable[[Iterator[Tensor]], Any]]

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        if self._spec is None:
            return tensors[0]
        stream = iter(tensors)
        return pytree.tree_unflatten([fill(stream) for fill in self._fillers], self._spec)


def take_apart(value: Any) -> tuple[list[Tensor], Rebuild]:
    """The tensors in `value`, and the function that puts others in their places.

    Knows what torch's pytree knows (tuples, lists, dicts, the outputs of transformers) and
    dataclasses. Raises FleetError for any other object, since it may hold tensors unseen.
    """
    if isinstance(value, Tensor):
        return [value], Rebuild((), None, ())
    leaves, spec = pytree.tree_flatten(value)
    tensors: list[Tensor] = []
    plain: list[Any] = [spec]
    fillers = [_filler(leaf, tensors, plain) for leaf in leaves]
    return tensors, Rebuild(tuple(plain), spec, fillers)


def _filler(
    leaf: Any, tensors: list[Tensor], plain: list[Any]
) -> Callable[[Iterator[Tensor]], Any]:
    if isinstance(leaf, Tensor):
        tensors.append(leaf)
        return next
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        fields = [field.name for field in dataclasses.fields(leaf) if field.init]
        inner, rebuild = take_apart({name: getattr(leaf, name) for name in fields})
        tensors.extend(inner)
        plain.extend(rebuild.plain)
        count = len(inner)
        return lambda stream: dataclasses.replace(
            leaf, **rebuild([next(stream) for _ in range(count)])
        )
    if isinstance(leaf, PLAIN):
        plain.append(leaf)
        return lambda stream: leaf
    raise FleetError(
        f"the model returns a {type(leaf).__name__}, in which tensors cannot be found; wanted "
        "tensors in tuples, lists, dicts or dataclasses"
    )


def join(results: Sequence[Sequence[Tensor]], rebuilds: Sequence[Rebuild]) -> list[Tensor]:
    """The outputs of all models; FleetError where they are not alike."""
    for index, (mine, rebuild) in enumerate(zip(results, rebuilds, strict=True)):
        for one, other in zip(rebuilds[0].plain, rebuild.plain, strict=False):
            if type(one) is not type(other) or repr(one) != repr(other):
                raise FleetError(
                    f"the model returns {one!r} for model 0 and {other!r} for model {index}; "
                    "return it as a tensor"
                )
        for one, other in zip(results[0], mine, strict=False):
            if one.shape != other.shape or one.dtype != other.dtype:
                raise FleetError(
                    f"an output is {one.dtype} {list(one.shape)} of model 0 and {other.dtype} "
                    f"{list(other.shape)} of model {index}, which make no single tensor; return "
                    "outputs of one shape (padded or masked), or call the models one by one"
                )
    return [torch.stack(of_models) for of_models in zip(*results, strict=True)]
