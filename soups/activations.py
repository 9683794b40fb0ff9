"""What a model's activations take in memory in a forward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kernels.dispatch import DispatchMode


@torch.inference_mode()
def forward_bytes(model: nn.Module, images: Tensor) -> int:
    """The most bytes of activations that are alive at once in one forward pass, images included."""
    with _Alive() as alive:
        model(images)
    return alive.peak + images.nbytes


class _Alive(DispatchMode):
    """Counts the storages that operations make while there are tensors that use them."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        function: Callable,
        types: Any,
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = {_storage(t) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and _storage(tensor) not in self._known | given:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._known.add(storage._cdata)
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, storage: int, nbytes: int) -> None:
        self._known.discard(storage)
        self._now -= nbytes


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
