"""What the nodes of a graph depend on, and so how often they have to be computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum, IntFlag

from torch import fx


class Dependence(IntFlag):
    """What a value depends on."""

    NOTHING = 0
    MODEL = 1
    INPUT = 2


class Phase(IntEnum):
    """When a value is computed."""

    ONCE = 0  # for all weights that are alike: when weights are loaded
    WEIGHTS = 1  # for each model: when weights are loaded
    SHARED = 2  # for all models: in each call
    BODY = 3  # for each model, in each call


def dependences(graph: fx.Graph, kinds: Sequence[Dependence]) -> dict[fx.Node, Dependence]:
    """What every node depends on, from the kinds of the placeholders, in their order."""
    found: dict[fx.Node, Dependence] = {}
    placeholders = iter(kinds)
    for node in graph.nodes:
        if node.op == "placeholder":
            found[node] = next(placeholders)
        else:
            found[node] = Dependence.NOTHING
            for parent in node.all_input_nodes:
                found[node] |= found[parent]
    return found


def phase(dependence: Dependence) -> Phase:
    """The phase of a value."""
    return Phase(int(dependence))


def phases(found: Mapping[fx.Node, Dependence]) -> dict[fx.Node, Phase]:
    """The phase of every node."""
    return {node: phase(dependence) for node, dependence in found.items()}
