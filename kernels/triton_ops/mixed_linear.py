"""A linear layer that is mixed while it is multiplied: for few rows, M weights are never made.

The mixture is linear, so `x · (Σ_k c_k Δ_k)ᵀ = Σ_k c_k (x · Δ_kᵀ)`: the rows of all models are
multiplied with each delta, which is read once, and the products are added with each model's own
coefficients in fp32. That costs K times the multiplications of one layer and saves writing and
reading M of them; `most_rows` is where that stops paying on sm_90. Where all models share the
input, `x · Δ_kᵀ` is the same for all and a small matrix product follows.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kernels.quantise import PER_BYTE
from kernels.storage import Rows

from .grouped_linear import grouped_linear
from .launch import HALVES, kernel, launched_on
from .mix import mix
from .rows import Stored, load_codes, stored

# Programs that fill the largest GPU; the deltas are shared among as many parts as that takes.
PROGRAMS = 512
BLOCK_OUT = 32
SINGLE = ("float", "bf16")


def most_rows(x: Tensor) -> int:
    """Rows of all models together up to which the deltas' bytes take longer than their products."""
    return 400 if x.dtype in HALVES else 32


@kernel
@no_type_check
def parts_kernel(
    x,
    codes,
    scales,
    coefficients,
    sums,
    rows,
    rows_per_model,
    outs,
    ins,
    deltas,
    deltas_per_part,
    x_row,
    code_row,
    scale_row,
    coefficient_model,
    coefficient_row,
    KIND: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    part = tl.program_id(2)
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    out = (tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)).to(tl.int64)
    # A weight's place in its row; two or eight of them may share a byte.
    per_byte: tl.constexpr = 2 if KIND == "int4" else 8 if KIND == "sign" else 1
    limit = ins // per_byte
    codes += out[:, None] * limit
    x += row[:, None] * x_row
    total = tl.zeros([BLOCK_ROWS, BLOCK_OUT], tl.float32)
    first = part * deltas_per_part
    for delta in range(first, tl.minimum(first + deltas_per_part, deltas)):
        place = tl.full([1, 1], delta, tl.int64)
        product = tl.zeros([BLOCK_ROWS, BLOCK_OUT], tl.float32)
        for start in range(0, ins, BLOCK_IN):
            column = start + tl.arange(0, BLOCK_IN)
            values = tl.load(
                x + column[None, :], mask=(row < rows)[:, None] & (column < ins)[None, :], other=0.0
            )
            weights = load_codes(
                codes + place * code_row, (out < outs)[:, None], start, limit, KIND, BLOCK_IN
            )
            weights = tl.trans(weights.to(values.dtype))
            product = tl.dot(values, weights, product, input_precision=PRECISION)
        if HAS_SCALES:
            product *= tl.load(scales + place * scale_row)
        if WEIGHTED:
            model = row[:, None] // rows_per_model
            factor = tl.load(
                coefficients + model * coefficient_model + place * coefficient_row,
                mask=(row < rows)[:, None],
                other=0.0,
            )
            product *= factor.to(tl.float32)
        total += product
    sums += (part.to(tl.int64) * rows + row[:, None]) * outs + out[None, :]
    tl.store(sums, total, mask=(row < rows)[:, None] & (out < outs)[None, :])


def launch(x: Tensor, outs: int, rows: Stored, coefficients: Tensor | None, parts: int) -> Tensor:
    """The sums [parts, rows, out] in fp32 of `x` [M, rows, in] times the deltas of each part."""
    models, rows_per_model, ins = x.shape
    count = models * rows_per_model
    sums = x.new_empty(parts, count, outs, dtype=torch.float32)
    block_rows = min(max(triton.next_power_of_2(count), 16), 64)
    grid = (triton.cdiv(count, block_rows), triton.cdiv(outs, BLOCK_OUT), parts)
    flat = x.reshape(count, ins).contiguous()
    tf32 = torch.backends.cuda.matmul.allow_tf32
    with launched_on(x):
        parts_kernel[grid](
            flat,
            rows.codes,
            rows.scales,
            coefficients,
            sums,
            count,
            rows_per_model,
            outs,
            ins,
            rows.ingredients,
            triton.cdiv(rows.ingredients, parts),
            flat.stride(0),
            rows.codes.stride(0),
            rows.scale_strides[0],
            *((0, 0) if coefficients is None else coefficients.stride()),
            KIND=rows.kind,
            HAS_SCALES=rows.scales is not None,
            WEIGHTED=coefficients is not None,
            PRECISION="tf32" if tf32 else "ieee",
            BLOCK_ROWS=block_rows,
            BLOCK_OUT=BLOCK_OUT,
            BLOCK_IN=64,
        )
    return sums


def fits(x: Tensor, rows: Stored, models: int) -> bool:
    """Few rows; one scale per delta; outputs that begin at a byte; codes that x's type holds."""
    exact = rows.kind not in SINGLE or rows.codes.dtype == x.dtype
    return (
        0 < len(x) * x.shape[1] <= most_rows(x)
        and rows.ingredients > 0
        and models > 0
        and len(rows.segments) <= 1
        and x.shape[2] % PER_BYTE.get(rows.kind, 1) == 0
        and (exact or x.dtype == torch.float32)
        and x.dtype != torch.float64
    )


def mixed_linear(
    x: Float[Tensor, "_ rows in"],
    anchor: Float[Tensor, "out in"],
    deltas: Tensor | Rows,
    coefficients: Float[Tensor, "models ingredients"],
    bias: Float[Tensor, "_ out"] | None = None,
) -> Float[Tensor, "models rows out"]:
    """`y[m] = x[m] · (anchor + Σ_k coefficients[m, k] · deltas[k])ᵀ + bias[m]`.

    Summed in fp32, in an order that the layer's shape decides. What `fits` refuses is mixed first
    and multiplied then. `kernels.ops.mixed_linear` checks the operands and has the gradients.
    """
    rows = stored(deltas if isinstance(deltas, Rows) else deltas.flatten(1))
    models, (outs, _) = len(coefficients), anchor.shape
    if not fits(x, rows, models):
        flat = deltas if isinstance(deltas, Rows) else deltas.flatten(1)
        weights = mix(anchor.flatten(), flat, coefficients).unflatten(1, anchor.shape)
        return grouped_linear(x, weights, bias).expand(models, -1, -1)
    plain = grouped_linear(x, anchor[None], bias).float()
    if len(x) == 1:
        products = launch(x, outs, rows, None, rows.ingredients)
        change = torch.tensordot(coefficients.float(), products, dims=1)
    else:
        parts = min(triton.cdiv(PROGRAMS, triton.cdiv(outs, BLOCK_OUT)), rows.ingredients)
        sums = launch(x, outs, rows, coefficients, parts)
        change = sums.sum(0).unflatten(0, (models, -1))
    return (plain + change).to(x.dtype)
