"""Groups of models computed side by side, a thread for each, instead of each on all threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch

T = TypeVar("T")


class Workers:
    """As many threads as torch has, of which each computes on one: small operations gain little
    from several, and bits are not to depend on who else there is to share them with.

    While it is entered on the CPU the calling thread too computes on one, but in `all_threads`:
    idle helpers of its own would be in the way of the others. For a single model, and on other
    devices, all runs in the calling thread.
    """

    def __init__(self, device: torch.device, models: int) -> None:
        self._threads = torch.get_num_threads()
        self.count = self._threads if device.type == "cpu" else 1
        self._single = models == 1 or self.count == 1
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if not self._single:
            self._pool = ThreadPoolExecutor(
                self.count, "train", initializer=torch.set_num_threads, initargs=(1,)
            )
        if self.count > 1:
            torch.set_num_threads(1)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        if self.count > 1:
            torch.set_num_threads(self.count)

    @contextmanager
    def all_threads(self) -> Iterator[None]:
        """For what the calling thread computes alone."""
        before = torch.get_num_threads()
        if before != self._threads:
            torch.set_num_threads(self._threads)
        try:
            yield
        finally:
            if before != self._threads:
                torch.set_num_threads(before)

    def run(self, function: Callable[[T], None], tasks: Sequence[T], *, much: bool) -> None:
        """`function` of every task; what one of them raises is raised when all are done.

        Where one has not `much` to do, all run in the calling thread.
        """
        if self._pool is None or len(tasks) == 1 or not much:
            with self.all_threads() if much and self._single else nullcontext():
                for task in tasks:
                    function(task)
            return
        futures = [self._pool.submit(function, task) for task in tasks]
        for future in futures:
            future.exception()
        for future in futures:
            future.result()
