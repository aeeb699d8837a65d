"""The caller's limiter is called before every request, with a slot held, and never delays an end."""

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
    """A limiter that a test opens.

    Attributes:
        asked: Number of calls.
        cancelled: Number of cancelled calls.
    """

    def __init__(self) -> None:
        self.asked = 0
        self.cancelled = 0
        self._open = asyncio.Event()

    def open(self) -> None:
        """Let all requests pass."""
        self._open.set()

    async def acquire(self) -> str:
        """Wait until the limiter is open."""
        self.asked += 1
        try:
            await self._open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return "whatever"


def assert_idle(client: KaizenClient) -> None:
    """Fail if an idle client holds a slot."""
    engine = client._binding.engine
    assert engine is not None
    assert not engine._waiting
    assert engine._free_slots == engine.concurrency


@virtual_time
async def test_a_limiter_library_sets_the_pace() -> None:
    """A limiter of two requests and then two a second sets the pace, whatever the client's concurrency."""
    transport = ScriptedTransport(latency=0)
    async with transport.client(limiter=AsyncLimiter(2, 1).acquire) as client:
        outcomes = await client.instructor_executions.get_many([f"e{n}" for n in range(6)])
        assert_idle(client)
    assert all(outcome.ok for outcome in outcomes)
    assert transport.times == [0, 0, 0.5, 1, 1.5, 2]


@virtual_time
async def test_every_request_calls_the_limiter() -> None:
    """The client calls the limiter before every request, including retries and polls."""
    turnstile = Turnstile()
    turnstile.open()
    replies = {1: status(500), 2: record("a"), 3: status(503)}
    transport = ScriptedTransport(lambda i, n: replies.get(n, record(i, endTime="2026-11-23T13:00:00Z")))
    async with transport.client(limiter=turnstile.acquire, retry=AT_ONCE) as client:
        await client.instructor_executions.wait("a")
    assert len(transport.sent) == turnstile.asked == 4


@virtual_time
async def test_a_slot_is_held_during_a_call_of_the_limiter() -> None:
    """A request holds its slot while it waits for the limiter, so no more requests wait than may be sent."""
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
    """The deadline cancels the call of the limiter, and nothing is sent."""
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
    """A cancelled lookup cancels its call of the limiter and frees its slot."""
    turnstile = Turnstile()
    async with ScriptedTransport().client(limiter=turnstile.acquire) as client:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.instructor_executions.get("a"), 1)
        assert turnstile.cancelled == 1
        assert_idle(client)


@virtual_time
async def test_closing_the_client_ends_the_wait_for_the_limiter() -> None:
    """A close cancels the call of the limiter."""
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
    """A limiter that returns while the client closes causes no request."""
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
def test_a_limiter_that_fails_fails_one_lookup(fault: Exception) -> None:
    """A limiter that raises fails one lookup with its error as the cause.

    Its TimeoutError is not the lookup's deadline.
    """

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
async def test_a_limiter_that_is_not_awaitable_fails_the_lookup() -> None:
    """A limiter that returns nothing to await fails the lookup with an explanation, and nothing is sent."""
    transport = ScriptedTransport()
    async with transport.client(limiter=lambda: None) as client:
        error = await failing(client)
    assert "the limiter failed: TypeError" in str(error)
    assert not transport.sent


@virtual_time
async def test_a_pause_during_a_call_of_the_limiter_is_kept() -> None:
    """If a pause starts during a call of the limiter, the client calls it again after the pause."""
    turnstile = Turnstile()
    asked = 0

    async def limiter() -> None:
        nonlocal asked
        asked += 1
        if asked == 2:
            await turnstile.acquire()

    transport = ScriptedTransport(lambda i, n: (1, status(429, retry_after="30")) if (i, n) == ("a", 1) else record(i))
    async with transport.client(limiter=limiter) as client:
        client._binding.random.uniform = lambda low, _: low  # type: ignore[method-assign]
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
async def test_an_attempt_reports_its_wait_for_the_limiter() -> None:
    """The time in `queued` includes the wait for the limiter."""
    events: list[Event] = []
    limiter = AsyncLimiter(1, 10)
    async with ScriptedTransport(latency=0).client(limiter=limiter.acquire, on_event=events.append) as client:
        await client.instructor_executions.get_many(["a", "b"])
    assert [event.queued for event in events if isinstance(event, AttemptStarted)] == [0, pytest.approx(10)]


@virtual_time
async def test_a_limiter_shared_by_two_clients_bounds_both() -> None:
    """Two clients with one limiter together send one request a second."""
    shared = AsyncLimiter(1, 1)
    one, two = ScriptedTransport(latency=0), ScriptedTransport(latency=0)
    async with one.client(limiter=shared.acquire) as first, two.client(limiter=shared.acquire) as second:
        await asyncio.gather(
            first.instructor_executions.get_many(["a", "b"]), second.instructor_executions.get_many(["c", "d"])
        )
    assert sorted(one.times + two.times) == [0, 1, 2, 3]


async def test_virtual_time_stands_still_while_the_limiter_takes_real_time(emulator: KaizenEmulator) -> None:
    """Virtual time stands still during a limiter's real sleep. Otherwise hours would pass between two polls."""
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
    """A limiter object in place of its method is refused, and the error names the likely method."""
    limiter: Any = AsyncLimiter(1)
    with pytest.raises(TypeError, match=r"limiter must be a function .* AsyncLimiter\.acquire"):
        KaizenClient(limiter=limiter)


@virtual_time
async def test_a_hanging_attempt_does_not_block_the_limiter() -> None:
    """A hanging request does not block the limiter, which limits the rate and not the number in flight."""
    transport = ScriptedTransport(lambda i, _: (NEVER, record(i)) if i == "a" else record(i))
    async with transport.client(limiter=AsyncLimiter(1, 1).acquire) as client:
        hanging = asyncio.create_task(failing(client, deadline=20))
        await asyncio.sleep(2)
        assert (await client.instructor_executions.get("b")).id == "b"
        assert isinstance(await hanging, DeadlineExceededError)


class Counted(Turnstile):
    """A limiter that can decide without waiting.

    Attributes:
        permits: Number of requests that may be sent.
        put_backs: Number of permits returned unused.
    """

    def __init__(self, permits: int) -> None:
        super().__init__()
        self.permits = permits
        self.put_backs = 0
        self.open()

    async def __call__(self) -> None:
        """Wait for a permit."""
        await self.acquire()

    def take_now(self) -> bool:
        """Take a permit if there is one."""
        if not self.permits:
            return False
        self.permits -= 1
        return True

    def put_back(self) -> None:
        """Return a permit."""
        self.permits += 1
        self.put_backs += 1


async def test_a_limiter_that_has_permits_is_not_waited_for(emulator: KaizenEmulator) -> None:
    """A limiter with permits causes no wait. A permit without a connection goes back, and the request waits."""
    ids = [f"exec_{number}" for number in range(6)]
    emulator.add_many(ids)
    limiter = Counted(permits=3)
    async with KaizenClient(base_url=emulator.base_url, limiter=limiter) as client:
        for execution_id in ids:
            await client.instructor_executions.get(execution_id)
    assert (limiter.put_backs, limiter.permits, limiter.asked) == (1, 0, 3)
    assert emulator.request_count == 6
