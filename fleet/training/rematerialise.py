"""Activation checkpointing on a recorded step: less is kept for the backward pass, more is
computed again (1604.06174)."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from fleet.capture.sizes import multiplications, result_bytes

aten = torch.ops.aten

# Their running statistics are written once, in the forward pass.
NORMS = {
    aten.native_batch_norm.default: slice(3, 5),
    aten._native_batch_norm_legit.default: slice(3, 5),
    aten._native_batch_norm_legit_functional.default: slice(3, 5),
    aten._batch_norm_with_update.default: slice(3, 5),
}


def rematerialise(module: fx.GraphModule, buffers: int = 0) -> None:
    """Keep what √layers cuts through the forward pass need, and compute the rest again.

    The first result of the graph is the loss and the last ones are `buffers`; what they come from
    is the forward pass. What is computed again is computed by the same operations from the same
    numbers, so the results have the same bits. Each segment's activations exist while its own
    backward pass needs them.
    """
    graph = module.graph
    results: Any = graph.output_node().args[0]
    losses = results[0].args[0] if results[0].target is aten.detach.default else results[0]
    ahead_of = [losses, *results[len(results) - buffers :]]
    forward = set[fx.Node]().union(*map(_ancestors, ahead_of))
    _sink(graph, forward)
    ahead = [node for node in graph.nodes if node in forward and node.op == "call_function"]
    kept = {node for cut in _cuts(ahead) for node in cut} | {*ahead_of}
    again: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node in forward or node.op != "call_function":
            continue
        for parent in node.all_input_nodes:
            copy = _copied(parent, node, forward, kept, again)
            if copy is not parent:
                node.replace_input_with(parent, copy)
    graph.eliminate_dead_code()
    graph.lint()


def _sink(graph: fx.Graph, forward: set[fx.Node]) -> None:
    """Move what is prepared for the backward pass in the midst of the forward to its first use:
    what it is made of would be computed again before it is needed."""
    nodes = list(graph.nodes)
    place = {node: at for at, node in enumerate(nodes)}
    turn = max(place[node] for node in forward)
    key: dict[fx.Node, int] = {}
    for node in reversed(nodes):
        waits = node not in forward and node.op == "call_function" and place[node] < turn
        key[node] = min((key[user] for user in node.users), default=0) if waits else place[node]
    before: fx.Node | None = None
    for node in sorted(nodes, key=lambda node: (key[node], place[node])):
        if before is not None:
            before.append(node)
        before = node


def _copied(
    wanted: fx.Node,
    user: fx.Node,
    forward: set[fx.Node],
    kept: set[fx.Node],
    again: dict[fx.Node, fx.Node],
) -> fx.Node:
    """`wanted`, or what computes it again; new nodes are put before `user`."""
    waiting = [wanted]
    while waiting:
        node = waiting[-1]
        if node in again or node in kept or node not in forward or node.op != "call_function":
            waiting.pop()
            continue
        missing = [
            parent
            for parent in node.all_input_nodes
            if parent in forward
            and parent.op == "call_function"
            and parent not in kept
            and parent not in again
        ]
        if missing:
            waiting.extend(missing)
            continue
        with user.graph.inserting_before(user):
            copy = user.graph.node_copy(node, lambda parent: again.get(parent, parent))
        statistics = NORMS.get(node.target)  # pyright: ignore[reportArgumentType]
        if statistics is not None:
            args = list(copy.args)
            args[statistics] = [None] * 2
            copy.args = tuple(args)
        again[node] = copy
        waiting.pop()
    return again.get(wanted, wanted)


def _cuts(ahead: Sequence[fx.Node]) -> Iterable[list[fx.Node]]:
    """What is alive at some moments of the forward pass, about evenly spaced in bytes made, each
    where little is alive."""
    place = {node: at for at, node in enumerate(ahead)}
    last = {node: max((place[u] for u in node.users if u in place), default=-1) for node in ahead}
    ends: dict[int, list[fx.Node]] = {}
    alive: dict[fx.Node, None] = {}
    moments: list[tuple[float, float, list[fx.Node]]] = []
    made = 0.0
    for at, node in enumerate(ahead):
        made += result_bytes(node)
        if last[node] > at:
            alive[node] = None
            ends.setdefault(last[node], []).append(node)
        for over in ends.pop(at, ()):
            del alive[over]
        whole = [n for n in alive if "value" in n.meta or n.target is operator.getitem]
        if len(whole) == len(alive):  # not between a node and its several results
            moments.append((made, sum(map(result_bytes, whole)), whole))
    layers = sum(multiplications(node) > 0 for node in ahead)
    segments = max(2, round(math.sqrt(layers)))
    for number in range(1, segments):
        low, high = ((number + shift) * made / segments for shift in (-0.5, 0.5))
        near = [moment for moment in moments if low <= moment[0] < high]
        if near:
            yield min(near, key=operator.itemgetter(1))[2]


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting.extend(one.all_input_nodes)
    return found
