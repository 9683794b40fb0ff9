"""Convolutions of several models: one launch where each model's own would be too small for the GPU.

By what is shared and how much there is to do:

- one weight: the models are more images; one input: the weights lie side by side (both cuDNN);
- `groups` = channels (depthwise): `depthwise_kernel`, a sum over taps, bound by memory;
- `groups` = 1 and at most MOST_PRODUCTS per model: `implicit_kernel`, a matrix product that gathers
  its pixels, all models in one launch. A convolution of MOST_PRODUCTS takes about as long as
  launching it, so that above it a loop over cuDNN's keeps the GPU busy and has better kernels;
- other `groups`: torch's grouped convolution with the models as more groups. Their matrices are
  narrow and of many forms; cuDNN has kernels for them and ours would be worse;
- float64: that loop too.
"""

from __future__ import annotations

from typing import Any, NamedTuple, no_type_check

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from .launch import (
    autocast,
    autotuned,
    kernel,
    launched_on,
    model_stride,
    models_of,
    shared_sum,
)

MOST_PRODUCTS = 1 << 28

TILES = [
    triton.Config({"BLOCK_OUT": 64}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_OUT": 128}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_OUT": 128}, num_warps=8, num_stages=3),
    triton.Config({"BLOCK_OUT": 64}, num_warps=4, num_stages=5),
]


@autotuned(TILES, key=["outs", "channels", "BLOCK_PIXELS", "KERNEL_HEIGHT", "KERNEL_WIDTH"])
@kernel
@no_type_check
def implicit_kernel(
    x,
    weight,
    bias,
    y,
    pixels,
    outs,
    channels,
    height,
    width,
    out_height,
    out_width,
    x_model,
    x_image,
    x_channel,
    x_row,
    x_column,
    weight_model,
    bias_model,
    stride_height,
    stride_width,
    top,
    left,
    dilation_height,
    dilation_width,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
):
    model = tl.program_id(1).to(tl.int64)
    pixel_blocks = tl.cdiv(pixels, BLOCK_PIXELS)
    pixel = (tl.program_id(0) % pixel_blocks) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    out = (tl.program_id(0) // pixel_blocks) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    area = out_height * out_width
    image, place = (pixel // area).to(tl.int64), pixel % area
    first_row = place // out_width * stride_height - top
    first_column = place % out_width * stride_width - left
    x += model * x_model + image[None, :] * x_image
    taps = channels * KERNEL_HEIGHT * KERNEL_WIDTH
    weight += model * weight_model + out[:, None].to(tl.int64) * taps
    total = tl.zeros([BLOCK_OUT, BLOCK_PIXELS], tl.float32)
    for start in range(0, taps, BLOCK_TAPS):
        tap = start + tl.arange(0, BLOCK_TAPS)
        channel = tap // (KERNEL_HEIGHT * KERNEL_WIDTH)
        row_tap = tap // KERNEL_WIDTH % KERNEL_HEIGHT * dilation_height
        column_tap = tap % KERNEL_WIDTH * dilation_width
        row = first_row[None, :] + row_tap[:, None]
        column = first_column[None, :] + column_tap[:, None]
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        values = tl.load(
            x + channel[:, None].to(tl.int64) * x_channel + row * x_row + column * x_column,
            mask=inside & (tap < taps)[:, None] & (pixel < pixels)[None, :],
            other=0.0,
        )
        weights = tl.load(
            weight + tap[None, :], mask=(out < outs)[:, None] & (tap < taps)[None, :], other=0.0
        )
        total = tl.dot(weights, values, total, input_precision=PRECISION)
    if HAS_BIAS:
        offset = tl.load(bias + model * bias_model + out, mask=out < outs, other=0.0)
        total += offset.to(tl.float32)[:, None]
    images = pixels // area
    y += ((model * images + image[None, :]) * outs + out[:, None]) * area + place[None, :]
    mask = (out < outs)[:, None] & (pixel < pixels)[None, :]
    tl.store(y, total.to(y.dtype.element_ty), mask=mask)


@kernel
@no_type_check
def depthwise_kernel(
    x,
    weight,
    bias,
    y,
    outs,
    outs_per_channel,
    height,
    width,
    out_height,
    out_width,
    images,
    x_model,
    x_image,
    x_channel,
    x_row,
    x_column,
    weight_model,
    bias_model,
    stride_height,
    stride_width,
    top,
    left,
    dilation_height,
    dilation_width,
    HAS_BIAS: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    plane = tl.program_id(0).to(tl.int64)
    out, image, model = plane % outs, plane // outs % images, plane // outs // images
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first_row = place // out_width * stride_height - top
    first_column = place % out_width * stride_width - left
    x += model * x_model + image * x_image + out // outs_per_channel * x_channel
    weight += model * weight_model + out * (KERNEL_HEIGHT * KERNEL_WIDTH)
    total = tl.zeros([BLOCK], tl.float32)
    for row_tap in tl.static_range(KERNEL_HEIGHT):
        for column_tap in tl.static_range(KERNEL_WIDTH):
            row = first_row + row_tap * dilation_height
            column = first_column + column_tap * dilation_width
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            values = tl.load(x + row * x_row + column * x_column, mask=inside, other=0.0)
            factor = tl.load(weight + row_tap * KERNEL_WIDTH + column_tap)
            total += values.to(tl.float32) * factor.to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + model * bias_model + out).to(tl.float32)
    area = out_height * out_width
    tl.store(y + plane * area + place, total.to(y.dtype.element_ty), mask=place < area)


class Form(NamedTuple):
    """A convolution's step, padding on both sides and dilation, each as (height, width)."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def out_size(self, x: Tensor, weight: Tensor) -> tuple[int, int]:
        """Pixels of the output."""
        high, wide = (
            (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
            for size, taps, stride, padding, dilation in zip(
                x.shape[-2:], weight.shape[-2:], *self, strict=True
            )
        )
        return high, wide


@torch.library.custom_op(
    "grouped::conv2d",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, "
    "int groups) -> Tensor",
)
def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """`[1|M, N, C, H, W]`, `[M, O, C/groups, kh, kw]`; `groups` is 1 or C."""
    form = Form((stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]))
    out_size = form.out_size(x, weight)
    models, outs, *_, kernel_height, kernel_width = weight.shape
    images, channels, height, width = x.shape[1:]
    y = x.new_empty(models, images, outs, *out_size)
    if y.numel() == 0:
        return y
    weight = weight.contiguous()  # taps of a weight are read as one run
    bias = None if bias is None else bias.contiguous()
    area = out_size[0] * out_size[1]
    strides = (model_stride(x), *x.stride()[1:], weight.stride(0), model_stride(bias))
    form_sizes = (*stride, *padding, *dilation)
    taps = {"KERNEL_HEIGHT": kernel_height, "KERNEL_WIDTH": kernel_width}
    with launched_on(x):
        if groups > 1 or channels == 1:
            block = min(max(triton.next_power_of_2(area), 32), 512)
            depthwise_kernel[(models * images * outs, triton.cdiv(area, block))](
                *(x, weight, bias, y, outs, outs // channels, height, width, *out_size, images),
                *strides,
                *form_sizes,
                HAS_BIAS=bias is not None,
                **taps,
                BLOCK=block,
                num_warps=4 if block > 128 else 1,
            )
        else:
            pixels = images * area
            block = min(max(triton.next_power_of_2(pixels), 16), 128)
            blocks = triton.cdiv(pixels, block)
            implicit_kernel[lambda tile: (blocks * triton.cdiv(outs, tile["BLOCK_OUT"]), models)](
                *(x, weight, bias, y, pixels, outs, channels, height, width, *out_size),
                *strides,
                *form_sizes,
                HAS_BIAS=bias is not None,
                PRECISION="tf32" if torch.backends.cudnn.allow_tf32 else "ieee",
                **taps,
                BLOCK_PIXELS=block,
                BLOCK_TAPS=32,
            )
    return y


@launch.register_fake
def shape(x, weight, bias, stride, padding, dilation, groups):
    size = Form(tuple(stride), tuple(padding), tuple(dilation)).out_size(x, weight)
    return x.new_empty(len(weight), x.shape[1], weight.shape[1], *size)


def save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, *ctx.form = inputs
    ctx.save_for_backward(x, weight)
    ctx.shared_bias = bias is not None and len(bias) == 1


def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """cuDNN's gradients, model by model."""
    x, weight = ctx.saved_tensors
    stride, padding, dilation, groups = ctx.form
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    to_x, to_weight = [], []
    for model in range(len(weight)):
        of_x, of_weight, _ = torch.ops.aten.convolution_backward(
            gradient[model],
            x[model if len(x) > 1 else 0],
            weight[model],
            None,
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            [need_x, need_weight, False],
        )
        to_x.append(of_x)
        to_weight.append(of_weight)
    bias_models = 1 if ctx.shared_bias else len(weight)
    return (
        shared_sum(torch.stack(to_x), len(x)) if need_x else None,
        torch.stack(to_weight) if need_weight else None,
        shared_sum(gradient.sum((1, 3, 4)), bias_models) if need_bias else None,
        *[None] * 4,
    )


launch.register_autograd(backward, setup_context=save)


def grouped_conv2d(
    x: Float[Tensor, "_ images channels height width"],
    weight: Float[Tensor, "_ out channels_per_group kernel_height kernel_width"],
    bias: Float[Tensor, "_ out"] | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Float[Tensor, "_ images out out_height out_width"]:
    """`y[m] = conv2d(x[m], weight[m], bias[m])`; a leading axis of 1 is every model's.

    `groups` other than 1 and the channels go to torch's grouped convolution, large ones to cuDNN
    model by model (see above). fp32 is exact unless `torch.backends.cudnn.allow_tf32`.
    """
    x, weight, bias = autocast(x, weight, bias)
    models = models_of(x, weight, bias)
    x, padding = padded(x, weight, padding, dilation)
    form = Form(pair(stride), padding, pair(dilation))
    if len(weight) == 1:
        return with_bias(shared_weight(x, weight, form, groups), bias)
    depthwise = weight.shape[2] == 1 and groups == x.shape[2]
    if x.dtype == torch.float64 or not (depthwise or groups == 1):
        return with_bias(as_groups(x.expand(models, *x.shape[1:]), weight, form, groups), bias)
    if len(x) == 1 and not depthwise:
        return with_bias(side_by_side(x, weight, form), bias)
    if depthwise or products(x, weight, form) <= MOST_PRODUCTS:
        return launch(x, weight, bias, *form, groups)
    biases = [None] * models if bias is None else bias.expand(models, -1)
    return torch.stack([F.conv2d(*each, *form) for each in zip(x, weight, biases, strict=True)])


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def padded(
    x: Tensor,
    weight: Tensor,
    padding: int | tuple[int, int] | str,
    dilation: int | tuple[int, int],
) -> tuple[Tensor, tuple[int, int]]:
    """The padding on both sides; "same" with an odd total has its last row or column put into x."""
    if padding == "valid":
        return x, (0, 0)
    if not isinstance(padding, str):
        return x, pair(padding)
    high, wide = (
        step * (taps - 1) for step, taps in zip(pair(dilation), weight.shape[-2:], strict=True)
    )
    if high % 2 or wide % 2:
        x = F.pad(x, (0, wide % 2, 0, high % 2))
    return x, (high // 2, wide // 2)


def products(x: Tensor, weight: Tensor, form: Form) -> int:
    """Multiplications of one model."""
    high, wide = form.out_size(x, weight)
    return x.shape[1] * high * wide * weight[0].numel()


def with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias[:, None, :, None, None]


def shared_weight(x: Tensor, weight: Tensor, form: Form, groups: int) -> Tensor:
    """The models as more images."""
    y = F.conv2d(x.flatten(0, 1), weight[0], None, *form, groups)
    return y.unflatten(0, x.shape[:2])


def side_by_side(x: Tensor, weight: Tensor, form: Form) -> Tensor:
    """The models as more output channels of one input."""
    y = F.conv2d(x[0], weight.flatten(0, 1), None, *form)
    return y.unflatten(1, weight.shape[:2]).transpose(0, 1)


def as_groups(x: Tensor, weight: Tensor, form: Form, groups: int) -> Tensor:
    """The models as more groups."""
    channels = x.transpose(0, 1).flatten(1, 2)
    y = F.conv2d(channels, weight.flatten(0, 1), None, *form, len(weight) * groups)
    return y.unflatten(1, weight.shape[:2]).transpose(0, 1)
