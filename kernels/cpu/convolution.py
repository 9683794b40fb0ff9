"""Convolutions of several models."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import each, expanded, models_of, plus, unfolded
from .strategies import alike, choose, packs

Pair = tuple[int, int]


class Window(NamedTuple):
    """How the kernel moves over the image."""

    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1


def grouped_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair | str = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    force: str | None = None,
) -> Tensor:
    """`y[m] = conv2d(x[m], weight[m], bias[m])`."""
    if isinstance(padding, str):
        x, padding = _padded(x, weight, padding, dilation)
    window = Window(stride, padding, dilation, groups)
    if len(weight) == 1:
        return _one_weight(x, weight, bias, window)
    if len(x) == 1:
        return _side_by_side(x, weight, bias, window)
    packing = packs(x, weight, bias)
    strategy = force or choose("conv2d", x, _shape(x, weight, window), _available(window, packing))
    return STRATEGIES[strategy](x, weight, bias, window)


def _padded(x: Tensor, weight: Tensor, padding: str, dilation: Pair) -> tuple[Tensor, Pair]:
    """`x` and the padding on both sides that is left to the convolution."""
    if padding == "valid":
        return x, (0, 0)
    height, width = (d * (size - 1) for d, size in zip(dilation, weight.shape[-2:], strict=True))
    if height % 2 or width % 2:
        x = F.pad(x, (0, width % 2, 0, height % 2))
    return x, (height // 2, width // 2)


def _available(window: Window, packing: bool) -> tuple[str, ...]:
    unfolds = window.groups == 1 and window.dilation == (1, 1)
    return (
        ("channels", "channels_last", "loop", "loop_last")
        + ("columns",) * unfolds
        + ("channels_packed", "loop_packed") * packing
    )


def _shape(x: Tensor, weight: Tensor, window: Window) -> tuple[int, ...]:
    models, rows, channels, height, width = x.shape
    models = alike(models)
    outs, kernel = weight.shape[1], weight.shape[-2:].numel()
    pixels = max(1, height // window.stride[0]) * max(1, width // window.stride[1])
    groups = window.groups
    return models, rows, channels // groups, outs // groups, groups, pixels, kernel


def _one_weight(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """The models are images more."""
    shared = bias.squeeze(0) if bias is not None and len(bias) == 1 else None
    y = F.conv2d(x.flatten(0, 1), weight.squeeze(0), shared, *window)
    if x.shape[2] == 1 and torch.is_grad_enabled():
        # Pooling and norms are fastest so, but of one channel torch cannot tell what comes last.
        y = y.contiguous(memory_format=torch.channels_last)
    y = unfolded(y, 0, len(x))
    return y if shared is not None else plus(y, bias, 2)


def _side_by_side(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """One convolution with the weights of all models beside each other, in each group."""
    models, groups = len(weight), window.groups
    weight = weight.unflatten(1, (groups, -1)).transpose(0, 1)
    if bias is not None:
        bias = expanded(bias, models).unflatten(1, (groups, -1)).transpose(0, 1).flatten()
    y = F.conv2d(x.squeeze(0), weight.flatten(0, 2), bias, *window)
    return y.unflatten(1, (groups, models, -1)).movedim(2, 0).flatten(2, 3)


def _channels(
    convolve: Callable[..., Tensor], channels_last: bool
) -> Callable[[Tensor, Tensor, Tensor | None, Window], Tensor]:
    """One convolution in which the models are groups of channels."""

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
        models = models_of(x, weight)
        if channels_last:
            merged = x.permute(1, 3, 4, 0, 2).flatten(3).permute(0, 3, 1, 2)
        else:
            merged = x.transpose(0, 1).flatten(1, 2)
        if bias is not None:
            bias = expanded(bias, models).flatten()
        grouped = window._replace(groups=models * window.groups)
        y = convolve(merged, _in_format(weight.flatten(0, 1), channels_last), bias, grouped)
        return y.unflatten(1, (models, -1)).transpose(0, 1)

    return run


def _loop(
    convolve: Callable[..., Tensor], channels_last: bool
) -> Callable[[Tensor, Tensor, Tensor | None, Window], Tensor]:
    """One convolution per model."""

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
        models = models_of(x, weight)
        results = [
            convolve(_in_format(x, channels_last), _in_format(weight, channels_last), bias, window)
            for x, weight, bias in zip(
                each(x, models), each(weight, models), each(bias, models), strict=True
            )
        ]
        if channels_last:
            return torch.stack([y.permute(0, 2, 3, 1) for y in results]).permute(0, 1, 4, 2, 3)
        return torch.stack(results)

    return run


def _columns(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """A batched matrix product over the patches that the kernel sees."""
    models, outs, _, *kernel = weight.shape
    images = x.permute(0, 1, 3, 4, 2)
    if any(window.padding):
        top, left = window.padding
        images = F.pad(images, (0, 0, left, left, top, top))
    patches = images.unfold(2, kernel[0], window.stride[0]).unfold(3, kernel[1], window.stride[1])
    rows, height, width = patches.shape[1:4]
    weight = weight.permute(0, 3, 4, 2, 1).flatten(1, 3)
    patches = patches.permute(0, 1, 2, 3, 5, 6, 4).reshape(models, -1, weight.shape[1])
    if bias is None:
        y = torch.bmm(patches, weight)
    else:
        y = torch.baddbmm(expanded(bias, models).unsqueeze(1), patches, weight)
    return y.reshape(models, rows, height, width, outs).permute(0, 1, 4, 2, 3)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    return F.conv2d(x, weight, bias, *window)


def _packed(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """With weights in oneDNN's own layout: what depends on them alone is a step of its own."""
    stride, padding, dilation, groups = window
    packed = torch.ops.mkldnn._reorder_convolution_weight(
        weight, padding, stride, dilation, groups, x.shape
    )
    return torch.ops.mkldnn._convolution_pointwise(
        x, packed, bias, padding, stride, dilation, groups, "none", [], ""
    )


def _in_format(tensor: Tensor, channels_last: bool) -> Tensor:
    """With these strides, also where there is one channel."""
    return tensor.to(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


STRATEGIES: dict[str, Callable[[Tensor, Tensor, Tensor | None, Window], Tensor]] = {
    "channels": _channels(_plain, channels_last=False),
    "channels_last": _channels(_plain, channels_last=True),
    "channels_packed": _channels(_packed, channels_last=True),
    "loop": _loop(_plain, channels_last=False),
    "loop_last": _loop(_plain, channels_last=True),
    "loop_packed": _loop(_packed, channels_last=True),
    "columns": _columns,
}
