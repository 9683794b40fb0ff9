"""Run a merge plan: read → measure → merge → write, within the byte budget."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from merge.checkpoints import Checkpoint
from merge.errors import MergeError
from merge.gram import STEP, gram_matrix
from merge.measuring import Measure, block_numel, new_measure, row_numel, shaped, show
from merge.method import Method, Products, Reach
from merge.mixing import CHUNK, compute_dtype
from merge.part import Part
from merge.planning.plan import Source, TensorMerge
from merge.stream import Item, Piece, Work

# A tensor whose sources take no more than this share of the budget is measured and merged from
# one reading; a larger one is read once more for each pass of what measures it.
WHOLE_SHARE = 4
# What one thread merges at a time, of all sources together, unless they are very many.
SLICE_BYTES = 8 * 2**20


def plan_work(
    merges: Sequence[TensorMerge],
    *,
    statistics: Callable[[TensorMerge], tuple[Source, ...]],
    seed: int,
    memory_budget: int,
    device: torch.device,
) -> Work:
    """What has to be read, measured, merged and written for these tensors."""
    jobs = {
        plan.output.name: _Job(plan, plan.method, statistics(plan), seed, device)
        for plan in merges
        if plan.method is not None
    }
    _share_measures(list(jobs.values()))
    items: list[Item] = []
    for plan in merges:
        job = jobs.get(plan.output.name)
        items += [_carried(plan)] if job is None else job.items(memory_budget)
    runner = _Runner(jobs, device)
    rounds = [job.looks for job in jobs.values() if job.over_model and not job.plan.tied_to]
    looks = (
        [one[number] for one in rounds if number < len(one)]
        for number in range(max(map(len, rounds), default=0))
    )
    return Work(items, runner.make, {"format": "pt"}, tuple((one, runner.make) for one in looks))


@dataclass(frozen=True)
class _Look(Item):
    """One pass of what measures a tensor: its `number`, or None for its inner products."""

    number: int | None = None


def _carried(plan: TensorMerge) -> Item:
    return Item(plan.output, _stored(plan.models[:1]), workspace_bytes=16, finite=False)


def _stored(sources: Sequence[Source]) -> tuple[tuple[Checkpoint, str], ...]:
    return tuple((source.checkpoint, source.name) for source in sources)


@dataclass
class _Job:
    """One tensor to merge: what has to be read for it, and what was measured of it."""

    plan: TensorMerge
    method: Method
    statistics: tuple[Source, ...]
    seed: int
    device: torch.device
    from_one_reading: bool = False
    measured: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        settings = self.plan.settings[0]
        self.acts_on: Reach = self.method.acts_on_with(settings)
        self.gram: Products | None = self.method.gram_with(settings)
        self.over_model = settings.over_model is not None
        if self.method.gram is not None:
            self.measured["gram"] = None

    @property
    def part(self) -> Part:
        """The place of the tensor, and its random numbers: models go by their places."""
        name = self.plan.tied_to or self.plan.output.name
        return Part(name, seed=self.seed, depth=self.plan.depth)

    @cached_property
    def compute(self) -> torch.dtype:
        """The dtype of the computation: fp64 where a source or the output is."""
        sources = [*self.plan.models, *([self.plan.base] if self.plan.base else [])]
        wide = torch.float64 in {source.info.dtype for source in sources}
        return torch.float64 if wide else compute_dtype(self.plan.output.dtype)

    @cached_property
    def measures(self) -> tuple[Measure, ...]:
        """What measures each model."""
        if self.method.measure is None:
            return ()
        return tuple(
            new_measure(
                self.method, self.plan.settings, k, numel=self.plan.output.numel, part=self.part
            )
            for k in range(len(self.plan.models))
        )

    @property
    def shared(self) -> tuple[Hashable, ...]:
        """What measures all of a model goes by this, one for each: a model given twice is two."""
        labels = self.plan.labels
        return tuple(
            (label, labels[:k].count(label), self.method.name, settings.over_model)
            for k, (label, settings) in enumerate(zip(labels, self.plan.settings, strict=True))
        )

    # --- what to read ---

    @cached_property
    def item(self) -> Item:
        """The reading from which the tensor is merged."""
        plan = self.plan
        base = [plan.base] if plan.base else []
        return Item(
            plan.output,
            _stored([*base, *plan.models, *self.statistics]),
            elementwise=self.acts_on != "tensors",
            together=True,
            workspace_bytes=plan.output.dtype.itemsize + self.compute.itemsize * self._copies,
            multiple=row_numel(plan.output.shape) if self.acts_on == "rows" else 1,
        )

    @property
    def _copies(self) -> int:
        """Tensors in the dtype of the computation that are held while it is merged."""
        if self.acts_on != "tensors":
            return 1
        sources = len(self.plan.models) + len(self.statistics) + (self.plan.base is not None)
        return self.method.copies * sources + 4

    @cached_property
    def looks(self) -> list[Item]:
        """The readings that measure it, in order."""
        base = [self.plan.base] if self.plan.base else []
        look = _Look(
            self.plan.output,
            _stored([*base, *self.plan.models]),
            workspace_bytes=self.compute.itemsize,
            multiple=self.item.multiple,
            aligned=block_numel(self.plan.output.shape, self.acts_on, self.device),
            writes=False,
        )
        passes = max((len(measure.passes) for measure in self.measures), default=0)
        looks: list[Item] = [replace(look, number=number) for number in range(passes)]
        if self.gram is not None:
            looks.insert(0, replace(look, together=True, aligned=STEP))
        return looks

    def items(self, memory_budget: int) -> list[Item]:
        """All that is read for this tensor alone: once where its sources fit the budget well."""
        if self.over_model or not self.looks:
            return [self.item]
        workspace = self.item.workspace_bytes + self.compute.itemsize
        held = sum(checkpoint.tensors[name].nbytes for checkpoint, name in self.item.sources)
        held += workspace * self.plan.output.numel
        whole = self.acts_on == "tensors"
        if whole or held <= memory_budget // WHOLE_SHARE:
            self.from_one_reading = True
            return [replace(self.item, elementwise=False, workspace_bytes=workspace)]
        return [*self.looks, self.item]

    # --- measuring ---

    def split(self, sources: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
        """The sources as base, models and statistics."""
        rest = list(sources)
        base = rest.pop(0) if self.plan.base is not None else None
        count = len(self.plan.models)
        return base, rest[:count], rest[count:]

    def look(self, number: int, start: int, base: Tensor, models: Iterator[Tensor]) -> None:
        """Show this pass the base's part from `start` on, and each model's."""
        # `models` comes last: a reader's block of a tensor lasts until the next is asked for.
        for measure, model in zip(self.measures, models, strict=False):
            if number < len(measure.passes):
                see, shape = measure.passes[number], self.plan.output.shape
                show(see, base, model, shape, self.acts_on, dtype=self.compute, start=start)

    def add_gram(self, start: int, sources: Sequence[Tensor]) -> None:
        """Add the inner products of the part from `start` on, in steps from there."""
        assert self.gram is not None
        flat = [source.reshape(-1) for source in sources]
        total = self.measured["gram"] if start else 0
        for place in range(0, max(flat[0].numel(), 1), STEP):
            part = [tensor[place : place + STEP].to(self.compute) for tensor in flat]
            base, models, _ = self.split(part)
            total = total + gram_matrix(self.gram, base, models)
        self.measured["gram"] = total

    def finish(self) -> None:
        """Keep what was measured, and nothing else of what measured it."""
        if self.measures:
            self.measured["measured"] = tuple(measure.result() for measure in self.measures)
            self.measures = ()


def _share_measures(jobs: Sequence[_Job]) -> None:
    """One measure for all tensors of a model, where the settings say so; tied ones count once."""
    jobs = [job for job in jobs if job.over_model]
    numel: dict[Hashable, int] = {}
    for job in jobs:
        for key in job.shared:
            own = 0 if job.plan.tied_to else job.plan.output.numel
            numel[key] = numel.get(key, 0) + own
    shared: dict[Hashable, Measure] = {}
    for job in jobs:
        for k, key in enumerate(job.shared):
            if key not in shared:
                shared[key] = new_measure(
                    job.method, job.plan.settings, k, numel=numel[key], part=job.part
                )
        job.measures = tuple(shared[key] for key in job.shared)


class _Runner:
    """Measures or makes one piece at a time, in slices that stay within the cache."""

    def __init__(self, jobs: dict[str, _Job], device: torch.device) -> None:
        self._jobs = jobs
        self._device = device
        self._pool = ThreadPoolExecutor(
            torch.get_num_threads(), "merge", initializer=torch.set_num_threads, initargs=(1,)
        )

    def make(self, piece: Piece, tensors: Iterator[Tensor]) -> Tensor | None:
        """The merged or carried tensor of this piece; None where it was only measured."""
        job = self._jobs.get(piece.item.output.name)
        if job is None:
            return next(tensors).to(piece.item.output.dtype)
        there = (tensor.to(self._device, non_blocking=True) for tensor in tensors)
        if isinstance(piece.item, _Look):
            with _one_thread():
                return self._look(job, piece.item.number, piece.start, there)
        sources = list(there)
        if job.from_one_reading:
            with _one_thread():
                self._measure(job, sources)
        job.finish()
        if job.acts_on == "tensors":
            return self._merge(job, 0, sources).to("cpu", job.plan.output.dtype)
        with _one_thread():
            return self._in_slices(job, piece, sources)

    def _look(self, job: _Job, number: int | None, start: int, tensors: Iterator[Tensor]) -> None:
        if number is None:
            job.add_gram(start, list(tensors))
        else:
            # A copy: a reader's block lasts until the next tensor is asked for.
            base = next(tensors).to(job.compute, copy=True)
            job.look(number, start, base, tensors)

    def _measure(self, job: _Job, sources: Sequence[Tensor]) -> None:
        base, models, _ = job.split(sources)
        if job.gram is not None:
            job.add_gram(0, [*([] if base is None else [base]), *models])
        if job.measures:
            assert base is not None
            base = base.to(job.compute)
            for number in range(max(len(measure.passes) for measure in job.measures)):
                job.look(number, 0, base, iter(models))

    def _in_slices(self, job: _Job, piece: Piece, sources: Sequence[Tensor]) -> Tensor:
        numel, shape = piece.stop - piece.start, job.plan.output.shape
        out = torch.empty(numel, dtype=job.plan.output.dtype)
        step = max(_slice_numel(len(sources)) // piece.item.multiple, 1) * piece.item.multiple
        if self._device.type != "cpu":
            step = max(numel, 1)
        flat = [source.reshape(-1) for source in sources]

        def run(start: int) -> None:
            part = [shaped(one[start : start + step], shape, job.acts_on) for one in flat]
            result = self._merge(job, piece.start + start, part)
            out[start : start + step].copy_(result.reshape(-1))

        starts = range(0, max(numel, 1), step)
        # Sorting rows lets other threads run meanwhile; quick operations only get in their way.
        spread = self._pool.map if job.acts_on == "rows" else map
        list(spread(run, starts))
        return out.view(piece.shape)

    def _merge(self, job: _Job, start: int, sources: Sequence[Tensor]) -> Tensor:
        method = job.method
        base, models, statistics = job.split([source.to(job.compute) for source in sources])
        extras = dict(job.measured)
        if method.statistics is not None:
            extras["statistics"] = tuple(statistics) or None
        if method.takes_part:
            extras["part"] = replace(job.part, start=start)
        if method.depth:
            extras["depth"] = job.plan.depth
        function = method.load(method.function)
        try:
            return function(base, models, **method.arguments(job.plan.settings), **extras)
        except MergeError as error:
            raise MergeError(f"{job.plan.output.name!r}: {method.name}: {error}") from error


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch from its own thread pool, whose threads wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _slice_numel(sources: int) -> int:
    return max(SLICE_BYTES // (4 * max(sources, 1)), CHUNK)
