"""Agreement: which elements of the deltas to keep, from how the models compare there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from merge.measuring import See
from merge.mixing import CHUNK

LEAST_WEIGHT = 1e-6  # the least sum of weights that `sce` divides by
LEAST_SCALE = 1e-12  # the least sum of scales that `pcb` divides by


class MeanSquare:
    """The mean square of a delta of `numel` elements; not `wanted`, 0."""

    def __init__(self, numel: int, *, wanted: bool) -> None:
        self._numel = numel
        self._wanted = wanted
        self._squares = 0.0

    @property
    def passes(self) -> tuple[See, ...]:
        """What is to be shown every slice."""
        return (self._add,) if self._wanted else ()

    def result(self) -> float:
        """The mean square of all that was shown."""
        return self._squares / max(self._numel, 1)

    def _add(self, start: int, base: Float[Tensor, ...], tensor: Float[Tensor, ...]) -> None:
        self._squares += float((tensor - base).square_().sum())


def measure_sce(*, numel: int, select_topk: float, **unused: object) -> MeanSquare:
    """The mean square of the delta, where all of it is selected; else `sce` itself finds it."""
    return MeanSquare(numel, wanted=select_topk == 1)


def sce(
    base: Float[Tensor, "*shape"],
    tensors: Sequence[Float[Tensor, "*shape"]],
    *,
    select_topk: float,
    equal_below: float,
    int8_mask: bool,
    measured: Sequence[float],
) -> Float[Tensor, "*shape"]:
    """`W = b + Σ c_k e_k τ̂_k / Σ c_k e_k` (2408.07990).

    τ̂ are the deltas where their variance over the models is among the largest `select_topk` of
    those that are not zero (elsewhere 0; of equal variances at the border the first are taken),
    c_k the models' shares of Σ mean(τ̂_k²), and e_k is 1 where τ̂_k has the sign of Σ τ̂ (that of 0
    is +).
    """
    flat, flats = base.reshape(-1), [tensor.reshape(-1) for tensor in tensors]
    selected, energies = None, measured
    if select_topk < 1:
        selected = _most_varied(flat, flats, select_topk)
        energies = _mean_squares(flat, flats, selected)
    weights = base.new_tensor(_shares(energies, equal_below))[:, None]
    result = torch.empty_like(flat)
    for part, deltas in _selected_deltas(flat, flats, selected):
        sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0).to(deltas.dtype)
        agreeing = deltas.mul_(sign).relu_()
        share = ((agreeing > 0) * weights).sum(0).clamp_(min=LEAST_WEIGHT)
        merged = agreeing.mul_(weights).sum(0).mul_(sign).div_(share)
        torch.add(flat[part], merged, out=result[part])
    return result.view_as(base)


def magmax(
    base: Float[Tensor, "*shape"], tensors: Sequence[Float[Tensor, "*shape"]], *, lambda_: float
) -> Float[Tensor, "*shape"]:
    """`W = b + λ τ_j`, `j = argmax_k |τ_k|` for each element (2403.01753); of equals the positive.

    That delta is the largest or the least of all.
    """
    largest, least = tensors[0] - base, tensors[0] - base
    for tensor in tensors[1:]:
        delta = tensor - base
        torch.maximum(largest, delta, out=largest)
        torch.minimum(least, delta, out=least)
    chosen = torch.where(largest >= -least, largest, least)
    return torch.add(base, chosen, alpha=lambda_)


def consensus(
    base: Float[Tensor, "*shape"],
    tensors: Sequence[Float[Tensor, "*shape"]],
    *,
    mask_lambda: Sequence[float],
    k: int,
    lambda_: float,
) -> Float[Tensor, "*shape"]:
    """`W = b + λ m τ` with τ = Σ τ_k (2405.07813).

    m keeps the elements for which |τ_k| ≥ mask_lambda_k·|τ − τ_k| in at least `k` models.
    """
    deltas = [tensor - base for tensor in tensors]
    total = torch.stack(deltas).sum(0)
    votes = torch.zeros_like(total)
    for delta, one in zip(deltas, mask_lambda, strict=True):
        others = torch.sub(total, delta).abs_().mul_(one)
        votes += delta.abs_() >= others
    total.mul_(votes >= k)
    return torch.add(base, total, alpha=lambda_)


def lines(
    base: Float[Tensor, "*shape"],
    tensors: Sequence[Float[Tensor, "*shape"]],
    *,
    alpha: float | None,
    beta: float | None,
    depth: float,
) -> Float[Tensor, "*shape"]:
    """`W = b + (alpha + beta·depth) Σ τ_k` (2410.17146).

    `alpha` unset is 1/N for N models, and `beta` unset is 1 − alpha.
    """
    first = 1 / len(tensors) if alpha is None else alpha
    scale = first + (1 - first if beta is None else beta) * depth
    total = tensors[0] - base
    for tensor in tensors[1:]:
        total += tensor - base
    return torch.add(base, total, alpha=scale)


def pcb(
    base: Float[Tensor, "*shape"],
    tensors: Sequence[Float[Tensor, "*shape"]],
    *,
    density: float,
    clamp: float,
    lambda_: float,
) -> Float[Tensor, "*shape"]:
    """`W = b + λ Σ s_k τ_k / Σ s_k` (2410.02396), the τ_k in the sums clamped in magnitude.

    `s_k = norm(top(exp(N·norm(|τ_k|)²)·tanh(τ_k Σ_j τ_j)))` for N models: `norm` maps the least and
    the largest of a model's elements to 0 and 1, `top` raises all but the largest `density` of them
    to the least of those. Where these are all equal, each that is not zero has the scale 1.
    """
    if base.numel() == 0:
        return base.clone()
    total = tensors[0] - base
    for tensor in tensors[1:]:
        total += tensor - base
    merged, weight = torch.zeros_like(total), torch.zeros_like(total)
    for tensor in tensors:
        delta = tensor - base
        magnitudes = _clamp_magnitudes(delta, clamp)
        scale = _competition(delta, magnitudes, total, len(tensors), density)
        merged.addcmul_(magnitudes.mul_(delta.sign()), scale)
        weight += scale
    return torch.add(base, merged.div_(weight.clamp_(min=LEAST_SCALE)), alpha=lambda_)


# --- Select, calculate, erase -------------------------------------------------------------------


def _selected_deltas(
    base: Float[Tensor, " numel"],
    tensors: Sequence[Float[Tensor, " numel"]],
    selected: Bool[Tensor, " numel"] | None,
) -> Iterator[tuple[slice, Float[Tensor, "models part"]]]:
    """Fresh deltas in parts that stay in the cache; zero where not `selected`."""
    for start in range(0, base.numel(), CHUNK):
        part = slice(start, start + CHUNK)
        deltas = torch.stack([tensor[part] for tensor in tensors]).sub_(base[part])
        yield part, deltas if selected is None else deltas.mul_(selected[part])


def _most_varied(
    base: Float[Tensor, " numel"], tensors: Sequence[Float[Tensor, " numel"]], share: float
) -> Bool[Tensor, " numel"]:
    """Where the variance over the models is among the largest `share` of those above zero."""
    variances = torch.empty_like(base)
    for part, deltas in _selected_deltas(base, tensors, None):
        # Differences to the first model: exactly zero where all are equal.
        deltas -= deltas[0].clone()
        variances[part] = deltas.sub_(deltas.mean(0)).square_().mean(0)
    # In fp32, so that 0.29 of 100 is 29.
    count = int(np.float32(int(variances.count_nonzero())) * np.float32(share))
    if count == 0:
        return torch.zeros_like(variances, dtype=torch.bool)
    border = _ranked(variances, variances.numel() - count)
    selected = variances > border
    equal = (variances == border).nonzero().squeeze(1)
    selected[equal[: count - int(selected.count_nonzero())]] = True
    return selected


def _mean_squares(
    base: Float[Tensor, " numel"],
    tensors: Sequence[Float[Tensor, " numel"]],
    selected: Bool[Tensor, " numel"],
) -> list[float]:
    """The mean square of each selected delta."""
    squares = torch.zeros(len(tensors), dtype=torch.float64, device=base.device)
    for _, deltas in _selected_deltas(base, tensors, selected):
        squares += deltas.square_().sum(1).double()
    return (squares / max(base.numel(), 1)).tolist()


def _shares(energies: Sequence[float], equal_below: float) -> list[float]:
    """Each model's share of the energies; equal shares where they sum to less than that."""
    total = math.fsum(energies)
    if total < equal_below or total == 0:
        return [1 / len(energies)] * len(energies)
    return [energy / total for energy in energies]


def _ranked(values: Float[Tensor, "*shape"], rank: int) -> Float[Tensor, ""]:
    """The element that is `rank` places above the least."""
    flat = values.reshape(-1)
    if flat.is_cpu:  # twice as fast as torch
        return flat.new_tensor(np.partition(flat.numpy(), rank)[rank])
    return flat.kthvalue(rank + 1).values


# --- Parameter competition ----------------------------------------------------------------------


def _clamp_magnitudes(delta: Float[Tensor, "*shape"], share: float) -> Float[Tensor, "*shape"]:
    """Its magnitudes, clamped to between their quantiles `share` and 1 − `share`."""
    magnitudes = delta.abs()
    outside = int(delta.numel() * share)
    least = _ranked(magnitudes, outside)
    return magnitudes.clamp_(least, _ranked(magnitudes, delta.numel() - 1 - outside))


def _competition(
    delta: Float[Tensor, "*shape"],
    magnitudes: Float[Tensor, "*shape"],
    total: Float[Tensor, "*shape"],
    models: int,
    density: float,
) -> Float[Tensor, "*shape"]:
    """One model's scales: `norm(top(exp(N·norm(|τ_k|)²)·tanh(τ_k Σ_j τ_j)))`."""
    # exp(N·x²) / exp(N), which the second norm takes out again: it cannot overflow.
    own = _unit_range(magnitudes).square_().sub_(1).mul_(models).exp_()
    score = torch.mul(delta, total).tanh_().mul_(own)
    least = _ranked(score, min(int(score.numel() * (1 - density)), score.numel() - 1))
    if bool(score.max() > least):
        return _unit_range(score.clamp_(min=least))
    return ((score >= least) & (delta != 0)).to(delta.dtype)


def _unit_range(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The values mapped linearly onto [0, 1]; all 0 where they are equal."""
    least, largest = values.aminmax()
    moved = values - least
    return moved.div_(largest - least) if bool(largest > least) else moved
