"""Which units of one checkpoint play the part of which of another: weight matching."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from jaxtyping import Float, Shaped
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from merge.align.groups import PermutationGroups
from merge.align.layouts import Layout, Table, Term, gather_index, places, sources
from merge.align.permutations import Permutations, identity
from merge.errors import MergeError

State = Mapping[str, Shaped[Tensor, "..."]]

GAIN = 1e-9
"""The least change of the similarity, as a part of Σ |reference|·|other|, that counts as one."""


def match_weights(
    groups: PermutationGroups,
    reference: State,
    other: State,
    *,
    start: Permutations | None = None,
    iterations: int = 100,
    seed: int = 0,
) -> Permutations:
    """The permutations of `other` that bring its weights closest to the reference's.

    Maximises Σ ⟨reference, permuted other⟩ over all parameters by coordinate descent
    (arXiv 2209.04836): each group in turn gets its best permutation (a linear assignment) while
    the others stay, in random order, until none gains or after `iterations` rounds. It starts at
    the better of `start` (nothing moves) and one found from the inputs on: there each group is
    matched by only those weights whose other axes are matched already. A group and those within
    it (heads and their channels) are matched together. BatchNorm's running statistics are not
    part of the sum. The same seed gives the same permutations.
    Raises MergeError where a tensor is missing, has another shape, or is not finite.
    """
    problem = _Problem(groups, *_paired(groups, reference, other))
    starts = [(start or identity(groups)).tables, _from_inputs(problem)]
    tables = max(starts, key=problem.similarity)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(iterations):
        gained = False
        for k in torch.randperm(len(problem.roots), generator=generator).tolist():
            tables, better = _improve(problem, problem.roots[k], tables)
            gained |= better
        if not gained:
            break
    return Permutations(groups, tables)


Tables = tuple[Table, ...]


@dataclass(frozen=True)
class _Occurrence:
    """A term of a tensor's axis in which a group lies, and a child of it perhaps."""

    tensor: str
    axis: int
    term: Term
    factor: int
    child: int | None


@dataclass(frozen=True)
class _Problem:
    groups: PermutationGroups
    reference: dict[str, Tensor]
    other: dict[str, Tensor]

    @cached_property
    def roots(self) -> list[int]:
        """The groups without a parent."""
        return [k for k, group in enumerate(self.groups.groups) if group.parent is None]

    @cached_property
    def occurrences(self) -> dict[int, list[_Occurrence]]:
        """Where each root lies in the tensors that are compared."""
        found: dict[int, list[_Occurrence]] = {k: [] for k in self.roots}
        for name in self.reference:
            for axis, layout in enumerate(self.groups.layouts[name]):
                for term in layout:
                    for place, group in enumerate(term.groups):
                        if group in found:
                            child = _child(term, group)
                            found[group].append(_Occurrence(name, axis, term, place, child))
        return found

    @cached_property
    def families(self) -> dict[int, frozenset[int]]:
        """Each root → itself and its children."""
        children = {root: {root} for root in self.roots}
        for k, group in enumerate(self.groups.groups):
            if group.parent is not None:
                children[group.parent].add(k)
        return {root: frozenset(family) for root, family in children.items()}

    @cached_property
    def still(self) -> Tables:
        """Nothing moves."""
        return identity(self.groups).tables

    @cached_property
    def sizes(self) -> dict[str, float]:
        """|reference|·|other| of each tensor."""
        return {
            name: float(one.norm()) * float(self.other[name].norm())
            for name, one in self.reference.items()
        }

    def similarity(self, tables: Tables, names: Iterable[str] | None = None) -> float:
        """Σ ⟨reference, permuted other⟩ over these tensors."""
        permutations = Permutations(self.groups, tables)
        products = (
            self.reference[name] * permutations.apply(name, self.other[name])
            for name in (self.reference if names is None else names)
        )
        return math.fsum(float(product.sum(dtype=torch.float64)) for product in products)


def _child(term: Term, group: int) -> int | None:
    return next((k for k, factor in enumerate(term.factors) if factor.parent == group), None)


def _paired(
    groups: PermutationGroups, reference: State, other: State
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters of both, once each, in fp32 (fp64 where one is)."""
    check_state(groups, reference, where="the reference")
    check_state(groups, other, where="the other")
    names = cost_names(groups)
    dtypes = {state[name].dtype for name in names for state in (reference, other)}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    return (
        {name: reference[name].detach().to(dtype) for name in names},
        {name: other[name].detach().to(dtype) for name in names},
    )


def check_state(groups: PermutationGroups, state: State, *, where: str) -> None:
    """MergeError where a compared tensor is missing, of another shape, or not finite."""
    for name in cost_names(groups):
        if name not in state:
            raise MergeError(
                f"{where}: {name!r} is missing, wanted every parameter of the model that the "
                "groups were derived from; align checkpoints of that model"
            )
        groups.check_shape(name, state[name].shape, where=f"{where}: ")
        if not torch.isfinite(state[name]).all():
            raise MergeError(
                f"{where}: {name!r} has NaN or infinite values, wanted finite ones to match; "
                "leave this checkpoint out"
            )


def cost_names(groups: PermutationGroups) -> list[str]:
    """The tensors that are compared: every parameter in which a group lies, once."""
    inside = {member.tensor for group in groups.groups for member in group.members}
    return [name for name in groups.layouts if name in inside and name not in groups.buffers]


# --- one group ----------------------------------------------------------------------------------


def _improve(problem: _Problem, root: int, tables: Tables) -> tuple[Tables, bool]:
    """The best permutation of a root and its children, if it is better than the one there is.

    It need not be where a tensor has the group on two axes: the sum is quadratic in it then.
    """
    found = _assign(problem, root, tables, None)
    names = list(dict.fromkeys(o.tensor for o in problem.occurrences[root]))
    before, after = (problem.similarity(t, names) for t in (tables, found))
    least = GAIN * sum(problem.sizes[name] for name in names)
    return (found, True) if after - before > least else (tables, False)


def _assign(problem: _Problem, root: int, tables: Tables, settled: set[int] | None) -> Tables:
    """Tables with the root and its children at their best, the others as they are.

    With `settled` only those weights count whose other axes these groups describe.
    """
    size = problem.groups.groups[root].size
    own = problem.families[root]
    total = torch.zeros(size, size, dtype=torch.float64)
    inner: dict[int, Tensor] = {}
    for occurrence in problem.occurrences[root]:
        if not _is_known(occurrence.term, settled, own):
            continue
        left, right = _unfold(problem, occurrence, tables, settled, own)
        products = (left @ right.T).double().cpu()
        if occurrence.child is None:
            total += products
            continue
        child = occurrence.term.factors[occurrence.child]
        assert child.group is not None
        products = products.view(size, child.size, size, child.size).transpose(1, 2)
        inner[child.group] = inner.get(child.group, 0) + products
    orders: dict[int, Tensor] = {}
    for group, products in inner.items():
        values, orders[group] = _assign_inside(products)
        total += values
    chosen = _best(total)
    result = list(tables)
    result[root] = chosen[None]
    for group, order in orders.items():
        result[group] = order[torch.arange(size), chosen]
    return tuple(result)


def _assign_inside(
    products: Float[Tensor, "ours theirs units units"],
) -> tuple[Float[Tensor, "ours theirs"], Shaped[Tensor, "ours theirs units"]]:
    """For each pair of parents the best order of the children, and what it is worth."""
    pairs = products.flatten(0, 1)
    orders = torch.stack([_best(pair) for pair in pairs])
    values = pairs.gather(2, orders[..., None]).sum((1, 2))
    return values.view(products.shape[:2]), orders.view(products.shape[:3])


def _best(products: Float[Tensor, "ours theirs"]) -> Shaped[Tensor, " ours"]:
    """The assignment with the largest sum."""
    return torch.from_numpy(linear_sum_assignment(products.numpy(), maximize=True)[1])


def _unfold(
    problem: _Problem,
    occurrence: _Occurrence,
    tables: Tables,
    settled: set[int] | None,
    own: Container[int],
) -> tuple[Float[Tensor, "units rest"], Float[Tensor, "units rest"]]:
    """Both tensors by the units of the root, and of the child; what is beside them in one order.

    The groups of `own` have not moved.
    """
    name, term = occurrence.tensor, occurrence.term
    free = tuple(problem.still[k] if k in own else table for k, table in enumerate(tables))
    indices = [_known(layout, tables, settled) for layout in problem.groups.layouts[name]]
    indices[occurrence.axis] = (places(term).flatten(), sources(term, free).flatten())
    first = [occurrence.factor] + ([] if occurrence.child is None else [occurrence.child])
    units = prod(term.shape[place] for place in first)
    result = []
    for side, state in enumerate((problem.reference, problem.other)):
        tensor = state[name]
        for axis, pair in enumerate(indices):
            tensor = tensor.index_select(axis, pair[side].to(tensor.device))
        tensor = tensor.movedim(occurrence.axis, 0).unflatten(0, term.shape)
        tensor = tensor.movedim(first, list(range(len(first))))
        result.append(tensor.reshape(units, tensor.numel() // units))
    return result[0], result[1]


def _known(layout: Layout, tables: Tables, settled: set[int] | None) -> tuple[Tensor, Tensor]:
    """The places of an axis that only settled groups move, and what they are moved from."""
    index = gather_index(layout, tables)
    at = [places(term).flatten() for term in layout if _is_known(term, settled, ())]
    known = torch.cat(at) if at else torch.empty(0, dtype=torch.long)
    return known, index[known]


def _is_known(term: Term, settled: Container[int] | None, own: Container[int]) -> bool:
    """Whether only these groups move the term."""
    return settled is None or all(g is None or g in own or g in settled for g in term.groups)


# --- the start ----------------------------------------------------------------------------------


def _from_inputs(problem: _Problem) -> Tables:
    """Permutations found from what cannot move (inputs, outputs) on, group by group.

    Next is always the group for whose units the most weights have all other axes settled.
    """
    tables = problem.still
    settled: set[int] = set()
    todo = list(problem.roots)
    while todo:
        evidence = {root: _evidence(problem, root, settled) for root in todo}
        root = max(todo, key=lambda k: evidence[k])
        tables = _assign(problem, root, tables, settled if evidence[root] else None)
        settled |= problem.families[root]
        todo.remove(root)
    return tables


def _evidence(problem: _Problem, root: int, settled: set[int]) -> int:
    """Weights per unit with their other axes settled, of the root or of its poorest child."""
    own = problem.families[root]
    counts = dict.fromkeys(own, 0)
    for occurrence in problem.occurrences[root]:
        term = occurrence.term
        if not _is_known(term, settled, own):
            continue
        others = list(problem.groups.layouts[occurrence.tensor])
        del others[occurrence.axis]
        count = prod(sum(_sizes(layout, settled)) for layout in others)
        counts[root] += count
        if occurrence.child is not None:
            child = term.factors[occurrence.child].group
            assert child is not None
            counts[child] += count
    return min(counts.values())


def _sizes(layout: Layout, settled: set[int]) -> Iterator[int]:
    return (prod(term.shape) for term in layout if _is_known(term, settled, ()))
