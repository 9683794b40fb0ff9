"""HTTP/1.1 connections: how many are open, and how long each may do nothing."""

from __future__ import annotations

import asyncio
import json
import resource

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from fleet.errors import FleetError
from fleet.server.limits import Limits

__all__ = ["bounded_protocol", "raise_open_files"]

OTHER_FILES = 256  # of the store, of libraries


def raise_open_files(limits: Limits) -> None:
    """Let this process have a file for each connection; FleetError where it may not."""
    needed = limits.max_connections + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if needed <= soft or soft == resource.RLIM_INFINITY:
        return
    if needed > hard and hard != resource.RLIM_INFINITY:
        raise FleetError(
            f"max_connections: {limits.max_connections} need {needed} open files, this process may "
            f"have {hard}; lower it, or raise that limit (ulimit -n)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def bounded_protocol(limits: Limits) -> type[H11Protocol]:
    """Connections of which `max_connections` are open; those beyond get 503 as soon as they come.

    uvicorn has no time limit on the head of a request, nor on a client that does not read: here a
    connection on which nothing is being answered, or whose answer is not taken, ends after
    `timeout_s`. (Idle ones between requests end sooner: uvicorn's timeout_keep_alive. Its
    limit_concurrency counts requests, not the connections that never send one.) What is no HTTP is
    refused in JSON, as all else.
    """

    class BoundedProtocol(H11Protocol):
        _end: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limits.max_connections:
                text = f"{limits.max_connections} connections are open; try again"
                self._refuse(503, text, (b"retry-after", b"1"))
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._stop_watching()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._watch()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._watch()

        def send_400_response(self, msg: str) -> None:
            self._refuse(400, "the request is not HTTP/1.1; see what sends it")

        def _watch(self) -> None:
            """Have an end in sight wherever the client is waited for."""
            answering = self.cycle is not None and not self.cycle.response_complete
            if answering and not self.flow.write_paused:
                self._stop_watching()
            elif self._end is None:
                self._end = self.loop.call_later(limits.timeout_s, self._too_long)

        def _stop_watching(self) -> None:
            if self._end is not None:
                self._end.cancel()
                self._end = None

        def _too_long(self) -> None:
            self._end = None
            if self.conn.our_state is h11.IDLE and not self.transport.is_closing():
                self._refuse(408, f"the request did not arrive within {limits.timeout_s:g} s")
                self._watch()
            else:
                self.transport.abort()

        def _refuse(self, status: int, text: str, *headers: tuple[bytes, bytes]) -> None:
            """Answer without the application, if nothing was answered yet, and close."""
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                body = json.dumps({"error": text}).encode()
                plain = [
                    (b"content-type", b"application/json"),
                    (b"content-length", str(len(body)).encode()),
                    (b"connection", b"close"),
                    *headers,
                ]
                events = (
                    h11.Response(status_code=status, headers=plain),
                    h11.Data(data=body),
                    h11.EndOfMessage(),
                )
                self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
            self.transport.close()

    return BoundedProtocol
