"""KnOTS: deltas merged in coordinates that they share, those of one SVD of them side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from merge.methods.averages import normalized
from merge.methods.subspaces import merge_matrices
from merge.part import Part


def knots(
    base: Float[Tensor, "*shape"],
    tensors: Sequence[Float[Tensor, "*shape"]],
    *,
    merge: str,
    weight: Sequence[float],
    density: Sequence[float],
    lambda_: float,
    drop_below: float,
    convolutions: str,
    part: Part,
) -> Float[Tensor, "*shape"]:
    """`W = b + λ U merge(σ V_1ᵀ, …, σ V_Nᵀ)`, `U diag(σ) [V_1ᵀ … V_Nᵀ] = [τ_1 … τ_N]` (2410.19735).

    Triplets with σ ≤ `drop_below` are left out. Each model keeps the `density` largest of its
    coordinates (`ties`), random ones divided by `density` (`dare_linear`, `dare_ties`) or all
    (`linear`). The result is `Σ a_k x_k / Σ a_k` over all models, or with `ties` and `dare_ties`
    over those whose a_k x_k has the sign of `Σ a_k x_k`. What is no matrix is averaged with
    the weights a_k. Raises MergeError where the weights to divide by sum to 0.

    (The eigenvectors of Σ τ_k τ_kᵀ are U too, and Uᵀ τ_k are the coordinates: cheaper, but with
    half the digits.)
    """

    def aligned(deltas: Sequence[Float[Tensor, "out in"]]) -> Float[Tensor, "out in"]:
        u, singular, vt = torch.linalg.svd(torch.cat(list(deltas), 1), full_matrices=False)
        rank = int((singular > drop_below).count_nonzero())
        coordinates = (singular[:rank, None] * vt[:rank]).chunk(len(deltas), 1)
        if rank == 0:
            return torch.zeros_like(deltas[0])
        kept = torch.stack(_kept(coordinates, merge, density, part))
        elect = merge.endswith("ties")
        factors = weight if elect else normalized(weight)
        weights = torch.tensor(factors, dtype=kept.dtype, device=kept.device)[:, None, None]
        return u[:, :rank] @ (_agreed_mean(kept, weights) if elect else (kept * weights).sum(0))

    return merge_matrices(base, tensors, lambda_, convolutions, aligned, weight)


def _kept(
    coordinates: Sequence[Float[Tensor, "rank in"]],
    merge: str,
    density: Sequence[float],
    part: Part,
) -> list[Float[Tensor, "rank in"]]:
    pairs = list(zip(coordinates, density, strict=True))
    if merge == "ties":
        return [one * _largest(one, share) for one, share in pairs]
    if merge == "linear":
        return list(coordinates)
    return [one * part.keep(k, share, one) / share for k, (one, share) in enumerate(pairs)]


def _largest(values: Float[Tensor, "rank in"], density: float) -> Bool[Tensor, "rank in"]:
    """The `density` (at least one) of the largest magnitude."""
    magnitudes = values.abs()
    count = max(int(values.numel() * density), 1)
    return magnitudes >= magnitudes.flatten().kthvalue(values.numel() - count + 1).values


def _agreed_mean(
    values: Float[Tensor, "models rank in"], weights: Float[Tensor, "models 1 1"]
) -> Float[Tensor, "rank in"]:
    """`Σ a_k x_k / Σ a_k` over the models for which a_k x_k has the sign of `Σ a_k x_k`."""
    weighted = values * weights
    agrees = weighted.sign() == weighted.sum(0).sign()
    share = (weights * agrees).sum(0)
    return torch.where(share == 0, 0.0, (weighted * agrees).sum(0) / share)
