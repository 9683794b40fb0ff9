"""Units in memory within a budget, and who has to leave."""

from __future__ import annotations

import heapq
import mmap
from collections.abc import Callable, Container, Hashable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fleet.serving.arena import Arena, Piece, rounded

# What it costs to fetch something at all, in bytes that could be read meanwhile.
FETCH_BYTES = 64 << 10
# Counts of uses are halved after so many uses of each that is known.
AGEING = 16

Tensors = dict[str, Tensor]


@runtime_checkable
class Unit(Protocol):
    """Tensors that are fetched together, and how they are read into a slot."""

    @property
    def key(self) -> Hashable: ...

    @property
    def nbytes(self) -> int: ...

    def load(self, slot: Tensor) -> tuple[Tensors, int]:
        """The tensors, in the slot's memory, and the bytes that were read for them."""
        ...


@dataclass
class Entry:
    """A unit in a slot, or on its way there. What is pinned stays."""

    unit: Unit
    piece: Piece
    fetched: Future[Tensors] = field(default_factory=Future)
    pins: int = 0
    priority: float = 0.0

    @property
    def slot(self) -> Tensor:
        return self.piece.memory

    @property
    def failed(self) -> bool:
        return self.fetched.done() and self.fetched.exception() is not None


class Slots:
    """Units in slots, pieces of `budget` bytes (None: no limit).

    Who leaves has the least `clock + uses · cost / size` (Greedy-Dual-Size-Frequency), where the
    clock is the priority of whoever left last: recency weighted with frequency. Uses are counted
    of units that have left too, and halved as time goes on. What leaves depends on nothing but the
    order of calls.
    """

    def __init__(self, budget: int | None, allocate: Callable[[int], Tensor]) -> None:
        self.budget = budget
        self.used = 0
        self.evictions = 0
        self._arena = Arena(budget, allocate)
        self._entries: dict[Hashable, Entry] = {}
        self._uses: dict[Hashable, int] = {}
        self._counted = 0
        self._clock = 0.0
        self._queue: list[tuple[float, int, Hashable]] = []
        self._number = 0

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def fits(self, units: Iterable[Unit]) -> bool:
        """Whether these have room together when nothing else has."""
        total = sum(rounded(unit.nbytes) for unit in units)
        return self.budget is None or total <= self.budget

    def pin(self, unit: Unit, uses: int = 1) -> tuple[Entry, bool] | None:
        """The unit's slot, to stay until it is unpinned, and whether it is new there.

        None where there is no room that nobody has pinned. What could not be fetched before is new.
        """
        entry = self._entries.get(unit.key)
        if entry is not None and entry.failed:
            self.drop(entry)
            entry = None
        fresh = entry is None
        if entry is None:
            piece = self._piece(unit.nbytes)
            if piece is None:
                return None
            entry = self._entries[unit.key] = Entry(unit, piece)
            self.used += len(piece.memory)
        if uses:
            self._count(unit.key, uses)
        weight = 1 + FETCH_BYTES / max(unit.nbytes, 1)
        entry.priority = self._clock + max(self._uses.get(unit.key, 0), 1) * weight
        entry.pins += 1
        return entry, fresh

    def unpin(self, entry: Entry) -> None:
        """It may leave, as far as this caller is concerned."""
        entry.pins -= 1
        if not entry.pins and self._entries.get(entry.unit.key) is entry:
            self._number += 1
            heapq.heappush(self._queue, (entry.priority, self._number, entry.unit.key))

    def drop(self, entry: Entry) -> None:
        """Take it out now: it is wrong, or nobody will ask for it again."""
        if self._entries.get(entry.unit.key) is entry:
            del self._entries[entry.unit.key]
            self.used -= len(entry.slot)
            self._arena.give(entry.piece)

    def keep_only(self, keys: Container[Hashable]) -> None:
        """Drop what nobody has pinned and nobody will ask for."""
        for key, entry in list(self._entries.items()):
            if not entry.pins and key not in keys:
                self.drop(entry)

    def _piece(self, nbytes: int) -> Piece | None:
        while (piece := self._arena.take(nbytes)) is None:
            if not self._evict():
                return None
        return piece

    def _evict(self) -> bool:
        while self._queue:
            priority, _, key = heapq.heappop(self._queue)
            entry = self._entries.get(key)
            if entry is None or entry.pins or entry.priority != priority:
                continue
            self._clock = max(self._clock, priority)
            self.evictions += 1
            self.drop(entry)
            return True
        return False

    def _count(self, key: Hashable, uses: int) -> None:
        self._uses[key] = self._uses.get(key, 0) + uses
        self._counted += uses
        if self._counted >= AGEING * (len(self._uses) + 64):
            self._counted = 0
            self._uses = {k: n // 2 for k, n in self._uses.items() if n > 1 or k == key}
            self._uses[key] = max(self._uses[key], 1)


def host_memory(nbytes: int) -> Tensor:
    """Bytes of the host, which are the system's again when nobody has them."""
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)


def pinned_memory(nbytes: int) -> Tensor:
    """Bytes of the host that a device can copy from by itself."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
