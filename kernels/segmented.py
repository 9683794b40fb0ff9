"""What the segmented operations take and refuse: rows in segments, each with weights of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from kernels.errors import KernelError

Run = tuple[int, int]


def check_low_rank(
    x: Tensor,
    segments: Sequence[Run],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
    out: Tensor | None,
) -> None:
    """KernelError unless x [rows, in], and for each segment down [r, in], up [out, r], a scale."""
    op = "segmented_low_rank"
    counts = {"segments": segments, "downs": downs, "ups": ups, "scales": scales}
    _check_counts(op, counts)
    _check_segments(op, x, segments)
    outs = len(ups[0]) if out is None and ups else None if out is None else out.shape[-1]
    if outs is None:
        raise KernelError(f"{op}: found no segments and no out; wanted one, for the width")
    if out is not None and out.shape != (len(x), outs):
        raise KernelError(
            f"{op}: found out {list(out.shape)} with x {list(x.shape)}; wanted as many rows"
        )
    for place, (down, up) in enumerate(zip(downs, ups, strict=True)):
        fits = down.dim() == up.dim() == 2 and down.shape[1] == x.shape[1]
        if not fits or up.shape != (outs, len(down)):
            raise KernelError(
                f"{op}: segment {place}: found down {list(down.shape)}, up {list(up.shape)}; "
                f"wanted [rank, {x.shape[1]}] and [{outs}, rank]"
            )
    _check_alike(op, x, [*downs, *ups, *([] if out is None else [out])])


def check_linear(
    x: Tensor,
    segments: Sequence[Run],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    out: Tensor | None,
) -> None:
    """KernelError unless x [rows, in], and for each segment weight [out, in], bias [out]."""
    op = "segmented_linear"
    counts = {"segments": segments, "weights": weights}
    _check_counts(op, counts if biases is None else {**counts, "biases": biases})
    _check_segments(op, x, segments)
    if not weights and out is None:
        raise KernelError(f"{op}: found no segments and no out; wanted one, for the width")
    widest = max((weight.shape[0] for weight in weights if weight.dim()), default=0)
    if out is not None and not (out.dim() == 2 and len(out) == len(x) and out.shape[1] >= widest):
        raise KernelError(
            f"{op}: found out {list(out.shape)}; wanted [{len(x)}, {widest}] or wider"
        )
    given = biases or [None] * len(weights)
    for place, (weight, bias) in enumerate(zip(weights, given, strict=True)):
        fits = weight.dim() == 2 and weight.shape[1] == x.shape[1]
        if not fits or (bias is not None and bias.shape != weight.shape[:1]):
            found = "none" if bias is None else list(bias.shape)
            raise KernelError(
                f"{op}: segment {place}: found weight {list(weight.shape)}, bias {found}; wanted "
                f"[out, {x.shape[1]}] and [out]"
            )
    others = [*weights, *(bias for bias in given if bias is not None)]
    _check_alike(op, x, others if out is None else [*others, out])


def _check_counts(op: str, operands: dict[str, Sequence]) -> None:
    if len({len(operand) for operand in operands.values()}) > 1:
        found = ", ".join(f"{len(operand)} {name}" for name, operand in operands.items())
        raise KernelError(f"{op}: found {found}; wanted one of each for every segment")


def _check_segments(op: str, x: Tensor, segments: Sequence[Run]) -> None:
    if x.dim() != 2:
        raise KernelError(f"{op}: found x {list(x.shape)}; wanted [rows, in]")
    edges = [edge for segment in segments for edge in segment]
    ascending = all(one <= other for one, other in pairwise(edges))
    if not ascending or (edges and not 0 <= edges[0] <= edges[-1] <= len(x)):
        raise KernelError(
            f"{op}: found segments {[tuple(s) for s in segments][:8]} of {len(x)} rows; wanted "
            "(start, stop) in order, without overlaps and within the rows"
        )


def _check_alike(op: str, x: Tensor, others: Iterable[Tensor]) -> None:
    for other in others:
        if other.dtype != x.dtype or other.device != x.device:
            raise KernelError(
                f"{op}: found x {x.dtype} on {x.device}, another operand {other.dtype} on "
                f"{other.device}; wanted one dtype on one device"
            )
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *others)):
        raise KernelError(f"{op}: has no gradient; call it under torch.no_grad()")
