"""The largest magnitudes of many numbers, exactly, from two passes over them in slices."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor
from torch.nn import functional as F

CHUNK = 1 << 17  # elements at a time on a CPU: their histogram costs little, and they stay in L2
DEVICE_CHUNK = 1 << 26  # and elsewhere
SORTED = 1 << 14  # up to here a sort is cheaper than clearing two histograms

HIGH_BINS, LOW_BITS = 1 << 15, 16  # of the 31 bits of a magnitude
LOW_BINS = 1 << LOW_BITS
MAGNITUDE = (1 << 31) - 1

SMALL_NORM = 1e-7  # below it a norm counts as zero


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


def deltas(
    base: Float[Tensor, ...], tensor: Float[Tensor, ...]
) -> Iterator[tuple[int, Float32[Tensor, " n"]]]:
    """The flat `tensor − base` in slices, each with the place of its first element.

    A slice is in fp32 and valid until the next one is asked for.
    """
    old, new = base.reshape(-1), tensor.reshape(-1)
    size = CHUNK if base.is_cpu else DEVICE_CHUNK
    scratch = torch.empty(min(size, old.numel()), dtype=torch.float32, device=base.device)
    for start in range(0, old.numel(), size):
        stop = min(start + size, old.numel())
        yield start, torch.sub(new[start:stop], old[start:stop], out=scratch[: stop - start])


class Selection:
    """The largest magnitudes of all numbers that it was shown, twice, in slices of any size.

    `counts(n)` says how many of n numbers are wanted, largest first; there may be several answers.
    Show all numbers to `count`, then all of them to `refine`; then `largest` has an answer for
    each. A magnitude is the fp32 pattern of |x|: its upper bits are counted in the first pass, the
    lower bits of those that share the upper bits of a threshold in the second.
    """

    def __init__(self, counts: Callable[[int], Sequence[int]]) -> None:
        self._wanted = counts
        self._high = np.zeros(HIGH_BINS, dtype=np.int64)
        self._bins: tuple[_Bin | None, ...] | None = None

    def count(self, values: Float[Tensor, ...]) -> None:
        """The first pass: add these numbers to the histogram of the upper bits."""
        for bits in _magnitude_bits(values):
            self._high += torch.bincount(bits >> LOW_BITS, minlength=HIGH_BINS).cpu().numpy()

    def refine(self, values: Float[Tensor, ...]) -> None:
        """The second pass: look at the lower bits, where the upper ones leave it open."""
        bins = {one.place: one for one in self._aim() if one is not None}.values()
        for bits in _magnitude_bits(values):
            high = bits >> LOW_BITS
            for one in bins:
                one.add(bits, high)

    def largest(self) -> tuple[Largest, ...]:
        """The largest magnitudes, for each count that was wanted."""
        return tuple(NONE if one is None else one.largest(rank) for rank, one in self._ranked())

    def _ranks(self) -> Sequence[int]:
        return self._wanted(int(self._high.sum()))

    def _aim(self) -> tuple[_Bin | None, ...]:
        """For each count, the bin of the upper bits in which its threshold lies."""
        if self._bins is None:
            found: dict[int, _Bin] = {}
            places = [_place(self._high, rank) if rank else None for rank in self._ranks()]
            self._bins = tuple(
                None if place is None else found.setdefault(place[0], _Bin(*place))
                for place in places
            )
        return self._bins

    def _ranked(self) -> Iterator[tuple[int, _Bin | None]]:
        return zip(self._ranks(), self._aim(), strict=True)


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
        low, above = _place(self._low, rank - self._above)
        threshold = np.array(self.place << LOW_BITS | low, dtype=np.int32).view(np.float32)
        return Largest(float(threshold), rank - self._above - above, int(self._low[low]))


class ModelSelection:
    """The largest magnitudes over all deltas of one model, for `scope: model`.

    Call each of `passes`, in order, with every delta of the model, in slices of any size and any
    order. Then `kept()` is this model's entry of `measured`, for all its tensors. Without
    `rescale` there are two passes, with it a third one for the norms. All magnitudes equal to the
    threshold are kept, as in the paper's code, so that no tensor comes before another.
    """

    def __init__(self, density: float, *, rescale: bool = False) -> None:
        self._selection = Selection(lambda count: (kept_count(density, count),))
        self._rescale = rescale
        self._norms = Norms()

    @property
    def passes(self) -> tuple[Callable[[Float[Tensor, ...]], None], ...]:
        """What is to be shown every delta, one after the other."""
        selecting = (self._selection.count, self._selection.refine)
        return (*selecting, self._weigh) if self._rescale else selecting

    def kept(self) -> Kept:
        """What stays of each delta; to be asked after all passes."""
        return Kept(self._cut, scale=self._norms.ratio)

    @cached_property
    def _cut(self) -> Cut:
        (largest,) = self._selection.largest()
        return Cut(largest.threshold)

    def _weigh(self, delta: Float[Tensor, ...]) -> None:
        self._norms.add(delta.abs().sum(), self._cut.keep(delta, 0).abs().sum())


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


def keep_largest(
    base: Float[Tensor, ...],
    tensor: Float[Tensor, ...],
    count: int,
    outliers: int,
    *,
    rescale: bool,
) -> Kept:
    """Of `tensor − base` the `count` largest magnitudes without the `outliers` largest ones.

    Of equal magnitudes the first ones count as larger.
    """
    if outliers == 0 and count in (0, tensor.numel()):
        return Kept(Cut(0.0 if count else math.inf))
    largest, removed = select_largest(base, tensor, (count, outliers))
    kept = Kept(
        _exact_cut(largest, base, tensor),
        _exact_cut(removed, base, tensor) if outliers else None,
    )
    if not rescale:
        return kept
    norms = Norms()
    for start, delta in deltas(base, tensor):
        norms.add(delta.abs().sum(), kept.keep(delta, start).abs().sum())
    return replace(kept, scale=norms.ratio)


def select_largest(
    base: Float[Tensor, ...], tensor: Float[Tensor, ...], counts: Sequence[int]
) -> tuple[Largest, ...]:
    """The `k` largest magnitudes of `tensor − base`, for each k."""
    if tensor.numel() <= SORTED:
        return _sort(base, tensor, counts)
    selection = Selection(lambda _: counts)
    for look in (selection.count, selection.refine):
        for _, delta in deltas(base, tensor):
            look(delta)
    return selection.largest()


def _exact_cut(largest: Largest, base: Float[Tensor, ...], tensor: Float[Tensor, ...]) -> Cut:
    """The cut that keeps exactly these: of magnitudes equal to the threshold the first by place."""
    if largest.equal == largest.all_equal or largest.threshold == 0:
        return Cut(largest.threshold)
    missing = largest.equal
    for start, delta in deltas(base, tensor):
        same = delta.abs_() == largest.threshold
        found = int(torch.count_nonzero(same))
        if found >= missing:
            return Cut(largest.threshold, start + int(same.nonzero()[missing - 1]) + 1)
        missing -= found
    raise AssertionError("the tensor changed between two passes over it")


def _sort(
    base: Float[Tensor, ...], tensor: Float[Tensor, ...], counts: Sequence[int]
) -> tuple[Largest, ...]:
    """`select_largest` by sorting."""
    slices = [delta.abs_().cpu().numpy() for _, delta in deltas(base, tensor)]
    ordered = np.sort(np.concatenate(slices)) if slices else np.zeros(0, dtype=np.float32)
    return tuple(_count_back(ordered, count) if count else NONE for count in counts)


def _count_back(ordered: Float32[np.ndarray, " n"], count: int) -> Largest:
    """The last `count` of ascending numbers."""
    first = ordered.size - count
    left, right = (np.searchsorted(ordered, ordered[first], side) for side in ("left", "right"))
    return Largest(float(ordered[first]), int(right) - first, int(right - left))


def _magnitude_bits(values: Float[Tensor, ...]) -> Iterator[Int32[Tensor, " n"]]:
    """The fp32 patterns of |values|, in slices; as whole numbers they order as the magnitudes."""
    flat = values.detach().reshape(-1)
    for part in flat.split(CHUNK if flat.is_cpu else DEVICE_CHUNK):
        yield part.float().view(torch.int32) & MAGNITUDE


def _where(bits: Int32[Tensor, " n"], high: Int32[Tensor, " n"], place: int) -> Int32[Tensor, " m"]:
    """The `bits` where `high` is `place`."""
    if not bits.is_cpu:
        return bits[high == place]
    return torch.from_numpy(bits.numpy()[high.numpy() == place])  # three times as fast as torch


def _place(histogram: Int64[np.ndarray, " bins"], rank: int) -> tuple[int, int]:
    """The bin of the rank-th largest, and how many lie in higher bins."""
    from_top = np.cumsum(histogram[::-1])
    turned = int(np.searchsorted(from_top, rank))
    place = histogram.size - 1 - turned
    return place, int(from_top[turned] - histogram[place])
