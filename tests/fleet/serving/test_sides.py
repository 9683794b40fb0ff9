"""Halves of a batch side by side."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from fleet.serving.bound import BoundModel
from fleet.serving.inputs import Together
from fleet.serving.sides import LEAST_ROWS, Sides
from tests.fleet.serving import zoo

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(40, 500), nn.Linear(500, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.first(x).relu())


def inputs(rows: int) -> Together:
    return Together((zoo.numbers(rows, 40, seed=rows),), {}, None)


def bound_of(model: nn.Module) -> BoundModel:
    return BoundModel(model, zoo.tensors_of(model), CPU, None)


def test_both_sides_compute_what_the_model_does():
    bound = bound_of(Layers())
    sides = Sides(bound)
    with torch.inference_mode():
        sides.learn(inputs(3))
        wanted = {rows: bound.forward(inputs(rows)) for rows in (16, 17)}
        found: dict[int, torch.Tensor] = {}
        used: dict[int, tuple[nn.Module, int, int]] = {}

        both = threading.Barrier(2)

        def compute(mine: BoundModel, rows: int) -> None:
            both.wait(10)
            found[rows] = mine.forward(inputs(rows))
            used[rows] = mine.model, torch.get_num_threads(), threading.get_ident()

        sides.run(compute, [16, 17])
    for rows, answer in found.items():
        torch.testing.assert_close(answer, wanted[rows])
    assert used[16][0] is not used[17][0]
    assert used[16][0].first.weight is used[17][0].first.weight  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    assert used[16][1] == used[17][1] == 1
    assert used[16][2] != used[17][2]
    assert torch.get_num_threads() == 2
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [2]
    sides.close()


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([LEAST_ROWS] * 2, [1, 1]),
        ([1] * 20, [10, 10]),
        ([20, 1, 1], [1, 2]),
        ([1, 1, 20], [2, 1]),
        ([4, 3, 4, 5], [2, 2]),
        ([2 * LEAST_ROWS - 1, 0], [2]),
        ([100], [1]),
        ([], [0]),
    ],
)
def test_pieces_have_about_as_many_rows(rows, wanted):
    sides = Sides(bound_of(Layers()))
    sides.learn(inputs(3))
    assert [len(piece) for piece in sides.halves(rows, rows)] == wanted
    sides.close()


def test_what_one_side_raises_is_raised_when_both_are_done():
    sides = Sides(bound_of(Layers()))
    sides.learn(inputs(3))
    done = []

    def compute(_: BoundModel, part: int) -> None:
        if not part:
            raise MemoryError("too much")
        done.append(part)

    with pytest.raises(MemoryError, match="too much"):
        sides.run(compute, [0, 1, 2, 3])
    assert done == [1, 3]
    sides.close()


def test_a_model_that_cannot_be_copied_has_one_side():
    class Locked(Layers):
        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()

    sides = Sides(bound_of(Locked()))
    sides.learn(inputs(3))
    assert len(sides.halves([0, 1], [100, 100])) == 1
    sides.close()


def test_one_thread_has_one_side():
    torch.set_num_threads(1)
    sides = Sides(bound_of(Layers()))
    sides.learn(inputs(3))
    assert len(sides.halves([0, 1], [100, 100])) == 1
