"""The inputs of one call of a group."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fleet.errors import FleetError
from fleet.structure import PLAIN


@dataclass(frozen=True)
class Call:
    """Positional and keyword inputs in one list, `tensors` among them taken out."""

    leaves: Sequence[Any]
    spec: pytree.TreeSpec | None  # None: `leaves` are the positional inputs
    tensors: Sequence[Tensor]
    each: bool

    @classmethod
    def of(cls, args: tuple, kwargs: dict[str, Any], each: bool, models: int) -> Call:
        """FleetError where `each` input should have a leading model axis and one may not."""
        if not kwargs and all(isinstance(value, Tensor) for value in args):
            leaves, spec = args, None
        else:
            leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        for tensor in tensors if each else ():
            if tensor.dim() == 0 or len(tensor) != models:
                raise FleetError(
                    f"each=True: an input is {list(tensor.shape)}, wanted a leading axis of "
                    f"{models} models; stack one input per model"
                )
        for leaf in leaves if each else ():
            if not isinstance(leaf, (Tensor, *PLAIN)):
                raise FleetError(
                    f"each=True: an input is a {type(leaf).__name__}, in which tensors of single "
                    "models cannot be found; hand them in as tensors in tuples, lists or dicts"
                )
        return cls(leaves, spec, tensors, each)

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple, dict[str, Any]]:
        """The inputs, with other tensors in their places."""
        if self.spec is None:
            return tuple(tensors), {}
        stream = iter(tensors)
        leaves = [next(stream) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return pytree.tree_unflatten(leaves, self.spec)

    def signature(self) -> Hashable:
        """What a captured graph depends on; None where an input cannot be compared."""
        kinds = list(map(_kind, self.leaves))
        spec = None if self.spec is None else str(self.spec)
        return None if None in kinds else (self.each, spec, _autocast(), *kinds)


def _kind(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        if leaf.layout is not torch.strided:
            return None
        return tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device
    # repr() tells -0.0 from 0.0, the type 1 from True.
    return (type(leaf), repr(leaf)) if isinstance(leaf, PLAIN) else None


def _autocast() -> tuple:
    return tuple(
        (device, torch.get_autocast_dtype(device))
        for device in ("cpu", "cuda")
        if torch.is_autocast_enabled(device)
    )
