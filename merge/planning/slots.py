"""Which tensors of which checkpoints make each tensor of the result: by name, or by slices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from merge.checkpoints import Checkpoint
from merge.errors import MergeError
from merge.planning.config import Group, MergeConfig
from merge.planning.layers import Layers
from merge.planning.parameters import Scope, read_scope

__all__ = ["Member", "Slot", "make_slots"]


@dataclass(frozen=True)
class Member:
    """One checkpoint's part in a tensor of the result: the name it has there."""

    reference: str
    checkpoint: Checkpoint
    name: str
    own: Scope


@dataclass(frozen=True)
class Slot:
    """A tensor of the result, and the members of its group, in the config's order."""

    name: str
    members: Mapping[str, Member]
    group: Group
    shared: tuple[Scope, ...]
    fraction: float
    depth: float


@dataclass(frozen=True)
class _Team:
    """A group with its checkpoints opened and its parameters read."""

    group: Group
    checkpoints: Mapping[str, Checkpoint]
    _inside: dict[str, dict[int, list[str]]] = field(default_factory=dict)

    @cached_property
    def shared(self) -> tuple[Scope, ...]:
        return tuple(read_scope(parameters) for parameters in self.group.shared)

    @cached_property
    def own(self) -> dict[str, Scope]:
        given = zip(self.group.references, self.group.own, strict=True)
        return {reference: read_scope(parameters) for reference, parameters in given}

    @cached_property
    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted({name for held in self.checkpoints.values() for name in held.tensors})

    @cached_property
    def layers(self) -> dict[str, Layers]:
        """The layers of each checkpoint."""
        return {ref: Layers.of(held.tensors) for ref, held in self.checkpoints.items()}

    def inside(self, reference: str) -> Mapping[int, list[str]]:
        """The names in each layer of a checkpoint, as they are in its layer 0."""
        if reference not in self._inside:
            layers = self.layers[reference]
            names: dict[int, list[str]] = {number: [] for number in range(layers.count)}
            for name in self.checkpoints[reference].tensors:
                if (number := layers.index(name)) is not None:
                    names[number].append(layers.rename(name, 0))
            self._inside[reference] = names
        return self._inside[reference]

    def slot(self, name: str, inputs: Mapping[str, str], *, fraction: float, depth: float) -> Slot:
        """The tensor `name` of the result, from the tensors `inputs` of the checkpoints."""
        members = {
            reference: Member(reference, checkpoint, inputs[reference], self.own.get(reference, {}))
            for reference, checkpoint in self.checkpoints.items()
        }
        return Slot(name, members, self.group, self.shared, fraction, depth)

    def slot_of(self, name: str, *, fraction: float, depth: float) -> Slot:
        """The tensor that has the same name everywhere."""
        inputs = dict.fromkeys(self.checkpoints, name)
        return self.slot(name, inputs, fraction=fraction, depth=depth)


def make_slots(
    config: MergeConfig, checkpoints: Mapping[str, Checkpoint]
) -> tuple[list[Slot], tuple[int, ...] | None]:
    """The tensors of the result by name, and for each layer that slices made the giver's.

    A layer's is that of the config's first model (the base) where it is a source of the slice,
    else that of the slice's first source.

    Raises MergeError where gradients or slices need layers that the names do not have.
    """
    teams = [
        _Team(group, {ref: checkpoints[ref] for ref in group.all_references})
        for group in config.groups
    ]
    if not config.slices:
        return _by_name(teams[0], [read_scope(rule.parameters) for rule in config.methods]), None
    _check_slices(teams)
    slots = sorted(_by_slices(teams), key=lambda slot: slot.name)
    first = config.references[0]
    return slots, tuple(place for team in teams for place in _places(team, first))


def _places(team: _Team, giver: str) -> range:
    sources = team.group.references
    return range(*team.group.layer_ranges[sources.index(giver) if giver in sources else 0])


def _by_name(team: _Team, rules: Sequence[Scope]) -> list[Slot]:
    layers = Layers.of(team.names)
    if not layers.count and _has_gradients([*team.shared, *team.own.values(), *rules]):
        raise MergeError(
            "a parameter is a list, a gradient over the layers, but the tensors' names have no "
            f"numbered layers ({', '.join(map(repr, team.names[:4]))} …); give filters instead: "
            "[{filter: …, value: …}, …]"
        )
    return [
        team.slot_of(name, fraction=layers.fraction(name), depth=layers.depth(name))
        for name in team.names
    ]


def _has_gradients(scopes: Sequence[Scope]) -> bool:
    cases = [case for scope in scopes for many in scope.values() for case in many]
    return any(len(case.values) > 1 for case in cases)


# --- slices -------------------------------------------------------------------------------------


def _by_slices(teams: Sequence[_Team]) -> Iterator[Slot]:
    """What is before the layers comes from the first slice's sources, what is after the last's.

    Gradients run over the layers of their slice.
    """
    for side, team, depth in (("before", teams[0], 0.0), ("after", teams[-1], 1.0)):
        layers = Layers.of(team.names)
        for name in team.names:
            if layers.position(name) == side:
                yield team.slot_of(name, fraction=0.0, depth=depth)
    total, made = sum(map(_length, teams)), 0
    for team in teams:
        for step in range(_length(team)):
            fraction = _share(step, _length(team))
            yield from _layer(team, step, made, fraction=fraction, depth=_share(made, total))
            made += 1


def _layer(team: _Team, step: int, made: int, *, fraction: float, depth: float) -> Iterator[Slot]:
    """The tensors of layer `made` of the result, from the layers that are `step` into the slice."""
    ranges = zip(team.group.references, team.group.layer_ranges, strict=True)
    numbers = {reference: first + step for reference, (first, _) in ranges}
    patterns = dict.fromkeys(
        name for reference, number in numbers.items() for name in team.inside(reference)[number]
    )
    for name in patterns:
        inputs = {ref: team.layers[ref].rename(name, number) for ref, number in numbers.items()}
        output = team.layers[team.group.references[0]].rename(name, made)
        yield team.slot(output, inputs, fraction=fraction, depth=depth)


def _check_slices(teams: Sequence[_Team]) -> None:
    problems = []
    for team in teams:
        where = ".".join(map(str, team.group.at))
        for k, (reference, (first, last)) in enumerate(
            zip(team.group.references, team.group.layer_ranges, strict=True)
        ):
            layers = team.layers[reference]
            if (problem := layers.unsliceable()) is not None:
                problems.append(f"{reference}: {problem}")
            elif last > layers.count:
                problems.append(
                    f"{where}.sources.{k}.layer_range: found [{first}, {last}], but {reference!r} "
                    f"has {layers.count} layers; wanted at most [0, {layers.count}]"
                )
    if problems:
        raise MergeError("\n".join(dict.fromkeys(problems)))


def _length(team: _Team) -> int:
    first, last = team.group.layer_ranges[0]
    return last - first


def _share(index: int, count: int) -> float:
    return index / (count - 1) if count > 1 else 1.0
