"""The bodies of requests: read within a limit, taken apart without trust."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import from_json
from python_multipart import FormParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from fleet.server.limits import Limits
from fleet.server.refusals import CLIENT_GONE, RefusedError

__all__ = ["Asked", "Bodies", "Receive", "parse_body"]

Receive = Callable[[], Awaitable[Any]]
LONGEST_NAME = 512


@dataclass
class Asked:
    """What a body asks for: a variant, and inputs as JSON has them or files of images."""

    variant: str
    values: list[Any] = field(default_factory=list)
    files: list[bytes] = field(default_factory=list)


class Bodies:
    """Reads bodies, each within a limit of its own and all within one of theirs together."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held = 0

    @asynccontextmanager
    async def reading(self, announced: str | None, receive: Receive) -> AsyncIterator[bytearray]:
        """A body, whose bytes count as held until the context ends.

        `announced` is what Content-Length says. Raises RefusedError: 413 as soon as the body is
        known to be too large, 429 where all bodies are, 499 when the client goes.
        """
        self._check_size(_announced_bytes(announced))
        body = bytearray()
        try:
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise RefusedError(CLIENT_GONE, "the client went")
                chunk, more = message.get("body", b""), message.get("more_body", False)
                self._check_size(len(body) + len(chunk))
                if self._held + len(chunk) > self._limits.max_held_bytes:
                    raise RefusedError(
                        429, "too many large requests at once", retry_after_s=1, close=True
                    )
                self._held += len(chunk)
                body += chunk
            yield body
        finally:
            self._held -= len(body)

    def _check_size(self, size: int) -> None:
        if size > self._limits.max_request_bytes:
            raise RefusedError(
                413,
                f"the request is too large: wanted at most {self._limits.request_size()} "
                f"({self._limits.max_request_bytes} bytes)",
                close=True,
            )


def _announced_bytes(announced: str | None) -> int:
    if announced is None or not (announced.isascii() and announced.isdigit()):
        return 0
    return int(announced[:20])  # more digits than any size has: cut, it is still too large


def parse_body(content_type: str | None, body: bytearray, *, most_inputs: int) -> Asked:
    """What a body of JSON or of multipart/form-data asks for, its inputs not looked at.

    Raises RefusedError: 415 on another type, 400 on a malformed body, 422 on what has another shape
    than `{"variant": …, "inputs": […]}`, or than a field `variant` and files `images`.
    """
    kind, options = parse_options_header(content_type)
    if kind == b"application/json":
        asked = _parse_json(body)
    elif kind == b"multipart/form-data":
        asked = _parse_form(options.get(b"boundary"), body, most_inputs)
    else:
        raise RefusedError(
            415,
            "Content-Type: wanted application/json, or multipart/form-data with images",
        )
    count = len(asked.values) + len(asked.files)
    if not 1 <= count <= most_inputs:
        raise RefusedError(422, f"inputs: found {count}; wanted 1 to {most_inputs} in a request")
    if not 1 <= len(asked.variant) <= LONGEST_NAME:
        raise RefusedError(422, f"variant: wanted a name of 1 to {LONGEST_NAME} characters")
    return asked


def _parse_json(body: bytearray) -> Asked:
    try:
        found = from_json(bytes(body))
    except ValueError as error:
        raise RefusedError(400, f"the body is not JSON: {error}") from error
    wanted = 'wanted {"variant": "name", "inputs": [input, …]}'
    if not isinstance(found, dict):
        raise RefusedError(422, f"the body is no object; {wanted}")
    strangers = [key[:40] for key in found if key not in ("variant", "inputs")]
    missing = [key for key in ("variant", "inputs") if key not in found]
    if strangers or missing:
        raise RefusedError(
            422,
            "; ".join(
                [
                    *(f"unknown key {key!r}" for key in strangers[:3]),
                    *(f"{key!r} is missing" for key in missing),
                    wanted,
                ]
            ),
        )
    if not isinstance(found["variant"], str):
        raise RefusedError(422, f"variant is no text; {wanted}")
    if not isinstance(found["inputs"], list):
        raise RefusedError(422, f"inputs is no list; {wanted}")
    return Asked(found["variant"], values=found["inputs"])


def _parse_form(boundary: bytes | None, body: bytearray, most_inputs: int) -> Asked:
    if not boundary:
        raise RefusedError(400, "Content-Type: multipart/form-data has no boundary")
    variants: list[str] = []
    files: list[bytes] = []
    ended: list[bool] = []

    def on_field(part: Any) -> None:
        if part.field_name != b"variant" or variants:
            raise RefusedError(422, "wanted one field `variant`, and files `images`")
        try:
            variants.append((part.value or b"").decode())
        except UnicodeDecodeError as error:
            raise RefusedError(400, "variant is no text in UTF-8") from error

    def on_file(part: Any) -> None:
        if part.field_name != b"images":
            raise RefusedError(422, "wanted one field `variant`, and files `images`")
        if len(files) == most_inputs:
            raise RefusedError(422, f"inputs: found more than {most_inputs} in a request")
        part.file_object.seek(0)
        files.append(part.file_object.read())
        part.close()

    try:
        parser = FormParser(
            "multipart/form-data",
            on_field,
            on_file,
            on_end=lambda: ended.append(True),
            boundary=boundary,
            # The body is in memory already, within its limit.
            config={"MAX_MEMORY_FILE_SIZE": len(body) + 1, "UPLOAD_ERROR_ON_BAD_CTE": True},
        )
        parser.write(bytes(body))
        parser.finalize()
    except FormParserError as error:
        raise RefusedError(400, f"the body is not multipart/form-data: {error}") from error
    if not ended:
        raise RefusedError(400, "the body ends before its last boundary")
    if not variants or not files:
        raise RefusedError(422, "wanted one field `variant`, and files `images`")
    return Asked(variants[0], files=files)
