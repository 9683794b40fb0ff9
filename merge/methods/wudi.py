"""WUDI-Merging: the delta that disturbs each model's delta the least, found by Adam."""

from __future__ import annotations

from collections.abc import Sequence

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
    """The gradient is `2 (τ A − B)`, A = Σ τ_kᵀ τ_k / ‖τ_k‖², B = Σ τ_k τ_kᵀ τ_k / ‖τ_k‖².

    With A and B known a step costs one product, whatever the number of models.
    """
    merged = sum_of(deltas)
    moved = [(delta, delta / norm) for delta in deltas if (norm := delta.norm()) > 0]
    if not moved:
        return merged
    gram, target = merged.new_zeros(merged.shape[1], merged.shape[1]), torch.zeros_like(merged)
    for delta, unit in moved:
        one = unit.mT @ unit
        target.addmm_(delta, one)
        gram += one
    mean, square = torch.zeros_like(merged), torch.zeros_like(merged)
    for step in range(1, iterations + 1):
        gradient = torch.addmm(target, merged, gram, beta=-2, alpha=2)
        mean.lerp_(gradient, 1 - MOMENTUM)
        square.mul_(SECOND_MOMENTUM).addcmul_(gradient, gradient, value=1 - SECOND_MOMENTUM)
        root = square.sqrt().div_((1 - SECOND_MOMENTUM**step) ** 0.5).add_(EPSILON)
        merged.addcdiv_(mean, root, value=-lr / (1 - MOMENTUM**step))
    return merged
