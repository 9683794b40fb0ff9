"""How much the server takes at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fleet.errors import FleetError
from inputs.budget import format_bytes

__all__ = ["Limits"]

MIB = 1 << 20
BODIES_AT_ONCE = 16


@dataclass(frozen=True)
class Limits:
    """How much the server takes at once; FleetError on limits that cannot hold together.

    `max_batch` inputs are computed together; the first of them waits at most `max_wait_s` for
    others. `queue` inputs may wait, `max_request_bytes` is the largest body, `max_pixels` the most
    that the images of one request may have together, `max_connections` the most that are open.
    `timeout_s` is the longest that a request's head may take to arrive, then its body, its answer,
    and the client to take it.
    """

    max_batch: int = 64
    max_wait_s: float = 0.005
    queue: int = 256
    max_request_bytes: int = 8 * MIB
    max_pixels: int = 32 * MIB
    max_connections: int = 512
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for name, unit in (
            ("max_batch", "inputs"),
            ("queue", "inputs"),
            ("max_request_bytes", "bytes"),
            ("max_pixels", "pixels"),
            ("max_connections", "connections"),
        ):
            if getattr(self, name) < 1:
                raise FleetError(f"{name}: found {getattr(self, name)} {unit}; wanted at least 1")
        if not (math.isfinite(self.max_wait_s) and self.max_wait_s >= 0):
            raise FleetError(f"max_wait: found {self.max_wait_s} s; wanted 0 or more")
        if not (math.isfinite(self.timeout_s) and self.timeout_s > self.max_wait_s):
            raise FleetError(
                f"timeout: found {self.timeout_s} s; wanted more than max_wait, {self.max_wait_s} s"
            )
        if self.queue < self.max_batch:
            raise FleetError(
                f"queue: found {self.queue} inputs; wanted at least max_batch, {self.max_batch}, "
                "or no batch is ever full"
            )

    @property
    def max_held_bytes(self) -> int:
        """The most bytes of bodies that are being read and parsed at once."""
        return BODIES_AT_ONCE * self.max_request_bytes

    def request_size(self) -> str:
        """The largest body, as people write it."""
        return format_bytes(self.max_request_bytes)
