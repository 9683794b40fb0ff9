"""What a record refers to: a stored tensor by its hash, or a piece of one; no torch.

`<hash>` is a tensor. `<hash>/<offset>/<dtype>/<n>x<m>` are n · m values from that byte of it on.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache

HASH_LENGTH = 64
ITEM_BYTES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "uint16": 2,
    "int16": 2,
    "float16": 2,
    "bfloat16": 2,
    "uint32": 4,
    "int32": 4,
    "float32": 4,
    "uint64": 8,
    "int64": 8,
    "float64": 8,
    "complex64": 8,
}
DIMENSIONS_LIMIT = 64

_HASH = re.compile(r"[0-9a-f]{64}")
_NUMBER = r"(?:0|[1-9][0-9]{0,17})"
_PIECE = re.compile(
    rf"/({_NUMBER})/([a-z][a-z0-9_]{{0,31}})/((?:{_NUMBER}(?:x{_NUMBER}){{0,63}})?)"
)


@dataclass(frozen=True, slots=True)
class Piece:
    """Values of a dtype (by name) and shape, from byte `offset` of a tensor on."""

    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def is_hash(text: object) -> bool:
    """Whether `text` is a SHA-256 as a store writes it: 64 lower-case hex digits."""
    return isinstance(text, str) and _HASH.fullmatch(text) is not None


def is_reference(text: object) -> bool:
    """Whether `text` is the hash of a tensor, or of one with a piece of it."""
    if not isinstance(text, str) or not is_hash(text[:HASH_LENGTH]):
        return False
    return len(text) == HASH_LENGTH or piece_in(text[HASH_LENGTH:]) is not None


def tensor_of(reference: str) -> str:
    """The hash of the tensor that is referred to."""
    return reference[:HASH_LENGTH]


def piece_of(reference: str) -> Piece | None:
    """The piece of the tensor that is meant; None if it is the whole."""
    return piece_in(reference[HASH_LENGTH:]) if len(reference) > HASH_LENGTH else None


@lru_cache(maxsize=1 << 14)
def piece_in(suffix: str) -> Piece | None:
    """The piece that is written after a hash; None if that is none."""
    found = _PIECE.fullmatch(suffix)
    if found is None or found[2] not in ITEM_BYTES:
        return None
    offset, dtype, sizes = found.groups()
    shape = tuple(map(int, sizes.split("x"))) if sizes else ()
    # As torch has it: sizes of 0 count as 1.
    if math.prod(max(size, 1) for size in shape) * ITEM_BYTES[dtype] >= 1 << 63:
        return None
    return Piece(int(offset), dtype, shape) if len(shape) <= DIMENSIONS_LIMIT else None


def reference_to(digest: str, piece: Piece) -> str:
    """How a piece of the tensor `digest` is referred to."""
    return f"{digest}/{piece.offset}/{piece.dtype}/{'x'.join(map(str, piece.shape))}"
