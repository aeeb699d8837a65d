"""A limiter of the caller's: asked before every request, in its turn, and never in the way of an end."""

import asyncio
from typing import Any

import pytest
from aiolimiter import AsyncLimiter
from scripted_transport import AT_ONCE, NEVER, ScriptedTransport, failing, record, status
from virtual_time import virtual_time

from kaizen_async import ClientClosedError, DeadlineExceededError, KaizenClient, TransportError
from kaizen_async.events import AttemptStarted, Event
from kaizen_async.testing import KaizenEmulator, Life, VirtualClock


class Turnstile:
    """A limiter that lets pass when told to.

    Attributes:
        asked: How often it was asked.
        cancelled: How many gave up.
    """

    def __init__(self) -> None:
        self.asked = 0
        self.cancelled = 0
        self._open = asyncio.Event()

    def open(self) -> None:
        """Let all pass."""
        self._open.set()

    async def acquire(self) -> str:
        """Wait."""
        self.asked += 1
        try:
            await self._open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return "whatever"


def assert_idle(client: KaizenClient) -> None:
    """Fail if anything is held although nothing is in flight."""
    engine = client._engine
    assert engine is not None
    assert not engine._waiting
    assert engine._free_slots == engine.concurrency


@virtual_time
async def test_a_limiter_library_sets_the_pace() -> None:
    """Two at once and then two a second, whatever the client's concurrency."""
    transport = ScriptedTransport(latency=0)
    async with transport.client(limiter=AsyncLimiter(2, 1).acquire) as client:
        outcomes = await client.instructor_executions.get_many([f"e{n}" for n in range(6)])
        assert_idle(client)
    assert all(outcome.ok for outcome in outcomes)
    assert transport.times == [0, 0, 0.5, 1, 1.5, 2]


@virtual_time
async def test_every_request_asks_retries_and_polls_included() -> None:
    """A request that was not asked for could be one too many."""
    turnstile = Turnstile()
    turnstile.open()
    replies = {1: status(500), 2: record("a"), 3: status(503)}
    transport = ScriptedTransport(lambda i, n: replies.get(n, record(i, endTime="2026-11-23T13:00:00Z")))
    async with transport.client(limiter=turnstile.acquire, retry=AT_ONCE) as client:
        await client.instructor_executions.wait("a")
    assert len(transport.sent) == turnstile.asked == 4


@virtual_time
async def test_a_slot_is_held_while_the_limiter_is_asked() -> None:
    """So no more ask at a time than may send."""
    turnstile = Turnstile()
    async with ScriptedTransport().client(limiter=turnstile.acquire, concurrency=3) as client:
        async with asyncio.TaskGroup() as group:
            for n in range(9):
                group.create_task(client.instructor_executions.get(f"e{n}"))
            await asyncio.sleep(5)
            assert turnstile.asked == 3
            turnstile.open()
        assert turnstile.asked == 9
        assert_idle(client)


@virtual_time
async def test_the_deadline_ends_the_wait_for_the_limiter() -> None:
    """Nothing is sent, and the limiter is left as by a cancellation."""
    turnstile = Turnstile()
    transport = ScriptedTransport()
    async with transport.client(limiter=turnstile.acquire) as client:
        error = await failing(client, deadline=2)
        assert isinstance(error, DeadlineExceededError)
        assert error.attempts == 0
        assert turnstile.cancelled == 1
        assert_idle(client)
    assert not transport.sent


@virtual_time
async def test_a_cancelled_caller_leaves_the_limiter() -> None:
    """With its slot given back."""
    turnstile = Turnstile()
    async with ScriptedTransport().client(limiter=turnstile.acquire) as client:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.instructor_executions.get("a"), 1)
        assert turnstile.cancelled == 1
        assert_idle(client)


@virtual_time
async def test_closing_the_client_ends_the_wait_for_the_limiter() -> None:
    """As it ends every other wait."""
    turnstile = Turnstile()
    client = ScriptedTransport().client(limiter=turnstile.acquire)
    look_up = asyncio.create_task(failing(client))
    await asyncio.sleep(1)
    await client.aclose()
    assert isinstance(await look_up, ClientClosedError)
    assert turnstile.cancelled == 1
    assert_idle(client)


@virtual_time
async def test_a_limiter_that_lets_through_just_as_the_client_closes_sends_nothing() -> None:
    """Whichever of the two comes first."""
    turnstile = Turnstile()
    transport = ScriptedTransport()
    client = transport.client(limiter=turnstile.acquire)
    lookup = asyncio.create_task(failing(client))
    await asyncio.sleep(1)
    turnstile.open()
    await client.aclose()
    assert isinstance(await lookup, ClientClosedError)
    assert turnstile.cancelled == 0
    assert not transport.sent
    assert_idle(client)


@pytest.mark.parametrize(
    "fault", [ConnectionError("no redis"), TimeoutError("too slow")], ids=lambda f: type(f).__name__
)
def test_a_limiter_that_fails_fails_one_look_up(fault: Exception) -> None:
    """With nothing sent and the fault as the cause; its timeout is not taken for the deadline of the lookup."""

    @virtual_time
    async def play() -> None:
        asked = 0

        async def limiter() -> None:
            nonlocal asked
            asked += 1
            if asked == 2:
                raise fault

        transport = ScriptedTransport()
        async with transport.client(limiter=limiter) as client:
            good, bad, fine = await client.instructor_executions.get_many(["a", "b", "c"])
            assert_idle(client)
        assert good.ok
        assert fine.ok
        assert isinstance(bad.error, TransportError)
        assert bad.error.__cause__ is fault
        assert str(bad.error) == f"b: not sent: the limiter failed: {type(fault).__name__}: {fault}"
        assert bad.error.retryable
        assert bad.attempts == 0
        assert transport.ids == ["a", "c"]

    play()


@virtual_time
async def test_a_limiter_that_is_not_to_be_awaited_fails_the_look_up() -> None:
    """Its lookup, with a word on why; it does not get past as if there were none."""
    transport = ScriptedTransport()
    async with transport.client(limiter=lambda: None) as client:
        error = await failing(client)
    assert "the limiter failed: TypeError" in str(error)
    assert not transport.sent


@virtual_time
async def test_a_pause_that_begins_while_the_limiter_is_asked_is_kept() -> None:
    """The limiter's permission is stale after the pause, so it is asked again."""
    turnstile = Turnstile()
    asked = 0

    async def limiter() -> None:
        nonlocal asked
        asked += 1
        if asked == 2:
            await turnstile.acquire()

    transport = ScriptedTransport(lambda i, n: (1, status(429, retry_after="30")) if (i, n) == ("a", 1) else record(i))
    async with transport.client(limiter=limiter) as client:
        client._random.uniform = lambda low, _: low  # type: ignore[method-assign]
        first = asyncio.create_task(client.instructor_executions.get("a"))
        await asyncio.sleep(0.5)
        second = asyncio.create_task(client.instructor_executions.get("b"))
        await asyncio.sleep(5)
        turnstile.open()
        await asyncio.gather(first, second)
    assert transport.times[0] == 0
    assert min(transport.times[1:]) >= 31
    assert asked == 4


@virtual_time
async def test_the_wait_for_the_limiter_is_told_with_the_attempt() -> None:
    """Beside that for a slot and the gate."""
    events: list[Event] = []
    limiter = AsyncLimiter(1, 10)
    async with ScriptedTransport(latency=0).client(limiter=limiter.acquire, on_event=events.append) as client:
        await client.instructor_executions.get_many(["a", "b"])
    assert [event.queued for event in events if isinstance(event, AttemptStarted)] == [0, pytest.approx(10)]


@virtual_time
async def test_a_limiter_shared_by_two_clients_bounds_both() -> None:
    """Together they send one request a second."""
    shared = AsyncLimiter(1, 1)
    one, two = ScriptedTransport(latency=0), ScriptedTransport(latency=0)
    async with one.client(limiter=shared.acquire) as first, two.client(limiter=shared.acquire) as second:
        await asyncio.gather(
            first.instructor_executions.get_many(["a", "b"]), second.instructor_executions.get_many(["c", "d"])
        )
    assert sorted(one.times + two.times) == [0, 1, 2, 3]


async def test_virtual_time_stands_still_while_the_limiter_takes_real_time(emulator: KaizenEmulator) -> None:
    """Else hours would pass between two polls of a test whose limiter sleeps for milliseconds."""
    clock = VirtualClock()

    async def limiter() -> None:
        before = clock.time()
        await asyncio.sleep(0.02)
        assert clock.time() == before

    emulator.add("exec_1", Life.running())
    emulator.add("exec_2", Life.ended())
    async with KaizenClient(base_url=emulator.base_url, clock=clock, limiter=limiter) as client:
        async with client.instructor_executions.wait_many(["exec_1", "exec_2"], deadline=60) as outcomes:
            results = {outcome.id: outcome.error async for outcome in outcomes}
    assert results["exec_2"] is None
    assert isinstance(results["exec_1"], DeadlineExceededError)


def test_an_object_in_place_of_its_method_is_refused_at_once() -> None:
    """With the method that was meant, most likely."""
    limiter: Any = AsyncLimiter(1)
    with pytest.raises(TypeError, match=r"limiter must be a function .* AsyncLimiter\.acquire"):
        KaizenClient(limiter=limiter)


@virtual_time
async def test_an_attempt_that_is_never_answered_does_not_hold_the_limiter() -> None:
    """It limits how often, not how many at a time: nothing is given back to it."""
    transport = ScriptedTransport(lambda i, _: (NEVER, record(i)) if i == "a" else record(i))
    async with transport.client(limiter=AsyncLimiter(1, 1).acquire) as client:
        hanging = asyncio.create_task(failing(client, deadline=20))
        await asyncio.sleep(2)
        assert (await client.instructor_executions.get("b")).id == "b"
        assert isinstance(await hanging, DeadlineExceededError)


class Counted(Turnstile):
    """A limiter that knows at once whether a request may be sent.

    Attributes:
        permits: Requests that may be sent.
        put_backs: How often a request was not sent after all.
    """

    def __init__(self, permits: int) -> None:
        super().__init__()
        self.permits = permits
        self.put_backs = 0
        self.open()

    async def __call__(self) -> None:
        """Wait."""
        await self.acquire()

    def take_now(self) -> bool:
        """Take a permit if there is one."""
        if not self.permits:
            return False
        self.permits -= 1
        return True

    def put_back(self) -> None:
        """Take one back."""
        self.permits += 1
        self.put_backs += 1


async def test_a_limiter_that_has_permits_is_not_waited_for(emulator: KaizenEmulator) -> None:
    """A permit for which there is no connection goes back, and the request waits like any other."""
    ids = [f"exec_{number}" for number in range(6)]
    emulator.add_many(ids)
    limiter = Counted(permits=3)
    async with KaizenClient(base_url=emulator.base_url, limiter=limiter) as client:
        for execution_id in ids:
            await client.instructor_executions.get(execution_id)
    assert (limiter.put_backs, limiter.permits, limiter.asked) == (1, 0, 3)
    assert emulator.request_count == 6
