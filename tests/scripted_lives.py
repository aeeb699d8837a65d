"""Executions that start at 0 and end in virtual time, and helpers for the tests of waits."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from scripted_transport import Reply, ScriptedTransport, record
from virtual_time import LoopClock

from kaizen_async import Change, InstructorExecution, KaizenClient, Outcome, PollPolicy
from kaizen_async._transport.transport import Answer
from kaizen_async._waiting.scheduler import Scheduler


def every(seconds: float, **settings: Any) -> PollPolicy:
    """Return a policy of polls at even intervals, except for a last poll before a deadline."""
    return PollPolicy(lag_seconds=1e6, min_interval=1, max_interval=seconds, spread=0, learn=False, **settings)


EVERY_SECOND = every(1)
EVERY_TEN = every(10)


def now() -> float:
    """Return the loop's time."""
    return asyncio.get_running_loop().time()


def stamp(seconds: float) -> str:
    """Return a virtual time in the format of records."""
    return datetime.fromtimestamp(LoopClock().wall() - now() + seconds, UTC).isoformat()


def running(execution_id: str, state: str = "InProgress", **fields: Any) -> Answer:
    """Return the record of an execution that has not ended."""
    return record(execution_id, **{"startTime": stamp(0), "status": state, **fields})


def ended(execution_id: str, at: float = 1.0, state: str = "Completed", **fields: Any) -> Answer:
    """Return the record of an execution that ended."""
    ends = {"endTime": stamp(at), "durationMs": at * 1000, "status": state}
    return running(execution_id, **{**ends, **fields})


def ending(ends: Mapping[str, float] | float) -> Callable[[str, int], Reply]:
    """Return a play in which each execution ends at its own time, or all at one time."""

    def play(execution_id: str, _: int) -> Reply:
        at = ends if isinstance(ends, (int, float)) else ends[execution_id]
        return ended(execution_id, at) if now() >= at else running(execution_id)

    return play


def never_ending(execution_id: str, _: int) -> Reply:
    """Respond with a record that never ends."""
    return running(execution_id)


def at_once(play: Callable[[str, int], Reply] = never_ending) -> ScriptedTransport:
    """Return a transport whose requests take no time, so that polls come at exact times."""
    return ScriptedTransport(play, latency=0)


def polls_of(transport: ScriptedTransport, execution_id: str) -> list[float]:
    """Return the times of the polls for an execution."""
    return [round(at, 6) for at, asked in transport.sent if asked == execution_id]


def scheduler_of(client: KaizenClient) -> Scheduler:
    """Return the scheduler of a client."""
    assert client._binding.scheduler is not None
    return client._binding.scheduler


async def outcomes_of(client: KaizenClient, ids: Any, **settings: Any) -> list[Outcome[InstructorExecution]]:
    """Wait for ids with `wait_many`, and return all outcomes in order."""
    async with client.instructor_executions.wait_many(ids, **settings) as outcomes:
        return [outcome async for outcome in outcomes]


async def changes_of(client: KaizenClient, ids: Any, **settings: Any) -> list[Change[InstructorExecution]]:
    """Watch ids, and return all changes."""
    async with client.instructor_executions.watch(ids, **settings) as changes:
        return [change async for change in changes]


def states(changes: Iterable[Change[InstructorExecution]]) -> list[tuple[str | None, str | None]]:
    """Return the statuses before and after each change."""
    return [
        (change.before and change.before.status.value, change.after and change.after.status.value) for change in changes
    ]


async def later(ids: Iterable[str], pause: float = 0.0) -> AsyncIterator[str]:
    """Yield ids asynchronously."""
    for execution_id in ids:
        await asyncio.sleep(pause)
        yield execution_id


async def assert_idle(client: KaizenClient, transport: ScriptedTransport) -> None:
    """Fail if a client without callers still waits, polls, or plans to poll."""
    for _ in range(5):
        await asyncio.sleep(0)
    scheduler = scheduler_of(client)
    assert client.stats().waiting == 0
    assert client.stats().in_flight == 0
    assert transport.open == 0
    assert scheduler._polls == 0
    assert not scheduler._timetable.held
    assert not scheduler._turns
    assert not scheduler._calls
    assert scheduler._timer is None
