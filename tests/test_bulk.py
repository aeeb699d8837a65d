"""Lookups of many ids keep their order, take ids lazily, apply back-pressure and leave nothing behind.

The tests run in virtual time.
"""

import asyncio
import enum
import gc
import itertools
import json
import math
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from functools import partial
from typing import Any

import pytest
from scripted_lives import later
from scripted_transport import AT_ONCE, NEVER, Reply, ScriptedTransport, record, status
from virtual_time import VirtualLoop, at_every_step, virtual_time
from yarl import URL

from kaizen_async import (
    ClientClosedError,
    DeadlineExceededError,
    DecodeError,
    InstructorExecution,
    InvalidIdError,
    KaizenClient,
    NotFoundError,
    Outcome,
)
from kaizen_async._bulk import MOST_IN_BACK_OFF, READ_AHEAD
from kaizen_async._ids import Ids, require_id
from kaizen_async._transport.transport import Answer


class Unsized:
    """An iterable without a length that can be iterated any number of times."""

    def __init__(self, ids: Iterable[str]) -> None:
        self._ids = list(ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)


class Countdown:
    """An asynchronous iterator without `__aiter__`, which `__aiter__` of another class may return."""

    def __init__(self, count: int) -> None:
        self.left = count

    async def __anext__(self) -> str:
        if not self.left:
            raise StopAsyncIteration
        self.left -= 1
        return f"e{self.left}"


class Counted:
    """An asynchronous iterable whose iterator has no `__aiter__` of its own."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __aiter__(self) -> Any:
        return Countdown(self._count)


SOURCES: dict[str, Callable[[list[str]], Ids]] = {
    "list": list,
    "tuple": tuple,
    "keys": dict.fromkeys,
    "generator": lambda ids: (i for i in ids),
    "iterable": Unsized,
    "asynchronous generator": later,
    "slow asynchronous generator": lambda ids: later(ids, 0.01),
}

ANY_SOURCE = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)


async def streamed(client: KaizenClient, ids: Ids, **options: Any) -> list[Outcome[InstructorExecution]]:
    """Return all outcomes of a stream."""
    async with client.instructor_executions.stream(ids, **options) as outcomes:
        return [outcome async for outcome in outcomes]


def assert_idle(client: KaizenClient, transport: ScriptedTransport) -> None:
    """Fail if a request is open, a slot is held or a task is left."""
    engine = client._binding.engine
    assert engine is not None
    assert not transport.open
    assert engine._free_slots == engine.concurrency
    assert not engine._waiting
    assert asyncio.all_tasks() == {asyncio.current_task()}


@ANY_SOURCE
def test_get_many_keeps_the_order_of_the_ids(source: Callable[[list[str]], Ids]) -> None:
    """`get_many` returns outcomes in the order of the ids, for every type of source and any order of responses."""

    @virtual_time
    async def play() -> None:
        ids = [f"e{n}" for n in range(200)]
        transport = ScriptedTransport(lambda i, _: (float(hash(i) % 20), record(i)))
        async with transport.client(concurrency=20) as client:
            outcomes = await client.instructor_executions.get_many(source(ids))
            assert [outcome.id for outcome in outcomes] == ids
            assert [outcome.unwrap().id for outcome in outcomes] == ids
            assert transport.most_open == 20
            assert_idle(client, transport)

    play()


@ANY_SOURCE
def test_a_stream_yields_one_outcome_for_each_id(source: Callable[[list[str]], Ids]) -> None:
    """A stream yields exactly one outcome for each id, in any order."""

    @virtual_time
    async def play() -> None:
        ids = [f"e{n}" for n in range(200)]
        transport = ScriptedTransport(lambda i, _: (float(hash(i) % 20), record(i)))
        async with transport.client(concurrency=20) as client:
            outcomes = await streamed(client, source(ids))
            assert sorted(outcome.id for outcome in outcomes) == sorted(ids)
            assert all(outcome.ok for outcome in outcomes)
            assert transport.most_open == 20
            assert_idle(client, transport)

    play()


@virtual_time
async def test_an_asynchronous_iterator_need_not_be_iterable_itself() -> None:
    """An asynchronous iterator needs only `__anext__`, as in `async for`."""
    transport = ScriptedTransport()
    async with transport.client() as client:
        outcomes = await client.instructor_executions.get_many(Counted(5))
        assert [outcome.id for outcome in outcomes] == ["e4", "e3", "e2", "e1", "e0"]
        assert len(await streamed(client, Counted(5))) == 5


@pytest.mark.parametrize("ids", [[], (), iter(())])
def test_no_ids_send_no_request(ids: Ids) -> None:
    """An empty source gives an empty list or an empty stream, and the client sends nothing."""

    @virtual_time
    async def play() -> None:
        transport = ScriptedTransport()
        async with transport.client() as client:
            assert await client.instructor_executions.get_many(ids) == []
            assert await streamed(client, ids) == []
            assert not transport.sent

    play()


@virtual_time
async def test_equal_ids_share_one_request_and_each_gets_its_outcome() -> None:
    """Repeated ids share one request, and each position gets its outcome."""
    transport = ScriptedTransport()
    async with transport.client(concurrency=2) as client:
        ids = ["a", "b", "a", "a", "c", "b"]
        outcomes = await client.instructor_executions.get_many(ids)
        assert [outcome.id for outcome in outcomes] == ids
        assert transport.ids == ["a", "b", "c"]
        assert outcomes[0] is outcomes[2] is outcomes[3]


@virtual_time
async def test_a_stream_of_one_id_yields_as_many_outcomes_as_it_was_given() -> None:
    """A stream of one repeated id yields an outcome for each repetition. Lookups in flight at once share a request."""
    transport = ScriptedTransport()
    async with transport.client(concurrency=10) as client:
        outcomes = await streamed(client, ["a"] * 100)
        assert [outcome.id for outcome in outcomes] == ["a"] * 100
        assert len(transport.sent) == 10


@virtual_time
async def test_failed_ids_do_not_affect_others() -> None:
    """A failed id gets an outcome with the error that `get` would raise, and the other ids get their records."""
    replies: dict[str, Reply] = {"e3": status(404), "e5": Answer(200, {}, b'{"id": "e5"}')}
    transport = ScriptedTransport(lambda i, _: replies.get(i) or record(i))
    async with transport.client(concurrency=3) as client:
        outcomes = await client.instructor_executions.get_many([f"e{n}" for n in range(10)])
        assert [outcome.id for outcome in outcomes if not outcome.ok] == ["e3", "e5"]
        missing, misfit = outcomes[3], outcomes[5]
        assert isinstance(missing.error, NotFoundError)
        assert isinstance(misfit.error, DecodeError)
        assert missing.execution is None
        assert (missing.attempts, misfit.attempts) == (1, 1)
        with pytest.raises(NotFoundError) as caught:
            missing.unwrap()
        assert caught.value is missing.error


@virtual_time
async def test_an_outcome_reports_attempts_and_elapsed_time() -> None:
    """The `elapsed` time of an outcome includes the wait for a slot, all attempts and the back-off."""
    transport = ScriptedTransport(lambda i, number: (2, status(500) if number == 1 else record(i)))
    async with transport.client(concurrency=1, retry=AT_ONCE) as client:
        first, second = await client.instructor_executions.get_many(["a", "b"])
        assert (first.attempts, first.elapsed) == (2, pytest.approx(4))
        assert (second.attempts, second.elapsed) == (2, pytest.approx(4))


@virtual_time
async def test_the_clients_deadline_bounds_each_lookup() -> None:
    """The client's deadline counts from the start of each lookup, so a long job may take longer than the deadline."""
    transport = ScriptedTransport(lambda i, _: (NEVER if i == "e7" else 1, record(i)))
    async with transport.client(concurrency=2, deadline=5, attempt_timeout=60) as client:
        for outcomes in (
            await client.instructor_executions.get_many([f"e{n}" for n in range(40)]),
            await streamed(client, (f"e{n}" for n in range(40))),
        ):
            assert [outcome.id for outcome in outcomes if not outcome.ok] == ["e7"]
            (late,) = (outcome for outcome in outcomes if not outcome.ok)
            assert isinstance(late.error, DeadlineExceededError)
            assert late.elapsed == pytest.approx(5)


@virtual_time
async def test_a_deadline_of_the_call_gives_every_id_an_outcome() -> None:
    """After the deadline of a call, finished ids keep their records and every other id gets a DeadlineExceededError."""
    transport = ScriptedTransport(latency=1)
    async with transport.client(concurrency=2) as client:
        ids = [f"e{n}" for n in range(100)]
        outcomes = await client.instructor_executions.get_many(ids, deadline=4.5)
        assert [outcome.id for outcome in outcomes] == ids
        assert [outcome.ok for outcome in outcomes] == [True] * 8 + [False] * 92
        assert {type(outcome.error) for outcome in outcomes[8:]} == {DeadlineExceededError}
        assert [outcome.attempts for outcome in outcomes[8:11]] == [1, 1, 0]
        assert len(transport.sent) == 10
        assert asyncio.get_running_loop().time() == pytest.approx(4.5)


@virtual_time
async def test_a_deadline_of_a_stream_gives_a_collections_ids_their_outcomes() -> None:
    """After its deadline, a stream yields outcomes for all ids of a list, and takes no more from a generator."""
    transport = ScriptedTransport(latency=1)
    async with transport.client(concurrency=2) as client:
        outcomes = await streamed(client, [f"e{n}" for n in range(100)], deadline=4.5)
        assert len(outcomes) == 100
        assert sum(outcome.ok for outcome in outcomes) == 8
        endless = (f"e{n}" for n in itertools.count())
        outcomes = await streamed(client, endless, deadline=4.5)
        assert [outcome.ok for outcome in outcomes] == [True] * 8 + [False] * 2
        assert {type(outcome.error) for outcome in outcomes[8:]} == {DeadlineExceededError}
        assert next(endless) == "e10"
        assert asyncio.get_running_loop().time() == pytest.approx(9)


@pytest.mark.parametrize("verb", ["get_many", "stream"])
def test_a_deadline_ends_the_wait_for_an_asynchronous_source(verb: str) -> None:
    """A deadline ends the call also while its asynchronous source yields nothing."""

    @virtual_time
    async def play() -> None:
        transport = ScriptedTransport()
        ended = []

        async def stuck() -> AsyncIterator[str]:
            try:
                yield "a"
                await asyncio.Event().wait()
            finally:
                ended.append(True)

        async with transport.client() as client:
            if verb == "stream":
                (outcome,) = await streamed(client, stuck(), deadline=3)
                assert outcome.ok
            else:
                (outcome,) = await client.instructor_executions.get_many(stuck(), deadline=3)
                assert isinstance(outcome.error, DeadlineExceededError)
            assert asyncio.get_running_loop().time() == pytest.approx(3)
            assert ended == [True]
            assert_idle(client, transport)

    play()


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("consumed", [0, 1, 10, 200])
def test_a_slow_consumer_slows_the_requests(asynchronous: bool, consumed: int) -> None:
    """From an endless source, a stream takes only the ids consumed, the ids in flight and a constant read-ahead."""

    @virtual_time
    async def play() -> None:
        taken = itertools.count()
        ids = (f"e{n}" for n in taken)
        transport = ScriptedTransport()
        async with transport.client(concurrency=5) as client:
            async with client.instructor_executions.stream(later(ids) if asynchronous else ids) as outcomes:
                for _ in range(consumed):
                    assert (await anext(outcomes)).ok
                    await asyncio.sleep(1)
                await asyncio.sleep(1000)
                assert len(transport.sent) == consumed + 5 + READ_AHEAD
                assert next(taken) <= consumed + 5 + READ_AHEAD + 1
            assert_idle(client, transport)

    play()


@pytest.mark.parametrize("method", ["get_many", "stream"])
def test_back_off_leaves_its_place_to_another_id(method: str) -> None:
    """An id that waits for its next attempt frees its slot. Of 300 ids, 100 wait 9 seconds, and 200 do not wait."""

    @virtual_time
    async def play() -> None:
        def reply(execution_id: str, number: int) -> Reply:
            return status(429, retry_after="9") if number == 1 and int(execution_id) % 3 == 1 else record(execution_id)

        transport = ScriptedTransport(reply)
        async with transport.client(concurrency=10) as client:
            ids = [str(number) for number in range(300)]
            call = client.instructor_executions.get_many if method == "get_many" else partial(streamed, client)
            outcomes = await call(ids)
            assert sorted(outcome.id for outcome in outcomes) == sorted(ids)
            assert all(outcome.ok for outcome in outcomes)
            assert transport.most_open <= 10
            assert len(transport.sent) == 400
            # 400 requests of 0.1 s on ten connections are 4 s; each group of ten would take 9 s if it kept its slots.
            assert asyncio.get_running_loop().time() < 2 * (9 + 4)
            assert_idle(client, transport)

    play()


@pytest.mark.parametrize("method", ["get_many", "stream"])
@pytest.mark.parametrize("end", ["the caller is cancelled", "the client is closed", "the server accepts them"])
def test_back_offs_are_bounded_and_end(end: str, method: str) -> None:
    """At most fifty for each place, however many ids there are; whatever ends them, each id has one outcome."""

    @virtual_time
    async def play() -> None:
        def reply(execution_id: str, number: int) -> Reply:
            # Of a hundred, one is accepted: the server works, and rejects the others.
            is_rejected = asyncio.get_running_loop().time() < 60 and int(execution_id) % 2
            return status(429, retry_after="60") if is_rejected else record(execution_id)

        transport = ScriptedTransport(reply)
        client = transport.client(concurrency=2, deadline=1000)
        ids = [str(number) for number in range(400)]
        call = client.instructor_executions.get_many if method == "get_many" else partial(streamed, client)
        task = asyncio.create_task(call(ids))
        await asyncio.sleep(40)
        assert len(asyncio.all_tasks()) <= 2 * (1 + MOST_IN_BACK_OFF) + 3
        rejected = sum(int(execution_id) % 2 for execution_id in transport.ids)
        assert rejected == 2 * (1 + MOST_IN_BACK_OFF)
        if "cancelled" in end:
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
        else:
            if "closed" in end:
                await client.aclose()
            outcomes = await task
            assert sorted(outcome.id for outcome in outcomes) == sorted(ids)
            failed = [outcome for outcome in outcomes if outcome.error is not None]
            assert len(failed) == (len(ids) - len(transport.ids) + rejected if "closed" in end else 0)
            assert all(isinstance(outcome.error, ClientClosedError) for outcome in failed)
        assert_idle(client, transport)
        await client.aclose()

    play()


@virtual_time
async def test_leaving_a_stream_early_stops_its_requests() -> None:
    """Leaving a stream early cancels its requests, ends its tasks and frees its slots at once."""
    transport = ScriptedTransport(lambda i, _: (0.1 if i == "e0" else NEVER, record(i)))
    async with transport.client(concurrency=5) as client:
        async with client.instructor_executions.stream(f"e{n}" for n in itertools.count()) as outcomes:
            async for outcome in outcomes:
                assert outcome.id == "e0"
                break
        assert_idle(client, transport)
        assert (await client.instructor_executions.get("e0")).id == "e0"


@virtual_time
async def test_an_error_in_the_consumers_block_comes_out_as_it_is() -> None:
    """An error in the consumer's block is raised unchanged, without an exception group, and nothing is left behind."""
    transport = ScriptedTransport()
    async with transport.client() as client:
        with pytest.raises(ZeroDivisionError):
            async with client.instructor_executions.stream(f"e{n}" for n in itertools.count()) as outcomes:
                async for _ in outcomes:
                    raise ZeroDivisionError
        assert_idle(client, transport)


class OwnError(Exception):
    """An error of the caller."""


def failing(good: int, error: BaseException) -> Iterator[str]:
    """Yield some ids, then raise an error."""
    for n in range(good):
        yield f"e{n}"
    raise error


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("error", [OwnError("mine"), TimeoutError("mine"), RuntimeError("mine")], ids=repr)
def test_an_error_of_the_source_comes_after_the_outcomes(asynchronous: bool, error: Exception) -> None:
    """A stream yields the outcomes of all ids taken, and then raises the source's own error, even a TimeoutError."""

    @virtual_time
    async def play() -> None:
        transport = ScriptedTransport(latency=5)
        async with transport.client(concurrency=3) as client:
            source = failing(7, error)
            seen = []
            with pytest.raises(type(error)) as caught:
                async with client.instructor_executions.stream(later(source) if asynchronous else source) as outcomes:
                    async for outcome in outcomes:
                        seen.append(outcome.id)
            assert caught.value is error
            assert sorted(seen) == [f"e{n}" for n in range(7)]
            assert_idle(client, transport)

    play()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_error_of_the_source_comes_out_of_get_many_before_anything_is_sent(asynchronous: bool) -> None:
    """`get_many` raises an error of its source before it sends any request, because it has no list to return yet."""

    @virtual_time
    async def play() -> None:
        transport = ScriptedTransport()
        async with transport.client() as client:
            source = failing(7, OwnError("mine"))
            with pytest.raises(OwnError, match="mine"):
                await client.instructor_executions.get_many(later(source) if asynchronous else source)
            assert not transport.sent
            assert_idle(client, transport)

    play()


@virtual_time
async def test_a_stream_that_has_failed_or_ended_stays_ended() -> None:
    """A stream raises its error once, and every further read ends the loop."""
    transport = ScriptedTransport()
    async with transport.client() as client:
        async with client.instructor_executions.stream(failing(1, OwnError("mine"))) as outcomes:
            assert (await anext(outcomes)).ok
            with pytest.raises(OwnError):
                await anext(outcomes)
            for _ in range(2):
                with pytest.raises(StopAsyncIteration):
                    await anext(outcomes)


BAD_IDS: dict[str, tuple[Any, type[Exception], str]] = {
    "empty": ("", ValueError, "an execution id must not be empty; leave blank lines out of the ids"),
    "a number": (5, TypeError, "an execution id must be a str, not int: 5"),
    "None": (None, TypeError, "an execution id must be a str, not NoneType: None"),
    "NaN": (math.nan, TypeError, "an execution id must be a str, not float: nan"),
    "bytes": (b"e1", TypeError, "an execution id must be a str, not bytes: b'e1'"),
    "a list": (["e1"], TypeError, r"an execution id must be a str, not list: \['e1'\]"),
    "half a surrogate pair": ("e\ud800", ValueError, r"must be valid Unicode: 'e\\ud800' \(character 1\)"),
    "a line": ("e1\n", ValueError, r"must not end with white space .* 'e1\\n' \(character 2\); pass line.strip\(\)"),
    "a space before it": (" e1", ValueError, r"must not begin with white space .* ' e1' \(character 0\)"),
    "a byte order mark": ("\ufeffe1", ValueError, "must not begin with white space or an invisible character"),
    "a zero-width space": ("e1\u200b", ValueError, "must not end with white space or an invisible character"),
    "two lines": ("e1\ne2", ValueError, r"must not contain a line break .* \(character 2\); .* line.strip\(\)"),
    "NUL": ("e1\x00e2", ValueError, "must not contain a line break or another control character"),
    "a line separator": ("e1\u2028e2", ValueError, "must not contain a line break or another control character"),
}


@pytest.mark.parametrize(("bad", "error", "message"), BAD_IDS.values(), ids=BAD_IDS)
def test_an_invalid_id_is_never_sent(bad: Any, error: type[Exception], message: str) -> None:
    """`get` raises for an invalid id. The bulk methods give it an outcome with its position and look up the others."""

    @virtual_time
    async def play() -> None:
        transport = ScriptedTransport()
        async with transport.client() as client:
            executions = client.instructor_executions
            with pytest.raises(error, match=message):
                await executions.get(bad)
            assert not transport.sent
            given = ["e0", bad, "e1", bad]
            many = await executions.get_many(given)
            assert all(outcome.id is each for outcome, each in zip(many, given, strict=True))
            for outcomes in (many, await streamed(client, given), await streamed(client, iter(given))):
                refused = [outcome for outcome in outcomes if not outcome.ok]
                assert len(outcomes) == 4
                assert [outcome.attempts for outcome in refused] == [0, 0]
                for outcome, position in zip(refused, (1, 3), strict=True):
                    assert isinstance(outcome.error, InvalidIdError)
                    assert outcome.error.position == position
                    with pytest.raises(ValueError, match=f"{message}.*; it is at position {position} of the ids"):
                        outcome.unwrap()
            assert set(transport.ids) == {"e0", "e1"}

    play()


class Id(str):
    """A str subclass of the caller that overrides `__str__` and `__eq__`."""

    __slots__ = ()

    def __str__(self) -> str:
        return "not the id"

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


class Named(enum.StrEnum):
    """Ids as the members of an enumeration."""

    FIRST = "e1"


@pytest.mark.parametrize("subclass", [Id("e1"), Named.FIRST], ids=["str", "StrEnum"])
def test_a_subclass_of_str_is_a_string(subclass: str) -> None:
    """The client uses the text of a str subclass as the id, regardless of its overridden methods."""

    @virtual_time
    async def play() -> None:
        transport = ScriptedTransport()
        async with transport.client() as client:
            executions = client.instructor_executions
            assert (await executions.get(subclass)).id == "e1"
            (outcome,) = await executions.get_many([subclass])
            assert outcome.unwrap().id == outcome.id == "e1"
            assert type(outcome.id) is str
            assert [outcome.id for outcome in await streamed(client, iter([subclass]))] == ["e1"]

    play()


@pytest.mark.parametrize("good", ["a", "a b", "\u57f7\u884c", "\U0001f600", "a\u200bb", "x" * 100_000])
def test_any_other_text_is_accepted_as_an_id(good: str) -> None:
    """The client accepts any other text, because only the server knows which ids exist."""
    assert require_id(good) is good


@pytest.mark.parametrize("ids", ["exec_1", b"bytes", 5, None, object()])
def test_an_invalid_source_of_ids_is_refused(ids: Any) -> None:
    """The bulk methods refuse a value that is not an iterable of ids, and also a single string."""

    @virtual_time
    async def play() -> None:
        transport = ScriptedTransport()
        async with transport.client() as client:
            with pytest.raises(TypeError, match=r"^ids must be an iterable"):
                await client.instructor_executions.get_many(ids)
            with pytest.raises(TypeError, match=r"^ids must be an iterable"):
                client.instructor_executions.stream(ids)
            assert not transport.sent

    play()


@pytest.mark.parametrize(
    ("deadline", "error"), [(0, ValueError), (-1, ValueError), (math.inf, ValueError), ("5", TypeError)]
)
def test_an_invalid_deadline_is_refused(deadline: Any, error: type[Exception]) -> None:
    """Every method refuses an invalid deadline before it sends a request."""

    @virtual_time
    async def play() -> None:
        transport = ScriptedTransport()
        async with transport.client() as client:
            with pytest.raises(error, match=r"^deadline must be a"):
                await client.instructor_executions.get("a", deadline=deadline)
            with pytest.raises(error, match=r"^deadline must be a"):
                await client.instructor_executions.get_many(["a"], deadline=deadline)
            with pytest.raises(error, match=r"^deadline must be a"):
                client.instructor_executions.stream(["a"], deadline=deadline)
            assert not transport.sent

    play()


@virtual_time
async def test_a_stream_is_entered_first_and_once() -> None:
    """A stream raises an error that says what to do if it is read before it is entered, or entered twice."""
    transport = ScriptedTransport()
    async with transport.client() as client:
        stream = client.instructor_executions.stream(["a"])
        with pytest.raises(RuntimeError, match="enter the stream first"):
            await anext(stream)
        async with stream:
            with pytest.raises(RuntimeError, match="entered once"):
                await stream.__aenter__()
        with pytest.raises(RuntimeError, match="entered once"):
            await stream.__aenter__()


@virtual_time
async def test_a_stream_that_was_never_entered_has_taken_nothing() -> None:
    """A stream that was never entered takes no ids from its source."""
    ids = iter(["a"])
    transport = ScriptedTransport()
    async with transport.client() as client:
        await client.instructor_executions.stream(ids).__aexit__(None, None, None)
        assert list(ids) == ["a"]
        assert_idle(client, transport)


@virtual_time
async def test_closing_the_client_gives_a_collections_ids_their_outcomes() -> None:
    """Closing the client gives each unfinished id of a list a ClientClosedError, whether it is in flight or not."""
    transport = ScriptedTransport(latency=10)
    client = transport.client(concurrency=2)
    ids = [f"e{n}" for n in range(5)]
    many = asyncio.create_task(client.instructor_executions.get_many(ids))
    stream = asyncio.create_task(streamed(client, ids))
    await asyncio.sleep(15)
    await client.aclose()
    for outcomes in (await many, await stream):
        assert sorted(outcome.id for outcome in outcomes) == ids
        assert {type(outcome.error) for outcome in outcomes} == {type(None), ClientClosedError}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_closing_the_client_under_a_generator_is_an_error(asynchronous: bool) -> None:
    """After a close, a stream of a generator raises a ClientClosedError, because the generator may hold more ids."""

    @virtual_time
    async def play() -> None:
        transport = ScriptedTransport(latency=10)
        client = transport.client(concurrency=2)
        endless = (f"e{n}" for n in itertools.count())
        seen: list[Outcome[InstructorExecution]] = []

        async def consume() -> None:
            async with client.instructor_executions.stream(later(endless) if asynchronous else endless) as outcomes:
                async for outcome in outcomes:
                    seen.append(outcome)

        consumer = asyncio.create_task(consume())
        await asyncio.sleep(15)
        await client.aclose()
        with pytest.raises(ClientClosedError, match="the client was closed before all ids were taken"):
            await consumer
        assert [outcome.ok for outcome in seen] == [True, True, False, False]
        with pytest.raises(ClientClosedError):
            await streamed(client, endless)
        with pytest.raises(ClientClosedError):
            await client.instructor_executions.get_many(endless)

    play()


@virtual_time
async def test_closing_ends_the_wait_for_an_asynchronous_source() -> None:
    """Closing the client ends a stream whose asynchronous source yields nothing."""

    async def stuck() -> AsyncIterator[str]:
        await asyncio.Event().wait()
        yield "never"

    transport = ScriptedTransport()
    client = transport.client()
    consumer = asyncio.create_task(streamed(client, stuck()))
    await asyncio.sleep(1)
    await client.aclose()
    with pytest.raises(ClientClosedError):
        await consumer


class Buggy(ScriptedTransport):
    """A transport that raises an error that no transport should raise."""

    async def send(self, *_: Any) -> Answer:
        """Raise the error."""
        raise ZeroDivisionError


@virtual_time
async def test_a_bug_in_the_transport_ends_a_stream() -> None:
    """A stream raises an unexpected error of the transport instead of hanging."""
    transport = Buggy()
    async with transport.client(concurrency=2) as client:
        with pytest.raises(ZeroDivisionError):
            await streamed(client, (f"e{n}" for n in itertools.count()))
        assert_idle(client, transport)


@virtual_time
async def test_a_bug_in_the_transport_comes_out_of_get_many() -> None:
    """`get_many` raises an unexpected error of the transport itself, not in an exception group."""
    transport = Buggy()
    async with transport.client(concurrency=2) as client:
        with pytest.raises(ZeroDivisionError):
            await client.instructor_executions.get_many(["a", "b", "c"])
        assert_idle(client, transport)


async def three_times(client: KaizenClient, execution_id: str) -> None:
    """Look an id up three times at the same time."""
    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(client.instructor_executions.get(execution_id))


CANCELLED: dict[str, Callable[[KaizenClient], Any]] = {
    "get": lambda client: client.instructor_executions.get("e0"),
    "get, shared": lambda client: three_times(client, "e0"),
    "get_many": lambda client: client.instructor_executions.get_many([f"e{n % 4}" for n in range(8)]),
    "get_many of an asynchronous source": lambda client: client.instructor_executions.get_many(
        later(["e0", "e1", "e2"], 0.01)
    ),
    "stream": lambda client: streamed(client, [f"e{n % 4}" for n in range(8)]),
    "stream of an asynchronous source": lambda client: streamed(client, later(["e0", "e1", "e2"], 0.01)),
}


def troubled(execution_id: str, number: int) -> Reply:
    """Respond to the first request for two ids with a 500 and a throttling 429, and to all others with a record."""
    if execution_id == "e0" and number == 1:
        return status(500)
    if execution_id == "e1" and number == 1:
        return status(429, retry_after="1")
    return record(execution_id)


@pytest.mark.parametrize("verb", CANCELLED.values(), ids=CANCELLED)
@pytest.mark.parametrize("twice", [False, True])
def test_cancelling_the_caller_at_any_step_leaves_nothing_behind(
    verb: Callable[[KaizenClient], Any], twice: bool
) -> None:
    """Cancelling a call after any number of loop steps leaves no task, no request and no occupied slot."""

    async def cancelled_at(step: int) -> bool:
        """Cancel at a step, and return whether the call had finished by then."""
        transport = ScriptedTransport(troubled)
        client = transport.client(concurrency=2)
        task = asyncio.create_task(verb(client))
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)

        def cancel() -> None:
            task.cancel()
            if twice:
                loop.call_soon(task.cancel)

        loop.after_steps(step, cancel)
        await asyncio.wait([task])
        assert_idle(client, transport)
        await client.aclose()
        return not task.cancelled()

    at_every_step(cancelled_at, more_than=5)


@virtual_time
async def test_a_caller_cancelled_again_still_leaves_nothing_behind() -> None:
    """A cancelled stream waits for the cleanup of its source, even if it is cancelled again."""
    cleaned_up = []

    async def slow_to_leave() -> AsyncIterator[str]:
        try:
            yield "e0"
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(5)
            cleaned_up.append(True)

    transport = ScriptedTransport()
    async with transport.client() as client:
        task = asyncio.create_task(streamed(client, slow_to_leave()))
        for _ in range(3):
            await asyncio.sleep(1)
            task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert cleaned_up == [True]
        assert asyncio.get_running_loop().time() == pytest.approx(6)
        assert_idle(client, transport)


@virtual_time
async def test_a_deadline_around_a_stream_is_a_timeout_and_no_cancellation() -> None:
    """`asyncio.timeout` around a stream raises a TimeoutError and does not leave the task cancelled."""
    transport = ScriptedTransport(latency=NEVER)
    async with transport.client() as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2):
                await streamed(client, ["a", "b"])
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        assert_idle(client, transport)


@virtual_time
async def test_memory_does_not_grow_with_the_number_of_ids() -> None:
    """A stream of two thousand ids keeps no memory for the outcomes that it has yielded."""

    class Forgetful(ScriptedTransport):
        async def send(self, url: URL, body: bytes, is_held: Callable[[], bool]) -> Answer:
            await asyncio.sleep(0)
            return record(json.loads(body)["id"])

    async with Forgetful().client(concurrency=5) as client:
        async with client.instructor_executions.stream(f"e{n}" for n in range(2000)) as outcomes:
            blocks = []
            for number in range(2000):
                assert (await anext(outcomes)).ok
                if number in {999, 1999}:
                    gc.collect()
                    blocks.append(sys.getallocatedblocks())
            assert blocks[1] - blocks[0] < 500
