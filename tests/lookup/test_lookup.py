"""A single lookup: its requests, the handling of responses, and shared requests, in virtual time."""

import asyncio
import contextlib
import gc
import logging
import traceback

import pytest
from scripted_transport import AT_ONCE, NEVER, Reply, ScriptedTransport, failing, record, status
from virtual_time import virtual_time

from kaizen_async import (
    AuthenticationError,
    ClientClosedError,
    DeadlineExceededError,
    DecodeError,
    InstructorExecution,
    KaizenError,
    NotFoundError,
    RateLimitError,
    RetryPolicy,
    StatusError,
    TransportError,
)
from kaizen_async._binding import MOST_POLICIES
from kaizen_async._transport.transport import Answer


@virtual_time
async def test_a_lookup_is_one_request_and_one_record() -> None:
    """A lookup sends one request and returns one record."""
    transport = ScriptedTransport()
    async with transport.client() as client:
        execution = await client.instructor_executions.get("a")
        assert isinstance(execution, InstructorExecution)
        assert execution.id == "a"
        assert transport.ids == ["a"]


@pytest.mark.parametrize("code", [408, 425, 429, 500, 502, 503, 504])
def test_temporary_statuses_are_retried(code: int) -> None:
    """The client retries statuses that mean "not now"."""

    @virtual_time
    async def play() -> None:
        transport = ScriptedTransport(lambda i, number: status(code) if number == 1 else record(i))
        async with transport.client() as client:
            assert (await client.instructor_executions.get("a")).id == "a"
            assert transport.ids == ["a", "a"]
            assert client.stats().retries == 1

    play()


@pytest.mark.parametrize("code", [301, 302, 307, 308, 400, 401, 402, 403, 404, 405, 409, 410, 413, 415, 422, 451, 501])
def test_permanent_statuses_are_not_retried(code: int) -> None:
    """The client does not retry statuses that mean "not this"."""

    @virtual_time
    async def play() -> None:
        transport = ScriptedTransport(lambda *_: status(code))
        async with transport.client() as client:
            error = await failing(client)
            assert isinstance(error, StatusError)
            assert error.status == code
            assert error.attempts == 1
            assert error.execution_id == "a"
            assert transport.ids == ["a"]

    play()


@pytest.mark.parametrize(
    ("reply", "error", "attempts"),
    [
        (status(401), AuthenticationError, 1),
        (status(404), NotFoundError, 1),
        (status(500), StatusError, 5),
        (status(429), RateLimitError, 5),
        (TransportError("reset"), TransportError, 5),
        (TransportError("bad certificate", retryable=False), TransportError, 1),
        (TransportError("no HTTP", garbled=True), TransportError, 2),
        (Answer(200, {}, b"<html>"), DecodeError, 2),
        (Answer(200, {}, b""), DecodeError, 2),
        (Answer(204, {}, b""), DecodeError, 2),
        (Answer(200, {}, b'{"id":"a"}'), DecodeError, 1),
    ],
)
def test_a_lasting_failure_is_raised_after_all_attempts(
    reply: Answer | KaizenError, error: type[KaizenError], attempts: int
) -> None:
    """A lasting failure raises the error of the last attempt, with its id and the number of attempts."""

    @virtual_time
    async def play() -> None:
        transport = ScriptedTransport(lambda *_: reply)
        async with transport.client(deadline=None) as client:
            raised = await failing(client)
            assert type(raised) is error
            assert raised.attempts == len(transport.sent) == attempts
            assert raised.execution_id == "a"
            assert str(raised).startswith("a: ")
            assert client.stats().failed == 1

    play()


@virtual_time
async def test_the_last_error_is_raised() -> None:
    """A lookup raises the error of its last attempt, not the first, and without a wrapper."""
    transport = ScriptedTransport(lambda _, number: status(500) if number < 3 else status(404))
    async with transport.client() as client:
        error = await failing(client)
        assert isinstance(error, NotFoundError)
        assert error.attempts == 3
        assert error.__cause__ is None


@virtual_time
async def test_a_deadline_that_passes_names_the_last_failure_as_its_cause() -> None:
    """A DeadlineExceededError has the last failure as its cause."""
    transport = ScriptedTransport(lambda i, number: status(502) if number == 1 else (NEVER, record(i)))
    async with transport.client(deadline=5, retry=AT_ONCE) as client:
        error = await failing(client)
        assert type(error) is DeadlineExceededError
        assert error.attempts == 2
        assert isinstance(error.__cause__, StatusError)
        assert error.__cause__.status == 502


@virtual_time
async def test_a_deadline_of_the_call_replaces_the_clients() -> None:
    """A deadline of the call replaces the client's, whether it is shorter, longer or None."""
    transport = ScriptedTransport(lambda i, _: (20, record(i)))
    async with transport.client(deadline=10) as client:
        assert isinstance(await failing(client), DeadlineExceededError)
        assert isinstance(await failing(client, deadline=1), DeadlineExceededError)
        assert (await client.instructor_executions.get("a", deadline=21)).id == "a"
        assert (await client.instructor_executions.get("a", deadline=None)).id == "a"


@virtual_time
async def test_a_deadline_that_passes_during_a_retry_sends_nothing_more() -> None:
    """After a loop that was blocked beyond the deadline, a lookup sends no request."""
    transport = ScriptedTransport(lambda *_: status(500))
    async with transport.client(deadline=1, retry=AT_ONCE) as client:
        lookups = client._binding.lookups(client.instructor_executions._endpoint, None)
        outcome = await lookups.look_up("a", ends_at=asyncio.get_running_loop().time())
        assert isinstance(outcome.error, DeadlineExceededError)
        assert str(outcome.error) == "a: its deadline passed before an attempt could be made"
        assert outcome.attempts == 0
        assert not transport.sent


@virtual_time
async def test_a_retry_policy_of_the_call_replaces_the_clients() -> None:
    """A retry policy of a call replaces the client's for that call only."""
    transport = ScriptedTransport(lambda *_: status(500))
    async with transport.client(retry=RetryPolicy(max_attempts=2)) as client:
        assert (await failing(client, retry=RetryPolicy(max_attempts=3))).attempts == 3
        assert (await failing(client)).attempts == 2


@virtual_time
async def test_the_statuses_of_the_policy_are_retried() -> None:
    """Exactly the statuses of the policy are retried, for example a 404 and not a 503."""
    patient = RetryPolicy(statuses=frozenset({404}))
    transport = ScriptedTransport(lambda i, number: status(404) if number == 1 else record(i))
    async with transport.client(retry=patient) as client:
        assert (await client.instructor_executions.get("a")).id == "a"
    transport = ScriptedTransport(lambda *_: status(503))
    async with transport.client(retry=patient) as client:
        assert (await failing(client)).attempts == 1


@virtual_time
async def test_lookups_of_the_same_id_share_one_request() -> None:
    """A hundred concurrent lookups of one id share one request, and each returns the record."""
    transport = ScriptedTransport()
    async with transport.client() as client:
        records = await asyncio.gather(*(client.instructor_executions.get("a") for _ in range(100)))
        assert transport.ids == ["a"]
        assert {execution.id for execution in records} == {"a"}
        stats = client.stats()
        assert (stats.lookups, stats.shared, stats.succeeded) == (1, 99, 1)
        await client.instructor_executions.get("a")
        assert transport.ids == ["a", "a"]


@virtual_time
async def test_a_shared_failure_is_an_error_of_its_own_for_each_caller() -> None:
    """Each lookup that shares a failed request raises its own error, so that tracebacks do not accumulate."""
    transport = ScriptedTransport(lambda *_: status(404))
    async with transport.client() as client:
        errors = await asyncio.gather(*(failing(client) for _ in range(3)))
        assert transport.ids == ["a"]
        assert len({id(error) for error in errors}) == 3
        assert {str(error) for error in errors} == {
            "a: the server answered 404 Not Found: no such execution (after 1 attempt)"
        }
        assert len({len(traceback.extract_tb(error.__traceback__)) for error in errors}) == 1


@virtual_time
async def test_a_shared_failure_keeps_its_cause() -> None:
    """The error of each lookup that shares a request has the same cause."""

    def play(_: str, __: int) -> Reply:
        error = TransportError("reset", retryable=False)
        error.__cause__ = ConnectionResetError(104)
        return error

    async with ScriptedTransport(play).client() as client:
        for error in await asyncio.gather(*(failing(client) for _ in range(3))):
            assert isinstance(error.__cause__, ConnectionResetError)


@virtual_time
async def test_a_follower_takes_over_from_a_cancelled_lookup() -> None:
    """If the first of several sharing lookups is cancelled, another one sends the request again."""
    transport = ScriptedTransport(lambda i, number: (NEVER if number == 1 else 0.1, record(i)))
    async with transport.client() as client:
        first = asyncio.create_task(client.instructor_executions.get("a"))
        await asyncio.sleep(0)
        others = [asyncio.create_task(client.instructor_executions.get("a")) for _ in range(5)]
        await asyncio.sleep(1)
        first.cancel()
        assert {(await other).id for other in others} == {"a"}
        assert transport.ids == ["a", "a"]
        assert first.cancelled()


@virtual_time
async def test_a_cancelled_follower_leaves_the_others_alone() -> None:
    """A cancelled follower affects neither the shared request nor the other lookups."""
    transport = ScriptedTransport()
    async with transport.client() as client:
        tasks = [asyncio.create_task(client.instructor_executions.get("a")) for _ in range(3)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        assert (await tasks[0]).id == (await tasks[2]).id == "a"
        assert tasks[1].cancelled()
        assert transport.ids == ["a"]


@virtual_time
async def test_a_followers_own_deadline_holds() -> None:
    """A follower's own deadline ends its wait and not the shared request."""
    transport = ScriptedTransport(latency=10)
    async with transport.client() as client:
        first = asyncio.create_task(client.instructor_executions.get("a"))
        await asyncio.sleep(0)
        error = await failing(client, deadline=2)
        assert type(error) is DeadlineExceededError
        assert str(error) == "a: its deadline passed while another lookup of the same id was in flight"
        assert asyncio.get_running_loop().time() == pytest.approx(2)
        assert (await first).id == "a"


@virtual_time
async def test_a_follower_is_not_bound_by_the_first_callers_deadline() -> None:
    """If the first lookup's deadline passes, a follower with more time continues."""
    transport = ScriptedTransport(lambda i, number: (NEVER if number == 1 else 0.1, record(i)))
    async with transport.client() as client:
        first = asyncio.create_task(failing(client, deadline=1))
        await asyncio.sleep(0)
        assert (await client.instructor_executions.get("a", deadline=30)).id == "a"
        assert isinstance(await first, DeadlineExceededError)


@pytest.mark.parametrize(
    "failure", [status(503, retry_after="5"), status(429, retry_after="5")], ids=["unavailable", "throttled"]
)
def test_a_follower_with_time_for_the_next_attempt_makes_it(failure: Answer) -> None:
    """If the first lookup's deadline is too short for the server's pause, a follower with more time retries."""

    @virtual_time
    async def play() -> None:
        transport = ScriptedTransport(lambda i, number: failure if number == 1 else record(i))
        async with transport.client() as client:
            first = asyncio.create_task(failing(client, deadline=1))
            await asyncio.sleep(0)
            assert (await client.instructor_executions.get("a", deadline=30)).id == "a"
            assert isinstance(await first, StatusError)
            assert transport.ids == ["a", "a"]
            assert transport.times[1] >= 5.1

    play()


@virtual_time
async def test_a_follower_without_time_for_the_next_attempt_shares_the_failure() -> None:
    """A follower without time for another attempt raises the shared failure."""
    transport = ScriptedTransport(lambda *_: status(429, retry_after="50"))
    async with transport.client(deadline=10) as client:
        errors = await asyncio.gather(failing(client), failing(client), failing(client, deadline=20))
        assert transport.ids == ["a"]
        assert {type(error) for error in errors} == {RateLimitError}


@virtual_time
async def test_a_follower_of_exhausted_attempts_shares_the_failure() -> None:
    """A follower of a lookup that used all attempts raises its failure and does not start new attempts."""
    transport = ScriptedTransport(lambda *_: status(500))
    async with transport.client(retry=AT_ONCE) as client:
        errors = await asyncio.gather(failing(client), failing(client, deadline=None))
        assert len(transport.ids) == 5
        assert [error.attempts for error in errors] == [5, 5]


@virtual_time
async def test_closing_reaches_followers_too() -> None:
    """A close gives each follower its own ClientClosedError."""
    transport = ScriptedTransport(latency=NEVER)
    client = transport.client()
    tasks = [asyncio.create_task(failing(client)) for _ in range(3)]
    await asyncio.sleep(1)
    await client.aclose()
    for task in tasks:
        assert isinstance(await task, ClientClosedError)


@virtual_time
async def test_other_kinds_or_policies_are_not_shared() -> None:
    """Lookups of other kinds or under other policies do not share a request."""
    transport = ScriptedTransport()
    async with transport.client() as client:
        other = client.lookups("executions/get", InstructorExecution)
        await asyncio.gather(
            client.instructor_executions.get("a"),
            other.get("a"),
            client.instructor_executions.get("a", retry=RetryPolicy(max_attempts=1)),
        )
        assert transport.ids == ["a", "a", "a"]


@virtual_time
async def test_counts_add_up() -> None:
    """The figures of `stats` match the lookups, attempts and retries that happened."""

    def play(execution_id: str, number: int) -> Reply:
        return (
            status(500)
            if execution_id == "flaky" and number < 3
            else status(404)
            if execution_id == "missing"
            else record(execution_id)
        )

    transport = ScriptedTransport(play)
    async with transport.client(retry=AT_ONCE) as client:
        await client.instructor_executions.get("flaky")
        await failing(client, "missing")
        busy = asyncio.create_task(client.instructor_executions.get("good"))
        await asyncio.sleep(0)
        assert client.stats().in_flight == 1
        await busy
        stats = client.stats()
        assert (stats.lookups, stats.succeeded, stats.failed, stats.shared) == (3, 2, 1, 0)
        assert (stats.attempts, stats.retries, stats.throttled, stats.pauses) == (5, 2, 0, 0)
        assert (stats.in_flight, stats.gate_pace, stats.gate_seconds_left) == (0, None, 0)


@virtual_time
async def test_a_cancelled_lookup_is_neither_success_nor_failure() -> None:
    """A cancelled lookup counts neither as a success nor as a failure."""
    transport = ScriptedTransport(latency=NEVER)
    async with transport.client() as client:
        task = asyncio.create_task(client.instructor_executions.get("a"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        stats = client.stats()
        assert (stats.lookups, stats.succeeded, stats.failed, stats.in_flight) == (1, 0, 0, 0)


def alive(cls: type) -> int:
    """Return the number of objects of a class."""
    return sum(isinstance(thing, cls) for thing in gc.get_objects())


def test_a_failing_lookup_leaves_no_garbage() -> None:
    """The error, traceback and frames of a failed lookup are freed with their last reference."""

    @virtual_time
    async def play() -> None:
        transport = ScriptedTransport(lambda *_: status(404))
        async with transport.client() as client:
            gc.collect()
            before = alive(NotFoundError)
            gc.disable()
            try:
                for _ in range(20):
                    with contextlib.suppress(NotFoundError):
                        await client.instructor_executions.get("a")
                assert alive(NotFoundError) == before
            finally:
                gc.enable()

    play()


@virtual_time
async def test_an_outcome_that_is_unwrapped_can_be_collected() -> None:
    """An unwrapped outcome can be collected, although its error's traceback refers to it."""
    transport = ScriptedTransport(lambda *_: status(404))
    async with transport.client() as client:

        async def handle() -> None:
            (outcome,) = await client.instructor_executions.get_many(["a"])
            with pytest.raises(NotFoundError):
                outcome.unwrap()

        gc.collect()
        before = alive(NotFoundError)
        for _ in range(20):
            await handle()
        gc.collect()
        assert alive(NotFoundError) == before


@virtual_time
async def test_the_log_shows_attempts_and_pauses(caplog: pytest.LogCaptureFixture) -> None:
    """The log has attempts at debug level and a pause as a warning, without bodies."""
    caplog.set_level(logging.DEBUG, "kaizen_async")
    replies = {1: status(500), 2: status(429, retry_after="2")}
    transport = ScriptedTransport(lambda i, number: replies.get(number) or record(i))
    async with transport.client(retry=AT_ONCE) as client:
        await client.instructor_executions.get("a")
    assert [(entry.levelname, entry.getMessage()) for entry in caplog.records if entry.name == "kaizen_async"] == [
        ("DEBUG", "a: attempt 1 failed: the server answered 500 Internal Server Error"),
        ("DEBUG", "a: attempt 2 follows in its turn, since the server answered 500 Internal Server Error"),
        ("WARNING", caplog.records[2].getMessage()),
        ("DEBUG", "a: attempt 2 failed: the server answered 429 Too Many Requests"),
        ("DEBUG", "a: attempt 3 follows in its turn, since the server answered 429 Too Many Requests"),
        ("WARNING", caplog.records[5].getMessage()),
        ("DEBUG", "a: attempt 3 got the record"),
    ]
    assert (
        caplog.records[2]
        .getMessage()
        .startswith("The server has rejected every request of late (429). Paused; probing in 2")
    )


@virtual_time
async def test_lookups_under_equal_policies_are_shared() -> None:
    """Lookups of one id under equal policies share a request."""
    transport = ScriptedTransport()
    async with transport.client() as client:
        gets = (client.instructor_executions.get("a", retry=RetryPolicy(max_attempts=n % 2 + 1)) for n in range(10))
        await asyncio.gather(*gets)
        assert transport.ids == ["a", "a"]


@virtual_time
async def test_the_policies_that_are_remembered_are_bounded() -> None:
    """A client keeps a bounded number of policies, even if each call creates a new one."""
    async with ScriptedTransport().client() as client:
        for number in range(3 * MOST_POLICIES):
            await client.instructor_executions.get("a", retry=RetryPolicy(initial_backoff=number))
        assert len(client._binding.known_lookups) == MOST_POLICIES


@virtual_time
@pytest.mark.parametrize("verb", ["get", "get_many", "stream"])
async def test_a_retry_policy_of_a_call_is_checked(verb: str) -> None:
    """An invalid retry policy of a call is refused before anything is sent."""
    transport = ScriptedTransport()
    async with transport.client() as client:
        with pytest.raises(TypeError, match="retry must be a RetryPolicy, not int"):
            await getattr(client.instructor_executions, verb)("a" if verb == "get" else ["a"], retry=5)
        assert transport.ids == []


@virtual_time
async def test_a_404_out_of_step_is_repeated() -> None:
    """A 404 on a connection that was out of step may belong to another request, so the lookup repeats it for free."""

    class OutOfStep(ScriptedTransport):
        is_out_of_step = True

    transport = OutOfStep(lambda execution_id, number: status(404) if number == 1 else record(execution_id))
    async with transport.client(retry=RetryPolicy(max_attempts=1)) as client:
        (outcome,) = await client.instructor_executions.get_many(["e_1"])
        assert outcome.error is None
        assert outcome.attempts == 2


@virtual_time
async def test_a_deadline_during_a_probe_gives_the_error_of_the_outage() -> None:
    """All lookups that an outage ends have its error, also those whose request was in flight."""
    transport = ScriptedTransport(lambda i, _: status(502) if int(i[1:]) < 20 else (NEVER, status(502)))
    async with transport.client(concurrency=20, deadline=3, attempt_timeout=60) as client:
        outcomes = await client.instructor_executions.get_many([f"e{number}" for number in range(100)])
    assert {type(outcome.error) for outcome in outcomes} == {StatusError}
    for outcome in outcomes:
        assert outcome.error is not None
        assert outcome.error.execution_id == outcome.id
        assert "the server answered 502 Bad Gateway" in str(outcome.error)
        assert "the server has been failing for" in str(outcome.error)
    assert transport.numbers["e20"] == 1  # a probe without a response
