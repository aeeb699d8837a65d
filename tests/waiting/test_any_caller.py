"""What holds for every caller and every server, looked for by Hypothesis: one outcome per id, nothing left over."""

import asyncio
import math
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_lives import ended, now, running
from scripted_transport import Reply, ScriptedTransport, status
from virtual_time import run

from kaizen_async import ClientClosedError, InvalidIdError, KaizenClient, PollPolicy
from kaizen_async._transport.response import Answer
from kaizen_async._waiting.scheduler import Scheduler

searched = settings(max_examples=150, deadline=None, derandomize=True, database=None)

HTML = b"<html><body>One moment, please</body></html>"
DISTURBANCES: dict[str, Answer] = {
    **{str(code): status(code) for code in (302, 400, 401, 403, 407, 409, 422, 501, 503)},
    "rejected": status(429, retry_after="1"),
    "a page": Answer(200, {}, HTML),
    "404 of a deployment": Answer(404, {}, HTML),
    "no record": Answer(200, {}, b'{"error": "try later"}'),
}
WAITS = ("wait_many", "watch")


class Stop(BaseException):
    """An exception that is no Exception, as some libraries raise."""


ERRORS: list[Callable[[], BaseException]] = [
    asyncio.CancelledError,
    GeneratorExit,
    lambda: KeyError("id"),
    lambda: StopAsyncIteration("x"),
    Stop,
    TimeoutError,
]


@dataclass(frozen=True)
class Phase:
    """Some seconds in which a share of the responses are of one kind."""

    seconds: float
    kind: str
    share: float


@dataclass(frozen=True)
class Caller:
    """How a program calls, and where its ids come from."""

    verb: str
    ids: list[Any]
    source: str
    pause: float
    freeze: float
    readers: int
    raises: Callable[[], BaseException] | None
    leaves_after: int | None
    closes_at: float


def scripted(phases: list[Phase], lives: int, random: Random) -> Callable[[str, int], Reply]:
    """Return a server that misbehaves in phases, and then works. Its executions end one after the other."""

    def play(execution_id: str, _: int) -> Reply:
        left = now()
        for phase in phases:
            if left < phase.seconds:
                if random.random() < phase.share:
                    return DISTURBANCES[phase.kind]
                break
            left -= phase.seconds
        ends_at = 3.0 * (hash(execution_id) % lives)
        return ended(execution_id, ends_at) if now() >= ends_at else running(execution_id)

    return play


def pass_time(seconds: float) -> None:
    """Block the event loop."""
    loop: Any = asyncio.get_running_loop()
    loop._jumping.now += seconds


def source_of(caller: Caller, collection: Any) -> Any:
    """Return the ids in the way that the caller passes them."""

    def one_by_one() -> Iterator[Any]:
        for execution_id in caller.ids:
            pass_time(caller.pause)
            yield execution_id
        if caller.raises is not None:
            raise caller.raises()

    async def as_they_come() -> AsyncIterator[Any]:
        for execution_id in caller.ids:
            await asyncio.sleep(caller.pause)
            yield execution_id
        if caller.raises is not None:
            raise caller.raises()

    if caller.source == "generator":
        return one_by_one()
    return as_they_come() if caller.source == "asynchronous" else collection


times = st.sampled_from([1, 8])
"""How often the ids are repeated. A stream reads some twenty ahead: a short source is read at once."""
callers = st.builds(
    Caller,
    verb=st.sampled_from(["stream", "wait_many", "watch", "get_many"]),
    ids=st.builds(list.__mul__, st.lists(st.sampled_from([*"abcdefgh", "x\n", "", None, 3]), max_size=12), times),
    source=st.sampled_from(["list", "deque", "generator", "asynchronous"]),
    pause=st.sampled_from([0.0, 0.02, 0.5]),
    freeze=st.sampled_from([0.0, 0.0, 3.0, 400.0]),
    readers=st.integers(1, 3),
    raises=st.none() | st.sampled_from(ERRORS),
    leaves_after=st.none() | st.integers(0, 5),
    closes_at=st.sampled_from([math.inf, math.inf, 0.0, 2.0, 7.5]),
)
phases = st.lists(
    st.builds(
        Phase,
        seconds=st.sampled_from([0.4, 3.0, 8.0]),
        kind=st.sampled_from(sorted(DISTURBANCES)),
        share=st.sampled_from([0.03, 0.5, 1.0]),
    ),
    max_size=3,
)


@searched
@given(callers, phases, st.integers(0, 1000))
def test_each_id_has_one_outcome_and_nothing_is_left(caller: Caller, phases: list[Phase], seed: int) -> None:
    """Whatever the caller does, whatever the source raises, and whatever the server does for up to 24 seconds."""
    run(call(caller, phases, seed), debug=False)


async def call(caller: Caller, phases: list[Phase], seed: int) -> None:
    """Make the call, and check what came out."""
    transport = ScriptedTransport(scripted(phases, 1 + seed % 7, Random(seed)), latency=0.05)
    collection: Any = deque(caller.ids) if caller.source == "deque" else list(caller.ids)
    poll = PollPolicy(max_interval=5)
    async with transport.client(concurrency=4, attempt_timeout=10, deadline=60, poll=poll) as client:
        closing = asyncio.create_task(close_at(client, caller.closes_at))
        if caller.verb == "get_many":
            await gather(client, caller, collection)
        else:
            await consume(client, caller, collection)
        closing.cancel()
        await asyncio.wait([closing])
        await asyncio.sleep(1)
        assert client.stats().waiting == client.stats().in_flight == client.stats().in_progress == 0
        scheduler = client._binding.scheduler
        assert scheduler is None or is_idle(scheduler)
    assert transport.open == 0


async def close_at(client: KaizenClient, seconds: float) -> None:
    """Close the client after some time, if at all."""
    if seconds < math.inf:
        await asyncio.sleep(seconds)
        await client.aclose()
    await asyncio.Event().wait()


async def gather(client: KaizenClient, caller: Caller, collection: Any) -> None:
    """Get all at once."""
    outcomes, error = await caught(client.instructor_executions.get_many(source_of(caller, collection)))
    if error is not None:
        assert is_of_source(error, caller)
        return
    assert caller.raises is None or caller.source in {"list", "deque"}
    assert [outcome.id for outcome in outcomes] == caller.ids
    for outcome in outcomes:
        assert isinstance(outcome.error, InvalidIdError) is (not is_valid(outcome.id))


async def consume(client: KaizenClient, caller: Caller, collection: Any) -> None:
    """Consume a stream by several tasks, while the collection changes."""
    method = getattr(client.instructor_executions, caller.verb)
    results: list[Any] = []

    async def read(stream: Any) -> None:
        async for result in stream:
            results.append(result)
            collection.clear()
            if len(results) == 2:
                pass_time(caller.freeze)
            if caller.leaves_after is not None and len(results) > caller.leaves_after:
                break

    async with method(source_of(caller, collection)) as stream:
        readers = [asyncio.create_task(read(stream)) for _ in range(caller.readers)]
        done, _ = await asyncio.wait(readers, timeout=3000)
        assert len(done) == caller.readers, "a loop over the stream does not end"
        errors = [error for error in (reader.exception() for reader in readers) if error is not None]
        is_taken = stream.taken
    assert len(errors) <= 1
    assert all(is_of_source(error, caller) for error in errors)
    has_left = caller.leaves_after is not None and len(results) > caller.leaves_after
    counted = Counter(repr(result.id) for result in results if is_last(result, caller))
    expected = Counter(repr(each) for each in caller.ids[:is_taken])
    if caller.verb == "watch":
        counted, expected = Counter(set(counted)), Counter(set(expected))
    assert not counted - expected, "an outcome too many"
    if has_left:
        return
    assert counted == expected
    if caller.closes_at == math.inf:
        assert is_taken == len(caller.ids)
        assert bool(errors) is (caller.raises is not None and caller.source in {"generator", "asynchronous"})
    if caller.closes_at == math.inf and caller.verb in WAITS:
        failed = [result for result in results if result.error is not None and is_valid(result.id)]
        assert not failed, "a disturbance has ended a wait"


def is_last(result: Any, caller: Caller) -> bool:
    """Return whether nothing follows for an id."""
    return caller.verb != "watch" or result.error is not None or result.after.is_finished


def is_of_source(error: BaseException, caller: Caller) -> bool:
    """Return whether an error is what the source raised, or says that the client was closed before it ended."""
    if isinstance(error, ClientClosedError):
        return caller.closes_at < math.inf
    if caller.raises is None:
        return False
    return type(error) is type(caller.raises()) or isinstance(error, RuntimeError)


def is_valid(execution_id: Any) -> bool:
    """Return whether an id can be sent."""
    return isinstance(execution_id, str) and execution_id not in {"", "x\n"}


async def caught(call: Awaitable[Any]) -> tuple[Any, BaseException | None]:
    """Return what a call returns, or raises."""
    task = asyncio.ensure_future(call)
    await asyncio.wait([task])
    error = task.exception()
    return (None, error) if error is not None else (task.result(), None)


def is_idle(scheduler: Scheduler) -> bool:
    """Return whether a scheduler holds nothing any more."""
    return not (scheduler._polls or scheduler._timetable.held or scheduler._turns or scheduler._calls)
