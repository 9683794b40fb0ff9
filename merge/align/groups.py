"""The permutations of a model's units that leave what it computes unchanged, from one trace."""

from __future__ import annotations

import copy
import math
import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from merge.align.axes import Atom
from merge.align.layouts import AtomTerm, Factor, Layout, Term, is_fixed, unfolded_terms
from merge.align.permutations import Permutations, apply_permutations, random_permutations
from merge.align.rules import Labels
from merge.align.tracing import Example, Trace, call_with, evaluating, trace_axes, traced_state
from merge.errors import MergeError

# Some models compute parts in fp32 whatever their weights; a wrong group changes far more.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Member:
    """An axis of a tensor along which a group's units lie."""

    tensor: str
    axis: int
    layout: Layout


@dataclass(frozen=True)
class Group:
    """Units that may change places, in all members at once.

    With a parent there is one permutation for each unit of it: a head's own order of channels.
    """

    size: int
    parent: int | None
    members: tuple[Member, ...]


@dataclass(frozen=True)
class FrozenAxis:
    """An axis that stays as it is, and why."""

    tensor: str
    axis: int
    reason: str


@dataclass(frozen=True)
class PermutationGroups:
    """What may be permuted in a model, and where it lies.

    `layouts` has every axis of every floating point tensor of the state dict; `shapes` their
    shapes; `tied` the names that are another's tensor; `buffers` those that are no parameters.
    """

    groups: tuple[Group, ...]
    frozen: tuple[FrozenAxis, ...]
    layouts: Mapping[str, tuple[Layout, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]
    buffers: frozenset[str]

    def check_shape(self, name: str, shape: Sequence[int], *, where: str = "") -> None:
        """MergeError where a tensor that the groups know has not the model's shape."""
        if name in self.shapes and tuple(shape) != self.shapes[name]:
            raise MergeError(
                f"{where}{name!r} is {list(shape)}, the model that the permutations belong to has "
                f"{list(self.shapes[name])}; align checkpoints of that model"
            )

    def __str__(self) -> str:
        lines = []
        for number, group in enumerate(self.groups):
            of = "" if group.parent is None else f" in each unit of group {group.parent}"
            where = ", ".join(f"{m.tensor}[{m.axis}]" for m in group.members)
            lines.append(f"group {number}: {group.size} units{of}: {where}")
        reasons = Counter(axis.reason for axis in self.frozen)
        lines += [f"frozen, {count} axes: {reason}" for reason, count in reasons.items()]
        return "\n".join(lines)


def derive_groups(model: nn.Module, example: Example, *, check: bool = False) -> PermutationGroups:
    """The permutation groups of a model, derived from one traced run on `example`.

    Every axis of every tensor is followed through the operations; what an operation ties together
    is permuted together, and what its result depends on the order of (inputs, outputs, places,
    operations that are not understood) is frozen, with the reason. What leaves torch on the way
    (numpy) is not seen; `check` also runs `check_groups`, which finds that. Raises MergeError where
    the model does not run on the example.
    """
    groups = _groups(trace_axes(model, example), model)
    if check:
        check_groups(model, groups, example)
    return groups


@torch.no_grad()
def check_groups(
    model: nn.Module, groups: PermutationGroups, example: Example, *, seed: int = 0
) -> float:
    """The largest relative change of the model's output under a random permutation of all groups.

    In float64, in eval mode, from weights with a little noise, so that no two units are equal.
    Raises MergeError that names the groups that change the output by more than 1e-6.
    """
    twin = copy.deepcopy(model).double()
    inputs = _as_double(example)
    state = _with_noise(twin, seed)
    generator = torch.Generator().manual_seed(seed)
    moved = random_permutations(groups, generator)
    with evaluating(twin):
        expected = call_with(twin, state, inputs)

        def change(permutations: Permutations) -> float:
            found = call_with(twin, apply_permutations(permutations, state), inputs)
            return max((_distance(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)

        worst = change(moved)
        if worst <= TOLERANCE:
            return worst
        wrong = [k for k in range(len(groups.groups)) if change(moved.only(k)) > TOLERANCE]
    named = "; ".join(
        f"group {k} ({', '.join(m.tensor for m in groups.groups[k].members)})" for k in wrong
    )
    raise MergeError(
        f"{type(model).__name__}: a permutation changes the output by {worst:.1e}, wanted at most "
        f"{TOLERANCE:.0e}; leave out {named or 'these groups together'}, and report the model"
    )


def _distance(found: Tensor, expected: Tensor) -> float:
    if not expected.numel():
        return 0.0
    found, expected = found.double(), expected.double()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def _as_double(example: Example) -> Example:
    return tree_map(
        lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, example
    )


def _with_noise(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """The state, each element times 1 ± 10 %, parameters also moved a little."""
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    state, _ = traced_state(model)
    for name, tensor in state.items():
        draws = torch.rand(2, *tensor.shape, generator=generator, dtype=torch.float64) * 2 - 1
        scale, shift = draws.to(tensor.device)
        state[name] = tensor * (1 + 0.1 * scale) + (0.05 * shift if name in parameters else 0)
    return state


# --- from a trace -------------------------------------------------------------------------------


def _groups(trace: Trace, model: nn.Module) -> PermutationGroups:
    found = {
        name: [unfolded_terms(axis) for axis in labels.axes]
        for name, labels in trace.tensors.items()
    }
    numbers: dict[Atom, int] = {}
    for axes in found.values():
        for terms in axes:
            for atom, _ in (factor for _, factors in terms for factor in factors):
                if atom.frozen is None:
                    numbers.setdefault(atom, len(numbers))
    parents: dict[int | None, int] = {
        numbers[child]: numbers[parent] for child, parent in _parents(trace, found, numbers).items()
    }
    layouts = {
        name: tuple(_layout(terms, numbers, parents) for terms in axes)
        for name, axes in found.items()
    }
    members: dict[int, list[Member]] = {}
    for name, axes in layouts.items():
        for axis, layout in enumerate(axes):
            for group in dict.fromkeys(g for term in layout for g in term.groups if g is not None):
                members.setdefault(group, []).append(Member(name, axis, layout))
    layouts |= {name: layouts[first] for name, first in trace.tied.items()}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return PermutationGroups(
        groups=tuple(
            Group(atom.size, parents.get(number), tuple(members[number]))
            for atom, number in numbers.items()
        ),
        frozen=tuple(_frozen_axes(found, layouts)),
        layouts=layouts,
        shapes={name: _shape(layout) for name, layout in layouts.items()},
        tied=trace.tied,
        buffers=frozenset(layouts) - parameters,
    )


def _shape(layouts: Iterable[Layout]) -> tuple[int, ...]:
    return tuple(sum(math.prod(term.shape) for term in layout) for layout in layouts)


def _layout(
    terms: Iterable[AtomTerm], numbers: Mapping[Atom, int], parents: Mapping[int | None, int]
) -> Layout:
    return tuple(
        Term(
            offset,
            tuple(
                Factor(number := numbers.get(atom), atom.size, stride, parents.get(number))
                for atom, stride in factors
            ),
        )
        for offset, factors in terms
    )


def _frozen_axes(
    found: Mapping[str, Sequence[Sequence[AtomTerm]]], layouts: Mapping[str, Sequence[Layout]]
) -> Iterable[FrozenAxis]:
    for name, axes in found.items():
        for axis, terms in enumerate(axes):
            reasons = [atom.frozen for _, factors in terms for atom, _ in factors if atom.frozen]
            if is_fixed(layouts[name][axis]) and reasons:
                yield FrozenAxis(name, axis, reasons[0])


def _parents(
    trace: Trace, found: Mapping[str, Sequence[Sequence[AtomTerm]]], numbers: Mapping[Atom, int]
) -> dict[Atom, Atom]:
    """Child → parent, where the units of the child may have their own order in each of the parent.

    The parent is there, once, wherever the child is. In a model's tensors it also lies in the same
    term, before it, with no other child of it: then the best order of both can be found together.
    """
    terms = [
        [atom for atom, _ in factors] for axes in found.values() for t in axes for _, factors in t
    ]
    companions, repeated = _companions([*trace.tensors.values(), *trace.activations], numbers)
    for atoms in terms:
        for place, atom in enumerate(atoms):
            if atom in numbers:
                companions[atom] &= set(atoms[:place]) - set(atoms[place:])
    parents: dict[Atom, Atom] = {}
    for child in sorted(numbers, key=lambda atom: (-atom.size, numbers[atom])):
        beside = {atom for atoms in terms if child in atoms for atom in atoms}
        taken = {parents.get(atom) for atom in beside}
        free = companions[child] - repeated - parents.keys() - taken
        if free and child not in parents.values():
            parents[child] = min(free, key=numbers.__getitem__)
    return parents


def _companions(
    everything: Iterable[Labels], numbers: Mapping[Atom, int]
) -> tuple[dict[Atom, set[Atom]], set[Atom]]:
    """The atoms that are wherever an atom is, and those that some tensor has more than once."""
    companions = {atom: set(numbers) - {atom} for atom in numbers}
    repeated: set[Atom] = set()
    for labels in everything:
        axes = [
            [Counter(atom for atom, _ in factors if atom in numbers) for _, factors in terms]
            for terms in map(unfolded_terms, labels.axes)
        ]
        most: Counter[Atom] = Counter()
        for terms in axes:
            most += reduce(operator.or_, terms)
        repeated |= {atom for atom, count in most.items() if count > 1}
        always = [set(reduce(operator.and_, terms)) for terms in axes]
        for axis, terms in enumerate(axes):
            elsewhere = set().union(*always[:axis], *always[axis + 1 :])
            for term in terms:
                for atom in term:
                    companions[atom] &= set(term) | elsewhere
    return companions, repeated
