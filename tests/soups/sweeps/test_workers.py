"""Worker processes: what they return, what they say, and what their death leaves alone."""

import logging
import os
import signal
import time

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
