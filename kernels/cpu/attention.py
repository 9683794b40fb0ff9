"""Scaled dot product attention of several models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import expanded, models_of


def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`y[m] = softmax(query[m] · key[m]ᵀ · scale + mask[m]) · value[m]`, one call for all.

    The fused kernels want [batch, heads, tokens, width]: the models and all axes before the heads
    become the batch.
    """
    models, dim = models_of(query, key, value, mask), query.dim()
    before = torch.broadcast_shapes(*(t.shape[1:-3] for t in (query, key, value) if t.dim() > 3))
    folded = (_folded(expanded(t, models), before) for t in (query, key, value))
    y = F.scaled_dot_product_attention(
        *folded,
        attn_mask=None if mask is None else _folded_mask(mask, models, before),
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    return y.reshape(models, *(before if dim > 3 else ()), *y.shape[1 if dim > 3 else 2 :])


def _folded(tensor: Tensor, before: torch.Size) -> Tensor:
    """[models, *before, heads, tokens, width] → [models · before, heads, tokens, width]."""
    if tensor.dim() == 3:
        return tensor.unsqueeze(1)
    return tensor.expand(len(tensor), *before, *tensor.shape[-3:]).flatten(0, -4)


def _folded_mask(mask: Tensor, models: int, before: torch.Size) -> Tensor:
    """The mask with the axes of `_folded`; where all of the batch shares it, a batch of one."""
    missing = len(before) + 4 - mask.dim()
    mask = mask.reshape(len(mask), *(1,) * missing, *mask.shape[1:])
    if mask.shape[:-3].numel() == 1:
        return mask.flatten(0, -4)
    return mask.expand(models, *before, *mask.shape[-3:]).flatten(0, -4)
