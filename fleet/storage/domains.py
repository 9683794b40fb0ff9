"""Which variants differ from the base alike: a tree of domains from the cosines of their deltas."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float64
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from torch import Tensor

from fleet.errors import FleetError
from fleet.storage.encodings import wide_type
from fleet.storage.records import BASE, check_name
from fleet.storage.zoo import Zoo
from inputs.budget import format_bytes
from merge.gram import gram_matrix

# A branch is a domain of its own if it is so much tighter than what it is part of, in mean cosine
# distance; the base's own height is 1, where deltas have nothing in common.
GAP = 0.1
# Elements below which slices of many files are no longer worth a read each.
LEAST_SLICE = 1 << 10


@dataclass(frozen=True)
class Domain:
    """A node to be: all `variants` below it are made from what it holds, itself from `parent`."""

    name: str
    parent: str
    variants: tuple[str, ...]


@dataclass(frozen=True)
class Distances:
    """Of each pair of variants, and which variants are finite and differ from the base at all."""

    matrix: Float64[Tensor, "variants variants"]
    moved: tuple[bool, ...]


def delta_distances(
    zoo: Zoo, *, memory_budget: int, advance: Callable[[int], object] = lambda nbytes: None
) -> Distances:
    """1 − cosine of the variants' deltas to the base, of each layer, and the mean over layers.

    A layer is a module's tensors: those that all variants have in the base's shape. Where both of
    a pair have a layer as in the base it does not count; where one has, its distance is 1. Every
    file is read once, in slices of which one of each variant fits the budget.
    Raises FleetError where the budget does not hold the matrices and the least slices.
    """
    count = len(zoo.names)
    matrices = 5 * 8 * count**2  # the sums, of all layers and of one, and what they are made from
    length = (memory_budget - matrices) // (12 * (count + 1))  # read, stacked, multiplied
    if length < LEAST_SLICE:
        least = matrices + 12 * (count + 1) * LEAST_SLICE
        raise FleetError(
            f"memory_budget: {format_bytes(memory_budget)} is too little to compare {count} "
            f"variants, wanted {format_bytes(least)}; raise it, or say what the domains are "
            "(domains: {name: [variants]}, or none)"
        )
    total, counted = torch.zeros(2, count, count, dtype=torch.float64)
    squares = torch.zeros(count, dtype=torch.float64)
    gram = torch.zeros(count, count, dtype=torch.float64)
    for segment, part in _grams(zoo, length, advance):
        gram += part
        if not segment.ends_layer:
            continue
        squares += gram.diagonal()
        norms = gram.diagonal().sqrt()
        moved = norms > 0
        scale = torch.where(moved, norms, 1)
        distance = (1 - gram / scale[:, None] / scale).clamp_(0, 2)
        either = moved[:, None] | moved
        total += torch.where(either, distance, 0)
        counted += either
        gram.zero_()
    distances = total / counted.clamp(min=1)
    distances = ((distances + distances.T) / 2).fill_diagonal_(0)
    return Distances(distances, tuple(((squares > 0) & squares.isfinite()).tolist()))


def find_domains(
    distances: Distances, names: Sequence[str], *, count: int | None = None
) -> list[Domain]:
    """The tree of domains by average linkage, parents first; variants in none are the base's.

    With `count`, the dendrogram cut into so many clusters, all below the base; without it, every
    branch that is by GAP tighter than the domain around it (the base: distance 1) is a domain.
    Each has at least two variants; those that have not moved from the base are in none.
    Raises FleetError for a count below 1.
    """
    if count is not None and count < 1:
        raise FleetError(f"domains: found {count}, wanted a number of at least 1, auto or none")
    kept = [i for i in range(len(names)) if distances.moved[i]]
    if len(kept) < 2:
        return []
    own = distances.matrix[kept][:, kept].numpy()
    links = hierarchy.linkage(squareform(own, checks=False), method="average")
    if count is not None:
        labels = hierarchy.fcluster(links, count, criterion="maxclust")
        clusters = [[kept[i] for i in np.flatnonzero(labels == k)] for k in np.unique(labels)]
        found = sorted(members for members in clusters if len(members) > 1)
        return [
            Domain(f"domain-{k}", BASE, tuple(names[i] for i in members))
            for k, members in enumerate(found, start=1)
        ]
    return _branches(links, kept, names)


def given_domains(given: Mapping[str, Sequence[str]], names: Sequence[str]) -> list[Domain]:
    """Domains as a person names them, below the base.

    Raises FleetError for a variant that there is not, or that is in two of them.
    """
    found: list[Domain] = []
    home: dict[str, str] = {}
    for domain, members in given.items():
        check_name(domain, "a domain")
        if domain == BASE:
            raise FleetError(f"domains: {BASE!r} is the base's own name; give the domain another")
        for member in members:
            if member not in names:
                near = difflib.get_close_matches(member, names, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise FleetError(f"domains.{domain}: there is no variant {member!r}{hint}")
            if member in home:
                raise FleetError(
                    f"domains.{domain}: {member!r} is in {home[member]!r} too; wanted it in one"
                )
            home[member] = domain
        if members:
            found.append(Domain(domain, BASE, tuple(sorted(members, key=names.index))))
    return found


def home_of(domains: Sequence[Domain], variant: str) -> str:
    """The innermost domain of a variant; the base if it is in none."""
    return next((d.name for d in reversed(domains) if variant in d.variants), BASE)


class _Segment(NamedTuple):
    """The elements [start, stop) of a tensor, the last of its layer or not."""

    name: str
    start: int
    stop: int
    ends_layer: bool


def _grams(
    zoo: Zoo, length: int, advance: Callable[[int], object]
) -> Iterator[tuple[_Segment, Tensor]]:
    """⟨δ_i, δ_j⟩ of each segment, layer by layer.

    Of as many segments as hold `length` elements a variant's are read at a time: its file may have
    to be opened for it.
    """
    count = len(zoo.names)
    types = {wide_type(zoo.base.tensors[name].dtype) for name in zoo.comparable()}
    wide = torch.float64 if torch.float64 in types else torch.float32
    for block in _blocks(zoo, max(length * 4 // wide.itemsize, 1)):
        width = sum(segment.stop - segment.start for segment in block)
        rows = torch.empty(count + 1, width, dtype=wide)
        for k, name in enumerate((None, *zoo.names)):
            checkpoint = zoo.base if name is None else zoo.open(name)
            at = 0
            for key, start, stop, _ in block:
                part = rows[k, at : (at := at + stop - start)]
                checkpoint.read(key, out=part, start=start, stop=stop)
                if name is not None:
                    advance((stop - start) * zoo.base.tensors[key].dtype.itemsize)
        at = 0
        for segment in block:
            base, *own = rows[:, at : (at := at + segment.stop - segment.start)]
            yield segment, gram_matrix("deltas", base, own)


def _blocks(zoo: Zoo, length: int) -> Iterator[list[_Segment]]:
    """All comparable tensors, layer by layer, in blocks of at most `length` elements."""
    names = sorted(zoo.comparable(), key=lambda name: (name.rpartition(".")[0], name))
    block: list[_Segment] = []
    room = length
    for name, following in zip(names, [*names[1:], ""], strict=True):
        numel = zoo.base.tensors[name].numel
        ends = name.rpartition(".")[0] != following.rpartition(".")[0] or not following
        start = 0
        while start < numel:
            if not room:
                yield block
                block, room = [], length
            stop = min(start + room, numel)
            block.append(_Segment(name, start, stop, ends and stop == numel))
            room -= stop - start
            start = stop
    if block:
        yield block


def _branches(links: np.ndarray, kept: Sequence[int], names: Sequence[str]) -> list[Domain]:
    """The branches of a dendrogram that are tight enough, from the root down."""
    leaves = len(kept)
    members: list[list[int]] = [[place] for place in kept]
    for one, other, _, _ in links:
        members.append(sorted(members[int(one)] + members[int(other)]))
    found: list[Domain] = []
    children: dict[str, int] = {}
    # (branch, the domain around it, that one's height); no recursion: a chain is as deep as long.
    todo = [(2 * leaves - 2, BASE, 1.0)]
    while todo:
        branch, parent, height = todo.pop()
        if branch < leaves:
            continue
        one, other, own_height, _ = links[branch - leaves]
        if height - own_height >= GAP:
            children[parent] = children.get(parent, 0) + 1
            prefix = "domain" if parent == BASE else parent
            name = f"{prefix}-{children[parent]}"
            found.append(Domain(name, parent, tuple(names[i] for i in members[branch])))
            parent, height = name, own_height
        # The branch with the first variant is taken first.
        below = sorted((int(one), int(other)), key=lambda b: members[b][0], reverse=True)
        todo += [(b, parent, height) for b in below]
    return found
