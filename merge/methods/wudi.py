"""WUDI-Merging: the delta that disturbs each model's delta the least, found by Adam."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from merge.methods.subspaces import merge_matrices, sum_of

MOMENTUM, SECOND_MOMENTUM, EPSILON = 0.9, 0.999, 1e-8  # Adam's own defaults


def wudi(
    base: Float[Tensor, "*shape"],
    tensors: Sequence[Float[Tensor, "*shape"]],
    *,
    iterations: int,
    lr: float,
    convolutions: str,
) -> Float[Tensor, "*shape"]:
    """`W = b + argmin_τ Σ ‖(τ − τ_k) τ_kᵀ‖² / ‖τ_k‖²` (2503.08099).

    Approached by `iterations` steps of Adam from Σ τ_k on. What is no matrix is averaged.
    """

    def least_interference(deltas: Sequence[Float[Tensor, "out in"]]) -> Float[Tensor, "out in"]:
        return _minimise(deltas, iterations, lr)

    return merge_matrices(base, tensors, 1.0, convolutions, least_interference)


def _minimise(
    deltas: Sequence[Float[Tensor, "out in"]], iterations: int, lr: float
) -> Float[Tensor, "out in"]:
    """The gradient is `2 (τ A − B)`, A = Σ u_kᵀ u_k, B = Σ τ_k u_kᵀ u_k, u_k = τ_k / ‖τ_k‖."""
    merged = sum_of(deltas)
    moved = [(delta / norm, norm) for delta in deltas if (norm := delta.norm()) > 0]
    if not moved:
        return merged
    units = [unit for unit, _ in moved]
    through = _factored(units) if len(units) * merged.shape[0] < merged.shape[1] else _gram(units)
    target = torch.zeros_like(merged)
    for unit, norm in moved:
        target.add_(_cube(unit), alpha=float(norm))
    mean, square = torch.zeros_like(merged), torch.zeros_like(merged)
    for step in range(1, iterations + 1):
        gradient = through(merged).sub_(target).mul_(2)
        mean.lerp_(gradient, 1 - MOMENTUM)
        square.mul_(SECOND_MOMENTUM).addcmul_(gradient, gradient, value=1 - SECOND_MOMENTUM)
        root = square.sqrt().div_((1 - SECOND_MOMENTUM**step) ** 0.5).add_(EPSILON)
        merged.addcdiv_(mean, root, value=-lr / (1 - MOMENTUM**step))
    return merged


def _gram(units: Sequence[Float[Tensor, "out in"]]) -> Callable[[Tensor], Tensor]:
    """`τ → τ A` by A [in, in]: one product, whatever the number of models."""
    gram = units[0].mT @ units[0]
    for unit in units[1:]:
        gram.addmm_(unit.mT, unit)
    return lambda merged: merged @ gram


def _factored(units: Sequence[Float[Tensor, "out in"]]) -> Callable[[Tensor], Tensor]:
    """`τ → τ A` as `Σ (τ u_kᵀ) u_k`, where A would be larger than all of the u_k."""

    def through(merged: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        total = torch.zeros_like(merged)
        for unit in units:
            total.addmm_(merged @ unit.mT, unit)
        return total

    return through


def _cube(unit: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """`u uᵀ u`, by way of the smaller matrix."""
    if unit.shape[0] <= unit.shape[1]:
        return (unit @ unit.mT) @ unit
    return unit @ (unit.mT @ unit)
