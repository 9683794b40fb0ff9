"""A pack on the disk: a safetensors file that is named by its hash, and its tensors by theirs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Shaped
from torch import Tensor

from fleet.storage.hashes import tensor_hash
from merge.checkpoints.files import InputFile
from merge.checkpoints.safetensors_file import read_safetensors
from merge.checkpoints.tensors import tensor_bytes
from merge.errors import MergeError

CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies: `nbytes` bytes from `offset` of the file `path`, row-major."""

    path: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@contextmanager
def opened(path: Path) -> Iterator[InputFile]:
    """The file, closed afterwards; OSError, and MergeError for what is no plain file."""
    file = InputFile(path)
    try:
        yield file
    finally:
        file.close()


def read_tensor(file: InputFile, place: Place) -> Shaped[Tensor, ...]:
    """The values at a place of the file; MergeError where it ends too early."""
    tensor = torch.empty(place.shape, dtype=place.dtype)
    if place.nbytes:
        file.read_into(tensor_bytes(tensor), place.offset)
    return tensor


def file_hash(file: InputFile) -> str:
    """SHA-256 of the whole file, in hex."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(CHUNK_BYTES, file.size)))
    for offset in range(0, file.size, CHUNK_BYTES):
        chunk = buffer[: file.size - offset]
        file.read_into(chunk, offset)
        digest.update(chunk)
    return digest.hexdigest()


def places_in(file: InputFile, contents: Mapping[str, int]) -> dict[str, Place]:
    """Where the tensors of a whole file are; MergeError unless it has `contents` (hash → bytes)."""
    places = _places(file)
    for digest, nbytes in contents.items():
        place = places.get(digest)
        if place is None or place.nbytes != nbytes:
            what = "does not hold" if place is None else f"has {place.nbytes} bytes of"
            raise MergeError(f"{file}: {what} the tensor {digest} ({nbytes} bytes expected)")
    return places


def whole_places(file: InputFile, contents: Mapping[str, int]) -> dict[str, Place]:
    """Where those of `contents` are that a damaged file holds whole, each read and hashed."""
    try:
        places = _places(file, whole=False)
    except MergeError:
        return {}  # without a header nothing can be found
    return {
        digest: place
        for digest, place in places.items()
        if contents.get(digest) == place.nbytes
        and place.offset + place.nbytes <= file.size
        and tensor_hash(read_tensor(file, place)) == digest
    }


def _places(file: InputFile, *, whole: bool = True) -> dict[str, Place]:
    return {
        name: Place(
            file.path,
            stored.offset,
            stored.span * stored.dtype.itemsize,
            stored.dtype,
            stored.shape,
        )
        for name, stored in read_safetensors(file, check_size=whole).items()
    }
