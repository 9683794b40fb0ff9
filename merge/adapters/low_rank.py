"""Matrices of low rank: sums of them compressed by their factors, dense ones truncated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# Up to this side a matrix is decomposed whole, through its Gram matrix in float64; larger ones
# are projected on random vectors first.
WHOLE_SIDE = 1024
OVERSAMPLE = 16
POWER_STEPS = 4
FIRST_GUESS = 64


@dataclass(frozen=True)
class Factors:
    """`b @ a` [out, in], and `‖M − b @ a‖ / ‖M‖` (Frobenius) for the M that it stands for."""

    b: Float[Tensor, "out rank"]
    a: Float[Tensor, "rank in"]
    relative_error: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def stacked(terms: Sequence[tuple[Tensor, Tensor, float]]) -> Factors:
    """`Σ_k c_k · B_k @ A_k` exactly, of rank `Σ r_k`: the factors side by side, of (B, A, c)."""
    b = torch.cat([b * scale for b, _, scale in terms], 1)
    return Factors(b, torch.cat([a for _, a, _ in terms]), 0.0)


def compressed(factors: Factors, rank: int | None) -> Factors:
    """The best approximation of `b @ a` of at most `rank`; without one, all but rounding.

    `b = Q_b R_b`, `aᵀ = Q_a R_a`, and the SVD of `R_b R_aᵀ`, in float64: the matrix itself is
    never formed. The rank is at least one.
    """
    q_b, r_b = torch.linalg.qr(factors.b.double())
    q_a, r_a = torch.linalg.qr(factors.a.double().T)
    u, singular, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    size = torch.linalg.vector_norm(r_b) * torch.linalg.vector_norm(r_a)
    singular = singular.where(singular > 8 * torch.finfo(torch.float64).eps * size, 0)
    keep = max(int((singular > torch.finfo(torch.float32).eps * singular[:1]).sum()), 1)
    if rank is not None:
        keep = min(keep, rank)
    root = singular[:keep].sqrt()
    b, a = (q_b @ u[:, :keep]) * root, root[:, None] * (v[:keep] @ q_a.T)
    total = float(singular.square().sum())
    error = math.sqrt(float(singular[keep:].square().sum()) / total) if total else 0.0
    return Factors(b, a, error)


def truncated(
    matrix: Float[Tensor, "out in"],
    *,
    rank: int | None,
    energy: float | None,
    generator: torch.Generator,
) -> Factors:
    """The SVD of `matrix`, cut to `rank` and to the least rank that holds `energy` of `Σ σ²`.

    Exact up to a smaller side of 1024, by random projections with power steps (0909.4061) beyond,
    where the singular values come out a little too small. The error is measured on the result.
    """
    side = min(matrix.shape)
    most = side if rank is None else min(rank, side)
    total = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
    guess = side if side <= WHOLE_SIDE else most if rank is not None else FIRST_GUESS
    while True:
        guess = side if 2 * (guess + OVERSAMPLE) >= side else guess
        u, squares = _left_vectors(matrix, guess, generator)
        keep = most if energy is None else _enough(squares, energy * total)
        if keep <= guess or guess >= most:
            break
        guess *= 2
    u = u[:, : max(min(keep, most), 1)]
    a = u.T @ matrix.to(u.dtype)
    # Both factors with the square root of the singular values: neither leaves the range of fp16.
    root = torch.linalg.vector_norm(a, dim=1).sqrt()
    scale = torch.where(root > 0, root, torch.ones_like(root))
    b, a = (u * root).to(matrix.dtype), (a / scale[:, None]).to(matrix.dtype)
    return Factors(b, a, _relative_error(matrix, b, a, total))


def _enough(squares: Float[Tensor, " rank"], wanted: float) -> int:
    """How many of the descending `squares` add up to `wanted`; one more than all if they do not."""
    reached = squares.cumsum(0) >= wanted * (1 - 1e-12)
    return int(reached.to(torch.uint8).argmax()) + 1 if bool(reached.any()) else len(squares) + 1


def _left_vectors(
    matrix: Float[Tensor, "out in"], count: int, generator: torch.Generator
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, " rank"]]:
    """The first `count` left singular vectors, and the squares of their singular values."""
    side = min(matrix.shape)
    if count < side:
        basis = _range(matrix, count + OVERSAMPLE, generator)
        inner = (basis.T @ matrix).double()
        squares, vectors = torch.linalg.eigh(inner @ inner.T)
        vectors = basis @ vectors.to(matrix.dtype)
    else:
        wide = matrix.double() if matrix.shape[0] == side else matrix.double().T
        squares, vectors = torch.linalg.eigh(wide @ wide.T)
        if matrix.shape[0] != side:  # right vectors of `matrix`; its left ones are M v / σ
            vectors = torch.linalg.qr(wide.T @ vectors.flip(1))[0].flip(1)
    return vectors.flip(1)[:, :count], squares.flip(0)[:count].clamp(min=0)


def _range(
    matrix: Float[Tensor, "out in"], count: int, generator: torch.Generator
) -> Float[Tensor, "out count"]:
    """An orthonormal basis that nearly holds the first left singular vectors."""
    draw = torch.randn(matrix.shape[1], count, generator=generator, dtype=matrix.dtype)
    basis = torch.linalg.qr(matrix @ draw)[0]
    for _ in range(POWER_STEPS):
        basis = torch.linalg.qr(matrix.T @ basis)[0]
        basis = torch.linalg.qr(matrix @ basis)[0]
    return basis


def _relative_error(matrix: Tensor, b: Tensor, a: Tensor, total: float) -> float:
    if not total:
        return 0.0
    rest = torch.linalg.vector_norm(matrix - b @ a, dtype=torch.float64)
    return float(rest) / math.sqrt(total)
