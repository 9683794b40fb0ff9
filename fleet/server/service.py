"""What the server does with a request, from its head to its answer."""

from __future__ import annotations

import asyncio
import bisect
import difflib
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar, runtime_checkable

from fastapi import Request

from fleet.errors import FleetError
from fleet.server.batching import Batcher, Row
from fleet.server.bodies import Asked, Bodies, Receive, parse_body
from fleet.server.limits import Limits
from fleet.server.metrics import Metrics
from fleet.server.model_inputs import ModelInputs
from fleet.server.refusals import CLIENT_GONE, FailedError, RefusedError
from fleet.server.tokens import Tokens

__all__ = ["Engine", "Service"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
# What takes so little time that the event loop does it itself.
INLINE_BYTES = 64 << 10
INLINE_NUMBERS = 4 << 10
NEIGHBOURS = 250
SHOWN_NAME = 80


@runtime_checkable
class Engine(Protocol):
    """What answers: `fleet.tenants.Tenants`."""

    def predict(self, requests: Sequence[Row], /) -> Sequence[Any]:
        """Logits of each (variant, input), in their order."""
        ...

    def prefetch(self, names: Sequence[str], /) -> Any:
        """Begin to fetch what these variants need, from another thread than the rest."""
        ...

    def refresh(self) -> Any:
        """Take up what changed in the store."""
        ...

    @property
    def statistics(self) -> Any:
        """A dataclass of numbers."""
        ...


class Service:
    """One server's work: who may ask what, and the way from a body to an answer.

    `read_variants` gives the records of the variants that the engine serves now, by name, and is
    called, as the engine is, in one thread of its own: the event loop looks at what was found last,
    and waits for no lock. `read_tokens` gives the tokens as their file has them now, or is None
    where everything is open to everyone.
    """

    def __init__(
        self,
        engine: Engine,
        read_variants: Callable[[], Mapping[str, Any]],
        inputs: ModelInputs,
        limits: Limits,
        *,
        read_tokens: Callable[[], Tokens] | None = None,
    ) -> None:
        self._engine = engine
        self._read_variants = read_variants
        self._inputs = inputs
        self._limits = limits
        self._read_tokens = read_tokens
        self._tokens = None if read_tokens is None else read_tokens()
        self._bodies = Bodies(limits)
        self._complaints: dict[str, str] = {}
        self._parsers = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="parse")
        self._announced: deque[str] = deque()
        self._announcing = False
        self.variants = read_variants()
        self.statistics = engine.statistics
        self.batcher = Batcher(self._computed, limits, seen=lambda seen: self.metrics.batch(seen))
        self.metrics = Metrics(
            variants=lambda: len(self.variants),
            waiting=lambda: self.batcher.waiting,
            statistics=lambda: self.statistics,
        )

    def health(self) -> None:
        """RefusedError (503) while the server ends, or where a batch computes for too long."""
        self.batcher.check_open()
        if self.batcher.running_s > self._limits.timeout_s:
            raise RefusedError(503, "a batch has been computing for too long")

    def listing(self, request: Request) -> list[dict[str, Any]]:
        """The variants that the request's token opens: all of them where there are no tokens."""
        owner = self._owner(request)
        variants = self.variants
        if self._tokens is None:
            names = sorted(variants)
        else:
            names = [owner] if owner is not None and owner in variants else []
        return [{"name": name, "classes": variants[name].classes} for name in names]

    async def predict(self, request: Request) -> bytes:
        """The answer to a request, in JSON; RefusedError for every other end."""
        owner = self._owner(request)
        self.batcher.check_open()
        variant, inputs = await self._read(request, owner)
        try:
            behind_another = self.batcher.running_s > 0
            queued = self.batcher.submit(variant, inputs)
            if behind_another:
                self._announce(variant)
            answers = await self._answered(queued, request.receive)
        except FailedError:
            self._check_variant(variant, owner)  # removed while the request waited
            raise
        large = sum(logits.numel() for logits in answers) > INLINE_NUMBERS
        return await self._maybe_in_thread(large, lambda: _answer(variant, answers))

    async def refresh(self) -> None:
        """Take up what changed in the tokens' file and the store; what is broken stays as it is.

        Neither waits for the other: a damaged store keeps no token open that was taken back.
        """
        if self._read_tokens is not None:
            with self._complaining("tokens"):
                self._tokens = await self._in_thread(self._read_tokens)
        with self._complaining("store"):
            await self.batcher.between(self._taken_up)

    async def end(self) -> None:
        """Finish what was taken, take nothing new, and end the threads."""
        await self.batcher.drain()
        self.batcher.close()
        self._parsers.shutdown(wait=False, cancel_futures=True)

    # --- in other threads ---

    def _computed(self, rows: Sequence[Row]) -> Sequence[Any]:
        try:
            return self._engine.predict(rows)
        finally:
            self._look()

    def _taken_up(self) -> None:
        try:
            self._engine.refresh()
        finally:
            self._look()

    def _look(self) -> None:
        self.variants, self.statistics = self._read_variants(), self._engine.statistics

    def _prefetch(self) -> None:
        self._announcing = False  # before the names are taken: those that come later ask again
        names: list[str] = []
        with suppress(IndexError):  # another thread may take some
            while True:
                names.append(self._announced.popleft())
        try:
            self._engine.prefetch(list(dict.fromkeys(names)))
        except FleetError as error:
            # The batch with that variant meets the error again, and refuses the request.
            logger.debug("not fetched ahead: %s", error)
        except Exception:
            logger.exception("fetching ahead failed")

    # --- in the event loop ---

    @contextmanager
    def _complaining(self, what: str) -> Iterator[None]:
        """Log a failure once, not at every look; what is served now is served on."""
        try:
            yield
        except Exception as error:
            self.metrics.refresh_failed()
            if self._complaints.get(what) != str(error):
                bug = not isinstance(error, ValueError | OSError)  # ValueError: ours, of bad input
                logger.warning("%s as before: %s", what, error, exc_info=bug)
            self._complaints[what] = str(error)
        else:
            self._complaints.pop(what, None)

    def _owner(self, request: Request) -> str | None:
        """The variant that the request's token opens; None where there are no tokens."""
        if self._tokens is None:
            return None
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        owner = self._tokens.opens(token.strip()) if scheme.lower() == "bearer" else None
        if owner is None:
            raise RefusedError(
                401, "wanted the header `Authorization: Bearer TOKEN`, with a token of a variant"
            )
        return owner

    def _announce(self, variant: str) -> None:
        """Have what a variant needs fetched while the batch before its own computes."""
        self._announced.append(variant)
        if not self._announcing:
            self._announcing = True
            self._parsers.submit(self._prefetch)

    async def _read(self, request: Request, owner: str | None) -> tuple[str, list[Any]]:
        headers = request.headers
        try:
            async with (
                asyncio.timeout(self._limits.timeout_s),
                self._bodies.reading(headers.get("content-length"), request.receive) as body,
            ):
                large = len(body) > INLINE_BYTES
                most = self._limits.max_batch
                kind = headers.get("content-type")
                asked: Asked = await self._maybe_in_thread(
                    large, lambda: parse_body(kind, body, most_inputs=most)
                )
                self._check_variant(asked.variant, owner)
                inputs = await self._maybe_in_thread(
                    large or bool(asked.files), lambda: self._tensors(asked)
                )
        except TimeoutError as error:
            raise RefusedError(
                408, f"the request did not arrive within {self._limits.timeout_s:g} s", close=True
            ) from error
        return asked.variant, inputs

    def _tensors(self, asked: Asked) -> list[Any]:
        if asked.files:
            return self._inputs.from_files(asked.files)
        return self._inputs.from_json(asked.values)

    def _check_variant(self, variant: str, owner: str | None) -> None:
        if self._tokens is not None and owner != variant:
            # Whether there is such a variant is nothing to a stranger.
            raise RefusedError(403, "this token opens another variant")
        if variant in self.variants:
            return
        shown = variant if len(variant) <= SHOWN_NAME else f"{variant[:SHOWN_NAME]}…"
        hint = "" if self._tokens is not None else _near(variant, self.variants)
        raise RefusedError(404, f"no variant {shown!r}{hint}")

    async def _answered(self, answers: asyncio.Future[list[Any]], receive: Receive) -> list[Any]:
        """The answers, unless the client goes before; then what is not begun is dropped."""
        going = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({answers, going}, return_when=asyncio.FIRST_COMPLETED)
            if answers.done():
                return answers.result()
            raise RefusedError(CLIENT_GONE, "the client went")
        finally:
            answers.cancel()
            going.cancel()

    async def _maybe_in_thread(self, long: bool, work: Callable[[], T]) -> T:
        return await self._in_thread(work) if long else work()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._parsers, work)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _answer(variant: str, answers: Sequence[Any]) -> bytes:
    """The answer as JSON; FleetError on logits that JSON has not."""
    answer = {"variant": variant, "predictions": [_prediction(logits) for logits in answers]}
    return json.dumps(answer, separators=(",", ":"), allow_nan=False).encode()


def _prediction(logits: Any) -> dict[str, Any]:
    """Logits, with the number of the largest where they are one row."""
    if not logits.isfinite().all():
        raise FleetError("a variant's logits are NaN or infinite: see what its weights are")
    values = logits.tolist()
    if logits.ndim == 1:
        return {"class": int(logits.argmax()), "logits": values}
    return {"logits": values}


def _near(name: str, names: Mapping[str, Any]) -> str:
    """The end of a message on an unknown name: the nearest, found in bounded time."""
    known = sorted(names)
    if len(known) > 2 * NEIGHBOURS:
        place = bisect.bisect(known, name)
        known = known[max(0, place - NEIGHBOURS) : place + NEIGHBOURS]
    close = difflib.get_close_matches(name, known, n=3)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return "; GET /v1/variants lists them"
