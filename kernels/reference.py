"""Each operation in plain torch: the meaning that faster ones are tested against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Segment(NamedTuple):
    """The flat weights [start, stop), which belong to one group."""

    start: int
    stop: int
    group: int


def mix(
    anchor: Float[Tensor, " weights"],
    deltas: Float[Tensor, "rows weights"],
    coefficients: Float[Tensor, "rows groups"],
    segments: Sequence[Segment],
    *,
    out: Float[Tensor, " weights"],
) -> Float[Tensor, " weights"]:
    """`out = anchor + Σ_r coefficients[r, group] · deltas[r]`, segment by segment.

    `out` may be `anchor` itself. Weights outside of all segments are left as they are.
    """
    for start, stop, group in segments:
        torch.addmv(
            anchor[start:stop],
            deltas[:, start:stop].t(),
            coefficients[:, group],
            out=out[start:stop],
        )
    return out


def delta_dot(
    deltas: Float[Tensor, "rows weights"], gradient: Float[Tensor, " weights"]
) -> Float[Tensor, " rows"]:
    """`Σ_w deltas[r, w] · gradient[w]`: the gradient in the coefficients of one segment."""
    return deltas @ gradient


def row_norms(
    deltas: Float[Tensor, "rows weights"], segments: Sequence[Segment], groups: int
) -> Float[Tensor, "rows groups"]:
    """The Euclidean length of each row in each group; 0 where a group has no weights."""
    squares = torch.zeros(len(deltas), groups, device=deltas.device)
    for start, stop, group in segments:
        squares[:, group] += torch.linalg.vector_norm(deltas[:, start:stop], dim=1) ** 2
    return squares.sqrt()
