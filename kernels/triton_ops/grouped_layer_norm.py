"""Layer norm with each model's own scale and shift, one row per program, read once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, no_type_check

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from .launch import kernel, launched_on, model_stride, models_of, shared_sum

# A row must fit the registers of one program.
LONGEST_ROW = 1 << 14


@kernel
@no_type_check
def row_kernel(
    x,
    weight,
    bias,
    y,
    means,
    scales,
    rows,
    length,
    eps,
    x_model,
    x_row,
    weight_model,
    bias_model,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, model = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < length
    values = tl.load(x + model * x_model + row * x_row + column, mask=inside, other=0.0)
    values = values.to(tl.float32)
    mean = tl.sum(values, axis=0) / length
    centred = tl.where(inside, values - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / length + eps)
    result = centred * scale
    if HAS_WEIGHT:
        factor = tl.load(weight + model * weight_model + column, mask=inside, other=0.0)
        result *= factor.to(tl.float32)
    if HAS_BIAS:
        result += tl.load(bias + model * bias_model + column, mask=inside, other=0.0).to(tl.float32)
    place = model * rows + row
    tl.store(y + place * length + column, result.to(y.dtype.element_ty), mask=inside)
    tl.store(means + place, mean)
    tl.store(scales + place, scale)


@torch.library.custom_op(
    "grouped::layer_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor? weight, Tensor? bias, float eps, int models) "
    "-> (Tensor, Tensor, Tensor)",
)
def launch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, models: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of `[1|M, rows, length]`: y, and each row's mean and 1 / √(var + eps) in fp32."""
    _, rows, length = x.shape
    y = x.new_empty(models, rows, length)
    means = x.new_empty(models, rows, dtype=torch.float32)
    scales = torch.empty_like(means)
    if y.numel() == 0:
        return y, means, scales
    x = x if x.stride(2) == 1 else x.contiguous()
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    block = triton.next_power_of_2(length)
    with launched_on(x):
        row_kernel[(rows, models)](
            *(x, weight, bias, y, means, scales, rows, length, eps),
            *(model_stride(x), x.stride(1), model_stride(weight), model_stride(bias)),
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            BLOCK=block,
            num_warps=min(max(block // 512, 1), 16),
        )
    return y, means, scales


@launch.register_fake
def shape(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, models: int
) -> tuple[Tensor, Tensor, Tensor]:
    means = x.new_empty(models, x.shape[1], dtype=torch.float32)
    return x.new_empty(models, *x.shape[1:]), means, torch.empty_like(means)


def save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, *_ = inputs
    _, means, scales = output
    ctx.save_for_backward(x, weight, means, scales)
    ctx.shared_bias = bias is not None and len(bias) == 1


def backward(ctx: Any, gradient: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, means, scales = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    wide = gradient.float()
    normal = (x.float() - means[:, :, None]) * scales[:, :, None]
    to_x = to_weight = to_bias = None
    if need_x:
        slope = wide if weight is None else wide * weight[:, None].float()
        inner = slope - slope.mean(2, keepdim=True)
        inner = inner - normal * (slope * normal).mean(2, keepdim=True)
        to_x = shared_sum(inner * scales[:, :, None], len(x)).to(x.dtype)
    if weight is not None and need_weight:
        to_weight = shared_sum((wide * normal).sum(1), len(weight)).to(weight.dtype)
    if need_bias:
        to_bias = shared_sum(wide.sum(1), 1 if ctx.shared_bias else len(wide)).to(gradient.dtype)
    return to_x, to_weight, to_bias, None, None


launch.register_autograd(backward, setup_context=save)


def grouped_layer_norm(
    x: Float[Tensor, "_ ..."],
    normalized_shape: Sequence[int],
    weight: Float[Tensor, "_ ..."] | None = None,
    bias: Float[Tensor, "_ ..."] | None = None,
    eps: float = 1e-5,
) -> Float[Tensor, "_ ..."]:
    """`y[m] = (x[m] − mean) / √(var + eps) · weight[m] + bias[m]`, over the last axes.

    Statistics in fp32. float64 and rows of more than LONGEST_ROW numbers are normalised by torch.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.float()  # as autocast has it for torch's
    models = models_of(x, weight, bias)
    normal = tuple(normalized_shape)
    length = math.prod(normal)
    if x.dtype == torch.float64 or length > LONGEST_ROW:
        return by_torch(x, normal, weight, bias, eps)
    flat = x.reshape(len(x), -1, length)
    of_weight, of_bias = (None if t is None else t.flatten(1) for t in (weight, bias))
    return launch(flat, of_weight, of_bias, eps, models)[0].reshape(models, *x.shape[1:])


def by_torch(
    x: Tensor, normal: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    between = [1] * (x.dim() - 1 - len(normal))
    y = F.layer_norm(x, normal, eps=eps)
    if weight is not None:
        y = y * weight.reshape(len(weight), *between, *normal)
    return y if bias is None else y + bias.reshape(len(bias), *between, *normal)
