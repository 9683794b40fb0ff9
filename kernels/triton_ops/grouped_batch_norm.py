"""Batch norm of several models: with running statistics one scale and shift in one launch."""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from .launch import kernel, launched_on, model_stride, models_of, shared_sum


@kernel
@no_type_check
def scale_kernel(
    x,
    mean,
    variance,
    weight,
    bias,
    y,
    size,
    channels,
    inner,
    eps,
    x_model,
    mean_model,
    variance_model,
    weight_model,
    bias_model,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    model = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    channel = place // inner % channels
    values = tl.load(x + model * x_model + place, mask=inside, other=0.0).to(tl.float32)
    spread = tl.load(variance + model * variance_model + channel, mask=inside, other=1.0)
    scale = 1.0 / tl.sqrt(spread.to(tl.float32) + eps)
    if HAS_WEIGHT:
        factor = tl.load(weight + model * weight_model + channel, mask=inside, other=0.0)
        scale *= factor.to(tl.float32)
    centre = tl.load(mean + model * mean_model + channel, mask=inside, other=0.0).to(tl.float32)
    result = (values - centre) * scale
    if HAS_BIAS:
        offset = tl.load(bias + model * bias_model + channel, mask=inside, other=0.0)
        result += offset.to(tl.float32)
    tl.store(y + model * size + place, result.to(y.dtype.element_ty), mask=inside)


def inner_size(x: Tensor) -> int:
    """Numbers between two channels: the pixels, or 1 where the channels are innermost."""
    return 1 if channels_innermost(x) else x[0, 0, 0].numel()


def channels_innermost(x: Tensor) -> bool:
    """Whether the images of a model are stored channels-last, without gaps."""
    return x.dim() > 3 and not x[0].is_contiguous() and x[0].movedim(1, -1).is_contiguous()


def dense_like(x: Tensor, models: int) -> Tensor:
    """Memory for every model's result, laid out like a model of x."""
    if channels_innermost(x):
        last = (models, x.shape[1], *x.shape[3:], x.shape[2])
        return x.new_empty(last).movedim(-1, 2)
    return x.new_empty(models, *x.shape[1:])


@torch.library.custom_op(
    "grouped::batch_norm_eval",
    mutates_args=(),
    schema="(Tensor x, Tensor mean, Tensor variance, Tensor? weight, Tensor? bias, float eps, "
    "int models) -> Tensor",
)
def launch(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    models: int,
) -> Tensor:
    """`[1|M, N, C, …]` with statistics and factors `[1|M, C]`."""
    if not channels_innermost(x) and not x[0].is_contiguous():
        x = x.contiguous()  # a plane with gaps has no single step from pixel to pixel
    y = dense_like(x, models)
    if y.numel() == 0:
        return y
    factors = [None if t is None else t.contiguous() for t in (mean, variance, weight, bias)]
    size = x[0].numel()
    with launched_on(x):
        scale_kernel[(triton.cdiv(size, 1024), models)](
            *(x, *factors, y, size, x.shape[2], inner_size(x), eps),
            *(model_stride(t) for t in (x, *factors)),
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            BLOCK=1024,
        )
    return y


@launch.register_fake
def shape(x, mean, variance, weight, bias, eps, models):
    return dense_like(x, models)


def save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, mean, variance, weight, bias, ctx.eps, _ = inputs
    ctx.save_for_backward(x, mean, variance, weight)
    ctx.shared_bias = bias is not None and len(bias) == 1


def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Of x, weight and bias: running statistics are constants."""
    x, mean, variance, weight = ctx.saved_tensors
    need_x, _, _, need_weight, need_bias = ctx.needs_input_grad[:5]
    wide, scale = gradient.float(), (variance.float() + ctx.eps).rsqrt()
    others = [1, *range(3, x.dim())]
    to_x = to_weight = to_bias = None
    if need_x:
        factor = scale if weight is None else scale * weight.float()
        to_x = shared_sum(wide * per_channel(factor, x), len(x)).to(x.dtype)
    if weight is not None and need_weight:
        normal = (x.float() - per_channel(mean.float(), x)) * per_channel(scale, x)
        to_weight = shared_sum((wide * normal).sum(others), len(weight)).to(weight.dtype)
    if need_bias:
        models = 1 if ctx.shared_bias else len(wide)
        to_bias = shared_sum(wide.sum(others), models).to(gradient.dtype)
    return to_x, None, None, to_weight, to_bias, None, None


def per_channel(factor: Tensor, x: Tensor) -> Tensor:
    return factor.reshape(len(factor), 1, -1, *[1] * (x.dim() - 3))


launch.register_autograd(backward, setup_context=save)


def grouped_batch_norm(
    x: Float[Tensor, "_ images channels ..."],
    running_mean: Float[Tensor, "_ channels"] | None,
    running_var: Float[Tensor, "_ channels"] | None,
    weight: Float[Tensor, "_ channels"] | None = None,
    bias: Float[Tensor, "_ channels"] | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Float[Tensor, "_ images channels ..."]:
    """`y[m] = (x[m] − mean[m]) / √(var[m] + eps) · weight[m] + bias[m]`, per channel.

    Training, and where there are no running ones, the statistics are those of each model's own
    batch, towards which training moves the running ones in place; that is torch's batch norm with
    the models as more channels.
    """
    if training or running_mean is None or running_var is None:
        return by_batch(x, running_mean, running_var, weight, bias, momentum, eps)
    if x.dtype == torch.float64:
        y = (x - per_channel(running_mean, x)) * per_channel((running_var + eps).rsqrt(), x)
        return scaled(y, weight, bias)
    models = models_of(x, running_mean, running_var, weight, bias)
    return launch(x, running_mean, running_var, weight, bias, eps, models)


def by_batch(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """The models as more channels of one batch norm."""
    models = models_of(x, running_mean, running_var)
    mean = None if running_mean is None else running_mean.flatten()
    variance = None if running_var is None else running_var.flatten()
    channels = x.expand(models, *x.shape[1:]).transpose(0, 1).flatten(1, 2)
    y = F.batch_norm(channels, mean, variance, None, None, True, momentum, eps)
    for statistics, moved in ((running_mean, mean), (running_var, variance)):
        if statistics is not None and moved is not None and not statistics.is_contiguous():
            statistics.copy_(moved.view_as(statistics))
    return scaled(y.unflatten(1, (models, -1)).transpose(0, 1), weight, bias)


def scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = x if weight is None else x * per_channel(weight, x)
    return y if bias is None else y + per_channel(bias, x)
