"""Captured models run for all weights of a group, a few models at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fleet.capture.dependence import Dependence, Phase, dependences, phases
from fleet.capture.fuse import fuse
from fleet.capture.layout import merge_views, observe, reuse_memory
from fleet.capture.program import Program
from fleet.capture.sizes import multiplications, result_bytes
from fleet.capture.trace import CaptureError, trace

CACHE_BYTES = 2 << 20
FEW_PRODUCTS = 4_000_000
Function = Callable[..., Sequence[Tensor]]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Arguments:
    """All tensors of a call: `stacked` [models, …], `shared`, and inputs, stacked where `each`."""

    stacked: Sequence[Tensor]
    shared: Sequence[Tensor]
    inputs: Sequence[Tensor]
    each: bool

    @property
    def models(self) -> int:
        return len(self.stacked[0])

    def kinds(self) -> list[Dependence]:
        of_input = Dependence.INPUT | (Dependence.MODEL if self.each else Dependence.NOTHING)
        return (
            [Dependence.MODEL] * len(self.stacked)
            + [Dependence.NOTHING] * len(self.shared)
            + [of_input] * len(self.inputs)
        )

    def of(self, models: int | slice) -> list[Tensor]:
        """In the order of a graph's placeholders, for one model or some."""
        inputs = [tensor[models] for tensor in self.inputs] if self.each else self.inputs
        return [*(tensor[models] for tensor in self.stacked), *self.shared, *inputs]


def capture(one: Function, several: Function | None, arguments: Arguments) -> Replay:
    """Several models at once where each has little to do in one operation, else one after another.

    `one` and `several` take the tensors of `Arguments.of`; without `several`, one after another.
    Raises CaptureError where `one` cannot be traced.
    """
    tensors, kinds = arguments.of(0), arguments.kinds()
    module = trace(one, tensors)
    width = _width(module.graph, kinds, arguments.models)
    if several is None or width < 2:
        fuse(module, kinds)
        return _finish(module, tensors, kinds, arguments.models, None)
    tensors = arguments.of(slice(0, width))
    return _finish(trace(several, tensors), tensors, kinds, arguments.models, width)


def _finish(
    module: fx.GraphModule,
    tensors: Sequence[Tensor],
    kinds: Sequence[Dependence],
    models: int,
    width: int | None,
) -> Replay:
    facts = observe(module, tensors)
    when = phases(dependences(module.graph, kinds))
    merge_views(module.graph, facts, when)
    reuse_memory(module.graph, facts, when)
    owners = map(facts.owner_of, module.graph.output_node().args[0])  # pyright: ignore[reportArgumentType]
    made = [node.op == "call_function" and when[node] >= Phase.SHARED for node in owners]
    return Replay(Program(module, when), models, width, made)


def _width(graph: fx.Graph, kinds: Sequence[Dependence], models: int) -> int:
    """How many models at once: as the cache holds results of, and one where products are large.

    A rule on sizes and not a measurement, so that the same call always gives the same bits.
    """
    when = phases(dependences(graph, kinds))
    body = [node for node in graph.nodes if when[node] is Phase.BODY]
    products = [products for node in body if (products := multiplications(node))]
    if products and sum(products) > FEW_PRODUCTS * len(products):
        return 1
    largest_bytes = max(map(result_bytes, body), default=0)
    most = min(models, CACHE_BYTES // max(1, largest_bytes))
    # The last chunk overlaps the one before it where `width` does not divide the models.
    widths = range(1, max(1, most) + 1)
    return min(widths, key=lambda width: (-(-models // width) * width, -width))


def check(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """CaptureError where what is replayed differs from `expected` beyond rounding."""
    for mine, wanted in zip(found, expected, strict=True):
        if mine.shape != wanted.shape or mine.dtype != wanted.dtype:
            raise CaptureError(
                f"an output is {mine.dtype} {list(mine.shape)} when replayed and {wanted.dtype} "
                f"{list(wanted.shape)} in forward"
            )
        if not wanted.is_floating_point() and not wanted.is_complex():
            same = torch.equal(mine, wanted)
        else:
            limit = TOLERANCE.get(wanted.dtype, 1e-4) * _largest(wanted)
            same = torch.allclose(mine, wanted, rtol=0, atol=limit, equal_nan=True)
        if not same:
            raise CaptureError("what is replayed differs from what forward computes")


class Replay:
    """A program, and the weights that it was given last in the form that it needs.

    `made` says which results lie in memory of their own, and not in what was given or is kept.
    """

    def __init__(
        self, program: Program, models: int, width: int | None, made: Sequence[bool]
    ) -> None:
        self._program, self._width, self._made = program, width, made
        step = width or 1
        starts = [min(start, models - step) for start in range(0, models, step)]
        self._chunks = [slice(start, start + step) if width else start for start in starts]
        self._overlap = step * len(starts) - models
        self._held: list[list[Any]] | None = None
        self.kept_bytes = 0

    def release(self) -> None:
        """Forget the weights."""
        self._held, self.kept_bytes = None, 0

    def __call__(self, arguments: Arguments) -> list[Tensor]:
        if self._held is None:
            self._hold(arguments)
        assert self._held is not None
        parts, inputs = self._program.parts, arguments.inputs
        shared = parts[Phase.SHARED](*self._of_all.fill(self._fixed_shared, inputs, ()))
        results = []
        for chunk, held in zip(self._chunks, self._held, strict=True):
            mine = [tensor[chunk] for tensor in inputs] if arguments.each else inputs
            results.append(parts[Phase.BODY](*self._of_body.fill(held, mine, shared)))
        if len(results) == 1 and self._width:
            mine = zip(results[0], self._made, strict=True)
            return [result if made else result.clone() for result, made in mine]
        return [self._join(outputs) for outputs in zip(*results, strict=True)]

    def _join(self, outputs: Sequence[Tensor]) -> Tensor:
        if self._width is None:
            return torch.stack(list(outputs))
        *whole, last = outputs
        return torch.cat([*whole, last[self._overlap :]])

    def _hold(self, arguments: Arguments) -> None:
        """Compute what depends on the weights alone."""
        program = self._program
        placeholders, parts = program.placeholders, program.parts
        first = len(arguments.stacked)
        fixed = program.constants
        fixed.update(zip(placeholders[first:], arguments.shared, strict=False))
        fixed |= program.run(Phase.ONCE, fixed)
        inputs = placeholders[first + len(arguments.shared) :]
        self._of_all = _Gaps.of(parts[Phase.SHARED].inputs, inputs, [])
        self._of_body = _Gaps.of(parts[Phase.BODY].inputs, inputs, parts[Phase.SHARED].outputs)
        self._fixed_shared = [fixed.get(node) for node in parts[Phase.SHARED].inputs]
        held: list[list[Any]] = []
        for chunk in self._chunks:
            mine = [tensor[chunk] for tensor in arguments.stacked]
            values = fixed | dict(zip(placeholders, mine, strict=False))
            values |= program.run(Phase.WEIGHTS, values)
            held.append([values.get(node) for node in parts[Phase.BODY].inputs])
        own = [*arguments.stacked, *arguments.shared]
        self.kept_bytes = _new_bytes([self._fixed_shared, *held], own)
        self._held = held  # last, so that nothing is half done where memory runs out


class _Gaps(NamedTuple):
    """Which arguments of a part are inputs of the call, and which are computed from them once."""

    inputs: list[tuple[int, int]]
    shared: list[tuple[int, int]]

    @classmethod
    def of(
        cls, wanted: Sequence[fx.Node], inputs: Sequence[fx.Node], shared: Sequence[Any]
    ) -> _Gaps:
        def places(given: Sequence[Any]) -> list[tuple[int, int]]:
            found = {node: place for place, node in enumerate(given)}
            return [(place, found[node]) for place, node in enumerate(wanted) if node in found]

        return cls(places(inputs), places(shared))

    def fill(self, held: list[Any], inputs: Sequence[Any], shared: Sequence[Any]) -> list[Any]:
        filled = held.copy()
        for place, source in self.inputs:
            filled[place] = inputs[source]
        for place, source in self.shared:
            filled[place] = shared[source]
        return filled


def _largest(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def _memory(tensor: Tensor) -> int | None:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else None


def _new_bytes(held: Sequence[Sequence[Any]], own: Sequence[Tensor]) -> int:
    """Bytes of the tensors in `held` that do not lie in the memory of `own`."""
    known = {_memory(tensor) for tensor in own}
    new = {id(t): t for values in held for t in values if isinstance(t, Tensor)}
    return sum(t.numel() * t.element_size() for t in new.values() if _memory(t) not in known)
