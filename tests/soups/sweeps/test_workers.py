"""Worker processes: what they return, what they say, and what their death leaves alone."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from soups.errors import SoupError
from soups.sweeps.workers import THREAD_VARIABLES, Workers, cores


def double(number: int) -> int:
    if number == 3:
        raise SoupError("three: wanted another")
    if number == 4:
        raise ZeroDivisionError("a bug")
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 6:
        logging.getLogger("soups.somewhere").warning("six of %d", 6)
        logging.getLogger("soups.somewhere").warning("six of %d", 6)
    return 2 * number


def surroundings() -> tuple[int, str, bool]:
    blocked = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    return os.getpid(), os.environ[THREAD_VARIABLES[0]], blocked


def test_every_task_has_its_own_outcome(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(THREAD_VARIABLES[0], raising=False)
    with Workers(2, 3) as workers:
        found = {o.task: o for o in workers.run(double, [(n,) for n in range(8)])}
        (after,) = workers.run(surroundings, [()])
        (again,) = workers.run(surroundings, [()])
    assert sorted(found) == list(range(8))
    assert [found[n].result for n in (0, 1, 2, 6, 7)] == [0, 2, 4, 12, 14]
    assert all(found[n].error is None for n in (0, 1, 2, 6, 7))
    assert found[3].error == "three: wanted another"
    assert "ZeroDivisionError: a bug" in (found[4].error or "")
    assert "Traceback" in (found[4].error or "")
    # A worker that is killed takes its own task with it, and no other.
    assert "was killed by SIGKILL" in (found[5].error or "")
    assert "memory" in (found[5].error or "")
    assert found[6].warnings == ("six of 6",)
    assert found[7].warnings == ()
    # Workers are used again; they have the threads that were asked for, and no ear for Ctrl-C.
    assert after.result == again.result
    assert after.result[1:] == ("3", True)


def test_a_worker_that_dies_while_it_waits_is_replaced():
    with Workers(1, 1) as workers:
        (first,) = workers.run(surroundings, [()])
        os.kill(first.result[0], signal.SIGKILL)
        workers._workers[0].process.join()
        (second,) = workers.run(surroundings, [()])
    assert second.result[0] != first.result[0]


def drawn() -> float:
    return float(np.random.random())


def test_workers_draw_numbers_of_their_own():
    """They are forked from one process, with the state of its generator."""
    with Workers(2, 1) as workers:
        one, other = workers.run(drawn, [(), ()])
    assert one.result != other.result


def test_the_environment_says_how_many_threads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(THREAD_VARIABLES[0], "5")
    assert Workers(2, 1).threads == 5
    monkeypatch.delenv(THREAD_VARIABLES[0])
    assert Workers(2, 1).threads == 1
    assert 1 <= cores() <= (os.cpu_count() or 1)


def test_leaving_the_block_ends_the_processes():
    with Workers(1, 1) as workers:
        (found,) = workers.run(surroundings, [()])
    with pytest.raises(ProcessLookupError):
        os.kill(found.result[0], 0)
    ended: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        _interrupted(ended)
    with pytest.raises(ProcessLookupError):
        os.kill(ended[0], 0)


def _interrupted(ended: list[int]) -> None:
    """Ctrl-C while one worker has nothing to do and the other is busy."""
    with Workers(2, 1) as workers:
        for outcome in workers.run(_wait, [(0.0,), (60.0,)]):
            ended.append(outcome.result)
            raise KeyboardInterrupt


def _wait(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def test_a_worker_is_replaced_after_some_tasks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("soups.sweeps.workers.TASKS_EACH", 2)
    with Workers(1, 1) as workers:
        outcomes = list(workers.run(surroundings, [()] * 5))
    assert [o.task for o in outcomes] == [0, 1, 2, 3, 4]
    processes = [o.result[0] for o in outcomes]
    assert processes[0] == processes[1] != processes[2] == processes[3] != processes[4]


def test_a_worker_that_dies_before_it_reads_its_task_is_named():
    with Workers(1, 1) as workers:
        (first,) = workers.run(surroundings, [()])
        os.kill(first.result[0], signal.SIGSTOP)
        # What it has not read makes the end of its pipe a reset.
        timer = threading.Timer(0.2, os.kill, (first.result[0], signal.SIGKILL))
        timer.start()
        second, third = workers.run(surroundings, [(), ()])
        timer.join()
    assert "was killed by SIGKILL" in (second.error or "")
    assert third.error is None


LEFT_ALONE = """
from soups.sweeps.workers import Workers
from tests.soups.sweeps.test_workers import _wait

with Workers(2, 1) as workers:
    for outcome in workers.run(_wait, [(0.0,), (0.0,), (60.0,), (60.0,)]):
        print(outcome.result, flush=True)
"""


def test_workers_end_when_their_parent_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", LEFT_ALONE], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = {int(parent.stdout.readline()), int(parent.stdout.readline())}
    parent.kill()
    # It ends when the last process that writes there has ended.
    parent.communicate(timeout=20)
    deadline = time.monotonic() + 20
    while any(_is_running(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(_is_running(worker) for worker in workers)


def _is_running(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
