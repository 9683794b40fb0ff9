"""Which part of which tensor is being merged, and the random numbers that belong to it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

DRAWS_PER_STEP = 2  # numbers of 32 bits in one step of the generator


@dataclass(frozen=True)
class Part:
    """The flat elements from `start` on of the tensor `name`.

    Random numbers depend on the seed, the tensor's name, the model's place (or its name, where
    `models` has names) and the element's place alone: not on how the tensor is sliced, or where.
    `depth` is where the tensor stands among the layers, from 0 to 1.
    """

    name: str = ""
    start: int = 0
    seed: int = 0
    models: Sequence[str] = ()
    depth: float = 0.0

    def keep(self, model: int, probability: float, like: Float[Tensor, ...]) -> Bool[Tensor, ...]:
        """A mask of the shape of `like`, each element true with this probability."""
        limit = round(probability * 2**32)
        if limit >= 2**32:
            return torch.ones(like.shape, dtype=torch.bool, device=like.device)
        mask = torch.from_numpy(self._bits(model, like.numel()) < np.uint32(limit))
        return mask.view(like.shape).to(like.device)

    def uniform(self, model: int, like: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """Numbers in [0, 1) of the shape and dtype of `like`, in steps of 2⁻²⁴."""
        numbers = (self._bits(model, like.numel()) >> np.uint32(8)).astype(np.float32) * 2.0**-24
        return torch.from_numpy(numbers).view(like.shape).to(like.device, like.dtype)

    def _bits(self, model: int, count: int) -> np.ndarray:
        """`count` random numbers of 32 bits for a model's elements, from `start` on."""
        who = self.models[model] if self.models else str(model)
        digest = hashlib.sha256(f"{self.seed}/{self.name}/{who}".encode()).digest()
        generator = np.random.PCG64DXSM(int.from_bytes(digest, "little"))
        skip = self.start % DRAWS_PER_STEP
        generator.advance(self.start // DRAWS_PER_STEP)
        steps = -(-(skip + count) // DRAWS_PER_STEP)
        return generator.random_raw(steps).view(np.uint32)[skip : skip + count]
