"""What is written in place while models run: noticed, and undone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Saved:
    """Tensors as they are now, in case that something writes into them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._saved = [(tensor, tensor.detach().clone()) for tensor in tensors]

    @torch.no_grad()
    def restore(self) -> None:
        """Undo what was written. (Norms do not count up the versions of what they write.)"""
        for tensor, copy in self._saved:
            if not same(tensor, copy):
                tensor.copy_(copy)


def versions(tensors: Sequence[Tensor]) -> int:
    """A number that grows with every change in place of one of them."""
    return sum([tensor._version for tensor in tensors])


def same(one: Tensor, other: Tensor) -> bool:
    """Whether all values are equal, NaN to NaN."""
    if torch.equal(one, other):
        return True
    return bool(torch.isclose(one, other, rtol=0, atol=0, equal_nan=True).all())
