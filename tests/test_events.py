"""What a client tells its hook, in which order and with which figures; in virtual time."""

import asyncio
import functools
import logging
from collections.abc import Coroutine
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
import kaizen_async._waiting.reports
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
"""Seconds that a scripted request takes."""


def names(events: list[Event]) -> list[str]:
    """Return what kinds of events they are."""
    return [type(event).__name__ for event in events]


def of(kind: type, events: list[Event]) -> list[Any]:
    """Return the events of one kind."""
    return [event for event in events if isinstance(event, kind)]


def test_every_event_is_public_and_in_the_union() -> None:
    """So a `match` can be checked for what it leaves out."""
    members = {kind.__name__ for kind in get_args(Event)}
    assert members == set(EVENTS)


@virtual_time
async def test_a_look_up_that_goes_well_tells_four_times() -> None:
    """The start and the end of itself, and of its request."""
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
async def test_a_retry_is_told_with_its_reason_and_delay() -> None:
    """Between the two requests, and before the delay."""
    events: list[Event] = []
    transport = ScriptedTransport(lambda i, number: status(503) if number == 1 else record(i))
    async with transport.client(on_event=events.append) as client:
        client._random.uniform = lambda _, high: high  # type: ignore[method-assign]
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
def test_an_attempt_that_fails_tells_how(reply: Reply, code: int | None, error: type[KaizenError]) -> None:
    """With the status if an answer came, and the error that the caller would get."""

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
async def test_the_wait_for_a_slot_is_told_with_the_attempt() -> None:
    """The third of three lookups over one slot has waited for two requests."""
    events: list[Event] = []
    async with ScriptedTransport().client(concurrency=1, on_event=events.append) as client:
        await asyncio.gather(*(client.instructor_executions.get(i) for i in "abc"))
    assert [event.queued for event in of(AttemptStarted, events)] == [0, request, pytest.approx(0.2)]


@virtual_time
async def test_a_cancelled_look_up_still_tells_both_ends() -> None:
    """Without a status, an error or an outcome: there is none."""
    events: list[Event] = []
    async with ScriptedTransport(lambda *_: (NEVER, status(500))).client(on_event=events.append) as client:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.instructor_executions.get("a"), 3)
    assert events[-2:] == [AttemptEnded("a", URL, 1, 3, None, None), LookUpEnded("a", URL, None, 3)]


@virtual_time
async def test_a_look_up_that_shares_a_request_tells_no_attempt() -> None:
    """Each of the two tells its own start and end."""
    events: list[Event] = []
    async with ScriptedTransport().client(on_event=events.append) as client:
        await asyncio.gather(client.instructor_executions.get("a"), client.instructor_executions.get("a"))
    assert names(events) == [
        *["LookUpStarted", "AttemptStarted", "LookUpStarted", "LookUpShared"],
        *["AttemptEnded", "LookUpEnded", "LookUpEnded"],
    ]


@virtual_time
async def test_a_look_up_that_sends_nothing_tells_no_attempt() -> None:
    """Here the client was closed before."""
    events: list[Event] = []
    client = ScriptedTransport().client(on_event=events.append)
    await client.aclose()
    assert isinstance(await failing(client), ClientClosedError)
    assert names(events) == ["LookUpStarted", "LookUpEnded"]


@virtual_time
async def test_a_pause_is_told_when_it_begins_and_when_it_is_over() -> None:
    """Once each, whatever number of lookups it holds; what held them shows in `queued`."""
    events: list[Event] = []
    transport = ScriptedTransport(
        lambda i, _: status(429, retry_after="20") if now() < 20 else record(i),
    )
    async with transport.client(on_event=events.append) as client:
        client._random.uniform = lambda low, _: low  # type: ignore[method-assign]
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
async def test_a_pause_is_told_anew_when_its_cause_changes() -> None:
    """A server that throttled fails, and a probe that succeeds ends both."""
    events: list[Event] = []
    replies = iter([status(429, retry_after="1"), status(502)])
    transport = ScriptedTransport(lambda i, _: next(replies, record(i)))
    async with transport.client(on_event=events.append) as client:
        client._random.uniform = lambda low, _: low  # type: ignore[method-assign]
        await client.instructor_executions.get("a")
    assert [(event.status, event.retry_after) for event in of(Gated, events)] == [(429, 1)]
    assert [(event.url, event.refused) for event in of(OutageBegan, events)] == [(URL, False)]
    assert [(event.url, event.failed) for event in of(OutageEnded, events)] == [(URL, 2)]
    assert not of(Ungated, events)


@virtual_time
async def test_a_refusal_of_the_retry_budget_is_told() -> None:
    """Instead of a retry."""
    events: list[Event] = []
    async with ScriptedTransport(lambda *_: status(500)).client(on_event=events.append) as client:
        health_of(client)._budget = 0.05
        error = await failing(client)
    assert len(of(RetryScheduled, events)) == 1
    assert of(BudgetRefused, events) == [BudgetRefused("a", URL, 2, error)]
    assert names(events)[-1] == "LookUpEnded"


@virtual_time
async def test_a_look_up_out_of_attempts_is_no_matter_of_the_budget() -> None:
    """Nobody refused anything."""
    events: list[Event] = []
    async with ScriptedTransport(lambda *_: status(500)).client(on_event=events.append) as client:
        await failing(client, retry=RetryPolicy(max_attempts=2, max_backoff=0))
    assert not of(BudgetRefused, events)


@virtual_time
async def test_a_wait_tells_its_polls_and_the_end_it_has_seen() -> None:
    """From its start to its end, with the record that it returns."""
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
async def test_a_wait_that_fails_tells_its_error() -> None:
    """No execution ended, so nothing is told of an end."""
    events: list[Event] = []
    async with ScriptedTransport(never_ending).client(on_event=events.append) as client:
        with pytest.raises(DeadlineExceededError) as caught:
            await client.instructor_executions.wait("a", deadline=3, poll=EVERY_SECOND)
    end = events[-1]
    assert isinstance(end, WaitEnded)
    assert end.error is caught.value
    assert not of(RecordEnded, events)


@pytest.mark.parametrize("method", ["wait_many", "watch"])
def test_an_id_that_fails_is_told_in_its_call(method: str) -> None:
    """With its error; the call itself goes on."""

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
async def test_leaving_a_wait_for_many_early_is_told() -> None:
    """It is no success."""
    events: list[Event] = []
    async with ScriptedTransport(never_ending).client(on_event=events.append) as client:
        async with client.instructor_executions.wait_many(["a"], poll=EVERY_TEN):
            await asyncio.sleep(1)
    assert [event.cancelled for event in of(WaitEnded, events)] == [True]


@virtual_time
async def test_a_batch_tells_its_start_and_its_end() -> None:
    """With what became of its lookups; and whether it was left early."""
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
async def test_a_request_that_a_pause_holds_is_in_the_queue() -> None:
    """What began to connect before the pause is not in flight during it, and its wait is not the network's."""
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
    """Those that share, run out of time while they do, or are cancelled, as well."""
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
async def test_several_functions_are_told() -> None:
    """Each of them, and one that raises does not keep events from the others."""
    first: list[Event] = []
    second: list[Event] = []

    def break_down(event: Event) -> None:
        raise LookupError

    async with ScriptedTransport().client(on_event=[first.append, break_down, second.append]) as client:
        await client.instructor_executions.get("a")
    assert names(first) == names(second) == ["LookUpStarted", "AttemptStarted", "AttemptEnded", "LookUpEnded"]


@virtual_time
async def test_a_cancelled_wait_tells_its_end() -> None:
    """As cancelled, and without an error: the caller gets none from here."""
    events: list[Event] = []
    async with ScriptedTransport(never_ending).client(on_event=events.append) as client:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.instructor_executions.wait("a", poll=EVERY_TEN), 3)
    assert of(WaitEnded, events) == [WaitEnded("wait", URL, "a", 3, None, cancelled=True)]


@pytest.mark.parametrize("verb", ["wait_many", "watch"])
def test_a_wait_for_many_tells_one_start_and_one_end(verb: str) -> None:
    """And the end of each execution."""

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
async def test_an_end_that_several_wait_for_is_told_once() -> None:
    """Whether their polls are the same, or follow policies of their own; nor is it told again to who comes later."""
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
    """Not that of another call, with which they share a timer: its trace and its log lines are its own."""
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
async def test_polls_go_on_in_the_context_of_who_still_waits() -> None:
    """The call that asked first has left."""
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
    """Neither the lookups nor the events after it."""
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
    """Something that would have to be awaited, though it is no coroutine function."""

    async def __call__(self, event: Event) -> None:
        """Do nothing."""


async def awaited(event: Event) -> None:
    """Do nothing, later."""


def annotated(event: Event) -> Coroutine[Any, Any, None]:
    """Return a coroutine."""
    return awaited(event)


@functools.wraps(awaited)
def decorated(*arguments: Any) -> object:
    """Return a coroutine."""
    return awaited(*arguments)


@pytest.mark.parametrize(
    "hook",
    [awaited, Awaited(), partial(awaited), [print, awaited], annotated, decorated, "print", 5],
    ids=["function", "object", "partial", "list", "annotated", "decorated", "text", "number"],
)
def test_what_cannot_be_called_is_refused_at_once(hook: Any) -> None:
    """A coroutine function would be called and never run."""
    with pytest.raises(TypeError, match="on_event must be a plain function"):
        KaizenClient(on_event=hook)


@virtual_time
async def test_a_coroutine_that_only_shows_when_it_is_made_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """And closed, so that Python does not complain about it for every event."""
    async with ScriptedTransport().client(on_event=lambda event: awaited(event)) as client:  # type: ignore[arg-type, return-value]  # noqa: PLW0108
        await client.instructor_executions.get("a")
    (complaint,) = [line for line in caplog.records if line.levelno >= logging.ERROR]
    assert "must be a plain function" in complaint.getMessage()


def test_without_a_hook_no_event_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for a lookup, a retry, a pause or a wait."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an event was made")

    modules = [
        kaizen_async._bulk,
        kaizen_async._lookup.lookup,
        kaizen_async._waiting.reports,
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


async def test_a_hook_may_do_without_the_events_of_lookups_that_go_well(emulator: KaizenEmulator) -> None:
    """It gets those of the others, and the client takes its short way to a record."""

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
    """In none of its fields, nor in those of the errors in them."""
    events: list[Event] = []
    emulator.faults.next(Fault.status(401, body=b"who are you?"))
    async with KaizenClient("very-secret", base_url=emulator.base_url, on_event=events.append) as client:
        await failing(client)
    shown = "".join(repr(event) for event in events) + repr([vars(event.error) for event in of(AttemptEnded, events)])
    assert "who are you?" in shown
    assert "very-secret" not in shown
