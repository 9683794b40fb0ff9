"""Many variants of one base answered in mixed batches: shared layers once, for all rows."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from types import TracebackType

import torch
from torch import Tensor, nn

from fleet.errors import FleetError
from fleet.serving.answers import Answers, Work
from fleet.serving.bound import BoundModel
from fleet.serving.catalogue import Catalogue, Tenant
from fleet.serving.features import FeatureCache
from fleet.serving.inputs import Asked, Input, InputReader, Kind
from fleet.serving.ngrams import NGramCache, NGrams
from fleet.serving.products import keep_freed_memory
from fleet.serving.residency import Residency, Ticket
from fleet.serving.slots import Unit
from fleet.serving.trial import check_takes
from fleet.variants import Store

__all__ = ["Request", "Statistics", "Tenants"]

Request = tuple[str, Input]
KEPT_KINDS = 256

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Statistics:
    """What was done since the start.

    A hit is a unit of a batch (a variant's own parts, a node, a vector that variants share) that
    was in memory or on its way there when the batch was seen; `prefetched` counts those that
    `prefetch` had read before. `seconds_reading` are the thread's that fetches, `seconds_waiting`
    those in which a batch waited for it. `alone` counts requests whose tenant could not be
    computed together with others.
    """

    batches: int = 0
    requests: int = 0
    alone: int = 0
    hits: int = 0
    misses: int = 0
    prefetched: int = 0
    evictions: int = 0
    resident_bytes: int = 0
    bytes_read: int = 0
    bytes_moved: int = 0
    seconds_reading: float = 0.0
    seconds_waiting: float = 0.0
    seconds_computing: float = 0.0
    feature_hits: int = 0
    feature_misses: int = 0
    feature_bytes: int = 0

    @property
    def hidden(self) -> float:
        """The share of the smaller of reading and computing that was done beside the other."""
        smaller = min(self.seconds_reading, self.seconds_computing)
        return max(0.0, 1.0 - self.seconds_waiting / smaller) if smaller > 0 else 1.0


@dataclass
class _Step:
    """Requests that are computed at once, tenant by tenant, and what they need in memory."""

    catalogue: Catalogue
    asked: list[Asked] = field(default_factory=list)
    tenants: list[Tenant] = field(default_factory=list)
    ticket: Ticket = field(default_factory=lambda: Ticket([]))
    answers: list[Tensor] = field(default_factory=list)


@dataclass
class _Batch:
    requests: Sequence[Request]
    catalogue: Catalogue
    steps: list[_Step]

    def answers(self) -> list[Tensor]:
        """In the order of the requests, once the steps are computed."""
        found: dict[int, Tensor] = {}
        for step in self.steps:
            places = (asked.place for asked in step.asked)
            found.update(zip(places, step.answers, strict=True))
        return [found[place] for place in range(len(self.requests))]


class Tenants:
    """The variants of `store`, answered by one `model` of the base's architecture (any weights).

    The model is kept: it gets the base's weights, in `dtype` (default: the store's) on `device`,
    and runs once for the rows of all tenants of a batch. Do not call it directly from then on, nor
    change its weights, even after `close`: during a batch some of them are a tenant's, and its
    linear layers compute with copies that would not follow. What tenants own is in memory as far as
    `memory_budget` bytes allow (None: all of it), fetched for the next `look_ahead` batches of a
    stream while one is computed. On a CUDA device, `host_budget` bytes of pinned host memory
    (default: `memory_budget`) keep what was read. `feature_cache_bytes` keep what the layers below
    the first that any tenant owns make of an input; `approximate` looks that up for tokens by
    their neighbours (`fleet.serving.ngrams`). What is stored in few bits, sparse or as a mask
    is decoded whenever it is used; with `decoded`, once when it is fetched, and then takes as many
    bytes as the base's.

    A tenant that owns a tensor for which the model's operations have no rule runs alone, with the
    same answer; the log says so once. Calls from several threads take turns.

    Raises FleetError for a model that is not the store's base, an unknown tenant, inputs that the
    model does not take or that are NaN, a damaged file of the store, and parts that do not fit.
    """

    def __init__(
        self,
        store: Store,
        model: nn.Module,
        *,
        memory_budget: int | None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        look_ahead: int = 2,
        host_budget: int | None = None,
        feature_cache_bytes: int = 0,
        approximate: NGrams | None = None,
        decoded: bool = False,
    ) -> None:
        if look_ahead < 0 or feature_cache_bytes < 0:
            raise FleetError(
                f"look_ahead is {look_ahead}, feature_cache_bytes {feature_cache_bytes}; wanted 0 "
                "or more"
            )
        if memory_budget is not None and memory_budget <= 0:
            raise FleetError(
                f"memory_budget is {memory_budget}; wanted bytes, or None for no limit"
            )
        self._device = torch.device(device)
        if self._device.type == "cpu":
            keep_freed_memory()
        self._store = store
        plain = {name: e.parts["value"] for name, e in store.base.tensors.items()}
        base = {name: store.packs.read(digest) for name, digest in plain.items()}
        self._bound = BoundModel(model, base, self._device, dtype)
        self._reader = InputReader(model, self._bound.dtype, self._device)
        host = memory_budget if host_budget is None else host_budget
        self._residency = Residency(memory_budget, self._device, host)
        self._look_ahead = look_ahead
        self._catalogue = Catalogue(store, self._bound, decoded=decoded)
        self._decoded = decoded
        self._features: FeatureCache | None = None
        if approximate is not None:
            self._features = NGramCache(self._bound, approximate)
        elif feature_cache_bytes:
            self._features = FeatureCache(self._bound, feature_cache_bytes)
        self._answers = Answers(self._bound, self._reader, self._features)
        self._taken: dict[Kind, None] = {}
        self._lock = threading.RLock()
        self._batches = self._requests = 0
        self._computing = 0.0

    def close(self) -> None:
        """End the threads."""
        self._residency.close()
        self._answers.close()

    def __enter__(self) -> Tenants:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def predict(self, requests: Sequence[Request]) -> list[Tensor]:
        """The answer to each (tenant, input), in their order: logits [classes] of its own head.

        An input is a tensor as the model takes it without the axis of rows, or a dictionary of
        tokens {"input_ids": [tokens], …}; what is returned is in the host's memory.
        """
        with self._lock:
            batch = self._planned(requests)
            return self._answered(batch, [])

    def stream(self, batches: Iterable[Sequence[Request]]) -> Iterator[list[Tensor]]:
        """`predict` for one batch after the other, the parts of the next ones fetched meanwhile.

        On a CPU with several threads two batches are computed side by side, if `look_ahead` is not
        0.
        """
        ahead: deque[_Batch] = deque()
        source, more = iter(batches), True
        try:
            while True:
                wanted = self._look_ahead + (self._answers.at_once if self._look_ahead else 1)
                while more and len(ahead) < wanted:
                    requests = next(source, None)
                    if requests is None:
                        more = False
                        break
                    with self._lock:
                        ahead.append(self._foreseen(requests))
                        self._fetch(_steps_of(ahead))
                if not ahead:
                    return
                with self._lock:
                    answers = self._side_by_side(ahead) or [self._answered(ahead.popleft(), ahead)]
                yield from answers
        finally:
            with self._lock:
                self._release(_steps_of(ahead))

    def refresh(self) -> bool:
        """Take up what was added, replaced or removed in the store; whether there was something.

        A batch that was begun sees the old or the new state.
        """
        with self._lock:
            self._store.refresh()
            if self._store.version == self._catalogue.version:
                return False
            self._catalogue = Catalogue(
                self._store, self._bound, self._catalogue, decoded=self._decoded
            )
            self._residency.keep_only(self._catalogue.known_units())
            if self._features is not None:
                self._features.forget_cut()
            return True

    def prefetch(self, names: Iterable[str]) -> bool:
        """Fetch these tenants' parts while something else is done; whether all of them are coming.

        For those who know what will be asked for before they ask. Waits for no batch, and throws
        out nothing that a batch, or an earlier call, is about to use: False where there is no room
        for all. A tenant that is unknown, or does not fit the model, is skipped; the log says so.
        """
        catalogue = self._catalogue
        units: list[Unit] = []
        skipped = False
        for name in names:
            try:
                units += catalogue.tenant(name).units
            except FleetError as error:
                logger.warning("not fetched ahead: %s", error)
                skipped = True
        return self._residency.expect(units) and not skipped

    @property
    def statistics(self) -> Statistics:
        """What was done since the start."""
        counts, slots, features = self._residency.counts, self._residency.slots, self._features
        return Statistics(
            batches=self._batches,
            requests=self._requests,
            alone=self._answers.alone,
            hits=counts.hits,
            misses=counts.misses,
            prefetched=counts.prefetched,
            evictions=slots.evictions,
            resident_bytes=slots.used,
            bytes_read=counts.bytes_read,
            bytes_moved=counts.bytes_moved,
            seconds_reading=counts.seconds_reading,
            seconds_waiting=counts.seconds_waiting,
            seconds_computing=self._computing,
            feature_hits=0 if features is None else features.hits,
            feature_misses=0 if features is None else features.misses,
            feature_bytes=0 if features is None else features.nbytes,
        )

    # --- before anything is computed ---

    def _planned(self, requests: Sequence[Request]) -> _Batch:
        """The batch in steps; every request is checked."""
        catalogue = self._catalogue
        kinds: dict[Kind, list[Asked]] = {}
        for place, request in enumerate(requests):
            if not isinstance(request, tuple) or len(request) != 2:
                raise FleetError(f"request {place}: wanted a pair (tenant, input)")
            name, given = request
            self._tenant(catalogue, place, name)
            asked = self._reader.read(place, name, given)
            kinds.setdefault(asked.kind, []).append(asked)
        for kind, asked in kinds.items():
            self._check_taken(kind, asked[0])
        batch = _Batch(requests, catalogue, [])
        for asked in kinds.values():
            asked.sort(key=lambda one: (catalogue.tenant(one.tenant).key, one.place))
            batch.steps.extend(self._steps(catalogue, asked))
        return batch

    def _foreseen(self, requests: Sequence[Request]) -> _Batch:
        """As `_planned`; what is wrong with it is said when its turn comes."""
        try:
            return self._planned(requests)
        except FleetError:
            return _Batch(requests, self._catalogue, [])

    def _tenant(self, catalogue: Catalogue, place: int, name: object) -> Tenant:
        try:
            return catalogue.tenant(name)
        except FleetError as error:
            raise FleetError(f"request {place}: {error}") from error

    def _check_taken(self, kind: Kind, asked: Asked) -> None:
        if kind in self._taken:
            return
        with torch.inference_mode():
            where = f"request {asked.place} (tenant {asked.tenant!r})"
            check_takes(self._bound, self._reader.together([asked]), where)
        if len(self._taken) >= KEPT_KINDS:
            del self._taken[next(iter(self._taken))]
        self._taken[kind] = None

    def _steps(self, catalogue: Catalogue, asked: Sequence[Asked]) -> Iterator[_Step]:
        """As many tenants at a time as have room."""
        step, units = _Step(catalogue), dict[Hashable, Unit]()
        for one in asked:
            tenant = catalogue.tenant(one.tenant)
            if not step.tenants or step.tenants[-1] is not tenant:
                mine = {unit.key: unit for unit in tenant.units}
                if step.tenants and not self._residency.fits((units | mine).values()):
                    yield step
                    step, units = _Step(catalogue), {}
                if not step.tenants:
                    self._residency.check_fits(mine.values(), f"tenant {one.tenant!r}")
                units |= mine
                step.ticket = Ticket(list(units.values()))
            step.asked.append(one)
            step.tenants.append(tenant)
        if step.asked:
            yield step

    def _fetch(self, steps: Iterable[_Step]) -> None:
        """Have their parts read, in their order, until there is no room for more."""
        for step in steps:
            if not self._residency.fetch(step.ticket):
                return

    # --- computing ---

    def _answered(self, batch: _Batch, ahead: Iterable[_Batch]) -> list[Tensor]:
        if not batch.steps:
            batch = self._planned(batch.requests)
        while True:
            try:
                for place, step in enumerate(batch.steps, start=1):
                    self._compute([step], [*batch.steps[place:], *_steps_of(ahead)])
                return self._finished(batch)
            except FleetError:
                # What was replaced or removed meanwhile may have left the disk.
                if not self.refresh() and batch.catalogue is self._catalogue:
                    raise
            finally:
                self._release(batch.steps)
            batch = self._planned(batch.requests)

    def _side_by_side(self, ahead: deque[_Batch]) -> list[list[Tensor]] | None:
        """The answers of the next batches; None where they are to be computed one by one."""
        group = list(islice(ahead, self._answers.at_once if self._look_ahead else 1))
        steps = list(_steps_of(group))
        units = {unit.key: unit for step in steps for unit in step.ticket.units}
        single = all(len(batch.steps) == 1 for batch in group)
        if len(group) < 2 or not single or not self._residency.fits(units.values()):
            return None
        try:
            self._compute(steps, list(_steps_of(islice(ahead, len(group), None))))
        except FleetError:
            return None  # whose it is comes out when they are computed one by one
        for _ in group:
            ahead.popleft()
        return [self._finished(batch) for batch in group]

    def _compute(self, steps: Sequence[_Step], later: Sequence[_Step]) -> None:
        """Answer these steps at once, while the parts of the `later` ones are fetched."""
        works = []
        try:
            for step in steps:
                held = self._residency.hold(step.ticket, [other.ticket for other in later])
                works.append(Work(step.asked, step.tenants, held, step.catalogue))
            self._fetch(later)
            started = time.perf_counter()
            with torch.inference_mode():
                found = self._answers.of(works)
            self._computing += time.perf_counter() - started
        finally:
            self._release(steps)
        for step, answers in zip(steps, found, strict=True):
            step.answers = answers

    def _finished(self, batch: _Batch) -> list[Tensor]:
        self._batches += 1
        self._requests += len(batch.requests)
        return batch.answers()

    def _release(self, steps: Iterable[_Step]) -> None:
        for step in steps:
            self._residency.release(step.ticket)


def _steps_of(batches: Iterable[_Batch]) -> Iterator[_Step]:
    return (step for batch in batches for step in batch.steps)
