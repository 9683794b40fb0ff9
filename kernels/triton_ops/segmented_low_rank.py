"""Products of segments of rows with weights of their own, of any ranks and widths, in one launch.

A program multiplies a block of one segment's rows with a block of its weights, which it finds by
their address: the weights of a batch's tenants lie where they were loaded, and are not gathered.
A low-rank product is two launches, down and up.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cpu import segmented
from kernels.segmented import Run

from .launch import HALVES, kernel, launched_on

# Of each segment: the address of its weights, their sizes and strides, the bias's address and size.
FIELDS = 7


@kernel
@no_type_check
def segment_kernel(
    x,
    y,
    tiles,
    weights,
    scales,
    x_row,
    x_in,
    y_row,
    y_out,
    ADD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    tiles += tl.program_id(0) * 3
    segment = tl.load(tiles)
    row = tl.load(tiles + 1) + tl.arange(0, BLOCK_ROWS)
    stop = tl.load(tiles + 2)
    weights += segment * FIELDS
    outs, ins = tl.load(weights + 1), tl.load(weights + 2)
    weight_out, weight_in = tl.load(weights + 3), tl.load(weights + 4)
    out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    address = tl.load(weights).to(tl.pointer_type(x.dtype.element_ty))
    address += out[None, :].to(tl.int64) * weight_out
    inside = (row < stop)[:, None] & (out < outs)[None, :]
    if tl.program_id(1) * BLOCK_OUT < outs:
        values_of_row = x + row[:, None].to(tl.int64) * x_row
        total = tl.zeros([BLOCK_ROWS, BLOCK_OUT], tl.float32)
        for start in range(0, ins, BLOCK_IN):
            column = start + tl.arange(0, BLOCK_IN)
            values = tl.load(
                values_of_row + column[None, :] * x_in,
                mask=(row < stop)[:, None] & (column < ins)[None, :],
                other=0.0,
            )
            block = tl.load(
                address + column[:, None] * weight_in,
                mask=(column < ins)[:, None] & (out < outs)[None, :],
                other=0.0,
            )
            total = tl.dot(values, block, total, input_precision=PRECISION)
        total *= tl.load(scales + segment)
        place = y + row[:, None].to(tl.int64) * y_row + out[None, :] * y_out
        if HAS_BIAS:
            bias = tl.load(weights + 5).to(tl.pointer_type(x.dtype.element_ty))
            known = out < tl.load(weights + 6)
            total += tl.load(bias + out, mask=known, other=0.0).to(tl.float32)[None, :]
        if ADD:
            total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
        tl.store(place, total.to(y.dtype.element_ty), mask=inside)


@lru_cache(maxsize=256)
def tiles_of(segments: tuple[Run, ...], block: int, device: torch.device) -> Tensor:
    """[tiles, 3]: each block of rows as its segment, first row and the segment's end."""
    tiles = [
        (place, first, stop)
        for place, (start, stop) in enumerate(segments)
        for first in range(start, stop, block)
    ]
    return torch.tensor(tiles, dtype=torch.int64).reshape(-1, 3).to(device)


def launch(
    x: Tensor,
    y: Tensor,
    segments: Sequence[Run],
    weights: Sequence[Tensor],
    scales: Sequence[float],
    biases: Sequence[Tensor | None] | None = None,
    *,
    add: bool = False,
) -> None:
    """`y[rows of s, :widths[s]] (+)= scales[s] · x[rows of s] · weights[s]ᵀ + biases[s]`."""
    longest = max((stop - start for start, stop in segments), default=0)
    widest = max((len(weight) for weight in weights), default=0)
    if not longest or not widest:
        return
    block_rows = min(max(triton.next_power_of_2(longest), 16), 64)
    tiles = tiles_of(tuple((int(a), int(b)) for a, b in segments), block_rows, x.device)
    given = [None if bias is None else bias.contiguous() for bias in biases or ()]
    given = given or [None] * len(weights)
    described = [
        (weight.data_ptr(), *weight.shape, *weight.stride())
        + ((0, 0) if bias is None else (bias.data_ptr(), len(bias)))
        for weight, bias in zip(weights, given, strict=True)
    ]
    table = torch.tensor(described, dtype=torch.int64).to(x.device, non_blocking=True)
    factors = torch.tensor(scales, dtype=torch.float32).to(x.device, non_blocking=True)
    block_out = min(max(triton.next_power_of_2(widest), 16), 64)
    with launched_on(x):
        segment_kernel[(len(tiles), triton.cdiv(widest, block_out))](
            *(x, y, tiles, table, factors, *x.stride(), *y.stride()),
            ADD=add,
            HAS_BIAS=any(bias is not None for bias in given),
            PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
            FIELDS=FIELDS,
            BLOCK_ROWS=block_rows,
            BLOCK_OUT=block_out,
            BLOCK_IN=64 if x.dtype in HALVES else 32,
        )


def segmented_low_rank(
    x: Tensor,
    segments: Sequence[Run],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
    *,
    out: Tensor | None = None,
) -> Tensor:
    """`out[rows of s] += scales[s] · (x · downs[s]ᵀ) · ups[s]ᵀ`; float64 segment by segment."""
    if x.dtype == torch.float64:
        return segmented.segmented_low_rank(x, segments, downs, ups, scales, out=out)
    y = x.new_zeros(len(x), len(ups[0])) if out is None else out
    narrow = x.new_empty(len(x), max((len(down) for down in downs), default=0))
    launch(x, narrow, segments, downs, [1.0] * len(downs))
    launch(narrow, y, segments, ups, scales, add=True)
    return y
