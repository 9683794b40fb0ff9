"""The gradient in the coefficients: `[M, P] · [K, P]` by group, in a fixed order, without atomics.

Every program adds up the tiles of one part of one group, which shape alone decides; a second kernel
adds the parts of each group in order. So the bits are the same every time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kernels.segments import Segment
from kernels.storage import Rows

from .launch import kernel, launched_on
from .rows import (
    MATRIX_KINDS,
    MATRIX_TYPE,
    WIDE,
    Stored,
    load_codes,
    segments_or_all,
    stored,
    tile_length,
    tiles_of,
)

# Enough programs to fill the largest GPU several times.
PARTS = 1024


@kernel
@no_type_check
def single_kernel(
    codes,
    scales,
    gradient,
    tiles,
    parts,
    sums,
    weights,
    models,
    rows,
    limit,
    code_row,
    scale_row,
    scale_segment,
    gradient_model,
    ALIGN: tl.constexpr,
    GRADIENT_ALIGN: tl.constexpr,
    KIND: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    SUM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part, model = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    limit *= ALIGN
    code_row *= ALIGN
    weights *= GRADIENT_ALIGN
    gradient_model *= GRADIENT_ALIGN
    total = tl.zeros([ROWS, BLOCK], SUM)
    for index in range(tl.load(parts + part * 2), tl.load(parts + part * 2 + 1)):
        tile = tiles + index * 4
        start, stop, scale = tl.load(tile), tl.load(tile + 1), tl.load(tile + 3)
        base = start // BLOCK * BLOCK
        weight = base + tl.arange(0, BLOCK)
        slope = tl.load(
            gradient + model * gradient_model + weight, mask=weight < weights, other=0.0
        ).to(SUM)
        inside = (weight >= start) & (weight < stop)
        values = load_codes(codes + row * code_row, row < rows, base, limit, KIND, BLOCK).to(SUM)
        # Both: what lies beside the tile need not be finite.
        slope, values = tl.where(inside, slope, 0.0), tl.where(inside[None, :], values, 0.0)
        if HAS_SCALES:
            values *= tl.load(
                scales + row * scale_row + scale * scale_segment, mask=row < rows, other=0.0
            )
        total += values * slope[None, :]
    sums += (part * models + model) * rows + row
    tl.store(sums, tl.sum(total, axis=1)[:, None], mask=row < rows)


@kernel
@no_type_check
def matrix_kernel(
    codes,
    scales,
    gradient,
    tiles,
    parts,
    sums,
    weights,
    models,
    rows,
    limit,
    code_row,
    scale_row,
    scale_segment,
    gradient_model,
    ALIGN: tl.constexpr,
    GRADIENT_ALIGN: tl.constexpr,
    KIND: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    OPERAND: tl.constexpr,
    TERMS: tl.constexpr,
    ROWS: tl.constexpr,
    MODELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    model = (tl.program_id(2) * MODELS + tl.arange(0, MODELS)).to(tl.int64)[None, :]
    limit *= ALIGN
    code_row *= ALIGN
    weights *= GRADIENT_ALIGN
    gradient_model *= GRADIENT_ALIGN
    total = tl.zeros([ROWS, MODELS], tl.float32)
    for index in range(tl.load(parts + part * 2), tl.load(parts + part * 2 + 1)):
        tile = tiles + index * 4
        start, stop, scale = tl.load(tile), tl.load(tile + 1), tl.load(tile + 3)
        base = start // BLOCK * BLOCK
        weight = (base + tl.arange(0, BLOCK))[:, None]
        slope = tl.load(
            gradient + model * gradient_model + weight,
            mask=(weight < weights) & (model < models),
            other=0.0,
        ).to(tl.float32)
        inside = (weight >= start) & (weight < stop)
        values = load_codes(codes + row * code_row, row < rows, base, limit, KIND, BLOCK)
        # Both: what lies beside the tile need not be finite.
        slope = tl.where(inside, slope, 0.0)
        values = tl.where(tl.trans(inside), values, 0.0).to(OPERAND)
        product = tl.zeros([ROWS, MODELS], tl.float32)
        for _ in tl.static_range(TERMS):
            term = slope.to(OPERAND)
            product = tl.dot(values, term, product, input_precision="ieee")
            slope -= term.to(tl.float32)
        if HAS_SCALES:
            product *= tl.load(
                scales + row * scale_row + scale * scale_segment, mask=row < rows, other=0.0
            )
        total += product
    sums += (part * models + model) * rows + row
    tl.store(sums, total, mask=(row < rows) & (model < models))


@kernel
@no_type_check
def sum_kernel(
    sums, bounds, out, pairs, groups, SUM: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    group = tl.program_id(0).to(tl.int64)
    pair = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    last = tl.load(bounds + group + 1)
    total = tl.zeros([BLOCK], SUM)
    for first in range(tl.load(bounds + group), last, PARTS):
        part = first + tl.arange(0, PARTS)[:, None]
        total += tl.sum(
            tl.load(
                sums + part * pairs + pair[None, :],
                mask=(part < last) & (pair < pairs)[None, :],
                other=0.0,
            ),
            axis=0,
        )
    tl.store(out + pair * groups + group, total, mask=pair < pairs)


class Parts(NamedTuple):
    """Tiles sorted by group; [first, last) of each part; the parts [bounds[g], bounds[g + 1]) of
    group g."""

    tiles: Tensor
    parts: Tensor
    bounds: Tensor


@lru_cache(maxsize=64)
def parts_of(
    segments: tuple[Segment, ...],
    groups: int,
    scaled: tuple[Segment, ...],
    weights: int,
    length: int,
    device: torch.device,
) -> Parts:
    """About PARTS runs of tiles of one group each."""
    table = tiles_of(segments, groups, scaled, weights, length, torch.device("cpu")).table
    table = table[table[:, 2] >= 0]
    table = table[table[:, 2].sort(stable=True).indices]
    per_part = max(len(table) // PARTS, 1)
    firsts, lasts, bounds = [], [], [0]
    end = 0
    for count in torch.bincount(table[:, 2], minlength=groups).tolist():
        starts = range(end, end + count, per_part)
        end += count
        firsts += starts
        lasts += [min(start + per_part, end) for start in starts]
        bounds.append(len(firsts))
    parts = torch.tensor([firsts, lasts], dtype=torch.int64).t().contiguous()
    return Parts(table.to(device), parts.to(device), torch.tensor(bounds, device=device))


def launch(
    rows: Stored,
    gradient: Tensor,
    segments: tuple[Segment, ...],
    groups: int,
    operand: tl.dtype | None,
) -> Tensor:
    """`operand`: the type in which matrices are multiplied; None: one model after the other."""
    models, weights = gradient.shape
    total = torch.promote_types(gradient.dtype, torch.float32)
    # fp32 tiles are wide enough in bytes at half the length.
    length = tile_length(rows, 64 if operand == tl.float32 else 128)
    tiles, parts, bounds = parts_of(
        segments, groups, rows.segments, weights, length, gradient.device
    )
    sums = gradient.new_empty(len(parts), models, rows.ingredients, dtype=total)
    out = gradient.new_empty(models, rows.ingredients, groups, dtype=total)
    if out.numel() == 0:
        return out
    operands = (rows.codes, rows.scales, gradient, tiles, parts, sums)
    # Sizes and steps come in units of what divides them, so that a kernel knows of it.
    align = math.gcd(WIDE, weights, gradient.stride(0))
    sizes = (weights // align, models, rows.ingredients, rows.limit // rows.align)
    strides = (rows.codes.stride(0) // rows.align, *rows.scale_strides, gradient.stride(0) // align)
    kind = {"KIND": rows.kind, "HAS_SCALES": rows.scales is not None, "BLOCK": length}
    kind |= {"ALIGN": rows.align, "GRADIENT_ALIGN": align}
    exact = {"SUM": tl.float64 if total == torch.float64 else tl.float32}
    with launched_on(gradient):
        if len(parts) == 0:
            pass
        elif operand is None:
            high = min(triton.next_power_of_2(rows.ingredients), 32)
            grid = (len(parts), triton.cdiv(rows.ingredients, high), models)
            single_kernel[grid](*operands, *sizes, *strides, **kind, **exact, ROWS=high)
        else:
            high = min(max(triton.next_power_of_2(rows.ingredients), 16), 128)
            wide = min(max(triton.next_power_of_2(models), 16), 64)
            grid = (len(parts), triton.cdiv(rows.ingredients, high), triton.cdiv(models, wide))
            matrix_kernel[grid](
                *operands,
                *sizes,
                *strides,
                **kind,
                OPERAND=operand,
                TERMS=1 if operand == tl.float32 else 3,
                ROWS=high,
                MODELS=wide,
                num_warps=8 if high * wide >= 4096 else 4,
                num_stages=3 if rows.kind != "float" else 2,
            )
        pairs = models * rows.ingredients
        sum_kernel[(groups, triton.cdiv(pairs, 64))](
            sums, bounds, out, pairs, groups, **exact, PARTS=32, BLOCK=64
        )
    return out


def matrix_operand(rows: Stored, gradient: Tensor) -> tl.dtype | None:
    """bf16 where it holds the codes; None for one model, and in float64."""
    wide = torch.float64 in (gradient.dtype, rows.codes.dtype)
    if len(gradient) == 1 or wide:
        return None
    return MATRIX_TYPE if rows.kind in MATRIX_KINDS else tl.float32


def delta_dot(
    deltas: Tensor | Rows,
    gradient: Float[Tensor, "models weights"],
    segments: Sequence[Segment] | None = None,
    groups: int = 1,
) -> Float[Tensor, "models ingredients groups"]:
    """`out[m, k, g] = Σ_w deltas[k, w] · gradient[m, w]` over the weights w of group g.

    Summed in fp32 (float64 where the gradient is), in an order that the shapes decide. Without
    segments all weights are of group 0. `kernels.ops.delta_dot` checks the operands.
    """
    rows = stored(deltas)
    if gradient.stride(1) != 1:
        gradient = gradient.contiguous()
    covered = segments_or_all(segments, gradient.shape[1])
    return launch(rows, gradient, covered, groups, matrix_operand(rows, gradient))
