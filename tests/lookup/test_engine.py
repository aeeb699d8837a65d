"""Slots, bounded waits and closing, which all lookups of a client share, in virtual time."""

import asyncio
import math
from collections.abc import Callable

import pytest
from scripted_transport import NEVER, Reply, ScriptedTransport, failing, health_of, record, status, throttle
from virtual_time import virtual_time
from yarl import URL

from kaizen_async import (
    AttemptTimeoutError,
    ClientClosedError,
    DeadlineExceededError,
    KaizenClient,
    RateLimitError,
    RetryPolicy,
    StatusError,
)
from kaizen_async._transport.transport import Answer

ONCE = RetryPolicy(max_attempts=1)


def now() -> float:
    """Return virtual seconds."""
    return round(asyncio.get_running_loop().time(), 6)


def assert_idle(client: KaizenClient, transport: ScriptedTransport) -> None:
    """Fail if an idle client holds a slot, a queue entry or a request."""
    engine = client._binding.engine
    assert engine is not None
    assert not engine._sending
    assert not engine._waiting
    assert engine._free_slots == engine.concurrency
    assert not engine._queues
    assert all(not health.in_flight for health in client._binding.healths.values())
    assert not transport.open


@virtual_time
async def test_no_more_requests_in_flight_than_concurrency() -> None:
    """A hundred lookups share three slots in the order of their arrival."""
    transport = ScriptedTransport()
    async with transport.client(concurrency=3) as client:
        ids = [f"e{n}" for n in range(100)]
        await asyncio.gather(*(client.instructor_executions.get(i) for i in ids))
        assert transport.most_open == 3
        assert transport.ids == ids
        assert now() == pytest.approx(34 * 0.1)
        assert_idle(client, transport)


@virtual_time
async def test_a_client_does_not_begin_with_all_its_requests_at_once() -> None:
    """A client starts with fifty requests. Successes, and also a silent server, open more slots within a second."""
    transport = ScriptedTransport(latency=0.02)
    async with transport.client(concurrency=500) as client:
        await client.instructor_executions.get_many([f"e{n}" for n in range(1500)])
    sent = [sum(moment <= until for moment in transport.times) for until in (0.019, 0.039, 0.059)]
    assert sent == [50, 125, 275]
    assert transport.most_open == 500
    silent = ScriptedTransport(latency=2)
    async with silent.client(concurrency=500) as client:
        began = now()
        await client.instructor_executions.get_many([f"e{n}" for n in range(500)])
    assert [sum(moment - began <= until for moment in silent.times) for until in (0.24, 0.26, 0.76)] == [50, 100, 400]


@virtual_time
async def test_an_attempt_that_takes_too_long_is_cut_off_and_retried() -> None:
    """`attempt_timeout` bounds one request, and the lookup retries after it."""

    def play(execution_id: str, number: int) -> Reply:
        return (NEVER, record(execution_id)) if number == 1 else record(execution_id)

    transport = ScriptedTransport(play)
    async with transport.client(attempt_timeout=2, retry=RetryPolicy(initial_backoff=0)) as client:
        await client.instructor_executions.get("a")
        assert transport.times == [0, 2]
        assert_idle(client, transport)


@virtual_time
async def test_an_attempt_that_times_out_raises_its_own_error() -> None:
    """An attempt that takes too long raises an AttemptTimeoutError, not a DeadlineExceededError."""
    transport = ScriptedTransport(latency=NEVER)
    async with transport.client(attempt_timeout=2, retry=ONCE) as client:
        error = await failing(client)
        assert type(error) is AttemptTimeoutError
        assert str(error) == "a: no complete response within 2 s (after 1 attempt)"
        assert now() == 2


@virtual_time
async def test_the_deadline_ends_an_attempt() -> None:
    """A deadline that passes before the attempt timeout raises a DeadlineExceededError."""
    transport = ScriptedTransport(latency=NEVER)
    async with transport.client(attempt_timeout=30, deadline=0.5) as client:
        error = await failing(client)
        assert type(error) is DeadlineExceededError
        assert str(error) == "a: its deadline passed during an attempt (after 1 attempt)"
        assert error.__cause__ is None
        assert now() == 0.5
        assert_idle(client, transport)


@virtual_time
async def test_the_deadline_counts_the_wait_for_a_slot() -> None:
    """The deadline includes the wait for a slot, and its error says that nothing was sent."""
    transport = ScriptedTransport(latency=NEVER)
    async with transport.client(concurrency=1, attempt_timeout=10, deadline=None, retry=ONCE) as client:
        first = asyncio.create_task(failing(client, "first"))
        await asyncio.sleep(0)
        error = await failing(client, "second", deadline=3)
        assert type(error) is DeadlineExceededError
        assert str(error) == "second: its deadline passed while it waited for its turn to send"
        assert error.attempts == 0
        assert now() == 3
        assert isinstance(await first, AttemptTimeoutError)
        assert transport.ids == ["first"]
        assert_idle(client, transport)


@virtual_time
async def test_without_a_deadline_a_lookup_waits_for_its_slot() -> None:
    """A lookup without a deadline waits for its slot without limit."""
    transport = ScriptedTransport(lambda execution_id, _: (10_000, record(execution_id)))
    async with transport.client(concurrency=1, attempt_timeout=20_000, deadline=None) as client:
        executions = client.instructor_executions
        await asyncio.gather(*(executions.get(i) for i in "abc"))
        assert now() == 30_000


@virtual_time
async def test_a_throttling_response_pauses_all_lookups() -> None:
    """After a throttling response, no lookup of the client sends a request before the server's time has passed."""

    def play(execution_id: str, number: int) -> Reply:
        return status(429, retry_after="5") if execution_id == "a" and number == 1 else record(execution_id)

    transport = ScriptedTransport(play)
    async with transport.client() as client:
        first = asyncio.create_task(client.instructor_executions.get("a"))
        await asyncio.sleep(1)
        await client.instructor_executions.get("b")
        await first
        assert transport.ids[0] == "a"
        assert sorted(transport.ids[1:]) == ["a", "b"]
        assert min(transport.times[1:]) >= 5.1
        assert client.stats().throttled == 1
        assert client.stats().pauses == 1
        assert_idle(client, transport)


@virtual_time
async def test_a_pause_beyond_the_deadline_fails_at_once() -> None:
    """During a pause beyond its deadline, a lookup fails at once and sends nothing."""
    transport = ScriptedTransport(lambda *_: status(429, retry_after="3600"))
    async with transport.client(deadline=5) as client:
        first = await failing(client, "a")
        second = await failing(client, "b")
        assert now() == pytest.approx(0.1)
        assert type(first) is type(second) is RateLimitError
        assert isinstance(first, RateLimitError)
        assert first.retry_after == 3600
        assert first.attempts == 1
        assert isinstance(second, RateLimitError)
        assert second.attempts == 0
        assert second.status == 429
        assert second.retry_after == pytest.approx(3600, abs=2)
        assert "not sent: the server asked this client to pause, and it would be the turn of this lookup in 3" in str(
            second
        )
        assert transport.ids == ["a"]
        assert_idle(client, transport)


@virtual_time
async def test_a_second_pause_keeps_lookups_waiting() -> None:
    """Lookups that wait in a pause continue to wait if a second pause follows."""

    def play(execution_id: str, number: int) -> Reply:
        throttled = (execution_id, number) in {("a", 1), ("a", 2)}
        return status(429, retry_after="5") if throttled else record(execution_id)

    transport = ScriptedTransport(play, latency=0.01)
    async with transport.client() as client:
        tasks = [asyncio.create_task(client.instructor_executions.get("a"))]
        await asyncio.sleep(1)
        tasks += [asyncio.create_task(client.instructor_executions.get(f"b{n}")) for n in range(20)]
        await asyncio.gather(*tasks)
        second_pause = next(time for time, sent in transport.sent[1:] if sent == "a") + 0.01
        assert not [time for time in transport.times if second_pause < time < second_pause + 5]
        assert client.stats().pauses == 1
        assert_idle(client, transport)


@virtual_time
async def test_a_closed_client_refuses_lookups() -> None:
    """A closed client refuses lookups by every method and sends nothing."""
    transport = ScriptedTransport()
    client = transport.client()
    await client.aclose()
    error = await failing(client)
    assert type(error) is ClientClosedError
    assert str(error) == "a: the client is closed; create a new KaizenClient"
    (outcome,) = await client.instructor_executions.get_many(["b"])
    assert isinstance(outcome.error, ClientClosedError)
    assert not transport.sent
    assert transport.closed


@virtual_time
async def test_closing_ends_requests_queues_and_back_offs_at_once() -> None:
    """A close ends requests, queued lookups and back-offs at once with a ClientClosedError, without a cancellation."""

    def play(execution_id: str, number: int) -> Reply:
        return status(500) if execution_id == "backing off" else (NEVER, record(execution_id))

    transport = ScriptedTransport(play)
    client = transport.client(concurrency=2, retry=RetryPolicy(initial_backoff=1e6, max_backoff=1e6), deadline=None)
    tasks = [asyncio.create_task(failing(client, name)) for name in ("backing off", "sending", "sending too", "queued")]
    await asyncio.sleep(1)
    assert client.stats().in_flight == 2
    await client.aclose()
    errors = await asyncio.gather(*tasks)
    assert [(type(error), error.reason, error.attempts) for error in errors] == [
        (ClientClosedError, "the client was closed during back-off", 1),
        (ClientClosedError, "the client was closed during an attempt", 1),
        (ClientClosedError, "the client was closed during an attempt", 1),
        (ClientClosedError, "the client was closed while it waited for its turn to send", 0),
    ]
    assert str(errors[0].__cause__) == "backing off: the server answered 500 Internal Server Error"
    assert now() == 1
    assert transport.closed
    assert_idle(client, transport)


@virtual_time
async def test_closing_ends_a_wait_at_the_gate() -> None:
    """A close ends lookups that wait in a pause of the server."""
    transport = ScriptedTransport(lambda *_: status(429, retry_after="50"))
    client = transport.client(deadline=100)
    tasks = [asyncio.create_task(failing(client, name)) for name in "ab"]
    await asyncio.sleep(1)
    await client.aclose()
    assert {type(error) for error in await asyncio.gather(*tasks)} == {ClientClosedError}
    assert now() == 1
    assert_idle(client, transport)


@virtual_time
async def test_a_drain_lets_requests_finish_but_nothing_new_begin() -> None:
    """A drain lets sent requests finish, and refuses queued lookups and retries at once."""

    def play(execution_id: str, number: int) -> Reply:
        return (3, record(execution_id)) if execution_id == "slow" else (NEVER, record(execution_id))

    transport = ScriptedTransport(play)
    client = transport.client(concurrency=2)
    slow = asyncio.create_task(client.instructor_executions.get("slow"))
    endless = asyncio.create_task(failing(client, "endless"))
    await asyncio.sleep(1)
    queued = asyncio.create_task(failing(client, "queued"))
    await asyncio.sleep(0)
    closing = asyncio.create_task(client.aclose(drain=10))
    assert isinstance(await queued, ClientClosedError)
    assert now() == 1
    assert (await slow).id == "slow"
    assert now() == 3
    await closing
    assert now() == 11
    assert isinstance(await endless, ClientClosedError)
    assert_idle(client, transport)


@virtual_time
async def test_a_drain_ends_with_the_last_request() -> None:
    """A drain ends as soon as its last request has finished."""
    transport = ScriptedTransport(latency=2)
    client = transport.client()
    task = asyncio.create_task(client.instructor_executions.get("a"))
    await asyncio.sleep(1)
    await client.aclose(drain=1000)
    assert now() == 2
    assert (await task).id == "a"


@virtual_time
async def test_a_drain_without_requests_takes_no_time() -> None:
    """A drain without requests in flight returns at once, also a second time."""
    transport = ScriptedTransport()
    client = transport.client()
    await client.aclose(drain=1000)
    await client.aclose(drain=1000)
    assert now() == 0


@pytest.mark.parametrize(("first", "second", "ends"), [(100, 2, 3), (100, 0, 1), (2, 100, 2)])
def test_a_second_close_may_shorten_a_drain_but_not_prolong_it(first: float, second: float, ends: float) -> None:
    """A second close can shorten a drain but not extend it. Both calls return when the client is closed."""

    @virtual_time
    async def play() -> None:
        transport = ScriptedTransport(latency=NEVER)
        client = transport.client()
        task = asyncio.create_task(failing(client))
        await asyncio.sleep(0)
        closings = [asyncio.create_task(client.aclose(drain=first))]
        await asyncio.sleep(1)
        closings.append(asyncio.create_task(client.aclose(drain=second)))
        await asyncio.gather(*closings)
        assert now() == ends
        assert isinstance(await task, ClientClosedError)
        assert_idle(client, transport)

    play()


@virtual_time
async def test_a_cancelled_close_can_be_repeated() -> None:
    """After a cancelled close, the requests in flight continue, and the next close closes the client."""
    transport = ScriptedTransport(latency=NEVER)
    client = transport.client()
    task = asyncio.create_task(failing(client))
    await asyncio.sleep(0)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await client.aclose(drain=math.inf)
    assert not transport.closed
    await client.aclose()
    assert isinstance(await task, ClientClosedError)
    assert transport.closed
    assert_idle(client, transport)


@pytest.mark.parametrize("steps", range(12))
@pytest.mark.parametrize("closings", [1, 2])
def test_closing_at_any_step_leaves_nothing_behind(steps: int, closings: int) -> None:
    """A close at any step leaves nothing behind, also while a slot changes hands or a deadline passes."""

    @virtual_time
    async def play() -> None:
        transport = ScriptedTransport(latency=0)
        client = transport.client(concurrency=1, deadline=None)
        outcomes = asyncio.gather(
            *(client.instructor_executions.get(f"e{n}") for n in range(4)),
            client.instructor_executions.get("hurried", deadline=1e-6),
            return_exceptions=True,
        )
        for _ in range(steps):
            await asyncio.sleep(0)
        for _ in range(closings):
            closing = asyncio.create_task(client.aclose())
            await asyncio.sleep(0)
        await closing
        results = await outcomes
        assert_idle(client, transport)
        assert transport.closed
        failures = [result for result in results if isinstance(result, BaseException)]
        assert {type(failure) for failure in failures} <= {ClientClosedError, DeadlineExceededError}

    play()


@virtual_time
async def test_cancelled_lookups_free_their_place_in_the_pace() -> None:
    """Lookups that are cancelled while they wait for the pace do not delay the next lookup."""
    transport = ScriptedTransport(
        lambda execution_id, _: status(429, retry_after="1") if execution_id == "a" else record(execution_id)
    )
    async with transport.client(retry=ONCE, deadline=None) as client:
        await failing(client, "a")
        waiting = [asyncio.create_task(client.instructor_executions.get(f"b{n}")) for n in range(20)]
        await asyncio.sleep(1.2)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        before = now()
        await client.instructor_executions.get("c")
        assert now() - before < 3
        assert_idle(client, transport)


@virtual_time
async def test_the_error_before_is_the_cause_of_not_being_sent_again() -> None:
    """A lookup that cannot be retried in a pause raises the pause's error, with its own failure as the cause."""
    replies = {"a": status(500), "b": status(429, retry_after="3600")}
    transport = ScriptedTransport(lambda execution_id, _: replies[execution_id])
    async with transport.client(retry=RetryPolicy(initial_backoff=1), deadline=60) as client:
        first = asyncio.create_task(failing(client, "a"))
        await asyncio.sleep(0.15)
        await failing(client, "b")
        error = await first
        assert isinstance(error, RateLimitError)
        assert error.attempts == 1
        assert isinstance(error.__cause__, StatusError)
        assert error.__cause__.status == 500


@virtual_time
async def test_a_request_that_connects_in_a_pause_waits() -> None:
    """A request that is still connecting when a pause starts is sent after the pause, with a new attempt timeout."""

    class Connecting(ScriptedTransport):
        async def send(self, url: URL, body: bytes, is_held: Callable[[], bool]) -> Answer | None:
            await asyncio.sleep(0.5)
            return None if is_held() else await super().send(url, body, is_held)

    transport = Connecting()
    async with transport.client(attempt_timeout=1) as client:
        task = asyncio.create_task(client.instructor_executions.get("a"))
        await asyncio.sleep(0.2)
        throttle(client, 2)
        assert (await task).id == "a"
        assert now() > 2.2
        assert transport.ids == ["a"]
        assert_idle(client, transport)


@virtual_time
@pytest.mark.parametrize("end", ["the deadline", "closing"])
async def test_a_held_request_ends_in_time(end: str) -> None:
    """The deadline and a close end a request that a pause holds after it has connected."""

    class Held(ScriptedTransport):
        async def send(self, *_: object) -> None:
            await asyncio.sleep(0.1)
            throttle(client, 3600)

    transport = Held()
    client = transport.client(deadline=5 if end == "the deadline" else None)
    task = asyncio.create_task(failing(client, "a"))
    await asyncio.sleep(1)
    await client.aclose()
    error = await task
    assert type(error) is (RateLimitError if end == "the deadline" else ClientClosedError)
    assert_idle(client, transport)


@virtual_time
async def test_a_lookup_cancelled_just_as_an_outage_ends_it_leaves_nothing_behind() -> None:
    """A lookup that is cancelled at the end of an outage leaves nothing behind, and the other lookups end unsent."""
    transport = ScriptedTransport(lambda *_: status(502))
    async with transport.client(deadline=10) as client:
        batch = asyncio.create_task(client.instructor_executions.get_many([f"e{n}" for n in range(100)]))
        health = health_of(client)
        await asyncio.sleep(5)
        assert health.pause is not None
        late = asyncio.create_task(client.instructor_executions.get("late", deadline=10))
        asyncio.get_running_loop().call_at(health.pause.since + 10 - 1e-10, late.cancel)
        with pytest.raises(asyncio.CancelledError):
            await late
        assert {type(outcome.error) for outcome in await batch} == {StatusError}
        assert now() < 11
        assert_idle(client, transport)


@virtual_time
async def test_a_lookup_with_a_longer_deadline_outlives_the_end_of_the_others() -> None:
    """In an outage, a lookup with a longer deadline than the client's continues to probe and gets its record."""
    transport = ScriptedTransport(lambda execution_id, _: status(502) if now() < 100 else record(execution_id))
    async with transport.client(deadline=10) as client:
        patient = asyncio.create_task(client.instructor_executions.get("patient", deadline=300))
        outcomes = await client.instructor_executions.get_many([f"e{n}" for n in range(100)])
        assert {type(outcome.error) for outcome in outcomes} == {StatusError}
        assert now() < 11
        assert (await patient).id == "patient"
        assert 100 < now() < 104
        assert_idle(client, transport)


@virtual_time
async def test_connections_are_opened_in_time_or_not_at_all() -> None:
    """`warm_up` respects the client's deadline, and a closed client refuses it."""

    class Slow(ScriptedTransport):
        async def warm_up(self, _: URL, count: int) -> None:
            await asyncio.sleep(3)
            opened.append(count)

    opened: list[int] = []
    async with Slow().client(concurrency=5, deadline=None) as client:
        await client.warm_up(9)
    assert opened == [5]
    client = Slow().client(deadline=2)
    with pytest.raises(DeadlineExceededError, match="while connections were opened"):
        await client.warm_up(1)
    engine = client._binding.engine
    assert engine is not None
    await client.aclose()
    with pytest.raises(ClientClosedError):
        await engine.warm_up(URL("http://localhost"), 1, None)
    assert opened == [5]
