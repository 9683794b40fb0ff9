"""M models of one architecture with different weights, run as one."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fleet.alike import check_models, check_tensors, first_names, named_tensors, untied
from fleet.calls import Call
from fleet.capture.cuda import CudaReplay
from fleet.capture.replay import Arguments, Replay, capture, check
from fleet.capture.trace import CaptureError
from fleet.errors import FleetError
from fleet.modes import check_training
from fleet.structure import Rebuild, take_apart
from kernels.grouping import Grouping, RandomnessError

logger = logging.getLogger(__name__)

KEPT_SIGNATURES = 8
Results = tuple[Sequence[Tensor], Rebuild]


class Group:
    """M models of one architecture with different weights, run as one.

    `stacked` holds parameters and buffers by name, each [M, *shape]; `shared` holds those that are
    the same for all models, [*shape]; names in neither are the model's own, shared. What depends
    only on shared tensors and on an input that is one for all is computed once.

    Differentiable in everything that is handed in. In evaluation mode and without gradients, with
    `capture`, the second call with inputs of one kind records the computation, and later ones
    replay it without the model's Python code: its structure must not change any more.
    `kept_bytes` is what is kept for this beside the weights: at most about as much again.

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
        self._first_names = first_names(model)
        self._ways: list[Callable[[Call], Results]] = [
            self._together,
            self._together_throughout,
            self._in_turn,
        ]
        self._worked = False
        self._said: set[str] = set()
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._pattern: Hashable = None
        self.load(stacked, shared)

    @classmethod
    def of(cls, models: Sequence[nn.Module], *, capture: bool = True) -> Group:
        """The group of `models`, detached; tensors that are equal in all of them are shared."""
        check_models(models)
        states = [named_tensors(model) for model in models]
        stacked, shared = {}, {}
        for name in states[0]:
            first, *others = [state[name].detach() for state in states]
            if others and all(torch.equal(first, other) for other in others):
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
        if training:
            check_training(self.model, self._stacked)
        if not self.capture or training or torch.is_grad_enabled():
            return self._compute(call)
        signature = call.signature()
        if signature is None:
            return self._compute(call)
        captured = self._captured.pop(signature, None) or _Captured()
        self._captured[signature] = captured
        if len(self._captured) > KEPT_SIGNATURES:
            self._captured.popitem(last=False)
        return captured(self, call)

    def _compute(self, call: Call) -> Any:
        results, rebuild = self._results(call)
        return rebuild(results)

    def _results(self, call: Call) -> Results:
        """By the first way that works; the last one's error is the model's own."""
        first_error: Exception | None = None
        written = self._written()
        for place, way in enumerate(self._ways):
            try:
                results = way(call)
            except FleetError:
                raise
            except RandomnessError as error:
                raise FleetError(str(error)) from error
            except Exception as error:
                if "randomness" in str(error):
                    raise _random() from error
                if way == self._in_turn or _is_hopeless(error):
                    raise
                first_error = first_error or error
                for name, value in written.items():
                    self._stacked[name].copy_(value)
                continue
            if way == self._in_turn and first_error is not None:
                self.say("runs model by model", first_error)
            self._worked = True
            del self._ways[:place]
            return results
        raise AssertionError("the last way returns or raises")

    def _written(self) -> dict[str, Tensor]:
        """The running statistics as they are, in case that a first way fails half-way."""
        if self._worked or not self.model.training:
            return {}
        buffers = dict(self.model.named_buffers())
        return {name: t.clone() for name, t in self._stacked.items() if name in buffers}

    def say(self, what: str, error: Exception) -> None:
        """Warn once about each thing."""
        if what not in self._said:
            self._said.add(what)
            reason = (str(error).strip() or type(error).__name__).split("\n")[0]
            logger.warning("%s %s: %s", type(self.model).__name__, what, reason)

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
        """One model after another."""
        rebuilds: list[Rebuild] = []
        results = []
        for index in range(self.models):
            state = self._shared | {name: t[index] for name, t in self._stacked.items()}
            tensors = [t[index] for t in call.tensors] if call.each else call.tensors
            results.append(self.one(call, state, tensors, rebuilds))
        return [torch.stack(of_models) for of_models in zip(*results, strict=True)], rebuilds[0]

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
        results, rebuild = take_apart(functional_call(self.model, state, args, kwargs))
        rebuilds.append(rebuild)
        return results

    @property
    def joins(self) -> bool:
        """Whether the models have run at once with shared tensors unstacked."""
        return self._ways[0] == self._together

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

    def __call__(self, group: Group, call: Call) -> Any:
        self._calls += 1
        if self._replay is not None and self._rebuild is not None:
            return self._rebuild(self._replay(group.arguments(call)))
        results, rebuild = group._results(call)
        if self._calls == 2:
            try:
                self._record(group, call, results)
            except CaptureError as error:
                group.say("is not captured", error)
        return rebuild(results)

    def _record(self, group: Group, call: Call, results: Sequence[Tensor]) -> None:
        hooked = [m for m in group.model.modules() if m._forward_hooks or m._forward_pre_hooks]
        if hooked:
            raise CaptureError(f"{type(hooked[0]).__name__} has forward hooks")
        arguments = group.arguments(call)
        with torch.inference_mode(False), torch.no_grad():
            if arguments.stacked[0].is_cuda:
                replay, rebuild = _record_kernels(group, call, arguments)
            else:
                replay, rebuild = _record_operations(group, call, arguments)
            check(replay(arguments), results)
        self._replay, self._rebuild = replay, rebuild


def _record_operations(group: Group, call: Call, arguments: Arguments) -> tuple[Replay, Rebuild]:
    names, others = list(group._stacked), list(group._shared)
    rebuilds: list[Rebuild] = []

    def one(*tensors: Tensor) -> list[Tensor]:
        state = dict(zip([*names, *others], tensors, strict=False))
        return group.one(call, state, tensors[len(state) :], rebuilds)

    def several(*tensors: Tensor) -> Sequence[Tensor]:
        stacked = dict(zip(names, tensors, strict=False))
        shared = dict(zip(others, tensors[len(names) :], strict=False))
        inputs = tensors[len(names) + len(others) :]
        return group.together(call, stacked, shared, inputs)[0]

    replay = capture(one, several if group.joins else None, arguments)
    return replay, rebuilds[0]


def _record_kernels(group: Group, call: Call, arguments: Arguments) -> tuple[CudaReplay, Rebuild]:
    def compute(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return group.together(call, group._stacked, group._shared, inputs)[0]

    if not group.joins:
        raise CaptureError("its models do not run together")
    _, rebuild = group.together(call, group._stacked, group._shared, call.tensors)
    return CudaReplay(compute, arguments), rebuild


def _is_hopeless(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in str(
        error
    )


def _random() -> FleetError:
    return FleetError(
        "forward draws random numbers, and each model would need its own; call model.eval(), or "
        "draw them outside and hand them in"
    )
