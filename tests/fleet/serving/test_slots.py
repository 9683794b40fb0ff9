from __future__ import annotations

import random
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from fleet.serving.slots import Slots, host_memory


@dataclass
class Made:
    key: Hashable
    nbytes: int

    def load(self, slot: Tensor) -> tuple[dict[str, Tensor], int]:
        return {}, self.nbytes


def slots(budget: int | None) -> Slots:
    return Slots(budget, host_memory)


def use(held: Slots, unit: Made) -> bool:
    """Whether it had to be fetched."""
    found = held.pin(unit)
    assert found is not None
    held.unpin(found[0])
    return found[1]


def test_the_budget_holds_whatever_is_asked_for():
    held, rng = slots(1 << 20), random.Random(0)
    units = [Made(k, rng.choice([3000, 50_000, 200_000, 111_111])) for k in range(40)]
    for _ in range(500):
        use(held, rng.choice(units))
        inside = [entry.slot.numel() for entry in held._entries.values()]
        assert sum(inside) == held.used <= 1 << 20
    assert held.evictions > 100


def test_what_is_pinned_stays_and_refuses():
    held = slots(100_000)
    pinned = held.pin(Made("a", 60_000))
    assert pinned is not None
    assert held.pin(Made("b", 60_000)) is None
    assert not use(held, Made("a", 60_000))
    held.unpin(pinned[0])
    assert use(held, Made("b", 60_000))
    assert "a" not in held


def test_often_used_ones_stay_when_many_pass():
    held = slots(10 * 8192)
    for _ in range(20):
        use(held, Made("often", 8192))
    for k in range(60):
        assert use(held, Made(k, 8192))
    assert "often" in held
    for k in range(3000):
        use(held, Made(("later", k), 8192))
    assert "often" not in held


def test_the_least_recent_leaves_of_those_used_alike():
    held = slots(3 * 8192)
    for key in "abc":
        use(held, Made(key, 8192))
    use(held, Made("d", 8192))
    assert "a" not in held
    assert all(key in held for key in "bcd")


def test_small_ones_stay_longer_than_large_ones_of_the_same_use():
    held = slots(1 << 20)
    use(held, Made("large", 900_000))
    use(held, Made("small", 8192))
    use(held, Made("more", 200_000))
    assert "small" in held
    assert "large" not in held


def test_the_same_calls_evict_the_same():
    def run() -> list[bool]:
        held, rng = slots(1 << 19), random.Random(3)
        return [use(held, Made(int(rng.paretovariate(0.7)), 30_000)) for _ in range(800)]

    assert run() == run()


def test_memory_is_used_again_and_dropped_when_wanted_elsewhere():
    held = slots(2 * 8192)
    first = held.pin(Made("a", 8000))
    assert first is not None
    memory = first[0].slot.data_ptr()
    held.unpin(first[0])
    held.drop(first[0])
    again = held.pin(Made("b", 8001))
    assert again is not None
    assert again[0].slot.data_ptr() == memory
    held.unpin(again[0])
    held.keep_only(())
    assert len(held) == 0
    assert use(held, Made("c", 16_000))
    assert held.used == 16384
    assert len(held) == 1


def test_no_limit():
    held = slots(None)
    assert all(use(held, Made(k, 100_000)) for k in range(50))
    assert not any(use(held, Made(k, 100_000)) for k in range(50))
    assert held.fits([Made(0, 1 << 60)])
    assert torch.is_tensor(held._entries[0].slot)
