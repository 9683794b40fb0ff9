"""The smallest encoding of one tensor within a tolerance."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from fleet.errors import FleetError
from fleet.storage.encodings import (
    ENCODINGS,
    Parts,
    Settings,
    delta_of,
    different_bits,
    encoding_named,
    low_rank_parts,
    same_bits,
    wide_type,
)
from inputs.randomness import generator
from merge.adapters.low_rank import truncated
from merge.checkpoints.tensors import dtype_name

INT4_GROUPS = (1024, 128, 32)
INT8_GROUPS = (1024, 64)


@dataclass(frozen=True)
class Choice:
    """How a tensor is stored: `encoding` of `parts` with `settings`, or None: as its parent has it.

    `nbytes` are the variant's own, `error` is ‖ŵ − w‖ (Frobenius), measured on what decodes.
    """

    encoding: str | None
    parts: Parts = field(default_factory=dict)
    settings: Settings = field(default_factory=dict)
    nbytes: int = 0
    error: float = 0.0


@dataclass(frozen=True)
class _Aim:
    """A value to be stored over its parent's with an error of at most `bound`."""

    value: Tensor
    parent: Tensor
    delta: Tensor
    apart: float
    bound: float

    def try_out(self, name: str, parts: Parts, settings: Settings) -> Choice:
        encoding = ENCODINGS[name]
        decoded = encoding.decode(parts, settings, self.parent)
        left = delta_of(decoded, self.value)
        error = float(torch.linalg.vector_norm(left, dtype=torch.float64))
        if not _stays_positive(self.value, decoded):
            error = math.inf
        return Choice(name, parts, settings, encoding.nbytes(parts), error)

    def squared_rest(self, rounding: float) -> float:
        """What may be left out, squared, where what is kept is rounded by so much, relatively."""
        return self.bound**2 - (rounding * self.apart) ** 2


def choose(
    value: Shaped[Tensor, ...],
    parent: Shaped[Tensor, ...] | None,
    tolerance: float,
    *,
    size: float | None = None,
    allowed: Collection[str] = tuple(ENCODINGS),
    unified: Float[Tensor, ...] | None = None,
) -> Choice:
    """The choice with the fewest bytes of those with ‖ŵ − w‖ ≤ tolerance · size.

    `size` is ‖w − base‖, which the error is relative to; without it the difference to the parent
    is taken. Tensors that are not finite floats of the parent's shape and dtype are exact, and
    with tolerance 0 all are. Where no value is negative, none that decodes is, and what is
    positive stays so. `plain` is always allowed. `unified` is the merged vector of the parent's
    node, for `emr`; its bytes are the node's. Of equal bytes the first in the registry's order is
    taken. Raises FleetError for a negative tolerance or an unknown encoding.
    """
    if not tolerance >= 0:
        raise FleetError(f"the tolerance is {tolerance}, wanted a number of at least 0")
    names = {encoding_named(name).name for name in allowed}
    if parent is not None and same_bits(value, parent):
        return Choice(None)
    best = Choice("plain", *ENCODINGS["plain"].encode(value), value.nbytes)
    if parent is None or parent.shape != value.shape or parent.dtype != value.dtype:
        return best
    changed = int(different_bits(value, parent).sum()) if "changed" in names else value.numel()
    if changed * (value.dtype.itemsize + 1) < best.nbytes:
        parts, settings = ENCODINGS["changed"].encode(value, parent)
        if ENCODINGS["changed"].nbytes(parts) < best.nbytes:
            best = Choice("changed", parts, settings, ENCODINGS["changed"].nbytes(parts))
    if not value.is_floating_point() or value.dtype.itemsize < 2 or tolerance == 0:
        return best
    delta = delta_of(value, parent)
    apart = float(torch.linalg.vector_norm(delta, dtype=torch.float64))
    if not math.isfinite(apart):
        return best
    bound = tolerance * (apart if size is None else size)
    if apart <= bound and _stays_positive(value, parent):
        return Choice(None, error=apart)
    aim = _Aim(value, parent, delta, apart, bound)
    for nbytes, name, given in _of_fixed_size(aim, names, unified):
        if nbytes >= best.nbytes:
            break
        found = aim.try_out(name, *ENCODINGS[name].encode(value, parent, **given))
        if found.error <= bound:
            best = found
            break
    for name, search in (("low_rank", _low_rank), ("sparse", _sparse)):
        if name in names:
            found = search(aim, best.nbytes)
            if found is not None and found.nbytes < best.nbytes:
                best = found
    return best


def _stays_positive(value: Tensor, decoded: Tensor) -> bool:
    """Whether a tensor without a negative value, such as a running variance, still has none, and
    is positive where it was: a model takes roots of it."""
    kept = (decoded > 0) | ((decoded == 0) & (value == 0))
    return bool((value < 0).any()) or bool(kept.all())


def _of_fixed_size(
    aim: _Aim, names: Collection[str], unified: Tensor | None
) -> list[tuple[int, str, dict[str, Any]]]:
    """Encodings whose bytes follow from the shape, with those bytes and settings; few first."""
    numel = aim.value.numel()
    bits = -(-numel // 8)
    rows = len(aim.delta) if aim.delta.dim() > 1 else 1
    found: list[tuple[int, str, dict[str, Any]]] = []
    if not float(aim.delta.abs().max()) <= torch.finfo(torch.bfloat16).max:
        return found
    if "emr" in names and unified is not None and unified.shape == aim.value.shape:
        found.append((bits, "emr", {"unified": unified}))
    if "sign" in names:
        means = {"tensor": aim.delta.view(1, -1), "row": aim.delta.reshape(rows, -1)}
        for scales, shaped in means.items():
            kept = shaped.shape[1] * shaped.double().abs().mean(1).square().sum()
            # The least error that signs can leave; a little more for its own rounding.
            if aim.apart**2 - float(kept) <= 1.001 * aim.bound**2:
                found.append((bits + 4 * len(shaped), "sign", {"scales": scales}))
    for name, groups, codes in (
        ("int4", INT4_GROUPS, -(-numel // 2)),
        ("int8", INT8_GROUPS, numel),
    ):
        if name in names:
            found += [(codes + 4 * -(-numel // g), name, {"group": g}) for g in groups]
    order = list(ENCODINGS)
    return sorted(found, key=lambda one: (one[0], order.index(one[1])))


def _low_rank(aim: _Aim, limit: int) -> Choice | None:
    """The least rank within the bound, in factors of 16 bits where they are close enough."""
    if aim.value.dim() < 2 or not aim.value.numel():
        return None
    # Relative to a delta of about 1, so that squares of small numbers do not underflow.
    matrix = aim.delta.flatten(1) / aim.apart
    wide = matrix.T if len(matrix) > matrix.shape[1] else matrix
    spread = torch.linalg.matrix_norm(wide @ wide.T)
    for factors, rounding in _precisions(aim, "float16", 2.0**-10):
        most = min((limit - 1) // (factors.itemsize * sum(matrix.shape)), *matrix.shape)
        kept = 1 - aim.squared_rest(rounding) / aim.apart**2
        if kept >= 1:
            continue
        # Σ_{i ≤ r} σ_i² ≤ √(r · Σ σ_i⁴): so little does not need the decomposition.
        if most < 1 or math.sqrt(most) * float(spread) < 0.99 * kept:
            return None
        found = truncated(matrix, rank=most, energy=kept, generator=generator(0, "low_rank"))
        if found.relative_error > aim.bound / aim.apart:
            return None
        parts, settings = low_rank_parts(found.b * aim.apart, found.a, factors)
        choice = aim.try_out("low_rank", parts, settings)
        if choice.error <= aim.bound:
            return choice
    return None


def _sparse(aim: _Aim, limit: int) -> Choice | None:
    """The fewest of the largest |δ| within the bound, in 16 bits where they are close enough."""
    flat = aim.delta.flatten() / aim.apart
    squares = flat.square()
    spread = torch.linalg.vector_norm(squares)
    for values, rounding in _precisions(aim, "bfloat16", 2.0**-9):
        most = min((limit - 1) // (values.itemsize + 1), len(flat))
        kept = 1 - aim.squared_rest(rounding) / aim.apart**2
        if kept >= 1:
            # All of them may be close enough all the same: few are rounded by the most there is.
            if most < len(flat):
                continue
            count = len(flat)
        else:
            # Σ of the k largest δ² ≤ √(k · Σ δ⁴).
            if most < 1 or math.sqrt(most) * float(spread) < 0.99 * kept:
                return None
            enough = squares.topk(most).values.double().cumsum(0) >= kept
            if not bool(enough[-1]):
                return None
            count = int(enough.to(torch.uint8).argmax()) + 1
        given = {"count": count, "values": dtype_name(values)}
        choice = aim.try_out("sparse", *ENCODINGS["sparse"].encode(aim.value, aim.parent, **given))
        if choice.error <= aim.bound:
            return choice
    return None


def _precisions(aim: _Aim, narrow: str, rounding: float) -> list[tuple[torch.dtype, float]]:
    wide = wide_type(aim.value.dtype)
    return [(getattr(torch, narrow), rounding), (wide, torch.finfo(wide).eps)]
