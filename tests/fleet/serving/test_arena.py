"""Pieces of memory that is taken once."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from fleet.serving.arena import ALIGNMENT, CHUNK_BYTES, Arena, Piece, rounded


def memory(nbytes: int) -> Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8)


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 4097, 1 << 20])
def test_a_piece_holds_what_it_is_for(nbytes):
    piece = Arena(1 << 20, memory).take(nbytes)
    assert piece is not None
    assert len(piece.memory) == rounded(nbytes) >= max(nbytes, 1)


def test_pieces_do_not_overlap_and_holes_that_touch_become_one():
    arena, rng = Arena(100 * ALIGNMENT + 17, memory), random.Random(0)
    held: list[tuple[Piece, int]] = []
    refused = 0
    for turn in range(2000):
        piece = arena.take(rng.randint(1, 12 * ALIGNMENT))
        if piece is not None:
            piece.memory.fill_(turn % 251)
            held.append((piece, turn % 251))
        refused += piece is None
        for _ in range(rng.randint(0, 2)):
            if held:
                mine, number = held.pop(rng.randrange(len(held)))
                assert bool((mine.memory == number).all())
                arena.give(mine)
    assert refused > 10
    for mine, _ in held:
        arena.give(mine)
    whole = arena.take(100 * ALIGNMENT)
    assert whole is not None
    assert arena.take(1) is None


def test_the_smallest_hole_that_is_large_enough():
    arena = Arena(10 * ALIGNMENT, memory)
    pieces = [arena.take(count * ALIGNMENT) for count in (3, 1, 2, 1, 3)]
    for piece in (pieces[0], pieces[2]):
        assert piece is not None
        arena.give(piece)
    found = arena.take(2 * ALIGNMENT)
    assert found is not None
    assert found.start == 4 * ALIGNMENT


def test_memory_is_asked_for_once_or_as_often_as_it_takes():
    asked: list[int] = []

    def counted(nbytes: int) -> Tensor:
        asked.append(nbytes)
        return memory(nbytes)

    arena = Arena(1 << 20, counted)
    assert not asked
    assert arena.take(2 << 20) is None
    assert arena.take(1 << 20) is not None
    assert asked == [1 << 20]
    asked.clear()
    unlimited = Arena(None, counted)
    pieces = [unlimited.take(nbytes) for nbytes in (1000, CHUNK_BYTES + 1, 1000)]
    assert asked == [CHUNK_BYTES, rounded(CHUNK_BYTES + 1)]
    assert [piece.chunk for piece in pieces if piece is not None] == [0, 1, 0]
