"""Follow a model's axes through one run of it, operation by operation."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch._decomp import core_aten_decompositions
from torch._ops import OpOverload
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from kernels.dispatch import DispatchMode
from merge.align.axes import Atom, Axis, collapse, freeze, frozen_axis, leaves, new_axis
from merge.align.layouts import terms
from merge.align.rules import Call, Labels, apply_rule, freeze_call, is_understood
from merge.errors import MergeError

Example = Tensor | Sequence[Any] | Mapping[str, Any]
"""A model's input: a tensor, its positional arguments, or its keyword arguments."""


@dataclass(frozen=True)
class Trace:
    """The axes of a model's tensors and of all that it computes from them.

    `tensors` are the floating point ones of the state dict, once each; `tied` names the others →
    the one that they are; `activations` are the results of all operations.
    """

    tensors: dict[str, Labels]
    tied: dict[str, str]
    activations: tuple[Labels, ...]


def trace_axes(model: nn.Module, example: Example) -> Trace:
    """Run the model on the example (eval mode, no gradients) and follow every axis.

    Raises MergeError where the model does not run.
    """
    state, tied = traced_state(model)
    follower = _Follower(state, [x for x in tree_leaves(example) if isinstance(x, Tensor)])
    with evaluating(model), torch.no_grad(), _plain_kernels():
        try:
            with follower:
                outputs = call_model(model, example)
        except Exception as error:
            # A model's own code runs here: anything may come out of it.
            raise MergeError(
                f"{type(model).__name__} failed on the example: {type(error).__name__}: {error}; "
                "wanted an input that its forward takes: a tensor, a tuple of arguments, or a "
                "dict of named ones"
            ) from error
    for output in outputs:
        _freeze(follower.labels_of(output), "output")
    tensors = {name: follower.labels_of(tensor) for name, tensor in state.items()}
    for name in follower.unused(state):
        _freeze(tensors[name], "unused by the example's forward")
    _settle([*tensors.values(), *follower.activations], list(tensors.values()))
    return Trace(tensors, tied, tuple(follower.activations))


def traced_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The floating point tensors of the state dict, once each, and the names tied to them."""
    first: dict[Tensor, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            if tensor in first:
                tied[name] = first[tensor]
            else:
                first[tensor] = name
    return {name: tensor for tensor, name in first.items()}, tied


def call_model(model: nn.Module, example: Example) -> list[Tensor]:
    """The tensors that the model puts out."""
    if isinstance(example, Tensor):
        output = model(example)
    elif isinstance(example, Mapping):
        output = model(**example)
    else:
        output = model(*example)
    plain = dict(output) if isinstance(output, Mapping) else output
    return [leaf for leaf in tree_leaves(plain) if isinstance(leaf, Tensor)]


def call_with(model: nn.Module, state: Mapping[str, Tensor], example: Example) -> list[Tensor]:
    """The tensors that the model puts out with these weights."""
    return functional_call(_Caller(model), {f"model.{n}": t for n, t in state.items()}, (example,))


class _Caller(nn.Module):
    """A model that takes an example as its one argument."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, example: Example) -> list[Tensor]:
        return call_model(self.model, example)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; every module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Attention, encoder layers and recurrent nets as the plain operations that they stand for."""
    backends: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
    enabled = [backend.enabled for backend in backends]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        for backend in backends:
            backend.enabled = False
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for backend, before in zip(backends, enabled, strict=True):
            backend.enabled = before


class _Follower(DispatchMode):
    """Runs every operation, and applies its rule to the axes of its tensors."""

    def __init__(self, state: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.activations: list[Labels] = []
        self._labels: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._used: set[int] = set()
        self._stored: dict[int, Tensor] = {}
        self._decompositions = core_aten_decompositions()
        for tensor in state.values():
            self._labels[tensor] = Labels(tuple(map(new_axis, tensor.shape)), tensor.stride())
            if tensor.untyped_storage().data_ptr():
                self._stored[tensor.untyped_storage().data_ptr()] = tensor
        for tensor in inputs:
            self._labels[tensor] = Labels(tuple(frozen_axis(n, "input") for n in tensor.shape))

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        tags = frozenset(func.tags)
        if not is_understood(name, tags) and func in self._decompositions:
            with self:
                return self._decompositions[func](*args, **kwargs)
        arguments = self._arguments(func, args, kwargs)
        result = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        call = Call(name, arguments, tuple(tuple(one.shape) for one in results), tags)
        labels = apply_rule(call)
        if labels is None or tuple(one.shape for one in labels[: len(results)]) != call.shapes:
            labels = freeze_call(call, f"{name}: not understood")
        self.activations += labels
        for one, tensor in zip(labels, results, strict=False):
            self._labels[tensor] = Labels(one.axes, tensor.stride())
        return result

    def labels_of(self, tensor: Tensor) -> Labels:
        """What is known of a tensor's axes; of one that comes from nowhere, what its values say."""
        if tensor not in self._labels:
            self._labels[tensor] = self._found(tensor)
        return self._labels[tensor]

    def unused(self, state: Mapping[str, Tensor]) -> list[str]:
        """The tensors that no operation took."""
        return [name for name, tensor in state.items() if id(tensor) not in self._used]

    def _arguments(self, func: OpOverload, args: Any, kwargs: Any) -> dict[str, Any]:
        """The arguments by name, tensors as labels."""
        schema = func._schema.arguments
        given = {a.name: a.default_value for a in schema if a.has_default_value()}
        given |= dict(zip((a.name for a in schema), args, strict=False)) | kwargs
        return {name: self._labelled(value) for name, value in given.items()}

    def _labelled(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            self._used.add(id(value))
            return self.labels_of(value)
        if isinstance(value, list | tuple):
            return [self._labelled(item) for item in value]
        return value

    def _found(self, tensor: Tensor) -> Labels:
        """An alias of a model's tensor that no operation made, or a constant of its code."""
        owner = self._stored.get(tensor.untyped_storage().data_ptr())
        if owner is not None:
            self._used.add(id(owner))
            labels = self._labels[owner]
            if (owner.shape, owner.stride()) == (tensor.shape, tensor.stride()):
                return labels
            _freeze(labels, "used in another shape, outside of the trace")
        axes = [
            new_axis(size) if owner is None and _is_constant(tensor, axis) else None
            for axis, size in enumerate(tensor.shape)
        ]
        return Labels(
            tuple(
                frozen_axis(size, "constant") if axis is None else axis
                for size, axis in zip(tensor.shape, axes, strict=True)
            ),
            tensor.stride(),
        )


def _is_constant(tensor: Tensor, axis: int) -> bool:
    """Whether a tensor has one value along an axis."""
    return (
        not tensor.is_meta
        and tensor.numel() > 0
        and torch.equal(tensor, tensor.narrow(axis, 0, 1).expand_as(tensor))
    )


def _freeze(labels: Labels, reason: str) -> None:
    for axis in labels.axes:
        freeze(axis, reason)


# --- families -----------------------------------------------------------------------------------


def _settle(everything: Sequence[Labels], tensors: Sequence[Labels]) -> None:
    """Collapse the families that do not hold everywhere, until all that are left do."""
    while atom := next(_untenable(everything, tensors), None):
        collapse(atom)


def _untenable(everything: Sequence[Labels], tensors: Sequence[Labels]) -> Iterator[Atom]:
    """Families of one; those seen without their slot; those of a slot that is seen twice.

    In a model's tensor the slot has to lie in the same term of the same axis.
    """
    for labels in everything:
        counts: Counter[Atom] = Counter()
        for axis in labels.axes:
            counts += reduce(operator.or_, _terms(axis))
        for atom, count in counts.items():
            if atom.family is not None:
                yield from _if_untenable(atom, counts)
            if count > 1:
                yield from (
                    a for a in leaves(atom.beside) if a.family and a.family[0].root() is atom
                )
    for term in (term for labels in tensors for axis in labels.axes for term in _terms(axis)):
        for atom in term:
            if atom.family is not None:
                yield from _if_untenable(atom, term)


def _terms(axis: Axis) -> list[Counter[Atom]]:
    return [Counter(atom for atom, _ in factors) for _, factors in terms(axis)]


def _if_untenable(atom: Atom, present: Container[Atom]) -> Iterator[Atom]:
    assert atom.family is not None
    slot, members = atom.family
    if slot.root() not in present or len({tuple(leaves((member,))) for member in members}) == 1:
        yield atom
    for member in leaves(members):
        if member.family is not None:
            yield from _if_untenable(member, present)
