"""A function of tensors as a graph of torch's operations that write nothing in place."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._C._functorch import get_unwrapped, is_batchedtensor  # pyright: ignore[reportMissingImports]
from torch.func import functionalize
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from fleet.capture.layout import observe
from kernels.dispatch import DispatchMode

aten = torch.ops.aten

CONSTANTS = {
    aten.new_ones.default: 1,
    aten.new_zeros.default: 0,
    aten.ones_like.default: 1,
    aten.zeros_like.default: 0,
}
# Methods that hand a tensor's numbers, or its memory, to something other than torch.
LEAVES_TORCH = (
    Tensor.__array__,
    Tensor.__dlpack__,
    Tensor.data_ptr,
    Tensor.item,
    Tensor.numpy,
    Tensor.tolist,
)
ON_DATA = (
    "it branches on data, takes a number out of a tensor or hands one to something other than "
    "torch; compute that outside (masks, for example) and hand it in"
)


class CaptureError(Exception):
    """The function cannot be replayed; says why."""


class Value(NamedTuple):
    """What is known of a tensor when it is recorded; in each node's `meta["value"]`."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def trace(function: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor]) -> fx.GraphModule:
    """The graph of `function(*tensors)`, with one placeholder for each tensor.

    Raises CaptureError where the function depends on data in other ways than through torch, draws
    random numbers or would write into its arguments (nothing is written), and where it fails.
    """
    try:
        module = _record(function, tensors)
        _replace_writes(module, tensors)
        if any(map(_writes, module.graph.nodes)):
            module = _record(functionalize(module, remove="mutations"), tensors)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(f"tracing failed: {first_line(error)}") from error
    _make_constants(module.graph)
    module.graph.eliminate_dead_code()
    for node in module.graph.nodes:
        if _writes(node):
            raise CaptureError(f"it writes into its arguments ({node.target})")
        if _draws(node):
            raise CaptureError(f"it draws random numbers ({node.target})")
    return module


def first_line(error: Exception) -> str:
    """What an error says, in short."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def _record(function: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor]) -> fx.GraphModule:
    recorder = _Recorder()
    # Views, so that one tensor that is handed in twice has two nodes.
    views = [tensor.view(tensor.shape) for tensor in tensors]
    for place, view in enumerate(views):
        recorder.know(view, recorder.graph.placeholder(f"input_{place}"))
    with recorder, _Watch(recorder):
        results = function(*views)
    recorder.graph.output([recorder.node_of(result) for result in results])
    return fx.GraphModule(recorder.root, recorder.graph)


def _replace_writes(module: fx.GraphModule, tensors: Sequence[Tensor]) -> None:
    """Operations that write over a value become those that make a new one, where nothing else
    looks at the memory after it: `x += y` and `relu_` on a result that is not needed any more.
    """
    graph = module.graph
    if not any(map(_writes, graph.nodes)):
        return
    facts = observe(module, tensors)
    place = {node: at for at, node in enumerate(graph.nodes)}
    members: dict[fx.Node, list[fx.Node]] = {}
    for node in facts.owners:
        members.setdefault(facts.owner_of(node), []).append(node)
    for node in list(graph.nodes):
        twin = _twin(node) if _writes(node) else None
        if twin is None:
            continue
        alike = (other for other in members[facts.owner_of(node)] if place[other] < place[node])
        if all(place[user] <= place[node] for other in alike for user in other.users):
            node.target = twin


def _twin(node: fx.Node) -> Any:
    """The operation that makes a new tensor of what this one writes over; None without one."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    namespace, _, name = target._schema.name.partition("::")
    overload = target._schema.overload_name or "default"
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    twin = getattr(packet, overload, None) if name.endswith("_") else None
    first = node.args[0] if node.args else None
    if twin is None or not isinstance(first, fx.Node):
        return None
    # x += y keeps the shape and type of x; where x + y would not, it is another operation.
    same = node.meta["value"] == first.meta["value"]
    kinds = {n.meta["value"].dtype for n in node.all_input_nodes}
    return twin if same and kinds == {first.meta["value"].dtype} else None


class _Watch(TorchFunctionMode):
    """Refuses what takes the numbers of a tensor that may be another in the next call."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in LEAVES_TORCH and self._recorder.varies(args[0]):
            raise CaptureError(ON_DATA)
        return function(*args, **(kwargs or {}))


class _Recorder(DispatchMode):
    """Writes every operation that torch computes while it is active into a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.graph, self.root = fx.Graph(), nn.Module()
        self._nodes = WeakTensorKeyDictionary()
        self._varying: set[fx.Node] = set()
        self._given: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(
            function.name(), torch._C.DispatchKey.CompositeImplicitAutograd
        ):
            with self:
                result = function.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if function is aten.lift_fresh.default:
            function = aten.clone.default  # the constant stays as it is where the result is written
        mapped = pytree.tree_map_only(Tensor, self.node_of, (args, kwargs))
        if any(_memory(tensor) in self._given for tensor in _written(function, args, kwargs)):
            raise CaptureError(f"it writes into its arguments ({function})")
        node = self.graph.call_function(function, *mapped)
        if self._varying.intersection(node.all_input_nodes):
            if self._looks_at_data(node):
                raise CaptureError(ON_DATA)
            self._varying.add(node)
        result = function(*args, **kwargs)
        if node in self._varying and isinstance(result, bool | int | float | complex):
            raise CaptureError(ON_DATA)
        self._know_results(result, node)
        return result

    def varies(self, tensor: Any) -> bool:
        """Whether it may be another tensor in the next call."""
        while is_batchedtensor(tensor):
            tensor = get_unwrapped(tensor)
        return self._nodes.get(tensor) in self._varying

    def _looks_at_data(self, node: fx.Node) -> bool:
        """Whether a number outside of tensors, or a shape, depends on numbers in tensors."""
        target: Any = node.target
        if node.target is aten.index.Tensor:
            masks = [index for index in node.args[1] if _is_mask(index)]  # pyright: ignore[reportGeneralTypeIssues, reportOptionalIterable]
            return not self._varying.isdisjoint(masks)
        tags = torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape
        return any(tag in target.tags for tag in tags)

    def know(self, tensor: Tensor, node: fx.Node) -> None:
        self._nodes[tensor] = node
        node.meta["value"] = Value(tensor.shape, tensor.dtype, tensor.device)
        if node.op == "placeholder":
            self._varying.add(node)
        if node.op in ("placeholder", "get_attr"):
            self._given.add(_memory(tensor))

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node that made the tensor; one that nothing made is a constant."""
        node = self._nodes.get(tensor)
        if node is None:
            name = f"constant_{len(list(self.root.buffers()))}"
            self.root.register_buffer(name, tensor)
            node = self.graph.get_attr(name)
            self.know(tensor, node)
        return node

    def _know_results(self, result: Any, node: fx.Node) -> None:
        if isinstance(result, Tensor):
            self.know(result, node)
        elif isinstance(result, tuple | list):
            for place, item in enumerate(result):
                if isinstance(item, Tensor):
                    element = self.graph.call_function(operator.getitem, (node, place))
                    self.know(item, element)
                    if node in self._varying:
                        self._varying.add(element)


def _make_constants(graph: fx.Graph) -> None:
    """What looks at a tensor's shape alone does not depend on it."""
    for node in list(graph.nodes):
        if node.target not in CONSTANTS:
            continue
        value: Value = node.meta["value"]
        with graph.inserting_before(node):
            constant = graph.call_function(
                aten.full.default,
                (list(value.shape), CONSTANTS[node.target]),
                {"dtype": value.dtype, "device": value.device},
            )
        constant.meta["value"] = value
        node.replace_all_uses_with(constant)


def _written(function: Any, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operation writes into."""
    named = _named(function, args, kwargs)
    marks = {a.name: a.alias_info for a in function._schema.arguments}
    names = [name for name, mark in marks.items() if mark is not None and mark.is_write]
    if named.get("training") is True or named.get("use_input_stats") is True:
        names += ["running_mean", "running_var"]  # not marked in the schemas of norms
    return [
        leaf
        for name in names
        for leaf in pytree.tree_leaves(named.get(name))
        if isinstance(leaf, Tensor)
    ]


def _named(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = [argument.name for argument in function._schema.arguments]
    return dict(zip(names, args, strict=False)) | kwargs


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def _is_mask(index: Any) -> bool:
    return isinstance(index, fx.Node) and index.meta["value"].dtype in (torch.bool, torch.uint8)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _draws(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return torch.Tag.nondeterministic_seeded in target.tags and not _without_dropout(node, target)


def _without_dropout(node: fx.Node, target: torch._ops.OpOverload) -> bool:
    """Attention is tagged as random, but draws nothing without dropout."""
    if all(argument.name != "dropout_p" for argument in target._schema.arguments):
        return False
    given = _named(target, node.args, node.kwargs).get("dropout_p", 0.0)
    return isinstance(given, float | int) and given == 0
