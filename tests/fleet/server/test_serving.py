"""Real HTTP on loopback, the server in a process of its own."""

import asyncio
import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from select import select
from typing import Any

import httpx
import pytest

from tests.fleet.server.fakes import IMAGE
from tests.fleet.server.serving import serve

# One process imports what a server needs; each server is a fork of that one.
SERVERS = multiprocessing.get_context("forkserver")
SERVERS.set_forkserver_preload([serve.__module__])
HEAD = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


class Running:
    """A server, its address, and the file that holds its batches back."""

    def __init__(self, process: Any, url: str, folder: Path) -> None:
        self.process = process
        self.url = url
        self.folder = folder
        self.hold = folder / "hold"

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    def until(self, name: str, value: float) -> None:
        end = time.monotonic() + 20
        while self.metric(name) != value:
            assert time.monotonic() < end, (name, self.metric(name))
            time.sleep(0.01)

    def connection(self) -> socket.socket:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return socket.create_connection((host, int(port)), timeout=20)

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def ends(self) -> int | None:
        self.process.join(20)
        return self.process.exitcode


@contextmanager
def running(folder: Path, **limits: Any) -> Iterator[Running]:
    here, there = SERVERS.Pipe()
    settings = {"queue": 64, "timeout_s": 20.0, **limits}
    process = SERVERS.Process(target=serve, args=(folder, there, settings))
    process.start()
    try:
        assert here.poll(60), (folder / "stderr").read_text()
        yield Running(process, here.recv(), folder)
    finally:
        (folder / "hold").unlink(missing_ok=True)
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("server")) as one:
        yield one


def question(name: str = "a", count: int = 1) -> dict[str, Any]:
    return {"variant": name, "inputs": [IMAGE] * count}


def raw_question() -> bytes:
    body = json.dumps(question()).encode()
    return HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body


def test_many_clients_are_answered_in_batches(server: Running):
    async def client(number: int) -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as one:
            for turn in range(10):
                name = "abcdefgh"[(number + turn) % 8]
                image = [[[float(number), 0.0], [0.0, float(turn)]]]
                found = await one.post("/v1/predict", json={"variant": name, "inputs": [image]})
                assert found.status_code == 200
                assert found.json()["variant"] == name
                assert found.json()["predictions"][0]["logits"] == [float(number + turn), 0.0]

    async def all_of_them() -> None:
        await asyncio.gather(*(client(number) for number in range(16)))

    asyncio.run(all_of_them())
    assert server.metric("fleet_batch_inputs_sum") == 160
    assert server.metric("fleet_batch_inputs_count") < 120


def test_a_client_that_goes_is_not_computed_for(server: Running):
    before = server.metric("fleet_batch_inputs_sum")
    server.hold.touch()
    # One to hold the batch, and of the two that wait one goes.
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/predict", json=question(), timeout=0.3)
    server.until("fleet_waiting_inputs", 0)
    with server.connection() as going:
        going.sendall(raw_question())
        server.until("fleet_waiting_inputs", 1)
    server.until("fleet_waiting_inputs", 0)
    server.hold.unlink()
    server.until("fleet_batch_inputs_sum", before + 1)
    assert httpx.post(f"{server.url}/v1/predict", json=question()).status_code == 200
    assert server.metric("fleet_batch_inputs_sum") == before + 2
    assert server.metric('fleet_requests_total{route="/v1/predict",status="499"}') == 2


def test_a_body_without_end_is_refused_while_it_is_read(server: Running):
    with server.connection() as sender:
        sender.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        sent = 0
        with suppress(OSError):  # the server closes
            while sent < 50_000_000:
                sender.sendall(b"1000\r\n" + b" " * 4096 + b"\r\n")
                sent += 4096
        assert sent < 40_000_000
        answer = sender.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"wanted at most 97.7 KiB" in answer or b"connection: close" in answer.lower()


def test_a_body_that_is_announced_too_large_is_refused_unread(server: Running):
    with server.connection() as sender:
        sender.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: 100001\r\n\r\n")
        assert sender.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_does_not_come_is_not_waited_for_for_ever(tmp_path: Path):
    with running(tmp_path, timeout_s=0.5) as server, server.connection() as sender:
        sender.sendall(HEAD + b"Content-Length: 50\r\n\r\n{")
        assert sender.recv(65536).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("head", [b"", b"POST /v1/pre", HEAD])
def test_a_head_that_does_not_come_is_not_waited_for_for_ever(tmp_path: Path, head: bytes):
    with running(tmp_path, timeout_s=0.5) as server, server.connection() as sender:
        begun = time.monotonic()
        for turn in range(100):
            with suppress(OSError):  # the server closes
                sender.sendall(head if turn == 0 else b"x" if head else b"")
            if select([sender], [], [], 0.05)[0]:
                break
        assert 0.4 < time.monotonic() - begun < 4
        answer = sender.recv(65536)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"the request did not arrive within 0.5 s" in answer


def test_a_client_that_does_not_read_is_not_written_to_for_ever(tmp_path: Path):
    with running(tmp_path, timeout_s=1.0) as server:
        question = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
        with server.connection() as sender, pytest.raises(ConnectionError):
            sender.sendall(question * 1_000_000)
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_connections_beyond_the_limit_are_refused(tmp_path: Path):
    with running(tmp_path, max_connections=3) as server, ExitStack() as stack:
        held = [stack.enter_context(httpx.Client(base_url=server.url)) for _ in range(3)]
        assert [one.get("/health").status_code for one in held] == [200] * 3
        refused = httpx.get(f"{server.url}/health")
        assert refused.status_code == 503
        assert refused.json() == {"error": "3 connections are open; try again"}
        assert refused.headers["Retry-After"] == "1"
        assert [one.get("/health").status_code for one in held] == [200] * 3
        held[0].close()
        assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize(
    "sent", [b"nonsense\r\n\r\n", HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"]
)
def test_what_is_no_http(server: Running, sent: bytes):
    with server.connection() as sender:
        sender.sendall(sent)
        answer = sender.recv(65536)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2]) == {
        "error": "the request is not HTTP/1.1; see what sends it"
    }
    assert "Traceback" not in (server.folder / "stderr").read_text()


def test_a_full_queue(tmp_path: Path):
    async def ask(client: httpx.AsyncClient, number: int) -> httpx.Response:
        return await client.post("/v1/predict", json=question("abcdefgh"[number % 2], 2))

    async def work(url: str, hold: Path) -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=30, limits=limits) as client:
            asked = [asyncio.create_task(ask(client, number)) for number in range(30)]
            await asyncio.sleep(1.0)
            hold.unlink()
            return await asyncio.gather(*asked)

    with running(tmp_path, queue=16) as server:
        server.hold.touch()
        answers = asyncio.run(work(server.url, server.hold))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert 30 - len(refused) <= (8 + 16) / 2
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_when_all_is_answered(tmp_path: Path, number: int):
    async def work(server: Running) -> tuple[list[httpx.Response], list[httpx.Response]]:
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
            asked = [
                asyncio.create_task(client.post("/v1/predict", json=question(name, 2)))
                for name in "abcdefgh"
            ]
            await asyncio.to_thread(server.until, "fleet_waiting_inputs", 16 - 2)
            server.signal(number)
            async with asyncio.timeout(10):
                while (await client.get("/health")).status_code == 200:
                    await asyncio.sleep(0.01)
            late = [await client.post("/v1/predict", json=question()) for _ in range(3)]
            assert server.process.is_alive()
            server.hold.unlink()
            return await asyncio.gather(*asked), late

    with running(tmp_path) as server:
        server.hold.touch()
        answers, late = asyncio.run(work(server))
        assert server.ends() == 0
        assert (tmp_path / "stderr").read_text() == ""
    assert [len(answer.json()["predictions"]) for answer in answers] == [2] * 8
    assert {answer.headers["Connection"] for answer in answers} == {"close"}
    for answer in late:
        assert answer.status_code == 503
        assert answer.headers["Connection"] == "close"
        assert answer.headers["Retry-After"]
        assert "the server is ending" in answer.json()["error"]


def test_a_second_signal_does_not_wait(tmp_path: Path):
    with running(tmp_path) as server:
        server.hold.touch()
        with server.connection() as client:
            client.sendall(raw_question())
            time.sleep(0.3)
            server.signal(signal.SIGTERM)
            time.sleep(0.3)
            assert server.process.is_alive()
            server.signal(signal.SIGTERM)
            time.sleep(0.5)
            # Only the batch itself is still waited for, by the interpreter.
            server.hold.unlink()
            assert server.ends() == 1


def test_idle_connections_do_not_hold_the_end_up(tmp_path: Path):
    with running(tmp_path) as server, httpx.Client(base_url=server.url) as client:
        assert client.get("/health").status_code == 200
        begun = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.ends() == 0
        assert time.monotonic() - begun < 5
