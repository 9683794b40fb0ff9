"""Axes of tensors as products and sums of atoms: which indices have to be permuted together.

An **atom** stands for the indices of one axis, or of one factor of it. Atoms that an operation
ties together are joined (union-find). A view that splits an axis makes its atom a product
(heads · dim), a concatenation a sum of pieces. An atom that is **frozen** must not be permuted.
Where a tensor is taken apart along an axis by index (q, k and v of one projection), that axis is
a *slot*, and an atom beside it may become a **family**: one member for each index of the slot.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

Axis = tuple["Atom", ...]
"""An axis as the product of its atoms, the slowest first; an axis of size one has none."""


class Atom:
    """`size` indices that are permuted as one."""

    __slots__ = ("_link", "beside", "factors", "family", "frozen", "pieces", "size")

    def __init__(self, size: int, frozen: str | None = None) -> None:
        self.size = size
        self.frozen = frozen
        self.factors: Axis | None = None
        self.pieces: tuple[Axis, ...] | None = None
        self.family: tuple[Atom, list[Atom]] | None = None
        self.beside: list[Atom] = []  # those that were made families over this slot
        self._link: Atom | None = None

    def root(self) -> Atom:
        """The atom that stands for all those joined with this one."""
        while self._link is not None:
            if self._link._link is not None:
                self._link = self._link._link
            self = self._link
        return self

    def link(self, other: Atom) -> None:
        """Let `other` stand for this atom."""
        other.beside += self.beside
        self._link = other


def new_axis(size: int) -> Axis:
    """An axis that nothing is known of yet."""
    return () if size == 1 else (Atom(size),)


def frozen_axis(size: int, reason: str) -> Axis:
    """An axis whose order means something."""
    return () if size == 1 else (Atom(size, reason),)


def extent(axis: Iterable[Atom]) -> int:
    """The number of indices of an axis."""
    return math.prod(atom.size for atom in axis)


def leaves(axis: Iterable[Atom]) -> list[Atom]:
    """The factors that are not products themselves; a sum is one of them."""
    found: list[Atom] = []
    for atom in axis:
        root = atom.root()
        found += [root] if root.factors is None else leaves(root.factors)
    return found


def is_frozen(axis: Iterable[Atom]) -> bool:
    """Whether no index of this axis may move."""
    return all(
        all(map(is_frozen, atom.pieces)) if atom.pieces is not None else atom.frozen is not None
        for atom in leaves(axis)
    )


def freeze(axis: Iterable[Atom], reason: str) -> None:
    """Allow no permutation of these atoms; the first reason is kept.

    Their order may be changed by what needs it: a family over them tells no members apart.
    """
    atoms = list(axis)
    _hold(atoms, reason)
    for slot in leaves(atoms):
        for atom in leaves(slot.beside):
            if atom.family is not None and atom.family[0].root() is slot:
                collapse(atom)


def _hold(axis: Iterable[Atom], reason: str) -> None:
    """Allow no permutation of these atoms, which stay in their order."""
    for atom in leaves(axis):
        for piece in atom.pieces or ():
            _hold(piece, reason)
        if atom.pieces is None and atom.frozen is None:
            atom.frozen = reason
            _hold(atom.family[1] if atom.family else (), reason)


def join(left: Iterable[Atom], right: Iterable[Atom], reason: str) -> None:
    """Tie two axes of one size together, index by index; freeze where their factors disagree."""
    ours, theirs = leaves(left)[::-1], leaves(right)[::-1]
    while ours and theirs:
        one, other = _take(ours), _take(theirs)
        large, rest = (one, ours) if one.size > other.size else (other, theirs)
        if one.size == other.size:
            _merge(one, other, reason)
        elif _splits(large, min(one.size, other.size)):
            rest += _split(large, min(one.size, other.size))[::-1]
            (theirs if rest is ours else ours).append(other if rest is ours else one)
        else:
            freeze([one, other, *ours, *theirs], f"{reason}, of factors of different sizes")
            return


def regroup(axis: Iterable[Atom], shape: Sequence[int], reason: str) -> list[Axis]:
    """The atoms of all axes of a tensor, row-major, as the axes of a view of this shape."""
    todo, sizes, result = leaves(axis)[::-1], list(shape)[::-1], []
    if 0 in sizes:
        freeze(todo, reason)
        return [frozen_axis(size, reason) for size in shape]
    while sizes:
        taken: list[Atom] = []
        need = size = sizes.pop()
        while need > 1:
            atom = _take(todo)
            if need % atom.size == 0:
                taken.append(atom)
                need //= atom.size
            elif _splits(atom, need):
                outer, inner = _split(atom, need)
                taken.append(outer)
                todo.append(inner)
                need = 1
            else:
                result += _regroup_frozen([*taken, atom], [size], todo, sizes, reason)
                break
        else:
            result.append(tuple(taken))
    return result


def concatenate(axes: Sequence[Axis], reason: str) -> Axis:
    """The sum of axes."""
    if len(axes) == 1:
        return axes[0]
    if all(map(is_frozen, axes)):
        return frozen_axis(sum(map(extent, axes)), reason)
    whole = Atom(sum(map(extent, axes)))
    whole.pieces = tuple(axes)
    return (whole,)


def narrow(axis: Axis, start: int, stop: int, reason: str) -> Axis:
    """The indices [start, stop) of an axis, which becomes a sum there."""
    size = extent(axis)
    if (start, stop) == (0, size):
        return axis
    atoms = leaves(axis)
    if is_frozen(atoms) or len(atoms) != 1 or stop - start == 0:
        freeze(atoms, reason)
        return frozen_axis(stop - start, reason)
    atom = atoms[0]
    if atom.pieces is None:
        if atom.family is not None:
            collapse(atom)
            return narrow(axis, start, stop, reason)
        bounds = sorted({0, start, stop, size})
        atom.pieces = tuple(new_axis(end - first) for first, end in pairwise(bounds))
    first, inside = 0, []
    for piece in atom.pieces:
        end = first + extent(piece)
        if first <= start and stop <= end:
            return narrow(piece, start - first, stop - first, reason)
        if start < end and first < stop:
            inside.append((first, end, piece))
        first = end
    if inside[0][0] == start and inside[-1][1] == stop:
        return concatenate([piece for *_, piece in inside], reason)
    freeze(atoms, reason)
    return frozen_axis(stop - start, reason)


def pick(axes: Sequence[Axis], dim: int, index: int, reason: str) -> list[Axis]:
    """The axes beside `dim` of the part of a tensor that has this index there."""
    others = [axis for place, axis in enumerate(axes) if place != dim]
    slots = leaves(axes[dim])
    if not slots:
        return others
    slot = slots[0]
    known = slot.frozen is None or any(
        atom.family is not None and atom.family[0].root() is slot
        for atom in leaves(sum(others, ()))
    )
    _hold(slots, reason)
    if len(slots) > 1 or slot.pieces is not None or slot.family is not None or not known:
        return others
    return [tuple(_member(atom, slot, index) for atom in leaves(axis)) for axis in others]


def collapse(atom: Atom) -> None:
    """Give up telling the members of a family apart."""
    assert atom.family is not None
    members, atom.family = atom.family[1], None
    for member in members:
        join((atom,), (member,), "the parts of a tensor that is taken apart")


def _member(atom: Atom, slot: Atom, index: int) -> Atom:
    if atom.frozen is not None or atom.pieces is not None or atom is slot:
        return atom
    if atom.family is None:
        _found_family(atom, slot, [(Atom(atom.size),) for _ in range(slot.size)])
    assert atom.family is not None
    return atom.family[1][index] if atom.family[0].root() is slot else atom


def _merge(one: Atom, other: Atom, reason: str) -> None:
    """Join two leaves of one size."""
    if one is other:
        return
    if one.pieces is not None and other.pieces is not None:
        if list(map(extent, one.pieces)) != list(map(extent, other.pieces)):
            freeze((one, other), f"{reason}: joins sums of different pieces")
            return
        pieces = list(zip(one.pieces, other.pieces, strict=True))
        one.link(other)
        for left, right in pieces:
            join(left, right, reason)
        return
    if one.pieces is not None:
        one, other = other, one
    for atom, beside in ((one, other), (other, one)):
        if atom.family is not None and not _families_agree(atom, beside):
            collapse(atom)
            join((atom,), (beside,), reason)
            return
    if one.frozen is not None:
        _hold((other,), one.frozen)
    elif other.frozen is not None and other.pieces is None:
        _hold((one,), other.frozen)
    ours, theirs = one.family, other.family
    one.link(other)
    if ours is not None and theirs is not None:
        for left, right in zip(ours[1], theirs[1], strict=True):
            join((left,), (right,), reason)
    elif ours is not None:
        other.family = ours


def _families_agree(atom: Atom, other: Atom) -> bool:
    """Whether the family of `atom` can be kept when it is joined with `other`."""
    assert atom.family is not None
    if other.pieces is not None or _reaches(atom, other):
        return False
    return other.family is None or (
        other.family[0].root() is atom.family[0].root() and not _reaches(other, atom)
    )


def _reaches(atom: Atom, wanted: Atom) -> bool:
    members = leaves(atom.family[1]) if atom.family else []
    return any(member is wanted or _reaches(member, wanted) for member in members)


def _take(stack: list[Atom]) -> Atom:
    """The next leaf; an atom on the stack may have become a product since it was put there."""
    while True:
        atom = stack.pop().root()
        if atom.factors is None:
            return atom
        stack += atom.factors[::-1]


def _splits(atom: Atom, outer: int) -> bool:
    """Whether a leaf can become the product of `outer` and the rest; a sum, of its equal pieces."""
    if atom.pieces is None:
        return atom.size % outer == 0
    return len(atom.pieces) == outer and len(set(map(extent, atom.pieces))) == 1


def _split(atom: Atom, outer: int) -> tuple[Atom, Atom]:
    """Make a leaf the product of `outer` and the rest."""
    parts = (Atom(outer, atom.frozen), Atom(atom.size // outer, atom.frozen))
    atom.factors = parts
    if atom.pieces is not None:
        parts[0].frozen = "cat: taken apart by index"
        _found_family(parts[1], parts[0], atom.pieces)
        atom.pieces = None
    elif atom.family is not None:
        slot, members = atom.family
        atom.family = None
        split = [regroup((member,), [part.size for part in parts], "view") for member in members]
        for part, axes in zip(parts, zip(*split, strict=True), strict=True):
            _found_family(part, slot, axes)
    return parts


def _found_family(atom: Atom, slot: Atom, axes: Sequence[Axis]) -> None:
    members = [Atom(atom.size) for _ in axes]
    atom.family = (slot, members)
    slot.root().beside.append(atom)
    for member, axis in zip(members, axes, strict=True):
        join((member,), axis, "view")


def _regroup_frozen(
    taken: list[Atom], shape: list[int], todo: list[Atom], sizes: list[int], reason: str
) -> list[Axis]:
    """Freeze atoms up to where those taken and the shape have the same product again."""
    while extent(taken) != math.prod(shape):
        if extent(taken) < math.prod(shape):
            taken.append(todo.pop())
        else:
            shape.append(sizes.pop())
    why = f"{reason}: a view across factors"
    freeze(taken, why)
    return [frozen_axis(size, why) for size in shape]
