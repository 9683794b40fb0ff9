"""Rows of weights in less memory: 32, 16, 8, 4 or 1 bit per weight, and their scales."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from copy import copy
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from kernels import quantise
from kernels.errors import KernelError
from kernels.quantise import FLOAT_TYPES, PER_BYTE, Precision
from kernels.segments import Segment, runs


class Rows:
    """K rows of P weights in one precision: `weight[k, w] = scales[k, segment of w] · code[k, w]`.

    precision  codes
    fp32 bf16 fp16  [K, P], the weights themselves; no scales
    int8  [K, P] int8, −127 to 127; scale = largest |weight| / 127
    int4  [K, ⌈P/2⌉] uint8, two to a byte, the first in the low half, each code + 8 (1 to 15);
          scale: the clipping with the least squared error (of a grid)
    sign  [K, ⌈P/8⌉] uint8, weight i in bit i mod 8, 1 for +scale, 0 for −scale;
          scale = mean |weight| (2402.10193)

    `segments` cover all weights, in order and without gaps; `groups` are the same weights with
    neighbours of one group as one.
    """

    def __init__(
        self,
        codes: Tensor,
        scales: Float[Tensor, "rows segments"] | None,
        segments: Sequence[Segment],
        weights: int,
        precision: Precision,
    ):
        self.codes = codes
        self.scales = scales
        self.segments = tuple(Segment(*segment) for segment in segments)
        self.weights = weights
        self.precision: Precision = precision
        _check_cover(self.segments, weights)
        self.groups = runs(self.segments, weights, 1 + max((s.group for s in segments), default=0))
        self._starts = [segment.start for segment in self.segments]
        self._whole = self.segments  # those that the scales are of: a part may cut them

    @classmethod
    def empty(
        cls,
        count: int,
        weights: int,
        precision: Precision,
        segments: Sequence[Segment] | None = None,
        device: torch.device | str = "cpu",
    ) -> Rows:
        """Rows that are yet to be written; 0 until then."""
        if precision not in get_args(Precision):
            raise KernelError(
                f"precision: found {precision!r}, wanted one of {', '.join(get_args(Precision))}"
            )
        segments = [Segment(0, weights, 0)] if segments is None else segments
        if precision in FLOAT_TYPES:
            codes = torch.zeros(count, weights, dtype=FLOAT_TYPES[precision], device=device)
            return cls(codes, None, segments, weights, precision)
        width = -(-weights // PER_BYTE[precision])
        dtype = torch.int8 if precision == "int8" else torch.uint8
        codes = torch.zeros(count, width, dtype=dtype, device=device)
        scales = torch.zeros(count, len(segments), device=device)
        return cls(codes, scales, segments, weights, precision)

    @classmethod
    def of(
        cls,
        values: Float[Tensor, "rows weights"],
        precision: Precision,
        segments: Sequence[Segment] | None = None,
    ) -> Rows:
        """`values` in `precision`."""
        rows = cls.empty(len(values), values.shape[1], precision, segments, values.device)
        for k, row in enumerate(values):
            rows.write(k, row)
        return rows

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, kept: slice) -> Rows:
        """Some of the rows; a view."""
        view = copy(self)
        view.codes = self.codes[kept]
        view.scales = None if self.scales is None else self.scales[kept]
        return view

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and the scales."""
        return self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def to(self, device: torch.device | str) -> Rows:
        """The same rows on `device`."""
        moved = copy(self)
        moved.codes = self.codes.to(device)
        moved.scales = None if self.scales is None else self.scales.to(device)
        return moved

    def part(self, start: int, stop: int) -> Rows:
        """The weights [start, stop) of all rows; a view.

        `start` must be at the beginning of a byte: a multiple of 2 for int4, of 8 for sign.
        """
        per_byte = PER_BYTE.get(self.precision, 1)
        if not (0 <= start <= stop <= self.weights and start % per_byte == 0):
            raise KernelError(
                f"part of {self.precision} rows: found [{start}, {stop}), wanted it inside of "
                f"[0, {self.weights}) and to start at a multiple of {per_byte}"
            )
        codes = self.codes[:, start // per_byte : -(-stop // per_byte)]
        first, last = self._covering(start, stop)
        weights = stop - start
        whole = [Segment(s.start - start, s.stop - start, s.group) for s in self._whole[first:last]]
        segments = [Segment(max(s.start, 0), min(s.stop, weights), s.group) for s in whole]
        scales = None if self.scales is None else self.scales[:, first:last]
        part = Rows(codes, scales, segments, weights, self.precision)
        part._whole = tuple(whole)
        return part

    @torch.no_grad()
    def write(self, k: int, values: Float[Tensor, " weights"]) -> None:
        """Row k becomes `values`, rounded to the precision.

        Raises KernelError where a value is not finite or more than the precision holds, and where
        this is a part that shares a scale with its neighbours.
        """
        if values.shape != (self.weights,):
            raise KernelError(
                f"row {k}: found values of shape {list(values.shape)}, wanted [{self.weights}]"
            )
        _check_finite(f"row {k}", values, self.precision)
        if self.scales is None:
            self.codes[k].copy_(values)
            return
        if self.weights and self._whole != self.segments:
            raise KernelError(
                f"row {k}: found a part that cuts segments, whose scales its neighbours share; "
                "wanted whole ones: write a part that begins and ends where segments do, or make "
                "the rows with shorter segments (fine_segments)"
            )
        codes = torch.empty(self.weights, dtype=torch.int8, device=self.device)
        for (start, stop), first, last in _equal_lengths(self.segments):
            part = values[start:stop].to(self.device, torch.float32).reshape(last - first, -1)
            scales = quantise.SCALES[self.precision](part)
            self.scales[k, first:last] = scales
            codes[start:stop] = quantise.encode(part, scales, self.precision).view(-1)
        packed = quantise.pack(codes, self.precision)
        per_byte = PER_BYTE[self.precision]
        if own := self.weights % per_byte:  # where this is a part, the next one shares the byte
            packed[-1] |= self.codes[k, -1] & (0xFF << own * 8 // per_byte & 0xFF)
        self.codes[k] = packed

    def unpack(
        self, rows: int | slice = slice(None), start: int = 0, stop: int | None = None
    ) -> Float[Tensor, "*rows part"]:
        """The weights [start, stop) of some rows, in fp32."""
        chosen = self[rows : rows + 1 or None] if isinstance(rows, int) else self[rows]
        stop = self.weights if stop is None else stop
        out = torch.empty(len(chosen), stop - start, device=self.device)
        chosen.read(start, stop, out)
        return out[0] if isinstance(rows, int) else out

    def read(self, start: int, stop: int, out: Float[Tensor, "rows part"]) -> None:
        """`out` becomes the weights [start, stop) of all rows."""
        scales = self.read_codes(start, stop, out)
        if scales is not None:
            out.mul_(scales[:, None])

    def read_codes(
        self, start: int, stop: int, out: Float[Tensor, "rows part"]
    ) -> Float[Tensor, " rows"] | None:
        """The weights [start, stop) of all rows: `out`, yet to be multiplied by what is returned.

        Where one scale covers them all it is left to the caller, who may fold it into a factor.
        """
        quantise.unpack(self.codes, start, stop, self.precision, out)
        if self.scales is None or stop == start:
            return None
        first, last = self._covering(start, stop)
        if last - first == 1:
            return self.scales[:, first]
        self._scale(start, stop, first, last, out)
        return None

    def chunk_end(self, start: int, most: int) -> int:
        """Where to stop reading from `start` on: `most`, or the last segment's end not far before.

        Whole segments of one length are scaled together.
        """
        last = self.segments[self._covering(start, most)[1] - 1]
        whole = last.stop == most or 2 * (last.start - start) < most - start
        return most if whole or self.scales is None else last.start

    def _scale(self, start: int, stop: int, first: int, last: int, out: Tensor) -> None:
        """Multiply the weights [start, stop), of the segments [first, last), by their scales."""
        assert self.scales is not None
        scales = self.scales[:, first:last]
        lengths = [min(s.stop, stop) - max(s.start, start) for s in self.segments[first:last]]
        if len(set(lengths[:-1])) == 1:
            whole = (len(lengths) - 1) * lengths[0]
            out[:, :whole].unflatten(1, (-1, lengths[0])).mul_(scales[:, :-1, None])
            out[:, whole:].mul_(scales[:, -1:])
        else:
            repeats = torch.tensor(lengths, device=self.device)
            out.mul_(scales.repeat_interleave(repeats, dim=1, output_size=stop - start))

    def _covering(self, start: int, stop: int) -> tuple[int, int]:
        """The segments [first, last) that have weights in [start, stop)."""
        return max(bisect_right(self._starts, start) - 1, 0), bisect_right(self._starts, stop - 1)


# Weights that are quantised at a time.
_AT_ONCE = 1 << 18


def _equal_lengths(segments: Sequence[Segment]) -> Iterator[tuple[tuple[int, int], int, int]]:
    """Runs of segments of one length, at most `_AT_ONCE` weights (or one segment) each.

    Yields the weights (start, stop) and the segments first, last of the run.
    """
    first = 0
    while first < len(segments):
        length = segments[first].stop - segments[first].start
        last = first + 1
        most = first + max(_AT_ONCE // max(length, 1), 1)
        while (
            last < min(len(segments), most) and segments[last].stop - segments[last].start == length
        ):
            last += 1
        if length:
            yield (segments[first].start, segments[last - 1].stop), first, last
        first = last


def _check_cover(segments: Sequence[Segment], weights: int) -> None:
    end = 0
    for segment in segments:
        if segment.start != end:
            raise KernelError(
                f"segments of rows: found {segment} after weight {end}, wanted them in order and "
                "without gaps, since every weight of a row has one scale"
            )
        end = segment.stop
    if end != weights:
        raise KernelError(
            f"segments of rows: found them to end at {end}, wanted {weights}, the weights of a row"
        )


def _check_finite(where: str, values: Tensor, precision: Precision) -> None:
    if values.numel() == 0:
        return
    low, high = (bound.item() for bound in values.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        at = int(values.isfinite().logical_not().nonzero()[0])
        raise KernelError(
            f"{where}: found {values[at].item()} at weight {at}, wanted finite values; look at the "
            "checkpoint that it comes from"
        )
    # A scale times a code may round to more than the largest fp32: bf16's leaves room for that.
    largest = torch.finfo(FLOAT_TYPES.get(precision, torch.bfloat16)).max
    if max(-low, high) > largest:
        fp16 = precision == "fp16"
        remedy = "store the rows in bf16 or fp32" if fp16 else "look at where the values come from"
        raise KernelError(
            f"{where}: found {max(-low, high):.6g}, the largest that {precision} holds is "
            f"{largest:.6g}; {remedy}"
        )
