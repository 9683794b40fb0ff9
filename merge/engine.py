"""Run a merge plan: read → merge → write, one pass, within the byte budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from merge.checkpoints import TensorInfo
from merge.errors import MergeError
from merge.gram import gram_matrix
from merge.method import MethodSettings
from merge.mixing import CHUNK, compute_dtype
from merge.part import Part
from merge.plain import measure_one
from merge.planning import Source, TensorMerge
from merge.stream import Item, Piece, PieceFunction, Work

# A tensor whose sources take no more than this share of the budget is measured and merged from
# one reading; of a larger one the sources are read twice.
WHOLE_SHARE = 2
GRAM_CHUNK = 8 * CHUNK
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
    kitchen = _Kitchen(seed, device)
    items: list[Item] = []
    for merge in merges:
        job = _Job(merge, statistics(merge))
        kitchen.jobs[merge.output.name] = job
        items += job.items(memory_budget)
    return Work(items, kitchen.make, {"format": "pt"}, kitchen.looks())


@dataclass
class _Job:
    """One tensor to merge, and what was measured of it."""

    merge: TensorMerge
    statistics: tuple[Source, ...]
    measured: dict[str, Any] = field(default_factory=dict)
    over_model: tuple[Any, ...] = ()

    @property
    def acts_on(self) -> str:
        assert self.merge.method is not None
        return self.merge.method.acts_on_with(self.merge.settings[0])

    @property
    def gram(self) -> Literal["tensors", "deltas"] | None:
        assert self.merge.method is not None
        return self.merge.method.gram_with(self.merge.settings[0])

    @property
    def measures_model(self) -> bool:
        return self.merge.method is not None and self.merge.settings[0].over_model

    @property
    def compute(self) -> torch.dtype:
        """The dtype of the computation: fp64 where a source or the output is."""
        sources = [*self.merge.models, *([self.merge.base] if self.merge.base else [])]
        dtypes = {source.checkpoint.tensors[source.name].dtype for source in sources}
        wide = torch.float64 in dtypes | {self.merge.output.dtype}
        return torch.float64 if wide else compute_dtype(self.merge.output.dtype)

    def items(self, memory_budget: int) -> list[Item]:
        merge, method = self.merge, self.merge.method
        models = tuple((source.checkpoint, source.name) for source in merge.models)
        if method is None:
            return [Item(merge.output, models[:1], workspace_bytes=16, finite=False)]
        base = ((merge.base.checkpoint, merge.base.name),) if merge.base else ()
        extra = tuple((source.checkpoint, source.name) for source in self.statistics)
        out, compute = merge.output.dtype.itemsize, self.compute.itemsize
        item = Item(
            merge.output,
            (*base, *models, *extra),
            elementwise=self.acts_on != "tensors",
            together=True,
            workspace_bytes=out + compute,
            multiple=_row(merge.output) if self.acts_on == "rows" else 1,
        )
        if self.acts_on == "tensors":
            return [replace(item, workspace_bytes=out + compute * (2 * len(item.sources) + 4))]
        if self.measures_model or (method.measure is None and self.gram is None):
            return [item]
        measuring = 8 * compute if method.measure else 0
        held = sum(c.tensors[name].nbytes for c, name in item.sources)
        held += measuring * merge.output.numel
        if held <= memory_budget // WHOLE_SHARE:
            return [replace(item, elementwise=False, workspace_bytes=out + compute + measuring)]
        look = replace(item, sources=(*base, *models), writes=False, multiple=1)
        if self.gram is None:
            look = replace(look, elementwise=False, together=False, workspace_bytes=measuring)
        return [look, item]


class _Kitchen:
    """Makes one piece at a time; slices of it run in several threads, each within the cache."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.jobs: dict[str, _Job] = {}
        self._seed = seed
        self._device = device
        self._pool = ThreadPoolExecutor(
            torch.get_num_threads(), "merge", initializer=torch.set_num_threads, initargs=(1,)
        )

    def make(self, piece: Piece, tensors: Iterator[Tensor]) -> Tensor | None:
        """The merged or carried tensor of this piece; None where it was only measured."""
        job = self.jobs[piece.item.output.name]
        if job.merge.method is None:
            return next(tensors).to(job.merge.output.dtype)
        if job.acts_on == "tensors":
            return self._make(job, piece, tensors)
        with _one_thread():
            return self._make(job, piece, tensors)

    def _make(self, job: _Job, piece: Piece, tensors: Iterator[Tensor]) -> Tensor | None:
        method = job.merge.method
        assert method is not None
        if not piece.item.writes and job.gram is None:
            self._measure_each(job, tensors)
            return None
        sources = [tensor.to(self._device, non_blocking=True) for tensor in tensors]
        if not piece.item.writes:
            self._add_gram(job, sources)
            return None
        if piece.whole and not job.measured and not job.measures_model:
            self._measure(job, sources)
        if job.acts_on == "tensors":
            return self._merge(job, piece.start, sources).to("cpu", job.merge.output.dtype)
        return self._in_slices(job, piece, sources)

    # --- measuring ---

    def looks(self) -> tuple[tuple[list[Item], PieceFunction], ...]:
        """Passes that measure all tensors of a model which have the same settings at once."""
        over: dict[Any, Any] = {}
        items = []
        for job in self.jobs.values():
            if not job.measures_model:
                continue
            merge, method = job.merge, job.merge.method
            assert method is not None
            measure = method.load(method.measure_model or "")
            for label, settings in zip(merge.labels, merge.settings, strict=True):
                if (label, method.name, settings) not in over:
                    over[label, method.name, settings] = measure(**_values(settings))
            job.over_model = tuple(
                over[label, method.name, settings]
                for label, settings in zip(merge.labels, merge.settings, strict=True)
            )
            (item,) = (item for item in job.items(1 << 62) if item.writes)
            items.append(replace(item, writes=False))
        count = max((len(one.passes) for one in over.values()), default=0)
        return tuple((items, partial(self._look, number)) for number in range(count))

    def _look(self, number: int, piece: Piece, tensors: Iterator[Tensor]) -> None:
        job = self.jobs[piece.item.output.name]
        flat = [tensor.to(self._device).reshape(-1) for tensor in tensors]
        base, models, _ = self._sorted(job, flat)
        assert base is not None

        def look(selection: Any, model: Tensor) -> None:
            for start in range(0, model.numel(), GRAM_CHUNK):
                part = slice(start, start + GRAM_CHUNK)
                selection.passes[number](model[part].to(job.compute) - base[part].to(job.compute))

        seeing = [
            (selection, model)
            for selection, model in zip(job.over_model, models, strict=True)
            if number < len(selection.passes)
        ]
        with _one_thread():
            for selection, model in seeing:
                look(selection, model)

    def _measure(self, job: _Job, sources: Sequence[Tensor]) -> None:
        method = job.merge.method
        assert method is not None
        if job.gram is not None:
            self._add_gram(job, sources)
        if method.measure is not None:
            self._measure_each(job, iter(sources), together=True)

    def _measure_each(self, job: _Job, tensors: Iterator[Tensor], together: bool = False) -> None:
        """Measure the models one after the other, or, where all are there, side by side."""
        merge = job.merge
        method = merge.method
        assert method is not None
        base = None
        if merge.base is not None:
            base = next(tensors).to(self._device, job.compute, copy=not together)
        part = self._part(job, 0)

        def measure(model: int, tensor: Tensor) -> Any:
            tensor = tensor.to(self._device, job.compute)
            return measure_one(method, base, tensor, merge.settings, model, part)

        models = range(len(merge.models))
        # `models` comes first: the readers' block of a tensor lasts until the next is asked for.
        job.measured["measured"] = tuple(map(measure, models, tensors))

    def _add_gram(self, job: _Job, sources: Sequence[Tensor]) -> None:
        of = job.gram
        assert of is not None
        flat = [source.reshape(-1) for source in sources]

        def one(start: int) -> Tensor:
            part = [tensor[start : start + GRAM_CHUNK].to(job.compute) for tensor in flat]
            base, models, _ = self._sorted(job, part)
            return gram_matrix(of, base, models)

        for gram in map(one, range(0, max(flat[0].numel(), 1), GRAM_CHUNK)):
            job.measured["gram"] = job.measured.get("gram", 0) + gram

    # --- merging ---

    def _in_slices(self, job: _Job, piece: Piece, sources: Sequence[Tensor]) -> Tensor:
        numel = piece.stop - piece.start
        out = torch.empty(numel, dtype=job.merge.output.dtype)
        row = _row(job.merge.output) if job.acts_on == "rows" else 1
        step = max(_slice_numel(len(sources)) // row, 1) * row
        if self._device.type != "cpu":
            step = max(numel, 1)
        flat = [source.reshape(-1) for source in sources]

        def run(start: int) -> None:
            part = [tensor[start : start + step] for tensor in flat]
            if job.acts_on == "rows":
                shape = job.merge.output.shape
                part = [tensor.view(-1, *shape[1:]) if shape else tensor for tensor in part]
            result = self._merge(job, piece.start + start, part)
            out[start : start + step].copy_(result.reshape(-1))

        starts = range(0, max(numel, 1), step)
        # Sorting rows lets other threads run meanwhile; quick operations only get in their way.
        spread = self._pool.map if job.acts_on == "rows" else map
        list(spread(run, starts))
        return out.view(piece.shape)

    def _merge(self, job: _Job, start: int, sources: Sequence[Tensor]) -> Tensor:
        merge = job.merge
        method = merge.method
        assert method is not None
        compute = [source.to(job.compute) for source in sources]
        base, models, statistics = self._sorted(job, compute)
        extras = dict(job.measured)
        if method.gram is not None:
            extras.setdefault("gram", None)
        if method.statistics is not None:
            extras["statistics"] = tuple(statistics) or None
        if job.over_model:
            extras["measured"] = tuple(selection.kept() for selection in job.over_model)
        if method.takes_part:
            extras["part"] = self._part(job, start)
        if method.depth:
            extras["depth"] = merge.depth
        function = method.load(method.function)
        try:
            return function(base, models, **method.arguments(merge.settings), **extras)
        except MergeError as error:
            raise MergeError(f"{merge.output.name!r}: {method.name}: {error}") from error

    def _part(self, job: _Job, start: int) -> Part:
        merge = job.merge
        name = merge.tied_to or merge.output.name
        return Part(name, start, self._seed, merge.labels, merge.depth)

    def _sorted(
        self, job: _Job, sources: Sequence[Tensor]
    ) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
        """The sources as base, models and statistics."""
        rest = list(sources)
        base = rest.pop(0) if job.merge.base is not None else None
        count = len(job.merge.models)
        return base, rest[:count], rest[count:]


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


def _row(info: TensorInfo) -> int:
    """Elements of one row, along the first axis; all of a tensor of fewer than two axes."""
    if len(info.shape) < 2:
        return max(info.numel, 1)
    return max(info.numel // max(info.shape[0], 1), 1)


def _values(settings: MethodSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in type(settings).model_fields}
