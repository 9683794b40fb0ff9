"""Linear layers of segments of rows: the kernel of `segmented_low_rank`, once, with biases."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.cpu import segmented
from kernels.segmented import Run

from .segmented_low_rank import launch


def segmented_linear(
    x: Tensor,
    segments: Sequence[Run],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """`out[rows of s] = x · weights[s]ᵀ + biases[s]`, 0 beyond a width; float64 one by one."""
    if x.dtype == torch.float64:
        return segmented.segmented_linear(x, segments, weights, biases, out=out)
    y = segmented.empty_for(x, segments, weights) if out is None else out
    launch(x, y, segments, weights, [1.0] * len(weights), biases)
    return y
