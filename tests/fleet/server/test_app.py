import asyncio
import hashlib
import io
import json
import logging
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from fleet.errors import FleetError
from fleet.server.app import ROUTES, create_app
from fleet.server.limits import Limits
from fleet.server.service import Service
from fleet.server.tokens import Tokens
from tests.fleet.server.fakes import IMAGE, FakeTenants, image_inputs, service, variant

TOKENS = {"a": "secret a", "b": "secret b", "gone": "secret gone"}


def sha(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def read_tokens() -> Tokens:
    return Tokens({name: sha(token) for name, token in TOKENS.items()})


def engine(**variants: Any) -> FakeTenants:
    known = variants or {"a": variant(), "b": variant(classes=3, scale=2.0)}
    return FakeTenants(variants=known)


def talk(served: Service, work: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    async def inside() -> Any:
        transport = httpx.ASGITransport(create_app(served))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            try:
                return await work(client)
            finally:
                await served.end()

    return asyncio.run(inside())


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def ask(served: Service, name: str = "a", inputs: Any = None, **options: Any) -> httpx.Response:
    body = {"variant": name, "inputs": [IMAGE] if inputs is None else inputs}
    return talk(served, lambda client: client.post("/v1/predict", json=body, **options))


def png(value: int = 255) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((5, 7, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_an_answer():
    found = ask(service(engine()), "b", [IMAGE, IMAGE])
    assert found.status_code == 200
    assert found.json() == {
        "variant": "b",
        "predictions": [{"class": 0, "logits": [12.0, 0.0, 0.0]}] * 2,
    }


def test_images():
    async def work(client: httpx.AsyncClient) -> httpx.Response:
        files = [("images", ("x.png", png())), ("images", ("y.png", png(0)))]
        return await client.post("/v1/predict", data={"variant": "a"}, files=files)

    found = talk(service(engine()), work)
    assert found.status_code == 200
    assert [one["logits"] for one in found.json()["predictions"]] == [[4.0, 0.0], [0.0, 0.0]]


def test_variants():
    async def work(client: httpx.AsyncClient) -> httpx.Response:
        return await client.get("/v1/variants")

    found = talk(service(engine()), work)
    assert found.json() == {"variants": [{"name": "a", "classes": 2}, {"name": "b", "classes": 3}]}


def test_variants_that_come_and_go_are_seen():
    served = engine()
    whole = service(served)

    async def work(client: httpx.AsyncClient) -> list[int]:
        statuses = []
        for variants in ({}, {"c": variant()}, {}):
            served.variants = variants
            await whole.refresh()
            body = {"variant": "c", "inputs": [IMAGE]}
            statuses.append((await client.post("/v1/predict", json=body)).status_code)
        return statuses

    assert talk(whole, work) == [404, 200, 404]


def test_no_answer_waits_for_a_store_that_is_being_looked_at():
    served = engine()
    store = threading.Lock()

    def read_variants() -> dict[str, Any]:
        with store:
            return served.variants

    whole = Service(served, read_variants, image_inputs(), Limits())

    async def work(client: httpx.AsyncClient) -> list[int]:
        with store:
            looking = asyncio.create_task(whole.refresh())
            async with asyncio.timeout(10):
                answers = [await client.get(path) for path in ROUTES]
        await looking
        return [answer.status_code for answer in answers]

    assert talk(whole, work) == [200, 405, 200, 200]


@pytest.mark.parametrize("error", [None, FleetError("gone"), RuntimeError("bug")])
def test_what_waits_is_fetched_ahead(error: Exception | None, caplog: pytest.LogCaptureFixture):
    served = engine()
    fetched: list[str] = []

    def prefetch(names: Sequence[str]) -> None:
        fetched.extend(names)
        if error:
            raise error

    served.prefetch = prefetch

    async def work(client: httpx.AsyncClient) -> list[int]:
        served.open.clear()
        asked = []
        for name in "ab":
            body = {"variant": name, "inputs": [IMAGE]}
            asked.append(asyncio.create_task(client.post("/v1/predict", json=body)))
            await asyncio.sleep(0.1)
        # The first is computed, the second waits for it.
        assert fetched == ["b"]
        served.open.set()
        return [answer.status_code for answer in await asyncio.gather(*asked)]

    assert talk(service(served, Limits(max_wait_s=0.0)), work) == [200, 200]
    assert ("fetching ahead failed" in caplog.text) == isinstance(error, RuntimeError)


def test_a_variant_that_is_removed_while_it_is_asked():
    served = engine()

    async def work(client: httpx.AsyncClient) -> list[httpx.Response]:
        served.open.clear()
        asked = [
            asyncio.create_task(
                client.post("/v1/predict", json={"variant": name, "inputs": [IMAGE]})
            )
            for name in "ab"
        ]
        await asyncio.sleep(0.1)
        served.variants = {"a": served.variants["a"]}
        served.open.set()
        return await asyncio.gather(*asked)

    answers = talk(service(served, Limits(max_wait_s=0.0)), work)
    assert [answer.status_code for answer in answers] == [200, 404]
    assert answers[1].json()["error"].startswith("no variant 'b'")


def test_an_unknown_variant_is_told_the_nearest():
    names = {f"digits-{i}": variant() for i in range(3)}
    found = ask(service(engine(**names)), "digit-1")
    assert found.status_code == 404
    assert "no variant 'digit-1'; did you mean 'digits-1'" in found.json()["error"]
    found = ask(service(engine(**names)), "zzz")
    assert found.json() == {"error": "no variant 'zzz'; GET /v1/variants lists them"}


def test_the_nearest_of_many_are_found_in_bounded_time():
    many = {f"tenant-{i:05d}": variant() for i in range(10_000)}
    found = ask(service(engine(**many)), "tenant-01234x")
    assert "'tenant-01234'" in found.json()["error"]
    found = ask(service(engine(**many)), "x" * 500)
    assert found.status_code == 404
    assert len(found.json()["error"]) < 200


@pytest.mark.parametrize(
    ("inputs", "status", "message"),
    [
        ([[[[0.0, 1.0]]]], 422, "inputs[0]: found numbers [1, 1, 2]; wanted numbers [1, 2, 2]"),
        ([IMAGE, [[["0", 1], [2, 3]]]], 422, "inputs[1]: holds what is no number"),
        ([], 422, "inputs: found 0; wanted 1 to 64"),
        ([IMAGE] * 65, 422, "inputs: found 65; wanted 1 to 64"),
        ("abc", 422, "inputs is no list"),
    ],
)
def test_bad_inputs(inputs: Any, status: int, message: str):
    served = engine()
    found = ask(service(served), "a", inputs)
    assert found.status_code == status
    assert message in found.json()["error"]
    assert served.batches == []


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"variant": "a", "inputs": [[[[NaN, 0], [0, 0]]]]}', 422),
        (b'{"variant": "a", "inputs": [[[[Infinity, 0], [0, 0]]]]}', 422),
        (b'{"variant": "a", "inputs": [[[[1e400, 0], [0, 0]]]]}', 422),
        (b'{"variant": "a", "inputs": [', 400),
        (b"\x00", 400),
        (b"", 400),
    ],
)
def test_bodies_that_are_no_question(body: bytes, status: int):
    async def work(client: httpx.AsyncClient) -> httpx.Response:
        headers = {"Content-Type": "application/json"}
        return await client.post("/v1/predict", content=body, headers=headers)

    found = talk(service(engine()), work)
    assert found.status_code == status
    assert set(found.json()) == {"error"}


def test_broken_images():
    async def work(client: httpx.AsyncClient) -> list[httpx.Response]:
        answers = []
        for content in (b"nonsense", png()[:45]):
            files = [("images", ("x.png", content))]
            answers.append(await client.post("/v1/predict", data={"variant": "a"}, files=files))
        return answers

    for found in talk(service(engine()), work):
        assert found.status_code == 400
        assert "images[0]: cannot be decoded" in found.json()["error"]


def test_too_large_a_body():
    limits = Limits(max_request_bytes=1000)
    found = ask(service(engine(), limits), "a", [IMAGE] * 60)
    assert found.status_code == 413
    assert "wanted at most 1000 B" in found.json()["error"]
    assert found.headers["Connection"] == "close"


def test_unknown_routes_and_methods():
    async def work(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [
            await client.get("/v1/predict"),
            await client.get("/"),
            await client.get("/health/"),
        ]

    answers = talk(service(engine()), work)
    assert [answer.status_code for answer in answers] == [405, 404, 404]
    assert answers[0].json() == {"error": "Method Not Allowed; wanted POST here"}
    assert "wanted one of /v1/variants, /v1/predict" in answers[1].json()["error"]


@pytest.mark.parametrize(
    ("headers", "name", "status"),
    [
        ({}, "a", 401),
        (bearer(""), "a", 401),
        (bearer("wrong"), "a", 401),
        (bearer(sha("secret a")), "a", 401),
        ({"Authorization": "Basic secret a"}, "a", 401),
        ({"Authorization": "secret a"}, "a", 401),
        (bearer("secret a"), "a", 200),
        ({"Authorization": "bearer  secret a"}, "a", 200),
        (bearer("secret a"), "b", 403),
        (bearer("secret b"), "b", 200),
        # No difference between another's variant and none at all.
        (bearer("secret a"), "aa", 403),
        (bearer("secret gone"), "gone", 404),
    ],
)
def test_a_token_opens_its_variant_alone(headers: dict[str, str], name: str, status: int):
    found = ask(service(engine(), read_tokens=read_tokens), name, headers=headers)
    assert found.status_code == status
    assert ("WWW-Authenticate" in found.headers) == (status == 401)
    if status != 200:
        text = found.text.replace(repr(name), "")
        assert not any(other in text for other in ("'a'", "'b'", "did you mean", "secret"))


def test_nothing_is_read_before_the_token_is_known():
    async def body() -> Any:
        raise AssertionError("read")
        yield b""

    async def work(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post("/v1/predict", content=body())

    found = talk(service(engine(), read_tokens=read_tokens), work)
    assert found.status_code == 401


def test_a_token_lists_its_variant_alone():
    async def work(client: httpx.AsyncClient) -> list[Any]:
        answers = [await client.get("/v1/variants")]
        for token in TOKENS.values():
            answers.append(await client.get("/v1/variants", headers=bearer(token)))
        return answers

    first, *others = talk(service(engine(), read_tokens=read_tokens), work)
    assert first.status_code == 401
    names = [[one["name"] for one in other.json()["variants"]] for other in others]
    assert names == [["a"], ["b"], []]


def test_a_full_queue_and_when_to_come_again():
    served = engine()

    async def work(client: httpx.AsyncClient) -> list[httpx.Response]:
        served.open.clear()
        body = {"variant": "a", "inputs": [IMAGE] * 2}
        asked = []
        for _ in range(4):
            asked.append(asyncio.create_task(client.post("/v1/predict", json=body)))
            await asyncio.sleep(0.05)
        served.open.set()
        return await asyncio.gather(*asked)

    limits = Limits(max_batch=2, queue=4, max_wait_s=0.0)
    answers = talk(service(served, limits), work)
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert int(answers[3].headers["Retry-After"]) >= 1
    assert "the queue is full: 4 of 4 inputs wait" in answers[3].json()["error"]


def test_a_failure_tells_nothing(caplog: pytest.LogCaptureFixture):
    served = engine()
    served.broken = {
        "a": RuntimeError("/srv/secret/path"),
        "b": FleetError("/srv/store/objects: truncated; 'c' needs it too"),
    }
    for name in "ab":
        found = ask(service(served), name)
        assert found.status_code == 500
        (failure,) = found.json()["error"].split("'")[1:2]
        assert found.json()["error"] == f"the server failed; its log says why under '{failure}'"
        assert failure in caplog.text
    assert "/srv/secret/path" in caplog.text
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_a_failure(value: float, caplog: pytest.LogCaptureFixture):
    found = ask(service(engine(a=variant(scale=value))))
    assert found.status_code == 500
    assert "logits are NaN or infinite" in caplog.text


def test_logits_of_every_token():
    served = engine()
    served.predict = lambda requests: [torch.eye(2) for _ in requests]
    found = ask(service(served))
    assert found.json()["predictions"] == [{"logits": [[1.0, 0.0], [0.0, 1.0]]}]


def test_many_logits_are_written_beside_the_loop():
    served = engine()
    served.predict = lambda requests: [torch.ones(100, 100) for _ in requests]
    found = ask(service(served))
    assert found.json()["predictions"] == [{"logits": [[1.0] * 100] * 100}]


def test_health():
    served = engine()
    whole = service(served, Limits(max_wait_s=0.0, timeout_s=0.2))

    async def work(client: httpx.AsyncClient) -> list[httpx.Response]:
        answers = [await client.get("/health")]
        served.open.clear()
        body = {"variant": "a", "inputs": [IMAGE]}
        answers.append(await client.post("/v1/predict", json=body))
        await asyncio.sleep(0.1)
        answers.append(await client.get("/health"))
        served.open.set()
        await whole.batcher.drain()
        answers.append(await client.get("/health"))
        answers.append(await client.post("/v1/predict", json=body))
        return answers

    answers = talk(whole, work)
    assert [answer.status_code for answer in answers] == [200, 503, 503, 503, 503]
    assert answers[0].json() == {"status": "ok"}
    assert "no answer within 0.2 s" in answers[1].text
    assert "computing for too long" in answers[2].text
    assert "the server is ending" in answers[3].text
    assert answers[4].headers["Retry-After"]
    assert answers[4].headers["Connection"] == "close"


def test_metrics_do_not_grow_with_what_clients_send():
    whole = service(engine())

    async def work(client: httpx.AsyncClient) -> str:
        for i in range(20):
            await client.get(f"/nonsense/{i}")
            await client.post("/v1/predict", json={"variant": f"v{i}", "inputs": [IMAGE]})
        await client.post("/v1/predict", json={"variant": "a", "inputs": [IMAGE]})
        return (await client.get("/metrics")).text

    text = talk(whole, work)
    assert 'fleet_requests_total{route="other",status="404"} 20.0' in text
    assert 'fleet_requests_total{route="/v1/predict",status="404"} 20.0' in text
    assert 'fleet_requests_total{route="/v1/predict",status="200"} 1.0' in text
    assert "fleet_variants 2.0" in text
    assert "nonsense" not in text
    assert "v7" not in text


def test_refreshing(caplog: pytest.LogCaptureFixture):
    served = engine()
    tokens = {"a": sha("old")}
    whole = service(served, read_tokens=lambda: Tokens(tokens))

    async def work(client: httpx.AsyncClient) -> list[int]:
        async def status(token: str) -> int:
            return (await client.get("/v1/variants", headers=bearer(token))).status_code

        statuses = [await status("old")]
        tokens["a"] = sha("new")
        await whole.refresh()
        statuses += [await status("old"), await status("new")]
        served.refresh = broken
        await whole.refresh()
        await whole.refresh()
        # A store that cannot be read keeps no token open.
        statuses.append(await status("new"))
        tokens["a"] = sha("newest")
        await whole.refresh()
        statuses += [await status("new"), await status("newest")]
        text = (await client.get("/metrics")).text
        assert "fleet_failed_refreshes_total 3.0" in text
        return statuses

    def broken() -> None:
        raise FleetError("manifest.jsonl: line 7: was altered")

    with caplog.at_level(logging.WARNING):
        assert talk(whole, work) == [200, 401, 200, 200, 401, 200]
    assert served.refreshes == 1
    # Said once, not every second.
    assert caplog.text.count("store as before: manifest.jsonl: line 7") == 1


def test_an_application_looks_at_the_store_while_it_runs():
    served = engine()
    whole = service(served)

    async def inside() -> None:
        app = create_app(whole, refresh_s=0.01)
        async with app.router.lifespan_context(app), asyncio.timeout(10):
            while served.refreshes < 3:
                await asyncio.sleep(0.01)
        assert whole.batcher.draining

    asyncio.run(inside())


def test_json_of_many_inputs_is_parsed_beside_the_loop():
    inputs = [IMAGE] * 64
    body = json.dumps({"variant": "a", "inputs": inputs}) + " " * 100_000

    async def work(client: httpx.AsyncClient) -> httpx.Response:
        headers = {"Content-Type": "application/json"}
        return await client.post("/v1/predict", content=body, headers=headers)

    found = talk(service(engine()), work)
    assert found.status_code == 200
    assert len(found.json()["predictions"]) == 64
