"""Averages: points between the models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations_with_replacement

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from merge.errors import MergeError

Rows = tuple[tuple[float, ...], ...]
"""A matrix, row by row."""

SINGULAR = 1e-6  # denominators of model_stock that count as 0


def linear(
    base: None, tensors: Sequence[Float[Tensor, ...]], *, weight: Sequence[float], normalize: bool
) -> Float[Tensor, ...]:
    """`W = Σ a_k w_k / Σ a_k` (2203.05482); without `normalize`, `W = Σ a_k w_k`.

    Raises MergeError where weights to be normalized sum to 0.
    """
    return weighted_sum(tensors, normalized(weight) if normalize else weight)


def passthrough(
    base: None, tensors: Sequence[Float[Tensor, ...]], *, scale: Sequence[float | None]
) -> Float[Tensor, ...]:
    """`W = scale · w`; without a scale, w itself."""
    (tensor,), (factor,) = tensors, scale
    return tensor.clone() if factor is None else tensor * factor


def nearswap(
    base: Float[Tensor, ...], tensors: Sequence[Float[Tensor, ...]], *, t: float
) -> Float[Tensor, ...]:
    """`W = b + min(1, t/|w − b|)·(w − b)`, which is w clamped to [b − t, b + t]."""
    (tensor,) = tensors
    return torch.clamp(tensor, base - t, base + t)


def model_stock(
    base: Float[Tensor, ...],
    tensors: Sequence[Float[Tensor, ...]],
    *,
    filter_wise: bool,
    gram: Float64[Tensor, "models models"] | None,
) -> Float[Tensor, ...]:
    """`W = b + t·(mean w_k − b)`, `t = K cosθ / (1 + (K − 1) cosθ)` (2403.19522).

    cosθ is the mean cosine over the pairs of deltas, from their inner products `gram`; with
    `filter_wise`, of each slice along the first axis. A delta of zeros is at right angles to all.
    t is 0 where the denominator is.
    """
    count = len(tensors)
    if gram is None:
        # (b − w) rather than (w − b): equal zeros then keep their sign.
        deltas = torch.stack([base - tensor for tensor in tensors])
        ratio = _stock_ratio(_inner_products(deltas)).to(base.dtype)
        ratio = ratio.reshape([-1, *[1] * (base.ndim - 1)] if base.ndim > 1 else [])
        moved = deltas.sum(0).mul_(ratio / count)
        return torch.sub(base, moved, out=moved)
    t = _ratio_of_whole(rows_of(gram))
    return weighted_sum([base, *tensors], [1 - t, *[t / count] * count])


@lru_cache
def _ratio_of_whole(gram: Rows) -> float:
    return float(_stock_ratio(torch.tensor(gram, dtype=torch.float64)))


def _inner_products(
    deltas: Float[Tensor, "models ..."],
) -> Float64[Tensor, "filters models models"]:
    """⟨τ_i, τ_j⟩ for each slice along the first axis of the tensors; of a vector, one slice."""
    models = len(deltas)
    filters = deltas.flatten(2) if deltas.ndim > 2 else deltas.reshape(models, 1, -1)
    inner = deltas.new_zeros(filters.shape[1], models, models, dtype=torch.float64)
    for i, j in combinations_with_replacement(range(models), 2):
        product = (filters[i] * filters[j]).sum(-1, dtype=torch.float64)
        inner[:, i, j] = inner[:, j, i] = product
    return inner


def _stock_ratio(gram: Float64[Tensor, "*filters models models"]) -> Float64[Tensor, "*filters"]:
    """`K cosθ / (1 + (K − 1) cosθ)` with the mean of the pairs' cosines, 0 where singular."""
    count = gram.shape[-1]
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    lengths = norms.unsqueeze(-1) * norms.unsqueeze(-2)
    cosines = torch.where(lengths > 0, gram / lengths, 0.0).clamp(-1, 1)
    others = cosines.sum((-2, -1)) - cosines.diagonal(dim1=-2, dim2=-1).sum(-1)
    cosine = others / (count * (count - 1))
    denominator = 1 + (count - 1) * cosine
    return torch.where(denominator.abs() < SINGULAR, 0.0, count * cosine / denominator)


def weighted_sum(
    tensors: Sequence[Float[Tensor, ...]], weights: Sequence[float]
) -> Float[Tensor, ...]:
    """`Σ a_k w_k`, as `s·r − Σ a_k (r − w_k)` where r has the largest weight and `s = Σ a_k`.

    Of equal weights the first is r's; a weight of 0 leaves its tensor out. Equal tensors whose
    weights sum to 1 give that tensor, and slices the bits of the whole: those of `merge.combine`.
    """
    largest = max(range(len(weights)), key=lambda k: (weights[k] != 0, weights[k]))
    reference = tensors[largest]
    total = math.fsum(weights)
    result = torch.zeros_like(reference)
    difference = torch.empty_like(reference)
    for k, (tensor, weight) in enumerate(zip(tensors, weights, strict=True)):
        if weight != 0 and k != largest:
            # (r − w) rather than (w − r): equal zeros then keep their sign.
            torch.sub(reference, tensor, out=difference)
            result.add_(difference, alpha=weight)
    if abs(total - 1) > 1e-12:
        reference = torch.mul(reference, total, out=difference)
    return torch.sub(reference, result, out=result)


def rows_of(gram: Float64[Tensor, "rows columns"]) -> Rows:
    """A matrix that can be the key of a cache: all slices of a tensor come with the same one."""
    return tuple(map(tuple, gram.tolist()))


def normalized(weights: Sequence[float]) -> list[float]:
    """The weights divided by their sum; MergeError where that is 0."""
    total = math.fsum(weights)
    if abs(total) <= 1e-9 * math.fsum(map(abs, weights)):
        raise MergeError(
            f"the weights {list(weights)} sum to 0 and cannot be normalized; change one, or leave "
            "them as they are with normalize: false (multislerp: normalize_weights: false)"
        )
    return [weight / total for weight in weights]
