"""The client meets its guarantees for many ids, deadlines and faults, on real sockets against the emulator."""

import asyncio
import gc
import itertools
import time
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest

from kaizen_async import (
    AttemptTimeoutError,
    ClientClosedError,
    DeadlineExceededError,
    DecodeError,
    InstructorExecution,
    KaizenClient,
    KaizenError,
    Outcome,
    RateLimitError,
    RetryPolicy,
)
from kaizen_async._bulk import READ_AHEAD
from kaizen_async.testing import Fault, KaizenEmulator, Life

SOON = RetryPolicy(initial_backoff=0.01, max_backoff=0.1)


def assert_idle(client: KaizenClient) -> None:
    """Fail if a request, an occupied slot or a task is left."""
    engine = client._binding.engine
    assert engine is not None
    assert client.stats().in_flight == 0
    assert engine._free_slots == engine.concurrency
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def seconds_of(awaitable: Any) -> tuple[KaizenError, float]:
    """Return the error that an awaitable raises and the seconds until then."""
    started = time.perf_counter()
    with pytest.raises(KaizenError) as caught:
        await awaitable
    return caught.value, time.perf_counter() - started


@pytest.mark.no_cover
@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_ten_thousand_ids_with_faults_all_succeed() -> None:
    """With 5 % of 503 responses and 1 % of resets, 10,000 ids get their records in order."""
    asyncio.get_running_loop().set_debug(False)
    ids = [f"exec_{n}" for n in range(10_000)]
    with KaizenEmulator(seed=5, default_life=Life.ended()) as emulator:
        emulator.faults.chance(Fault.status(503), 0.05)
        emulator.faults.chance(Fault.reset(), 0.01)
        async with KaizenClient(base_url=emulator.base_url, retry=SOON) as client:
            outcomes = await client.instructor_executions.get_many(ids)
            stats = client.stats()
            assert_idle(client)
        await emulator.until_quiet()
    assert [outcome.id for outcome in outcomes] == ids
    assert [outcome.error for outcome in outcomes if not outcome.ok] == []
    assert [outcome.unwrap().id for outcome in outcomes] == ids
    assert 400 < emulator.answers[503] < 600
    assert emulator.answers[200] == 10_000
    assert emulator.request_count == stats.attempts == 10_000 + stats.retries
    assert sum(outcome.attempts for outcome in outcomes) == stats.attempts


async def test_one_bad_record_fails_one_id(emulator: KaizenEmulator) -> None:
    """Of a thousand ids, 999 succeed, and the error of the other one names the missing field."""
    ids = [f"exec_{n}" for n in range(1000)]
    emulator.add_many(ids)
    emulator.add("exec_500", without=["endTime"])
    async with KaizenClient(base_url=emulator.base_url) as client:
        outcomes = await client.instructor_executions.get_many(ids)
    (bad,) = (outcome for outcome in outcomes if not outcome.ok)
    assert sum(outcome.ok for outcome in outcomes) == 999
    assert bad.id == "exec_500"
    assert isinstance(bad.error, DecodeError)
    assert bad.error.path == "$.endTime"
    assert bad.error.execution_id == "exec_500"
    assert b'"id"' in bad.error.body
    assert bad.attempts == emulator.requests_for("exec_500") == 1


async def test_an_endless_stream_is_as_slow_as_its_consumer() -> None:
    """The server sees only requests for results consumed, ids in flight and the read-ahead."""
    with KaizenEmulator(default_life=Life.ended()) as emulator:
        async with KaizenClient(base_url=emulator.base_url, concurrency=5) as client:
            async with client.instructor_executions.stream(f"e{n}" for n in itertools.count()) as outcomes:
                for consumed in range(1, 21):
                    assert (await anext(outcomes)).ok
                    await asyncio.sleep(0.01)
                    assert emulator.request_count <= consumed + 5 + READ_AHEAD
                assert emulator.request_count >= 20
            assert_idle(client)
        await emulator.until_quiet()


async def test_a_silent_server_ends_with_the_deadline(emulator: KaizenEmulator) -> None:
    """A deadline of 0.5 s ends a lookup within 0.6 s, at least once in five tries on a busy machine."""
    emulator.faults.always(Fault.hang())
    took = []
    async with KaizenClient(base_url=emulator.base_url) as client:
        while not took or (min(took) >= 0.6 and len(took) < 5):
            error, seconds = await seconds_of(client.instructor_executions.get("a", deadline=0.5))
            took.append(seconds)
            assert type(error) is DeadlineExceededError
            assert_idle(client)
    assert 0.5 <= min(took) < 0.6
    await emulator.until_quiet()


async def test_a_pause_beyond_the_deadline_fails_at_once(emulator: KaizenEmulator) -> None:
    """A 429 with `Retry-After: 3600` and a deadline of 5 s raise a RateLimitError at once, with the 3600 s."""
    emulator.faults.always(Fault.status(429, headers={"Retry-After": "3600"}))
    async with KaizenClient(base_url=emulator.base_url) as client:
        error, seconds = await seconds_of(client.instructor_executions.get("a", deadline=5))
        assert isinstance(error, RateLimitError)
        assert error.retry_after == 3600
        assert seconds < 2
    assert emulator.request_count == 1


@pytest.mark.parametrize(
    "fault", [Fault.hang(), Fault.stalled_body(), Fault.trickle(0.05), Fault.latency(5)], ids=lambda fault: fault.name
)
async def test_an_attempt_is_bounded_whatever_it_hangs_on(emulator: KaizenEmulator, fault: Fault) -> None:
    """The attempt timeout ends every kind of slow response, and the next attempt uses another connection."""
    emulator.add("a")
    emulator.faults.next(fault, times=1)
    retry = RetryPolicy(initial_backoff=0)
    async with KaizenClient(base_url=emulator.base_url, attempt_timeout=0.2, retry=retry) as client:
        assert (await client.instructor_executions.get("a")).id == "a"
        assert emulator.requests_for("a") == 2
        emulator.faults.next(fault, times=1)
        error, _ = await seconds_of(client.instructor_executions.get("a", retry=RetryPolicy(max_attempts=1)))
        assert type(error) is AttemptTimeoutError
        assert_idle(client)
    await emulator.until_quiet()


async def test_a_burst_beyond_a_rate_limit_succeeds() -> None:
    """Under a rate limit the client slows down, and every lookup succeeds."""
    with KaizenEmulator(default_life=Life.ended()) as emulator:
        emulator.rate_limit(200, burst=20, retry_after=None)
        async with KaizenClient(base_url=emulator.base_url, retry=RetryPolicy(max_attempts=8)) as client:
            outcomes = await client.instructor_executions.get_many([f"e{n}" for n in range(100)])
            assert [outcome.error for outcome in outcomes if not outcome.ok] == []
            assert client.stats().throttled == emulator.answers[429] > 0


STAGES = {
    "before the answer": Fault.hang(),
    "in the midst of the body": Fault.stalled_body(),
    "in back-off": Fault.status(500),
    "at the gate": Fault.status(429, headers={"Retry-After": "20"}),
}


@pytest.mark.parametrize("fault", STAGES.values(), ids=STAGES)
@pytest.mark.parametrize("verb", ["get", "get_many", "stream"])
async def test_a_cancelled_caller_leaves_no_request_on_the_server(
    emulator: KaizenEmulator, verb: str, fault: Fault
) -> None:
    """A call that is cancelled at any stage leaves no task, occupied slot or used connection."""
    ids = [f"e{n}" for n in range(4)]
    emulator.faults.always(fault)
    retry = RetryPolicy(initial_backoff=20, max_backoff=20)
    client = KaizenClient(base_url=emulator.base_url, concurrency=2, retry=retry)

    async def call() -> None:
        match verb:
            case "get":
                await client.instructor_executions.get("e0")
            case "get_many":
                await client.instructor_executions.get_many(ids)
            case _:
                async with client.instructor_executions.stream(ids) as outcomes:
                    await anext(outcomes)

    task = asyncio.create_task(call())
    while emulator.request_count < (1 if verb == "get" else 2):  # noqa: ASYNC110 - the emulator has no event to await
        await asyncio.sleep(0.002)
    await asyncio.sleep(0.03)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert_idle(client)
    emulator.faults.clear()
    await client.aclose()
    await emulator.until_quiet()


async def test_cancelling_in_a_random_moment_leaves_nothing(emulator: KaizenEmulator) -> None:
    """Two hundred pairs of calls, cancelled at different moments, leave nothing behind, and the client still works."""
    emulator.add("a")
    async with KaizenClient(base_url=emulator.base_url, concurrency=3) as client:
        for n in range(200):
            tasks = [asyncio.create_task(client.instructor_executions.get("a")) for _ in range(2)]
            await asyncio.sleep(n / 50_000)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            assert_idle(client)
        assert (await client.instructor_executions.get("a")).id == "a"
    await emulator.until_quiet()


async def test_retries_reuse_the_connection(emulator: KaizenEmulator) -> None:
    """A retry reuses the connection, because the client has read the body of the error to its end."""
    emulator.add("a")
    emulator.faults.next(Fault.status(503), times=3)
    async with KaizenClient(base_url=emulator.base_url, retry=SOON) as client:
        await client.instructor_executions.get("a")
        assert emulator.request_count == 4
        assert emulator.open_connections == 1


async def test_a_server_that_comes_back_is_found_again(emulator: KaizenEmulator) -> None:
    """Lookups succeed after a server restart, although all pooled connections are dead."""
    emulator.add_many([f"e{n}" for n in range(20)])
    ids = [f"e{n}" for n in range(20)]
    async with KaizenClient(base_url=emulator.base_url, retry=SOON) as client:
        assert all(outcome.ok for outcome in await client.instructor_executions.get_many(ids))
        await emulator.stop()
        await emulator.start()
        assert all(outcome.ok for outcome in await client.instructor_executions.get_many(ids))


async def test_a_dead_server_is_not_stormed() -> None:
    """A thousand lookups of a dead server fail with their connection errors after at most 300 requests."""
    asyncio.get_running_loop().set_debug(False)
    async with KaizenEmulator(default_life=Life.ended()) as emulator:
        url = emulator.base_url
        emulator.faults.always(Fault.reset())
        async with KaizenClient(base_url=url, deadline=2) as client:
            outcomes = await client.instructor_executions.get_many([f"e{n}" for n in range(1000)])
        assert emulator.request_count <= 300
    assert {type(outcome.error).__name__ for outcome in outcomes} == {"TransportError"}


async def test_closing_under_a_stream_ends_it(emulator: KaizenEmulator) -> None:
    """Closing the client gives the stream's ids their outcomes and then raises a ClientClosedError."""
    emulator.faults.always(Fault.hang())
    client = KaizenClient(base_url=emulator.base_url, concurrency=3)
    seen: list[Outcome[InstructorExecution]] = []

    async def consume() -> None:
        async with client.instructor_executions.stream(f"e{n}" for n in itertools.count()) as outcomes:
            async for outcome in outcomes:
                seen.append(outcome)

    task = asyncio.create_task(consume())
    while emulator.request_count < 3:  # noqa: ASYNC110 - the emulator has no event to await
        await asyncio.sleep(0.002)
    await client.aclose()
    with pytest.raises(ClientClosedError):
        await task
    assert {type(outcome.error) for outcome in seen} == {ClientClosedError}
    await emulator.until_quiet()


async def test_ids_may_come_from_a_queue_that_outcomes_feed(emulator: KaizenEmulator) -> None:
    """A stream works if each outcome adds the next id to its source."""
    emulator.add_many([f"e{n}" for n in range(50)])
    queue: asyncio.Queue[str | None] = asyncio.Queue()
    queue.put_nowait("e0")

    async def from_queue() -> AsyncIterator[str]:
        while (execution_id := await queue.get()) is not None:
            yield execution_id

    seen = []
    async with KaizenClient(base_url=emulator.base_url) as client:
        async with client.instructor_executions.stream(from_queue()) as outcomes:
            async for outcome in outcomes:
                seen.append(outcome.id)
                number = len(seen)
                queue.put_nowait(f"e{number}" if number < 50 else None)
    assert seen == [f"e{n}" for n in range(50)]


async def test_the_memory_of_a_client_is_freed_with_it(emulator: KaizenEmulator) -> None:
    """No global object refers to a closed client."""
    emulator.add("a")
    client = KaizenClient(base_url=emulator.base_url)
    await client.instructor_executions.get("a")
    await client.aclose()
    trace = weakref.ref(client)
    del client
    for _ in range(3):
        await asyncio.sleep(0)
    gc.collect()
    assert trace() is None
