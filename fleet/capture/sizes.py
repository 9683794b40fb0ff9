"""How much work the nodes of a graph are, from the shapes that tracing recorded."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fleet.capture.trace import Value

aten = torch.ops.aten

PRODUCTS: dict[Any, tuple[int, int]] = {
    # target: the place of an argument, and how many of its last axes each output sums over
    aten.mm.default: (0, 1),
    aten.addmm.default: (1, 1),
    aten.bmm.default: (0, 1),
    aten.baddbmm.default: (1, 1),
}


def multiplications(node: fx.Node) -> int:
    """The multiplications of a matrix product or convolution; 0 for other nodes."""
    if node.target is aten.convolution.default:
        transposed = node.args[6]
        return _numel(node.args[0] if transposed else node) * _value(node.args[1]).shape[1:].numel()
    if node.target not in PRODUCTS:
        return 0
    place, axes = PRODUCTS[node.target]
    return _numel(node) * _value(node.args[place]).shape[-axes:].numel()


def result_bytes(node: fx.Node) -> int:
    """Bytes of the tensor that a node makes; 0 where it makes several or none."""
    return node.meta["value"].nbytes if "value" in node.meta else 0


def _numel(node: Any) -> int:
    return _value(node).shape.numel()


def _value(node: Any) -> Value:
    return node.meta["value"]
