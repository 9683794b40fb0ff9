"""A port of one's own, and a server that ends when it is told to, not before it is done."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Awaitable, Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from fleet.errors import FleetError
from fleet.server.connections import bounded_protocol, raise_open_files
from fleet.server.limits import Limits

__all__ = ["DrainingServer", "take_port"]

BACKLOG = 2048
LAST_REQUESTS_S = 0.2
LAST_BYTES_S = 10


def take_port(host: str, port: int) -> socket.socket:
    """A socket bound to `host` and `port`, not yet listening; FleetError where it cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        taken = socket.socket(family, kind, protocol)
    except OSError as error:
        raise FleetError(
            f"--host {host}: {error.strerror}; wanted an address of this machine"
        ) from error
    try:
        # So that a server can follow another at once; two that listen are still refused.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except OSError as error:
        taken.close()
        raise _no_port(host, port, error) from error
    return taken


def _no_port(host: str, port: int, error: OSError) -> FleetError:
    remedy = "choose another with --port"
    if error.errno == errno.EADDRINUSE:
        return FleetError(f"port {port} of {host} is taken, perhaps by another server; {remedy}")
    if error.errno == errno.EADDRNOTAVAIL:
        return FleetError(f"--host {host}: is no address of this machine; use 127.0.0.1 or 0.0.0.0")
    return FleetError(f"port {port} of {host} cannot be taken: {error.strerror}; {remedy}")


class DrainingServer(uvicorn.Server):
    """Serves until SIGTERM or SIGINT, then drains; a second signal ends it without that.

    Connections are bounded as `limits` say; FleetError where the system allows fewer. While `drain`
    runs they are still accepted, so that the application itself says that it takes nothing new.
    """

    def __init__(
        self,
        app: FastAPI,
        taken: socket.socket,
        drain: Callable[[], Awaitable[None]],
        limits: Limits,
        *,
        ready: Callable[[str], None] = lambda url: None,
        access_log: bool = False,
    ) -> None:
        raise_open_files(limits)
        super().__init__(
            uvicorn.Config(
                app,
                http=bounded_protocol(limits),
                log_config=None,
                access_log=access_log,
                server_header=False,
                proxy_headers=False,
                ws="none",
                lifespan="on",
                timeout_graceful_shutdown=LAST_BYTES_S,
            )
        )
        self._taken = taken
        self._drain = drain
        self._ready = ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    def serve_until_told(self) -> bool:
        """Serve; whether all that was taken was answered in the end.

        Raises FleetError where another listens on the port by now.
        """
        host, port = self._taken.getsockname()[:2]
        try:
            self._taken.listen(BACKLOG)
        except OSError as error:
            raise _no_port(host, port, error) from error
        self.run([self._taken])
        return not self.force_exit

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer, and say so."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        host, port = self._taken.getsockname()[:2]
        self._ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain, or end at once if that was asked for before."""
        # Not passed on: uvicorn would raise the signal again at the end, and so not end with 0.
        self.tell_to_end()

    def tell_to_end(self) -> None:
        """What a signal does; from any thread."""
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain_and_exit())
        else:
            self.should_exit = self.force_exit = True

    async def _drain_and_exit(self) -> None:
        try:
            await self._drain()
            for server in self.servers:
                server.close()
            # Who was let in a moment ago is told so, too, before connections are closed.
            await asyncio.sleep(LAST_REQUESTS_S)
        finally:
            self.should_exit = True
