"""What a run of the graph shows about memory, and the steps that this saves."""

from __future__ import annotations

import operator
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fleet.capture.dependence import Phase

aten = torch.ops.aten


class Layout(NamedTuple):
    """How a tensor lies in its memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, value: Any) -> Layout | None:
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return None
        return cls(tuple(value.shape), value.stride(), int(value.storage_offset()), value.dtype)


@dataclass
class Facts:
    """Each node's layout, and the node that its memory comes from."""

    layouts: dict[fx.Node, Layout | None] = field(default_factory=dict)
    owners: dict[fx.Node, fx.Node] = field(default_factory=dict)
    results: list[Tensor] = field(default_factory=list)

    def owner_of(self, node: fx.Node) -> fx.Node:
        """The node that its memory comes from; itself where it has its own."""
        return self.owners.get(node) or node


def observe(module: fx.GraphModule, tensors: Sequence[Tensor]) -> Facts:
    """Run the graph once; values are freed after their last use."""
    facts = Facts()
    values: dict[fx.Node, Any] = {}
    elements: dict[fx.Node, list[fx.Node | None]] = {}
    last_users = _last_users(module.graph)
    stream = iter(tensors)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            value = next(stream)
        elif node.op == "get_attr":
            value = operator.attrgetter(node.target)(module)
        elif node.op == "output":
            facts.results = list(fx.map_arg(node.args[0], values.__getitem__))  # pyright: ignore[reportArgumentType]
            break
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)  # pyright: ignore[reportArgumentType, reportGeneralTypeIssues]
            value = node.target(*args, **kwargs)
        values[node] = value
        facts.layouts[node] = Layout.of(value)
        if node.target is operator.getitem:
            owner = elements[node.args[0]][node.args[1]]
        elif isinstance(value, Tensor):
            owner = _owner(value, node, values, facts)
        else:
            elements[node] = [_owner(item, node, values, facts) for item in value]
            owner = None
        facts.owners[node] = owner or node
        for dead in last_users.get(node, ()):
            values.pop(dead, None)
    return facts


def _owner(
    value: Any, node: fx.Node, values: Mapping[fx.Node, Any], facts: Facts
) -> fx.Node | None:
    """Among the arguments of `node`, the one whose memory `value` lies in."""
    memory = _memory(value)
    for parent in node.all_input_nodes:
        if memory is not None and memory in map(_memory, pytree.tree_leaves(values[parent])):
            return facts.owners[parent]
    return None


def _memory(value: Any) -> int | None:
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return None
    return value.untyped_storage()._cdata


def _last_users(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node, what is not needed after it."""
    seen: set[fx.Node] = set()
    dead: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        for parent in (*node.all_input_nodes, node):
            if parent not in seen:
                seen.add(parent)
                dead.setdefault(node, []).append(parent)
    return dead


def merge_views(graph: fx.Graph, facts: Facts, phases: MutableMapping[fx.Node, Phase]) -> None:
    """Leave out views and copies that change nothing, and make other views in one step."""
    for node in list(graph.nodes):
        if _copies_for_nothing(node, facts, phases):
            _hand_over(node, facts.owners[node.all_input_nodes[0]], facts)
            node.replace_all_uses_with(node.all_input_nodes[0])
            continue
        owner, layout = facts.owner_of(node), facts.layouts.get(node)
        if owner is node or layout is None or phases[node] < Phase.SHARED:
            continue
        parent = node.all_input_nodes[0]
        if node.target is not operator.getitem and facts.layouts[parent] == layout:
            if facts.owners[parent] is owner:
                node.replace_all_uses_with(parent)
            continue
        base = facts.layouts[owner]
        if parent is owner or base is None or owner.op != "call_function":
            continue
        with graph.inserting_before(node):
            new = graph.call_function(
                aten.as_strided.default, (owner, layout.shape, layout.stride, layout.offset)
            )
        new.meta = dict(node.meta)
        facts.layouts[new], facts.owners[new] = layout, owner
        phases[new] = phases[node]
        node.replace_all_uses_with(new)
    graph.eliminate_dead_code()


def _copies_for_nothing(node: fx.Node, facts: Facts, phases: Mapping[fx.Node, Phase]) -> bool:
    """Whether it copies a value into the memory format that this has already."""
    if node.target is not aten.clone.default or "memory_format" not in node.kwargs:
        return False
    return _lies_alike(node, node.args[0], facts, phases)


def reuse_memory(graph: fx.Graph, facts: Facts, phases: Mapping[fx.Node, Phase]) -> None:
    """Write elementwise results over an input that is not needed any more."""
    # Parts run one after the other, whatever the order of their nodes in the graph.
    in_order = sorted(graph.nodes, key=lambda node: phases[node])
    order = {node: place for place, node in enumerate(in_order)}
    last_use: dict[fx.Node, int] = {}
    for node in graph.nodes:
        owner = facts.owner_of(node)
        uses = [order[user] for user in node.users]
        last_use[owner] = max([last_use.get(owner, 0), *uses])
    for node in graph.nodes:
        in_place = IN_PLACE.get(node.target)
        if in_place is None:
            continue
        places = range(2 if in_place.commutes and not node.kwargs else 1)
        for place, argument in zip(places, node.args, strict=False):
            if not _lies_alike(node, argument, facts, phases):
                continue
            owner = facts.owners[argument]
            others = [facts.owners[n] for n in node.all_input_nodes if n is not argument]
            if last_use[owner] > order[node] or owner in others:
                continue
            node.target = in_place.target
            node.args = (argument, *node.args[:place], *node.args[place + 1 :])
            if in_place.result is not None:
                node.kwargs = {**node.kwargs, in_place.result: argument}
            last_use[owner] = max(last_use[owner], last_use[facts.owners[node]])
            _hand_over(node, owner, facts)
            break


class InPlace(NamedTuple):
    """The twin of an operation that writes into its first argument, named `result` if given."""

    target: Any
    commutes: bool = False
    result: str | None = None


IN_PLACE: dict[Any, InPlace] = {
    aten.add.Tensor: InPlace(aten.add_.Tensor, commutes=True),
    aten.mul.Tensor: InPlace(aten.mul_.Tensor, commutes=True),
    aten.sub.Tensor: InPlace(aten.sub_.Tensor),
    aten.div.Tensor: InPlace(aten.div_.Tensor),
    aten.relu.default: InPlace(aten.relu_.default),
    aten.gelu.default: InPlace(aten.gelu_.default),
    aten.silu.default: InPlace(aten.silu_.default),
    aten.sigmoid.default: InPlace(aten.sigmoid_.default),
    aten.tanh.default: InPlace(aten.tanh_.default),
    aten.hardswish.default: InPlace(aten.hardswish_.default),
    aten.threshold_backward.default: InPlace(
        aten.threshold_backward.grad_input, result="grad_input"
    ),
}


def _lies_alike(
    node: fx.Node, argument: Any, facts: Facts, phases: Mapping[fx.Node, Phase]
) -> bool:
    """Whether the argument is a value of the same part that could hold the result of `node`."""
    if not isinstance(argument, fx.Node):
        return False
    mine, its = facts.layouts[node], facts.layouts[argument]
    owner = facts.owners[argument]
    return (
        mine is not None
        and its is not None
        and mine._replace(offset=0) == its._replace(offset=0)
        and 0 not in its.stride
        and owner.op == "call_function"
        and phases[owner] is phases[node]
        and phases[node] >= Phase.SHARED
    )


def _hand_over(node: fx.Node, owner: fx.Node, facts: Facts) -> None:
    """`node`, and all that lies in its memory, now lies in that of `owner`."""
    former = facts.owners[node]
    for other, its_owner in facts.owners.items():
        if its_owner is former:
            facts.owners[other] = owner
