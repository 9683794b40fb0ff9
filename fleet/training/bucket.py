"""Models of one kind with their tensors stacked: who is where, and which are computed together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from fleet.training.step import Kernel
from fleet.training.trainee import Trainee


class Chunk(NamedTuple):
    """Neighbours that are computed together, from slot `slots.start + skipped` on.

    `slots` may reach over others on both sides: what is computed there is thrown away, which costs
    less than to record calls of every size.
    """

    trainees: Sequence[Trainee]
    slots: slice
    skipped: int

    @property
    def size(self) -> int:
        return self.slots.stop - self.slots.start

    @property
    def rows(self) -> int:
        return self.trainees[0].rows

    @property
    def computed(self) -> list[Trainee]:
        """Whose images each slot sees."""
        first = self.trainees[:1]
        spare = self.size - self.skipped - len(self.trainees)
        return [*first] * self.skipped + [*self.trainees] + [*first] * spare


class Bucket:
    """Trainees of one kind, in the order of their batch sizes, each with a slot of each tensor.

    `shared` holds what no step writes and what is the same for all of them; `version` changes with
    it.
    """

    def __init__(self, kernel: Kernel, width: int) -> None:
        self.kernel, self.width = kernel, width
        self.trainees: list[Trainee] = []
        self.stacked: dict[str, Tensor] = {}
        self.shared: dict[str, Tensor] = {}
        self.version = 0
        self._written = {*kernel.parts.trained, *kernel.parts.written, *kernel.parts.counted}
        self._views: dict[tuple[int, int], dict[str, Tensor]] = {}

    def enter(self, states: Sequence[tuple[Trainee, dict[str, Tensor]]]) -> None:
        """Give these trainees a slot each, in which their tensors are from now on."""
        here = [(trainee, trainee.release()) for trainee in self.trainees]
        self._arrange([*here, *states])

    def leave(self, gone: Sequence[Trainee], keep: Sequence[Trainee] = ()) -> None:
        """Take these trainees' slots away; those in `keep` have copies of their tensors then."""
        for trainee in gone:
            state = trainee.release()
            if trainee in keep:
                trainee.bind({name: tensor.clone() for name, tensor in state.items()})
        stay = [trainee for trainee in self.trainees if trainee not in gone]
        self._arrange([(trainee, trainee.release()) for trainee in stay])

    def _arrange(self, here: list[tuple[Trainee, dict[str, Tensor]]]) -> None:
        here.sort(key=lambda pair: pair[0].rank)
        self.trainees = [trainee for trainee, _ in here]
        self._views.clear()
        former, self.shared = self.shared, {}
        if not here:
            self.stacked = {}
            return
        slots = max(start + size for start, _, size in cuts(len(here), self.width))
        states = [state for _, state in here]
        names = list(states[0])
        # Tensor by tensor, so that only one exists twice.
        for name in names:
            tensors = [state.pop(name) for state in states]
            if name not in self._written and all(_same(tensors[0], other) for other in tensors):
                known = former.get(name)
                same = known is not None and _same(known, tensors[0])
                self.shared[name] = known if known is not None and same else tensors[0].clone()
                self.stacked.pop(name, None)
            else:
                tensors += tensors[:1] * (slots - len(tensors))
                self.stacked[name] = _stacked(tensors)
        if former.keys() != self.shared.keys() or any(
            former[n] is not self.shared[n] for n in former
        ):
            self.version += 1
        for slot, trainee in enumerate(self.trainees):
            trainee.bind(
                {
                    name: self.stacked[name][slot] if name in self.stacked else self.shared[name]
                    for name in names
                }
            )

    def chunks(self) -> Iterator[Chunk]:
        """All trainees, cut where the number of rows of their next batches changes."""
        start, slots = 0, len(next(iter(self.stacked.values()), ()))
        for _, run in groupby(self.trainees, key=lambda trainee: trainee.rows):
            alike = list(run)
            for offset, count, size in cuts(len(alike), self.width):
                first = min(start + offset, slots - size)
                mine = alike[offset : offset + count]
                yield Chunk(mine, slice(first, first + size), start + offset - first)
            start += len(alike)

    def views(self, slots: slice) -> dict[str, Tensor]:
        """These slots of every stacked tensor."""
        key = slots.start, slots.stop
        if key not in self._views:
            self._views[key] = {name: tensor[slots] for name, tensor in self.stacked.items()}
        return self._views[key]

    def write(self, chunk: Chunk, buffers: Mapping[str, Tensor]) -> None:
        """What a step made of the buffers of a chunk's models, and one batch more."""
        first = chunk.slots.start + chunk.skipped
        mine = self.views(slice(first, first + len(chunk.trainees)))
        stop = chunk.skipped + len(chunk.trainees)
        if buffers:
            made = [made[chunk.skipped : stop] for made in buffers.values()]
            torch._foreach_copy_([mine[name] for name in buffers], made)  # pyright: ignore[reportPrivateImportUsage]
        if self.kernel.parts.counted:
            counts = [mine[name] for name in self.kernel.parts.counted]
            torch._foreach_add_(counts, 1)  # pyright: ignore[reportPrivateImportUsage]


def cuts(count: int, width: int) -> Iterator[tuple[int, int, int]]:
    """Where each chunk starts, how many it has and how many slots it takes.

    Few different sizes, since each is recorded by itself: `width`, and for the rest the smallest
    of w, ¾·w, ½·w, ⅜·w, … 2 that it fits into; never 1, which would be rounded in another way.
    """
    sizes = {max(2, width * share // 4 >> halvings) for share in (3, 4) for halvings in range(16)}
    for start in range(0, count, width):
        rest = min(width, count - start)
        yield start, rest, min(s for s in {*sizes, width} if s >= rest) if width > 1 else 1


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """With a leading model axis; filters with their channels last, as convolutions are fastest."""
    if tensors[0].dim() != 4:
        return torch.stack(list(tensors))
    return torch.stack([tensor.permute(0, 2, 3, 1) for tensor in tensors]).permute(0, 1, 4, 2, 3)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() or torch.equal(one, other)
