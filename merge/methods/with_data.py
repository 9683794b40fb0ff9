"""With data: averages weighted by what was gathered from each model on images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from merge.errors import MergeError

# Of Gram matrices stored in fp32, per √in: eigenvalues below are rounding, which a ridge of some
# times as much keeps from moving the result where there are no data.
SINGULAR, RIDGE = 2.0**-23, 2.0**-19


def fisher(
    base: None,
    tensors: Sequence[Float[Tensor, ...]],
    *,
    weight: Sequence[float],
    floor: float,
    statistics: Sequence[Float[Tensor, ...]] | None,
) -> Float[Tensor, ...]:
    """`W = Σ λ_k F_k w_k / Σ λ_k F_k` element by element (2111.09832), F_k at least `floor`.

    Where all λ_k F_k vanish, and without statistics, it is the weighted mean. `statistics` have the
    shape of the tensors. Raises MergeError if they have another, or the weights are all 0.
    """
    if statistics is None:
        return weighted_mean(tensors, weight)
    for k, (values, tensor) in enumerate(zip(statistics, tensors, strict=True)):
        if values.shape != tensor.shape:
            raise _wrong_shape("fisher", k, values, tensor, list(tensor.shape))
    used = _used(weight)
    shares = [statistics[k].clamp(min=floor).mul_(weight[k]) for k in used]
    total = shares[0].clone()
    for share in shares[1:]:
        total.add_(share)
    anchor = tensors[used[0]]
    result = anchor.clone()
    for k, share in zip(used[1:], shares[1:], strict=True):
        result.addcmul_(share.div_(total), tensors[k] - anchor)
    return torch.where(total > 0, result, weighted_mean(tensors, weight))


def regmean(
    base: None,
    tensors: Sequence[Float[Tensor, ...]],
    *,
    weight: Sequence[float],
    scale_off_diagonal: float,
    statistics: Sequence[Float[Tensor, "in in"]] | None,
) -> Float[Tensor, ...]:
    """`Wᵀ = (Σ λ_k G̃_k)⁻¹ Σ λ_k G̃_k W_kᵀ` for weights [out, in, …] (2212.09849), in float64.

    `G̃ = α·G + (1−α)·diag G` with α = `scale_off_diagonal`; G is [in, in], of the inputs or of a
    convolution's patches. Solved for the difference to the weighted mean, which is the result
    without statistics and for inputs that are always 0. Σ λ_k G̃_k is scaled to a diagonal of ones;
    only where it is singular then (a pivot below √in·2⁻²³) is a ridge of √in·2⁻¹⁹ added.
    Raises MergeError for statistics of another shape, those that are no Gram matrices, and weights
    that are all 0.
    """
    mean = weighted_mean(tensors, weight)
    if statistics is None:
        return mean
    for k, (gram, tensor) in enumerate(zip(statistics, tensors, strict=True)):
        wanted = [math.prod(tensor.shape[1:])] * 2 if tensor.ndim > 1 else None
        if list(gram.shape) != wanted:
            raise _wrong_shape("gram", k, gram, tensor, wanted)
    if mean.numel() == 0:
        return mean
    centre = mean.flatten(1).double()
    total = torch.zeros_like(statistics[0], dtype=torch.float64)
    pull = torch.zeros_like(centre.T)
    for k in _used(weight):
        gram = statistics[k].double() * (weight[k] * scale_off_diagonal)
        gram.diagonal().copy_(statistics[k].diagonal().double() * weight[k])
        total += gram
        pull.addmm_(gram, (tensors[k].flatten(1).double() - centre).T)
    return (centre + _solve(total, pull).T).to(mean.dtype).view_as(mean)


def weighted_mean(
    tensors: Sequence[Float[Tensor, ...]], weight: Sequence[float]
) -> Float[Tensor, ...]:
    """`Σ λ_k w_k / Σ λ_k`; of equal tensors, and of one weight that is not 0, bit for bit."""
    used = _used(weight)
    total = sum(weight)
    anchor = tensors[used[0]]
    result = anchor.clone()
    for k in used[1:]:
        result.add_(tensors[k] - anchor, alpha=weight[k] / total)
    return result


def _used(weight: Sequence[float]) -> list[int]:
    used = [k for k, one in enumerate(weight) if one > 0]
    if not used:
        raise MergeError(f"weight is {list(weight)}, wanted one above 0; give a model a weight")
    return used


def _solve(
    total: Float64[Tensor, "in in"], pull: Float64[Tensor, "in out"]
) -> Float64[Tensor, "in out"]:
    """`total⁻¹ pull`, by Cholesky with a diagonal of ones; 0 for inputs that are always 0."""
    energy = total.diagonal()
    scale = torch.where(energy > 0, energy.rsqrt(), 1.0)
    scaled = scale[:, None] * total * scale
    scaled.diagonal()[energy <= 0] = 1.0
    size = math.sqrt(len(total))
    factor, failed = torch.linalg.cholesky_ex(scaled)
    if failed or factor.diagonal().min() ** 2 < size * SINGULAR:
        scaled.diagonal().add_(size * RIDGE)
        factor, failed = torch.linalg.cholesky_ex(scaled)
    if failed:
        raise MergeError(
            "the statistics are no Gram matrices: their sum has negative or NaN eigenvalues, "
            f"even with {size * RIDGE:.1e} added to its diagonal of ones; gather them again"
        )
    return torch.cholesky_solve(scale[:, None] * pull, factor) * scale[:, None]


def _wrong_shape(
    kind: str, model: int, found: Tensor, tensor: Tensor, wanted: list[int] | None
) -> MergeError:
    return MergeError(
        f"the {kind} statistics of model {model} are {list(found.shape)} for a tensor of shape "
        f"{list(tensor.shape)}, wanted {wanted or 'none, as it is no matrix'}; gather them again "
        "for this model"
    )
