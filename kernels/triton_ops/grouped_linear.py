"""Linear layers of several models in one launch, with the bias added where the sum ends.

Three ranges of rows per model, by what bounds them on sm_90 (about 4 TB/s of memory, 800 TFLOP/s
on 16 bit operands, 60 on 32 bit ones):

- up to FEW_ROWS: a dot product per weight row, read once from memory, no padding to a matrix tile;
- up to `tiled_rows_limit`, where reading the weights still takes longer than multiplying: tiles,
  which read each weight once per block of rows;
- above: multiplying is what takes time, and cuBLAS (`torch.baddbmm`) is the best at it.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from .launch import (
    HALVES,
    autocast,
    autotuned,
    kernel,
    launched_on,
    model_stride,
    models_of,
    shared_sum,
)

FEW_ROWS = 4


def tiled_rows_limit(x: Tensor) -> int:
    """Rows per model up to which the tiled kernel is bound by reading weights."""
    return 256 if x.dtype in HALVES or torch.backends.cuda.matmul.allow_tf32 else 32


@kernel
@no_type_check
def few_rows_kernel(
    x,
    weight,
    bias,
    y,
    rows,
    outs,
    ins,
    x_model,
    x_row,
    x_in,
    weight_model,
    weight_out,
    weight_in,
    bias_model,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    model = tl.program_id(1).to(tl.int64)
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = tl.arange(0, ROWS)
    weight += model * weight_model + out[None, :, None].to(tl.int64) * weight_out
    x += model * x_model + row[:, None, None] * x_row
    total = tl.zeros([ROWS, BLOCK_OUT, BLOCK_IN], tl.float32)
    for start in range(0, ins, BLOCK_IN):
        column = (start + tl.arange(0, BLOCK_IN))[None, None, :]
        inside = column < ins
        weights = tl.load(
            weight + column * weight_in, mask=inside & (out < outs)[None, :, None], other=0.0
        )
        values = tl.load(x + column * x_in, mask=inside & (row < rows)[:, None, None], other=0.0)
        total += weights.to(tl.float32) * values.to(tl.float32)
    result = tl.sum(total, axis=2)
    if HAS_BIAS:
        result += tl.load(bias + model * bias_model + out, mask=out < outs, other=0.0).to(
            tl.float32
        )[None, :]
    y += (model * rows + row[:, None]) * outs + out[None, :]
    tl.store(y, result.to(y.dtype.element_ty), mask=(row < rows)[:, None] & (out < outs)[None, :])


TILES = [
    triton.Config({"BLOCK_OUT": 64}, num_warps=4, num_stages=4),
    triton.Config({"BLOCK_OUT": 32}, num_warps=4, num_stages=5),
    triton.Config({"BLOCK_OUT": 128}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_OUT": 128}, num_warps=8, num_stages=4),
]


@autotuned(TILES, key=["outs", "ins", "BLOCK_ROWS"])
@kernel
@no_type_check
def tiled_kernel(
    x,
    weight,
    bias,
    y,
    rows,
    outs,
    ins,
    x_model,
    x_row,
    x_in,
    weight_model,
    weight_out,
    weight_in,
    bias_model,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    model = tl.program_id(1).to(tl.int64)
    # Neighbouring programs share a block of weights, so that it comes from memory once.
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    row = (tl.program_id(0) % row_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    out = (tl.program_id(0) // row_blocks) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    weight += model * weight_model + out[None, :].to(tl.int64) * weight_out
    x += model * x_model + row[:, None].to(tl.int64) * x_row
    total = tl.zeros([BLOCK_ROWS, BLOCK_OUT], tl.float32)
    for start in range(0, ins, BLOCK_IN):
        column = start + tl.arange(0, BLOCK_IN)
        values = tl.load(
            x + column[None, :] * x_in,
            mask=(row < rows)[:, None] & (column < ins)[None, :],
            other=0.0,
        )
        weights = tl.load(
            weight + column[:, None] * weight_in,
            mask=(column < ins)[:, None] & (out < outs)[None, :],
            other=0.0,
        )
        total = tl.dot(values, weights, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + model * bias_model + out, mask=out < outs, other=0.0).to(
            tl.float32
        )[None, :]
    y += (model * rows + row[:, None]) * outs + out[None, :]
    tl.store(y, total.to(y.dtype.element_ty), mask=(row < rows)[:, None] & (out < outs)[None, :])


@torch.library.custom_op(
    "grouped::linear", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor"
)
def launch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`[1|M, rows, in]`, `[M, out, in]`, `[1|M, out]` to `[M, rows, out]`."""
    models, outs, ins = weight.shape
    rows = x.shape[1]
    y = x.new_empty(models, rows, outs)
    if y.numel() == 0:
        return y
    bias = None if bias is None else bias.contiguous()
    operands = (x, weight, bias, y, rows, outs, ins)
    strides = (model_stride(x), *x.stride()[1:], *weight.stride(), model_stride(bias))
    with launched_on(x):
        if rows <= FEW_ROWS:
            few_rows_kernel[(triton.cdiv(outs, 16), models)](
                *operands,
                *strides,
                HAS_BIAS=bias is not None,
                ROWS=triton.next_power_of_2(rows),
                BLOCK_OUT=16,
                BLOCK_IN=128,
            )
        else:
            block_rows = min(max(triton.next_power_of_2(rows), 16), 64)
            row_blocks = triton.cdiv(rows, block_rows)
            tiled_kernel[lambda tile: (row_blocks * triton.cdiv(outs, tile["BLOCK_OUT"]), models)](
                *operands,
                *strides,
                HAS_BIAS=bias is not None,
                PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
                BLOCK_ROWS=block_rows,
                BLOCK_IN=64 if x.dtype in HALVES else 32,
            )
    return y


@launch.register_fake
def shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(len(weight), x.shape[1], weight.shape[1])


def save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.shared_bias = bias is not None and len(bias) == 1


def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad
    to_x = None
    if need_x and len(x) == 1:
        to_x = torch.einsum("mro,moi->ri", gradient, weight)[None]
    elif need_x:
        to_x = gradient @ weight
    to_weight = gradient.mT @ x if need_weight else None
    bias_models = 1 if ctx.shared_bias else len(weight)
    return to_x, to_weight, shared_sum(gradient.sum(1), bias_models) if need_bias else None


launch.register_autograd(backward, setup_context=save)


def grouped_linear(
    x: Float[Tensor, "_ *rows in"],
    weight: Float[Tensor, "_ out in"],
    bias: Float[Tensor, "_ out"] | None = None,
) -> Float[Tensor, "_ *rows out"]:
    """`y[m] = x[m] · weight[m]ᵀ + bias[m]`; an operand with a leading axis of 1 is every model's.

    Half precision is summed in fp32; fp32 is exact unless TF32 is allowed
    (`torch.backends.cuda.matmul.allow_tf32`); float64 goes to cuBLAS.
    """
    x, weight, bias = autocast(x, weight, bias)
    models = models_of(x, weight, bias)
    if len(weight) == 1:
        return shared_weight(x, weight, bias)
    flat = x.reshape(len(x), -1, x.shape[-1])
    if x.dtype == torch.float64 or flat.shape[1] > tiled_rows_limit(x):
        y = batched(flat.expand(models, -1, -1), weight, bias)
    else:
        y = launch(flat, weight, bias)
    return y.reshape(models, *x.shape[1:-1], weight.shape[1])


def shared_weight(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One weight: the models are only more rows."""
    if bias is None or len(bias) == 1:
        return F.linear(x, weight[0], None if bias is None else bias[0])
    return F.linear(x, weight[0]) + bias.reshape(len(bias), *[1] * (x.dim() - 2), -1)


def batched(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return torch.bmm(x, weight.mT)
    return torch.baddbmm(bias[:, None], x, weight.mT)
