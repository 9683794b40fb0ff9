"""M models of one architecture with different weights, run as one."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fleet.alike import check_models, check_tensors, first_names, named_tensors, places, untied
from fleet.calls import Call
from fleet.capture.cuda import CudaReplay
from fleet.capture.replay import Arguments, Replay, capture, check
from fleet.capture.trace import CaptureError, first_line, trace
from fleet.errors import FleetError
from fleet.modes import check_training
from fleet.structure import Rebuild, take_apart
from kernels.grouping import Grouping, RandomnessError

logger = logging.getLogger(__name__)

KEPT_SIGNATURES = 8
KEPT_WAYS = 256
VMAP_DRAWS = "vmap: called random operation"
SMALL_BYTES = 64 << 20
Results = tuple[Sequence[Tensor], Rebuild]


class Group:
    """M models of one architecture with different weights, run as one.

    `stacked` holds parameters and buffers by name, each [M, *shape]; `shared` holds those that are
    the same for all models, [*shape]; names in neither are the model's own, shared. What depends
    only on shared tensors and on an input that is one for all is computed once.

    Differentiable in everything that is handed in. In evaluation mode and without gradients, with
    `capture`, the second call with inputs of one kind records the computation, and later ones
    replay it without the model's Python code. Weights that are changed in place are seen, but for
    inference tensors and for what is changed through `.data`: `load` them again. `kept_bytes` is
    what is kept for this beside the weights: at most about as much again.

    The model's structure, hooks and attributes other than tensors are to stay as they were when
    the group was made. A group is not for several threads at once.

    Raises FleetError for names that the model does not have, and for tensors whose shapes, dtypes,
    devices or numbers of models do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        stacked: Mapping[str, Tensor],
        *,
        shared: Mapping[str, Tensor] = {},
        capture: bool = True,
    ) -> None:
        self.model = model
        self.capture = capture
        self._modules = tuple(model.modules())
        self._own = named_tensors(model)
        self._first_names, self._places = first_names(model), places(model)
        self._buffers = {self._first_names[name] for name, _ in model.named_buffers()}
        self._ways: dict[Hashable, int] = {}
        self._said: set[str] = set()
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._pattern: Hashable = None
        self.load(stacked, shared)

    @classmethod
    def of(cls, models: Sequence[nn.Module], *, capture: bool = True) -> Group:
        """The group of `models`, detached; tensors that are equal in all of them are shared.

        In train mode no buffers are: each model is to update its own.
        """
        check_models(models)
        training = any(module.training for module in models[0].modules())
        apart = {name for name, _ in models[0].named_buffers()} if training else set()
        states = [named_tensors(model) for model in models]
        stacked, shared = {}, {}
        for name in states[0]:
            first, *others = [state[name].detach() for state in states]
            equal = others and all(torch.equal(first, other) for other in others)
            if equal and name not in apart:
                shared[name] = first
            else:
                stacked[name] = torch.stack([first, *others])
        if not stacked and shared:  # one model, several times
            name, tensor = next(iter(shared.items()))
            stacked[name] = tensor.expand(len(models), *tensor.shape)
            del shared[name]
        return cls(models[0], stacked, shared=shared, capture=capture)

    def load(self, stacked: Mapping[str, Tensor], shared: Mapping[str, Tensor] = {}) -> None:
        """Other weights; what was captured stays where names and shapes are the same."""
        stacked, shared = untied(stacked, self._first_names), untied(shared, self._first_names)
        self.models = check_tensors(self._own, stacked, shared)
        self._stacked = stacked
        self._shared = {n: t for n, t in (self._own | shared).items() if n not in stacked}
        kinds = [(n, t.stride()) for n, t in (*self._stacked.items(), *self._shared.items())]
        pattern = (self.models, len(stacked), tuple(kinds))
        if pattern != self._pattern:
            self._captured.clear()
        self._pattern = pattern
        every = (*self._stacked.values(), *self._shared.values())
        self._versioned = [tensor for tensor in every if not tensor.is_inference()]
        self._release()

    def _release(self) -> None:
        """The weights are others now than those that captured computations hold."""
        self._version = _versions(self._versioned)
        for captured in self._captured.values():
            captured.release()

    @property
    def kept_bytes(self) -> int:
        """Bytes of weights in the form that captured computations need, beside the weights."""
        return sum(captured.kept_bytes for captured in self._captured.values())

    def __call__(self, *inputs: Any, each: bool = False, **kwargs: Any) -> Any:
        """The model's outputs, every tensor in them with a leading model axis [M, …].

        One input is for all models; with `each`, every input tensor has a leading model axis too.
        Raises FleetError for random numbers in forward, and for outputs other than tensors in
        tuples, lists, dicts and dataclasses.
        """
        call = Call.of(inputs, kwargs, each, self.models)
        training = any(module.training for module in self._modules)
        signature = call.signature()
        kind = None if signature is None else (training, torch.is_grad_enabled(), signature)
        if training:
            check_training(self.model, self._stacked)
            result = self._compute(call, kind)
            self._release()
            return result
        if not self.capture or kind is None or torch.is_grad_enabled():
            return self._compute(call, kind)
        if _versions(self._versioned) != self._version:
            self._release()
        captured = self._captured.pop(kind, None) or _Captured()
        self._captured[kind] = captured
        if len(self._captured) > KEPT_SIGNATURES:
            self._captured.popitem(last=False)
        result = captured(self, call, kind)
        self._make_room(captured)
        return result

    def _make_room(self, latest: _Captured) -> None:
        """Keep prepared weights for several kinds of input only as far as they are small."""
        others = [captured for captured in self._captured.values() if captured is not latest]
        while others and self.kept_bytes > max(latest.kept_bytes, SMALL_BYTES):
            others.pop(0).release()

    def _compute(self, call: Call, kind: Hashable) -> Any:
        results, rebuild = self._results(call, kind)
        return rebuild(results)

    def _results(self, call: Call, kind: Hashable) -> Results:
        """By the first way that works for calls of this kind; the last one's error is the model's.

        A way that fails half-way leaves nothing written.
        """
        ways = (self._together, self._together_throughout, self._in_turn)
        known = self._ways.get(kind) if kind is not None else None
        saved = _Saved([] if known is not None else [*call.tensors, *self._all_buffers()])
        first_error: Exception | None = None
        for place in range(known or 0, len(ways)):
            way = ways[place]
            try:
                results = way(call)
            except FleetError:
                raise
            except RandomnessError as error:
                raise FleetError(str(error)) from error
            except Exception as error:
                if isinstance(error, RuntimeError) and VMAP_DRAWS in str(error):
                    raise _random() from error
                if way == self._in_turn or _is_hopeless(error):
                    raise
                first_error = first_error or error
                saved.restore()
                continue
            if way == self._in_turn and first_error is not None:
                self.say("runs model by model", first_error)
            if kind is not None and known is None:
                self._remember(kind, place)
            return results
        raise AssertionError("the last way returns or raises")

    def _remember(self, kind: Hashable, way: int) -> None:
        if len(self._ways) >= KEPT_WAYS:
            del self._ways[next(iter(self._ways))]
        self._ways[kind] = way

    def _all_buffers(self) -> list[Tensor]:
        every = (*self._stacked.items(), *self._shared.items())
        return [tensor for name, tensor in every if name in self._buffers]

    def say(self, what: str, error: Exception) -> None:
        """Warn once about each thing."""
        if what not in self._said:
            self._said.add(what)
            logger.warning("%s %s: %s", type(self.model).__name__, what, first_line(error))

    def _together(self, call: Call) -> Results:
        """All models at once; what they share has no model axis."""
        return self.together(call, self._stacked, self._shared, call.tensors)

    def _together_throughout(self, call: Call) -> Results:
        """All models at once; everything has a model axis, so that it can be written in place."""
        tensors = list(call.tensors)
        if not call.each:
            tensors = [tensor.expand(self.models, *tensor.shape).clone() for tensor in tensors]
        device = next(iter(self._stacked.values())).device
        zeros = torch.zeros(self.models, device=device)
        rebuilds: list[Rebuild] = []

        def one(stacked: dict[str, Tensor], tensors: list[Tensor], zero: Tensor) -> list[Tensor]:
            with Grouping(zero=zero):
                return self.one(call, stacked | self._shared, tensors, rebuilds)

        return vmap(one)(self._stacked, tensors, zeros), rebuilds[0]

    def _in_turn(self, call: Call) -> Results:
        """One model after another, each with inputs and shared buffers of its own to write into."""
        rebuilds: list[Rebuild] = []
        results, buffers = [], []
        for index in range(self.models):
            inputs = [t[index] for t in call.tensors] if call.each else call.tensors
            tensors = [tensor.clone() for tensor in inputs]
            mine = {n: t.clone() for n, t in self._shared.items() if n in self._buffers}
            of_model = {name: t[index] for name, t in self._stacked.items()}
            results.append(self.one(call, {**self._shared, **mine, **of_model}, tensors, rebuilds))
            buffers.append(mine)
        joined = _joined(results, rebuilds)
        for name, first in buffers[0].items():
            if not all(_same(first, others[name]) for others in buffers):
                raise FleetError(
                    f"the models share the buffer '{name}', and each writes something else into "
                    "it; stack it"
                )
            if not _same(first, self._shared[name]):
                self._shared[name].copy_(first)
        return joined, rebuilds[0]

    def together(
        self,
        call: Call,
        stacked: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        tensors: Sequence[Tensor],
    ) -> Results:
        rebuilds: list[Rebuild] = []

        def one(stacked: dict[str, Tensor], tensors: list[Tensor]) -> list[Tensor]:
            return self.one(call, {**stacked, **shared}, tensors, rebuilds)

        with Grouping():
            axes = (0, 0 if call.each else None)
            return vmap(one, in_dims=axes)(dict(stacked), list(tensors)), rebuilds[0]

    def one(
        self, call: Call, state: dict[str, Tensor], tensors: Sequence[Tensor], rebuilds: list
    ) -> list[Tensor]:
        """One model's outputs; how to rebuild their structure is added to `rebuilds`."""
        args, kwargs = call.arguments(tensors)
        state = {place: state[name] for place, name in self._places.items()}
        output = functional_call(self.model, state, args, kwargs, tie_weights=False)
        results, rebuild = take_apart(output)
        rebuilds.append(rebuild)
        return results

    def joins(self, kind: Hashable) -> bool:
        """Whether calls of this kind run all models at once with shared tensors unstacked."""
        return self._ways.get(kind) == 0

    def arguments(self, call: Call) -> Arguments:
        return Arguments(
            list(self._stacked.values()), list(self._shared.values()), call.tensors, call.each
        )


class _Captured:
    """Calls of one kind: the first runs as it is, the second is recorded, others are replayed."""

    def __init__(self) -> None:
        self._calls = 0
        self._replay: Replay | CudaReplay | None = None
        self._rebuild: Rebuild | None = None

    def release(self) -> None:
        if self._replay is not None:
            self._replay.release()

    @property
    def kept_bytes(self) -> int:
        return 0 if self._replay is None else self._replay.kept_bytes

    def __call__(self, group: Group, call: Call, kind: Hashable) -> Any:
        self._calls += 1
        if self._replay is not None and self._rebuild is not None:
            try:
                return self._rebuild(self._replay(group.arguments(call)))
            except CaptureError as error:  # other weights cannot be recorded
                self._replay = None
                group.say("is not captured any more", error)
        results, rebuild = group._results(call, kind)
        if self._calls == 2:
            try:
                self._record(group, call, kind, results)
            except CaptureError as error:
                group.say("is not captured", error)
        return rebuild(results)

    def _record(self, group: Group, call: Call, kind: Hashable, results: Sequence[Tensor]) -> None:
        hooked = [m for m in group.model.modules() if m._forward_hooks or m._forward_pre_hooks]
        if hooked:
            raise CaptureError(f"{type(hooked[0]).__name__} has forward hooks")
        arguments = group.arguments(call)
        with torch.inference_mode(False), torch.no_grad():
            if arguments.stacked[0].is_cuda:
                replay, rebuild = _record_kernels(group, call, kind, arguments)
            else:
                replay, rebuild = _record_operations(group, call, kind, arguments)
            check(_replayed(replay, arguments), results)
        self._replay, self._rebuild = replay, rebuild


def _replayed(replay: Replay | CudaReplay, arguments: Arguments) -> Sequence[Tensor]:
    """What the first replay gives; CaptureError where it fails."""
    try:
        return replay(arguments)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(f"replaying failed: {first_line(error)}") from error


def _record_operations(
    group: Group, call: Call, kind: Hashable, arguments: Arguments
) -> tuple[Replay, Rebuild]:
    one, rebuilds = _one(group, call)

    def several(*tensors: Tensor) -> Sequence[Tensor]:
        names, others = list(group._stacked), list(group._shared)
        stacked = dict(zip(names, tensors, strict=False))
        shared = dict(zip(others, tensors[len(names) :], strict=False))
        inputs = tensors[len(names) + len(others) :]
        return group.together(call, stacked, shared, inputs)[0]

    replay = capture(one, several if group.joins(kind) else None, arguments)
    return replay, rebuilds[0]


def _one(group: Group, call: Call) -> tuple[Callable[..., list[Tensor]], list[Rebuild]]:
    """One model as a function of tensors, and the list of how to rebuild its outputs."""
    names, others = list(group._stacked), list(group._shared)
    rebuilds: list[Rebuild] = []

    def one(*tensors: Tensor) -> list[Tensor]:
        state = dict(zip([*names, *others], tensors, strict=False))
        return group.one(call, state, tensors[len(state) :], rebuilds)

    return one, rebuilds


def _record_kernels(
    group: Group, call: Call, kind: Hashable, arguments: Arguments
) -> tuple[CudaReplay, Rebuild]:
    def compute(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return group.together(call, group._stacked, group._shared, inputs)[0]

    if not group.joins(kind):
        raise CaptureError("its models do not run together")
    one, rebuilds = _one(group, call)
    trace(one, arguments.of(0))  # refuses what writes into its arguments or depends on data
    return CudaReplay(compute, arguments), rebuilds[0]


class _Saved:
    """Tensors as they are now, in case that something writes into them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._saved = [(tensor, tensor.detach().clone()) for tensor in tensors]

    @torch.no_grad()
    def restore(self) -> None:
        """Undo what was written. (Norms do not count up the versions of what they write.)"""
        for tensor, copy in self._saved:
            if not _same(tensor, copy):
                tensor.copy_(copy)


def _versions(tensors: Sequence[Tensor]) -> int:
    """A number that grows with every change in place of one of them."""
    return sum([tensor._version for tensor in tensors])


def _joined(results: Sequence[Sequence[Tensor]], rebuilds: Sequence[Rebuild]) -> list[Tensor]:
    """The outputs of all models; FleetError where they are not alike."""
    for index, (mine, rebuild) in enumerate(zip(results, rebuilds, strict=True)):
        for one, other in zip(rebuilds[0].plain, rebuild.plain, strict=False):
            if type(one) is not type(other) or repr(one) != repr(other):
                raise FleetError(
                    f"the model returns {one!r} for model 0 and {other!r} for model {index}; "
                    "return it as a tensor"
                )
        for one, other in zip(results[0], mine, strict=False):
            if one.shape != other.shape or one.dtype != other.dtype:
                raise FleetError(
                    f"an output is {one.dtype} {list(one.shape)} of model 0 and {other.dtype} "
                    f"{list(other.shape)} of model {index}, which make no single tensor; return "
                    "outputs of one shape (padded or masked), or call the models one by one"
                )
    return [torch.stack(of_models) for of_models in zip(*results, strict=True)]


def _same(one: Tensor, other: Tensor) -> bool:
    if torch.equal(one, other):
        return True
    return bool(torch.isclose(one, other, rtol=0, atol=0, equal_nan=True).all())


def _is_hopeless(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in str(
        error
    )


def _random() -> FleetError:
    return FleetError(
        "forward draws random numbers, and each model would need its own; call model.eval(), or "
        "draw them outside and hand them in"
    )
