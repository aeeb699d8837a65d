"""The scheduler decides which id is polled next, how fast, and what is kept. The tests run in virtual time."""

import asyncio
import gc
import itertools
import math
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timezone
from pathlib import Path
from random import Random
from types import FrameType, SimpleNamespace
from typing import Any

import msgspec
import pytest
from scripted_lives import (
    EVERY_SECOND,
    EVERY_TEN,
    assert_idle,
    at_once,
    ended,
    ending,
    every,
    never_ending,
    now,
    outcomes_of,
    polls_of,
    running,
    scheduler_of,
    stamp,
)
from scripted_transport import NEVER, Reply, ScriptedTransport, status
from virtual_time import VirtualLoop, virtual_time
from yarl import URL

import kaizen_async
from kaizen_async import (
    DeadlineExceededError,
    InstructorExecution,
    KaizenClient,
    NotFoundError,
    PollPolicy,
    RetryPolicy,
)
from kaizen_async._records.facts import duration_of, workflow_id_of
from kaizen_async._transport.response import Answer
from kaizen_async._waiting.calls import Queue
from kaizen_async._waiting.entry import Entry
from kaizen_async._waiting.scheduler import AT_ONCE, MOST_GROUPS
from kaizen_async._waiting.timetable import SPAN, Timetable
from kaizen_async.executions import Executions

ONE_ATTEMPT = RetryPolicy(max_attempts=1)
OURS = {
    str(path) for folder in ("_waiting", ".") for path in (Path(kaizen_async.__file__).parent / folder).glob("*.py")
}


class Fixed(msgspec.Struct):
    """A record without information."""

    id: str
    end_time: None = None


def ids(count: int, name: str = "e") -> list[str]:
    """Return a number of ids."""
    return [f"{name}{number}" for number in range(count)]


@virtual_time
async def test_a_single_wait_is_not_delayed_by_a_large_call() -> None:
    """Calls take turns, so the polls of a single wait come between two polls of a large call."""
    transport = ScriptedTransport(lambda i, _: ended(i) if i == "one" and now() > 50 else running(i), latency=1)
    async with transport.client(concurrency=2) as client:
        async with client.instructor_executions.wait_many(ids(500), poll=EVERY_TEN):
            await asyncio.sleep(30)
            assert client.stats().poll_delay > 0
            await client.instructor_executions.wait("one", poll=EVERY_TEN)
        assert polls_of(transport, "one") == [30, 41, 52]
        await assert_idle(client, transport)


@virtual_time
async def test_calls_share_the_polls_evenly() -> None:
    """Calls of any size and under any policy get equal shares of the polls."""
    transport = ScriptedTransport(never_ending, latency=1)
    async with transport.client(concurrency=3) as client:
        executions = client.instructor_executions
        async with (
            executions.wait_many(ids(1000, "big "), poll=EVERY_SECOND),
            executions.wait_many(ids(10, "small "), poll=EVERY_SECOND),
            executions.watch(ids(100, "other "), poll=EVERY_TEN),
        ):
            await asyncio.sleep(100)
        shares = Counter(i.split()[0] for i in transport.ids[50:250])
        assert shares["other"] == pytest.approx(67, abs=5)
        assert shares["big"] == pytest.approx(67, abs=5)
        assert shares["small"] == pytest.approx(67, abs=5)


@virtual_time
async def test_a_shared_id_uses_the_shorter_queue() -> None:
    """An id of two calls moves to the shorter queue, and back when the small call ends."""
    transport = ScriptedTransport(never_ending, latency=1)
    async with transport.client(concurrency=1) as client:
        executions = client.instructor_executions
        async with executions.wait_many(ids(100), poll=EVERY_SECOND):
            await asyncio.sleep(500)
            late = transport.ids[-1]
            assert not polls_of(transport, late)[-1] < 499
            before = len(polls_of(transport, late))
            with pytest.raises(DeadlineExceededError):
                await executions.wait(late, deadline=20, poll=EVERY_SECOND)
            assert len(polls_of(transport, late)) >= before + 5
            before = len(polls_of(transport, late))
            await asyncio.sleep(150)
            assert 1 <= len(polls_of(transport, late)) - before <= 2
        await assert_idle(client, transport)


@virtual_time
async def test_a_call_continues_after_its_ids_moved() -> None:
    """A call continues after its ids have moved to the queue of another call."""
    transport = ScriptedTransport(lambda i, _: ended(i), latency=1)
    async with transport.client(concurrency=1) as client:
        executions = client.instructor_executions
        async with executions.wait_many(["a"]) as outcomes:
            outcomes.add("b", "c", "d")
            await asyncio.sleep(0.5)
            await asyncio.gather(*(executions.wait(i) for i in "dcb"))
            assert {(await anext(outcomes)).id for _ in range(4)} == {"a", "b", "c", "d"}
            outcomes.add("e")
            assert (await anext(outcomes)).ok
        await assert_idle(client, transport)


@virtual_time
async def test_polls_are_as_many_at_a_time_as_the_concurrency_allows() -> None:
    """Polls and lookups together never exceed the concurrency."""
    transport = ScriptedTransport(never_ending, latency=1)
    async with transport.client(concurrency=7) as client:
        async with client.instructor_executions.wait_many(ids(200), poll=EVERY_SECOND):
            await asyncio.sleep(20.5)
            await client.instructor_executions.get_many(ids(20, "got "))
            assert transport.most_open == 7
            assert len(asyncio.all_tasks()) < 7 + 5


@pytest.mark.no_cover
@virtual_time
async def test_polls_that_cannot_keep_up_stretch_alike() -> None:
    """Overdue polls are delayed evenly over all executions, and `stats` reports the delay."""
    transport = ScriptedTransport(never_ending, latency=0.5)
    async with transport.client(concurrency=5) as client:
        async with client.instructor_executions.wait_many(ids(100), poll=EVERY_SECOND):
            await asyncio.sleep(50)
            transport.sent.clear()
            await asyncio.sleep(155)
            counts = Counter(transport.ids)
            assert len(counts) == 100
            assert max(counts.values()) - min(counts.values()) <= 1
            assert client.stats().waiting == 100
            assert client.stats().poll_delay == pytest.approx(10 - 1 - 0.5, abs=0.5)
        assert client.stats().poll_delay == 0
        assert client.stats().waiting == 0


@pytest.mark.parametrize("lazy", [True, False])
def test_polls_that_cannot_keep_up_keep_no_id_from_its_first(lazy: bool) -> None:
    """Every id gets its first poll soon even if the polls cannot keep up, and earlier ids continue to be polled."""

    @virtual_time
    async def check() -> None:
        transport = ScriptedTransport(never_ending, latency=1)
        async with transport.client(concurrency=2) as client:
            many = ids(200)
            async with client.instructor_executions.wait_many(iter(many) if lazy else many, poll=EVERY_SECOND):
                await asyncio.sleep(2 * 200 / 2)
                counts = Counter(transport.ids)
                assert len(counts) >= 190
                assert counts["e0"] > 5

    check()


@virtual_time
async def test_an_endless_source_does_not_delay_other_polls() -> None:
    """New ids get at most every second poll while other ids are due."""
    transport = ScriptedTransport(lambda i, _: running(i) if i == "e7" else ended(i), latency=1)
    async with transport.client(concurrency=1) as client:
        async with client.instructor_executions.wait_many((f"e{n}" for n in itertools.count()), poll=EVERY_TEN) as ends:
            while now() < 100:
                await anext(ends)
            polls = polls_of(transport, "e7")
            assert [b - a for a, b in itertools.pairwise(polls)] == pytest.approx([11.5] * (len(polls) - 1), abs=1)


@virtual_time
async def test_polls_in_time_have_no_delay() -> None:
    """Polls that keep up report no delay, even if there are many."""
    transport = ScriptedTransport(never_ending, latency=0.1)
    async with transport.client(concurrency=50) as client:
        async with client.instructor_executions.wait_many(ids(100), poll=EVERY_TEN):
            await asyncio.sleep(100)
            assert client.stats().poll_delay == pytest.approx(0, abs=0.2)
            assert client.stats().polls == len(transport.sent)


@pytest.mark.parametrize("rate", [0.5, 3, 500])
def test_polls_under_a_rate_are_spaced_evenly(rate: float) -> None:
    """Polls under a max_rate are evenly spaced from the first one, also when one wait follows another."""

    @virtual_time
    async def check() -> None:
        transport = at_once(never_ending)
        policy = every(1, max_rate=rate)
        async with transport.client(poll=policy) as client:
            async with client.instructor_executions.wait_many(ids(20)):
                await asyncio.sleep(15 / rate)
            async with client.instructor_executions.wait_many(ids(20, "f")):
                await asyncio.sleep(15.5 / rate)
            times = [at for at, _ in transport.sent]
            assert len(times) >= 30
            gaps = [b - a for a, b in itertools.pairwise(times)]
            assert gaps == pytest.approx([1 / rate] * len(gaps))
            assert client.stats().poll_delay == 0

    check()


@pytest.mark.parametrize("share", [0.3, 0.6])
@pytest.mark.parametrize(
    ("failure", "least"), [(status(500), 500), (status(429), 200), (status(429, retry_after="2"), 200)]
)
@virtual_time
async def test_a_rate_counts_failed_polls(share: float, failure: Any, least: int) -> None:
    """The server receives no more requests than the rate, however many polls fail, and after a pause too."""
    random = Random(1)
    transport = ScriptedTransport(lambda i, _: failure if random.random() < share else running(i))
    async with transport.client(poll=every(1, max_rate=20)) as client:
        async with client.instructor_executions.wait_many(ids(200)):
            await asyncio.sleep(30)
        assert least <= len(transport.times) <= 601
        for begin in transport.times:
            assert sum(begin <= at < begin + 1 for at in transport.times) <= 21


@virtual_time
async def test_a_rate_lost_to_late_timers_is_made_up_for_but_a_rest_is_not() -> None:
    """The scheduler makes up for timers that fire late, but a pause does not lead to a burst."""
    transport = at_once(never_ending)
    async with transport.client(poll=every(1, max_rate=100)) as client:
        clock: Any = client._binding.clock
        call_at = clock.call_at
        clock.call_at = lambda when, callback: call_at(when + 0.004, callback)
        async with client.instructor_executions.wait_many(ids(1000)):
            await asyncio.sleep(2)
            assert len(transport.sent) == pytest.approx(200, abs=3)
        await asyncio.sleep(10)
        async with client.instructor_executions.wait_many(ids(1000, "f")):
            await asyncio.sleep(0.045)
            assert len(polls_of(transport, "f0")) == 1
            assert sum(at > 10 for at in transport.times) <= 5


@virtual_time
async def test_a_rate_holds_for_its_policy_alone() -> None:
    """All waits under one policy share its rate, and waits under other policies are not affected."""
    transport = at_once(never_ending)
    slow = every(1, max_rate=1)
    async with transport.client() as client:
        executions = client.instructor_executions
        async with (
            executions.wait_many(ids(10, "slow "), poll=slow),
            executions.watch(ids(10, "also "), poll=slow),
            executions.wait_many(ids(10, "fast "), poll=EVERY_SECOND),
        ):
            await asyncio.sleep(9.5)
        counts = Counter(i.split()[0] for i in transport.ids)
        assert counts == {"slow": 5, "also": 5, "fast": 100}


@virtual_time
async def test_a_rate_holds_over_kinds() -> None:
    """Waits for different kinds of records under one policy share its rate."""
    transport = at_once(never_ending)
    slow = every(1, max_rate=1)
    async with transport.client() as client:
        other = client.lookups("other", InstructorExecution)
        async with (
            client.instructor_executions.wait_many(ids(10), poll=slow),
            other.wait_many(ids(10), poll=slow),
        ):
            await asyncio.sleep(9.5)
        assert len(transport.ids) == 10


@virtual_time
async def test_memory_for_policies_is_bounded() -> None:
    """Waits that use a new policy each time leave only a bounded number of groups behind."""
    transport = at_once(lambda execution_id, _: ended(execution_id))
    async with transport.client(ended_records=0) as client:
        for number in range(3 * MOST_GROUPS):
            await client.instructor_executions.wait("a", poll=every(number + 1))
        assert len(scheduler_of(client)._groups) <= MOST_GROUPS
        assert len(client._binding.cadences) <= MOST_GROUPS


@virtual_time
async def test_a_limiter_that_cannot_keep_up_shows_in_the_delay() -> None:
    """Polls that wait for the limiter count as delayed, although they have a slot."""

    async def slow() -> None:
        await asyncio.sleep(1)

    transport = at_once(never_ending)
    async with transport.client(concurrency=5, limiter=slow, poll=EVERY_SECOND) as client:
        async with client.instructor_executions.wait_many(ids(5)):
            await asyncio.sleep(30)
            assert client.stats().poll_delay > 0.5


@virtual_time
async def test_cancelled_ids_leave_a_rate_limited_queue() -> None:
    """Ids of a call that has ended take no place in a rate-limited queue."""
    transport = at_once(never_ending)
    async with transport.client(poll=every(1, max_rate=0.1)) as client:
        executions = client.instructor_executions
        stays = asyncio.create_task(executions.wait("stays", deadline=60))
        async with executions.wait_many(ids(50)):
            await asyncio.sleep(5)
        with pytest.raises(DeadlineExceededError):
            await stays
        assert polls_of(transport, "stays") == [0, 10, 20, 30, 40, 50]
        await assert_idle(client, transport)


@virtual_time
async def test_shared_ids_stay_queued_when_a_call_ends() -> None:
    """A call that ends removes only the ids that no other call waits for."""
    transport = ScriptedTransport(ending(0), latency=1)
    async with transport.client(concurrency=1, poll=EVERY_TEN) as client:
        executions = client.instructor_executions
        async with executions.wait_many() as leaves:
            leaves.add(*ids(40))
            async with executions.wait_many() as stays:
                stays.add(*ids(40)[::4])
                await asyncio.sleep(1.5)
                await leaves.__aexit__(None, None, None)
                assert client.stats().waiting < 12
                found = [(await anext(stays)).id for _ in range(6)]
        assert set(found) <= set(ids(40)[::4])
        assert len(transport.ids) <= 9
        await assert_idle(client, transport)


@pytest.mark.parametrize("spans", [1, 400])
def test_a_timetable_holds_few_entries_that_were_removed(spans: int) -> None:
    """Each removal cleans up a few entries of its bucket, so that no removal has to visit 100,000 entries."""
    table, random = Timetable(), Random(spans)
    entries = [Entry(name, (), 0.0, 0.0, 0.0) for name in ids(2000)]
    for number, entry in enumerate(entries):
        table.put(entry, 10 + SPAN * (number % spans))
    random.shuffle(entries)
    moved, removed = entries[:500], entries[500:]
    for entry in moved:
        table.put(entry, 100.0)
    for left in range(len(removed), 0, -1):
        assert table.held <= 2 * (left + spans) + len(moved)
        table.remove(removed[left - 1])
    assert table.next_due() <= 100
    due = [table.pop(100) for _ in moved]
    assert {entry.id for entry in due if entry is not None} == {entry.id for entry in moved}
    assert (table.pop(200), table.held, table.next_due()) == (None, 0, math.inf)


@virtual_time
async def test_polls_wait_at_the_gate() -> None:
    """A throttling response to any poll pauses all polls until the time that the server named."""
    limited_until = 30.0

    def play(execution_id: str, _: int) -> Reply:
        return status(429, retry_after="25") if 5 <= now() < limited_until else ending(60)(execution_id, 0)

    transport = at_once(play)
    async with transport.client(concurrency=10, poll=EVERY_SECOND) as client:
        outcomes = await outcomes_of(client, ids(30))
        assert all(outcome.ok for outcome in outcomes)
        assert not [at for at in transport.times if 5.5 < at < 30]
        assert client.stats().pauses == 1
        assert client.stats().throttled <= 30


@pytest.mark.no_cover
@virtual_time
async def test_polls_pause_in_an_outage() -> None:
    """In an outage, fifty polls every ten seconds become single probes, and the waits continue."""
    transport = at_once(lambda *_: status(503))
    async with transport.client(poll=EVERY_TEN) as client:
        outcomes = await outcomes_of(client, ids(50), deadline=600)
        assert {type(outcome.error) for outcome in outcomes} == {DeadlineExceededError}
        assert 100 <= len(transport.sent) <= 400
        assert len(transport.sent) == client.stats().attempts


@virtual_time
async def test_a_retry_after_of_a_poll_is_waited_out() -> None:
    """The next poll waits for the server's Retry-After, even if the policy would poll sooner."""
    transport = at_once(lambda i, number: status(500, retry_after="40") if number == 2 else ending(60)(i, number))
    async with transport.client(retry=ONE_ATTEMPT, poll=EVERY_TEN) as client:
        await client.instructor_executions.wait("a")
        assert transport.times == [0, 10, 50, 60]


@virtual_time
async def test_policies_live_side_by_side() -> None:
    """An execution that is awaited under two policies is polled at the intervals of each."""
    transport = at_once(ending(60))
    async with transport.client() as client:
        executions = client.instructor_executions
        await asyncio.gather(
            executions.wait("a", poll=EVERY_TEN), executions.wait("a", poll=every(7)), executions.wait("b")
        )
        assert polls_of(transport, "a") == sorted({*range(0, 61, 10), *range(0, 57, 7)})


@virtual_time
async def test_equal_lookups_return_one_object() -> None:
    """Equal arguments to `lookups` return the same object, which shares its polls and its state."""
    transport = at_once(ending(5))
    async with transport.client(poll=EVERY_SECOND) as client:

        class Brief(msgspec.Struct, rename="camel"):
            id: str
            end_time: datetime | None

        path = "instructor/executions/get"
        assert client.lookups(path, Brief) is client.lookups(path, Brief)
        assert client.lookups(path, Brief) is not client.lookups(path, Brief, unwrap="execution")
        await asyncio.gather(*(client.lookups(path, Brief).wait("a") for _ in range(10)))
        assert transport.times == [0, 1, 2, 3, 4, 5]
        assert len(client._binding.cadences) == len(scheduler_of(client)._groups) == 1


FIELDS: dict[str, Any] = {
    "lag_share": 0.4,
    "lag_seconds": 2.0,
    "min_interval": 5.0,
    "max_interval": 4.0,
    "spread": 0.0,
    "max_rate": 0.2,
    "not_found_grace": 20.0,
    "refusal_patience": 1.0,
    "learn": False,
}


@pytest.mark.parametrize(("field", "setting"), FIELDS.items(), ids=FIELDS)
def test_every_field_of_a_policy_changes_when_polls_come(field: str, setting: Any) -> None:
    """Each field of a policy alone changes the times of the polls."""

    def play(execution_id: str, _: int) -> Reply:
        if now() < 40 and execution_id == "refused":
            return status(403)
        return status(404) if now() < 10 and execution_id == "unknown" else ending(100)(execution_id, 0)

    def polls(policy: PollPolicy) -> dict[str, list[float]]:
        seen: dict[str, list[float]] = {}

        @virtual_time
        async def observe() -> None:
            transport = at_once(play)
            async with transport.client(poll=policy) as client:
                await outcomes_of(client, ["a", "unknown", "refused"])
                start = now()
                transport._play = lambda i, _: ending(start + 100)(i, 0)
                await outcomes_of(client, ["later"])
                seen.update({i: polls_of(transport, i) for i in ("a", "unknown", "refused", "later")})

        observe()
        return seen

    plain = PollPolicy()
    assert polls(plain) == polls(plain)
    assert polls(msgspec.structs.replace(plain, **{field: setting})) != polls(plain)


def test_there_is_no_other_field() -> None:
    """Every field of the policy has an entry above, so a new field needs a test."""
    assert set(FIELDS) == set(PollPolicy.__struct_fields__)


@virtual_time
async def test_ages_count_from_the_start_time_of_the_record() -> None:
    """Ages count from the record's start time, so an old execution is polled rarely from the first poll on.

    A start time in the future counts as now.
    """
    transport = at_once(lambda i, _: running(i, startTime=stamp({"old": -3000, "future": 5000}.get(i, now()))))
    policy = PollPolicy(spread=0, max_interval=1000)
    async with transport.client(poll=policy) as client:
        await outcomes_of(client, ["old", "future"], deadline=400)
        assert polls_of(transport, "old")[:2] == [0, 300]
        assert polls_of(transport, "future")[:3] == [0, 1, 2]


@virtual_time
async def test_a_wall_clock_that_jumps_does_no_harm() -> None:
    """If the wall clock jumps, intervals stay within the policy's bounds and deadlines do not move."""
    jump = iter([0, 1e7, -1e7, 3.3e8, -1.6e9] * 10)
    transport = at_once(lambda i, number: running(i, f"state {number}"))
    async with transport.client(poll=PollPolicy(spread=0)) as client:
        clock: Any = client._binding.clock
        wall = clock.wall
        clock.wall = lambda: wall() + next(jump)
        with pytest.raises(DeadlineExceededError):
            await client.instructor_executions.wait("a", deadline=100)
        assert now() == 100
        gaps = [b - a for a, b in itertools.pairwise(transport.times)]
        assert min(gaps) >= 1
        assert max(gaps) <= 15


@virtual_time
async def test_ended_waits_leave_the_timetable() -> None:
    """Hundreds of short waits under a policy with long intervals do not accumulate in the timetable."""
    transport = at_once(never_ending)
    policy = PollPolicy(min_interval=1800, max_interval=3600)
    async with transport.client(poll=policy) as client:
        scheduler = scheduler_of_started(client)
        async with client.instructor_executions.wait_many(ids(10)):
            await asyncio.sleep(1)
            for number in range(300):
                with pytest.raises(DeadlineExceededError):
                    await client.instructor_executions.wait(f"f{number}", deadline=0.01)
                assert scheduler._timetable.held <= 2 * 10 + 100 + 2
            assert client.stats().waiting == 10
        await assert_idle(client, transport)


def scheduler_of_started(client: KaizenClient) -> Any:
    """Return the scheduler of a client, and create it if necessary."""
    return client._binding.polls(client.instructor_executions._endpoint, None)[0]


@virtual_time
async def test_many_due_at_once_are_started_in_small_steps() -> None:
    """The scheduler starts thousands of due polls in small steps, so that it does not block the loop."""
    loop: Any = asyncio.get_running_loop()
    started: Counter[int] = Counter()

    def play(execution_id: str, _: int) -> Reply:
        started[loop._jumping.steps_left] += 1
        return running(execution_id)

    count = 4 * AT_ONCE
    transport = at_once(play)
    async with transport.client(concurrency=count) as client:
        async with client.instructor_executions.wait_many(ids(count), poll=every(100)):
            await asyncio.sleep(101)
            assert started.total() == 2 * count
            assert max(started.values()) <= 2 * AT_ONCE


@virtual_time
async def test_a_queue_of_stale_entries_is_skipped_in_small_steps() -> None:
    """The scheduler skips thousands of expired entries in small steps, and the next valid poll starts at once."""
    transport = ScriptedTransport(lambda i, _: (NEVER, running(i)) if i == "blocks" else ended(i), latency=0)
    async with transport.client(concurrency=1, attempt_timeout=50, deadline=50) as client:
        executions = client.instructor_executions
        blocking = asyncio.create_task(executions.wait("blocks", deadline=20))
        await asyncio.sleep(1)
        stream = executions.wait_many(deadline=10)
        async with stream as outcomes:
            outcomes.add(*ids(3 * AT_ONCE))
            last = asyncio.create_task(executions.wait("last"))
            await asyncio.sleep(15)
            with pytest.raises(DeadlineExceededError):
                await blocking
            assert now() == 20
            await last
            assert now() == 20
            errors = [type(outcome.error) async for outcome in outcomes]
            assert errors == [DeadlineExceededError] * 3 * AT_ONCE
        assert transport.ids == ["blocks", "last"]
        await assert_idle(client, transport)


def test_an_entry_costs_less_than_a_kibibyte() -> None:
    """An awaited id takes less than one KiB besides its id and its last record. Here all ids share one record."""
    count = 2000
    record = Fixed("a")

    class SameRecord:
        """An endpoint that decodes every response to the same record."""

        url = URL("instructor/executions/get")
        record = Fixed

        def url_below(self, base_url: URL) -> URL:
            return base_url.join(self.url)

        def decode(self, body: bytes, execution_id: str) -> Fixed:
            return record

    async def measure() -> float:
        transport = at_once(never_ending)
        async with transport.client(concurrency=500) as client:
            endpoint: Any = SameRecord()
            verbs = Executions[Fixed](client._binding, endpoint)
            names = ids(count)
            polled = asyncio.Event()
            gc.collect()
            tracemalloc.start()
            async with verbs.wait_many(names, poll=every(1000)):
                asyncio.get_running_loop().call_later(10, polled.set)
                await polled.wait()
                assert client.stats().polls == count
                transport.sent.clear()
                transport.numbers.clear()
                gc.collect()
                held = tracemalloc.get_traced_memory()[0] / count
            tracemalloc.stop()
            return held

    with asyncio.Runner(loop_factory=VirtualLoop, debug=False) as runner:
        assert runner.run(measure()) < 1024


def test_the_collector_need_not_visit_an_entry() -> None:
    """The garbage collector does not track entries, because there may be a hundred thousand of them."""
    entry = Entry("a", (1,), 0.0, 0.0, 0.0)
    assert not gc.is_tracked(entry)
    assert not hasattr(entry, "__dict__")


def test_the_collector_need_not_visit_queued_entries() -> None:
    """A queue of many entries holds them where the garbage collector does not look, and keeps their order."""
    queue = Queue()
    entries = [Entry(f"exec_{number}", (), 0.0, 0.0, 0.0) for number in range(1000)]
    taken = []
    for entry in entries:
        queue.append(entry)
        if entry.id.endswith("9"):
            assert queue.first() is entries[len(taken)]
            taken.append(queue.popleft())
    gc.collect()
    seen = sum(isinstance(thing, Entry) for thing in gc.get_referents(*_tracked_parts(queue)))
    assert seen < 300
    while queue:
        taken.append(queue.popleft())
    assert taken == entries


def _tracked_parts(queue: Queue) -> list[object]:
    """Return the containers in a queue that the garbage collector visits."""
    parts = gc.get_referents(queue)
    parts += gc.get_referents(*(part for part in parts if gc.is_tracked(part)))
    return [part for part in parts if isinstance(part, (list, tuple)) and gc.is_tracked(part)]


@virtual_time
async def test_an_outage_keeps_little_of_its_errors() -> None:
    """The scheduler keeps the last error of each id without the body of its response and without its cause."""
    body = Answer(503, {}, b"x" * 10_000)
    transport = at_once(lambda *_: body)
    async with transport.client(retry=ONE_ATTEMPT, poll=EVERY_TEN) as client:
        outcomes = await outcomes_of(client, ids(5), deadline=5)
        for outcome in outcomes:
            assert outcome.error is not None
            cause = outcome.error.__cause__
            assert getattr(cause, "status", None) == 503
            assert getattr(cause, "body", None) == b""


def test_workflows_and_durations_are_read_off_any_record() -> None:
    """The scheduler reads workflow and duration from any record, and ignores missing or invalid values."""
    start, end = datetime(2026, 1, 1, 12, tzinfo=UTC), datetime(2026, 1, 1, 12, 0, 30, tzinfo=UTC)
    assert duration_of(SimpleNamespace(end_time=end, start_time=start, duration_ms=1500)) == 1.5
    assert duration_of(SimpleNamespace(end_time=end, start_time=start, duration_ms=None)) == 30
    assert duration_of(SimpleNamespace(end_time=end, start_time=start.replace(tzinfo=None))) == 30
    assert duration_of(SimpleNamespace(end_time=end.astimezone(timezone.max), start_time=start)) == 30
    assert duration_of(SimpleNamespace(end_time="later", start_time=start)) is None
    assert duration_of(SimpleNamespace(end_time=end)) is None
    assert workflow_id_of(SimpleNamespace(workflow=SimpleNamespace(id="wf_1"))) == "wf_1"
    assert workflow_id_of(SimpleNamespace(workflow=SimpleNamespace(id=3))) is None
    assert workflow_id_of(SimpleNamespace()) is None
    assert workflow_id_of(None) is None


@virtual_time
async def test_records_without_times_are_waited_for() -> None:
    """The age of a record without a start time counts from its first poll."""

    class Bare(msgspec.Struct, rename="camel"):
        id: str
        end_time: str | None = None

    transport = at_once(ending(100))
    async with transport.client(poll=PollPolicy(spread=0)) as client:
        await client.lookups("instructor/executions/get", Bare).wait("a")
        assert transport.times[-1] >= 100
        assert len(transport.sent) < 60


@pytest.mark.no_cover
@virtual_time
async def test_ended_executions_teach_the_cadence() -> None:
    """After several ends of a workflow, its executions are polled around their likely end."""

    def play(execution_id: str, _: int) -> Reply:
        begun, _, _name = execution_id.partition(" ")
        return (
            ended(execution_id, 0, **spans(float(begun)))
            if now() >= float(begun) + 200
            else running(execution_id, startTime=stamp(float(begun)))
        )

    def spans(begun: float) -> dict[str, Any]:
        return {"startTime": stamp(begun), "endTime": stamp(begun + 200), "durationMs": 200_000}

    async def polls(client: KaizenClient, transport: ScriptedTransport, count: int) -> float:
        before, begun = len(transport.sent), now()
        await outcomes_of(client, [f"{begun} {number}" for number in range(count)])
        return (len(transport.sent) - before) / count

    transport = at_once(play)
    async with transport.client(poll=PollPolicy(max_interval=600)) as client:
        await polls(client, transport, 100)
        learned = await polls(client, transport, 20)
    transport = at_once(play)
    async with transport.client(poll=PollPolicy(max_interval=600, learn=False)) as client:
        assert learned < 0.7 * await polls(client, transport, 20)


@virtual_time
async def test_learn_accepts_durations_from_elsewhere() -> None:
    """`learn` uses durations from other processes in the same way as durations that this client has seen."""

    def later_ending(execution_id: str, _: int) -> Reply:
        begun = float(execution_id)
        if now() >= begun + 1000:
            return ended(execution_id, begun + 1000, startTime=stamp(begun), durationMs=1e6)
        return running(execution_id, startTime=stamp(begun))

    transport = at_once(later_ending)
    async with transport.client(poll=PollPolicy(max_interval=600)) as client:
        await client.instructor_executions.wait("0")
        await asyncio.sleep(2000 - now())
        before = len(transport.sent)
        client.instructor_executions.learn(("wf_1", 1000.0) for _ in range(50))
        await client.instructor_executions.wait("2000")
        assert len(transport.sent) - before < 0.8 * before


@virtual_time
async def test_an_end_without_a_duration_teaches_nothing() -> None:
    """The cadence learns nothing from a finished execution without a duration and without times."""
    transport = at_once(lambda i, _: ended(i, startTime=None, durationMs=None))
    async with transport.client() as client:
        await client.instructor_executions.wait("a")
        (cadence,) = client._binding.cadences.values()
        assert cadence.state()["workflows"] == {}


@virtual_time
async def test_a_poll_and_a_lookup_share_a_request() -> None:
    """A poll and a lookup of the same id share one request, whichever starts first."""
    transport = ScriptedTransport(never_ending, latency=1)
    async with transport.client() as client:
        executions = client.instructor_executions
        async with executions.wait_many(["a"], poll=EVERY_TEN):
            await asyncio.sleep(0.5)
            await executions.get("a")
            assert len(transport.sent) == 1
            await asyncio.sleep(9.5)
            await executions.get("a")
            await asyncio.sleep(0.5)
            assert client.stats().polls == 2
            assert len(transport.sent) == 2


def test_the_work_for_a_poll_does_not_grow_with_the_number_of_ids() -> None:
    """The number of function calls for each poll is the same for ten times as many ids."""

    def calls_per_poll(count: int) -> float:
        calls = 0

        def note(frame: FrameType, event: str, _: object) -> None:
            nonlocal calls
            calls += event == "call" and frame.f_code.co_filename in OURS

        async def work() -> int:
            transport = at_once(lambda i, number: ended(i) if i[-1] == "7" and number > 3 else running(i, f"s{number}"))
            async with transport.client(concurrency=count, poll=EVERY_TEN) as client:
                executions = client.instructor_executions
                async with executions.wait_many(ids(count)) as outcomes, executions.watch(ids(count)) as changes:
                    await asyncio.sleep(55)
                    for _ in range(count // 10):
                        await anext(outcomes)
                        await anext(changes)
                return client.stats().polls

        with asyncio.Runner(loop_factory=VirtualLoop, debug=False) as runner:
            sys.setprofile(note)
            try:
                polls = runner.run(work())
            finally:
                sys.setprofile(None)
        return calls / polls

    assert calls_per_poll(400) < 1.1 * calls_per_poll(40)


@virtual_time
async def test_an_id_not_found_ends_alone() -> None:
    """An id that is not found ends alone, and the other ids of its call continue."""

    def generated() -> Iterator[str]:
        yield from ("a", "missing", "b")

    transport = at_once(lambda i, _: status(404) if i == "missing" else ending(5)(i, 0))
    async with transport.client(poll=EVERY_SECOND) as client:
        outcomes = await outcomes_of(client, generated())
        assert [(outcome.id, type(outcome.error)) for outcome in outcomes] == [
            ("missing", NotFoundError),
            ("a", type(None)),
            ("b", type(None)),
        ]
