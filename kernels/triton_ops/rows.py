"""Rows as kernels read them: codes become numbers in registers; where each tile of weights lies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.segments import Segment, runs
from kernels.storage import Rows

from .launch import INTERPRETED, kernel

# Elements that one load can take.
WIDE = 16
# Operands of the tensor cores that hold these codes without rounding.
MATRIX_KINDS = ("bf16", "int8", "int4", "sign")
# The type in which they are multiplied; the interpreter computes bf16 wrongly.
MATRIX_TYPE = tl.float32 if INTERPRETED else tl.bfloat16


@kernel
@no_type_check
def load_codes(codes, inside, offset, limit, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """The codes [offset, offset + BLOCK) of rows: `codes` [R, 1] points at them, `inside` says
    which are there.

    `offset` is a multiple of what one byte holds; only the row's first `limit` elements are read.
    The compiler must know what divides `limit`, or the mask cuts wide loads into narrow ones.
    """
    if KIND == "int4":
        byte = offset // 2 + tl.arange(0, BLOCK // 2)[None, :]
        pair = tl.load(codes + byte, mask=inside & (byte < limit), other=0)
        values = tl.interleave(pair & 15, pair >> 4).to(tl.float32) - 8.0
    elif KIND == "sign":
        byte = offset // 8 + tl.arange(0, BLOCK // 8)[None, :]
        bits = tl.load(codes + byte, mask=inside & (byte < limit), other=0)
        bits = tl.interleave(bits & 15, bits >> 4)
        bits = tl.interleave(bits & 3, bits >> 2)
        bits = tl.interleave(bits & 1, bits >> 1)
        values = bits.to(tl.float32) * 2.0 - 1.0
    else:
        weight = offset + tl.arange(0, BLOCK)[None, :]
        values = tl.load(codes + weight, mask=inside & (weight < limit), other=0)
    return values


class Stored(NamedTuple):
    """Rows as a kernel takes them."""

    codes: Tensor
    scales: Tensor | None
    kind: str
    segments: tuple[Segment, ...]

    @property
    def ingredients(self) -> int:
        return len(self.codes)

    @property
    def limit(self) -> int:
        """Elements of each row that may be read: past its end, to a wide load, where there are."""
        count, width = self.codes.shape
        wide = -(-width // WIDE) * WIDE
        begun = self.codes.storage_offset() + max(count - 1, 0) * self.codes.stride(0)
        there = self.codes.untyped_storage().nbytes() // self.codes.itemsize - begun
        return wide if wide <= there else width

    @property
    def align(self) -> int:
        """What divides the step from row to row, and `limit`."""
        return math.gcd(WIDE, self.codes.stride(0), self.limit)

    @property
    def scale_strides(self) -> tuple[int, int]:
        return (0, 0) if self.scales is None else (self.scales.stride(0), self.scales.stride(1))


def stored(deltas: Tensor | Rows) -> Stored:
    """Plain rows or quantised ones; a row's weights must be neighbours in memory."""
    if isinstance(deltas, Rows):
        kind = deltas.precision if deltas.scales is not None else float_kind(deltas.codes)
        scaled = deltas.segments if deltas.scales is not None else ()
        return Stored(deltas.codes, deltas.scales, kind, scaled)
    rows = deltas if deltas.stride(1) == 1 else deltas.contiguous()
    return Stored(rows, None, float_kind(rows), ())


def float_kind(codes: Tensor) -> str:
    return "bf16" if codes.dtype == torch.bfloat16 else "float"


def tile_length(rows: Stored, longest: int) -> int:
    """Weights of a tile: `longest`, or less where all segments with one scale are shorter."""
    if not rows.segments:
        return longest
    segment = max(stop - start for start, stop, _ in rows.segments)
    return min(max(triton.next_power_of_2(segment), 64), longest)


class Tiles(NamedTuple):
    """Tiles [T, 4] of weights: start, stop, group, scale; none crosses a multiple of `length`.

    A tile belongs to one group (−1: to none) and has one scale per row.
    """

    table: Tensor
    length: int


@lru_cache(maxsize=64)
def tiles_of(
    segments: tuple[Segment, ...],
    groups: int,
    scaled: tuple[Segment, ...],
    weights: int,
    length: int,
    device: torch.device,
) -> Tiles:
    """The tiles of all weights, in order; kept, since a run mixes the same segments many times."""
    joined = torch.tensor(runs(segments, weights, groups), dtype=torch.int64).reshape(-1, 3)
    scale_starts = torch.tensor([s.start for s in scaled if s.stop > s.start], dtype=torch.int64)
    scale_places = torch.tensor(
        [place for place, s in enumerate(scaled) if s.stop > s.start], dtype=torch.int64
    )
    grid = torch.arange(0, weights, length)
    bounds = torch.cat([grid, joined[:, :2].flatten(), scale_starts, torch.tensor([weights])])
    bounds = bounds.unique()
    table = torch.zeros(len(bounds) - 1, 4, dtype=torch.int64)
    table[:, 0], table[:, 1] = bounds[:-1], bounds[1:]
    table[:, 2] = group_of(bounds[:-1], joined)
    if len(scale_starts):
        table[:, 3] = scale_places[torch.searchsorted(scale_starts, bounds[:-1], right=True) - 1]
    return Tiles(table.to(device), length)


def group_of(starts: Tensor, segments: Tensor) -> Tensor:
    """The group of the segment around each start; −1 where there is none."""
    if not len(segments):
        return torch.full_like(starts, -1)
    place = torch.searchsorted(segments[:, 0].contiguous(), starts, right=True) - 1
    found = segments[place.clamp(min=0)]
    return torch.where((place >= 0) & (starts < found[:, 1]), found[:, 2], -1)


def segments_or_all(segments: Sequence[Segment] | None, weights: int) -> tuple[Segment, ...]:
    """Where no segments are given, all weights are of group 0."""
    if segments is None:
        return (Segment(0, weights, 0),)
    return tuple(Segment(*segment) for segment in segments)
