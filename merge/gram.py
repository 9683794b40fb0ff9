"""Inner products of many tensors, added up slice by slice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

# Elements that are stacked at a time. Of a step, runs are summed in the tensors' own precision and
# added up in float64; what is less than a step is summed in float64.
STEP = 1 << 15
RUN = 1 << 10


def gram_matrix(
    of: Literal["tensors", "deltas"],
    base: Float[Tensor, ...] | None,
    tensors: Sequence[Float[Tensor, ...]],
) -> Float64[Tensor, "sources sources"]:
    """`⟨x_i, x_j⟩` of the flat tensors: of [base, *tensors], or of the deltas to the base.

    Without a base both are of the tensors. Those of a whole are the sum of those of its slices.
    """
    flat = [tensor.reshape(-1) for tensor in tensors]
    origin = None if base is None else base.reshape(-1)
    if origin is not None and of == "tensors":
        flat, origin = [origin, *flat], None
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat[0].device)
    for start in range(0, flat[0].numel(), STEP):
        stacked = torch.stack([row[start : start + STEP] for row in flat])
        if origin is not None:
            stacked -= origin[start : start + STEP]
        if stacked.shape[1] == STEP:
            runs = stacked.unflatten(1, (-1, RUN)).transpose(0, 1)
            total += (runs @ runs.mT).double().sum(0)
        else:
            rest = stacked.double()
            total += rest @ rest.mT
    return total
