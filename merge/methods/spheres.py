"""Averages on the sphere: arcs and mean directions.

The result is a linear combination of the inputs whose weights follow from their inner products,
so tensors of any size are read once for these and once for the sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from merge.errors import MergeError
from merge.methods.averages import Rows, normalized, rows_of, weighted_sum

STRAIGHT_COSINE = 0.9995  # slerp goes along the chord above
STRAIGHT_SINE = 1e-3  # nuslerp goes along the chord below
SHORTEST = 1e-8  # norms below are none for slerp
SHORTEST_RUN = 1e-7  # norms below count as this for nuslerp

# What fp32 inner products may be wrong by, of their terms. What is one direction to this is one, so
# that equal tensors are given back as they are; what cancels to this is 0.
SAME = 3e-7


def slerp(
    base: Float[Tensor, ...],
    tensors: Sequence[Float[Tensor, ...]],
    *,
    t: float,
    gram: Float64[Tensor, "2 2"],
) -> Float[Tensor, ...]:
    """`W = (sin((1 − t)θ) b + sin(tθ) w) / sinθ`, θ the angle between base and model.

    `W = (1 − t) b + t w` where |cosθ| > 0.9995. A tensor of zeros is at right angles to another.
    """
    (bb, bw), (_, ww) = gram.tolist()
    lengths = [math.sqrt(square) for square in (bb, ww)]
    if max(lengths) <= SHORTEST:
        return weighted_sum([base, *tensors], [1 - t, t])
    scale = math.prod(length if length > SHORTEST else 1.0 for length in lengths)
    cosine = min(max(bw / scale, -1.0), 1.0)
    straight = abs(cosine) > STRAIGHT_COSINE
    weights = [1 - t, t] if straight else _arc(math.acos(cosine), t)
    return weighted_sum([base, *tensors], weights)


def _arc(angle: float, t: float) -> list[float]:
    return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]


def nuslerp(
    base: Float[Tensor, ...] | None,
    tensors: Sequence[Float[Tensor, ...]],
    *,
    weight: Sequence[float],
    nuslerp_flatten: bool,
    nuslerp_row_wise: bool,
    gram: Float64[Tensor, "2 2"] | None,
) -> Float[Tensor, ...]:
    """`W = b + (sin((1 − t)θ) τ_1 + sin(tθ) τ_2) / sinθ`, `t = a_2 / (a_1 + a_2)`, ½ without a sum.

    Without a base τ_k = w_k. `W = b + (1 − t) τ_1 + t τ_2` where sinθ < 0.001. Without
    `nuslerp_flatten`, θ is that of each run along the last axis, `nuslerp_row_wise`: the first.
    """
    total = sum(weight)
    t = 0.5 if abs(total) < 1e-6 else weight[1] / total
    if gram is None:
        return _arcs_of_runs(base, tensors, t, 0 if nuslerp_row_wise else -1)
    first, second = _nuslerp_weights(rows_of(gram), t)
    if base is None:
        return weighted_sum(tensors, [first, second])
    return weighted_sum([base, *tensors], [1 - first - second, first, second])


@lru_cache
def _nuslerp_weights(gram: Rows, t: float) -> tuple[float, float]:
    inner = torch.tensor(gram, dtype=torch.float64)
    first, second = _arcs(inner[0, 0], inner[1, 1], inner[0, 1], t)
    return float(first), float(second)


def _arcs_of_runs(
    base: Float[Tensor, ...] | None, tensors: Sequence[Float[Tensor, ...]], t: float, axis: int
) -> Float[Tensor, ...]:
    """`nuslerp` with an angle for each run along the axis."""
    # (b − w) rather than (w − b): equal zeros then keep their sign.
    one, two = tensors if base is None else [base - tensor for tensor in tensors]

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum(axis, keepdim=True, dtype=torch.float64)

    arcs = _arcs(inner(one, one), inner(two, two), inner(one, two), t)
    first, second = (weights.to(one.dtype) for weights in arcs)
    moved = one * first + two * second
    return moved if base is None else base - moved


def _arcs(
    one: Float64[Tensor, "*runs"],
    two: Float64[Tensor, "*runs"],
    both: Float64[Tensor, "*runs"],
    t: float,
) -> tuple[Float64[Tensor, "*runs"], Float64[Tensor, "*runs"]]:
    """The weights of two vectors along their arc, from their inner products."""
    lengths = one.sqrt().clamp(min=SHORTEST_RUN) * two.sqrt().clamp(min=SHORTEST_RUN)
    cosine = (both / lengths).clamp(-1, 1)
    nothing = torch.maximum(one, two) < SHORTEST_RUN**2
    straight = (1 - cosine.square() < STRAIGHT_SINE**2) | nothing
    angle = torch.acos(torch.where(straight, 0.0, cosine))
    sine = angle.sin()
    return (
        torch.where(straight, 1 - t, ((1 - t) * angle).sin() / sine),
        torch.where(straight, t, (t * angle).sin() / sine),
    )


def multislerp(
    base: Float[Tensor, ...] | None,
    tensors: Sequence[Float[Tensor, ...]],
    *,
    weight: Sequence[float],
    normalize_weights: bool,
    eps: float,
    gram: Float64[Tensor, "models models"],
) -> Float[Tensor, ...]:
    """`W = b + (Σ a_k |τ_k|)·s/|s|`, `s = Σ a_k τ_k / (|τ_k| + eps)`; without a base τ_k = w_k.

    One model is returned as it is. Where the terms of s cancel (|s| < eps, or < 0.0005 of theirs),
    two models are averaged; of more, MergeError.
    """
    if len(tensors) == 1:
        return tensors[0].clone()
    shares = tuple(normalized(weight) if normalize_weights else weight)
    weights = _multislerp_weights(rows_of(gram), shares, eps)
    if base is None:
        return weighted_sum(tensors, weights)
    return weighted_sum([base, *tensors], [1 - math.fsum(weights), *weights])


@lru_cache
def _multislerp_weights(gram: Rows, shares: tuple[float, ...], eps: float) -> tuple[float, ...]:
    inner = np.array(gram)
    if not np.isfinite(inner).all():
        return (math.nan,) * len(inner)
    norms = np.sqrt(inner.diagonal())
    units = np.array(shares) / (norms + eps)
    length = _length(units, inner)
    if length >= eps:
        return tuple((float(shares @ norms) / length * units).tolist())
    if len(shares) == 2 or not norms.any():
        return shares
    raise MergeError(
        f"multislerp: the directions of {len(shares)} tensors balance out with the weights "
        f"{list(shares)}, so that their mean points nowhere; change the weights"
    )


def karcher(
    base: None,
    tensors: Sequence[Float[Tensor, ...]],
    *,
    max_iter: int,
    tol: float,
    gram: Float64[Tensor, "models models"],
) -> Float[Tensor, ...]:
    """`W = mean |w_k| · m`, m the unit vector with the least `Σ θ(m, w_k)²` (2603.04972).

    m starts at the mean direction (where there is none, at the first) and moves by the mean of
    `log_m(w_k/|w_k|)`, in the span of the models, until that is shorter than `tol` or `max_iter`
    times. Tensors of zeros have no direction. One model is returned as it is.
    """
    if len(tensors) == 1:
        return tensors[0].clone()
    return weighted_sum(tensors, _karcher_weights(rows_of(gram), max_iter, tol))


@lru_cache
def _karcher_weights(gram: Rows, max_iter: int, tol: float) -> tuple[float, ...]:
    inner = np.array(gram)
    if not np.isfinite(inner).all():
        return (math.nan,) * len(inner)
    norms = np.sqrt(inner.diagonal())
    there = np.flatnonzero(norms)
    weights = np.zeros(len(norms))
    if there.size:
        cosines = inner[np.ix_(there, there)] / np.outer(norms[there], norms[there])
        weights[there] = norms.mean() * _mean_direction(cosines, max_iter, tol) / norms[there]
    return tuple(weights.tolist())


def _mean_direction(
    cosines: Float64[np.ndarray, "models models"], max_iter: int, tol: float
) -> Float64[np.ndarray, " models"]:
    """The Karcher mean of unit vectors with these inner products, as weights of them."""
    shares = np.full(len(cosines), 1 / len(cosines))
    length = _length(shares, cosines)
    mean = shares / length if length >= tol else np.eye(len(cosines))[0]
    for _ in range(max_iter):
        along = np.clip(cosines @ mean, -1.0, 1.0)
        angles = np.arccos(along)
        # Nothing is known of the way to where m itself, or its opposite, is.
        known = (angles >= tol) & (np.pi - angles >= tol)
        pull = np.where(known, shares * angles / np.where(known, np.sin(angles), 1.0), 0.0)
        step = pull - (pull @ along) * mean
        size = math.sqrt(max(step @ cosines @ step, 0.0))
        if size < tol:
            break
        mean = math.cos(size) * mean + math.sin(size) / size * step
        mean = mean / _length(mean, cosines)
    return mean


def _length(
    weights: Float64[np.ndarray, " models"], inner: Float64[np.ndarray, "models models"]
) -> float:
    """The norm of a combination of vectors with these inner products.

    As far as can be told: 0 where they cancel, the sum of theirs where they point one way.
    """
    square = float(weights @ inner @ weights)
    terms = weights * np.sqrt(inner.diagonal())
    if square <= SAME * np.abs(terms).sum() ** 2:
        return 0.0
    reach = abs(float(terms.sum()))
    return reach if abs(square - reach**2) <= SAME * reach**2 else math.sqrt(square)
