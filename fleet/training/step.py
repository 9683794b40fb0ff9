"""The losses and gradients of several models at one step, as one function of stacked tensors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from threading import Lock
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _BatchNorm

from fleet.alike import named_tensors, places
from fleet.capture.dependence import Dependence, Phase, dependences
from fleet.capture.layout import Facts, merge_views, observe, reuse_memory
from fleet.capture.program import Program
from fleet.capture.sizes import multiplications, result_bytes
from fleet.capture.trace import CaptureError, first_line, trace
from fleet.errors import FleetError
from fleet.modes import drop_rate
from fleet.training.rematerialise import rematerialise
from kernels.draws import Draw, Draws, RandomnessError
from kernels.grouping import Grouping

logger = logging.getLogger(__name__)

CACHE_BYTES = 2 << 20
FEW_PRODUCTS = 4_000_000

aten = torch.ops.aten
LAYOUT = {
    aten._unsafe_view.default,
    aten.as_strided.default,
    aten.clone.default,
    aten.detach.default,
    aten.expand.default,
    aten.permute.default,
    aten.squeeze.dim,
    aten.t.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
}

Named = Mapping[str, Tensor]


class Outcome(NamedTuple):
    """What a step computes for every model, with a leading model axis."""

    losses: Float[Tensor, " models"]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


@dataclass(frozen=True)
class Parts:
    """Which of a model's tensors are trained, and which buffers a step writes or counts up.

    All names are first names; what is in neither is read only.
    """

    trained: tuple[str, ...]
    written: tuple[str, ...]
    counted: tuple[str, ...] = ()


class Kernel:
    """A step of models like `model` that are in the modes that its modules are in now.

    Called with tensors of several models, [models, *shape] each, it computes for each model the
    mean cross-entropy of its rows and its gradient. The first call with tensors of one kind is
    recorded, and later ones replay it without the model's Python code.
    `checkpointing` computes activations again in the backward pass, and gives the same bits.

    Raises FleetError where the logits are not [rows, classes].
    """

    def __init__(self, model: nn.Module, parts: Parts, *, checkpointing: bool = False) -> None:
        self.model, self.parts, self.checkpointing = model, parts, checkpointing
        self._places = places(model)
        self.modes = [(module, module.training) for module in model.modules()]
        self._norms = [module for module in model.modules() if _counts(module)]
        self._overwriting = [m for m in model.modules() if getattr(m, "inplace", None) is True]
        self._recordings: dict[tuple, _Recording] = {}
        self._probed: dict[tuple, tuple[tuple[str, ...], Size]] = {}
        self._draws: dict[tuple, list[Draw]] = {}
        self._drawing, self._in_turn = True, False
        self._lock = Lock()
        self._said: set[str] = set()

    def draws(self, pixels: Tensor, targets: Tensor, stacked: Named, shared: Named) -> list[Draw]:
        """The random numbers that a step of one model needs, in the order of its operations."""
        kind = tuple(pixels.shape[1:])
        if kind in self._draws:
            return self._draws[kind]
        with self._lock:
            collect = _Collect(pixels.device)
            one = {name: tensor[:1] for name, tensor in stacked.items()}
            with torch.no_grad():
                self._losses(one, shared, pixels[:1], targets[:1], collect)
            self._drawing = bool(collect.found)
            self._draws[kind] = collect.found
        return collect.found

    def known_draws(self, batch: tuple[int, ...]) -> list[Draw]:
        """Those of batches of this shape, [rows, channels, height, width], once one was seen."""
        return self._draws[batch]

    def probe(
        self, pixels: Tensor, targets: Tensor, stacked: Named
    ) -> tuple[tuple[str, ...], Size]:
        """Those of the trained tensors that the loss depends on, and what a step of one takes."""
        key = self.parts, self.checkpointing, pixels.shape, targets.shape
        if key not in self._probed:
            self._probed[key] = self._probe(pixels, targets, stacked)
        return self._probed[key]

    def _probe(
        self, pixels: Tensor, targets: Tensor, stacked: Named
    ) -> tuple[tuple[str, ...], Size]:
        names = self.parts.trained
        found: list[str] = []

        def compute(*tensors: Tensor) -> list[Tensor]:
            collect = _Collect(pixels.device)
            state = dict(zip(stacked, tensors, strict=False))
            leaves = [state[name].detach().requires_grad_() for name in names]
            state |= dict(zip(names, leaves, strict=True))
            with torch.enable_grad():
                losses, buffers = self._losses(state, {}, tensors[-2], tensors[-1], collect)
            gradients = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
            found[:] = (n for n, g in zip(names, gradients, strict=True) if g is not None)
            return [losses.detach(), *(g for g in gradients if g is not None), *buffers]

        tensors = [*stacked.values(), pixels, targets]
        try:
            module = trace(compute, tensors)
        except CaptureError as error:
            if not self._in_turn and self._cannot_join(compute, tensors):
                return self._probe(pixels, targets, stacked)
            compute(*tensors)
            self._warn("is not captured", error)
            return tuple(found), Size(1, sum(_nbytes(stacked[name]) for name in found), 0)
        if self.checkpointing:
            rematerialise(module, len(self.parts.written))
        peak = _peak_bytes(module, observe(module, tensors))
        return tuple(found), Size(
            _width(module), peak, sum(map(multiplications, module.graph.nodes))
        )

    def _cannot_join(self, compute: Callable[..., list[Tensor]], tensors: Sequence[Tensor]) -> bool:
        """Whether the models have to run one by one, which is settled then.

        FleetError where that is because of random numbers, which are not each model's own then.
        """
        try:
            compute(*tensors)
        except FleetError:
            raise
        except RandomnessError as error:
            raise FleetError(str(error)) from error
        except Exception as error:
            self._in_turn = True
            drawing = [module for module in self.model.modules() if module.training]
            drawing = [module for module in drawing if drop_rate(module)]
            if drawing:
                raise FleetError(
                    f"{type(self.model).__name__} does not run under torch.func.vmap "
                    f"({first_line(error)}), so its {type(drawing[0]).__name__} cannot draw for "
                    "each model; set its rate to 0, or mend what vmap does not do"
                ) from error
            self._warn("runs model by model", error)
            return True
        return False

    def _warn(self, what: str, error: Exception) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning("%s %s: %s", type(self.model).__name__, what, first_line(error))

    def __call__(
        self,
        stacked: Named,
        shared: Named,
        pixels: Float[Tensor, "models rows *image"],
        targets: Float[Tensor, "models rows classes"],
        drawn: Sequence[Tensor] = (),
    ) -> Outcome:
        tensors = [*stacked.values(), *shared.values(), pixels, targets, *drawn]
        kind = tuple((t.shape, t.stride(), t.dtype) for t in tensors)
        recording = self._recordings.setdefault(kind, _Recording())

        if recording.replay is None:
            with self._lock:  # the model's own code is not for several threads
                if not recording.hopeless:
                    self._record(recording, stacked, shared, tensors)
                if recording.replay is None:
                    return self._outcome(self._compute(list(stacked), list(shared), tensors))
        return self._outcome(recording.replay(*tensors))

    def replay(
        self,
        stacked: Named,
        shared: Named,
        pixels: Tensor,
        targets: Tensor,
        drawn: Sequence[Tensor],
    ) -> Replay | None:
        """What calls with such tensors run; None where that cannot be recorded."""
        tensors = [*stacked.values(), *shared.values(), pixels, targets, *drawn]
        kind = tuple((t.shape, t.stride(), t.dtype) for t in tensors)
        with self._lock:
            recording = self._recordings.setdefault(kind, _Recording())
            if recording.replay is None and not recording.hopeless:
                self._record(recording, stacked, shared, tensors)
        return recording.replay

    def resumed(
        self, replay: Replay, features: Sequence[Tensor], tensors: Sequence[Tensor]
    ) -> Outcome:
        """The outcome of `tensors`, from what frozen layers made of the images."""
        return self._outcome(replay.rest(features, tensors))

    def _outcome(self, results: Sequence[Tensor]) -> Outcome:
        count = 1 + len(self.parts.trained)
        return Outcome(
            results[0],
            dict(zip(self.parts.trained, results[1:count], strict=True)),
            dict(zip(self.parts.written, results[count:], strict=True)),
        )

    def _record(
        self, recording: _Recording, stacked: Named, shared: Named, tensors: Sequence[Tensor]
    ) -> None:
        def compute(*tensors: Tensor) -> list[Tensor]:
            return self._compute(list(stacked), list(shared), tensors)

        own = [Dependence.MODEL] * (len(tensors) - len(stacked) - len(shared) - 1)
        kinds = [Dependence.MODEL] * len(stacked) + [Dependence.NOTHING] * len(shared)
        kinds += [Dependence.INPUT, *own]
        try:
            again = len(self.parts.written) if self.checkpointing else None
            recording.replay = record(compute, tensors, kinds, again=again)
        except CaptureError as error:
            self._warn("is not captured", error)
            recording.hopeless = True

    def _compute(
        self, stacked: Sequence[str], shared: Sequence[str], tensors: Sequence[Tensor]
    ) -> list[Tensor]:
        of_models = dict(zip(stacked, tensors, strict=False))
        of_all = dict(zip(shared, tensors[len(stacked) :], strict=False))
        pixels, targets, *drawn = tensors[len(stacked) + len(shared) :]
        stream = iter(drawn)
        with torch.enable_grad():
            leaves = [of_models[name].detach().requires_grad_() for name in self.parts.trained]
            state = of_models | dict(zip(self.parts.trained, leaves, strict=True))
            losses, buffers = self._losses(
                state, of_all, pixels, targets, lambda draw: next(stream)
            )
            gradients = torch.autograd.grad(losses.sum(), leaves)
        return [losses.detach(), *gradients, *buffers]

    def _losses(
        self, stacked: Named, shared: Named, pixels: Tensor, targets: Tensor, draws: Draws
    ) -> tuple[Float[Tensor, " models"], list[Tensor]]:
        """Each model's loss, and what it made of the buffers that it writes."""
        stacked = {**stacked, **{name: stacked[name].clone() for name in self.parts.written}}
        zeros = pixels.new_zeros(len(pixels))

        def one(
            mine: dict[str, Tensor], pixels: Tensor, targets: Tensor, zero: Tensor
        ) -> tuple[Tensor, list[Tensor]]:
            with self._ready(), self._grouping(zero, draws):
                state = {**mine, **shared}
                state = {
                    place: state[name]
                    for place, name in self._places.items()
                    if name not in self.parts.counted
                }
                logits = functional_call(self.model, state, (pixels,), tie_weights=False)
                check_logits(self.model, logits, targets)
                # cross_entropy sums in another order when it is recorded.
                losses = -(F.log_softmax(logits, -1) * targets).sum(-1)
                return losses.mean(), [mine[name] for name in self.parts.written]

        if not self._in_turn:
            return vmap(one)(dict(stacked), pixels, targets, zeros)
        results = [
            one({name: t[k] for name, t in stacked.items()}, pixels[k], targets[k], zeros[k])
            for k in range(len(pixels))
        ]
        losses = torch.stack([loss for loss, _ in results])
        return losses, [torch.stack(own) for own in zip(*(b for _, b in results), strict=True)]

    def _grouping(self, zero: Tensor, draws: Draws) -> AbstractContextManager:
        if self._in_turn:
            return nullcontext()
        return Grouping(zero=zero, draws=draws) if self._drawing else Grouping()

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """The model in its modes. It writes nothing in place where torch has another way, and norms
        do not count batches: the trainer does, all at once."""
        counts = [norm._buffers["num_batches_tracked"] for norm in self._norms]
        for module, mode in self.modes:
            module.training = mode
        for module in self._overwriting:
            module.inplace = False  # pyright: ignore[reportArgumentType]
        for norm in self._norms:
            norm._buffers["num_batches_tracked"] = None
        try:
            yield
        finally:
            for module in self._overwriting:
                module.inplace = True  # pyright: ignore[reportArgumentType]
            for norm, count in zip(self._norms, counts, strict=True):
                norm._buffers["num_batches_tracked"] = count


def _counts(module: nn.Module) -> TypeGuard[_BatchNorm]:
    """Whether it counts its batches, and needs the number for nothing else."""
    return (
        isinstance(module, _BatchNorm)
        and module.training
        and module.track_running_stats
        and module.momentum is not None
    )


def check_logits(model: nn.Module, logits: object, targets: Tensor) -> None:
    """FleetError where what the model returns is not one logit for each row and class."""
    if not isinstance(logits, Tensor):
        raise FleetError(
            f"{type(model).__name__} returns a {type(logits).__name__}, wanted logits as one "
            "tensor [rows, classes]; wrap the model so that it returns them"
        )
    if logits.shape != targets.shape:
        raise FleetError(
            f"{type(model).__name__} returns {list(logits.shape)} for {len(targets)} images of "
            f"{targets.shape[-1]} classes, wanted {list(targets.shape)}; give the model a head "
            "with as many outputs as the data has classes"
        )


def parts_of(model: nn.Module, trained: Sequence[str]) -> Parts:
    """`trained`, and the buffers of modules in train mode."""
    first = {id(tensor): name for name, tensor in reversed(named_tensors(model).items())}
    written = [
        first[id(tensor)]
        for module in model.modules()
        if module.training
        for tensor in module.buffers(recurse=False)
    ]
    counted = {
        first[id(module.num_batches_tracked)] for module in model.modules() if _counts(module)
    }
    written = dict.fromkeys(name for name in written if name not in counted)
    return Parts(tuple(trained), tuple(written), tuple(sorted(counted)))


class Size(NamedTuple):
    """How many models to compute at once, and what a step of one takes: bytes beside weights, and
    multiplications."""

    width: int
    step_bytes: int
    multiplications: int


class _Collect:
    """Notes which random numbers are asked for, and gives ones."""

    def __init__(self, device: torch.device) -> None:
        self.found: list[Draw] = []
        self._device = device

    def __call__(self, draw: Draw) -> Tensor:
        self.found.append(draw)
        return ones(draw, self._device)


def ones(draw: Draw, device: torch.device) -> Tensor:
    """What one model draws, where the numbers do not matter."""
    dtype = torch.bool if draw.kind == "keep" else draw.dtype
    return torch.ones((1, *draw.shape), dtype=dtype, device=device)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _width(module: fx.GraphModule) -> int:
    """How many models at once, from the recorded step of one: as many as the cache holds the
    results of, and one where products are large.

    A rule on sizes and not a measurement, so that the same recipe always gives the same bits.
    """
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    products = [products for node in nodes if (products := multiplications(node))]
    if products and sum(products) > FEW_PRODUCTS * len(products):
        return 1
    return max(1, CACHE_BYTES // max(map(result_bytes, nodes), default=1))


def _peak_bytes(module: fx.GraphModule, facts: Facts) -> int:
    """The most that lives at one time of what the graph makes, each value until its last use."""
    nodes = list(module.graph.nodes)
    ends: dict[fx.Node, int] = {}
    for at, node in enumerate(nodes):
        for used in (node, *node.all_input_nodes):
            ends[facts.owner_of(used)] = at
    over: dict[int, int] = {}
    alive = most = 0
    for at, node in enumerate(nodes):
        if node.op == "call_function" and facts.owner_of(node) is node:
            alive += result_bytes(node)
            over[ends[node]] = over.get(ends[node], 0) + result_bytes(node)
        most = max(most, alive)
        alive -= over.pop(at, 0)
    return most


@dataclass
class _Recording:
    """Calls with tensors of one kind, once they are recorded."""

    replay: Replay | None = None
    hopeless: bool = False


class Replay:
    """A recorded step, in two parts: what depends on the images and on shared tensors alone, and
    the rest. Values are freed after their last use.

    `layouts` are those of the first part's results, None for those that are the same for all
    images; `prefix_products` are its multiplications.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        facts: Facts,
        when: Mapping[fx.Node, Phase],
        found: Mapping[fx.Node, Dependence],
    ) -> None:
        program = Program(module, when)
        self._prefix, self._rest = program.parts[Phase.SHARED], program.parts[Phase.BODY]
        # Nodes that were added since are views of results, and so depend on the images.
        same = [found.get(node) is Dependence.NOTHING for node in self._prefix.outputs]
        outputs = zip(self._prefix.outputs, same, strict=True)
        self.layouts = [None if same else facts.layouts[node] for node, same in outputs]
        inside = (node for node in module.graph.nodes if when[node] is Phase.SHARED)
        self.prefix_products = sum(map(multiplications, inside))
        known: dict[fx.Node, Any] = {n: at for at, n in enumerate(program.placeholders)}
        known |= program.constants
        self._wanted = [known[node] for node in self._prefix.inputs]
        made = {node: at for at, node in enumerate(self._prefix.outputs)}
        self._others = [(known.get(node), made.get(node)) for node in self._rest.inputs]

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        return self.rest(self.features(*tensors), tensors)

    def features(self, *tensors: Tensor) -> Sequence[Tensor]:
        """What does not depend on any model of its own."""
        return self._prefix(*[tensors[at] if isinstance(at, int) else at for at in self._wanted])

    def rest(self, features: Sequence[Tensor], tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """All results; of `tensors` the images are not looked at."""
        return self._rest(
            *[
                features[made] if made is not None else tensors[at] if isinstance(at, int) else at
                for at, made in self._others
            ]
        )


def record(
    compute: Callable[..., list[Tensor]],
    tensors: Sequence[Tensor],
    kinds: Sequence[Dependence],
    *,
    again: int | None,
) -> Replay:
    """`compute` without the model's Python code; CaptureError where it cannot be recorded.

    `kinds` says what each tensor depends on: shared ones on nothing, images on the input. With
    `again`, the number of buffers among the results, activations are computed again.
    """
    module = trace(compute, tensors)
    if again is not None:
        rematerialise(module, again)
    facts = observe(module, tensors)
    found = dependences(module.graph, kinds)
    prefix = {node for node in module.graph.nodes if found[node] == Dependence.INPUT}
    if not any(map(multiplications, prefix)):
        prefix = set()
    for node in reversed(module.graph.nodes):
        # How a result is laid out for what follows is a matter of what follows.
        if node in prefix and node.target in LAYOUT and prefix.isdisjoint(node.users):
            prefix.remove(node)
    for node in reversed(module.graph.nodes):
        if found[node] == Dependence.NOTHING and not prefix.isdisjoint(node.users):
            prefix.add(node)
    when = dict.fromkeys(module.graph.nodes, Phase.BODY) | dict.fromkeys(prefix, Phase.SHARED)
    merge_views(module.graph, facts, when)
    reuse_memory(module.graph, facts, when)
    return Replay(module, facts, when, found)
