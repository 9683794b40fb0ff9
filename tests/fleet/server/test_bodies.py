import asyncio
import json
from typing import Any

import pytest

from fleet.server.bodies import Asked, Bodies, parse_body
from fleet.server.limits import Limits
from fleet.server.refusals import CLIENT_GONE, RefusedError

JSON = "application/json"
FORM = "multipart/form-data; boundary=XX"


def receiving(*messages: dict[str, Any]):
    left = list(messages)

    async def receive() -> dict[str, Any]:
        return left.pop(0)

    return receive, left


def chunk(content: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": content, "more_body": more}


async def read(bodies: Bodies, announced: str | None, *messages: dict[str, Any]) -> bytes:
    receive, _ = receiving(*messages)
    async with bodies.reading(announced, receive) as body:
        return bytes(body)


def test_a_body_in_chunks():
    bodies = Bodies(Limits(max_request_bytes=6))
    for announced in (None, "6", "nonsense"):
        found = asyncio.run(
            read(bodies, announced, chunk(b"abc"), chunk(b""), chunk(b"def", False))
        )
        assert found == b"abcdef"
    assert bodies._held == 0


@pytest.mark.parametrize("announced", ["7", "9" * 30_000])
def test_a_body_that_is_announced_too_large_is_not_read(announced: str):
    async def work() -> None:
        receive, left = receiving(chunk(b"a", False))
        with pytest.raises(RefusedError, match=r"wanted at most 6 B \(6 bytes\)") as caught:
            async with Bodies(Limits(max_request_bytes=6)).reading(announced, receive):
                pass
        assert caught.value.status == 413
        assert caught.value.close
        assert len(left) == 1

    asyncio.run(work())


def test_a_body_that_becomes_too_large_is_not_read_on():
    async def work() -> None:
        receive, left = receiving(*[chunk(b"abc")] * 5)
        bodies = Bodies(Limits(max_request_bytes=6))
        with pytest.raises(RefusedError) as caught:
            async with bodies.reading(None, receive):
                pass
        assert caught.value.status == 413
        assert len(left) == 2
        assert bodies._held == 0

    asyncio.run(work())


def test_all_bodies_together_are_limited():
    async def work() -> None:
        limits = Limits(max_request_bytes=10)
        bodies = Bodies(limits)
        held = []
        for _ in range(limits.max_held_bytes // 10):
            receive, _ = receiving(chunk(b"0123456789", False))
            reading = bodies.reading(None, receive)
            await reading.__aenter__()
            held.append(reading)
        with pytest.raises(RefusedError) as caught:
            await read(bodies, None, chunk(b"1", False))
        assert caught.value.status == 429
        await held.pop().__aexit__(None, None, None)
        assert await read(bodies, None, chunk(b"1", False)) == b"1"

    asyncio.run(work())


def test_a_client_that_goes_while_its_body_is_read():
    with pytest.raises(RefusedError) as caught:
        asyncio.run(read(Bodies(Limits()), None, chunk(b"a"), {"type": "http.disconnect"}))
    assert caught.value.status == CLIENT_GONE


def parse(content: bytes | str, kind: str | None = JSON) -> Asked:
    body = content.encode() if isinstance(content, str) else content
    return parse_body(kind, bytearray(body), most_inputs=3)


def test_json():
    asked = parse(json.dumps({"variant": "ä", "inputs": [[1], {"input_ids": [2]}]}))
    assert asked == Asked("ä", values=[[1], {"input_ids": [2]}])
    assert parse('{"variant": "a", "inputs": [1]}', "Application/JSON; charset=utf-8").values == [1]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("", 400, "the body is not JSON: EOF"),
        ("{", 400, "the body is not JSON"),
        (b"\xff\xfe{}", 400, "the body is not JSON"),
        ('{"variant": "\\ud800", "inputs": [1]}', 400, "the body is not JSON"),
        ("[" * 5000 + "]" * 5000, 400, "recursion limit exceeded"),
        (f'{{"variant": "a", "inputs": [{"9" * 5000}]}}', 400, "number out of range"),
        ("[1]", 422, "the body is no object"),
        ("null", 422, "the body is no object"),
        ("{}", 422, "'variant' is missing; 'inputs' is missing"),
        ('{"variant": "a", "inputs": [1], "x": 1}', 422, "unknown key 'x'"),
        ('{"variant": 1, "inputs": [1]}', 422, "variant is no text"),
        ('{"variant": "a", "inputs": "b"}', 422, "inputs is no list"),
        ('{"variant": "a", "inputs": {}}', 422, "inputs is no list"),
        ('{"variant": "a", "inputs": []}', 422, "inputs: found 0; wanted 1 to 3"),
        ('{"variant": "a", "inputs": [1, 2, 3, 4]}', 422, "inputs: found 4; wanted 1 to 3"),
        ('{"variant": "", "inputs": [1]}', 422, "variant: wanted a name of 1 to"),
        (json.dumps({"variant": "a" * 600, "inputs": [1]}), 422, "variant: wanted a name of 1 to"),
    ],
)
def test_json_that_is_refused(body: bytes | str, status: int, message: str):
    with pytest.raises(RefusedError) as caught:
        parse(body)
    assert caught.value.status == status
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("kind", [None, "", "text/plain", "application/x-www-form-urlencoded", ";"])
def test_other_types_are_refused(kind: str | None):
    with pytest.raises(RefusedError, match="wanted application/json, or multipart") as caught:
        parse("{}", kind)
    assert caught.value.status == 415


def part(name: str, content: bytes, *, file: bool, more: str = "") -> bytes:
    filename = '; filename="x.png"' if file else ""
    head = f'--XX\r\nContent-Disposition: form-data; name="{name}"{filename}\r\n{more}\r\n'
    return head.encode() + content + b"\r\n"


VARIANT = part("variant", "ä".encode(), file=False)
END = b"--XX--\r\n"


def test_a_form():
    large = bytes(range(256)) * 8192  # more than the parser keeps in memory by itself
    body = part("images", b"one", file=True) + VARIANT + part("images", large, file=True) + END
    assert parse(body, FORM) == Asked("ä", files=[b"one", large])


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "ends before its last boundary"),
        (b"nonsense", 400, "is not multipart/form-data"),
        (VARIANT + part("images", b"one", file=True), 400, "ends before its last boundary"),
        ((VARIANT + part("images", b"one", file=True))[:-8], 400, "ends before its last boundary"),
        (b"--XX\r\nContent-Type: text/plain\r\n\r\na\r\n" + END, 400, "is not multipart"),
        (part("images", b"one", file=True) + END, 422, "wanted one field `variant`"),
        (VARIANT + END, 422, "and files `images`"),
        (VARIANT * 2 + part("images", b"one", file=True) + END, 422, "one field `variant`"),
        (VARIANT + part("other", b"one", file=True) + END, 422, "files `images`"),
        (VARIANT + part("other", b"one", file=False) + END, 422, "files `images`"),
        (VARIANT + part("images", b"1", file=True) * 4 + END, 422, "found more than 3"),
        (part("variant", b"\xff", file=False) + END, 400, "variant is no text in UTF-8"),
        (
            VARIANT
            + part("images", b"!", file=True, more="Content-Transfer-Encoding: zip\r\n")
            + END,
            400,
            "Unknown Content-Transfer-Encoding",
        ),
        (
            VARIANT
            + part("images", b"!", file=True, more="Content-Transfer-Encoding: base64\r\n")
            + END,
            400,
            "is not multipart",
        ),
    ],
)
def test_forms_that_are_refused(body: bytes, status: int, message: str):
    with pytest.raises(RefusedError) as caught:
        parse(body, FORM)
    assert (caught.value.status, str(caught.value)) == (status, str(caught.value))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "kind", ["multipart/form-data", f"multipart/form-data; boundary={'X' * 999}"]
)
def test_boundaries_that_are_refused(kind: str):
    with pytest.raises(RefusedError) as caught:
        parse(b"--XX--", kind)
    assert caught.value.status == 400
