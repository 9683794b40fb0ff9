"""Embedding tables of several models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_embedding(ids: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    """`y[m] = weight[m][ids[m]]`; the gradient of row `padding_idx` is 0."""
    models, entries, _ = weight.shape
    if models == 1:
        return F.embedding(ids, weight[0], padding_idx)
    y = F.embedding(_in_one_table(ids, models, entries), weight.flatten(0, 1))
    if padding_idx is None:
        return y
    return torch.where((ids == padding_idx % entries).unsqueeze(-1), y.detach(), y)


def _in_one_table(ids: Tensor, models: int, entries: int) -> Tensor:
    """Each model's ids in the table of all; an id that is outside of its own is outside of it."""
    offsets = torch.arange(0, models * entries, entries, device=ids.device)
    outside = (ids < 0) | (ids >= entries)
    shifted = ids + offsets.reshape(models, *(1,) * (ids.dim() - 1))
    return torch.where(outside, models * entries, shifted)
