"""Layer and batch normalisation of several models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import beside, each, expanded, models_of, unfolded
from .strategies import capturing

WHOLE_VECTORS = 64
HALVES = (torch.bfloat16, torch.float16)


def grouped_layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`y[m] = (x[m] − mean) / √(var + eps) · weight[m] + bias[m]`, over the last axes.

    Everything is normalised at once, then scaled and shifted by model; 16 bit types in fp32.
    """
    shape = tuple(normalized_shape)
    if x.is_cuda and x.dtype in HALVES and torch.is_autocast_enabled("cuda"):
        x = x.float()  # as autocast has it for torch's
    if all(operand is None or len(operand) == 1 for operand in (weight, bias)):
        return F.layer_norm(x, shape, *(t if t is None else t[0] for t in (weight, bias)), eps=eps)
    wide = torch.float32 if x.dtype in HALVES else x.dtype
    ones = (1,) * (x.dim() - 1 - len(shape))
    # With a scale, even of ones, torch takes its faster path.
    y = F.layer_norm(x.to(wide), shape, x.new_ones(shape, dtype=wide), eps=eps)
    weight, bias = (
        t if t is None else t.to(wide).reshape(len(t), *ones, *shape) for t in (weight, bias)
    )
    if weight is not None and bias is not None and len(y) == models_of(y, weight, bias):
        scratch = None if torch.is_grad_enabled() or capturing() else y
        return torch.addcmul(bias, y, weight, out=scratch).to(x.dtype)
    return _scaled(y, weight, bias).to(x.dtype)


def _scaled(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None:
        return y if bias is None else y + bias
    return y * weight if bias is None else torch.addcmul(bias, y, weight)


def grouped_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`y[m] = (x[m] − mean[m]) / √(var[m] + eps) · weight[m] + bias[m]`, per channel."""

    def folded(weight: Tensor | None, bias: Tensor | None, training: bool) -> Tensor:
        return _folded(x, running_mean, running_var, weight, bias, training, momentum, eps)

    if running_mean is None or running_var is None or training:
        if models_of(x, running_mean) < models_of(x, weight, bias):
            return _affine(folded(None, None, True), weight, bias)
        return folded(weight, bias, True)
    if x.dtype in HALVES:
        return folded(weight, bias, False)
    scale = torch.rsqrt(running_var + eps)
    if weight is not None:
        scale = scale * weight
    shift = -running_mean * scale
    return _affine(x, scale, shift if bias is None else shift + bias)


def _affine(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """`x · scale + shift` by channel, one fused pass where the channels are adjacent in memory."""
    scale, shift = (t if t is None else beside(t.to(x.dtype), x.dim(), 2) for t in (scale, shift))
    if scale is None or shift is None or x.dim() == 3 or x.stride(2) == 1:
        return _scaled(x, scale, shift)
    return x * scale + shift


def _folded(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """One batch normalisation in which the models are channels more.

    In training one for each model where channels do not fill whole vectors: which of its channels
    share one, and so their rounding, is not to depend on the other models.
    """
    models = models_of(x, running_mean, weight, bias)
    if training and models > 1 and x.shape[2] % WHOLE_VECTORS:
        every = (each(t, models) for t in (x, running_mean, running_var, weight, bias))
        return torch.stack(
            [
                F.batch_norm(x, mean, variance, weight, bias, training, momentum, eps)
                for x, mean, variance, weight, bias in zip(*every, strict=True)
            ]
        )
    merged = _merged(expanded(x, models))
    mean, variance, weight, bias = (
        None if t is None else expanded(t, models).flatten()
        for t in (running_mean, running_var, weight, bias)
    )
    y = F.batch_norm(merged, mean, variance, weight, bias, training, momentum, eps)
    if training:
        _write_back(running_mean, mean)
        _write_back(running_var, variance)
    return unfolded(y, 1, models)


def _write_back(running: Tensor | None, updated: Tensor | None) -> None:
    """Statistics that are not contiguous were updated in a copy."""
    if running is not None and updated is not None and not running.is_contiguous():
        running.copy_(updated.view(running.shape))


def _merged(x: Tensor) -> Tensor:
    """[models, rows, channels, ...] → [rows, models · channels, ...], channels last if they are."""
    if x.dim() > 4 and x.stride(2) == 1:
        return x.permute(1, 3, 4, 0, 2).flatten(3).permute(0, 3, 1, 2)
    return x.transpose(0, 1).flatten(1, 2)
