"""A server of a fake engine, to be run in a process of its own.

A file `hold` in its folder holds every batch back; what it says goes to the file `stderr`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from torch import Tensor

from fleet.server.app import create_app
from fleet.server.limits import Limits
from fleet.server.listening import DrainingServer, take_port
from tests.fleet.server.fakes import FakeTenants, service, variant


class HeldTenants(FakeTenants):
    """Answers when there is no file `hold`."""

    hold = Path("hold")

    def predict(self, requests: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
        while self.hold.exists():
            time.sleep(0.005)
        return super().predict(requests)


def serve(folder: Path, url: Connection, settings: dict[str, Any]) -> None:
    """Serve variants a to h within such limits until a signal, and send the address."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # where sweeps made the forkserver
    os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT), 2)
    engine = HeldTenants(variants={name: variant() for name in "abcdefgh"})
    engine.hold = folder / "hold"
    limits = Limits(max_batch=8, max_wait_s=0.002, max_request_bytes=100_000, **settings)
    whole = service(engine, limits)
    taken = take_port("127.0.0.1", 0)
    drain = whole.batcher.drain
    server = DrainingServer(create_app(whole), taken, drain, limits, ready=url.send)
    sys.exit(not server.serve_until_told())
