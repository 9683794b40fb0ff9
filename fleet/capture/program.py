"""A graph as Python functions: what is computed once, for each model, and in each call."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fleet.capture.dependence import Phase

aten = torch.ops.aten


class Program:
    """The four parts of a graph, each a function of what the parts before it made."""

    def __init__(self, module: fx.GraphModule, phases: Mapping[fx.Node, Phase]) -> None:
        graph = module.graph
        results = graph.output_node().args[0]
        assert isinstance(results, list | tuple)
        self._constants = {
            node: operator.attrgetter(node.target)(module)
            for node in graph.nodes
            if node.op == "get_attr"
        }
        self.placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        self._results = list(results)
        self.parts: dict[Phase, Part] = {}
        needed = [r for r in self._results if isinstance(r, fx.Node)]
        for now in reversed(Phase):
            nodes = [
                node
                for node in graph.nodes
                if phases.get(node) is now and node.op == "call_function"
            ]
            mine = set(nodes)
            outputs = (
                list(self._results)
                if now is Phase.BODY
                else [node for node in dict.fromkeys(needed) if node in mine]
            )
            used = [p for node in nodes for p in node.all_input_nodes]
            if now is Phase.BODY:
                used += needed
            inputs = [node for node in dict.fromkeys(used) if node not in mine]
            self.parts[now] = Part(nodes, inputs, outputs)
            needed += inputs

    @property
    def constants(self) -> dict[fx.Node, Tensor]:
        """The tensors that are part of the graph."""
        return dict(self._constants)

    def run(self, now: Phase, values: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
        """What a part makes of what is there."""
        part = self.parts[now]
        results = part(*[values[node] for node in part.inputs])
        return dict(zip(part.outputs, results, strict=True))


class Part:
    """Some nodes as one function of positional tensors that returns a tuple."""

    def __init__(
        self, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[Any]
    ) -> None:
        self.inputs, self.outputs = list(inputs), list(outputs)
        self.source, names = _source(nodes, inputs, outputs)
        scope = dict(names)
        exec(compile(self.source, "<captured>", "exec"), scope)
        self._function: Callable[..., tuple] = scope["run"]

    def __call__(self, *values: Any) -> tuple:
        return self._function(*values)


def _source(
    nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[Any]
) -> tuple[str, dict[str, Any]]:
    """Python code in which every value is let go after its last use."""
    names = {node: f"v{place}" for place, node in enumerate([*inputs, *nodes])}
    scope: dict[str, Any] = {}

    def write(value: Any) -> str:
        if isinstance(value, fx.Node):
            return names[value]
        if isinstance(value, tuple | list):
            inner = "".join(f"{write(item)}, " for item in value)
            return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
        if value is None or isinstance(value, bool | int | str):
            return repr(value)
        return _constant(value, scope)

    last = {parent: node for node in nodes for parent in node.all_input_nodes}
    dies: dict[fx.Node, list[fx.Node]] = {}
    for value, user in last.items():
        dies.setdefault(user, []).append(value)
    kept = {output for output in outputs if isinstance(output, fx.Node)}
    lines = [f"def run({', '.join(names[node] for node in inputs)}):"]
    for node in nodes:
        args = [write(value) for value in node.args]
        args += [f"{key}={write(value)}" for key, value in node.kwargs.items()]
        if node.target is operator.getitem:
            call = f"{args[0]}[{args[1]}]"
        else:
            call = f"{_constant(_callable(node.target), scope)}({', '.join(args)})"
        freed = "".join(f"{names[dead]} = " for dead in dies.get(node, ()) if dead not in kept)
        lines.append(f"    {names[node]} = {call}" + (f"; {freed}None" if freed else ""))
    lines.append(f"    return {write(tuple(outputs))}")
    return "\n".join(lines), scope


def _constant(value: Any, scope: dict[str, Any]) -> str:
    for name, known in scope.items():
        if known is value:
            return name
    name = f"c{len(scope)}"
    scope[name] = value
    return name


def _callable(target: Any) -> Any:
    """The same operation with a shorter way through Python."""
    return _DIRECT.get(target, target)


_DIRECT: dict[Any, Any] = {
    aten.add.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.mul.Tensor: torch.mul,
    aten.div.Tensor: torch.div,
    aten.add_.Tensor: Tensor.add_,
    aten.sub_.Tensor: Tensor.sub_,
    aten.mul_.Tensor: Tensor.mul_,
    aten.div_.Tensor: Tensor.div_,
    aten.mm.default: torch.mm,
    aten.addmm.default: torch.addmm,
    aten.bmm.default: torch.bmm,
    aten.baddbmm.default: torch.baddbmm,
    aten.addcmul.default: torch.addcmul,
    aten.relu.default: torch.relu,
    aten.relu_.default: torch.relu_,
    aten.gelu.default: F.gelu,
    aten.view.default: Tensor.view,
    aten.reshape.default: torch.reshape,
    aten._unsafe_view.default: torch.reshape,
    aten.as_strided.default: torch.as_strided,
    aten.permute.default: torch.permute,
    aten.transpose.int: torch.transpose,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.select.int: torch.select,
    aten.expand.default: Tensor.expand,
    aten.cat.default: torch.cat,
    aten.native_layer_norm.default: torch.native_layer_norm,
}
