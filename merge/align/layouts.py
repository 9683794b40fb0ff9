"""Where the units of each permutation group lie along an axis of a tensor, and how they move."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from merge.align.axes import Atom, Axis, extent, leaves

Table = Int[Tensor, "_copies _size"]
"""A group's permutation: unit i of the result is unit `table[c, i]` of the source.

A group with a parent has one row for each unit of it (a head's own order of its channels); the
rows count the units of the result. Others have one row.
"""


@dataclass(frozen=True)
class Factor:
    """Steps of `stride` along an axis: the units of `group` in the order of its table.

    Without a group they stay where they are. `parent` is the group whose unit picks the row.
    """

    group: int | None
    size: int
    stride: int
    parent: int | None = None


@dataclass(frozen=True)
class Term:
    """The places `offset + Σ_k stride_k · i_k` along an axis, for all i."""

    offset: int
    factors: tuple[Factor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(factor.size for factor in self.factors)

    @property
    def groups(self) -> tuple[int | None, ...]:
        return tuple(factor.group for factor in self.factors)


Layout = tuple[Term, ...]
"""One axis: terms that together cover it once."""


def places(term: Term) -> Int[Tensor, ...]:
    """The places of a term [*sizes of its factors]."""
    found = torch.tensor(term.offset)
    for factor in term.factors:
        found = found[..., None] + factor.stride * torch.arange(factor.size)
    return found


def sources(term: Term, tables: Sequence[Table]) -> Int[Tensor, ...]:
    """What lies at the places of a term after the groups have moved, by its place before."""
    found = torch.full(term.shape, term.offset)
    for k, factor in enumerate(term.factors):
        if factor.group is None:
            steps = torch.arange(factor.size)
        elif factor.parent is None:
            steps = tables[factor.group][0]
        else:
            parent = term.groups.index(factor.parent)
            table = tables[factor.group]
            shape = [1] * len(term.factors)
            shape[parent], shape[k] = table.shape
            found += factor.stride * (table if parent < k else table.T).reshape(shape)
            continue
        shape = [1] * len(term.factors)
        shape[k] = factor.size
        found += factor.stride * steps.view(shape)
    return found


def is_fixed(layout: Layout) -> bool:
    """Whether nothing moves along the axis."""
    return all(group is None for term in layout for group in term.groups)


def gather_index(layout: Layout, tables: Sequence[Table]) -> Int[Tensor, " places"]:
    """The index along an axis that moves its groups: result[i] = source[index[i]]."""
    at = torch.cat([places(term).flatten() for term in layout])
    index = torch.empty_like(at)
    index[at] = torch.cat([sources(term, tables).flatten() for term in layout])
    return index


# --- from atoms ---------------------------------------------------------------------------------

AtomTerm = tuple[int, tuple[tuple[Atom, int], ...]]
"""Offset, and the atoms with their strides."""


def terms(axis: Iterable[Atom], stride: int = 1) -> list[AtomTerm]:
    """An axis as a sum of products of atoms; families are not told apart."""
    result: list[AtomTerm] = [(0, ())]
    for atom in reversed(leaves(axis)):
        result = [
            (offset + inner, (*factors, *rest))
            for offset, factors in _alternatives(atom, stride)
            for inner, rest in result
        ]
        stride *= atom.size
    return result


def _alternatives(atom: Atom, stride: int) -> list[AtomTerm]:
    if atom.pieces is None:
        return [(0, ((atom, stride),))]
    found, start = [], 0
    for piece in atom.pieces:
        found += [(start * stride + offset, rest) for offset, rest in terms(piece, stride)]
        start += extent(piece)
    return found


def unfolded_terms(axis: Axis) -> list[AtomTerm]:
    """An axis as a sum of products of atoms, each member of a family by itself."""
    todo, done = terms(axis)[::-1], []
    while todo:
        offset, factors = todo.pop()
        family = next((atom.family for atom, _ in factors if atom.family is not None), None)
        if family is None:
            done.append((offset, factors))
            continue
        slot = family[0].root()
        for index in reversed(range(slot.size)):
            todo += _at_slot(offset, factors, slot, index)[::-1]
    return done


def _at_slot(
    offset: int, factors: Iterable[tuple[Atom, int]], slot: Atom, index: int
) -> list[AtomTerm]:
    """A term where the slot has this index and its families are that member."""
    result: list[AtomTerm] = [(offset, ())]
    for atom, stride in factors:
        if atom is slot:
            result = [(first + index * stride, found) for first, found in result]
            continue
        member = atom.family is not None and atom.family[0].root() is slot
        one = atom.family[1][index] if atom.family is not None and member else atom
        result = [
            (first + more, (*found, *rest))
            for first, found in result
            for more, rest in terms((one,), stride)
        ]
    return result
