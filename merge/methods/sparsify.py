"""Which elements of a delta stay: by magnitude, by chance, by chance that grows with magnitude."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from merge.measuring import See
from merge.methods.selection import Norms, Trim, kept_count
from merge.part import Part

RescaleBy = Literal["norm", "probability"]


def measure_largest(
    *,
    numel: int,
    density: float,
    rescale: bool,
    scope: Literal["tensor", "model"] = "tensor",
    **unused: object,
) -> Trim:
    """TIES' trimming: the `max(1, int(density · n))` largest magnitudes of the delta stay.

    Over all of a model those that equal the smallest of them stay as well, as in the paper's code.
    """
    count = kept_count(density, numel)
    return Trim(numel, count, rescale=rescale, all_equal=scope == "model")


def measure_band(
    *, numel: int, density: float, gamma: float, rescale: bool, **unused: object
) -> Trim:
    """Breadcrumbs: without the `int(gamma · n)` largest magnitudes, the `density · n` next ones.

    Where so many are not left, fewer of the largest are removed.
    """
    end, begin = band(density, gamma, numel)
    return Trim(numel, end, begin, rescale=rescale)


def band(density: float, gamma: float, count: int) -> tuple[int, int]:
    """Of `count` magnitudes, largest first: where the kept ones end, and where they begin."""
    kept = kept_count(density, count)
    end = min(count, kept + int(gamma * count))
    return end, end - kept


class Factor:
    """A factor on what stays of a delta: `constant`, or, with None, `‖δ‖₁ / ‖kept δ‖₁`.

    `norms(part, base, tensor)` are these two for the slice `part`.
    """

    def __init__(
        self,
        constant: float | None,
        part: Part,
        norms: Callable[[Part, Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> None:
        self._constant = constant
        self._part = part
        self._of = norms
        self._norms = Norms()

    @property
    def passes(self) -> tuple[See, ...]:
        """What is to be shown every slice; none where the factor is known."""
        return (self._weigh,) if self._constant is None else ()

    def result(self) -> float:
        """The factor; to be asked after all passes."""
        return self._norms.ratio if self._constant is None else self._constant

    def _weigh(self, start: int, base: Float[Tensor, ...], tensor: Float[Tensor, ...]) -> None:
        part = replace(self._part, start=self._part.start + start)
        self._norms.add(*self._of(part, base, tensor))


def measure_drops(
    *,
    numel: int,
    density: float,
    rescale: bool,
    rescale_by: RescaleBy,
    part: Part,
    model: int,
    **unused: object,
) -> Factor:
    """DARE's factor on what stays: `1 / density`, or `‖δ‖₁ / ‖kept δ‖₁` over the whole tensor."""

    def norms(
        part: Part, base: Float[Tensor, ...], tensor: Float[Tensor, ...]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        magnitudes = (tensor - base).abs_()
        return magnitudes.sum(), drop(magnitudes, density, part, model).sum()

    known = None
    if not rescale or not 0 < density < 1:
        known = 1.0
    elif rescale_by == "probability":
        known = 1 / density
    return Factor(known, part, norms)


def drop(delta: Float[Tensor, ...], density: float, part: Part, model: int) -> Float[Tensor, ...]:
    """DARE: each element of `delta` stays with the probability `density`; in place."""
    if density == 1:
        return delta
    # As whole numbers: torch multiplies by those three times as fast as by truth values.
    return delta.mul_(part.keep(model, density, delta).view(torch.int8))


def measure_ranked_drops(
    *,
    numel: int,
    density: float,
    epsilon: float,
    rescale: bool,
    rescale_by: RescaleBy,
    part: Part,
    model: int,
    **unused: object,
) -> Factor:
    """DELLA's factor on what stays: `‖δ‖₁ / ‖kept δ‖₁` over the whole tensor.

    1 where each element has a factor of its own, by its probability.
    """

    def norms(
        part: Part, base: Float[Tensor, ...], tensor: Float[Tensor, ...]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        magnitudes = as_rows((tensor - base).abs_())
        stays = _stays(magnitudes, density, epsilon, part, model)
        return magnitudes.sum(), stays.mul_(_sorted_rows(magnitudes)).sum()

    measured = rescale and rescale_by == "norm" and 0 < density < 1
    return Factor(None if measured else 1.0, part, norms)


def drop_by_rank(
    delta: Float[Tensor, ...],
    density: float,
    epsilon: float,
    part: Part,
    model: int,
    *,
    by_probability: bool,
) -> Float[Tensor, ...]:
    """DELLA: what is larger in its row stays with a higher probability; in place.

    In a row of m elements that of rank r = 0 … m − 1 stays with the probability
    `p_r = density − epsilon + 2 · epsilon · r / (m − 1)`, and is divided by it `by_probability`.
    Of equal magnitudes the first ranks lower. A tensor [out, …] has `out` rows; vectors and
    scalars are one row.
    """
    if density == 1 or delta.numel() == 0:
        return delta
    if density == 0:
        return delta.zero_()
    rows = as_rows(delta)
    factors = _stays(rows, density, epsilon, part, model)
    if by_probability:
        factors.div_(keep_probabilities(rows, density, epsilon))
    return delta.mul_(
        torch.empty_like(rows).scatter_(1, _row_order(rows), factors).view(delta.shape)
    )


def as_rows(tensor: Float[Tensor, ...]) -> Float[Tensor, "rows in"]:
    """A tensor [out, …] as a matrix; vectors and scalars as one row."""
    return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.flatten(1)


def keep_probabilities(
    rows: Float[Tensor, "rows in"], density: float, epsilon: float
) -> Float[Tensor, " in"]:
    """The probability to stay, by rank; the density itself where a row has one element."""
    width = rows.shape[1]
    if width == 1:
        return rows.new_tensor([density])
    ramp = np.linspace(density - epsilon, density + epsilon, width)
    return torch.from_numpy(ramp).to(rows.device, rows.dtype)


def _stays(
    rows: Float[Tensor, "rows in"], density: float, epsilon: float, part: Part, model: int
) -> Float[Tensor, "rows in"]:
    """1 where the element of each rank stays in its row, else 0.

    Numbers are drawn for ranks rather than places: sums over what stays then need sorted rows
    alone, and no order.
    """
    return part.uniform(model, rows).lt_(keep_probabilities(rows, density, epsilon))


def _sorted_rows(magnitudes: Float[Tensor, "rows in"]) -> Float[Tensor, "rows in"]:
    if magnitudes.is_cpu:  # numpy sorts with vector instructions, many times as fast as torch
        return torch.from_numpy(np.sort(magnitudes.numpy(), axis=1))
    return magnitudes.sort(dim=1).values


def _row_order(rows: Float[Tensor, "rows in"]) -> Int64[Tensor, "rows in"]:
    """The places of the elements of each row from the smallest magnitude to the largest."""
    if rows.is_cpu and rows.dtype == torch.float32:
        return _packed_order(rows)
    return rows.abs().argsort(dim=1, stable=True)


def _packed_order(rows: Float32[Tensor, "rows in"]) -> Int64[Tensor, "rows in"]:
    """`_row_order` by a sort of whole numbers: magnitude above, place below (both 31 bits)."""
    magnitudes = rows.abs().view(torch.int32).numpy()
    keys = magnitudes.astype(np.int64)
    keys <<= 32
    keys |= np.arange(rows.shape[1], dtype=np.int64)
    keys.sort(axis=1)
    keys &= 0xFFFFFFFF
    return torch.from_numpy(keys)
