"""Mixing: `[M, K] @ [K, P]`, reading every delta once for all models.

A program holds one tile of weights of up to 64 models in fp32 and adds row after row, in order.
One model, and fp32 or fp16 rows, are multiplied and added one row at a time (`exact_kernel`).
From two models on, rows of at most 8 significant bits go to the tensor cores
(`matrix_kernel`), where the fp32 pipes could not keep up with the memory: such codes are bf16
numbers as they are, and a coefficient is the exact sum of three of them, so nothing is rounded but
the fp32 sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kernels.mixing import weights_of
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

MOST_MODELS = 64
CONTIGUOUS = torch.contiguous_format


@kernel
@no_type_check
def exact_kernel(
    anchor,
    codes,
    scales,
    coefficients,
    tiles,
    out,
    weights,
    models,
    rows,
    limit,
    code_row,
    scale_row,
    scale_segment,
    coefficient_model,
    coefficient_row,
    coefficient_group,
    out_model,
    ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    KIND: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    SUM: tl.constexpr,
    MODELS: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tiles + tl.program_id(0).to(tl.int64) * 4
    start, stop, group, scale = (
        tl.load(tile),
        tl.load(tile + 1),
        tl.load(tile + 2),
        tl.load(tile + 3),
    )
    base = start // BLOCK * BLOCK
    weight = base + tl.arange(0, BLOCK)
    limit *= ALIGN
    code_row *= ALIGN
    weights *= OUT_ALIGN
    out_model *= OUT_ALIGN
    model = tl.program_id(1) * MODELS + tl.arange(0, MODELS)
    total = tl.zeros([MODELS, BLOCK], SUM)
    total += tl.load(anchor + weight, mask=weight < weights, other=0.0).to(SUM)[None, :]
    coefficients += model[:, None] * coefficient_model + group * coefficient_group
    # Weights of no group are the anchor's.
    for first in range(0, tl.where(group < 0, 0, rows), UNROLL):
        for step in tl.static_range(UNROLL):
            row = tl.full([1, 1], first + step, tl.int64)
            values = load_codes(codes + row * code_row, row < rows, base, limit, KIND, BLOCK)
            factor = tl.load(
                coefficients + row * coefficient_row,
                mask=(row < rows) & (model < models)[:, None],
                other=0.0,
            ).to(SUM)
            if HAS_SCALES:
                factor *= tl.load(
                    scales + row * scale_row + scale * scale_segment, mask=row < rows, other=0.0
                )
            total += factor * values.to(SUM)
    out += model[:, None].to(tl.int64) * out_model + weight[None, :]
    total = total.to(out.dtype.element_ty)
    present = (model < models)[:, None]
    if stop - start == BLOCK:
        tl.store(out, total, mask=present)
    else:
        tl.store(out, total, mask=present & ((weight >= start) & (weight < stop))[None, :])


@kernel
@no_type_check
def matrix_kernel(
    anchor,
    codes,
    scales,
    coefficients,
    tiles,
    out,
    weights,
    models,
    rows,
    limit,
    code_row,
    scale_row,
    scale_segment,
    coefficient_model,
    coefficient_row,
    coefficient_group,
    out_model,
    ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    KIND: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    OPERAND: tl.constexpr,
    TERMS: tl.constexpr,
    MODELS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tiles + tl.program_id(0).to(tl.int64) * 4
    start, stop, group, scale = (
        tl.load(tile),
        tl.load(tile + 1),
        tl.load(tile + 2),
        tl.load(tile + 3),
    )
    base = start // BLOCK * BLOCK
    weight = base + tl.arange(0, BLOCK)
    limit *= ALIGN
    code_row *= ALIGN
    weights *= OUT_ALIGN
    out_model *= OUT_ALIGN
    model = tl.program_id(1) * MODELS + tl.arange(0, MODELS)
    total = tl.zeros([BLOCK, MODELS], tl.float32)
    total += tl.load(anchor + weight, mask=weight < weights, other=0.0).to(tl.float32)[:, None]
    coefficients += model[None, :] * coefficient_model + group * coefficient_group
    for first in range(0, tl.where(group < 0, 0, rows), ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        values = load_codes(codes + row * code_row, row < rows, base, limit, KIND, BLOCK)
        values = tl.trans(values.to(OPERAND))
        factor = tl.load(
            coefficients + row * coefficient_row,
            mask=(row < rows) & (model < models)[None, :],
            other=0.0,
        ).to(tl.float32)
        if HAS_SCALES:
            factor *= tl.load(
                scales + row * scale_row + scale * scale_segment, mask=row < rows, other=0.0
            )
        for _ in tl.static_range(TERMS):
            term = factor.to(OPERAND)
            total = tl.dot(values, term, total, input_precision="ieee")
            factor -= term.to(tl.float32)
    out += model[None, :].to(tl.int64) * out_model + weight[:, None]
    total = total.to(out.dtype.element_ty)
    present = (model < models)[None, :]
    if stop - start == BLOCK:
        tl.store(out, total, mask=present)
    else:
        tl.store(out, total, mask=present & ((weight >= start) & (weight < stop))[:, None])


def launch(
    anchor: Tensor,
    rows: Stored,
    coefficients: Tensor,
    segments: tuple[Segment, ...],
    out: Tensor,
    operand: tl.dtype | None,
) -> None:
    """`operand`: the type in which the tensor cores multiply; None: one row after the other."""
    models, count, groups = coefficients.shape
    if out.numel() == 0:
        return
    length = tile_length(rows, 1024 if operand is None and models <= 4 else 256)
    tiles = tiles_of(segments, groups, rows.segments, len(anchor), length, anchor.device)
    wide = min(triton.next_power_of_2(models), MOST_MODELS)
    grid = (len(tiles.table), triton.cdiv(models, wide))
    operands = (anchor, rows.codes, rows.scales, coefficients, tiles.table, out)
    # Sizes and steps come in units of what divides them, so that a kernel knows of it.
    align = math.gcd(WIDE, len(anchor), out.stride(0))
    sizes = (len(anchor) // align, models, count, rows.limit // rows.align)
    strides = (
        rows.codes.stride(0) // rows.align,
        *rows.scale_strides,
        *coefficients.stride(),
        out.stride(0) // align,
    )
    kind = {"KIND": rows.kind, "HAS_SCALES": rows.scales is not None, "BLOCK": length}
    kind |= {"ALIGN": rows.align, "OUT_ALIGN": align}
    with launched_on(anchor):
        if operand is None:
            exact_kernel[grid](
                *operands,
                *sizes,
                *strides,
                **kind,
                SUM=tl.float64 if anchor.dtype == torch.float64 else tl.float32,
                MODELS=wide,
                UNROLL=4,
                num_warps=8 if wide * length >= 8192 else 4,
            )
        else:
            matrix_kernel[grid](
                *operands,
                *sizes,
                *strides,
                **kind,
                OPERAND=operand,
                TERMS=1 if operand == tl.float32 else 3,
                MODELS=max(wide, 16),
                ROWS=16 if count <= 16 else 32,
                num_warps=8 if length >= 256 else 4,
                num_stages=3,
            )


def matrix_operand(rows: Stored, models: int, total: torch.dtype) -> tl.dtype | None:
    """bf16 where it holds the codes; None for one model, and in float64."""
    fits = rows.kind in MATRIX_KINDS and models > 1 and total != torch.float64
    return MATRIX_TYPE if fits else None


def mix(
    anchor: Float[Tensor, " weights"],
    deltas: Tensor | Rows,
    coefficients: Float[Tensor, "models ingredients *groups"],
    segments: Sequence[Segment] | None = None,
    *,
    out: Float[Tensor, "models weights"] | None = None,
) -> Float[Tensor, "models weights"]:
    """`out[m] = anchor + Σ_k coefficients[m, k, group] · deltas[k]`, segment by segment.

    Summed in fp32 (float64 where the anchor is), in the order of the rows. Weights outside of all
    segments are the anchor's; without segments all are of group 0. `kernels.ops.mix` checks the
    operands and has the gradients. From two models on, a model's bits do not depend on the others.
    """
    by_group = coefficients if coefficients.dim() == 3 else coefficients[:, :, None]
    rows = stored(deltas)
    weights = weights_of(deltas)
    if out is None:
        out = anchor.new_empty(len(coefficients), weights)
    inner = out if out.stride(1) == 1 else torch.empty_like(out, memory_format=CONTIGUOUS)
    covered = segments_or_all(segments, weights)
    operand = matrix_operand(rows, len(coefficients), anchor.dtype)
    launch(anchor.contiguous(), rows, by_group, covered, inner, operand)
    return out if inner is out else out.copy_(inner)
