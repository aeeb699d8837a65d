"""The client reports events to its hook, in a fixed order and with exact figures. The tests run in virtual time."""

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any, get_args

import pytest
from scripted_lives import EVERY_SECOND, EVERY_TEN, ended, ending, never_ending, now, running
from scripted_transport import NEVER, Reply, ScriptedTransport, SlowToConnect, failing, health_of, record, status
from virtual_time import virtual_time

import kaizen_async._bulk
import kaizen_async._lookup.health
import kaizen_async._lookup.lookup
import kaizen_async._waiting.calls
import kaizen_async._waiting.scheduler
import kaizen_async._waiting.silence
import kaizen_async.events
from kaizen_async import (
    ClientClosedError,
    DeadlineExceededError,
    DecodeError,
    KaizenClient,
    KaizenError,
    NotFoundError,
    RetryPolicy,
    StatusError,
    TransportError,
)
from kaizen_async._transport.transport import Answer
from kaizen_async.events import (
    AttemptEnded,
    AttemptHeld,
    AttemptStarted,
    BatchEnded,
    BatchStarted,
    BudgetRefused,
    Event,
    Gated,
    LookUpEnded,
    LookUpStarted,
    OutageBegan,
    OutageEnded,
    RecordEnded,
    RecordFailed,
    RetryScheduled,
    Ungated,
    WaitEnded,
    WaitStarted,
)
from kaizen_async.testing import Fault, KaizenEmulator

URL = "https://api.kaizenautomation.com/instructor/executions/get"
EVENTS = [name for name in kaizen_async.events.__all__ if name != "Event"]
request = pytest.approx(0.1)
"""Duration of a scripted request in seconds."""


def names(events: list[Event]) -> list[str]:
    """Return the class names of events."""
    return [type(event).__name__ for event in events]


def of(kind: type, events: list[Event]) -> list[Any]:
    """Return the events of one kind."""
    return [event for event in events if isinstance(event, kind)]


def test_every_event_is_public_and_in_the_union() -> None:
    """The union `Event` has every public event, so that a type checker can find an incomplete `match`."""
    members = {kind.__name__ for kind in get_args(Event)}
    assert members == set(EVENTS)


@virtual_time
async def test_a_successful_lookup_reports_four_events() -> None:
    """A successful lookup reports the start and the end of the lookup and of its request."""
    events: list[Event] = []
    async with ScriptedTransport().client(on_event=events.append) as client:
        execution = await client.instructor_executions.get("a")
    match events:
        case [
            LookUpStarted("a", url),
            AttemptStarted("a", _, attempt=1, queued=0),
            AttemptEnded("a", _, attempt=1, elapsed=elapsed, status=200, error=None),
            LookUpEnded("a", _, outcome, _),
        ]:
            assert url == URL
            assert elapsed == request
            assert outcome is not None
            assert outcome.execution == execution
            assert outcome.elapsed == request
        case _:
            pytest.fail(str(events))
    assert {event.url for event in events} == {URL}


@virtual_time
async def test_a_retry_is_reported_with_its_error_and_delay() -> None:
    """The client reports a retry between two requests, with the error and the delay."""
    events: list[Event] = []
    transport = ScriptedTransport(lambda i, number: status(503) if number == 1 else record(i))
    async with transport.client(on_event=events.append) as client:
        client._binding.random.uniform = lambda _, high: high  # type: ignore[method-assign]
        await client.instructor_executions.get("a")
    assert names(events) == [
        "LookUpStarted",
        *["AttemptStarted", "AttemptEnded"],
        "RetryScheduled",
        *["AttemptStarted", "AttemptEnded"],
        "LookUpEnded",
    ]
    (retry,) = of(RetryScheduled, events)
    assert isinstance(retry.error, StatusError)
    assert (retry.id, retry.url, retry.attempts, retry.delay) == ("a", URL, 1, 0.25)
    first, second = of(AttemptEnded, events)
    assert (first.attempt, first.status, first.error) == (1, 503, retry.error)
    assert (second.attempt, second.status, second.error) == (2, 200, None)
    assert of(LookUpEnded, events)[0].outcome.attempts == 2


@pytest.mark.parametrize(
    ("reply", "code", "error"),
    [
        (status(404), 404, NotFoundError),
        (Answer(200, {}, b"[]"), 200, DecodeError),
        (TransportError("the connection failed"), None, TransportError),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_failed_attempt_reports_status_and_error(reply: Reply, code: int | None, error: type[KaizenError]) -> None:
    """A failed attempt reports the error that the caller gets, and the status if there was a response."""

    @virtual_time
    async def play() -> None:
        events: list[Event] = []
        transport = ScriptedTransport(lambda *_: reply)
        async with transport.client(on_event=events.append, retry=RetryPolicy(max_attempts=1)) as client:
            raised = await failing(client)
        (attempt,) = of(AttemptEnded, events)
        assert attempt.status == code
        assert isinstance(attempt.error, error)
        (end,) = of(LookUpEnded, events)
        assert end.outcome.error is raised

    play()


@virtual_time
async def test_an_attempt_reports_its_wait_for_a_slot() -> None:
    """The third of three lookups over one slot reports that it waited for two requests."""
    events: list[Event] = []
    async with ScriptedTransport().client(concurrency=1, on_event=events.append) as client:
        await asyncio.gather(*(client.instructor_executions.get(i) for i in "abc"))
    assert [event.queued for event in of(AttemptStarted, events)] == [0, request, pytest.approx(0.2)]


@virtual_time
async def test_a_cancelled_lookup_reports_both_ends() -> None:
    """A cancelled lookup reports the end of its attempt and of itself, without a status, an error or an outcome."""
    events: list[Event] = []
    async with ScriptedTransport(lambda *_: (NEVER, status(500))).client(on_event=events.append) as client:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.instructor_executions.get("a"), 3)
    assert events[-2:] == [AttemptEnded("a", URL, 1, 3, None, None), LookUpEnded("a", URL, None, 3)]


@virtual_time
async def test_a_shared_request_is_reported_once() -> None:
    """Two lookups that share a request report one attempt, and each reports its own start and end."""
    events: list[Event] = []
    async with ScriptedTransport().client(on_event=events.append) as client:
        await asyncio.gather(client.instructor_executions.get("a"), client.instructor_executions.get("a"))
    assert names(events) == [
        *["LookUpStarted", "AttemptStarted", "LookUpStarted", "LookUpShared"],
        *["AttemptEnded", "LookUpEnded", "LookUpEnded"],
    ]


@virtual_time
async def test_a_lookup_on_a_closed_client_reports_no_attempt() -> None:
    """A lookup on a closed client reports its start and its end, and no attempt."""
    events: list[Event] = []
    client = ScriptedTransport().client(on_event=events.append)
    await client.aclose()
    assert isinstance(await failing(client), ClientClosedError)
    assert names(events) == ["LookUpStarted", "LookUpEnded"]


@virtual_time
async def test_a_pause_is_reported_once_at_both_ends() -> None:
    """The client reports the start and the end of a pause once for all lookups. Their wait appears in `queued`."""
    events: list[Event] = []
    transport = ScriptedTransport(
        lambda i, _: status(429, retry_after="20") if now() < 20 else record(i),
    )
    async with transport.client(on_event=events.append) as client:
        client._binding.random.uniform = lambda low, _: low  # type: ignore[method-assign]
        await client.instructor_executions.get_many([f"e{n}" for n in range(5)])
    (gated,) = of(Gated, events)
    assert gated == Gated(429, 20.0, 20.0)
    (ungated,) = of(Ungated, events)
    assert ungated.pause == pytest.approx(20, abs=0.2)
    probe = names(events).index("AttemptStarted", names(events).index("Gated"))
    assert names(events).index("Ungated") < names(events).index("AttemptStarted", probe + 1)
    waits = [event.delay for event in of(RetryScheduled, events)]
    queued = [event.queued for event in of(AttemptStarted, events) if event.attempt == 2]
    assert len(waits) == len(queued) == 5
    assert max(waits) == pytest.approx(20)
    assert max(queued) == pytest.approx(20, abs=0.2)


@virtual_time
async def test_an_outage_replaces_a_pause() -> None:
    """If a throttling server starts to fail, the client reports an outage. A successful probe ends both."""
    events: list[Event] = []
    replies = iter([status(429, retry_after="1"), status(502)])
    transport = ScriptedTransport(lambda i, _: next(replies, record(i)))
    async with transport.client(on_event=events.append) as client:
        client._binding.random.uniform = lambda low, _: low  # type: ignore[method-assign]
        await client.instructor_executions.get("a")
    assert [(event.status, event.retry_after) for event in of(Gated, events)] == [(429, 1)]
    assert [(event.url, event.refused) for event in of(OutageBegan, events)] == [(URL, False)]
    assert [(event.url, event.failed) for event in of(OutageEnded, events)] == [(URL, 2)]
    assert not of(Ungated, events)


@virtual_time
async def test_a_refusal_of_the_retry_budget_is_reported() -> None:
    """If the retry budget refuses a retry, the client reports BudgetRefused in place of RetryScheduled."""
    events: list[Event] = []
    async with ScriptedTransport(lambda *_: status(500)).client(on_event=events.append) as client:
        health_of(client)._budget = 0.05
        error = await failing(client)
    assert len(of(RetryScheduled, events)) == 1
    assert of(BudgetRefused, events) == [BudgetRefused("a", URL, 2, error)]
    assert names(events)[-1] == "LookUpEnded"


@virtual_time
async def test_a_lookup_out_of_attempts_reports_no_budget() -> None:
    """A lookup that has used all its attempts does not report BudgetRefused."""
    events: list[Event] = []
    async with ScriptedTransport(lambda *_: status(500)).client(on_event=events.append) as client:
        await failing(client, retry=RetryPolicy(max_attempts=2, max_backoff=0))
    assert not of(BudgetRefused, events)


@virtual_time
async def test_a_wait_reports_its_polls_and_the_record() -> None:
    """A wait reports its start, its polls, the finished record and its end."""
    events: list[Event] = []
    transport = ScriptedTransport(ending(2.0), latency=0)
    async with transport.client(on_event=events.append) as client:
        execution = await client.instructor_executions.wait("a", poll=EVERY_SECOND)
    assert events[0] == WaitStarted("wait", URL, "a")
    assert events[-1] == WaitEnded("wait", URL, "a", pytest.approx(2), None)
    assert len(of(LookUpEnded, events)) == 3
    (end,) = of(RecordEnded, events)
    assert (end.id, end.url, end.outcome.execution, end.outcome.attempts) == ("a", URL, execution, 3)
    assert names(events)[-3:] == ["LookUpEnded", "RecordEnded", "WaitEnded"]


@virtual_time
async def test_a_failed_wait_reports_its_error() -> None:
    """A wait that fails reports its error and no finished record."""
    events: list[Event] = []
    async with ScriptedTransport(never_ending).client(on_event=events.append) as client:
        with pytest.raises(DeadlineExceededError) as caught:
            await client.instructor_executions.wait("a", deadline=3, poll=EVERY_SECOND)
    end = events[-1]
    assert isinstance(end, WaitEnded)
    assert end.error is caught.value
    assert not of(RecordEnded, events)


@pytest.mark.parametrize("method", ["wait_many", "watch"])
def test_a_failed_id_is_reported_in_its_call(method: str) -> None:
    """`wait_many` and `watch` report the error of a failed id, and the call continues."""

    @virtual_time
    async def play() -> None:
        events: list[Event] = []
        transport = ScriptedTransport(lambda i, _: status(404) if i == "gone" else ended(i), latency=0)
        async with transport.client(on_event=events.append) as client:
            async with getattr(client.instructor_executions, method)(["gone", "a"], poll=EVERY_SECOND) as results:
                async for _ in results:
                    pass
        (failed,) = of(RecordFailed, events)
        assert (failed.id, failed.url) == ("gone", URL)
        assert isinstance(failed.outcome.error, NotFoundError)
        assert [event.cancelled for event in of(WaitEnded, events)] == [False]

    play()


@virtual_time
async def test_leaving_wait_many_early_is_reported() -> None:
    """A `wait_many` that is left early is reported as cancelled."""
    events: list[Event] = []
    async with ScriptedTransport(never_ending).client(on_event=events.append) as client:
        async with client.instructor_executions.wait_many(["a"], poll=EVERY_TEN):
            await asyncio.sleep(1)
    assert [event.cancelled for event in of(WaitEnded, events)] == [True]


@virtual_time
async def test_a_batch_reports_its_start_and_its_end() -> None:
    """A batch reports its start and its end, the number of successes and failures, and whether it was left early."""
    events: list[Event] = []
    transport = ScriptedTransport(lambda i, _: status(404) if i == "gone" else record(i))
    async with transport.client(on_event=events.append) as client:
        executions = client.instructor_executions
        await executions.get_many(["a", "gone"])
        async with executions.stream(["a", "b"]) as outcomes:
            assert {outcome.id async for outcome in outcomes} == {"a", "b"}
        async with executions.stream(["a", "b"]):
            pass
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(executions.get_many(["a"]), 0.05)
    assert [event.verb for event in of(BatchStarted, events)] == ["get_many", "stream", "stream", "get_many"]
    ends = [(event.succeeded, event.failed, event.cancelled) for event in of(BatchEnded, events)]
    assert ends == [(1, 1, False), (2, 0, False), (0, 0, True), (0, 0, True)]
    assert of(BatchEnded, events)[0].elapsed == request


@virtual_time
async def test_a_request_held_by_a_pause_counts_as_queued() -> None:
    """A pause holds a request that is still connecting. The pause counts as `queued`, not as time of the attempt."""
    events: list[Event] = []

    transport = SlowToConnect(lambda i, n: status(429, retry_after="20") if (i, n) == ("a", 1) else record(i))
    async with transport.client(on_event=events.append, attempt_timeout=3) as client:
        await client.instructor_executions.get_many(["a", "slow"])
    mine = [event for event in events if getattr(event, "id", None) == "slow"]
    assert names(mine) == [
        "LookUpStarted",
        "AttemptStarted",
        "AttemptHeld",
        "AttemptStarted",
        "AttemptEnded",
        "LookUpEnded",
    ]
    again = of(AttemptStarted, mine)[1]
    assert again.queued > 20
    assert again.attempt == of(AttemptHeld, mine)[0].attempt == 1
    assert of(AttemptEnded, mine)[0].elapsed == pytest.approx(1.6)


@virtual_time
async def test_every_call_ends_in_exactly_one_counter() -> None:
    """Each call counts once in the stats, also if it shares a request, runs out of time or is cancelled."""
    transport = ScriptedTransport(
        lambda i, _: {"gone": status(404), "moved": status(302)}.get(i, record(i)), latency=10
    )
    async with transport.client() as client:
        get = client.instructor_executions.get
        calls = [get("a"), get("a"), get("a", deadline=5), get("gone"), get("moved"), asyncio.wait_for(get("b"), 1)]
        calls += [asyncio.wait_for(get("a"), 1)]
        await asyncio.gather(*calls, return_exceptions=True)
        stats = client.stats()
    assert (stats.succeeded, stats.shared, stats.failed, stats.cancelled) == (1, 1, 3, 2)
    assert (stats.lookups, stats.in_progress, stats.queued) == (4, 0, 0)
    assert (stats.responses_2xx, stats.responses_3xx, stats.responses_4xx, stats.unanswered) == (1, 1, 1, 1)
    assert stats.attempt_seconds == pytest.approx(31)
    assert stats.by_path["/instructor/executions/get"].succeeded == 1


@virtual_time
async def test_several_hooks_get_every_event() -> None:
    """Every hook gets all events, even if another hook raises."""
    first: list[Event] = []
    second: list[Event] = []

    def break_down(event: Event) -> None:
        raise LookupError

    async with ScriptedTransport().client(on_event=[first.append, break_down, second.append]) as client:
        await client.instructor_executions.get("a")
    assert names(first) == names(second) == ["LookUpStarted", "AttemptStarted", "AttemptEnded", "LookUpEnded"]


@virtual_time
async def test_a_cancelled_wait_reports_its_end() -> None:
    """A cancelled wait reports its end as cancelled and without an error."""
    events: list[Event] = []
    async with ScriptedTransport(never_ending).client(on_event=events.append) as client:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.instructor_executions.wait("a", poll=EVERY_TEN), 3)
    assert of(WaitEnded, events) == [WaitEnded("wait", URL, "a", 3, None, cancelled=True)]


@pytest.mark.parametrize("verb", ["wait_many", "watch"])
def test_wait_many_reports_one_start_and_one_end(verb: str) -> None:
    """`wait_many` and `watch` report one start and one end, and the end of each execution."""

    @virtual_time
    async def play() -> None:
        events: list[Event] = []
        async with ScriptedTransport(ending(2.0), latency=0).client(on_event=events.append) as client:
            ids = [f"e{n}" for n in range(10)]
            async with getattr(client.instructor_executions, verb)(ids, poll=EVERY_SECOND) as results:
                async for _ in results:
                    pass
        assert of(WaitStarted, events) == [WaitStarted(verb, URL, None)]  # type: ignore[arg-type]
        assert of(WaitEnded, events) == [WaitEnded(verb, URL, None, pytest.approx(2), None)]  # type: ignore[arg-type]
        assert sorted(event.id for event in of(RecordEnded, events)) == ids

    play()


@virtual_time
async def test_the_end_of_an_execution_is_reported_once() -> None:
    """Several waits for one execution report its end once, also with different poll policies and after it has ended."""
    events: list[Event] = []
    async with ScriptedTransport(ending(2.0)).client(on_event=events.append) as client:
        wait = client.instructor_executions.wait
        await asyncio.gather(wait("a"), wait("a"), wait("a", poll=EVERY_SECOND), wait("a", poll=EVERY_TEN))
        await wait("a")
    assert len(of(RecordEnded, events)) == 1
    assert len(of(WaitEnded, events)) == 5


request_id: ContextVar[str] = ContextVar("request_id")


@virtual_time
async def test_polls_inherit_the_context_of_the_call_that_waits() -> None:
    """A poll runs in the context of the call that waits for it, even if another call shares its timer."""
    seen: dict[str, set[str | None]] = {"a": set(), "b": set()}

    def note(event: Event) -> None:
        if isinstance(event, AttemptStarted):
            seen[event.id].add(request_id.get(None))

    async def handle(execution_id: str) -> None:
        request_id.set(f"request for {execution_id}")
        await client.instructor_executions.wait(execution_id, poll=EVERY_SECOND)

    async with ScriptedTransport(ending({"a": 5.0, "b": 9.0})).client(on_event=note) as client:
        await asyncio.gather(handle("a"), handle("b"))
    assert seen == {"a": {"request for a"}, "b": {"request for b"}}


@virtual_time
async def test_polls_move_to_the_context_of_a_remaining_call() -> None:
    """If the first of two waiting calls ends, the polls run in the context of the other."""
    seen: list[str] = []

    def note(event: Event) -> None:
        if isinstance(event, AttemptStarted):
            seen.append(request_id.get())

    async def handle(name: str, deadline: float) -> None:
        request_id.set(name)
        await client.instructor_executions.wait("a", deadline=deadline, poll=EVERY_TEN)

    async with ScriptedTransport(ending(25.0)).client(on_event=note) as client:
        results = await asyncio.gather(handle("first", 15), handle("second", 60), return_exceptions=True)
    assert [type(result) for result in results] == [DeadlineExceededError, type(None)]
    assert seen[0] == "first"
    assert seen[-1] == "second"


@virtual_time
async def test_a_hook_that_raises_is_logged_once_and_disturbs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The client logs an error of a hook once. Lookups and later events continue."""
    calls = 0

    def break_down(event: Event) -> None:
        nonlocal calls
        calls += 1
        raise LookupError(f"event {calls}")

    async with ScriptedTransport().client(on_event=break_down) as client:
        outcomes = await client.instructor_executions.get_many(["a", "b", "c"])
    assert all(outcome.ok for outcome in outcomes)
    assert calls == 2 + 3 * 4
    (complaint,) = [line for line in caplog.records if line.levelno >= logging.ERROR]
    assert complaint.name == "kaizen_async"
    assert complaint.exc_info is not None
    assert str(complaint.exc_info[1]) == "event 1"


class Awaited:
    """A callable object whose `__call__` is a coroutine function."""

    async def __call__(self, event: Event) -> None:
        """Do nothing."""


async def awaited(event: Event) -> None:
    """Do nothing, as a coroutine."""


def yielding(event: Event) -> Iterator[Event]:
    """Yield the event to somebody who iterates."""
    yield event


async def ayielding(event: Event) -> AsyncIterator[Event]:
    """Yield the event to somebody who iterates."""
    yield event


def annotated(event: Event) -> Coroutine[Any, Any, None]:
    """Return a coroutine."""
    return awaited(event)


@functools.wraps(awaited)
def decorated(*arguments: Any) -> object:
    """Return a coroutine."""
    return awaited(*arguments)


@pytest.mark.parametrize(
    "hook",
    [
        pytest.param(awaited, id="function"),
        pytest.param(Awaited(), id="object"),
        pytest.param(Awaited, id="class"),
        pytest.param(partial(awaited), id="partial"),
        pytest.param([set().add, awaited], id="list"),
        pytest.param(annotated, id="annotated"),
        pytest.param(decorated, id="decorated"),
        pytest.param(yielding, id="generator"),
        pytest.param(ayielding, id="async"),
        pytest.param(lambda: None, id="no argument"),
        pytest.param("print", id="text"),
        pytest.param(5, id="number"),
    ],
)
def test_an_invalid_hook_is_refused(hook: Any) -> None:
    """The client refuses a hook that cannot be called with an event, or would make a coroutine that never runs."""
    with pytest.raises(TypeError, match="on_event must be a plain function"):
        KaizenClient(on_event=hook)


async def test_log_lines_have_constant_templates_and_fields(
    emulator: KaizenEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    """JSON logs and error trackers group by the template, and search by id, attempt, status, error and time."""
    caplog.set_level(logging.DEBUG, "kaizen_async")
    emulator.add_many(["exec_1", "exec_2"])
    emulator.faults.next(Fault.status(503), id="exec_2")
    async with KaizenClient(base_url=emulator.base_url) as kaizen:
        await kaizen.instructor_executions.get_many(["exec_1", "exec_1", "exec_2", "exec_3"])
        await kaizen.instructor_executions.get("exec_1")
    lines = [line for line in caplog.records if hasattr(line, "attempt")]
    found = [vars(line) for line in lines if line.msg == "%s: attempt %d got the record"]
    failed = [vars(line) for line in lines if line.msg == "%s: attempt %d failed: %s"]
    assert sorted((each["execution_id"], each["attempt"], each["status"]) for each in found) == [
        ("exec_1", 1, 200),
        ("exec_1", 1, 200),
        ("exec_2", 2, 200),
    ]
    assert sorted((each["execution_id"], each["status"], each["error_type"]) for each in failed) == [
        ("exec_2", 503, "StatusError"),
        ("exec_3", 404, "NotFoundError"),
    ]
    assert all(0 <= vars(line)["elapsed"] < 30 for line in lines)


@virtual_time
async def test_a_hook_that_returns_a_coroutine_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """The client logs once that a hook returns coroutines, and closes them, so that Python gives no warnings."""
    async with ScriptedTransport().client(on_event=lambda event: awaited(event)) as client:  # type: ignore[arg-type, return-value]  # noqa: PLW0108
        await client.instructor_executions.get("a")
    (complaint,) = [line for line in caplog.records if line.levelno >= logging.ERROR]
    assert "must be a plain function" in complaint.getMessage()


def test_without_a_hook_no_event_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a hook, the client creates no event for a lookup, a retry, a pause or a wait."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an event was made")

    modules = [
        kaizen_async._bulk,
        kaizen_async._lookup.lookup,
        kaizen_async._waiting.calls,
        kaizen_async._waiting.scheduler,
        kaizen_async._waiting.silence,
    ]
    replaced = [(module, name) for module in modules for name in EVENTS if hasattr(module, name)]
    assert {name for _, name in replaced} == set(EVENTS) - {"Gated", "Ungated", "OutageBegan", "OutageEnded"}
    for module, name in replaced:
        monkeypatch.setattr(module, name, refuse)

    @virtual_time
    async def play() -> None:
        replies: dict[int, Reply] = {1: status(503), 2: status(429), 3: running("a")}
        transport = ScriptedTransport(lambda i, number: replies.get(number, ended(i)))
        async with transport.client() as client:
            assert (await client.instructor_executions.wait("a", poll=EVERY_SECOND)).is_finished
            await client.instructor_executions.get_many(["a"])
        assert len(transport.sent) == 5

    play()


async def test_a_hook_can_skip_successful_lookups(emulator: KaizenEmulator) -> None:
    """A hook with `every_lookup = False` gets events only of lookups that do not succeed at the first attempt."""

    class Hook:
        every_lookup = False

        def __init__(self) -> None:
            self.events: list[Event] = []

        def __call__(self, event: Event) -> None:
            self.events.append(event)

    hook = Hook()
    emulator.add_many(["a", "b"])
    emulator.faults.next(Fault.status(500), id="b")
    async with KaizenClient(base_url=emulator.base_url, on_event=hook) as client:
        executions = client.instructor_executions
        await client.warm_up(1)
        await asyncio.gather(executions.get("a"), executions.get("a"))
        assert hook.events == []
        await executions.get("b")
    assert [event.status for event in of(AttemptEnded, hook.events)] == [500, 200]
    assert not of(LookUpStarted, hook.events)


async def test_no_event_shows_the_key(emulator: KaizenEmulator) -> None:
    """No field of an event, and no error in an event, contains the key."""
    events: list[Event] = []
    emulator.faults.next(Fault.status(401, body=b"who are you?"))
    async with KaizenClient("very-secret", base_url=emulator.base_url, on_event=events.append) as client:
        await failing(client)
    shown = "".join(repr(event) for event in events) + repr([vars(event.error) for event in of(AttemptEnded, events)])
    assert "who are you?" in shown
    assert "very-secret" not in shown
