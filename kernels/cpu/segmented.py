"""Rows in segments, each with weights of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.segmented import Run


def segmented_low_rank(
    x: Tensor,
    segments: Sequence[Run],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
    *,
    out: Tensor | None = None,
) -> Tensor:
    """`out[segment s] += scales[s] · x · downs[s]ᵀ · ups[s]ᵀ`, segment by segment."""
    y = x.new_zeros(len(x), len(ups[0])) if out is None else out
    for (start, stop), down, up, scale in zip(segments, downs, ups, scales, strict=True):
        if start < stop and len(down):
            # Columns for rows: of few rows, the faster way round.
            narrow = torch.mm(down, x[start:stop].t())
            y[start:stop].addmm_(narrow.t(), up.t(), alpha=scale)
    return y


def segmented_linear(
    x: Tensor,
    segments: Sequence[Run],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """`out[segment s] = x · weights[s]ᵀ + biases[s]`, segment by segment; 0 beyond its width."""
    y = empty_for(x, segments, weights) if out is None else out
    given = biases or [None] * len(weights)
    for (start, stop), weight, bias in zip(segments, weights, given, strict=True):
        part = y[start:stop, : len(weight)]
        if bias is None:
            torch.mm(x[start:stop], weight.t(), out=part)
        else:
            torch.addmm(bias, x[start:stop], weight.t(), out=part)
    return y


def empty_for(x: Tensor, segments: Sequence[Run], weights: Sequence[Tensor]) -> Tensor:
    """Memory as wide as the widest, with zeros unless all of it will be written."""
    widest = max(len(weight) for weight in weights)
    covered = sum(stop - start for start, stop in segments) == len(x)
    whole = covered and all(len(weight) == widest for weight in weights)
    return x.new_empty(len(x), widest) if whole else x.new_zeros(len(x), widest)
