from __future__ import annotations

import threading
import time
from collections.abc import Hashable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from fleet.errors import FleetError
from fleet.serving.residency import Residency, Ticket

CPU = torch.device("cpu")


@dataclass
class Made:
    key: Hashable
    nbytes: int = 8192
    gate: threading.Event | None = None
    loads: list[int] = field(default_factory=list)
    fails: bool = False

    def load(self, slot: Tensor) -> tuple[dict[str, Tensor], int]:
        if self.gate is not None:
            assert self.gate.wait(10)
        self.loads.append(slot.data_ptr())
        if self.fails:
            raise FleetError(f"{self.key}: damaged")
        values = slot[: self.nbytes]
        values.fill_(hash(self.key) % 251)
        return {"values": values}, self.nbytes


@pytest.fixture
def residency():
    made = Residency(4 * 8192, CPU)
    yield made
    made.close()


def test_reading_goes_on_while_something_else_is_done(residency):
    gate = threading.Event()
    ticket = Ticket([Made("a", gate=gate), Made("b")])
    assert residency.fetch(ticket)
    threading.Timer(0.2, gate.set).start()
    started = time.perf_counter()
    held = residency.hold(ticket)
    assert time.perf_counter() - started > 0.1
    assert {key: int(tensors["values"][0]) for key, tensors in held.items()} == {
        "a": hash("a") % 251,
        "b": hash("b") % 251,
    }
    counts = residency.counts
    assert counts.seconds_waiting > 0.1
    assert (counts.hits, counts.misses, counts.bytes_read) == (0, 2, 2 * 8192)
    residency.release(ticket)


def test_what_is_there_is_not_read_again(residency):
    unit = Made("a")
    for _ in range(3):
        ticket = Ticket([unit])
        residency.hold(ticket)
        residency.release(ticket)
    assert len(unit.loads) == 1
    assert (residency.counts.hits, residency.counts.misses) == (2, 1)


def test_later_batches_give_up_their_room_the_last_first(residency):
    first, second, third = (Ticket([Made((k, n)) for n in range(2)]) for k in range(3))
    large = Ticket([Made(("large", n)) for n in range(3)])
    assert residency.fetch(first)
    assert residency.fetch(second)
    assert not residency.fetch(third)
    residency.hold(first)
    residency.release(first)
    held = residency.hold(large, [second, third])
    assert len(held) == 3
    assert not second.entries
    residency.release(large)
    assert len(residency.hold(second)) == 2
    residency.release(second)


def test_more_than_fits_is_refused_by_name(residency):
    units = [Made(k) for k in range(5)]
    with pytest.raises(FleetError, match=r"tenant 'x': its parts are 40.0 KiB, memory_budget"):
        residency.check_fits(units, "tenant 'x'")
    with pytest.raises(FleetError, match="do not fit"):
        residency.hold(Ticket(units))


def test_what_could_not_be_read_is_tried_again(residency):
    unit = Made("a", fails=True)
    good = Made("b")
    for _ in range(2):
        ticket = Ticket([good, unit])
        with pytest.raises(FleetError, match="a: damaged"):
            residency.hold(ticket)
        residency.release(ticket)
    assert len(unit.loads) == 2
    assert len(good.loads) == 1
    unit.fails = False
    assert len(residency.hold(Ticket([unit]))) == 1


def test_what_is_expected_is_read_before_it_is_asked_for(residency):
    gate = threading.Event()
    units = [Made("a", gate=gate), Made("b")]
    assert residency.expect(units)
    assert residency.expect(units)
    counts = residency.counts
    assert (counts.prefetched, counts.hits, counts.misses) == (2, 0, 0)
    gate.set()
    ticket = Ticket(units)
    assert len(residency.hold(ticket)) == 2
    assert (counts.prefetched, counts.hits, counts.misses) == (2, 2, 0)
    assert [len(unit.loads) for unit in units] == [1, 1]
    residency.release(ticket)
    assert all(entry.pins == 0 for entry in residency.slots._entries.values())


def test_what_is_expected_stays_until_a_batch_needs_the_room(residency):
    expected = [Made(("expected", n)) for n in range(3)]
    assert residency.expect(expected)
    assert not residency.expect([Made(("more", n)) for n in range(2)])
    for n in range(3):
        ticket = Ticket([Made(n)])
        residency.hold(ticket)
        residency.release(ticket)
    assert all(unit.key in residency.slots for unit in expected[1:])
    first = Ticket([Made(("large", n)) for n in range(3)])
    assert len(residency.hold(first)) == 3
    assert not any(unit.key in residency.slots for unit in expected)
    assert ("more", 0) in residency.slots
    residency.release(first)


def test_what_was_expected_and_could_not_be_read_is_read_again(residency):
    unit = Made("a", fails=True)
    residency.expect([unit])
    ticket = Ticket([unit])
    with pytest.raises(FleetError, match="a: damaged"):
        residency.hold(ticket)
    residency.release(ticket)
    unit.fails = False
    assert len(residency.hold(Ticket([unit]))) == 1


def test_threads_that_ask_for_the_same_find_its_own_values(residency):
    units = [Made(k) for k in range(9)]
    wrong: list[object] = []

    def ask(start: int) -> None:
        for turn in range(60):
            mine = [units[(start + turn) % 9]]
            residency.expect(mine)
            ticket = Ticket(mine)
            for key, tensors in residency.hold(ticket).items():
                if not bool((tensors["values"] == hash(key) % 251).all()):
                    wrong.append(key)
            residency.release(ticket)

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert residency.slots.evictions > 20


def test_parts_that_fit_together_are_laid_together_where_they_lie_scattered():
    residency = Residency(10 * 4096, CPU)
    small = [Ticket([Made(n, 4096)]) for n in range(10)]
    for ticket in small:
        residency.hold(ticket)
    wanted = Ticket([*(ticket.units[0] for ticket in small[2::3]), Made("large", 7 * 4096)])
    for ticket in small:
        residency.release(ticket)
    assert len(residency.hold(wanted)) == 4
    residency.release(wanted)
    residency.close()
