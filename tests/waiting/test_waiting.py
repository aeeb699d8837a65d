"""`wait`, `wait_many` and `watch` from the view of their callers, in virtual time."""

import asyncio
import functools
import gc
import itertools
import json
import math
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import msgspec
import pytest
from scripted_lives import (
    EVERY_SECOND,
    EVERY_TEN,
    assert_idle,
    at_once,
    changes_of,
    ended,
    ending,
    every,
    later,
    never_ending,
    now,
    outcomes_of,
    polls_of,
    running,
    scheduler_of,
    states,
)
from scripted_transport import AT_ONCE, NEVER, Reply, ScriptedTransport, record, status
from virtual_time import VirtualLoop, at_every_step, virtual_time

from kaizen_async import (
    AuthenticationError,
    ClientClosedError,
    DeadlineExceededError,
    DecodeError,
    InstructorExecution,
    InvalidIdError,
    KaizenClient,
    KaizenError,
    NotFoundError,
    PollPolicy,
    RetryPolicy,
    StatusError,
    TransportError,
)
from kaizen_async._bulk import READ_AHEAD
from kaizen_async._ledger import CHECKPOINT_VERSION, MOST_REPEATS
from kaizen_async._streams import PAUSE_EVERY
from kaizen_async._transport.transport import Answer
from kaizen_async._waiting.scheduler import AT_ONCE as SLICE

ONE_ATTEMPT = RetryPolicy(max_attempts=1)


@virtual_time
async def test_an_execution_has_ended_when_its_end_time_is_set() -> None:
    """Only an end time ends a wait. A status does not, whether it is known or unknown."""
    script = iter(["Enqueued", "InProgress", "Completed", "Failed", "Zorp"])

    def play(execution_id: str, _: int) -> Reply:
        state = next(script, None)
        return running(execution_id, state) if state else ended(execution_id, state="Quux")

    transport = at_once(play)
    async with transport.client() as client:
        execution = await client.instructor_executions.wait("a", poll=EVERY_SECOND)
        assert execution.status == "Quux"
        assert execution.is_finished
        assert transport.times == [0, 1, 2, 3, 4, 5]
        await assert_idle(client, transport)


TRANSIENT: dict[str, Reply] = {
    "503": status(503),
    "500": status(500),
    "429": status(429, retry_after="2"),
    "a gateway's page": Answer(502, {"Content-Type": "text/html"}, b"<html>Bad Gateway</html>"),
    "a reset": TransportError("the connection failed: reset", disconnected=True),
    "an answer cut off": Answer(200, {}, b'{"id": "a", "work'),
    "no answer": (NEVER, status(500)),
    **{f"{code}": status(code) for code in (507, 520, 522, 524, 529, 530)},
}


@pytest.mark.parametrize("trouble", TRANSIENT.values(), ids=TRANSIENT)
def test_temporary_failures_do_not_end_a_wait(trouble: Reply) -> None:
    """A wait continues through ten minutes of failures that a later poll may not have."""

    def play(execution_id: str, _: int) -> Reply:
        return trouble if 2 < now() < 600 else ending(300)(execution_id, 0)

    @virtual_time
    async def check() -> None:
        transport = at_once(play)
        async with transport.client(deadline=20, attempt_timeout=5) as client:
            execution = await client.instructor_executions.wait("a", poll=EVERY_SECOND)
            assert execution.is_finished
            assert now() >= 600
            await assert_idle(client, transport)

    check()


@virtual_time
async def test_a_poll_that_times_out_is_repeated() -> None:
    """The client's deadline bounds each poll, and the wait has its own deadline."""
    transport = at_once(lambda i, number: (NEVER, running(i)) if number < 4 else ended(i))
    async with transport.client(deadline=3, attempt_timeout=30) as client:
        await client.instructor_executions.wait("a", poll=EVERY_SECOND)
        assert transport.times == [0, 4, 8, 12]


REFUSED_AT = [2, 3, 5, 9, 17, 32]
PERMANENT: dict[str, tuple[Reply, type[KaizenError], list[float]]] = {
    "404": (status(404), NotFoundError, REFUSED_AT[:4]),
    "401": (status(401), AuthenticationError, REFUSED_AT),
    "403": (status(403), AuthenticationError, REFUSED_AT),
    "400": (status(400), StatusError, REFUSED_AT),
    "501": (status(501), StatusError, REFUSED_AT),
    "a misfit": (Answer(200, {}, b'{"id": "a"}'), DecodeError, REFUSED_AT),
    "a bad certificate": (TransportError("does not verify", retryable=False), TransportError, [2]),
}


@pytest.mark.parametrize(("answer", "error", "times"), PERMANENT.values(), ids=PERMANENT)
def test_a_permanent_error_ends_the_wait(answer: Reply, error: type[KaizenError], times: list[float]) -> None:
    """A permanent error ends the wait for its id only, after further polls have confirmed it."""

    @virtual_time
    async def check() -> None:
        transport = at_once(lambda i, number: answer if i == "a" and number > 2 else ending(10)(i, number))
        async with transport.client() as client:
            outcomes = await outcomes_of(client, ["a", "b"], poll=EVERY_SECOND)
            ends = {outcome.id: outcome for outcome in outcomes}
            assert ends["b"].ok
            refused = ends["a"].error
            assert type(refused) is error
            assert refused.execution_id == "a"
            assert refused.attempts == ends["a"].attempts == 2 + len(times)
            assert ends["a"].elapsed == pytest.approx(times[-1], abs=0.2)
            assert polls_of(transport, "a") == pytest.approx(
                [0, 1, *times], abs=0.2
            )  # further polls confirm a refusal first
            with pytest.raises(error):
                await client.instructor_executions.wait("a", poll=EVERY_TEN)

    check()


@pytest.mark.parametrize(("found_at", "grace", "finds"), [(5, 6, True), (7, 6, False), (1, 0, False)])
def test_the_grace_waits_out_early_404s(found_at: float, grace: float, finds: bool) -> None:
    """An execution that appears within the not_found_grace is awaited.

    After the grace, the wait raises NotFoundError.
    """

    @virtual_time
    async def check() -> None:
        policy = msgspec.structs.replace(EVERY_SECOND, not_found_grace=grace)
        transport = at_once(lambda i, _: ended(i) if now() >= found_at else status(404))
        async with transport.client(poll=policy) as client:
            if finds:
                await client.instructor_executions.wait("a")
            else:
                with pytest.raises(NotFoundError):
                    await client.instructor_executions.wait("a")
            assert now() == min(found_at, grace)

    check()


@virtual_time
async def test_the_grace_restarts_with_each_series_of_404s() -> None:
    """Any other response ends a series of 404s and restarts the grace."""
    script = [404, 404, 404, 503, 404, 404, 404, 503, 404, 404, 404, 404]

    def play(execution_id: str, number: int) -> Reply:
        code = script[number - 1]
        return status(code)

    transport = at_once(play)
    policy = msgspec.structs.replace(EVERY_SECOND, not_found_grace=3)
    async with transport.client(poll=policy, retry=ONE_ATTEMPT) as client:
        with pytest.raises(NotFoundError) as caught:
            await client.instructor_executions.wait("a")
        assert caught.value.attempts == len(script)


@virtual_time
async def test_a_wait_out_of_time_reports_the_last_record() -> None:
    """The error of a deadline has the last record, and the last failure as its cause."""

    def play(execution_id: str, number: int) -> Reply:
        return running(execution_id, "Zorp") if number < 5 else status(503)

    transport = at_once(play)
    async with transport.client(retry=ONE_ATTEMPT) as client:
        with pytest.raises(DeadlineExceededError) as caught:
            await client.instructor_executions.wait("a", deadline=4.5, poll=EVERY_SECOND)
        assert now() == 4.5
        assert caught.value.last_execution.status == "Zorp"
        assert caught.value.attempts == 5
        assert isinstance(caught.value.__cause__, StatusError)
        assert str(caught.value) == (
            "a: it had not ended when the deadline passed; its last poll failed: "
            "the server answered 503 Service Unavailable (after 5 attempts)"
        )
        await assert_idle(client, transport)


@virtual_time
async def test_a_failure_that_passed_is_no_cause() -> None:
    """The error of a deadline has no cause if the last poll succeeded."""
    transport = at_once(lambda i, number: running(i) if number > 1 else status(503))
    async with transport.client(retry=ONE_ATTEMPT) as client:
        with pytest.raises(DeadlineExceededError, match="when the deadline passed") as caught:
            await client.instructor_executions.wait("a", deadline=5, poll=EVERY_SECOND)
        assert caught.value.__cause__ is None


@virtual_time
async def test_the_deadline_is_hard() -> None:
    """The deadline cancels a poll in flight."""
    transport = ScriptedTransport(never_ending, latency=8)
    async with transport.client() as client:
        with pytest.raises(DeadlineExceededError) as caught:
            await client.instructor_executions.wait("a", deadline=5)
        assert now() == 5
        assert caught.value.last_execution is None
        await assert_idle(client, transport)
        (outcome,) = await outcomes_of(client, ["a"], deadline=5)
        assert isinstance(outcome.error, DeadlineExceededError)
        assert now() == 10
        (change,) = await changes_of(client, "a", deadline=5)
        assert isinstance(change.error, DeadlineExceededError)
        assert now() == 15
        await assert_idle(client, transport)


@virtual_time
async def test_a_deadline_of_none_is_no_limit() -> None:
    """A deadline of None sets no limit in any method."""
    transport = at_once(ending(100_000))
    async with transport.client(poll=PollPolicy(max_interval=10_000)) as client:
        await asyncio.gather(
            client.instructor_executions.wait("a", deadline=None),
            outcomes_of(client, ["b"], deadline=None),
            changes_of(client, ["c"], deadline=None),
        )
        assert 100_000 <= now() <= 111_000


@virtual_time
async def test_a_last_poll_comes_a_second_before_the_deadline() -> None:
    """The client polls one last time a second before the deadline, so that it does not miss an end."""
    transport = at_once(ending(12))
    async with transport.client() as client:
        await client.instructor_executions.wait("a", deadline=15, poll=EVERY_TEN)
        assert transport.times == [0, 10, 14]


@virtual_time
async def test_no_last_poll_comes_sooner_than_the_policy_allows() -> None:
    """The last poll before a deadline respects the policy's shortest interval and the server's Retry-After."""

    def play(execution_id: str, number: int) -> Reply:
        return status(500, retry_after="20") if execution_id == "b" and number == 1 else running(execution_id)

    transport = at_once(play)
    async with transport.client(retry=ONE_ATTEMPT) as client:
        outcomes = await outcomes_of(client, ["a"], deadline=10.5, poll=PollPolicy(min_interval=9.5, spread=0))
        outcomes += await outcomes_of(client, ["b"], deadline=15, poll=EVERY_SECOND)
        assert not any(outcome.ok for outcome in outcomes)
        assert transport.times == [0, 9.5, 10.5]


@virtual_time
async def test_every_waiter_gets_its_last_poll() -> None:
    """Each of several waits with different deadlines gets its own last poll."""
    transport = at_once(ending({"a": 6}))
    async with transport.client(poll=PollPolicy(min_interval=3, max_interval=3600, lag_share=0.9, spread=0)) as client:
        waits = [client.instructor_executions.wait("a", deadline=deadline) for deadline in (1.5, 8, None)]
        results = await asyncio.gather(*waits, return_exceptions=True)
        assert isinstance(results[0], DeadlineExceededError)
        assert [type(result) for result in results[1:]] == [InstructorExecution] * 2
        assert polls_of(transport, "a") == [0, 3, 7]


@virtual_time
async def test_a_wait_with_a_near_deadline_gets_a_poll() -> None:
    """A wait that joins with a near deadline gets a poll before it, even if the next poll was an hour away."""
    transport = at_once(ending(5))
    async with transport.client(poll=PollPolicy(min_interval=3, max_interval=3600, spread=0)) as client:
        patient = asyncio.create_task(client.instructor_executions.wait("a", deadline=None))
        await asyncio.sleep(0.5)
        scheduler_of(client)._groups[next(iter(scheduler_of(client)._groups))].entries["a"].started -= 100_000
        await asyncio.sleep(3)
        assert polls_of(transport, "a") == [0, 3]
        hasty = [client.instructor_executions.wait("a", deadline=deadline) for deadline in (0.5, 4)]
        results = await asyncio.gather(*hasty, return_exceptions=True)
        assert isinstance(results[0], DeadlineExceededError)
        assert results[0].last_execution is not None
        assert isinstance(results[1], InstructorExecution)
        await patient
        assert polls_of(transport, "a") == [0, 3, 6.5]


@virtual_time
async def test_a_finished_execution_needs_no_request() -> None:
    """Every waiting method returns the record of an execution that the client has seen end, without a request."""
    transport = at_once(ending(3))
    async with transport.client() as client:
        execution = await client.instructor_executions.wait("a", poll=EVERY_SECOND)
        requests = len(transport.sent)
        assert await client.instructor_executions.wait("a") is execution
        (outcome,) = await outcomes_of(client, ["a"])
        assert outcome.execution is execution
        assert (outcome.attempts, outcome.elapsed) == (0, 0)
        (change,) = await changes_of(client, "a")
        assert (change.before, change.after) == (None, execution)
        assert len(transport.sent) == requests
        await client.instructor_executions.get("a")
        assert len(transport.sent) == requests + 1


@virtual_time
async def test_a_wait_uses_the_end_seen_by_another_policy() -> None:
    """At its next poll, a wait finds the record that a wait under another policy has seen, and sends nothing."""
    transport = at_once(ending(3))
    async with transport.client() as client:
        waits = [client.instructor_executions.wait("a", poll=policy) for policy in (EVERY_SECOND, EVERY_TEN)]
        first, second = await asyncio.gather(*waits)
        assert first is second
        assert transport.times == [0, 1, 2, 3]
        assert now() == 10


@pytest.mark.parametrize(("size", "requests"), [(0, [2, 2, 2]), (2, [1, 2, 1]), (3, [1, 1, 1])])
def test_ended_records_kept_are_bounded(size: int, requests: list[int]) -> None:
    """The client forgets the least recently used finished record first. A size of 0 keeps none."""

    @virtual_time
    async def check() -> None:
        transport = at_once(ending(0))
        async with transport.client(ended_records=size) as client:
            wait = client.instructor_executions.wait
            for execution_id in ("a", "b", "a", "c", "a", "c"):
                await wait(execution_id)
            if size:
                assert [transport.numbers[i] for i in "abc"] == [1, 1, 1]
                await wait("b")
            else:
                assert [transport.numbers[i] for i in "abc"] == [3, 1, 2]
                return
            assert [transport.numbers[i] for i in "abc"] == requests

    check()


@virtual_time
async def test_a_hundred_waiters_cost_the_polls_of_one() -> None:
    """A hundred calls of all waiting methods for one id take the polls of one, also if they start later."""

    async def polls(waiters: int) -> int:
        transport = at_once(ending(now() + 30))
        async with transport.client() as client:
            executions = client.instructor_executions
            async with asyncio.TaskGroup() as group:
                for number in range(waiters):
                    group.create_task(executions.wait("a", poll=EVERY_TEN))
                    if number % 10 == 5:
                        group.create_task(outcomes_of(client, ["a"], poll=EVERY_TEN))
                        group.create_task(changes_of(client, ["a"], poll=EVERY_TEN))
                        await asyncio.sleep(1)
            await assert_idle(client, transport)
        return len(transport.sent)

    assert await polls(100) == await polls(1) == 4


@virtual_time
async def test_cancelling_one_wait_does_not_affect_the_others() -> None:
    """A cancelled wait, during or between polls, does not stop the polls of the waits that remain."""
    transport = ScriptedTransport(ending(5), latency=0.5)
    async with transport.client() as client:
        waits = [asyncio.create_task(client.instructor_executions.wait("a", poll=EVERY_SECOND)) for _ in range(4)]
        await asyncio.sleep(0.2)
        assert transport.open == 1
        waits[0].cancel()
        await asyncio.sleep(0.8)
        assert transport.open == 0
        waits[2].cancel()
        results = await asyncio.gather(*waits, return_exceptions=True)
        assert [type(result) for result in results] == [asyncio.CancelledError, InstructorExecution] * 2
        assert transport.times == [0, 1.5, 3, 4.5, 6]
        await assert_idle(client, transport)


@virtual_time
async def test_cancelled_wait_stops_polling() -> None:
    """The last cancelled wait cancels the poll in flight, and ends only after the poll has cleaned up."""

    class Reluctant(ScriptedTransport):
        async def send(self, *args: Any) -> Answer:
            try:
                return await super().send(*args)
            finally:
                await asyncio.sleep(3)

    transport = Reluctant(latency=NEVER)
    async with transport.client() as client:
        wait = asyncio.create_task(client.instructor_executions.wait("a"))
        stream = asyncio.create_task(outcomes_of(client, ["b"]))
        await asyncio.sleep(1)
        assert transport.open == 2
        wait.cancel()
        stream.cancel()
        ended_at: list[float] = []
        for task in (wait, stream):
            task.add_done_callback(lambda _: ended_at.append(now()))
        await asyncio.wait([wait, stream])
        assert ended_at == [4, 4]
        await assert_idle(client, transport)


@virtual_time
async def test_errors_are_not_shared_between_callers() -> None:
    """Each of several waits raises its own error object with the same cause."""
    cause = OSError("broken")

    def play(*_: Any) -> Reply:
        error = TransportError("does not verify", retryable=False)
        error.__cause__ = cause
        return error

    transport = at_once(play)
    async with transport.client() as client:
        waits = (client.instructor_executions.wait("a") for _ in range(3))
        errors = await asyncio.gather(*waits, return_exceptions=True)
        assert len({id(error) for error in errors}) == 3
        assert {str(error) for error in errors} == {"a: does not verify (after 1 attempt)"}
        assert [error.__cause__ for error in errors if isinstance(error, TransportError)] == [cause] * 3


@virtual_time
async def test_a_lookup_that_shares_a_poll_gets_the_whole_error() -> None:
    """A lookup that shares a poll raises the error with its body, although the wait keeps a shorter error."""
    transport = at_once(lambda *_: (0.5, Answer(503, {}, b"<html>down</html>")))
    async with transport.client(poll=EVERY_SECOND, retry=RetryPolicy(max_attempts=1)) as client:
        wait = asyncio.create_task(client.instructor_executions.wait("a", deadline=5))
        await asyncio.sleep(0.1)
        with pytest.raises(StatusError) as caught:
            await client.instructor_executions.get("a")
        assert caught.value.body == b"<html>down</html>"
        assert client.stats().shared == 1
        with pytest.raises(DeadlineExceededError):
            await wait


@pytest.mark.no_cover
@virtual_time
async def test_the_last_polls_of_many_are_spread() -> None:
    """The last polls of a thousand waits with one deadline are spread over time."""
    transport = at_once(never_ending)
    async with transport.client(concurrency=1000, poll=every(1000)) as client:
        outcomes = await outcomes_of(client, [f"e{n}" for n in range(1000)], deadline=300)
        assert len(outcomes) == 1000
        last = [at for at in transport.times if at > 290]
        assert len(last) == 1000
        assert max(Counter(int(at * 10) for at in last).values()) < 200
        assert max(last) <= 299


@virtual_time
async def test_an_error_raised_goes_when_its_last_reference_goes() -> None:
    """A failed wait leaves no reference cycle with its error and the frames of its traceback."""

    async def freed(failing: Callable[[], Any]) -> bool:
        try:
            await failing()
        except KaizenError as error:
            reference = weakref.ref(error)
        await asyncio.sleep(0)  # the loop still refers to its last callback
        return reference() is None

    transport = at_once(lambda i, _: status(404) if i == "missing" else running(i))
    gc.disable()
    try:
        async with transport.client() as client:
            wait = client.instructor_executions.wait
            assert await freed(lambda: wait("missing"))
            assert await freed(lambda: wait("a", deadline=2))
    finally:
        gc.enable()


class Named(msgspec.Struct):
    """A record that does not say when it ended."""

    id: str
    name: str = ""


class Minimal(msgspec.Struct, rename="camel"):
    """The smallest record that can be awaited."""

    id: str
    end_time: str | None


@virtual_time
async def test_waiting_needs_records_with_an_end() -> None:
    """Waiting for a record type without an end is refused before anything is sent. Looking it up works."""
    transport = at_once(ending(2))
    async with transport.client(poll=EVERY_SECOND) as client:
        named = client.lookups("instructor/executions/get", Named)
        for verb in (named.wait_many, named.watch):
            with pytest.raises(TypeError, match="give Named a field `end_time`"):
                verb(["a"])
        with pytest.raises(TypeError, match="give Named a field `end_time`"):
            await named.wait("a")
        assert not transport.sent
        assert (await named.get("a")).id == "a"
        minimal = client.lookups("instructor/executions/get", Minimal)
        assert (await minimal.wait("a")).end_time
        assert len(transport.sent) == 4


@virtual_time
async def test_misuse_is_refused_before_anything_is_sent() -> None:
    """Invalid ids, deadlines, policies and sources are refused before a request is sent."""
    transport = at_once()
    async with transport.client() as client:
        executions: Any = client.instructor_executions
        for misused in ("", 3, None, "\ud800"):
            with pytest.raises((TypeError, ValueError)):
                await executions.wait(misused)
        for deadline in (0, -1, math.inf, "3"):
            with pytest.raises((TypeError, ValueError)):
                await executions.wait("a", deadline=deadline)
            for verb in (executions.wait_many, executions.watch):
                with pytest.raises((TypeError, ValueError)):
                    verb(["a"], deadline=deadline)
        with pytest.raises(TypeError, match="poll must be a PollPolicy, not RetryPolicy"):
            await executions.wait("a", poll=RetryPolicy())
        with pytest.raises(TypeError, match="poll must be a PollPolicy, not RetryPolicy"):
            executions.watch(["a"], poll=RetryPolicy())
        with pytest.raises(TypeError, match="not one str"):
            executions.wait_many("a")
        assert not transport.sent


@virtual_time
async def test_ends_are_yielded_as_they_happen() -> None:
    """`wait_many` yields each id once in the order of the ends, and a repeated id as often as it was given."""
    ends = {"a": 9.0, "b": 3.0, "c": 6.0}
    transport = at_once(ending(ends))
    async with transport.client(poll=EVERY_SECOND) as client:
        seen = []
        async with client.instructor_executions.wait_many(["a", "b", "c", "b"]) as outcomes:
            async for outcome in outcomes:
                seen.append((outcome.id, now()))
                assert outcome.unwrap().is_finished
        assert seen == [("b", 3), ("b", 3), ("c", 6), ("a", 9)]
        assert polls_of(transport, "b") == [0, 1, 2, 3]
        await assert_idle(client, transport)


@virtual_time
async def test_asynchronous_sources_are_taken_as_they_come() -> None:
    """`wait_many` yields results while its asynchronous source is still yielding ids."""
    transport = at_once(ending({"a": 2, "b": 30, "c": 40}))
    async with transport.client(poll=EVERY_SECOND) as client:
        seen = []
        async with client.instructor_executions.wait_many(later("abc", 10)) as outcomes:
            async for outcome in outcomes:
                seen.append((outcome.id, round(now(), 6)))
        assert seen == [("a", 10), ("b", 30), ("c", 40)]


@virtual_time
async def test_a_source_is_read_no_faster_than_its_ids_are_polled() -> None:
    """`wait_many` reads a lazy source no faster than it polls, so a million ids take no memory in advance."""
    taken = 0

    def ids() -> Iterator[str]:
        nonlocal taken
        for number in range(1_000_000):
            taken += 1
            yield f"e{number}"

    transport = ScriptedTransport(never_ending, latency=1)
    async with transport.client(concurrency=3) as client:
        async with client.instructor_executions.wait_many(ids(), poll=EVERY_TEN):
            await asyncio.sleep(0.5)
            assert taken <= 2 * 3
            await asyncio.sleep(1)
            assert taken <= 3 * 3
        await assert_idle(client, transport)


@pytest.mark.parametrize("endless", [True, False], ids=["endless", "a collection"])
@pytest.mark.parametrize("asynchronous", [True, False], ids=["asynchronous", "synchronous"])
def test_a_slow_consumer_slows_the_source(endless: bool, asynchronous: bool) -> None:
    """A slow consumer bounds the number of waiting results and of polled ids."""

    @virtual_time
    async def check() -> None:
        transport = at_once(lambda i, _: ended(i))
        numbers = (f"e{number}" for number in itertools.count())
        lazy = later(numbers) if asynchronous else numbers
        ids = lazy if endless else [f"e{number}" for number in range(10_000)]
        async with transport.client(concurrency=4) as client:
            async with client.instructor_executions.wait_many(ids) as outcomes:
                for number in range(1, 30):
                    assert (await anext(outcomes)).ok
                    await asyncio.sleep(1)
                    assert len(transport.sent) <= number + 4 + READ_AHEAD + 4 + 4
            await assert_idle(client, transport)

    check()


@pytest.mark.parametrize("known", [False, True])
def test_an_endless_run_of_one_id_does_not_block_the_loop(known: bool) -> None:
    """An endless source of one repeated id does not block the loop, whether or not the id has ended."""

    @virtual_time
    async def check() -> None:
        taken: Counter[int] = Counter()
        loop: Any = asyncio.get_running_loop()

        def same() -> Iterator[str]:
            while taken[loop._jumping.steps_left] <= 2 * SLICE:
                taken[loop._jumping.steps_left] += 1
                yield "a"

        transport = at_once(ending(0) if known else never_ending)
        async with transport.client(poll=EVERY_SECOND) as client:
            if known:
                await client.instructor_executions.wait("a")
            async with client.instructor_executions.wait_many(same()) as outcomes:
                for _ in range(100):
                    await asyncio.sleep(0)
                    if known:
                        assert (await anext(outcomes)).ok
        assert max(taken.values()) <= SLICE
        assert len(taken) > 90

    check()


@virtual_time
async def test_ids_can_be_added_while_a_stream_runs() -> None:
    """`add` adds ids before and during the iteration, also when all earlier ids have ended."""
    transport = at_once(ending({"a": 2, "b": 4, "c": 6, "d": 8}))
    async with transport.client(poll=EVERY_SECOND) as client:
        follows = {"a": "b", "b": "c"}
        async with client.instructor_executions.wait_many() as outcomes:
            await asyncio.sleep(1)
            outcomes.add("a", "d")
            seen = []
            async for outcome in outcomes:
                seen.append(outcome.id)
                if outcome.id in follows:
                    outcomes.add(follows[outcome.id])
            assert seen == ["a", "b", "c", "d"]
            with pytest.raises(RuntimeError, match="until it has ended"):
                outcomes.add("e")
        await assert_idle(client, transport)


@virtual_time
async def test_adding_is_all_or_nothing() -> None:
    """`add` with an invalid id adds none of its ids.

    It is refused before the stream is entered and after it has ended.
    """
    transport = at_once(ending(0))
    async with transport.client() as client:
        stream = client.instructor_executions.wait_many()
        with pytest.raises(RuntimeError, match="from entering"):
            stream.add("a")
        async with stream as outcomes:
            with pytest.raises(ValueError, match="empty"):
                outcomes.add("a", "", "b")
            outcomes.add("c")
            assert [outcome.id async for outcome in outcomes] == ["c"]
        with pytest.raises(RuntimeError, match="until it has ended"):
            stream.add("a")
        watched = client.instructor_executions.watch([])
        async with watched as changes:
            changes.add("d", "d")
            assert [change.id async for change in changes] == ["d"]
        assert transport.ids == ["c", "d"]


async def broken_off(error: Exception) -> AsyncIterator[str]:
    """Yield an id, then raise an error."""
    yield "a"
    await asyncio.sleep(1)
    raise error


@virtual_time
async def test_an_error_of_the_source_comes_after_the_outcomes() -> None:
    """The outcomes of all ids taken come before the source's error, which is raised once."""
    transport = at_once(ending(5))
    async with transport.client(poll=EVERY_SECOND) as client:
        for source in (broken_off(ZeroDivisionError("mine")), broken_off(TimeoutError("mine"))):
            seen = []
            async with client.instructor_executions.wait_many(source) as outcomes:
                with pytest.raises((ZeroDivisionError, TimeoutError), match="mine"):
                    async for outcome in outcomes:
                        seen.append(outcome.id)
                assert seen == ["a"]
                assert [outcome async for outcome in outcomes] == []
        for given in (["a", "", 3, "b"], iter(["a", "", 3, "b"])):
            outcomes = await outcomes_of(client, given)
            assert {outcome.id: type(outcome.error) for outcome in outcomes} == {
                "a": type(None),
                "": InvalidIdError,
                3: InvalidIdError,
                "b": type(None),
            }
        changes = await changes_of(client, ["a", 3, 3])
        assert [change.id for change in changes if isinstance(change.error, InvalidIdError)] == [3, 3]
        await assert_idle(client, transport)


async def silent() -> AsyncIterator[str]:
    """Yield one id, then wait forever."""
    yield "a"
    await asyncio.Event().wait()


@virtual_time
async def test_a_source_that_falls_silent_does_not_outlast_the_deadline() -> None:
    """At the deadline, the ids taken from a silent source get their outcomes and the stream ends."""
    transport = at_once(never_ending)
    async with transport.client(poll=EVERY_SECOND) as client:
        (outcome,) = await outcomes_of(client, silent(), deadline=7)
        assert isinstance(outcome.error, DeadlineExceededError)
        assert now() == 7
        changes = await changes_of(client, silent(), deadline=7)
        assert [type(change.error) for change in changes] == [type(None), DeadlineExceededError]
        assert now() == 14
        await assert_idle(client, transport)


@virtual_time
async def test_a_deadline_cuts_a_generator_off_and_accounts_for_every_id_of_a_collection() -> None:
    """At the deadline, every id of a collection gets an outcome, also an id that was not taken.

    A generator is read no further.
    """
    transport = ScriptedTransport(never_ending, latency=1)
    async with transport.client(concurrency=2) as client:
        ids = [f"e{number}" for number in range(1000)]
        once = PollPolicy(min_interval=100, max_interval=100)
        outcomes = await outcomes_of(client, ids, deadline=3.5, poll=once)
        assert Counter(outcome.id for outcome in outcomes) == Counter(ids)
        assert {type(outcome.error) for outcome in outcomes} == {DeadlineExceededError}
        assert now() == 3.5
        asked = Counter(transport.ids)
        seen = {outcome.id: outcome.attempts for outcome in outcomes if outcome.attempts}
        assert len(seen) == 6
        assert len(asked) == 8
        last = [outcome.error.last_execution for outcome in outcomes if outcome.attempts and outcome.error]
        assert all(execution.id in seen for execution in last)
        few = await outcomes_of(client, iter(ids), deadline=3.5, poll=once)
        assert 8 <= len(few) <= 12
        assert {type(outcome.error) for outcome in few} == {DeadlineExceededError}
        await assert_idle(client, transport)


@virtual_time
async def test_nothing_is_polled_for_a_stream_that_is_out_of_time() -> None:
    """After its deadline, a stream polls nothing, and ids added later get an error at once."""
    transport = at_once(never_ending)
    async with transport.client() as client:
        async with client.instructor_executions.wait_many(["a", "b"], deadline=20, poll=EVERY_SECOND) as outcomes:
            await asyncio.sleep(21)
            polls = len(transport.sent)
            await asyncio.sleep(1000)
            assert len(transport.sent) == polls
            outcomes.add("c")
            errors = [outcome.error async for outcome in outcomes]
            assert {type(error) for error in errors} == {DeadlineExceededError}
            assert sorted((error.execution_id, error.attempts) for error in errors if error) == [
                ("a", 20),
                ("b", 20),
                ("c", 0),
            ]
        await assert_idle(client, transport)


@virtual_time
async def test_a_new_wait_resumes_polling() -> None:
    """A new wait resumes the polls of an id whose earlier waits have all reached their deadlines."""
    transport = at_once(ending(100))
    async with transport.client(poll=EVERY_TEN) as client:
        async with client.instructor_executions.wait_many(["a"], deadline=15) as outcomes:
            await asyncio.sleep(50)
            assert polls_of(transport, "a") == [0, 10, 14]
            wait = asyncio.create_task(client.instructor_executions.wait("a"))
            await asyncio.sleep(5)
            assert client.stats().poll_delay == 0
            await wait
            assert polls_of(transport, "a") == [0, 10, 14, 50, 60, 70, 80, 90, 100]
            assert (await anext(outcomes)).ok


@virtual_time
async def test_errors_of_a_deadline_are_made_as_they_are_taken() -> None:
    """A stream creates each deadline error when the consumer takes it.

    This saves memory and does not block the loop.
    """
    transport = at_once(never_ending)

    def errors() -> int:
        return sum(isinstance(thing, DeadlineExceededError) for thing in gc.get_objects())

    async with transport.client(concurrency=500) as client:
        ids = [f"e{number}" for number in range(1000)]
        async with client.instructor_executions.wait_many(ids, deadline=30, poll=every(100)) as outcomes:
            await asyncio.sleep(31)
            taken = 0
            async for _ in outcomes:
                taken += 1
                if taken == 100:
                    assert errors() < 10
            assert taken == 1000


@virtual_time
async def test_a_consumer_who_never_waits_does_not_block_the_loop() -> None:
    """A loop over results that are all ready lets other tasks run."""
    turns = 0

    async def neighbour() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    transport = at_once(never_ending)
    async with transport.client(concurrency=500) as client:
        async with client.instructor_executions.wait_many(
            [f"e{number}" for number in range(1000)], deadline=30, poll=every(100)
        ) as outcomes:
            await asyncio.sleep(31)
            task = asyncio.create_task(neighbour())
            await asyncio.sleep(0)
            turns = 0
            async for _ in outcomes:
                pass
            assert turns >= 1000 / PAUSE_EVERY
            task.cancel()
            await asyncio.wait([task])


@virtual_time
async def test_leaving_early_stops_the_polls() -> None:
    """Leaving a stream with polls in flight leaves no task, timer or request behind."""
    transport = ScriptedTransport(ending({"a": 3, "b": 1000, "c": 1000}), latency=0.4)
    async with transport.client() as client:
        for verb in (client.instructor_executions.wait_many, client.instructor_executions.watch):
            async with verb(["a", "b", "c"], poll=EVERY_SECOND) as results:
                async for _ in results:
                    break
                await asyncio.sleep(1.5)
            await assert_idle(client, transport)
            polls = len(transport.sent)
            await asyncio.sleep(100)
            assert len(transport.sent) == polls


@virtual_time
async def test_leaving_a_stream_of_many_goes_in_small_steps() -> None:
    """Leaving a stream with many ids lets the event loop run, and starts no further poll."""
    turns = 0

    async def neighbour() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    count = 6 * SLICE
    transport = at_once(never_ending)
    async with transport.client(concurrency=500) as client:
        async with client.instructor_executions.wait_many(
            [f"e{number}" for number in range(count)], poll=every(100)
        ) as outcomes:
            await asyncio.sleep(5)
            assert client.stats().waiting == count
            task = asyncio.create_task(neighbour())
            await asyncio.sleep(0)
            polls, turns = len(transport.sent), 0
            leaving = asyncio.create_task(outcomes.__aexit__(None, None, None))
            await asyncio.wait([leaving])
            assert turns >= count / SLICE
            assert len(transport.sent) == polls
            task.cancel()
            await asyncio.wait([task])
        await assert_idle(client, transport)


@virtual_time
async def test_an_error_of_the_consumer_is_raised() -> None:
    """An error in the consumer's block is raised, and the stream cleans up."""
    transport = at_once(ending({"a": 1, "b": 1000}))
    async with transport.client(poll=EVERY_SECOND) as client:
        with pytest.raises(ZeroDivisionError):
            async with client.instructor_executions.wait_many(["a", "b"]) as outcomes:
                async for _ in outcomes:
                    raise ZeroDivisionError
        await assert_idle(client, transport)


@virtual_time
async def test_two_consumers_share_a_stream() -> None:
    """Each outcome goes to one of two consumers, and both loops end."""
    transport = at_once(ending({f"e{number}": number for number in range(10)}))
    async with transport.client(poll=EVERY_SECOND) as client:
        seen: list[str] = []

        async def consume(outcomes: Any) -> None:
            async for outcome in outcomes:
                seen.append(outcome.id)

        async with client.instructor_executions.wait_many([f"e{number}" for number in range(10)]) as outcomes:
            await asyncio.gather(consume(outcomes), consume(outcomes))
        assert sorted(seen) == [f"e{number}" for number in range(10)]


async def waited_three_times(client: KaizenClient) -> None:
    """Wait for an id three times at the same time."""
    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(client.instructor_executions.wait("a", poll=EVERY_SECOND))


CANCELLED: dict[str, Callable[[KaizenClient], Any]] = {
    "wait": lambda client: client.instructor_executions.wait("a", poll=EVERY_SECOND),
    "wait, shared": waited_three_times,
    "wait_many": lambda client: outcomes_of(client, ["a", "b", "c", "a"], poll=EVERY_SECOND),
    "wait_many of an asynchronous source": lambda client: outcomes_of(client, later("abc", 0.5), poll=EVERY_SECOND),
    "wait_many, resumed": lambda client: outcomes_of(
        client, (), poll=EVERY_SECOND, checkpoint=checkpoint_of(("a", 1, 3.0, 0.5), ("b", 2, 0.0, 0.0))
    ),
    "watch": lambda client: changes_of(client, ["a", "b", "c"], poll=EVERY_SECOND),
}


@pytest.mark.parametrize("verb", CANCELLED.values(), ids=CANCELLED)
@pytest.mark.parametrize("twice", [False, True])
def test_cancelling_a_wait_at_any_step_leaves_nothing_behind(verb: Callable[[KaizenClient], Any], twice: bool) -> None:
    """Cancelling a wait after any number of loop steps leaves nothing behind and does not affect another wait."""

    async def cancelled_at(step: int) -> bool:
        """Cancel at a step, and return whether the call had finished by then."""
        ends = now() + 3
        transport = ScriptedTransport(lambda i, number: status(503) if number == 2 else ending(ends)(i, number))
        client = transport.client(concurrency=2, retry=AT_ONCE)
        other = asyncio.create_task(client.instructor_executions.wait("a", poll=EVERY_SECOND))
        task = asyncio.create_task(verb(client))
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)

        def cancel() -> None:
            task.cancel()
            if twice:
                loop.call_soon(task.cancel)

        loop.after_steps(step, cancel)
        await asyncio.wait([task])
        assert (await other).is_finished
        await assert_idle(client, transport)
        await client.aclose()
        return not task.cancelled()

    at_every_step(cancelled_at, more_than=20)


@virtual_time
async def test_closing_the_client_ends_every_wait() -> None:
    """A close ends each wait with the record of its poll in flight or with a ClientClosedError, and loses no id."""
    transport = ScriptedTransport(lambda i, number: (2.0, ended(i)) if i == "slow" else running(i), latency=0.1)
    client = transport.client(concurrency=3, poll=EVERY_TEN)
    executions = client.instructor_executions
    waits = [asyncio.create_task(executions.wait(i)) for i in ("a", "slow")]
    rest = [f"e{number}" for number in range(100)]
    many = asyncio.create_task(outcomes_of(client, ["a", "b", "slow", "b", *rest]))
    watched = asyncio.create_task(changes_of(client, ["a", "b"]))
    await asyncio.sleep(1)
    await client.aclose(drain=5)
    with pytest.raises(ClientClosedError, match="during the wait"):
        await waits[0]
    assert (await waits[1]).is_finished
    outcomes = {outcome.id: type(outcome.error) for outcome in await many}
    assert outcomes == {**dict.fromkeys(["a", "b", *rest], ClientClosedError), "slow": type(None)}
    assert Counter(outcome.id for outcome in many.result()) == {**dict.fromkeys(["a", "slow", *rest], 1), "b": 2}
    for watching in "ab":
        errors = [type(change.error) for change in await watched if change.id == watching]
        assert errors == [type(None), ClientClosedError]
    await assert_idle(client, transport)


@virtual_time
async def test_a_poll_that_outlasts_the_close_still_counts() -> None:
    """A poll that finishes during a drain gives its record if the execution has ended, and otherwise ends the wait."""

    def play(execution_id: str, _: int) -> Reply:
        return {"ends": (2.0, ended("ends")), "runs": (2.0, running("runs")), "fails": (2.0, status(503))}[execution_id]

    transport = ScriptedTransport(play)
    client = transport.client(poll=EVERY_TEN, retry=ONE_ATTEMPT)
    async with client.instructor_executions.wait_many(["ends", "runs", "fails"]) as outcomes:
        await asyncio.sleep(1)
        await client.aclose(drain=5)
        seen = {outcome.id: outcome async for outcome in outcomes}
    assert {i: type(outcome.error) for i, outcome in seen.items()} == {
        "ends": type(None),
        "runs": ClientClosedError,
        "fails": ClientClosedError,
    }
    error = seen["fails"].error
    assert error is not None
    assert isinstance(error.__cause__, StatusError)
    assert "its last poll failed" in str(error)
    await assert_idle(client, transport)


@virtual_time
async def test_polls_that_will_not_be_cancelled_do_no_harm() -> None:
    """A poll whose cancellation is swallowed or converted by other code is not repeated."""
    obstinate: list[BaseException] = []

    async def swallow() -> None:
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError as error:
            obstinate.append(error)

    class Converting(ScriptedTransport):
        async def send(self, *args: Any) -> Answer:
            try:
                return await super().send(*args)
            except asyncio.CancelledError:
                raise ZeroDivisionError from None

    for transport, limiter in ((at_once(never_ending), swallow), (Converting(latency=NEVER), None)):
        async with transport.client(limiter=limiter) as client:
            with pytest.raises(DeadlineExceededError):
                await client.instructor_executions.wait("a", deadline=5)
            await assert_idle(client, transport)
    assert len(obstinate) == 1


@virtual_time
async def test_an_end_and_a_cancellation_may_meet() -> None:
    """If an end and a cancellation happen in one step, the cancellation wins and other waits get the record."""
    transport = ScriptedTransport(lambda i, _: ended(i), latency=1)
    async with transport.client() as client:
        wait = asyncio.create_task(client.instructor_executions.wait("a"))
        other = asyncio.create_task(client.instructor_executions.wait("a"))
        await asyncio.sleep(0.5)
        scheduler = scheduler_of(client)
        end = scheduler._end

        def cancel_and_end(*args: Any) -> None:
            wait.cancel()
            end(*args)

        scheduler._end = cancel_and_end  # type: ignore[method-assign]
        await asyncio.wait([wait])
        assert wait.cancelled()
        assert (await other).is_finished


@virtual_time
async def test_an_end_and_a_deadline_may_meet() -> None:
    """If an end and a deadline happen in one step, the first counts and the other has no effect."""
    transport = ScriptedTransport(lambda i, _: ended(i), latency=1)
    async with transport.client() as client:
        clock: Any = client._binding.clock
        call_at = clock.call_at
        deadlines: list[Callable[[], None]] = []

        def note(when: float, callback: Callable[[], None]) -> Any:
            if when == 50:
                deadlines.append(callback)
            return call_at(when, callback)

        clock.call_at = note
        wait = asyncio.create_task(client.instructor_executions.wait("a", deadline=50))
        await asyncio.sleep(0.5)
        scheduler = scheduler_of(client)
        end = scheduler._end

        def end_and_expire(*args: Any) -> None:
            end(*args)
            deadlines[0]()

        scheduler._end = end_and_expire  # type: ignore[method-assign]
        assert (await wait).is_finished


@virtual_time
async def test_a_closed_client_refuses_to_wait() -> None:
    """A closed client refuses every wait, even for executions that it has seen end."""
    transport = at_once(ending(0))
    client = transport.client()
    executions = client.instructor_executions
    await executions.wait("a")
    await client.aclose()
    with pytest.raises(ClientClosedError, match="create a new"):
        await executions.wait("a")
    assert [type(outcome.error) for outcome in await outcomes_of(client, ["a", "b"])] == [ClientClosedError] * 2
    assert [type(change.error) for change in await changes_of(client, ["a"])] == [ClientClosedError]
    with pytest.raises(ClientClosedError):
        await outcomes_of(client, iter(["a", "b"]))
    assert transport.ids == ["a"]


@virtual_time
async def test_a_stream_under_a_close_still_meets_its_deadline() -> None:
    """During a drain, the deadline of a stream still cancels its poll in flight."""
    transport = ScriptedTransport(lambda i, _: (NEVER, running(i)))
    client = transport.client(attempt_timeout=100)
    many = asyncio.create_task(outcomes_of(client, ["a"], deadline=10))
    await asyncio.sleep(1)
    closing = asyncio.create_task(client.aclose(drain=60))
    (outcome,) = await many
    assert now() == 10
    assert isinstance(outcome.error, ClientClosedError)
    await closing
    await assert_idle(client, transport)


def test_a_client_waits_in_one_loop_after_another() -> None:
    """A client keeps its finished records for the next event loop."""
    requests: list[int] = []
    client = KaizenClient()

    async def use(execution_id: str) -> None:
        transport = at_once(ending(0))
        client._binding.clock = transport.client()._binding.clock
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("kaizen_async._binding.Transport", lambda **_: transport)
            await outcomes_of(client, ["a", execution_id])
            await client.instructor_executions.wait(execution_id)
        requests.append(len(transport.sent))

    for execution_id in ("b", "c"):
        virtual_time(use)(execution_id)
    virtual_time(client.aclose)()
    assert requests == [2, 1]


@virtual_time
async def test_a_wait_abandoned_with_its_loop_does_not_outlive_it() -> None:
    """When a program cancels all tasks at its end, cancelled polls do not start new tasks."""
    transport = ScriptedTransport(never_ending, latency=1)
    async with transport.client(concurrency=2, poll=EVERY_SECOND) as client:
        stream = client.instructor_executions.wait_many([f"e{number}" for number in range(10)])
        await stream.__aenter__()
        await asyncio.sleep(0.5)
        everyone = asyncio.all_tasks() - {asyncio.current_task()}
        for task in everyone:
            task.cancel()
        await asyncio.wait(everyone)
        assert not asyncio.all_tasks() - {asyncio.current_task()}
        await stream.__aexit__(None, None, None)
        await assert_idle(client, transport)


@virtual_time
async def test_a_poll_cancelled_from_outside_is_repeated() -> None:
    """A poll that other code cancels is repeated, so that its wait does not hang."""
    transport = ScriptedTransport(lambda i, number: running(i) if number == 1 else ended(i), latency=1)
    async with transport.client(poll=EVERY_TEN) as client:
        wait = asyncio.create_task(client.instructor_executions.wait("a"))
        await asyncio.sleep(0.5)
        (poll,) = asyncio.all_tasks() - {asyncio.current_task(), wait}
        poll.cancel()
        await wait
        assert transport.times == [0, 10.5]


class Explosive(msgspec.Struct, rename="camel"):
    """A record whose comparison raises an error."""

    id: str
    status: str
    end_time: str | None

    def __eq__(self, other: object) -> bool:
        raise ZeroDivisionError("in a record")

    __hash__ = None  # type: ignore[assignment]


@virtual_time
async def test_an_error_of_a_record_ends_its_waits() -> None:
    """An error in the code of a record is raised in every wait for that id, and other ids continue."""
    transport = at_once(lambda i, number: ending(5)(i, number) if i == "a" else ended(i))
    async with transport.client(poll=EVERY_SECOND) as client:
        explosive = client.lookups("instructor/executions/get", Explosive)
        waits = [asyncio.create_task(explosive.wait("a")) for _ in range(2)]
        seen = []
        with pytest.raises(ZeroDivisionError):
            async with explosive.wait_many(["a", "b"]) as outcomes:
                async for outcome in outcomes:
                    seen.append(outcome.id)
        assert seen == ["b"]
        for wait in waits:
            with pytest.raises(ZeroDivisionError):
                await wait
        await assert_idle(client, transport)


@virtual_time
async def test_a_watch_yields_the_first_state_and_then_changes_only() -> None:
    """`watch` yields the first state and then each change, with the record before and after."""
    script = ["Enqueued", "Enqueued", "InProgress", "InProgress", "Zorp", "Zorp"]

    def play(execution_id: str, number: int) -> Reply:
        return running(execution_id, script[number - 1]) if number <= 6 else ended(execution_id)

    transport = at_once(play)
    async with transport.client(poll=EVERY_SECOND) as client:
        seen = []
        last = None
        async with client.instructor_executions.watch("a") as changes:
            async for change in changes:
                seen.append((change.id, now()))
                assert change.error is None
                assert change.before == last
                last = change.after
        assert seen == [("a", 0), ("a", 2), ("a", 4), ("a", 6)]
        await assert_idle(client, transport)
        assert states(await changes_of(client, ["a"])) == [(None, "Completed")]


@virtual_time
async def test_changes_beside_the_status_are_changes() -> None:
    """A difference in any field counts as a change."""
    transport = at_once(
        lambda i, number: running(i, browserSessionId=f"bs_{min(number, 3)}") if number < 6 else ended(i)
    )
    async with transport.client(poll=EVERY_SECOND) as client:
        changes = await changes_of(client, "a")
        assert [change.after and change.after.browser_session_id for change in changes] == [
            "bs_1",
            "bs_2",
            "bs_3",
            None,
        ]


@virtual_time
async def test_changes_merge_for_a_slow_consumer() -> None:
    """A slow consumer gets one change, from the last state that it has seen to the latest."""
    transport = at_once(lambda i, number: running(i, f"step {number}") if number < 9 else ended(i))
    async with transport.client(poll=EVERY_SECOND) as client:
        seen = []
        async with client.instructor_executions.watch(["a", "b"]) as changes:
            async for change in changes:
                seen.append((change.id, *states([change])[0]))
                await asyncio.sleep(2)
        assert [entry[1:] for entry in seen if entry[0] == "a"] == [
            (None, "step 1"),
            ("step 1", "step 4"),
            ("step 4", "step 8"),
            ("step 8", "Completed"),
        ]
        assert [entry[1:] for entry in seen if entry[0] == "b"] == [
            (None, "step 2"),
            ("step 2", "step 6"),
            ("step 6", "Completed"),
        ]


@virtual_time
async def test_changes_that_cancel_out_are_none() -> None:
    """`watch` yields no change from a record to itself if a state came and went unseen."""
    script = {2: "Paused", 6: "Paused"}
    transport = at_once(lambda i, number: running(i, script.get(number, "InProgress")) if number < 8 else ended(i))
    async with transport.client(poll=EVERY_SECOND) as client:
        async with client.instructor_executions.watch("a") as changes:
            seen = [await anext(changes)]
            await asyncio.sleep(3.5)
            seen += [change async for change in changes]
        assert states(seen) == [
            (None, "InProgress"),
            ("InProgress", "Paused"),
            ("Paused", "InProgress"),
            ("InProgress", "Completed"),
        ]


@virtual_time
async def test_an_error_is_the_last_change_of_its_id() -> None:
    """An error is the last change of its id, also after an unseen change, and the other ids continue."""

    def play(execution_id: str, number: int) -> Reply:
        if execution_id == "a":
            return running("a") if number == 1 else status(404)
        return ending(5)(execution_id, number)

    transport = at_once(play)
    async with transport.client(poll=EVERY_SECOND) as client:
        async with client.instructor_executions.watch(["a", "b"]) as changes:
            await asyncio.sleep(9)
            seen = [(change.id, type(change.error), change.after is None) async for change in changes]
        assert seen == [
            ("a", type(None), False),
            ("b", type(None), False),
            ("a", NotFoundError, True),
        ]


@virtual_time
async def test_a_watch_joins_a_wait_with_the_state_already_known() -> None:
    """A watch that joins a wait starts with the known state and sends no request."""
    transport = at_once(ending(25))
    async with transport.client(poll=EVERY_TEN) as client:
        wait = asyncio.create_task(client.instructor_executions.wait("a"))
        await asyncio.sleep(5)
        seen = []
        async with client.instructor_executions.watch("a") as changes:
            async for change in changes:
                seen.append((now(), *states([change])[0]))
        assert seen == [(5, None, "InProgress"), (30, "InProgress", "Completed")]
        assert len(transport.sent) == 4
        await wait


@virtual_time
async def test_watching_many_with_a_slow_consumer_takes_ids_in_slowly() -> None:
    """With a slow consumer, the number of unread first states is bounded."""
    transport = at_once(never_ending)
    async with transport.client(concurrency=4) as client:
        async with client.instructor_executions.watch((f"e{n}" for n in itertools.count()), poll=EVERY_TEN) as changes:
            for number in range(1, 50):
                await anext(changes)
                await asyncio.sleep(0.01)
                assert client.stats().waiting <= number + 4 + READ_AHEAD + 4 + 4


@pytest.mark.parametrize("verb", ["wait_many", "watch"])
def test_a_source_continues_as_results_are_taken(verb: str) -> None:
    """Taking a result lets the stream read its source, also when no earlier id is polled any more."""

    @virtual_time
    async def check() -> None:
        transport = at_once(lambda i, _: ended(i))
        async with transport.client(concurrency=4) as client:
            stream = getattr(client.instructor_executions, verb)(f"e{number}" for number in range(100))
            async with stream as results:
                seen = []
                async for result in results:
                    seen.append(result.id)
                    await asyncio.sleep(0.01)
            assert seen == [f"e{number}" for number in range(100)]
            assert now() == pytest.approx(1)

    check()


@virtual_time
async def test_ids_not_taken_in_by_the_deadline_get_their_error_then() -> None:
    """Ids that were not taken by the deadline get their error at the deadline, even if all slots are in use."""
    transport = ScriptedTransport(never_ending, latency=NEVER)
    async with transport.client(concurrency=1) as client:
        blocking = asyncio.create_task(client.instructor_executions.wait("blocks"))
        await asyncio.sleep(1)
        outcomes = await outcomes_of(client, [f"e{number}" for number in range(50)], deadline=5)
        assert now() == 6
        assert len(outcomes) == 50
        blocking.cancel()
        await asyncio.wait([blocking])


def checkpoint_of(*ids: tuple[str, int, float, float], taken_at: float = 1_700_000_000.0) -> dict[str, Any]:
    """Return a checkpoint as the JSON of an earlier process."""
    learned = {"aim": "share", "lags": [], "workflows": {}}
    state = {"version": CHECKPOINT_VERSION, "taken": 0, "taken_at": taken_at, "ids": ids, "learned": learned}
    loaded: dict[str, Any] = json.loads(json.dumps(state))
    return loaded


@virtual_time
async def test_a_checkpoint_holds_all_ids_without_outcome() -> None:
    """A checkpoint is plain JSON with all ids whose outcome the consumer has not taken, with their ages."""
    transport = ScriptedTransport(lambda i, _: ended(i) if i in "ab" else running(i), latency=1)
    async with transport.client(concurrency=2, poll=EVERY_TEN) as client:
        async with client.instructor_executions.wait_many(["a", "b", "c", "c", "d", "e", "f"]) as outcomes:
            assert {i[0] for i in outcomes.checkpoint()["ids"]} == set("abcdef")
            first = await anext(outcomes)
            await asyncio.sleep(2)
            state = outcomes.checkpoint()
            assert json.loads(json.dumps(state)) == state
        ids = {entry[0]: entry[1:] for entry in state["ids"]}
        assert len(state["ids"]) == len(ids) == 5
        assert set(ids) == set("abcdef") - {first.id}
        assert ids["c"][0] == 2
        assert 2 <= ids["c"][1] <= 3
        assert 8 <= ids["c"][2] <= 10
        assert transport.ids == ["a", "b", "c", "d", "e", "f"]


@virtual_time
async def test_a_checkpoint_can_be_taken_after_leaving() -> None:
    """A checkpoint can also be taken after the block was left, and it has all the same ids."""
    transport = at_once(ending({"a": 1, "b": 100, "c": 100}))
    async with transport.client(poll=EVERY_TEN) as client:
        stream = client.instructor_executions.wait_many(["a", "b", "b", "c"])
        async with stream as outcomes:
            await anext(outcomes)
            inside = outcomes.checkpoint()
        await asyncio.sleep(50)
        after = stream.checkpoint()
        assert after["taken_at"] == inside["taken_at"]
        assert sorted(after["ids"]) == sorted(inside["ids"])
        assert {entry[0]: entry[1] for entry in after["ids"]} == {"b": 2, "c": 1}


@virtual_time
async def test_a_wait_resumes_with_the_polls_where_they_were() -> None:
    """A resumed wait polls an id when it was due. Polls that are overdue are spread over time."""
    transport = at_once(ending(4000))
    await asyncio.sleep(3600)
    policy = PollPolicy(max_interval=300)
    state = checkpoint_of(
        *((f"old {number}", 1, 3000.0, 10.0) for number in range(100)),
        ("coming", 1, 3400.0, 250.0),
        ("new", 2, 0.0, 0.0),
        taken_at=1_700_000_000.0 + 3500,
    )
    async with transport.client(poll=policy) as client:
        seen: Counter[str] = Counter()
        async with client.instructor_executions.wait_many(["given"], checkpoint=state) as outcomes:
            async for outcome in outcomes:
                seen[outcome.id] += 1
        assert seen == {**{f"old {number}": 1 for number in range(100)}, "coming": 1, "new": 2, "given": 1}
        first = {i: polls_of(transport, i)[0] - 3600 for i in seen}
        assert first["new"] == first["given"] == 0
        assert first["coming"] == 150
        old = sorted(first[f"old {number}"] for number in range(100))
        assert old[0] >= 0
        assert 200 < old[-1] <= 330
        assert max(b - a for a, b in itertools.pairwise(old)) < 60
        assert len({round(at) for at in old}) > 50


@virtual_time
async def test_a_resumed_wait_keeps_learned_durations() -> None:
    """A checkpoint carries the learned durations and the ages, so that a resumed wait polls as rarely as before."""

    def play(execution_id: str, _: int) -> Reply:
        return ending(1000 if execution_id.startswith("past") else 5000)(execution_id, 0)

    transport = at_once(play)
    policy = PollPolicy(max_interval=3600)
    async with transport.client(poll=policy) as client:
        async with client.instructor_executions.wait_many([f"past {n}" for n in range(50)] + ["a"]) as outcomes:
            for _ in range(50):
                await anext(outcomes)
            state = json.loads(json.dumps(outcomes.checkpoint()))
            knowing = scheduler_of(client).spread(outcomes._call.group, 900)
    transport = at_once(play)
    async with transport.client(poll=policy) as client:
        async with client.instructor_executions.wait_many(checkpoint=state) as outcomes:
            assert outcomes.checkpoint()["learned"] == state["learned"]
            assert [outcome.id async for outcome in outcomes] == ["a"]
    assert knowing > 0


@virtual_time
async def test_a_resumed_wait_of_many_goes_in_small_steps() -> None:
    """A resumed wait takes many ids in small steps, and a checkpoint in between has all of them."""
    transport = at_once(never_ending)
    state = checkpoint_of(*((f"e{number}", 1, 100.0, 50.0) for number in range(2000)))
    async with transport.client(poll=EVERY_TEN) as client:
        async with client.instructor_executions.wait_many(checkpoint=state) as outcomes:
            turns = 0
            while client.stats().waiting < 2000:
                assert len(outcomes.checkpoint()["ids"]) == 2000
                await asyncio.sleep(0)
                turns += 1
            assert turns >= 2000 / SLICE


@virtual_time
async def test_ids_of_a_checkpoint_outlast_a_deadline() -> None:
    """All ids of a checkpoint get an outcome at the deadline, even if the source is silent."""
    transport = at_once(never_ending)
    state = checkpoint_of(*((f"e{number}", 1, 100.0, 50.0) for number in range(2000)))
    async with transport.client(poll=EVERY_TEN) as client:
        outcomes = await outcomes_of(client, silent(), checkpoint=state, deadline=0.001)
        assert len(outcomes) == 2001


MALFORMED: dict[str, Any] = {
    "nothing": None,
    "a list": [],
    "another version": {**checkpoint_of(), "version": 99},
    "an id that is a list": checkpoint_of(([], 1, 0.0, 0.0)),  # type: ignore[arg-type]
    "too many of one id": checkpoint_of(("a", MOST_REPEATS + 1, 0.0, 0.0)),
    "too many ids": checkpoint_of(*[("a", MOST_REPEATS, 0.0, 0.0)] * 21),
    "an endless count": checkpoint_of(("a", 1e308, 0.0, 0.0)),  # type: ignore[arg-type]
    "an endless age": checkpoint_of(("a", 1, 1e308, 0.0)),
    "a poll in eternity": checkpoint_of(("a", 1, 0.0, 1e308)),
    "a time in eternity": checkpoint_of(taken_at=1e308),
    "deep nesting": {**checkpoint_of(), "learned": functools.reduce(lambda inner, _: [inner], range(100_000), [])},
    "a count of 0": checkpoint_of(("a", 0, 0.0, 0.0)),
    "a negative age": checkpoint_of(("a", 1, -5.0, 0.0)),
    "nonsense learned": {**checkpoint_of(), "learned": {"aim": 3}},
}


@pytest.mark.parametrize("state", MALFORMED.values(), ids=MALFORMED)
def test_an_invalid_checkpoint_is_refused(state: Any) -> None:
    """The call itself refuses an invalid checkpoint."""

    @virtual_time
    async def check() -> None:
        transport = at_once()
        async with transport.client() as client:
            if state is None:
                client.instructor_executions.wait_many(checkpoint=None)
            else:
                with pytest.raises(ValueError, match=r"checkpoint|aim"):
                    client.instructor_executions.wait_many(checkpoint=state)

    check()


@virtual_time
async def test_a_checkpoint_keeps_invalid_ids() -> None:
    """A checkpoint keeps invalid ids that have no outcome yet, and a later call gives them one."""
    transport = ScriptedTransport(lambda i, _: ended(i), latency=1)
    async with transport.client(concurrency=1) as client:
        stream = client.instructor_executions.wait_many(["a", "", "b", math.nan, object()])
        async with stream as outcomes:
            assert (await anext(outcomes)).id == ""
        state = json.loads(json.dumps(stream.checkpoint()))
        assert state["taken"] == 5
        seen = await outcomes_of(client, (), checkpoint=state)
        assert Counter((outcome.id, outcome.ok) for outcome in seen) == {
            ("a", True): 1,
            ("b", True): 1,
            (None, False): 2,
        }


@virtual_time
async def test_records_are_compared_not_statuses_alone() -> None:
    """A wait keeps the latest record of each execution."""
    transport = at_once(lambda i, number: record(i, status=f"s{number}"))
    async with transport.client(poll=EVERY_SECOND) as client:
        outcomes = await outcomes_of(client, ["a"], deadline=3.5)
        assert isinstance(outcomes[0].error, DeadlineExceededError)
        assert outcomes[0].error.last_execution.status == "s4"
