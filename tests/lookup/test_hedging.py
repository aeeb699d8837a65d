"""Hedging sends a slow request a second time. The first good response wins, and the other request ends."""

import asyncio
import math
import statistics
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any

import pytest
from click.testing import CliRunner
from scripted_lives import EVERY_SECOND
from scripted_transport import AT_ONCE, NEVER, Reply, ScriptedTransport, health_of, record, status, throttle
from virtual_time import LoopClock, virtual_time
from yarl import URL

from kaizen_async import (
    ClientClosedError,
    DeadlineExceededError,
    HedgePolicy,
    KaizenClient,
    KaizenError,
    NotFoundError,
    PollPolicy,
    RetryPolicy,
    StatusError,
    TransportError,
)
from kaizen_async._cli.app import cli
from kaizen_async._lookup.health import Health
from kaizen_async._lookup.hedge import MARGIN, MOST_SAVED, Hedging, Race
from kaizen_async._transport.capacity import NoConnectionError
from kaizen_async._transport.transport import Answer
from kaizen_async.clock import BLOCKED, SystemClock
from kaizen_async.events import AttemptEnded, AttemptStarted, Event, HedgeEnded, HedgeStarted
from kaizen_async.testing import Fault, KaizenEmulator, Life, VirtualClock

EAGER = HedgePolicy(min_observations=1, max_share=0.5)
"""Hedges from the third lookup on, if it is slow."""
ONCE = RetryPolicy(max_attempts=1)
USUAL = 0.1
"""Seconds that a scripted request takes."""
SLOW = pytest.approx(USUAL * MARGIN + USUAL)
"""Seconds of a lookup whose second request takes the usual time."""
BROKEN = TransportError("reset", retryable=True)


class Script:
    """A play that gives the id `slow` these replies in turn, and all other ids a record in the usual time."""

    def __init__(self, *replies: Reply) -> None:
        self._replies = replies

    def __call__(self, execution_id: str, number: int) -> Reply:
        """Return the reply to a request."""
        return self._replies[number - 1] if execution_id == "slow" else record(execution_id)


async def hedging_client(transport: ScriptedTransport, hedge: HedgePolicy = EAGER, **settings: Any) -> KaizenClient:
    """Return a client that hedges and has learned the usual time of a response."""
    client = transport.client(**{"hedge": hedge, "retry": ONCE, **settings})
    for execution_id in ("a", "b"):
        await client.instructor_executions.get(execution_id)
    return client


def now() -> float:
    """Return virtual seconds."""
    return asyncio.get_running_loop().time()


@virtual_time
async def test_a_slow_request_is_sent_again_and_the_second_response_wins() -> None:
    """The second response to a slow request wins. The lookup is one attempt, and both requests count."""
    transport = ScriptedTransport(Script((NEVER, record("slow")), record("slow")))
    events: list[Event] = []
    async with await hedging_client(transport, on_event=events.append) as client:
        began = now()
        [outcome] = await client.instructor_executions.get_many(["slow"])
        assert now() - began == SLOW
        assert (outcome.ok, outcome.attempts, transport.open) == (True, 1, 0)
        stats = client.stats()
        assert (stats.attempts, stats.hedges, stats.hedges_won, stats.retries) == (4, 1, 1, 0)
        assert (stats.responses_2xx, stats.unanswered, stats.in_flight, stats.queued) == (3, 1, 0, 0)
    of_slow = [
        event for event in events if isinstance(event, AttemptStarted | AttemptEnded | HedgeStarted | HedgeEnded)
    ]
    started, hedge_started, hedge_ended, ended = of_slow[-4:]
    assert isinstance(started, AttemptStarted)
    assert isinstance(hedge_started, HedgeStarted)
    assert (hedge_started.attempt, hedge_started.after) == (1, pytest.approx(USUAL * MARGIN))
    assert hedge_ended == HedgeEnded("slow", started.url, 1, pytest.approx(USUAL), 200, None, won=True)
    assert ended == AttemptEnded("slow", started.url, 1, SLOW, None, None)


@pytest.mark.parametrize(
    ("first", "second", "seconds", "won"),
    [
        ((0.15, record("slow")), (1.0, record("slow")), 0.15, False),
        ((0.15, BROKEN), (1.0, record("slow")), 1.101, True),
        ((1.0, record("slow")), (0.05, BROKEN), 1.0, False),
        ((1.0, record("slow")), (0.05, status(503)), 1.0, False),
        ((1.0, record("slow")), (0.05, status(429)), 1.0, False),
        ((1.0, record("slow")), (0.05, Answer(404, {}, b"<html>")), 1.0, False),
        ((0.15, Answer(200, {}, b"<html>")), (0.2, record("slow")), 0.301, True),
    ],
)
def test_the_first_good_response_wins(first: Reply, second: Reply, seconds: float, won: bool) -> None:
    """A bad response does not end the attempt while the other request may succeed."""

    @virtual_time
    async def check() -> None:
        transport = ScriptedTransport(Script(first, second))
        async with await hedging_client(transport) as client:
            began = now()
            await client.instructor_executions.get("slow")
            assert now() - began == pytest.approx(seconds)
            assert (client.stats().hedges, client.stats().hedges_won) == (1, won)
            health = health_of(client)
            assert (health.in_flight, transport.open) == (0, 0)

    check()


@virtual_time
async def test_if_both_fail_the_attempt_failed_as_the_first_did() -> None:
    """If both requests fail, the attempt fails with the first request's error, and one retry follows."""
    transport = ScriptedTransport(Script((0.15, BROKEN), (0.1, status(500)), record("slow")))
    async with await hedging_client(transport, retry=AT_ONCE) as client:
        [outcome] = await client.instructor_executions.get_many(["slow"])
        assert (outcome.ok, outcome.attempts) == (True, 2)
        assert (client.stats().hedges, client.stats().hedges_won, client.stats().retries) == (1, 0, 1)
    transport = ScriptedTransport(Script((0.15, BROKEN), (0.1, status(500))))
    async with await hedging_client(transport) as client:
        with pytest.raises(TransportError, match="reset"):
            await client.instructor_executions.get("slow")


@virtual_time
async def test_an_id_that_does_not_exist_is_a_good_response() -> None:
    """A 404 counts as a good response, unless it may belong to another request."""
    transport = ScriptedTransport(Script((NEVER, status(404)), status(404)))
    async with await hedging_client(transport) as client:
        with pytest.raises(NotFoundError):
            await client.instructor_executions.get("slow")
        assert client.stats().hedges_won == 1
    transport = ScriptedTransport(Script((1.0, record("slow")), status(404)))
    transport.is_out_of_step = True
    async with await hedging_client(transport) as client:
        await client.instructor_executions.get("slow")
        assert client.stats().hedges_won == 0


@virtual_time
async def test_both_responses_at_the_same_moment_are_one_result() -> None:
    """Two responses at the same moment count as one result and free both slots once."""
    transport = ScriptedTransport(Script((USUAL * MARGIN + USUAL, record("slow")), record("slow")))
    async with await hedging_client(transport, concurrency=2) as client:
        await client.instructor_executions.get("slow")
        assert health_of(client).in_flight == 0
        assert client._binding.engine is not None
        assert client._binding.engine._free_slots == 2


def cancel(task: asyncio.Task[Any], client: KaizenClient) -> None:
    """Cancel the call."""
    task.cancel()


def close(task: asyncio.Task[Any], client: KaizenClient) -> None:
    """Close the client."""
    client_closing.append(asyncio.ensure_future(client.aclose()))


client_closing: list[asyncio.Future[None]] = []


@pytest.mark.parametrize(("end", "error"), [(cancel, asyncio.CancelledError), (close, ClientClosedError)])
@pytest.mark.parametrize("steps", range(8))
def test_a_hedged_lookup_can_be_ended_at_any_moment(
    end: Callable[[asyncio.Task[Any], KaizenClient], None], error: type[BaseException], steps: int
) -> None:
    """A hedged lookup that is cancelled or closed at any step leaves no request, slot or task."""

    @virtual_time
    async def check() -> None:
        transport = ScriptedTransport(Script((NEVER, record("slow")), (NEVER, record("slow"))))
        client = await hedging_client(transport, concurrency=2)
        task = asyncio.ensure_future(client.instructor_executions.get("slow"))
        await asyncio.sleep(USUAL * MARGIN + (0.001 if steps > 3 else -0.0001))
        for _ in range(steps):
            await asyncio.sleep(0)
        end(task, client)
        with pytest.raises(error):
            await task
        assert transport.open == 0
        assert client._binding.engine is not None
        assert (client._binding.engine._free_slots, health_of(client).in_flight, client.stats().in_flight) == (2, 0, 0)
        assert client._binding.engine.hedges_in_flight == 0
        for closing in client_closing:
            await closing
        client_closing.clear()
        await client.aclose()

    check()


@virtual_time
async def test_a_hedged_lookup_keeps_its_deadline() -> None:
    """The deadline of the lookup ends both requests."""
    transport = ScriptedTransport(Script((NEVER, record("slow")), (NEVER, record("slow"))))
    async with await hedging_client(transport) as client:
        began = now()
        with pytest.raises(DeadlineExceededError):
            await client.instructor_executions.get("slow", deadline=2)
        assert now() - began == pytest.approx(2)
        assert (client.stats().hedges, transport.open) == (1, 0)


@virtual_time
async def test_a_crash_of_the_second_request_is_raised() -> None:
    """What no error of ours describes is not swallowed."""

    class Crashing(ScriptedTransport):
        async def send(self, url: URL, body: bytes, is_held: Callable[[], bool]) -> Answer:
            if self.numbers["slow"] == 1 and b"slow" in body:
                raise ZeroDivisionError
            return await super().send(url, body, is_held)

    async with await hedging_client(Crashing(Script((1.0, record("slow"))))) as client:
        with pytest.raises(ZeroDivisionError):
            await client.instructor_executions.get("slow")
        assert client._binding.engine is not None
        assert (client._binding.engine._free_slots, client.stats().hedges_won) == (50, 0)


def engaged(client: KaizenClient) -> None:
    """Make the client believe that the server throttles."""
    throttle(client, 0.05)


def short_of_retries(client: KaizenClient) -> None:
    """Use up the client's retry budget."""
    health_of(client)._budget = 40


def unlearned(client: KaizenClient) -> None:
    """Remove the delay that the client has learned."""
    for hedging in client._binding.hedgings.values():
        hedging.delay = None


@pytest.mark.parametrize("why", [engaged, short_of_retries, unlearned])
def test_nothing_is_hedged_when_it_would_do_harm(why: Callable[[KaizenClient], None]) -> None:
    """The client does not hedge while the server throttles, while retries are scarce, or without a known usual time."""

    @virtual_time
    async def check() -> None:
        transport = ScriptedTransport(Script((1.0, record("slow"))))
        async with await hedging_client(transport) as client:
            lookup = asyncio.ensure_future(client.instructor_executions.get("slow"))
            await asyncio.sleep(0 if why is unlearned else 0.05)
            why(client)
            if why is unlearned:
                lookup.cancel()
                with suppress(asyncio.CancelledError):
                    await lookup
                transport.numbers.clear()
                lookup = asyncio.ensure_future(client.instructor_executions.get("slow"))
            await lookup
            assert client.stats().hedges == 0

    check()


@virtual_time
async def test_a_second_request_takes_the_next_free_slot() -> None:
    """A second request takes the next free slot before waiting lookups. It is dropped if the first response arrives."""
    transport = ScriptedTransport(Script((NEVER, record("slow")), record("slow")))
    async with await hedging_client(transport, concurrency=2) as client:
        begun = now()
        others = [asyncio.ensure_future(client.instructor_executions.get(f"c{number}")) for number in range(20)]
        await asyncio.sleep(0.55)
        await client.instructor_executions.get("slow")
        assert transport.most_open == 2
        asked = transport.ids
        assert asked.index("slow", asked.index("slow") + 1) - asked.index("slow") <= 3
        await asyncio.gather(*others)
        assert now() - begun < 20 * USUAL
    transport = ScriptedTransport(Script((0.15, record("slow"))))
    async with await hedging_client(transport, concurrency=1) as client:
        await client.instructor_executions.get("slow")
        assert (client.stats().hedges, transport.numbers["slow"]) == (0, 1)
        [hedging] = client._binding.hedgings.values()
        assert hedging.take()


@pytest.mark.parametrize(
    ("failure", "counted"),
    [(None, 0), (NoConnectionError(OSError(24, "full")), 0), (NoConnectionError(OSError("reset"), was_sent=True), 1)],
)
def test_a_second_request_that_finds_no_connection_is_dropped(failure: Exception | None, counted: int) -> None:
    """A second request without a connection is dropped, and counts only if it was sent."""

    class Full(ScriptedTransport):
        async def send(self, url: URL, body: bytes, is_held: Callable[[], bool]) -> Answer:
            if self.numbers["slow"] == 1 and b"slow" in body:
                if failure is not None:
                    raise failure
                return None  # type: ignore[return-value]
            return await super().send(url, body, is_held)

    @virtual_time
    async def check() -> None:
        async with await hedging_client(Full(Script((0.3, record("slow"))))) as client:
            await client.instructor_executions.get("slow")
            assert (client.stats().hedges, client.stats().attempts) == (counted, 3 + counted)
            assert health_of(client).in_flight == 0

    check()


@virtual_time
async def test_a_closed_client_sends_no_second_request() -> None:
    """A close ends a lookup whose second request waits for a slot."""
    transport = ScriptedTransport(Script((NEVER, record("slow"))))
    client = await hedging_client(transport, concurrency=1)
    lookup = asyncio.ensure_future(client.instructor_executions.get("slow"))
    await asyncio.sleep(0.2)
    await client.aclose()
    with pytest.raises(ClientClosedError):
        await lookup
    assert client.stats().hedges == 0


@virtual_time
async def test_a_pause_keeps_a_second_request_from_its_turn() -> None:
    """A second request that waits for a slot when a pause starts leaves the slot to a lookup."""
    transport = ScriptedTransport(Script((1.0, record("slow"))))
    async with await hedging_client(transport, concurrency=1) as client:
        lookup = asyncio.ensure_future(client.instructor_executions.get("slow"))
        await asyncio.sleep(0.2)
        assert client._binding.engine is not None
        throttle(client, 0.1)
        client._binding.engine._free_slots += 1
        await asyncio.sleep(0.5)
        client._binding.engine._free_slots -= 1
        await lookup
        assert (client.stats().hedges, health_of(client).in_flight) == (0, 0)


def tail(random: Random) -> Callable[[str, int], Reply]:
    """Return a server whose responses take 20 times as long in 3 % of the cases."""

    def play(execution_id: str, number: int) -> Reply:
        seconds = random.uniform(0.8, 1.2) * (1.0 if random.random() < 0.03 else 0.05)
        ended = {"status": "Completed", "endTime": "2026-11-23T12:00:05Z", "durationMs": 5000}
        return seconds, record(execution_id, **ended)

    return play


async def seconds_of_get_many(client: KaizenClient, ids: list[str]) -> list[float]:
    """Return the duration of each lookup of `get_many`."""
    return [outcome.elapsed for outcome in await client.instructor_executions.get_many(ids)]


async def seconds_of_stream(client: KaizenClient, ids: list[str]) -> list[float]:
    """Return the duration of each lookup of a stream."""
    async with client.instructor_executions.stream(ids) as stream:
        return [outcome.elapsed async for outcome in stream]


async def seconds_of_get(client: KaizenClient, ids: list[str]) -> list[float]:
    """Return the duration of single lookups, ten at a time."""
    seconds: list[float] = []
    left = iter(ids)

    async def work() -> None:
        for execution_id in left:
            began = now()
            await client.instructor_executions.get(execution_id)
            seconds.append(now() - began)

    await asyncio.gather(*(work() for _ in range(10)))
    return seconds


async def seconds_of_wait(client: KaizenClient, ids: list[str]) -> list[float]:
    """Return the duration of waits for executions that have already ended."""
    seconds: list[float] = []
    for at in range(0, len(ids), 20):
        began = now()
        async with client.instructor_executions.wait_many(ids[at : at + 20], poll=EVERY_SECOND) as waits:
            async for _ in waits:
                seconds.append(now() - began)
    return seconds


@pytest.mark.parametrize("look_up", [seconds_of_get, seconds_of_get_many, seconds_of_stream, seconds_of_wait])
def test_the_tail_is_cut_for_few_requests(look_up: Callable[[KaizenClient, list[str]], Any]) -> None:
    """With 3 % of slow responses, p99 falls from 20 medians to 3, with 1.05 requests per lookup."""

    @virtual_time
    async def check() -> None:
        transport = ScriptedTransport(tail(Random(1)))
        async with transport.client(hedge=HedgePolicy(), ended_records=0) as client:
            await look_up(client, [f"early_{number}" for number in range(200)])
            seconds: list[float] = await look_up(client, [f"exec_{number}" for number in range(500)])
        assert statistics.quantiles(seconds, n=100)[98] <= 3 * statistics.median(seconds)
        assert 1.02 < len(transport.sent) / 700 <= 1.05
        assert transport.open == 0

    check()


@virtual_time
async def test_polls_under_a_rate_are_not_hedged() -> None:
    """Polls under a max_rate are not hedged, because the rate would not count the second request."""
    transport = ScriptedTransport(tail(Random(1)))
    async with transport.client(hedge=EAGER, ended_records=0) as client:
        ids = [f"exec_{number}" for number in range(100)]
        async with client.instructor_executions.wait_many(ids, poll=PollPolicy(max_rate=50)) as waits:
            assert len([outcome async for outcome in waits]) == 100
        assert client.stats().hedges == 0


@virtual_time
async def test_a_server_that_slows_down_gets_no_burst() -> None:
    """When a server slows down, the client hedges only its saved number of requests and its share."""
    latency = 0.1
    transport = ScriptedTransport(lambda execution_id, _: (latency, record(execution_id)))
    async with transport.client(hedge=HedgePolicy()) as client:
        await client.instructor_executions.get_many([f"a{number}" for number in range(300)])
        assert client.stats().hedges == 0
        latency = 2.0
        await client.instructor_executions.get_many([f"b{number}" for number in range(100)])
        assert client.stats().hedges <= MOST_SAVED + 0.05 * 100


@virtual_time
async def test_the_learned_delay_survives_an_event_loop() -> None:
    """The learned delay belongs to the client and stays for the next event loop."""
    transport = ScriptedTransport(Script((NEVER, record("slow")), record("slow")))
    async with await hedging_client(transport) as client:
        [before] = client._binding.hedgings.values()
        client._binding.known_lookups.clear()
        await client.instructor_executions.get("c")
        assert list(client._binding.hedgings.values()) == [before]
        assert before.delay == pytest.approx(USUAL * MARGIN)


@pytest.mark.parametrize("direct", [True, False])
async def test_the_losing_connection_is_closed(direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On real sockets, the connection of the losing request is closed, for own connections and for `session.post`."""
    if not direct:
        monkeypatch.setattr("kaizen_async._transport.transport.is_patched", lambda _: True)
    async with KaizenEmulator(default_life=Life.ended(duration=5)) as emulator:
        policy = HedgePolicy(min_observations=1, max_share=0.5, min_delay=0.05)
        async with KaizenClient(base_url=emulator.base_url, hedge=policy) as kaizen:
            for execution_id in ("a", "b"):
                await kaizen.instructor_executions.get(execution_id)
            emulator.faults.next(Fault.hang(), id="slow")
            await asyncio.wait_for(kaizen.instructor_executions.get("slow"), 10)
            assert (kaizen.stats().hedges_won, kaizen.stats().unanswered) == (1, 1)
            for _ in range(100):
                if emulator.open_connections == 1:
                    break
                await asyncio.sleep(0.01)
            assert emulator.open_connections == 1


async def test_hedging_counts_in_virtual_time() -> None:
    """With a `VirtualClock` and an emulator, a user's test sees hedging in virtual time."""
    clock = VirtualClock()
    async with KaizenEmulator(clock=clock, default_life=Life.ended(duration=5)) as emulator:
        async with KaizenClient(base_url=emulator.base_url, clock=clock, hedge=EAGER) as kaizen:
            emulator.faults.always(Fault.latency(0.1))
            for execution_id in ("a", "b"):
                await kaizen.instructor_executions.get(execution_id)
            emulator.faults.next(Fault.latency(5), id="slow")
            began = clock.time()
            await kaizen.instructor_executions.get("slow")
            assert clock.time() - began == SLOW
            assert kaizen.stats().hedges_won == 1


class Times(LoopClock):
    """A clock whose timers fire when the test says."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        """Return the time."""
        return self.now

    def call_at(self, when: float, callback: Callable[[], None]) -> Any:
        """Record a timer."""
        self.timers.append((when, callback))
        return asyncio.get_running_loop().call_later(3600, int)


@virtual_time
async def test_only_time_of_the_request_counts() -> None:
    """Time in which the loop was blocked, or the first request was not yet sent, does not count towards hedging."""
    clock = Times()
    sent_at: float | None = None
    seconds: list[float] = []

    async def second(_: Race[str]) -> None:
        seconds.append(clock.now)

    hedging = Hedging(HedgePolicy(), Health(lambda: 0.0, Random(1)))
    race: Race[str] = Race(clock, hedging, 1.0, lambda: sent_at, second)
    first: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def wait() -> str:
        return await first

    run = asyncio.ensure_future(race.run(wait(), lambda _: True))
    await asyncio.sleep(0)
    for at, sent in ((1.0, None), (2.0, 1.5), (2.5 + 2 * BLOCKED, 1.5), (2.525, 1.5), (2.78, 1.5)):
        if at > 2.6:
            hedging.give_back()
        clock.now, sent_at = at, sent
        when, callback = clock.timers.pop()
        assert when <= at
        callback()
        await asyncio.sleep(0)
    assert seconds == [2.78]
    first.set_result("first")
    assert await run == "first"


async def test_two_cancellations_leave_nothing_of_a_second_request() -> None:
    """A lookup that is cancelled twice ends after the cleanup of its second request, and returns its saved share."""
    hedging = Hedging(HedgePolicy(max_share=0.99), Health(lambda: 0.0, Random(1)))
    for _ in range(10):
        hedging.earn()
    saved = hedging._saved
    begun, cleaned = asyncio.Event(), asyncio.Event()

    async def second(_: Race[str]) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(5):
                await asyncio.sleep(0)
            cleaned.set()

    now = asyncio.get_running_loop().time()
    race: Race[str] = Race(SystemClock(), hedging, 0.001, lambda: now, second)
    run = asyncio.create_task(race.run(asyncio.sleep(60, "first"), lambda _: True))
    await begun.wait()
    run.cancel()
    await asyncio.sleep(0)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert cleaned.is_set()
    assert hedging._saved == saved


def test_a_quantile_of_recent_requests_is_learned() -> None:
    """The delay follows a quantile of recent requests, at least `min_delay`, and is unknown before enough requests."""
    health = Health(lambda: 0.0, Random(1))
    hedging = Hedging(HedgePolicy(min_observations=100), health)
    for number in range(99):
        hedging.observe(number / 100)
    assert hedging.delay is None
    hedging.observe(0.99)
    assert hedging.delay == pytest.approx(0.92 * MARGIN)
    for _ in range(2000):
        hedging.observe(3.0)
    assert hedging.delay == pytest.approx(3.0 * MARGIN)
    for _ in range(2000):
        hedging.observe(0.0)
    assert hedging.delay == HedgePolicy().min_delay


def test_a_share_is_never_exceeded() -> None:
    """The share of hedged lookups never exceeds `max_share`, and few hedges are saved up."""
    health = Health(lambda: 0.0, Random(1))
    hedging = Hedging(HedgePolicy(max_share=0.05), health)
    taken = 0
    for number in range(1, 2001):
        hedging.earn()
        taken += hedging.take()
        assert taken <= 0.05 * number + 1e-9
    assert taken >= 98
    for _ in range(1000):
        hedging.earn()
    assert sum(hedging.take() for _ in range(100)) == MOST_SAVED
    hedging.give_back()
    assert hedging.take()


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"quantile": 1.0}, ValueError, "quantile must be a share, above 0 and below 1, not 1.0"),
        ({"quantile": 95}, ValueError, "quantile must be a share"),
        ({"quantile": "0.9"}, TypeError, "quantile must be a number, not str"),
        ({"max_share": 0}, ValueError, "max_share must be a share, above 0"),
        ({"min_delay": -1}, ValueError, "min_delay must be a finite number of seconds"),
        ({"min_delay": math.nan}, ValueError, "min_delay must be a finite number of seconds"),
        ({"min_observations": 0}, ValueError, "min_observations must be at least 1, not 0"),
        ({"min_observations": 1.5}, TypeError, "min_observations must be an int, not float"),
    ],
)
def test_a_policy_that_cannot_work_is_refused(settings: dict[str, Any], error: type[Exception], text: str) -> None:
    """An invalid policy is refused when it is created, with the name of the setting."""
    with pytest.raises(error, match=text):
        HedgePolicy(**settings)


def test_only_a_policy_switches_hedging_on() -> None:
    """Only a HedgePolicy switches hedging on, and it cannot be changed."""
    with pytest.raises(TypeError, match=r"hedge must be None or a HedgePolicy, not bool; try HedgePolicy\(\)"):
        KaizenClient(hedge=True)  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        HedgePolicy().quantile = 0.5  # type: ignore[misc]
    assert issubclass(StatusError, KaizenError)


@pytest.mark.parametrize(("arguments", "hedge"), [(["--hedge"], HedgePolicy()), ([], None)])
def test_the_command_has_an_option(
    emulator: KaizenEmulator, monkeypatch: pytest.MonkeyPatch, arguments: list[str], hedge: HedgePolicy | None
) -> None:
    """The option `--hedge` switches hedging on with the default policy."""
    emulator.add("exec_1", Life.ended(duration=5))
    given: list[object] = []

    def spy(**settings: Any) -> KaizenClient:
        given.append(settings["hedge"])
        return KaizenClient(**settings)

    monkeypatch.setattr("kaizen_async._cli.options.KaizenClient", spy)
    ran = CliRunner().invoke(cli, ["get", "exec_1", "--base-url", emulator.base_url, *arguments])
    assert (ran.exit_code, given) == (0, [hedge])
