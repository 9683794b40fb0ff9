"""Which tenants' parts are in memory: fetched ahead by a thread, held while they are computed with.

On the CPU the parts lie in host memory and on the disk; with a CUDA device in its memory, in pinned
host memory, and on the disk.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Container, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fleet.errors import FleetError
from fleet.serving.slots import Entry, Slots, Tensors, Unit, host_memory, pinned_memory
from inputs.budget import format_bytes


@dataclass
class Counts:
    """What was fetched: units, bytes from the disk, bytes to a device, and seconds."""

    hits: int = 0
    misses: int = 0
    prefetched: int = 0
    bytes_read: int = 0
    bytes_moved: int = 0
    seconds_reading: float = 0.0
    seconds_waiting: float = 0.0


@dataclass
class Ticket:
    """The units of one batch, pinned as far as there was room."""

    units: Sequence[Unit]
    entries: dict[Hashable, Entry] = field(default_factory=dict)


class Residency:
    """Slots for units within `budget` bytes of `device`'s memory, and a thread that fills them.

    With a CUDA device, `host_budget` bytes of pinned host memory keep what was read. Any thread may
    call; who leaves depends on the calls alone, not on when something was read. The thread reads in
    the order of the calls, so that a slot given to another unit meanwhile holds that one's values
    in the end.
    """

    def __init__(
        self, budget: int | None, device: torch.device, host_budget: int | None = None
    ) -> None:
        self.counts = Counts()
        self._device = device
        self._lock = threading.Lock()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._expected: OrderedDict[Hashable, Entry] = OrderedDict()
        self._stream: torch.cuda.Stream | None = None
        self._host: Slots | None = None
        if device.type == "cpu":
            self.slots = Slots(budget, host_memory)
        else:
            self._stream = torch.cuda.Stream(device)
            self._host = Slots(host_budget, pinned_memory)
            self.slots = Slots(budget, self._device_memory)

    def close(self) -> None:
        """End the thread."""
        self._reader.shutdown(cancel_futures=True)

    def check_fits(self, units: Iterable[Unit], whose: str) -> None:
        """FleetError unless these units have room together."""
        units = list(units)
        for slots, what in ((self.slots, "memory_budget"), (self._host, "host_budget")):
            if slots is not None and slots.budget is not None and not slots.fits(units):
                total = sum(unit.nbytes for unit in units)
                raise FleetError(
                    f"{whose}: its parts are {format_bytes(total)}, {what} is "
                    f"{format_bytes(slots.budget)}; raise it"
                )

    def fits(self, units: Iterable[Unit]) -> bool:
        """Whether these have room at a time."""
        units = list(units)
        return self.slots.fits(units) and (self._host is None or self._host.fits(units))

    def expect(self, units: Iterable[Unit]) -> bool:
        """Have units read that a later ticket will ask for; whether there was room for all.

        They stay until one does, or until a ticket needs their room: the first expected goes first.
        """
        with self._lock:
            for unit in units:
                if unit.key in self._expected:
                    continue
                found = self._pin(unit, uses=0)
                if found is None:
                    return False
                self._expected[unit.key], fresh = found
                self.counts.prefetched += fresh
        return True

    def fetch(self, ticket: Ticket) -> bool:
        """Have the ticket's units read, as far as there is room now; whether there was for all."""
        with self._lock:
            return self._fetch(ticket)

    def hold(self, ticket: Ticket, later: Sequence[Ticket] = ()) -> Mapping[Hashable, Tensors]:
        """The tensors of the ticket's units, read by now; they stay until `release`.

        If there is no room for all, what is expected gives up its room, then the `later` tickets,
        the last one first. Raises FleetError for what cannot be read.
        """
        waiting, scattered = list(later), True
        with self._lock:
            while not self._fetch(ticket):
                if self._expected:
                    self.slots.unpin(self._expected.popitem(last=False)[1])
                elif waiting:
                    self._release(waiting.pop())
                elif scattered:
                    # Between what is there already no hole is large enough.
                    scattered = False
                    self._release(ticket)
                    self.slots.keep_only(())
                else:
                    raise FleetError(
                        "the parts of one batch do not fit into memory_budget beside each other; "
                        "raise it"
                    )
        started = time.perf_counter()
        try:
            return {key: entry.fetched.result() for key, entry in ticket.entries.items()}
        finally:
            self.counts.seconds_waiting += time.perf_counter() - started

    def release(self, ticket: Ticket) -> None:
        """The ticket's units may leave."""
        with self._lock:
            self._release(ticket)

    def keep_only(self, keys: Container[Hashable]) -> None:
        """Drop what will not be asked for again."""
        with self._lock:
            for key in [key for key in self._expected if key not in keys]:
                self.slots.unpin(self._expected.pop(key))
            for slots in (self.slots, self._host):
                if slots is not None:
                    slots.keep_only(keys)

    # --- under the lock ---

    def _fetch(self, ticket: Ticket) -> bool:
        for unit in ticket.units:
            if unit.key in ticket.entries:
                continue
            found = self._pin(unit)
            if found is None:
                return False
            ticket.entries[unit.key], fresh = found
            self.counts.hits += not fresh
            self.counts.misses += fresh
            if unit.key in self._expected:
                self.slots.unpin(self._expected.pop(unit.key))
        return True

    def _release(self, ticket: Ticket) -> None:
        for entry in ticket.entries.values():
            self.slots.unpin(entry)
        ticket.entries.clear()

    def _pin(self, unit: Unit, uses: int = 1) -> tuple[Entry, bool] | None:
        """The unit's slot and whether it is new there, to be filled now; None without room."""
        found = self.slots.pin(unit, uses)
        if found is None:
            return None
        host, (entry, fresh) = self._host, found
        if fresh and host is None:
            entry.fetched = self._reader.submit(self._read, unit, entry.slot)
        elif fresh and host is not None:
            pinned = host.pin(unit)
            if pinned is None:
                self.slots.drop(entry)
                return None
            source, unread = pinned
            if unread:
                source.fetched = self._reader.submit(self._read, unit, source.slot)
            entry.fetched = self._reader.submit(self._moved, source.fetched, source, entry.slot)
            host.unpin(source)
        return found

    # --- in the thread that reads ---

    def _read(self, unit: Unit, slot: Tensor) -> Tensors:
        started = time.perf_counter()
        try:
            tensors, nbytes = unit.load(slot)
            self.counts.bytes_read += nbytes
            return tensors
        finally:
            self.counts.seconds_reading += time.perf_counter() - started

    def _moved(self, read: Future[Tensors], source: Entry, slot: Tensor) -> Tensors:
        """The tensors of a slot of the host, in one of the device."""
        tensors = read.result()
        started = time.perf_counter()
        assert self._stream is not None
        nbytes = source.unit.nbytes
        with torch.cuda.stream(self._stream):
            slot[:nbytes].copy_(source.slot[:nbytes], non_blocking=True)
        self._stream.synchronize()
        self.counts.bytes_moved += nbytes
        self.counts.seconds_reading += time.perf_counter() - started
        begin = source.slot.data_ptr()
        return {
            name: slot[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for name, tensor in tensors.items()
            for start in [tensor.data_ptr() - begin if tensor.numel() else 0]
        }

    def _device_memory(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)
