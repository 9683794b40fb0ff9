"""`F.multi_head_attention_forward` with a linear layer, attention and dropout of choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.errors import KernelError


class Attended(NamedTuple):
    """The mixed values [length, rows, width], and the weights where they were asked for."""

    output: Tensor
    weights: Tensor | None


Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Dropout = Callable[[Tensor, float], Tensor]


def multi_head_attention(
    linear: Linear,
    attention: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    *,
    dropout: Dropout | None = None,
) -> Attended:
    """Arguments and results of `F.multi_head_attention_forward`.

    Raises KernelError where widths do not fit, and for dropout in training without `dropout`.
    """
    rate = dropout_p if training else 0.0
    if rate and dropout is None:
        raise KernelError(f"multi-head attention without dropout, and it is {dropout_p}")
    if query.shape[-1] != embed_dim_to_check or embed_dim_to_check % num_heads:
        raise KernelError(
            f"multi-head attention: the query is {query.shape[-1]} wide, wanted "
            f"{embed_dim_to_check}, a multiple of {num_heads} heads"
        )
    if is_causal and attn_mask is None:
        raise KernelError("multi-head attention: is_causal says that attn_mask is causal; give it")
    without_rows = query.dim() == 2
    if without_rows:
        query, key, value = _with_rows(query, key, value)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    if use_separate_proj_weight:
        weights = [w for w in (q_proj_weight, k_proj_weight, v_proj_weight) if w is not None]
        projected = _project_apart(linear, (query, key, value), weights, in_proj_bias)
    else:
        assert in_proj_weight is not None
        projected = _project(linear, query, key, value, in_proj_weight, in_proj_bias)
    q, k, v = projected
    rows = query.shape[1]
    if bias_k is not None and bias_v is not None:
        k, v = (torch.cat([t, b.expand(1, rows, -1)]) for t, b in ((k, bias_k), (v, bias_v)))
    q, k, v = (_split_heads(t, num_heads) for t in (q, k, v))
    k = k if static_k is None else static_k.unflatten(0, (rows, num_heads))
    v = v if static_v is None else static_v.unflatten(0, (rows, num_heads))
    if add_zero_attn:
        k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
    # Where nothing else is masked, a mask that is known to be causal need not be read.
    causal = is_causal and key_padding_mask is None and not need_weights
    mask = None if causal else _merged(attn_mask, key_padding_mask, rows, k.shape[-2], q.dtype)
    if need_weights:
        weights = _weights(q, k, mask)
        weights = weights if dropout is None or not rate else dropout(weights, rate)
        mixed = weights @ v
        weights = weights.mean(dim=1) if average_attn_weights else weights
    else:
        mixed, weights = attention(q, k, v, mask, rate, is_causal=causal), None
    output = linear(mixed.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    if without_rows:
        return Attended(output.squeeze(1), None if weights is None else weights.squeeze(0))
    return Attended(output, weights)


def _with_rows(*inputs: Tensor) -> list[Tensor]:
    """A row axis for each; the same tensor stays the same, since that is looked at."""
    made = {id(tensor): tensor.unsqueeze(1) for tensor in inputs}
    return [made[id(tensor)] for tensor in inputs]


def _project(
    linear: Linear, query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None
) -> Sequence[Tensor]:
    """The three projections from packed weights; inputs that are the same share a product."""
    width = query.shape[-1]
    if query is key and key is value:
        return linear(query, weight, bias).chunk(3, dim=-1)
    if key is value:
        sizes = (width, 2 * width)
        biases = (None, None) if bias is None else bias.split(sizes)
        of_query, of_both = map(linear, (query, key), weight.split(sizes), biases)
        return of_query, *of_both.chunk(2, dim=-1)
    return _project_apart(linear, (query, key, value), weight.chunk(3), bias)


def _project_apart(
    linear: Linear, inputs: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None
) -> list[Tensor]:
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    return [*map(linear, inputs, weights, biases)]


def _split_heads(tensor: Tensor, heads: int) -> Tensor:
    """[length, rows, width] → [rows, heads, length, width / heads]."""
    return tensor.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)


def _merged(
    mask: Tensor | None, padding: Tensor | None, rows: int, keys: int, dtype: torch.dtype
) -> Tensor | None:
    """Both masks as one sum that broadcasts to [rows, heads, queries, keys].

    Keys that were added after the mask was made are open to all.
    """
    if mask is not None:
        mask = _added(mask, keys, dtype)
        mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (rows, -1))
    if padding is None:
        return mask
    padding = _added(padding, keys, dtype)[:, None, None]
    return padding if mask is None else mask + padding


def _added(mask: Tensor, keys: int, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
    return F.pad(mask, (0, keys - mask.shape[-1]))


def _weights(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return torch.softmax(scores if mask is None else scores + mask, dim=-1)
