"""A request that is refused, as every part of the server says it."""

from __future__ import annotations

import secrets

from fleet.errors import FleetError

__all__ = ["CLIENT_GONE", "FailedError", "RefusedError"]

CLIENT_GONE = 499  # nobody reads it; the metrics count it


class RefusedError(FleetError):
    """A request without an answer: the HTTP `status`, and what its sender is told.

    `retry_after_s` says when to try again; `close` ends the connection, for what is left of a
    request that was not read to its end.
    """

    def __init__(
        self, status: int, message: str, *, retry_after_s: int | None = None, close: bool = False
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        self.close = close


class FailedError(RefusedError):
    """500: the sender is told nothing but `failure`, under which the log says why."""

    def __init__(self, failure: str | None = None) -> None:
        self.failure = failure or secrets.token_hex(4)
        super().__init__(500, f"the server failed; its log says why under {self.failure!r}")
