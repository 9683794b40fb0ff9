"""Requests of many variants → batches: fair between variants, bounded in size and in waiting."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fleet.errors import FleetError
from fleet.server.limits import Limits
from fleet.server.refusals import FailedError, RefusedError

__all__ = ["BatchSeen", "Batcher"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
Row = tuple[str, Any]
LONGEST_RETRY_S = 60


@dataclass(frozen=True)
class BatchSeen:
    """What one batch was, for the metrics: its inputs, its variants, its seconds."""

    rows: int
    variants: int
    waited_s: float
    seconds: float
    failed: int


@dataclass(eq=False)
class _Job:
    """The inputs of one request: those from `begun` on wait, `missing` have no answer yet."""

    variant: str
    inputs: Sequence[Any]
    future: asyncio.Future[list[Any]]
    arrived: float
    begun: int = 0
    missing: int = field(init=False)
    answers: list[Any] = field(init=False)
    deadline: asyncio.TimerHandle | None = None

    def __post_init__(self) -> None:
        self.missing = len(self.inputs)
        self.answers = [None] * len(self.inputs)

    @property
    def waiting(self) -> int:
        return len(self.inputs) - self.begun


class Batcher:
    """Gathers inputs of many requests and hands them to `predict`, batch by batch, in one thread.

    A batch begins when `max_batch` inputs wait, when the oldest has waited `max_wait_s`, or as soon
    as so many wait as were here when the last batch ended: whoever sends one request at a time
    never waits for others. Variants take turns, an input each, so that one that floods the queue
    delays itself; when the queue is full, the newest request of the variant that has most waiting
    gives way to a variant that has less. All methods are called from one event loop.
    """

    def __init__(
        self,
        predict: Callable[[Sequence[Row]], Sequence[Any]],
        limits: Limits,
        *,
        seen: Callable[[BatchSeen], None] = lambda batch: None,
    ) -> None:
        self._predict = predict
        self._limits = limits
        self._seen = seen
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="predict")
        self._jobs: dict[str, deque[_Job]] = {}
        self._turns: deque[str] = deque()
        self._open: set[_Job] = set()
        self._rows = 0
        self._running: tuple[int, float] | None = None
        self._expected = 1
        self._timer: asyncio.TimerHandle | None = None
        self._seconds_per_row = 0.0
        self.draining = False

    @property
    def waiting(self) -> int:
        """How many inputs wait for a batch."""
        return self._rows

    @property
    def running_s(self) -> float:
        """How long the present batch has been computing; 0 between batches."""
        return 0.0 if self._running is None else time.monotonic() - self._running[1]

    def check_open(self) -> None:
        """RefusedError (503) where nothing new is taken any more."""
        if self.draining:
            raise RefusedError(503, "the server is ending; try again", retry_after_s=5, close=True)

    def submit(self, variant: str, inputs: Sequence[Any]) -> asyncio.Future[list[Any]]:
        """The answers to the inputs, in their order, later; cancelling it drops what is not begun.

        Raises RefusedError: 503 while draining, 422 on more inputs than a batch has, 429 on a full
        queue. The future raises it too: 429 if it gave way to others, 503 on a passed deadline, 500
        if `predict` failed.
        """
        self.check_open()
        if not 1 <= len(inputs) <= self._limits.max_batch:
            raise RefusedError(
                422,
                f"inputs: found {len(inputs)}; wanted 1 to {self._limits.max_batch} in a request",
            )
        self._make_room(variant, len(inputs))
        loop = asyncio.get_running_loop()
        job = _Job(variant, inputs, loop.create_future(), loop.time())
        job.deadline = loop.call_later(self._limits.timeout_s, self._too_late, job)
        job.future.add_done_callback(lambda _: self._forget(job))
        self._open.add(job)
        if variant not in self._jobs:
            self._jobs[variant] = deque()
            self._turns.append(variant)
        self._jobs[variant].append(job)
        self._rows += len(inputs)
        self._consider()
        return job.future

    async def between(self, work: Callable[[], T]) -> T:
        """What `work` returns, run in the thread of `predict`, between two batches."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def drain(self) -> None:
        """Take nothing new, and return when all that was taken is answered."""
        self.draining = True
        while self._open:
            self._consider()
            await asyncio.wait([job.future for job in self._open])
            await asyncio.sleep(0)  # their callbacks

    def close(self) -> None:
        """End the thread; a batch that it computes is not waited for."""
        self.draining = True
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _make_room(self, variant: str, rows: int) -> None:
        while self._rows + rows > self._limits.queue:
            waits = {name: sum(job.waiting for job in jobs) for name, jobs in self._jobs.items()}
            longest = max(waits, key=lambda name: waits[name], default=variant)
            newest = self._jobs[longest][-1] if longest in self._jobs else None
            own = waits.get(variant, 0) + rows
            if newest is None or newest.begun or waits[longest] <= own:
                raise self._full()
            newest.future.set_exception(self._full())
            self._forget(newest)

    def _full(self) -> RefusedError:
        running = 0 if self._running is None else self._running[0]
        seconds = (self._rows + running) * self._seconds_per_row
        return RefusedError(
            429,
            f"the queue is full: {self._rows} of {self._limits.queue} inputs wait; try again",
            retry_after_s=min(LONGEST_RETRY_S, max(1, math.ceil(seconds))),
        )

    def _too_late(self, job: _Job) -> None:
        if not job.future.done():
            job.future.set_exception(
                RefusedError(
                    503,
                    f"no answer within {self._limits.timeout_s:g} s; try again",
                    retry_after_s=1,
                )
            )

    def _forget(self, job: _Job) -> None:
        """Take a job that is answered, refused or cancelled out of the queue."""
        self._open.discard(job)
        if job.deadline is not None:
            job.deadline.cancel()
        if job.waiting:
            jobs = self._jobs[job.variant]
            jobs.remove(job)
            self._rows -= job.waiting
            job.begun = len(job.inputs)
            if not jobs:
                del self._jobs[job.variant]
                self._turns.remove(job.variant)

    def _consider(self) -> None:
        """Begin a batch now, or set the clock for when it is due."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._running is not None or not self._rows:
            return
        loop = asyncio.get_running_loop()
        oldest = min(jobs[0].arrived for jobs in self._jobs.values())
        due = oldest + self._limits.max_wait_s
        enough = self._rows >= min(self._expected, self._limits.max_batch)
        if enough or self.draining or loop.time() >= due:
            self._begin(loop.time() - oldest)
        else:
            self._timer = loop.call_at(due, self._consider)

    def _begin(self, waited_s: float) -> None:
        batch = self._take()
        self._running = len(batch), time.monotonic()
        rows = [(job.variant, job.inputs[index]) for job, index in batch]
        working = asyncio.get_running_loop().run_in_executor(self._thread, self._answers, rows)
        working.add_done_callback(lambda done: self._end(batch, waited_s, done))

    def _take(self) -> list[tuple[_Job, int]]:
        batch: list[tuple[_Job, int]] = []
        while len(batch) < self._limits.max_batch and self._turns:
            variant = self._turns.popleft()
            jobs = self._jobs[variant]
            job = jobs[0]
            batch.append((job, job.begun))
            job.begun += 1
            self._rows -= 1
            if not job.waiting:
                jobs.popleft()
            if jobs:
                self._turns.append(variant)
            else:
                del self._jobs[variant]
        # The inputs of a variant side by side: whatever splits the batch keeps them together.
        return sorted(batch, key=lambda row: row[0].variant)

    def _end(
        self, batch: list[tuple[_Job, int]], waited_s: float, done: asyncio.Future[list[Any]]
    ) -> None:
        assert self._running is not None
        seconds = time.monotonic() - self._running[1]
        self._running = None
        answers = [FailedError() for _ in batch] if done.cancelled() else done.result()
        for (job, index), answer in zip(batch, answers, strict=True):
            if job.future.done():
                continue
            if isinstance(answer, RefusedError):
                job.future.set_exception(answer)
                continue
            job.answers[index] = answer
            job.missing -= 1
            if not job.missing:
                job.future.set_result(job.answers)
        each = seconds / len(batch)
        self._seconds_per_row += 0.2 * (each - self._seconds_per_row)
        self._expected = len(batch) + self._rows
        failed = sum(isinstance(answer, RefusedError) for answer in answers)
        variants = len({job.variant for job, _ in batch})
        self._consider()
        self._seen(BatchSeen(len(batch), variants, waited_s, seconds, failed))

    def _answers(self, rows: list[Row]) -> list[Any]:
        """An answer or a RefusedError per row; an error of bad input is traced to its rows."""
        try:
            answers = list(self._predict(rows))
            if len(answers) != len(rows):
                raise RuntimeError(f"predict gave {len(answers)} answers to {len(rows)} inputs")
        except FleetError as error:
            # A damaged variant is refused; the others of its batch are answered.
            if len(rows) > 1:
                half = len(rows) // 2
                return self._answers(rows[:half]) + self._answers(rows[half:])
            refused = FailedError()
            logger.warning("%s: %s: %s", refused.failure, rows[0][0], error)
            return [refused]
        except BaseException:
            # Whatever went wrong is this batch's alone: the thread goes on with the next one.
            refused = FailedError()
            logger.exception("%s: a batch of %d inputs failed", refused.failure, len(rows))
            return [FailedError(refused.failure) for _ in rows]
        return answers
