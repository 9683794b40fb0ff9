"""Task vectors: sums of deltas to the base, thinned out, with or without a vote on the sign."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from merge.methods.selection import Kept
from merge.methods.sparsify import RescaleBy, drop, drop_by_rank
from merge.part import Part

Elect = Literal["sum", "count"]
NormalizeBy = Literal["weights", "count"]
Thin = Callable[[int, Tensor], Tensor]
"""(model, its delta) → what stays of the delta, which may be overwritten."""

SMALL_TOTAL = 1e-8  # weights with a smaller sum are not divided by it


def task_arithmetic(
    base: Float[Tensor, ...],
    tensors: Sequence[Float[Tensor, ...]],
    *,
    weight: Sequence[float],
    lambda_: float,
    normalize: bool,
    **unused: object,
) -> Float[Tensor, ...]:
    """`W = b + λ Σ a_k (w_k − b)` (2212.04089); with `normalize` the sum is divided by `Σ a_k`."""
    return _add(base, tensors, _all, weight, weight, lambda_, normalize)


def ties(
    base: Float[Tensor, ...],
    tensors: Sequence[Float[Tensor, ...]],
    *,
    measured: Sequence[Kept],
    part: Part,
    weight: Sequence[float],
    lambda_: float,
    normalize: bool,
    elect: Elect,
    normalize_by: NormalizeBy,
    **unused: object,
) -> Float[Tensor, ...]:
    """`W = b + λ Σ_{k agrees} a_k τ_k / Σ_{k agrees} a_k` (2306.01708).

    τ_k has the largest magnitudes of `w_k − b` (or a band of them: breadcrumbs), and zeros; a
    model agrees where `a_k τ_k` has the sign of the vote, that of `Σ a_k τ_k`.
    """
    thin, factors = _by_magnitude(measured, part, weight)
    return _vote(base, tensors, thin, weight, factors, lambda_, normalize, elect, normalize_by)


def breadcrumbs(
    base: Float[Tensor, ...],
    tensors: Sequence[Float[Tensor, ...]],
    *,
    measured: Sequence[Kept],
    part: Part,
    weight: Sequence[float],
    lambda_: float,
    normalize: bool,
    **unused: object,
) -> Float[Tensor, ...]:
    """`W = b + λ Σ a_k τ_k` (2312.06795), τ_k without the largest and the smallest magnitudes."""
    thin, factors = _by_magnitude(measured, part, weight)
    return _add(base, tensors, thin, weight, factors, lambda_, normalize)


def dare_linear(
    base: Float[Tensor, ...],
    tensors: Sequence[Float[Tensor, ...]],
    *,
    measured: Sequence[float],
    part: Part,
    weight: Sequence[float],
    density: Sequence[float],
    lambda_: float,
    normalize: bool,
    **unused: object,
) -> Float[Tensor, ...]:
    """`W = b + λ Σ a_k s_k (m_k ⊙ (w_k − b))` (2311.03099), m_k one with probability `density`."""
    thin = _by_chance(density, part)
    return _add(base, tensors, thin, weight, _scaled(weight, measured), lambda_, normalize)


def dare_ties(
    base: Float[Tensor, ...],
    tensors: Sequence[Float[Tensor, ...]],
    *,
    measured: Sequence[float],
    part: Part,
    weight: Sequence[float],
    density: Sequence[float],
    lambda_: float,
    normalize: bool,
    elect: Elect,
    normalize_by: NormalizeBy,
    **unused: object,
) -> Float[Tensor, ...]:
    """The deltas of `dare_linear` (2311.03099) with the vote of `ties`."""
    thin, factors = _by_chance(density, part), _scaled(weight, measured)
    return _vote(base, tensors, thin, weight, factors, lambda_, normalize, elect, normalize_by)


def della_linear(
    base: Float[Tensor, "*rows"],
    tensors: Sequence[Float[Tensor, "*rows"]],
    *,
    measured: Sequence[float],
    part: Part,
    weight: Sequence[float],
    density: Sequence[float],
    epsilon: Sequence[float],
    lambda_: float,
    normalize: bool,
    rescale: bool,
    rescale_by: RescaleBy,
    **unused: object,
) -> Float[Tensor, "*rows"]:
    """`W = b + λ Σ a_k s_k (m_k ⊙ (w_k − b))` (2406.11617).

    m_k is one with a probability from `density − epsilon` to `density + epsilon`, by the rank of
    the magnitude in its row.
    """
    thin = _by_rank(density, epsilon, part, rescale and rescale_by == "probability")
    return _add(base, tensors, thin, weight, _scaled(weight, measured), lambda_, normalize)


def della(
    base: Float[Tensor, "*rows"],
    tensors: Sequence[Float[Tensor, "*rows"]],
    *,
    measured: Sequence[float],
    part: Part,
    weight: Sequence[float],
    density: Sequence[float],
    epsilon: Sequence[float],
    lambda_: float,
    normalize: bool,
    rescale: bool,
    rescale_by: RescaleBy,
    elect: Elect,
    normalize_by: NormalizeBy,
    **unused: object,
) -> Float[Tensor, "*rows"]:
    """The deltas of `della_linear` (2406.11617) with the vote of `ties`."""
    thin = _by_rank(density, epsilon, part, rescale and rescale_by == "probability")
    factors = _scaled(weight, measured)
    return _vote(base, tensors, thin, weight, factors, lambda_, normalize, elect, normalize_by)


def _all(model: int, delta: Float[Tensor, ...]) -> Float[Tensor, ...]:
    return delta


def _by_magnitude(
    measured: Sequence[Kept], part: Part, weight: Sequence[float]
) -> tuple[Thin, list[float]]:
    def thin(model: int, delta: Float[Tensor, ...]) -> Float[Tensor, ...]:
        return measured[model].keep(delta, part.start)

    return thin, _scaled(weight, [kept.scale for kept in measured])


def _by_chance(density: Sequence[float], part: Part) -> Thin:
    def thin(model: int, delta: Float[Tensor, ...]) -> Float[Tensor, ...]:
        return drop(delta, density[model], part, model)

    return thin


def _by_rank(
    density: Sequence[float], epsilon: Sequence[float], part: Part, by_probability: bool
) -> Thin:
    def thin(model: int, delta: Float[Tensor, ...]) -> Float[Tensor, ...]:
        return drop_by_rank(
            delta, density[model], epsilon[model], part, model, by_probability=by_probability
        )

    return thin


def _scaled(weight: Sequence[float], scales: Sequence[float]) -> list[float]:
    return [one * scale for one, scale in zip(weight, scales, strict=True)]


def _add(
    base: Float[Tensor, ...],
    tensors: Sequence[Float[Tensor, ...]],
    thin: Thin,
    weight: Sequence[float],
    factors: Sequence[float],
    lambda_: float,
    normalize: bool,
) -> Float[Tensor, ...]:
    """`b + λ Σ f_k thin(w_k − b)`, the sum divided by `Σ a_k` with `normalize`."""
    total = torch.zeros_like(base)
    delta = torch.empty_like(base)
    for k, tensor in enumerate(tensors):
        total.add_(thin(k, torch.sub(tensor, base, out=delta)), alpha=factors[k])
    divisor = sum(weight) if normalize else 1.0
    if abs(divisor) < SMALL_TOTAL:
        divisor = 1.0
    return total.mul_(lambda_ / divisor).add_(base)


def _vote(
    base: Float[Tensor, ...],
    tensors: Sequence[Float[Tensor, ...]],
    thin: Thin,
    weight: Sequence[float],
    factors: Sequence[float],
    lambda_: float,
    normalize: bool,
    elect: Elect,
    normalize_by: NormalizeBy,
) -> Float[Tensor, ...]:
    """`b + λ Σ_{k agrees} x_k`, `x_k = f_k thin(w_k − b)`; with `normalize` over what agrees.

    The sign that is voted for is that of `Σ x_k`, or of `Σ sign(x_k)` by count, and + in a tie.
    """
    parts, votes = [], torch.zeros_like(base)
    for k, tensor in enumerate(tensors):
        one = thin(k, tensor - base).mul_(factors[k])
        votes.add_(one if elect == "sum" else one.sign())
        parts.append(one)
    sign = votes.ge_(0).mul_(2).sub_(1)
    total, divisor = torch.zeros_like(base), torch.zeros_like(base)
    for k, one in enumerate(parts):
        agreed = one.mul_(sign).relu_()
        total.add_(agreed)
        if normalize:
            divisor.add_(agreed.gt_(0), alpha=weight[k] if normalize_by == "weights" else 1)
    if normalize:
        total.div_(divisor.masked_fill_(divisor == 0, 1))
    return total.mul_(sign).mul_(lambda_).add_(base)
