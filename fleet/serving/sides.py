"""Two halves of a batch computed side by side, on half of the threads each."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import TypeVar

import torch

from fleet.serving.bound import BoundModel
from fleet.serving.inputs import Together

logger = logging.getLogger(__name__)

Part = TypeVar("Part")

SIDES = 2
LEAST_ROWS = 8
TOLERANCE = 1e-4


class Sides:
    """`bound` and a twin of it, and a thread for each.

    The products of tenants' parts and the model's own Python are one thread's work, so that halves
    side by side take less time than one whole on all threads. On other devices than the CPU, with
    one thread, and for a model that cannot be copied there is one side.
    """

    def __init__(self, bound: BoundModel) -> None:
        self._bounds = [bound]
        self._threads = torch.get_num_threads()
        self._pool: ThreadPoolExecutor | None = None
        self._tried = bound.device.type != "cpu" or self._threads < SIDES

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def learn(self, inputs: Together) -> None:
        """Make the twin, if it was not tried yet: it has to answer as the model does."""
        if self._tried:
            return
        self._tried = True
        try:
            twin = self._bounds[0].twin()
            found, wanted = (bound.forward(inputs) for bound in (twin, self._bounds[0]))
        except Exception as error:  # whatever a model does when it is copied
            logger.info("no halves side by side: the model cannot be copied: %s", error)
            return
        if not bool((found - wanted).abs().max() <= TOLERANCE * wanted.abs().max()):
            logger.info("no halves side by side: a copy of the model answers otherwise")
            return
        self._bounds.append(twin)
        self._pool = _workers(self._threads)

    @property
    def count(self) -> int:
        """How many there are, or may be once it was tried."""
        return len(self._bounds) if self._tried else SIDES

    def halves(self, parts: Sequence[Part], rows: Sequence[int]) -> list[Sequence[Part]]:
        """The parts in their order, in as many pieces of about as many rows as there are sides."""
        stops = list(accumulate(rows))
        if len(self._bounds) == 1 or len(parts) < SIDES or stops[-1] < SIDES * LEAST_ROWS:
            return [parts]
        middle = min(range(1, len(parts)), key=lambda place: abs(2 * stops[place - 1] - stops[-1]))
        return [parts[:middle], parts[middle:]]

    def run(self, compute: Callable[[BoundModel, Part], None], parts: Sequence[Part]) -> None:
        """`compute` of every part; what one of them raises is raised when all are done."""
        if len(parts) < SIDES or self._pool is None:
            for part in parts:
                compute(self._bounds[0], part)
            return

        def inferred(bound: BoundModel, mine: Sequence[Part]) -> None:
            with torch.inference_mode():
                for part in mine:
                    compute(bound, part)

        futures = [
            self._pool.submit(inferred, bound, parts[side::SIDES])
            for side, bound in enumerate(self._bounds)
        ]
        for future in futures:
            future.exception()
        for future in futures:
            future.result()


def _workers(threads: int) -> ThreadPoolExecutor:
    """Threads that compute on a part of `threads` each."""
    started = threading.Barrier(SIDES + 1)

    def start() -> None:
        torch.get_num_threads()  # or the first operation takes over the others' number
        torch.set_num_threads(max(1, threads // SIDES))
        started.wait()

    pool = ThreadPoolExecutor(SIDES, thread_name_prefix="side", initializer=start)
    for _ in range(SIDES):
        pool.submit(int)
    started.wait()
    # A thread that comes later takes over the number that was set last.
    torch.set_num_threads(threads)
    return pool
