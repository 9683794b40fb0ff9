"""Tensors read from packs straight into a slot's memory."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from fleet.errors import FleetError
from fleet.serving.slots import Tensors
from fleet.storage.objects import Packs
from fleet.storage.pack_file import Place
from merge.checkpoints.tensors import tensor_bytes

ALIGNMENT = 64
MOST_AT_ONCE = 512  # a system takes 1024


@dataclass
class PartsUnit:
    """Tensors of a store by their hashes, as they are stored; each of `nbytes` begins aligned."""

    key: Hashable
    packs: Packs
    hashes: Sequence[str]
    nbytes: int = field(init=False)
    _places: dict[str, Place] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.nbytes = sum(aligned(self.packs.nbytes(digest)) for digest in self.hashes)

    def load(self, slot: Tensor) -> tuple[Tensors, int]:
        """Read them; FleetError for a pack that is missing, truncated or altered."""
        try:
            return self._load(slot)
        except FileNotFoundError:
            # gc moved them after their places were looked up: they have others now.
            pass
        try:
            return self._load(slot)
        except FileNotFoundError as error:
            raise FleetError(
                f"{error.filename}: went away twice while it was read; ask again"
            ) from error

    def _load(self, slot: Tensor) -> tuple[Tensors, int]:
        places = self._checked_places()
        memory = tensor_bytes(slot)
        tensors: Tensors = {}
        wanted: dict[Path, list[tuple[int, memoryview]]] = {}
        start = 0
        for digest, place in places.items():
            stop = start + place.nbytes
            if place.nbytes:
                wanted.setdefault(place.path, []).append((place.offset, memory[start:stop]))
            tensors[digest] = slot[start:stop].view(place.dtype).view(place.shape)
            start += aligned(place.nbytes)
        for path, pieces in wanted.items():
            try:
                _read(path, pieces)
            except FileNotFoundError:
                raise
            except OSError as error:
                raise FleetError(f"{path}: cannot be read ({error.strerror or error})") from error
        return tensors, sum(place.nbytes for place in places.values())

    def _checked_places(self) -> dict[str, Place]:
        """Where they are; of each pack that is known the file is looked at."""
        if self._places is None:
            self._places = {digest: self.packs.place(digest) for digest in self.hashes}
            return self._places
        seen: set[Path] = set()
        for digest, place in self._places.items():
            if place.path not in seen:
                seen.add(place.path)
                if not self.packs.is_still(digest, place):
                    self._places = None
                    return self._checked_places()
        return self._places


def aligned(nbytes: int) -> int:
    """The bytes up to the next place at which a tensor may begin."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _read(path: Path, pieces: list[tuple[int, memoryview]]) -> None:
    """Fill each piece from its offset: neighbours in the file with one call, without the GIL."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for offset, parts in _runs(sorted(pieces, key=lambda piece: piece[0])):
            found = os.preadv(descriptor, parts, offset)
            for part in parts:
                if found < len(part):
                    _read_rest(descriptor, part, max(found, 0), offset, path)
                offset += len(part)
                found -= len(part)
    finally:
        os.close(descriptor)


def _read_rest(descriptor: int, part: memoryview, done: int, offset: int, path: Path) -> None:
    while done < len(part):
        found = os.preadv(descriptor, [part[done:]], offset + done)
        if not found:
            raise FleetError(f"{path}: was truncated while it was read; put it back from a copy")
        done += found


def _runs(pieces: list[tuple[int, memoryview]]) -> Iterator[tuple[int, list[memoryview]]]:
    """(offset, pieces one after the other in the file)."""
    first, parts, end = 0, list[memoryview](), -1
    for offset, part in pieces:
        if offset != end or len(parts) == MOST_AT_ONCE:
            if parts:
                yield first, parts
            first, parts = offset, []
        parts.append(part)
        end = offset + len(part)
    if parts:
        yield first, parts
