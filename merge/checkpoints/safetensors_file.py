"""The safetensors header, parsed and checked by us.

Format: 8 bytes of header length (little endian), a JSON object from tensor name to dtype, shape
and data offsets, then the data without holes; https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import math
import reprlib
import struct
from typing import Any

import torch

from merge.checkpoints.files import HEADER_BYTES_LIMIT, InputFile
from merge.checkpoints.strict_json import parse_json
from merge.checkpoints.tensors import Stored, check_shape
from merge.errors import MergeError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_safetensors(
    file: InputFile, *, header_limit: int = HEADER_BYTES_LIMIT, check_size: bool = True
) -> dict[str, Stored]:
    """Every tensor of a safetensors file, from its header alone.

    Raises MergeError unless lengths, names, dtypes, shapes and offsets agree with each other and
    with the size of the file: offsets cover the data exactly, without overlap or hole. Without
    `check_size` the data may end before or after what the header describes.
    """
    if file.size < 8:
        raise MergeError(f"{file}: has {file.size} bytes, a safetensors file has at least 10")
    (length,) = struct.unpack("<Q", file.read_bytes(0, 8))
    if length > file.size - 8:
        raise MergeError(
            f"{file}: says its header has {length} bytes, but only {file.size - 8} follow; the "
            "file is truncated or no safetensors file: get or write it again"
        )
    if length > header_limit:
        raise MergeError(
            f"{file}: says its header has {length} bytes, at most {header_limit} are read"
        )
    header = parse_json(file.read_bytes(8, length), f"{file}: the header")
    if not isinstance(header, dict):
        raise MergeError(f"{file}: the header is not a JSON object; the file is corrupt")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise MergeError(f"{file}: '__metadata__' is not a mapping of strings; the file is corrupt")

    data_start = 8 + length
    stored: dict[str, Stored] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, fields in header.items():
        try:
            dtype, shape, begin, end = _check_entry(fields)
        except ValueError as error:
            raise MergeError(f"{file}: '{name}': {error}; the file is corrupt") from error
        stored[name] = Stored(file, data_start + begin, shape, dtype)
        ranges.append((begin, end, name))

    position = 0
    for begin, end, name in sorted(ranges):
        if begin != position:
            found = "overlaps the tensor before it" if begin < position else "leaves a hole"
            raise MergeError(
                f"{file}: '{name}' {found}: its data begins at byte {begin}, wanted {position}; "
                "the file is corrupt"
            )
        position = end
    if check_size and data_start + position != file.size:
        found = "truncated" if data_start + position > file.size else "too long"
        raise MergeError(
            f"{file}: is {found}: the header describes {data_start + position} bytes, the file has "
            f"{file.size}; get or write it again"
        )
    return stored


def _check_entry(fields: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= fields.keys():
        raise ValueError("its entry is not an object with dtype, shape and data_offsets")
    kind, offsets = fields["dtype"], fields["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise ValueError(f"its dtype is {reprlib.repr(kind)}, known are {', '.join(DTYPES)}")
    dtype = DTYPES[kind]
    shape = check_shape(fields["shape"], dtype)
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(n) is int and 0 <= n < 1 << 63 for n in offsets)
    ):
        raise ValueError(
            f"its data_offsets are {reprlib.repr(offsets)}, wanted two non-negative integers"
        )
    begin, end = offsets
    wanted = math.prod(shape) * dtype.itemsize
    if end - begin != wanted:
        raise ValueError(
            f"its data_offsets span {end - begin} bytes, {kind} {list(shape)} has {wanted}"
        )
    return dtype, shape, begin, end
