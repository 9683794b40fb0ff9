"""The largest magnitudes of many numbers, exactly, from a few passes over them in slices."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor
from torch.nn import functional as F

from merge.measuring import See

SORTED = 1 << 14  # up to here a sort is cheaper than clearing two histograms

HIGH_BINS, LOW_BITS = 1 << 15, 16  # of the 31 bits of a magnitude
LOW_BINS = 1 << LOW_BITS
MAGNITUDE = (1 << 31) - 1

SMALL_NORM = 1e-7  # below it a norm counts as zero

Look = Callable[[int, Tensor], None]
"""(flat place of the first number, numbers in fp32)"""


@dataclass(frozen=True, slots=True)
class Largest:
    """The `k` largest magnitudes: the smallest of them is `threshold`.

    `equal` of them are equal to it; `all_equal` of all magnitudes are.
    """

    threshold: float
    equal: int
    all_equal: int


NONE = Largest(math.inf, 0, 0)


@dataclass(frozen=True, slots=True)
class Cut:
    """The magnitudes above `threshold`, and those equal to it at flat places before `until`."""

    threshold: float
    until: int = sys.maxsize

    def keep(self, delta: Float[Tensor, ...], start: int) -> Float[Tensor, ...]:
        """`delta`, whose first element is at the flat place `start`, with zeros for all others."""
        if self.threshold == 0:
            return delta
        equals = min(max(self.until - start, 0), delta.numel())
        below = float(np.nextafter(np.float32(self.threshold), np.float32(0)))
        flat = delta.reshape(-1)
        if equals == delta.numel():
            kept = _above(flat, below)
        elif equals == 0:
            kept = _above(flat, self.threshold)
        else:
            kept = torch.cat([_above(flat[:equals], below), _above(flat[equals:], self.threshold)])
        return kept.view(delta.shape)


@dataclass(frozen=True, slots=True)
class Kept:
    """What stays of a delta: the magnitudes in `largest` that are no `outliers`, times `scale`."""

    largest: Cut
    outliers: Cut | None = None
    scale: float = 1.0

    def keep(self, delta: Float[Tensor, ...], start: int) -> Float[Tensor, ...]:
        """`delta`, whose first element is at the flat place `start`, with zeros for the rest.

        `scale` is left to the caller. The result may be `delta` itself.
        """
        kept = self.largest.keep(delta, start)
        return kept if self.outliers is None else kept - self.outliers.keep(delta, start)


def _above(values: Float[Tensor, " n"], bound: float) -> Float[Tensor, " n"]:
    """`values` with zeros where the magnitude in fp32 is at most `bound`."""
    if values.dtype == torch.float32:
        return F.hardshrink(values, bound)
    return values * (F.hardshrink(values.float(), bound) != 0)


def kept_count(density: float, count: int) -> int:
    """How many of `count` elements a density keeps: at least one, unless either is zero."""
    return min(count, max(1, int(density * count))) if density > 0 else 0


class Trim:
    """What stays of `numel` numbers, in passes over them: the largest magnitudes.

    The `count` largest without the `outliers` largest ones; of equal magnitudes the first ones
    count as larger, or, with `all_equal`, all that are equal to the last one stay, whichever tensor
    they are in. There are no passes where all stays, or nothing.
    """

    def __init__(
        self,
        numel: int,
        count: int,
        outliers: int = 0,
        *,
        rescale: bool = False,
        all_equal: bool = False,
    ) -> None:
        self._counts = (count, outliers)
        self._rescale = rescale
        self._norms = Norms()
        self._open = outliers > 0 or 0 < count < numel
        select = Sort if numel <= SORTED else Selection
        self._selection = select(self._counts, all_equal=all_equal)

    @property
    def passes(self) -> tuple[See, ...]:
        """What is to be shown every slice of `base` and `tensor`, one after the other."""
        if not self._open:
            return ()
        looks = (*self._selection.passes, *([self._weigh] if self._rescale else []))
        return tuple(partial(_show_delta, look) for look in looks)

    def result(self) -> Kept:
        """What stays; to be asked after all passes."""
        return replace(self._kept, scale=self._norms.ratio)

    @cached_property
    def _kept(self) -> Kept:
        if not self._open:
            return Kept(Cut(0.0 if self._counts[0] else math.inf))
        largest, outliers = self._selection.cuts()
        return Kept(largest, outliers if self._counts[1] else None)

    def _weigh(self, start: int, delta: Float32[Tensor, " n"]) -> None:
        self._norms.add(delta.abs().sum(), self._kept.keep(delta, start).abs().sum())


def _show_delta(
    look: Callable[[int, Tensor], None],
    start: int,
    base: Float[Tensor, ...],
    tensor: Float[Tensor, ...],
) -> None:
    look(start, (tensor - base).float().reshape(-1))


class Norms:
    """The l1 norms of what was there and of what stays, added up slice by slice."""

    def __init__(self) -> None:
        self._before = self._after = 0.0

    def add(self, before: Float[Tensor, ""], after: Float[Tensor, ""]) -> None:
        """The norms of another slice."""
        self._before += float(before)
        self._after += float(after)

    @property
    def ratio(self) -> float:
        """The factor that gives the rest the norm of the whole; 1 where one is next to nothing."""
        if self._before < SMALL_NORM or self._after < SMALL_NORM:
            return 1.0
        return self._before / self._after


class Selection:
    """For each of `counts`, the cut that so many of the largest magnitudes pass.

    A magnitude is the fp32 pattern of |x|. Its upper bits are counted in the first pass, and the
    lower bits of those that share the upper bits of a threshold in the second. A third one finds
    the place up to which magnitudes equal to a threshold stay, unless they all do (`all_equal`);
    it needs the slices in order.
    """

    def __init__(self, counts: Sequence[int], *, all_equal: bool = False) -> None:
        self._counts = counts
        self._all_equal = all_equal
        self._high = np.zeros(0, dtype=np.int64)

    @property
    def passes(self) -> tuple[Look, ...]:
        """What is to be shown every slice, one after the other."""
        looks = (self._count, self._refine)
        return looks if self._all_equal else (*looks, self._place)

    def cuts(self) -> tuple[Cut, ...]:
        """The cut for each count; to be asked after all passes."""
        return tuple(border.cut for border in self._borders)

    def _count(self, start: int, values: Float32[Tensor, " n"]) -> None:
        high = _magnitude_bits(values) >> LOW_BITS
        counts = torch.bincount(high, minlength=HIGH_BINS).cpu().numpy()
        self._high = self._high + counts if self._high.size else counts

    def _refine(self, start: int, values: Float32[Tensor, " n"]) -> None:
        bits = _magnitude_bits(values)
        high = bits >> LOW_BITS
        for one in {one.place: one for one in self._bins if one is not None}.values():
            one.add(bits, high)

    def _place(self, start: int, values: Float32[Tensor, " n"]) -> None:
        for border in self._borders:
            border.look(start, values)

    @cached_property
    def _bins(self) -> tuple[_Bin | None, ...]:
        """For each count, the bin of the upper bits in which its threshold lies."""
        found: dict[int, _Bin] = {}
        places = [_bin_of(self._high, count) if count else None for count in self._counts]
        return tuple(
            None if place is None else found.setdefault(place[0], _Bin(*place)) for place in places
        )

    @cached_property
    def _borders(self) -> tuple[_Border, ...]:
        return tuple(
            _Border(NONE if one is None else one.largest(count), all_equal=self._all_equal)
            for count, one in zip(self._counts, self._bins, strict=True)
        )


class Sort:
    """`Selection` of a few numbers: one pass that keeps them, in order."""

    def __init__(self, counts: Sequence[int], *, all_equal: bool = False) -> None:
        self._counts = counts
        self._all_equal = all_equal
        self._values: list[Float32[Tensor, " n"]] = []

    @property
    def passes(self) -> tuple[Look, ...]:
        return (self._keep,)

    def cuts(self) -> tuple[Cut, ...]:
        values = torch.cat(self._values)
        ordered = np.sort(values.cpu().numpy())
        borders = []
        for count in self._counts:
            largest = _count_back(ordered, count) if count else NONE
            borders.append(_Border(largest, all_equal=self._all_equal))
            borders[-1].look(0, values)
        return tuple(border.cut for border in borders)

    def _keep(self, start: int, values: Float32[Tensor, " n"]) -> None:
        self._values.append(values.abs())


class _Border:
    """Finds the place up to which magnitudes equal to the threshold belong to the largest."""

    def __init__(self, largest: Largest, *, all_equal: bool) -> None:
        exact = largest.equal < largest.all_equal and largest.threshold > 0 and not all_equal
        self._missing = largest.equal if exact else 0
        self.cut = Cut(largest.threshold)

    def look(self, start: int, values: Float32[Tensor, " n"]) -> None:
        """The next slice, whose first element is at the flat place `start`."""
        if not self._missing:
            return
        same = values.abs() == self.cut.threshold
        found = int(torch.count_nonzero(same))
        if found >= self._missing:
            until = start + int(same.nonzero()[self._missing - 1]) + 1
            self.cut = replace(self.cut, until=until)
        self._missing = max(self._missing - found, 0)


class _Bin:
    """The magnitudes with the upper bits `place`, by their lower bits; `above` are larger."""

    def __init__(self, place: int, above: int) -> None:
        self.place = place
        self._above = above
        self._low = np.zeros(LOW_BINS, dtype=np.int64)

    def add(self, bits: Int32[Tensor, " n"], high: Int32[Tensor, " n"]) -> None:
        low = _where(bits, high, self.place) & (LOW_BINS - 1)
        if low.numel():
            self._low += torch.bincount(low, minlength=LOW_BINS).cpu().numpy()

    def largest(self, rank: int) -> Largest:
        low, above = _bin_of(self._low, rank - self._above)
        threshold = np.array(self.place << LOW_BITS | low, dtype=np.int32).view(np.float32)
        return Largest(float(threshold), rank - self._above - above, int(self._low[low]))


def _count_back(ordered: Float32[np.ndarray, " n"], count: int) -> Largest:
    """The last `count` of ascending numbers."""
    first = ordered.size - count
    left, right = (np.searchsorted(ordered, ordered[first], side) for side in ("left", "right"))
    return Largest(float(ordered[first]), int(right) - first, int(right - left))


def _magnitude_bits(values: Float32[Tensor, " n"]) -> Int32[Tensor, " n"]:
    """The fp32 patterns of |values|; as whole numbers they order as the magnitudes."""
    return values.view(torch.int32) & MAGNITUDE


def _where(bits: Int32[Tensor, " n"], high: Int32[Tensor, " n"], place: int) -> Int32[Tensor, " m"]:
    """The `bits` where `high` is `place`."""
    if not bits.is_cpu:
        return bits[high == place]
    return torch.from_numpy(bits.numpy()[high.numpy() == place])  # three times as fast as torch


def _bin_of(histogram: Int64[np.ndarray, " bins"], rank: int) -> tuple[int, int]:
    """The bin of the rank-th largest, and how many lie in higher bins."""
    from_top = np.cumsum(histogram[::-1])
    turned = int(np.searchsorted(from_top, rank))
    place = histogram.size - 1 - turned
    return place, int(from_top[turned] - histogram[place])
