"""Waits run on the real clock or on a virtual clock that a test advances."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from virtual_time import LoopClock, virtual_time

from kaizen_async import DeadlineExceededError, KaizenClient, PollPolicy, RetryPolicy
from kaizen_async.clock import RunningTimeout, Sweep, SystemClock, Timeout, sleep
from kaizen_async.testing import Fault, KaizenEmulator, Life, VirtualClock
from kaizen_async.testing.clock import IDLE_STEPS, _LoopPart

HOURS = 3600.0
NEW_YEAR = datetime(2026, 1, 1, tzinfo=UTC)


async def test_the_system_clock_follows_the_system() -> None:
    """The system clock uses the monotonic time for intervals and the wall time for dates."""
    clock = SystemClock()
    before = time.monotonic(), time.time()
    assert before[0] <= clock.time() <= time.monotonic()
    assert before[1] <= clock.wall() <= time.time()
    called = asyncio.Event()
    start = clock.time()
    clock.call_at(start + 0.01, called.set)
    clock.call_at(start, pytest.fail).cancel()
    clock.hold()
    clock.release()
    await called.wait()
    assert clock.time() >= start + 0.009
    assert clock.random.random() != SystemClock().random.random()


async def test_sleep_ends_at_its_time_or_when_cancelled() -> None:
    """A sleep ends at its time. A cancelled sleep cancels its timer."""
    clock = VirtualClock()
    await sleep(clock, 5)
    assert clock.time() == 5
    task = asyncio.create_task(sleep(clock, 100))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    await sleep(clock, 200)
    assert clock.time() == 205


async def test_virtual_time_jumps_to_the_next_timer() -> None:
    """Virtual time jumps from timer to timer, in order of time and then of registration, and skips cancelled timers."""
    clock = VirtualClock(epoch=NEW_YEAR)
    seen: list[tuple[str, float]] = []
    over = asyncio.Event()

    def note(name: str) -> None:
        seen.append((name, clock.time()))

    clock.call_at(30, lambda: note("last"))
    clock.call_at(20, lambda: note("second"))
    clock.call_at(10, lambda: note("first"))
    clock.call_at(20, lambda: note("third"))
    clock.call_at(15, lambda: note("never")).cancel()
    clock.call_at(40, over.set)
    real = time.monotonic()
    await over.wait()
    assert seen == [("first", 10), ("second", 20), ("third", 20), ("last", 30)]
    assert clock.time() == 40
    assert clock.wall() == NEW_YEAR.timestamp() + 40
    assert time.monotonic() - real < 10


async def test_a_timer_that_is_due_runs_at_once() -> None:
    """A timer that is already due runs at once, even while a request holds the clock."""
    clock = VirtualClock()
    called = asyncio.Event()
    clock.hold()
    clock.call_at(0, called.set)
    clock.call_at(-5, called.set).cancel()
    await called.wait()
    assert clock.time() == 0
    clock.release()


async def test_virtual_time_stands_still_while_it_is_held() -> None:
    """Virtual time does not advance until every hold has been released."""
    clock = VirtualClock()
    over = asyncio.Event()
    clock.hold()
    clock.hold()
    clock.call_at(1, over.set)
    for _ in range(2):
        for _ in range(3 * IDLE_STEPS):
            await asyncio.sleep(0)
        assert clock.time() == 0
        clock.release()
    await over.wait()
    assert clock.time() == 1


async def test_virtual_time_waits_for_results_to_travel() -> None:
    """A chain of tasks, each of which starts the next, takes no virtual time."""
    clock = VirtualClock()
    clock.call_at(100, lambda: None)
    for _ in range(5 * IDLE_STEPS):
        await asyncio.sleep(0)
        clock.call_at(50, lambda: None).cancel()
    assert clock.time() == 0


async def test_a_callback_that_raises_does_not_stop_the_clock() -> None:
    """The loop's exception handler gets an error of a callback, and the clock continues."""
    clock = VirtualClock()
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    over = asyncio.Event()
    clock.call_at(1, lambda: 1 // 0)
    clock.call_at(2, over.set)
    await over.wait()
    assert [type(complaint["exception"]) for complaint in complaints] == [ZeroDivisionError]


def test_a_virtual_clock_serves_one_loop_after_another() -> None:
    """In the next event loop, a virtual clock keeps its time and drops the timers and holds of the last loop."""
    clock = VirtualClock()

    async def first() -> None:
        await sleep(clock, 5)
        clock.call_at(6, lambda: pytest.fail("of a loop that is gone"))
        clock.hold()

    async def second() -> None:
        await sleep(clock, 5)
        assert clock.time() == 10
        clock.hold()
        clock.release()

    asyncio.run(first())
    asyncio.run(second())


def test_the_epoch_is_a_moment() -> None:
    """The epoch defaults to the present, and an epoch without a time zone is refused."""
    before = time.time()
    assert before <= VirtualClock().wall() <= time.time()
    with pytest.raises(ValueError, match="time zone"):
        VirtualClock(epoch=NEW_YEAR.replace(tzinfo=None))


def test_equal_seeds_give_equal_numbers() -> None:
    """Equal seeds give equal random numbers, and different seeds give different ones."""
    assert VirtualClock(seed=1).random.random() == VirtualClock(seed=1).random.random()
    assert VirtualClock(seed=1).random.random() != VirtualClock(seed=2).random.random()


class MomentLock:
    """A lock before which another event loop gets a moment, as soon as `is_armed`."""

    def __init__(self, moment: Callable[[], object]) -> None:
        self.is_armed = False
        self._moment = moment

    def __enter__(self) -> None:
        if self.is_armed:
            self._moment()

    def __exit__(self, *_: object) -> None:
        pass


async def test_another_loop_does_not_jump_over_what_a_timer_led_to() -> None:
    """While a loop has not yet run what a timer woke, another loop that uses the clock does not move time."""
    clock = VirtualClock()
    with contextlib.closing(asyncio.new_event_loop()) as other:
        part = clock._parts[other] = _LoopPart(other)
        lock = clock._lock = MomentLock(lambda: clock._jump(part))  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
        woken = asyncio.get_running_loop().create_future()

        def wake() -> None:
            woken.set_result(None)
            lock.is_armed = True

        clock.call_at(1, wake)
        clock.call_at(3600, lambda: None)
        await woken
        assert clock.time() == 1


@contextlib.asynccontextmanager
async def world(clock: VirtualClock, **settings: Any) -> AsyncIterator[tuple[KaizenEmulator, KaizenClient]]:
    """Run an emulator and a client in virtual time."""
    async with KaizenEmulator(clock=clock) as emulator:
        async with KaizenClient(base_url=emulator.base_url, clock=clock, **settings) as client:
            yield emulator, client


async def test_three_hours_pass_on_real_sockets_in_a_moment() -> None:
    """`watch` follows a scripted life of three virtual hours over real sockets, including an unknown status."""
    life = Life.of(("Enqueued", 0), ("InProgress", 600), ("Zorp", 2 * HOURS), ("Completed", 3 * HOURS))
    clock = VirtualClock()
    real = time.monotonic()
    async with world(clock, poll=PollPolicy(max_interval=600)) as (emulator, client):
        emulator.add("exec_1", life)
        seen = []
        async with client.instructor_executions.watch("exec_1", deadline=4 * HOURS) as changes:
            async for change in changes:
                assert change.after is not None
                seen.append(change.after.status.value)
        assert seen == ["Enqueued", "InProgress", "Zorp", "Completed"]
        assert 3 * HOURS <= clock.time() <= 3 * HOURS + 660
    assert time.monotonic() - real < 60


async def polled_at(seed: int) -> list[float]:
    """Return the times at which an execution with faults is polled."""
    clock = VirtualClock(seed=seed, epoch=NEW_YEAR)
    async with KaizenEmulator(clock=clock.time, epoch=clock.epoch) as emulator:
        emulator.add("exec_1", Life.lasting(300))
        emulator.faults.next(Fault.status(503), times=3)
        async with KaizenClient(base_url=emulator.base_url, clock=clock) as client:
            await client.instructor_executions.wait("exec_1")
        return [request.at for request in emulator.requests]


async def test_virtual_time_is_deterministic() -> None:
    """The same seed gives polls at exactly the same times, although back-off and intervals are random."""
    times = await polled_at(1)
    assert len(times) > 20
    assert await polled_at(1) == times
    assert await polled_at(2) != times


async def test_back_off_pauses_and_deadlines_pass_in_virtual_time() -> None:
    """Only requests take real time. Back-off, pauses and deadlines pass in virtual time."""
    clock = VirtualClock()
    real = time.monotonic()
    retry = RetryPolicy(max_attempts=3, initial_backoff=3600, max_backoff=3600)
    async with world(clock, deadline=4 * HOURS, retry=retry) as (emulator, client):
        emulator.add("a", Life.ended())
        emulator.faults.next(Fault.status(503, headers={"Retry-After": "7200"}))
        emulator.faults.next(Fault.status(500))
        await client.instructor_executions.get("a")
        assert clock.time() >= 2 * HOURS
        emulator.add("b", Life.running())
        start = clock.time()
        with pytest.raises(DeadlineExceededError):
            await client.instructor_executions.wait("b", deadline=24 * HOURS, poll=PollPolicy(max_interval=HOURS))
        assert clock.time() == start + 24 * HOURS
    assert time.monotonic() - real < 60


async def test_many_waits_share_virtual_time() -> None:
    """Waits for many executions end in order, each at its own virtual time."""
    clock = VirtualClock()
    async with world(clock) as (emulator, client):
        for number in range(10):
            emulator.add(f"e{number}", Life.lasting(60 + 20 * number))
        ends = []
        async with client.instructor_executions.wait_many(f"e{number}" for number in range(10)) as outcomes:
            async for outcome in outcomes:
                ends.append((outcome.id, clock.time()))
        assert [end[0] for end in ends] == [f"e{number}" for number in range(10)]
        assert all(60 + 20 * number <= end[1] <= 60 + 20 * number + 16 for number, end in enumerate(ends))


@pytest.mark.parametrize(
    ("seconds", "deadline"), [(20.0, math.inf), (1000.0, 10.0)], ids=["the sweep finds it", "its deadline comes first"]
)
@virtual_time
async def test_a_request_is_ended_when_its_time_is_over(seconds: float, deadline: float) -> None:
    """The shared sweep ends a request at its timeout. An earlier deadline gets its own timer."""
    now = asyncio.get_running_loop().time
    in_flight: list[RunningTimeout] = []

    def take_long(late: float) -> None:
        for timeout in in_flight:
            timeout.take_long(late)

    sweep = Sweep(LoopClock(), now, seconds, take_long)
    timeout = RunningTimeout(LoopClock(), seconds, now() + deadline, sweep)
    in_flight.append(timeout)
    with pytest.raises(TimeoutError), timeout:
        await asyncio.Event().wait()
    assert now() == pytest.approx(min(seconds, deadline))
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()
    sweep.stop()
    sweep.stop()


@virtual_time
async def test_a_wait_that_is_ended_twice_ends_once() -> None:
    """A timeout that expires twice raises one TimeoutError."""
    timeout = Timeout(LoopClock(), math.inf)
    with pytest.raises(TimeoutError):
        async with timeout:
            timeout.expire()
            await sleep(LoopClock(), 1.0)
    timeout.expire()


async def test_a_cancellation_counts_more_than_a_timeout_at_the_same_time() -> None:
    """A task that is cancelled while its request times out ends as cancelled."""
    clock = SystemClock()
    timeout = RunningTimeout(clock, 1000.0, math.inf)

    async def send() -> None:
        with timeout:
            await asyncio.Event().wait()

    task = asyncio.create_task(send())
    await asyncio.sleep(0)
    task.cancel()
    timeout.expire()
    timeout.expire()
    with pytest.raises(asyncio.CancelledError):
        await task
    timeout.expire()
    assert task.cancelled()


@virtual_time
async def test_a_late_sweep_gives_a_request_no_more_than_its_time() -> None:
    """A late sweep does not add to the time of a request that started after the sweep was due."""
    now = asyncio.get_running_loop().time
    timeout = RunningTimeout(LoopClock(), 20.0, math.inf, Sweep(LoopClock(), now, 1000.0, lambda _: None))
    with pytest.raises(TimeoutError), timeout:
        timeout.take_long(50.0)
        await asyncio.Event().wait()
    assert now() == pytest.approx(20.0)


@virtual_time
async def test_a_sweep_keeps_a_timer_that_is_set() -> None:
    """A sweep keeps an existing timer, and sets none for a request that has ended."""
    now = asyncio.get_running_loop().time
    sweep = Sweep(LoopClock(), now, 40.0, lambda _: None)
    early, late = (RunningTimeout(LoopClock(), 40.0, now() + when, sweep) for when in (5.0, 1000.0))
    with pytest.raises(TimeoutError), early:
        early.take_long(0.0)
        await asyncio.Event().wait()
    with late:
        pass
    sweep.stop()
