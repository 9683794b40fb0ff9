import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from fleet.errors import FleetError
from fleet.server.batching import Batcher, BatchSeen
from fleet.server.limits import Limits
from fleet.server.refusals import FailedError, RefusedError


class Predict:
    """Doubles its inputs; waits for `open`, and notes every batch and its thread."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[str, Any]]] = []
        self.threads: set[int] = set()
        self.open = threading.Event()
        self.open.set()
        self.broken: dict[str, BaseException] = {}

    def __call__(self, rows: Sequence[tuple[str, Any]]) -> list[Any]:
        self.batches.append(list(rows))
        self.threads.add(threading.get_ident())
        self.open.wait(10)
        for name, _ in rows:
            if name in self.broken:
                raise self.broken[name]
        return [2 * value for _, value in rows]

    def variants(self) -> list[list[str]]:
        return [[name for name, _ in batch] for batch in self.batches]


def run(
    work: Callable[[Batcher, Predict], Awaitable[Any]], *, seen: Any = None, **limits: Any
) -> Any:
    async def inside() -> Any:
        predict = Predict()
        settings = Limits(**{"max_wait_s": 0.0, "timeout_s": 10.0, **limits})
        batcher = Batcher(predict, settings, seen=seen or (lambda batch: None))
        try:
            return await work(batcher, predict)
        finally:
            predict.open.set()
            batcher.close()

    return asyncio.run(inside())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def refusal(future: Awaitable[Any]) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        await future
    return caught.value


def test_answers_are_in_the_order_of_each_request():
    async def work(batcher: Batcher, predict: Predict) -> None:
        futures = [batcher.submit(name, [1, 2, 3]) for name in ("b", "a", "b")]
        assert await asyncio.gather(*futures) == [[2, 4, 6]] * 3
        assert len(predict.threads) == 1
        assert threading.get_ident() not in predict.threads
        assert batcher.waiting == 0

    run(work)


def test_what_comes_while_a_batch_computes_is_one_batch():
    async def work(batcher: Batcher, predict: Predict) -> None:
        predict.open.clear()
        futures = [batcher.submit("a", [0])]
        await until(lambda: len(predict.batches) == 1)
        futures += [batcher.submit(f"v{i}", [i]) for i in range(5)]
        assert batcher.waiting == 5
        assert batcher.running_s > 0
        predict.open.set()
        await asyncio.gather(*futures)
        assert [len(batch) for batch in predict.batches] == [1, 5]

    run(work)


def test_a_batch_has_at_most_max_batch_inputs():
    async def work(batcher: Batcher, predict: Predict) -> None:
        futures = [batcher.submit("a", [1, 2, 3]) for _ in range(5)]
        assert await asyncio.gather(*futures) == [[2, 4, 6]] * 5
        assert max(len(batch) for batch in predict.batches) == 4
        assert sum(len(batch) for batch in predict.batches) == 15

    run(work, max_batch=4)


def test_one_client_at_a_time_does_not_wait_for_others():
    async def work(batcher: Batcher, predict: Predict) -> None:
        begun = time.perf_counter()
        for _ in range(5):
            await batcher.submit("a", [1])
        assert time.perf_counter() - begun < 2.0

    run(work, max_wait_s=2.0)


def test_clients_that_were_together_are_waited_for_but_not_longer_than_the_bound():
    async def work(batcher: Batcher, predict: Predict) -> None:
        predict.open.clear()
        first = [batcher.submit(f"v{i}", [i]) for i in range(4)]
        await until(lambda: len(predict.batches) == 1)
        predict.open.set()
        await asyncio.gather(*first)
        assert [len(batch) for batch in predict.batches] == [1, 3]

        # Three were in the last batch: the first of the next three waits for the others …
        second = []
        for i in range(3):
            second.append(batcher.submit(f"v{i}", [i]))
            await asyncio.sleep(0.01)
        await asyncio.gather(*second)
        assert [len(batch) for batch in predict.batches] == [1, 3, 3]

        # … and one that stays alone only as long as it may.
        begun = time.perf_counter()
        await batcher.submit("v0", [1])
        assert 0.4 < time.perf_counter() - begun < 5.0
        begun = time.perf_counter()
        await batcher.submit("v0", [1])
        assert time.perf_counter() - begun < 0.4

    run(work, max_wait_s=0.5)


def test_variants_take_turns():
    async def work(batcher: Batcher, predict: Predict) -> None:
        predict.open.clear()
        futures = [batcher.submit("hold", [0])]
        await until(lambda: len(predict.batches) == 1)
        futures += [batcher.submit("loud", [i, i]) for i in range(10)]
        futures += [batcher.submit("quiet", [1]), batcher.submit("shy", [1, 1])]
        predict.open.set()
        await asyncio.gather(*futures)
        assert predict.variants()[1] == ["loud", "loud", "quiet", "shy"]
        assert predict.variants()[2] == ["loud", "loud", "loud", "shy"]
        # A variant's own inputs are computed in their order.
        assert [value for name, value in predict.batches[1] if name == "loud"] == [0, 0]

    run(work, max_batch=4, queue=64)


def test_a_full_queue_refuses_the_variant_that_fills_it():
    async def work(batcher: Batcher, predict: Predict) -> None:
        predict.open.clear()
        held = batcher.submit("hold", [0])
        await until(lambda: len(predict.batches) == 1)
        loud = [batcher.submit("loud", [i]) for i in range(8)]
        with pytest.raises(RefusedError) as caught:
            batcher.submit("loud", [9])
        assert caught.value.status == 429
        assert caught.value.retry_after_s is not None
        assert 1 <= caught.value.retry_after_s <= 60
        # Another gets in: the newest of the loud one gives way.
        quiet = batcher.submit("quiet", [1, 2])
        assert (await refusal(loud[7])).status == 429
        assert (await refusal(loud[6])).status == 429
        assert not loud[5].done()
        assert batcher.waiting == 8
        predict.open.set()
        assert await quiet == [2, 4]
        assert await asyncio.gather(held, *loud[:6]) == [[0], [0], [2], [4], [6], [8], [10]]

    run(work, max_batch=4, queue=8)


def test_equal_shares_do_not_push_each_other_out():
    async def work(batcher: Batcher, predict: Predict) -> None:
        predict.open.clear()
        futures = [batcher.submit("hold", [0])]
        await until(lambda: len(predict.batches) == 1)
        futures += [batcher.submit(name, [1, 2]) for name in "abcd"]
        for name in "abe":
            with pytest.raises(RefusedError, match="queue is full: 8 of 8 inputs wait"):
                batcher.submit(name, [1, 2])
        predict.open.set()
        await asyncio.gather(*futures)

    run(work, max_batch=4, queue=8)


def test_what_is_cancelled_before_it_is_begun_is_not_computed():
    async def work(batcher: Batcher, predict: Predict) -> None:
        predict.open.clear()
        held = batcher.submit("hold", [0])
        await until(lambda: len(predict.batches) == 1)
        going, staying = batcher.submit("a", [1, 2]), batcher.submit("b", [3])
        going.cancel()
        await asyncio.sleep(0)
        assert batcher.waiting == 1
        predict.open.set()
        assert await asyncio.gather(held, staying) == [[0], [6]]
        assert predict.variants() == [["hold"], ["b"]]

    run(work)


def test_a_request_that_is_half_begun_and_cancelled():
    async def work(batcher: Batcher, predict: Predict) -> None:
        predict.open.clear()
        going = batcher.submit("a", [1, 2])
        other = batcher.submit("b", [3, 4])
        await until(lambda: len(predict.batches) == 1)
        later = batcher.submit("a", [5, 6])
        assert len(predict.batches[0]) == 2
        going.cancel()
        other.cancel()
        await asyncio.sleep(0)
        assert batcher.waiting == 2
        predict.open.set()
        assert await later == [10, 12]
        assert predict.batches[1:] == [[("a", 5), ("a", 6)]]

    run(work, max_batch=2, queue=8)


def test_a_deadline_ends_the_wait():
    async def work(batcher: Batcher, predict: Predict) -> None:
        predict.open.clear()
        held = batcher.submit("hold", [0])
        await until(lambda: len(predict.batches) == 1)
        late = batcher.submit("a", [1])
        assert (await refusal(late)).status == 503
        assert (await refusal(held)).status == 503
        assert batcher.waiting == 0
        predict.open.set()
        assert await batcher.submit("b", [1]) == [2]
        assert predict.variants() == [["hold"], ["b"]]

    run(work, timeout_s=0.2)


def test_an_exception_fails_its_batch_alone_and_tells_nothing(caplog: pytest.LogCaptureFixture):
    async def work(batcher: Batcher, predict: Predict) -> None:
        predict.broken["a"] = RuntimeError("the password is swordfish")
        predict.open.clear()
        futures = [batcher.submit("hold", [0])]
        await until(lambda: len(predict.batches) == 1)
        futures += [batcher.submit("a", [1]), batcher.submit("b", [1])]
        predict.open.set()
        first, *errors = await asyncio.gather(*futures, return_exceptions=True)
        assert first == [0]
        assert len(predict.batches) == 2
        for error in errors:
            assert isinstance(error, FailedError)
            assert error.status == 500
            assert "swordfish" not in str(error)
            assert error.failure in caplog.text
        assert await batcher.submit("b", [1]) == [2]

    seen: list[BatchSeen] = []
    with caplog.at_level(logging.WARNING):
        run(work, seen=seen.append)
    assert "swordfish" in caplog.text
    assert [(batch.rows, batch.variants, batch.failed) for batch in seen] == [
        (1, 1, 0),
        (2, 2, 2),
        (1, 1, 0),
    ]


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), MemoryError()])
def test_nothing_ends_the_thread(error: BaseException, caplog: pytest.LogCaptureFixture):
    async def work(batcher: Batcher, predict: Predict) -> None:
        predict.broken["a"] = error
        assert (await refusal(batcher.submit("a", [1]))).status == 500
        assert await batcher.submit("b", [1]) == [2]

    run(work)


def test_bad_input_of_one_variant_leaves_the_others_answered(caplog: pytest.LogCaptureFixture):
    async def work(batcher: Batcher, predict: Predict) -> None:
        predict.broken["c"] = FleetError("objects/ab/cd.safetensors: is truncated")
        predict.open.clear()
        futures = [batcher.submit("hold", [0])]
        await until(lambda: len(predict.batches) == 1)
        futures += [batcher.submit(name, [7]) for name in "abcdefgh"]
        predict.open.set()
        answers = await asyncio.gather(*futures, return_exceptions=True)
        assert [answer for answer in answers if isinstance(answer, list)] == [[0]] + [[14]] * 7
        (error,) = [answer for answer in answers if not isinstance(answer, list)]
        assert isinstance(error, FailedError)
        assert "safetensors" not in str(error)
        assert len(predict.batches) <= 2 + 2 * 3

    run(work)
    assert "c: objects/ab/cd.safetensors: is truncated" in caplog.text


def test_too_few_answers_are_a_failure():
    async def inside() -> None:
        batcher = Batcher(lambda rows: [1], Limits(max_wait_s=0.0))
        assert await batcher.submit("a", [1]) == [1]
        assert (await refusal(batcher.submit("a", [1, 2]))).status == 500
        batcher.close()

    asyncio.run(inside())


@pytest.mark.parametrize("count", [0, 5])
def test_requests_of_no_or_too_many_inputs(count: int):
    async def work(batcher: Batcher, predict: Predict) -> None:
        with pytest.raises(RefusedError, match=f"found {count}; wanted 1 to 4"):
            batcher.submit("a", [1] * count)

    run(work, max_batch=4)


def test_drain_answers_what_was_taken_and_refuses_the_rest():
    async def work(batcher: Batcher, predict: Predict) -> None:
        predict.open.clear()
        futures = [batcher.submit(name, [1]) for name in "abc"]
        draining = asyncio.create_task(batcher.drain())
        await asyncio.sleep(0)
        with pytest.raises(RefusedError) as caught:
            batcher.submit("d", [1])
        assert caught.value.status == 503
        assert not draining.done()
        predict.open.set()
        await draining
        assert [future.result() for future in futures] == [[2]] * 3
        assert [name for batch in predict.variants() for name in batch] == ["a", "b", "c"]
        await batcher.drain()

    # What waits for others is begun at once.
    run(work, max_wait_s=9.0)


def test_drain_does_not_wait_for_a_batch_that_hangs():
    async def work(batcher: Batcher, predict: Predict) -> None:
        predict.open.clear()
        future = batcher.submit("a", [1])
        await asyncio.wait_for(batcher.drain(), 5)
        assert (await refusal(future)).status == 503

    run(work, timeout_s=0.2)


def test_between_runs_in_the_same_thread():
    async def work(batcher: Batcher, predict: Predict) -> None:
        await batcher.submit("a", [1])
        assert {await batcher.between(threading.get_ident)} == predict.threads

    run(work)


def test_many_clients_at_once():
    statuses: set[int] = set()

    async def client(batcher: Batcher, name: str) -> int:
        refused = 0
        for value in range(20):
            try:
                answers = await batcher.submit(name, [value, value + 1])
            except RefusedError as error:
                statuses.add(error.status)
                refused += 1
                await asyncio.sleep(0.001)
            else:
                assert answers == [2 * value, 2 * value + 2]
        return refused

    async def work(batcher: Batcher, predict: Predict) -> None:
        refused = await asyncio.gather(*(client(batcher, f"v{i % 7}") for i in range(40)))
        assert sum(refused) < 40 * 20
        assert statuses <= {429}
        assert batcher.waiting == 0
        assert not batcher._jobs
        assert not batcher._turns
        assert not batcher._open

    run(work, max_batch=8, queue=32, max_wait_s=0.001)
