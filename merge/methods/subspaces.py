"""Subspaces: deltas of matrices merged by their singular vectors.

All take full decompositions. Where only the leading vectors are used (`tsv_m`, and `iso_cts` for
each model) a randomised or Lanczos SVD would do; U Vᵀ alone could come from Newton's iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from merge.methods.averages import normalized

Triplets = tuple[Float[Tensor, "out _"], Float[Tensor, " _"], Float[Tensor, "_ in"]]
MatrixMerge = Callable[[Sequence[Float[Tensor, "out in"]]], Float[Tensor, "out in"]]


def iso_c(
    base: Float[Tensor, "*shape"],
    tensors: Sequence[Float[Tensor, "*shape"]],
    *,
    lambda_: float,
    convolutions: str,
) -> Float[Tensor, "*shape"]:
    """`W = b + λ σ̄ U Vᵀ` with `U diag(σ) Vᵀ = Σ τ_k` and σ̄ = mean(σ) (Iso-C, 2502.04959).

    What is no matrix is averaged; directions with σ = 0 stay zero.
    """

    def flatten_spectrum(deltas: Sequence[Float[Tensor, "out in"]]) -> Float[Tensor, "out in"]:
        u, singular, vt = leading(sum_of(deltas))
        return (u @ vt).mul_(singular.sum() / min(deltas[0].shape))

    return merge_matrices(base, tensors, lambda_, convolutions, flatten_spectrum)


def iso_cts(
    base: Float[Tensor, "*shape"],
    tensors: Sequence[Float[Tensor, "*shape"]],
    *,
    common_space_fraction: float,
    lambda_: float,
    convolutions: str,
) -> Float[Tensor, "*shape"]:
    """`W = b + λ σ̄ P Qᵀ` in common and task-specific subspaces (Iso-CTS, 2502.04959).

    U, V: the leading singular vectors of Σ τ_k, a `common_space_fraction` of all; U_k, V_k: those
    of τ_k − U Uᵀ τ_k, the rest of all in equal parts (rounded). P and Q are the orthogonal
    matrices nearest to [U_1 … U_N U] and [V_1 … V_N V], and σ̄ is the mean of their σ.
    """

    def common_and_own(deltas: Sequence[Float[Tensor, "out in"]]) -> Float[Tensor, "out in"]:
        full = min(deltas[0].shape)
        wanted = full - int(full * common_space_fraction)
        each = min(round(wanted / len(deltas)), full // len(deltas))
        common = leading(sum_of(deltas), full - each * len(deltas))
        own = [leading(_outside(common[0], d), each, scale=float(d.norm())) for d in deltas]
        left, singular, right = _joined([*own, common])
        return (nearest_orthogonal(left) @ nearest_orthogonal(right)).mul_(singular.sum() / full)

    return merge_matrices(base, tensors, lambda_, convolutions, common_and_own)


def tsv_m(
    base: Float[Tensor, "*shape"],
    tensors: Sequence[Float[Tensor, "*shape"]],
    *,
    lambda_: float,
    convolutions: str,
) -> Float[Tensor, "*shape"]:
    """`W = b + λ P diag(σ_1 … σ_N) Qᵀ` (TSV-Merge, 2412.00081).

    U_k, σ_k, V_k are the leading 1/N (at least one) of τ_k's singular triplets, P and Q the
    orthogonal matrices nearest to [U_1 … U_N] and [V_1 … V_N]. What is no matrix is averaged.
    """

    def decorrelate(deltas: Sequence[Float[Tensor, "out in"]]) -> Float[Tensor, "out in"]:
        each = max(min(deltas[0].shape) // len(deltas), 1)
        left, singular, right = _joined([leading(delta, each) for delta in deltas])
        return (nearest_orthogonal(left) * singular) @ nearest_orthogonal(right)

    return merge_matrices(base, tensors, lambda_, convolutions, decorrelate)


def merge_matrices(
    base: Float[Tensor, "*shape"],
    tensors: Sequence[Float[Tensor, "*shape"]],
    scale: float,
    convolutions: str,
    merge: MatrixMerge,
    weight: Sequence[float] | None = None,
) -> Float[Tensor, "*shape"]:
    """`b + scale·merge(τ_1, …, τ_N)` for a matrix, `b + scale·mean(τ_k)` for anything else.

    The mean has the weights `weight`, equal ones by default; MergeError where they sum to 0.

    With `convolutions` "matrix" a tensor [out, in, …] is the matrix [out, in·…]. Deltas that are
    not finite are averaged too, so that they show.
    """
    deltas = [tensor - base for tensor in tensors]
    is_matrix = base.dim() == 2 or (base.dim() > 2 and convolutions == "matrix")
    if is_matrix and base.numel() and all(bool(delta.isfinite().all()) for delta in deltas):
        merged = merge([delta.flatten(1) for delta in deltas]).view_as(base)
    else:
        shares = normalized(weight or [1.0] * len(deltas))
        merged = sum_of([delta.mul_(one) for delta, one in zip(deltas, shares, strict=True)])
    return torch.add(base, merged, alpha=scale)


def sum_of(tensors: Sequence[Float[Tensor, "*shape"]]) -> Float[Tensor, "*shape"]:
    """Their sum, in order, in fresh memory."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


def leading(
    matrix: Float[Tensor, "out in"], count: int | None = None, *, scale: float | None = None
) -> Triplets:
    """The leading singular triplets U, σ, Vᵀ: at most `count`, and only those with σ > 0.

    σ counts as zero up to the rounding error of a matrix with singular values up to `scale`
    (default: its own).
    """
    u, singular, vt = torch.linalg.svd(matrix, full_matrices=False)
    largest = float(singular[0]) if singular.numel() and scale is None else scale or 0.0
    zero = max(matrix.shape) * torch.finfo(matrix.dtype).eps * largest
    rank = int((singular[:count] > zero).count_nonzero())
    return u[:, :rank], singular[:rank], vt[:rank]


def nearest_orthogonal(matrix: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """`U Vᵀ` of its singular triplets with σ > 0: its nearest partial isometry.

    Of independent columns (or rows) that is the nearest matrix with orthonormal ones.
    """
    u, _, vt = leading(matrix)
    return u @ vt


def _outside(
    directions: Float[Tensor, "out rank"], matrix: Float[Tensor, "out in"]
) -> Float[Tensor, "out in"]:
    return matrix - directions @ (directions.mT @ matrix)


def _joined(parts: Sequence[Triplets]) -> Triplets:
    left, singular, right = zip(*parts, strict=True)
    return torch.cat(left, 1), torch.cat(singular), torch.cat(right, 0)
