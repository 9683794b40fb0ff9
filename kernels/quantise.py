"""Weights as small integers: the scale of a segment, the codes, and codes packed into bytes."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from jaxtyping import Float, Int8
from torch import Tensor

Precision = Literal["fp32", "bf16", "fp16", "int8", "int4", "sign"]

FLOAT_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PER_BYTE = {"int8": 1, "int4": 2, "sign": 8}
LARGEST = {"int8": 127, "int4": 7}

# A 4 bit scale clips at one of these parts of the largest |weight|: 19% apart, down to a seventh.
# Twice as many, down to a fourteenth, round normal rows 0.5% and sparse ones 1% closer.
CLIPPINGS = tuple(2.0 ** (-step / 4) for step in range(12))


def absolute_largest(values: Float[Tensor, "segments length"]) -> Float[Tensor, " segments"]:
    """`max |value| / 127`: nothing is clipped."""
    largest = values.abs().amax(dim=1)
    return _normal(largest / LARGEST["int8"], largest)


def least_squares_clipping(values: Float[Tensor, "segments length"]) -> Float[Tensor, " segments"]:
    """The scale of `CLIPPINGS` with the least `Σ (value − scale · code)²`, codes −7 to 7."""
    largest = values.abs().amax(dim=1)
    units = values / torch.where(largest > 0, largest, 1)[:, None]
    errors = torch.stack([_clipping_error(units, clipping) for clipping in CLIPPINGS])
    best = torch.tensor(CLIPPINGS, device=values.device)[errors.argmin(dim=0)]
    return _normal(largest * best / LARGEST["int4"], largest)


def mean_magnitude(values: Float[Tensor, "segments length"]) -> Float[Tensor, " segments"]:
    """`mean |value|`: of all scales of a sign the one with the least squared error."""
    return (
        torch.linalg.vector_norm(values, 1, dim=1, dtype=torch.float64)
        .div_(values.shape[1])
        .float()
    )


SCALES = {"int8": absolute_largest, "int4": least_squares_clipping, "sign": mean_magnitude}


def encode(
    values: Float[Tensor, "segments length"],
    scales: Float[Tensor, " segments"],
    precision: Precision,
) -> Int8[Tensor, "segments length"]:
    """The codes whose products with the scales are nearest to the values (sign: 1 or 0)."""
    if precision == "sign":
        return (values >= 0).to(torch.int8)
    largest = LARGEST[precision]
    divisors = torch.where(scales > 0, scales, 1)[:, None]
    return (values / divisors).round_().clamp_(-largest, largest).to(torch.int8)


def pack(codes: Int8[Tensor, " weights"], precision: Precision) -> Tensor:
    """The codes of one row in the bytes in which they are stored."""
    if precision == "int8":
        return codes
    per_byte = PER_BYTE[precision]
    bits = 8 // per_byte
    unsigned = (codes + 8 if precision == "int4" else codes).view(torch.uint8)
    unsigned = torch.nn.functional.pad(unsigned, (0, -len(codes) % per_byte)).view(-1, per_byte)
    packed = unsigned[:, 0].clone()
    for place in range(1, per_byte):
        packed |= unsigned[:, place] << (place * bits)
    return packed


def unpack(
    codes: Tensor, start: int, stop: int, precision: Precision, out: Float[Tensor, "rows part"]
) -> None:
    """`out` becomes the codes [start, stop) of all rows, as numbers (sign: 1 and −1)."""
    if precision not in ("int4", "sign"):
        out.copy_(codes[:, start:stop])
        return
    per_byte = PER_BYTE[precision]
    packed = codes[:, start // per_byte : -(-stop // per_byte)]
    spread = _spread_nibbles(packed) if precision == "int4" else _spread_bits(packed)
    skip = start % per_byte
    out.copy_(spread[:, skip : skip + stop - start])


def _spread_nibbles(packed: Tensor) -> Tensor:
    """Two codes from each byte; low half first."""
    words = packed.to(torch.int16)
    words |= words << 4
    words &= 0x0F0F  # little-endian: the low half is the first byte
    return words.view(torch.int8).sub_(8)


def _spread_bits(packed: Tensor) -> Tensor:
    """1 or −1 from each bit; lowest first."""
    eights = _signs_of_bytes(packed.device).index_select(0, packed.flatten().int())
    return eights.view(torch.int8).view(len(packed), 8 * packed.shape[1])


@cache
def _signs_of_bytes(device: torch.device) -> Tensor:
    """The eight signs in each byte, as the eight bytes of one integer."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return (bits * 2 - 1).to(torch.int8).view(torch.int64).flatten().to(device)


def _clipping_error(units: Tensor, clipping: float) -> Tensor:
    codes = (
        (units * (LARGEST["int4"] / clipping)).round_().clamp_(-LARGEST["int4"], LARGEST["int4"])
    )
    return codes.mul_(clipping / LARGEST["int4"]).sub_(units).square_().sum(dim=1)


def _normal(scales: Tensor, largest: Tensor) -> Tensor:
    """`scales`, but none below the smallest normal number, where digits are lost; 0 for zeros."""
    return torch.where(largest > 0, scales.clamp(min=torch.finfo(scales.dtype).tiny), 0)
