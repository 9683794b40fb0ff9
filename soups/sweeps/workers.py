"""Processes that run tasks one after another, and may die; imports no torch.

What their tasks need is imported once, by a process that does nothing else and that workers are
forked from: it has no threads but those of allocators, which know of forks, and has computed
nothing, so that forking it is safe. A worker that
is killed (memory, a crash in a library) takes its own task with it and no other: it is named, and
another worker goes on.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from tqdm import tqdm

from inputs.command import OUR_PACKAGES
from soups.errors import MISTAKES

# Read when the libraries behind torch start.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

# What is imported before workers are forked.
PRELOADED = ["soups.pipeline", "torch._dynamo"]  # the latter by torch's optimizers

# What a worker keeps from task to task grows: some 50 MB a run.
TASKS_EACH = 6


def cores() -> int:
    """How many this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # not everywhere
    return len(allowed(0)) if allowed else os.cpu_count() or 1


@dataclass(frozen=True)
class Outcome:
    """How one task ended: its result, or the `error` that ended it; and what it warned of."""

    task: int
    result: Any
    error: str | None
    warnings: tuple[str, ...]


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    task: int | None = None
    done: int = 0


class Workers:
    """`with Workers(count, threads) as workers:` starts processes that end with the block.

    Each has `threads` threads, or as many as OMP_NUM_THREADS says where that is set. They do not
    hear Ctrl-C: leaving the block ends them at once, which is safe for work whose files appear
    whole. After some tasks a worker is replaced, with the memory that libraries keep.
    """

    def __init__(self, count: int, threads: int):
        self.threads = int(os.environ.get(THREAD_VARIABLES[0]) or threads)
        self._count = count
        self._workers: list[_Worker] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            if worker.task is not None:
                worker.process.terminate()
            worker.pipe.close()  # an idle one ends by itself
        for worker in self._workers:
            worker.process.join()
        self._workers.clear()

    def run(self, function: Callable[..., Any], tasks: Sequence[tuple]) -> Iterator[Outcome]:
        """`function(*task)` for each of the tasks, as they end; begun in their order.

        The function, its arguments and its results are pickled. What it raises is an Outcome too.
        """
        waiting = list(enumerate(tasks))[::-1]
        while len(self._workers) < min(self._count, len(tasks)):
            self._workers.append(self._start())
        for worker in [*self._workers]:
            self._next(worker, function, waiting)
        while busy := {w.pipe: w for w in self._workers if w.task is not None}:
            for pipe in wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                assert worker.task is not None
                try:
                    result, error, said = worker.pipe.recv()
                except (EOFError, ConnectionError):
                    outcome = Outcome(worker.task, None, self._bury(worker), ())
                    worker = self._start()
                    self._workers.append(worker)
                else:
                    outcome = Outcome(worker.task, result, error, said)
                    worker = self._relieved(worker) if waiting else worker
                self._next(worker, function, waiting)
                yield outcome

    def _next(
        self, worker: _Worker, function: Callable[..., Any], waiting: list[tuple[int, tuple]]
    ) -> None:
        worker.task = None
        if not waiting:
            return
        # Before it is sent: whoever leaves meanwhile ends this worker too.
        worker.task, arguments = waiting.pop()
        try:
            worker.pipe.send((function, arguments))
        except ConnectionError:  # it died while it had nothing to do
            task = worker.task
            self._bury(worker)
            worker = self._start()
            self._workers.append(worker)
            worker.task = task
            with contextlib.suppress(ConnectionError):  # told when its answer is waited for
                worker.pipe.send((function, arguments))

    def _start(self) -> _Worker:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        ours, theirs = context.Pipe()
        # The environment as it is now: what workers are forked from has that of its own start.
        arguments = (theirs, self.threads, dict(os.environ))
        process = context.Process(target=_serve, args=arguments, daemon=True)
        # Ctrl-C is ours: what workers are forked from is born with it blocked, and so are they.
        resource_tracker.ensure_running()  # which would lift the block
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            _ensure_server()
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        return _Worker(process, ours)

    def _relieved(self, worker: _Worker) -> _Worker:
        """The worker, or another in its place where it has done enough."""
        worker.done += 1
        if worker.done < TASKS_EACH:
            return worker
        worker.pipe.close()
        worker.process.join()
        self._workers.remove(worker)
        self._workers.append(self._start())
        return self._workers[-1]

    def _bury(self, worker: _Worker) -> str:
        """Forget a worker that died; how it ended."""
        worker.process.join()
        worker.pipe.close()
        self._workers.remove(worker)
        code = worker.process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        memory = "; if memory ran out, take fewer workers or a smaller memory_budget"
        return f"its process {how}{memory if code == -signal.SIGKILL else ''}"


def _ensure_server() -> None:
    """Have a process that workers are forked from, without the threads that libraries start."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(pipe: Connection, threads: int, environment: Mapping[str, str]) -> None:
    """What a worker does: task after task until the other end of the pipe is closed."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # where others made the server
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)
    _take_threads(threads)
    if "numpy" in sys.modules:  # else all would draw the same, where a learner asks for no seed
        sys.modules["numpy"].random.seed()
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    warnings.simplefilter("ignore")
    # tqdm's own lock is shared by processes, and would be left behind by one that is ended.
    tqdm.set_lock(threading.RLock())
    heard = _Warnings()
    logging.getLogger().addHandler(logging.NullHandler())
    for package in OUR_PACKAGES:
        logging.getLogger(package).addHandler(heard)
    while True:
        try:
            function, arguments = pipe.recv()
        except (EOFError, ConnectionError):
            return
        heard.said.clear()
        result, error = None, None
        try:
            result = function(*arguments)
        except (*MISTAKES, OSError) as mistake:
            error = str(mistake)
        except Exception:
            error = traceback.format_exc()
        pipe.send((result, error, tuple(dict.fromkeys(heard.said))))


def _take_threads(count: int) -> None:
    """Have the libraries that are imported, and those to come, use so many threads."""
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(count)))
    from threadpoolctl import threadpool_limits

    threadpool_limits(count)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)


def _end_with_parent() -> None:
    """End this process when its parent ends: a killed one cannot say so, and takes no result."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _Warnings(logging.Handler):
    """Collects what is said at the level of a warning."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())
