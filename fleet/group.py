"""M models of one architecture with different weights, run as one."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fleet.alike import check_models, check_tensors, first_names, named_tensors, places, untied
from fleet.calls import Call
from fleet.capture.replay import Arguments
from fleet.capture.trace import first_line
from fleet.errors import FleetError
from fleet.modes import check_training
from fleet.recording import Recording
from fleet.structure import Rebuild, join, take_apart
from fleet.writes import Saved, same, versions
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
        self._captured: OrderedDict[Hashable, Recording] = OrderedDict()
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
        self.stacked = stacked
        self.shared = {n: t for n, t in (self._own | shared).items() if n not in stacked}
        kinds = [(n, t.stride()) for n, t in (*self.stacked.items(), *self.shared.items())]
        pattern = (self.models, len(stacked), tuple(kinds))
        if pattern != self._pattern:
            self._captured.clear()
        self._pattern = pattern
        every = (*self.stacked.values(), *self.shared.values())
        self._versioned = [tensor for tensor in every if not tensor.is_inference()]
        self._release()

    def _release(self) -> None:
        """The weights are others now than those that captured computations hold."""
        self._version = versions(self._versioned)
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
            check_training(self.model, self.stacked)
            result = self._compute(call, kind)
            self._release()
            return result
        if not self.capture or kind is None or torch.is_grad_enabled():
            return self._compute(call, kind)
        if versions(self._versioned) != self._version:
            self._release()
        captured = self._captured.pop(kind, None) or Recording()
        self._captured[kind] = captured
        if len(self._captured) > KEPT_SIGNATURES:
            self._captured.popitem(last=False)
        result = captured(self, call, kind)
        self._make_room(captured)
        return result

    def _make_room(self, latest: Recording) -> None:
        """Keep prepared weights for several kinds of input only as far as they are small."""
        others = [captured for captured in self._captured.values() if captured is not latest]
        while others and self.kept_bytes > max(latest.kept_bytes, SMALL_BYTES):
            others.pop(0).release()

    def _compute(self, call: Call, kind: Hashable) -> Any:
        results, rebuild = self.results(call, kind)
        return rebuild(results)

    def results(self, call: Call, kind: Hashable) -> Results:
        """By the first way that works for calls of this kind; the last one's error is the model's.

        A way that fails half-way leaves nothing written.
        """
        ways = (self._together, self._together_throughout, self._in_turn)
        known = self._ways.get(kind) if kind is not None else None
        saved = Saved([] if known is not None else [*call.tensors, *self._all_buffers()])
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
        every = (*self.stacked.items(), *self.shared.items())
        return [tensor for name, tensor in every if name in self._buffers]

    def say(self, what: str, error: Exception) -> None:
        """Warn once about each thing."""
        if what not in self._said:
            self._said.add(what)
            logger.warning("%s %s: %s", type(self.model).__name__, what, first_line(error))

    def _together(self, call: Call) -> Results:
        """All models at once; what they share has no model axis."""
        return self.together(call, self.stacked, self.shared, call.tensors)

    def _together_throughout(self, call: Call) -> Results:
        """All models at once; everything has a model axis, so that it can be written in place."""
        tensors = list(call.tensors)
        if not call.each:
            tensors = [tensor.expand(self.models, *tensor.shape).clone() for tensor in tensors]
        device = next(iter(self.stacked.values())).device
        zeros = torch.zeros(self.models, device=device)
        rebuilds: list[Rebuild] = []

        def one(stacked: dict[str, Tensor], tensors: list[Tensor], zero: Tensor) -> list[Tensor]:
            with Grouping(zero=zero):
                return self.one(call, stacked | self.shared, tensors, rebuilds)

        return vmap(one)(self.stacked, tensors, zeros), rebuilds[0]

    def _in_turn(self, call: Call) -> Results:
        """One model after another, each with inputs and shared buffers of its own to write into."""
        rebuilds: list[Rebuild] = []
        results, buffers = [], []
        for index in range(self.models):
            inputs = [t[index] for t in call.tensors] if call.each else call.tensors
            tensors = [tensor.clone() for tensor in inputs]
            mine = {n: t.clone() for n, t in self.shared.items() if n in self._buffers}
            of_model = {name: t[index] for name, t in self.stacked.items()}
            results.append(self.one(call, {**self.shared, **mine, **of_model}, tensors, rebuilds))
            buffers.append(mine)
        joined = join(results, rebuilds)
        for name, first in buffers[0].items():
            if not all(same(first, others[name]) for others in buffers):
                raise FleetError(
                    f"the models share the buffer '{name}', and each writes something else into "
                    "it; stack it"
                )
            if not same(first, self.shared[name]):
                self.shared[name].copy_(first)
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
            list(self.stacked.values()), list(self.shared.values()), call.tensors, call.each
        )


def _is_hopeless(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in str(
        error
    )


def _random() -> FleetError:
    return FleetError(
        "forward draws random numbers, and each model would need its own; call model.eval(), or "
        "draw them outside and hand them in"
    )
