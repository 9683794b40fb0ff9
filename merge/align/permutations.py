"""Permutations of a model's groups: draw them, apply them to its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from merge.align.layouts import Layout, Table, gather_index, is_fixed

if TYPE_CHECKING:
    from merge.align.groups import PermutationGroups


Index = Int[Tensor, " _size"]


@dataclass(frozen=True, eq=False)
class Permutations:
    """One permutation for each group: unit i of the result is unit `table[c, i]` of the source.

    Tables are [1, size], or [parent size, size] for a group with a parent.
    """

    groups: PermutationGroups
    tables: tuple[Table, ...]

    def only(self, group: int) -> Permutations:
        """This group's permutation, and none of the others."""
        rest = identity(self.groups).tables
        return Permutations(
            self.groups, tuple(t if k == group else rest[k] for k, t in enumerate(self.tables))
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Permutations) and all(map(torch.equal, self.tables, other.tables))

    @property
    def moved(self) -> int:
        """How many units change places."""
        still = identity(self.groups).tables
        return sum(int((a != b).sum()) for a, b in zip(self.tables, still, strict=True))

    def indices(self, name: str) -> list[Index | None]:
        """result[i] = source[index[i]] along each axis of a tensor; None where nothing moves."""
        layouts = self.groups.layouts.get(name, ())
        return [None if is_fixed(layout) else self._index(layout) for layout in layouts]

    def apply(self, name: str, tensor: Shaped[Tensor, ...]) -> Shaped[Tensor, ...]:
        """The tensor of this name with its units moved; itself where none are.

        Raises MergeError where its shape is not the model's.
        """
        self.groups.check_shape(name, tensor.shape)
        return move(tensor, self.indices(name))

    def _index(self, layout: Layout) -> Index | None:
        index = gather_index(layout, self.tables)
        return None if torch.equal(index, torch.arange(len(index))) else index


def move(tensor: Shaped[Tensor, ...], indices: Sequence[Index | None]) -> Shaped[Tensor, ...]:
    """The tensor with its indices along each axis moved; itself where none are."""
    for axis, index in enumerate(indices):
        if index is not None:
            tensor = tensor.index_select(axis, index.to(tensor.device))
    return tensor


def identity(groups: PermutationGroups) -> Permutations:
    """Everything stays."""
    return Permutations(
        groups,
        tuple(
            torch.arange(g.size).repeat(_copies(groups, k), 1) for k, g in enumerate(groups.groups)
        ),
    )


def random_permutations(groups: PermutationGroups, generator: torch.Generator) -> Permutations:
    """Every group in a random order."""
    return Permutations(
        groups,
        tuple(
            torch.stack(
                [torch.randperm(g.size, generator=generator) for _ in range(_copies(groups, k))]
            )
            for k, g in enumerate(groups.groups)
        ),
    )


def apply_permutations(
    permutations: Permutations, state: Mapping[str, Shaped[Tensor, ...]]
) -> dict[str, Shaped[Tensor, ...]]:
    """The tensors of a state dict with their units moved; the model computes the same with them.

    What the groups do not know (integer buffers) stays. Raises MergeError on a wrong shape.
    """
    return {name: permutations.apply(name, tensor) for name, tensor in state.items()}


def _copies(groups: PermutationGroups, group: int) -> int:
    parent = groups.groups[group].parent
    return 1 if parent is None else groups.groups[parent].size
