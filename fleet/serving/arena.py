"""Memory that is taken from the system once, and given out in pieces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

ALIGNMENT = 4 << 10
# Without a budget, memory is taken so much at a time.
CHUNK_BYTES = 64 << 20


def rounded(nbytes: int) -> int:
    """The bytes of the smallest piece that holds so many."""
    return max(1, -(-nbytes // ALIGNMENT)) * ALIGNMENT


@dataclass(frozen=True)
class Piece:
    """Bytes from `start` of a chunk."""

    chunk: int
    start: int
    memory: Tensor

    @property
    def end(self) -> int:
        return self.start + len(self.memory)


class Arena:
    """Pieces of one chunk of `budget` bytes, or without a budget of as many chunks as it takes.

    A piece is cut from the smallest hole that is large enough; holes that touch become one. Nothing
    is given back before the end: on the CPU, memory that was never used is none yet.
    """

    def __init__(self, budget: int | None, allocate: Callable[[int], Tensor]) -> None:
        self.budget = budget
        self._allocate = allocate
        self._chunks: list[Tensor] = []
        # Of each hole (chunk, start) → end, and the other way round.
        self._ends: dict[tuple[int, int], int] = {}
        self._starts: dict[tuple[int, int], int] = {}

    def take(self, nbytes: int) -> Piece | None:
        """A piece for so many bytes; None where no hole is large enough."""
        size = rounded(nbytes)
        found = self._hole(size)
        if found is None and self._grow(size):
            found = self._hole(size)
        if found is None:
            return None
        chunk, start = found
        end = self._ends.pop(found)
        del self._starts[chunk, end]
        if start + size < end:
            self._note(chunk, start + size, end)
        return Piece(chunk, start, self._chunks[chunk][start : start + size])

    def give(self, piece: Piece) -> None:
        """Take a piece back."""
        chunk, start, end = piece.chunk, piece.start, piece.end
        after = self._ends.pop((chunk, end), None)
        if after is not None:
            del self._starts[chunk, after]
            end = after
        before = self._starts.pop((chunk, start), None)
        if before is not None:
            del self._ends[chunk, before]
            start = before
        self._note(chunk, start, end)

    def _hole(self, size: int) -> tuple[int, int] | None:
        holes = ((end - at[1], at) for at, end in self._ends.items() if end - at[1] >= size)
        return min(holes, default=(0, None))[1]

    def _grow(self, size: int) -> bool:
        if self.budget is not None and self._chunks:
            return False
        whole = max(size, CHUNK_BYTES) if self.budget is None else self.budget
        self._chunks.append(self._allocate(whole))
        self._note(len(self._chunks) - 1, 0, whole // ALIGNMENT * ALIGNMENT)
        return True

    def _note(self, chunk: int, start: int, end: int) -> None:
        if start < end:
            self._ends[chunk, start] = end
            self._starts[chunk, end] = start
