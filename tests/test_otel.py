"""Spans and metrics, as the SDK's in-memory exporters receive them."""

import asyncio
import contextlib
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from contextvars import Context
from typing import Any
from unittest.mock import Mock

import aiohttp
import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from opentelemetry.instrumentation.aiohttp_client import AioHttpClientInstrumentor, create_trace_config
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode, get_current_span
from scripted_lives import EVERY_SECOND, EVERY_TEN, ended, ending, never_ending
from scripted_transport import NEVER, Reply, ScriptedTransport, SlowToConnect, failing, health_of, record, status
from virtual_time import virtual_time

from kaizen_async import (
    DeadlineExceededError,
    HedgePolicy,
    KaizenClient,
    KaizenError,
    NotFoundError,
    RetryPolicy,
    TransportError,
)
from kaizen_async._transport.transport import Answer
from kaizen_async.events import AttemptStarted
from kaizen_async.otel import REQUEST_SECONDS, Telemetry, _link
from kaizen_async.testing import Exchange, Fault, KaizenEmulator, Life
from kaizen_async.testing.faults import Reply as Played

PATH = "/instructor/executions/get"
SERVER = {"server.address": "api.kaizenautomation.com", "server.port": 443}
KIND = {**SERVER, "url.template": PATH}
REQUEST = {**KIND, "http.request.method": "POST"}
PROTOCOL = {"network.protocol.version": "1.1"}
CHANGE_OF_HEALTH = re.compile("[Pp]ause|works again|retry budget|unknown")
RESULT = ("error.type", "http.response.status_code", "http.request.resend_count")


class Backend:
    """A backend that collects spans and metrics in memory."""

    def __init__(self, **settings: Any) -> None:
        self.tracers = TracerProvider(**settings)
        self._spans = InMemorySpanExporter()
        self.tracers.add_span_processor(SimpleSpanProcessor(self._spans))
        self._reader = InMemoryMetricReader()
        self.meters = MeterProvider([self._reader])
        self.tracer = self.tracers.get_tracer("the application")

    def telemetry(self, **settings: Any) -> Telemetry:
        """Return a hook that sends spans and metrics to this backend."""
        return Telemetry(self.tracers, self.meters, **settings)

    def spans(self, name: str | None = None) -> list[ReadableSpan]:
        """Return the finished spans, or those with one name, in the order of their starts."""
        found = [span for span in self._spans.get_finished_spans() if name in {None, span.name}]
        return sorted(found, key=lambda span: span.start_time or 0)

    def metrics(self) -> dict[str, list[Any]]:
        """Return the data points of each metric."""
        data = self._reader.get_metrics_data()
        if data is None:
            return {}
        scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics]
        assert {scope.scope.name for scope in scopes} == {"kaizen_async"}
        return {metric.name: list(metric.data.data_points) for scope in scopes for metric in scope.metrics}

    def values(self, name: str) -> dict[frozenset[tuple[str, Any]], float]:
        """Return the values of a counter, or the counts of a histogram, by attributes."""
        return {
            frozenset((point.attributes or {}).items()): getattr(point, "value", None) or getattr(point, "count", 0)
            for point in self.metrics()[name]
        }


@pytest.fixture(autouse=True)
def _nothing_is_hidden(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail a test if the hook raises or the SDK logs a warning, because both appear only in the log."""
    yield
    assert not [
        line.getMessage()
        for line in caplog.records
        if line.levelno >= logging.WARNING and not CHANGE_OF_HEALTH.search(line.msg)
    ]


@pytest.fixture
def backend() -> Backend:
    """Return an empty backend for spans and metrics."""
    return Backend()


def having(*attributes: dict[str, Any], **others: Any) -> frozenset[tuple[str, Any]]:
    """Return a set of attributes in the form of `Backend.values`."""
    merged: dict[str, Any] = {}
    for some in attributes:
        merged |= some
    return frozenset((merged | {name.replace("__", "."): value for name, value in others.items()}).items())


def look_up_of(backend: Backend) -> ReadableSpan:
    """Return the span of the only lookup."""
    (span,) = backend.spans(f"look_up {PATH}")
    return span


def attempts_of(backend: Backend) -> list[ReadableSpan]:
    """Return the spans of all attempts."""
    return backend.spans(f"POST {PATH}")


def events_of(span: ReadableSpan) -> list[str]:
    """Return the names of the events in a span."""
    return [event.name for event in span.events]


def parent_of(span: ReadableSpan) -> int | None:
    """Return the id of the parent span."""
    return span.parent.span_id if span.parent else None


def id_of(span: ReadableSpan) -> int:
    """Return the id of a span."""
    assert span.context is not None
    return span.context.span_id


@virtual_time
async def test_a_lookup_is_one_span_in_the_trace_of_its_caller(backend: Backend) -> None:
    """A lookup is a span in its caller's trace, above the span of its request. The caller's span stays current."""
    async with ScriptedTransport().client(on_event=backend.telemetry()) as client:
        with backend.tracer.start_as_current_span("handler") as handler:
            await client.instructor_executions.get("a")
            assert get_current_span() is handler
    look_up, (attempt,) = look_up_of(backend), attempts_of(backend)
    (outer,) = backend.spans("handler")
    assert parent_of(look_up) == id_of(outer)
    assert look_up.kind is SpanKind.INTERNAL
    assert look_up.status.status_code is StatusCode.UNSET
    assert look_up.attributes == {
        **KIND,
        "url.full": f"https://api.kaizenautomation.com{PATH}",
        "kaizen.execution.id": "a",
        "kaizen.execution.status": "InProgress",
        "kaizen.attempts": 1,
    }
    assert parent_of(attempt) == id_of(look_up)
    assert attempt.kind is SpanKind.CLIENT
    assert attempt.attributes == {
        **REQUEST,
        "url.full": f"https://api.kaizenautomation.com{PATH}",
        "kaizen.attempt.queued": 0,
        "http.response.status_code": 200,
        "network.protocol.version": "1.1",
    }


@virtual_time
async def test_a_long_id_is_cut_in_spans(backend: Backend) -> None:
    """Strangers may choose ids, and a span with a megabyte in it is expensive to keep."""
    async with ScriptedTransport().client(on_event=backend.telemetry()) as client:
        await client.instructor_executions.get("x" * 1000)
    (lookup,) = backend.spans(f"look_up {PATH}")
    assert (lookup.attributes or {})["kaizen.execution.id"] == "x" * 199 + "…"


async def test_every_attempt_is_a_span_and_every_retry_an_event(backend: Backend) -> None:
    """Each attempt is a span and each retry an event. An error that a retry fixes marks the attempt, not the lookup."""
    transport = ScriptedTransport(lambda i, number: status(503) if number < 3 else record(i))
    async with transport.client(on_event=backend.telemetry()) as client:
        client._binding.random.uniform = lambda _, high: high  # type: ignore[method-assign]
        await client.instructor_executions.get("a")
    look_up, attempts = look_up_of(backend), attempts_of(backend)
    assert events_of(look_up) == ["kaizen.retry"] * 2
    assert look_up.events[1].attributes == {"kaizen.retry.delay": 0.5, "error.type": "503"}
    assert look_up.status.status_code is StatusCode.UNSET
    seen = [[dict(each.attributes or {}).get(name) for name in RESULT] for each in attempts]
    assert seen == [["503", 503, None], ["503", 503, 1], [None, 200, 2]]
    assert [each.status.status_code for each in attempts] == [StatusCode.ERROR, StatusCode.ERROR, StatusCode.UNSET]


@pytest.mark.parametrize(
    ("reply", "error_type", "description"),
    [
        (status(404), "404", None),
        (Answer(200, {}, b'{"secret": "of the server"}'), "DecodeError", None),
        (TransportError("the connection failed"), "TransportError", "the connection failed"),
    ],
    ids=["404", "misfit", "broken"],
)
def test_a_failed_lookup_has_an_error_type(
    backend: Backend, reply: Reply, error_type: str, description: str | None
) -> None:
    """A failed lookup has the status or error class as its type. Text that may quote the response is left out."""

    @virtual_time
    async def play() -> None:
        transport = ScriptedTransport(lambda *_: reply)
        async with transport.client(on_event=backend.telemetry(), retry=RetryPolicy(max_attempts=1)) as client:
            await failing(client)

    play()
    for span in backend.spans():
        assert span.status.status_code is StatusCode.ERROR
        assert span.status.description == description
        assert "of the server" not in span.to_json()
    span = look_up_of(backend)
    assert span.attributes is not None
    assert span.attributes["error.type"] == error_type
    assert "kaizen.execution.status" not in span.attributes
    assert backend.values("kaizen.look_up.duration") == {having(KIND, error__type=error_type): 1}
    requests = backend.values("http.client.request.duration")
    assert [dict(attributes)["error.type"] for attributes in requests] == [error_type]


@virtual_time
async def test_a_cancelled_lookup_ends_its_span(backend: Backend) -> None:
    """A cancelled lookup ends its span as an error and no longer counts as in flight."""
    async with ScriptedTransport(lambda *_: (NEVER, status(500))).client(on_event=backend.telemetry()) as client:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.instructor_executions.get("a"), 3)
    for span in backend.spans():
        assert span.attributes is not None
        assert span.attributes["error.type"] == "CancelledError"
        assert "http.response.status_code" not in span.attributes
        assert span.status.status_code is StatusCode.ERROR
    assert backend.values("http.client.active_requests") == {having(REQUEST): 0}
    assert backend.values("http.client.request.duration") == {
        having(REQUEST, PROTOCOL, error__type="CancelledError"): 1
    }
    assert backend.values("kaizen.look_up.time") == {having(KIND, kaizen__look_up__phase="network"): 3}


@virtual_time
async def test_a_shared_lookup_has_its_own_span(backend: Backend) -> None:
    """A lookup that shares a request has its own span, with a link to the sending span and its wait as shared time."""
    async with ScriptedTransport().client(on_event=backend.telemetry()) as client:
        await asyncio.gather(client.instructor_executions.get("a"), client.instructor_executions.get("a"))
    leader, follower = backend.spans(f"look_up {PATH}")
    assert [parent_of(attempt) for attempt in attempts_of(backend)] == [id_of(leader)]
    assert [link.context for link in follower.links] == [leader.context]
    assert follower.attributes is not None
    assert follower.attributes["kaizen.shared"] is True
    assert follower.attributes["kaizen.attempts"] == 0
    assert "http.response.status_code" not in follower.attributes
    assert backend.values("kaizen.look_up.time") == {
        having(KIND, kaizen__look_up__phase="network"): pytest.approx(0.1),
        having(KIND, kaizen__look_up__phase="shared"): pytest.approx(0.1),
    }


@virtual_time
async def test_the_time_of_lookups_is_split_into_phases(backend: Backend) -> None:
    """The times in the queue, on the network and in back-off add up to the total time."""
    transport = ScriptedTransport(lambda i, n: status(500) if (i, n) == ("a", 1) else record(i))
    async with transport.client(on_event=backend.telemetry(), concurrency=1) as client:
        client._binding.random.uniform = lambda _, high: high  # type: ignore[method-assign]
        await asyncio.gather(*(client.instructor_executions.get(i) for i in "abcd"))
    assert backend.values("kaizen.look_up.time") == {
        having(KIND, kaizen__look_up__phase="network"): pytest.approx(0.5),
        having(KIND, kaizen__look_up__phase="backoff"): pytest.approx(0.25),
        having(KIND, kaizen__look_up__phase="queue"): pytest.approx(0.1 + 0.2 + 0.3 + 0.05),
    }
    (duration,) = backend.metrics()["kaizen.look_up.duration"]
    assert duration.count == 4
    assert duration.sum == pytest.approx(0.4 + 0.2 + 0.3 + 0.5)


@virtual_time
async def test_requests_in_flight_are_counted(backend: Backend) -> None:
    """The metric of active requests counts the requests in flight."""
    async with ScriptedTransport(latency=10).client(on_event=backend.telemetry(), concurrency=3) as client:
        many = asyncio.create_task(client.instructor_executions.get_many([f"e{n}" for n in range(4)]))
        await asyncio.sleep(5)
        assert backend.values("http.client.active_requests") == {having(REQUEST): 3}
        await many
    assert backend.values("http.client.active_requests") == {having(REQUEST): 0}


@virtual_time
async def test_the_duration_of_requests_follows_the_conventions(backend: Backend) -> None:
    """The duration of requests has the name, unit, attributes and bounds of the semantic conventions."""
    replies: dict[str, Reply] = {"a": record("a"), "b": status(404)}
    async with ScriptedTransport(lambda i, _: replies[i]).client(on_event=backend.telemetry()) as client:
        await client.instructor_executions.get_many(["a", "b"])
    points = backend.metrics()["http.client.request.duration"]
    assert {frozenset(point.attributes.items()) for point in points} == {
        having(REQUEST, PROTOCOL, http__response__status_code=200),
        having(REQUEST, PROTOCOL, http__response__status_code=404, error__type="404"),
    }
    assert [point.sum for point in points] == [pytest.approx(0.1)] * 2
    assert {tuple(point.explicit_bounds) for point in points} == {REQUEST_SECONDS}


@virtual_time
async def test_pauses_are_counted_and_timed(backend: Backend) -> None:
    """Metrics count and time pauses, and the affected lookups have events for their start and end."""
    replies = iter([status(429, retry_after="20")])
    transport = ScriptedTransport(lambda i, _: next(replies, record(i)))
    async with transport.client(on_event=backend.telemetry()) as client:
        client._binding.random.uniform = lambda low, _: low  # type: ignore[method-assign]
        await client.instructor_executions.get("a")
        assert client.stats().pause_seconds == pytest.approx(20.1)
    assert backend.values("kaizen.gate.pauses") == {having(SERVER, http__response__status_code=429): 1}
    assert backend.values("kaizen.gate.time") == {having(SERVER): pytest.approx(20.1)}
    assert backend.values("kaizen.look_up.retries") == {having(KIND, error__type="429"): 1}
    assert events_of(look_up_of(backend)) == ["kaizen.gate.closed", "kaizen.retry", "kaizen.gate.opened"]


@virtual_time
async def test_refusals_of_the_retry_budget_are_counted(backend: Backend) -> None:
    """A metric counts the refusals of the retry budget, and the refused lookup has an event."""
    async with ScriptedTransport(lambda *_: status(500)).client(on_event=backend.telemetry()) as client:
        health_of(client)._budget = -1
        await failing(client)
    assert backend.values("kaizen.retry_budget.refusals") == {having(KIND): 1}
    assert events_of(look_up_of(backend))[-1] == "kaizen.retry_budget.refusal"


@virtual_time
async def test_a_wait_is_a_span_above_its_polls(backend: Backend) -> None:
    """A wait is a span above its polls in its caller's trace, and the caller's span stays current."""
    async with ScriptedTransport(ending(2.0), latency=0).client(on_event=backend.telemetry()) as client:
        with backend.tracer.start_as_current_span("handler") as handler:
            await client.instructor_executions.wait("a", poll=EVERY_SECOND)
            assert get_current_span() is handler
    (wait,) = backend.spans(f"wait {PATH}")
    (outer,) = backend.spans("handler")
    polls = backend.spans(f"look_up {PATH}")
    assert parent_of(wait) == id_of(outer)
    assert wait.kind is SpanKind.INTERNAL
    assert [parent_of(poll) for poll in polls] == [id_of(wait)] * 3
    assert wait.attributes is not None
    assert wait.attributes["kaizen.execution.id"] == "a"
    (end,) = wait.events
    assert (end.name, end.attributes) == (
        "kaizen.execution.end",
        {"kaizen.execution.id": "a", "kaizen.execution.status": "Completed"},
    )
    assert backend.values("kaizen.execution.ends") == {having(KIND, kaizen__execution__status="Completed"): 1}


@virtual_time
async def test_a_failed_wait_has_an_error_type(backend: Backend) -> None:
    """The span of a failed wait has the type and text of its error."""
    async with ScriptedTransport(never_ending).client(on_event=backend.telemetry()) as client:
        with pytest.raises(DeadlineExceededError):
            await client.instructor_executions.wait("a", deadline=3, poll=EVERY_TEN)
    (wait,) = backend.spans(f"wait {PATH}")
    assert wait.status.status_code is StatusCode.ERROR
    assert wait.status.description == "it had not ended when the deadline passed"
    assert wait.attributes is not None
    assert wait.attributes["error.type"] == "DeadlineExceededError"


@virtual_time
async def test_the_polls_of_two_callers_stay_in_their_traces(backend: Backend) -> None:
    """Each poll is in the trace of its own caller, although one scheduler starts all polls."""

    async def handle(execution_id: str) -> None:
        with backend.tracer.start_as_current_span(f"handler of {execution_id}"):
            await client.instructor_executions.wait(execution_id, poll=EVERY_SECOND)

    transport = ScriptedTransport(ending({"a": 4.0, "b": 6.0}), latency=0)
    async with transport.client(on_event=backend.telemetry()) as client:
        await asyncio.gather(handle("a"), handle("b"))
    traces = {}
    for name in "ab":
        (handler,) = backend.spans(f"handler of {name}")
        assert handler.context is not None
        traces[handler.context.trace_id] = name
    for poll in backend.spans(f"look_up {PATH}"):
        assert poll.context is not None
        assert poll.attributes is not None
        assert poll.attributes["kaizen.execution.id"] == traces[poll.context.trace_id]


@pytest.mark.parametrize("verb", ["wait_many", "watch"])
def test_a_wait_for_many_is_one_span_and_not_current_in_its_block(backend: Backend, verb: str) -> None:
    """A wait for many ids is one span, and the caller's span stays current in the block."""

    @virtual_time
    async def play() -> None:
        async with ScriptedTransport(ending(2.0), latency=0).client(on_event=backend.telemetry()) as client:
            with backend.tracer.start_as_current_span("job") as job:
                async with getattr(client.instructor_executions, verb)(["a", "b"], poll=EVERY_SECOND) as results:
                    async for _ in results:
                        assert get_current_span() is job

    play()
    (wait,) = backend.spans(f"{verb} {PATH}")
    (job,) = backend.spans("job")
    assert parent_of(wait) == id_of(job)
    assert {parent_of(poll) for poll in backend.spans(f"look_up {PATH}")} == {id_of(wait)}
    assert events_of(wait) == ["kaizen.execution.end"] * 2
    assert wait.attributes is not None
    assert "kaizen.execution.id" not in wait.attributes
    assert wait.status.status_code is StatusCode.UNSET


@virtual_time
async def test_an_unsampled_lookup_still_counts() -> None:
    """Metrics count all lookups, whether or not their traces are sampled."""
    backend = Backend(sampler=ALWAYS_OFF)
    transport = ScriptedTransport(lambda i, n: status(500) if (i, n) == ("a", 1) else ended(i, 0))
    async with transport.client(on_event=backend.telemetry()) as client:
        executions = client.instructor_executions
        await asyncio.gather(executions.get_many(["a", "b"]), executions.get("b"))
        await executions.wait("b", poll=EVERY_TEN)
    assert not backend.spans()
    assert sum(backend.values("kaizen.look_up.duration").values()) == 4
    assert sum(backend.values("http.client.request.duration").values()) == 4


@virtual_time
async def test_a_shared_poll_is_linked_to_the_one_that_was_sent(backend: Backend) -> None:
    """A wait that shares a poll links to the span of the wait that sent it. A context without a span gives no link."""
    async with ScriptedTransport(ending(5)).client(on_event=backend.telemetry()) as client:
        wait = client.instructor_executions.wait
        await asyncio.gather(wait("a", poll=EVERY_TEN), wait("a", poll=EVERY_TEN))
    first, second = backend.spans(f"wait {PATH}")
    assert not first.links
    assert [link.context for link in second.links] == [first.context]
    with backend.tracer.start_as_current_span("job") as span:
        _link(span, Context())
    (job,) = backend.spans("job")
    assert not job.links


@pytest.mark.parametrize("spans", [True, False])
@virtual_time
async def test_a_request_that_a_pause_holds_ends_its_span(backend: Backend, *, spans: bool) -> None:
    """A request that a pause holds ends its span without an error. The request after the pause has a new span."""
    transport = SlowToConnect(lambda i, n: status(429, retry_after="20") if (i, n) == ("a", 1) else record(i))
    async with transport.client(on_event=backend.telemetry(spans=spans), attempt_timeout=3) as client:
        many = asyncio.create_task(client.instructor_executions.get_many(["a", "slow"]))
        await asyncio.sleep(10)
        assert backend.values("http.client.active_requests") == {having(REQUEST): 0}
        await many
    held = [dict(span.attributes or {}) for span in attempts_of(backend)]
    held = [attributes for attributes in held if "kaizen.attempt.held" in attributes]
    assert len(held) == spans
    assert not any("error.type" in attributes for attributes in held)


async def test_the_error_type_is_the_specific_class(backend: Backend) -> None:
    """The error type of an attempt is the class of the underlying error, not its general class."""
    async with KaizenEmulator() as emulator:
        url = emulator.base_url
    async with KaizenClient(base_url=url, on_event=backend.telemetry()) as client:
        await failing(client, retry=RetryPolicy(max_attempts=1))
    (attempt,) = attempts_of(backend)
    assert dict(attempt.attributes or {})["error.type"] == "ConnectionRefusedError"


async def test_a_request_that_is_sent_again_on_another_connection_is_a_retry(
    backend: Backend, emulator: KaizenEmulator
) -> None:
    """The time of the first request is not time in the queue of the second."""
    emulator.add_many(["exec_1", "exec_2"])

    async def late_reset(exchange: Exchange) -> Played:
        await asyncio.sleep(0.05)
        return await Fault.reset().play(exchange)

    emulator.faults.next(Fault("a late reset", late_reset), id="exec_2")
    async with KaizenClient(base_url=emulator.base_url, on_event=backend.telemetry()) as kaizen:
        await kaizen.instructor_executions.get_many(["exec_1", "exec_2"])
    look_up = backend.spans(f"look_up {PATH}")[1]
    first, second = [span for span in attempts_of(backend) if parent_of(span) == id_of(look_up)]
    assert events_of(look_up) == ["kaizen.retry"]
    assert dict(first.attributes or {})["error.type"] == "ConnectionResetError"
    assert dict(second.attributes or {})["http.request.resend_count"] == 1
    assert first.end_time is not None
    assert second.start_time is not None
    gap = (second.start_time - first.end_time) / 1e9
    assert dict(second.attributes or {})["kaizen.attempt.queued"] == pytest.approx(gap, abs=0.03)


@virtual_time
async def test_without_an_sdk_lookups_work(caplog: pytest.LogCaptureFixture) -> None:
    """Without an SDK, lookups work and nothing is logged, because the application decides whether to use one."""
    async with ScriptedTransport().client(on_event=Telemetry()) as client:
        assert (await client.instructor_executions.get("a")).id == "a"
    assert not caplog.records


def test_an_unknown_event_is_ignored() -> None:
    """The hook ignores events of later versions."""
    event: Any = object()
    Telemetry()(event)


class Number(msgspec.Struct, frozen=True):
    """A record whose status is a number."""

    id: str
    status: int


@virtual_time
async def test_a_record_without_a_status_is_described_without_one(backend: Backend) -> None:
    """The span of a record without a text status has no status attribute."""
    transport = ScriptedTransport(lambda i, _: record(i, status=7))
    async with transport.client(on_event=backend.telemetry()) as client:
        await client.lookups("numbers/get", Number).get("a")
    (span,) = backend.spans("look_up /numbers/get")
    assert span.attributes is not None
    assert "kaizen.execution.status" not in span.attributes


@pytest.fixture
def instrumented(backend: Backend) -> Iterator[None]:
    """Instrument aiohttp as an application does, for every session opened from now on."""
    instrumentor = AioHttpClientInstrumentor()
    instrumentor.instrument(tracer_provider=backend.tracers)
    yield
    instrumentor.uninstrument()


def assert_nested(backend: Backend, *, attempts: int) -> None:
    """Fail unless aiohttp's spans are below the lookup's span and are the only spans of requests."""
    (look_up,) = backend.spans(f"look_up {PATH}")
    requests = backend.spans("POST")
    assert [parent_of(request) for request in requests] == [id_of(look_up)] * attempts
    assert {request.kind for request in requests} == {SpanKind.CLIENT}
    assert look_up.kind is SpanKind.INTERNAL
    assert look_up.attributes is not None
    assert not [name for name in look_up.attributes if name.startswith("http.")]
    assert "http.client.request.duration" not in backend.metrics()
    assert "kaizen.look_up.duration" in backend.metrics()


async def test_the_spans_of_an_instrumented_aiohttp_nest_in_ours(
    backend: Backend, instrumented: None, emulator: KaizenEmulator
) -> None:
    """The spans of an instrumented aiohttp are below the lookup's span, also in the client's own session."""
    emulator.add("exec_1")
    emulator.faults.next(Fault.status(503))
    hook = backend.telemetry(aiohttp_instrumented=True)
    async with KaizenClient(base_url=emulator.base_url, on_event=hook) as client:
        await client.instructor_executions.get("exec_1")
    assert_nested(backend, attempts=2)


async def test_the_spans_of_an_instrumented_session_nest_in_ours(backend: Backend, emulator: KaizenEmulator) -> None:
    """The spans of an instrumented session that is passed in are below the lookup's span."""
    emulator.add("exec_1")
    hook = backend.telemetry(aiohttp_instrumented=True)
    tracing = create_trace_config(tracer_provider=backend.tracers)
    async with (
        aiohttp.ClientSession(trace_configs=[tracing]) as session,
        KaizenClient(base_url=emulator.base_url, on_event=hook, session=session) as client,
    ):
        await client.instructor_executions.get("exec_1")
    assert_nested(backend, attempts=1)


async def test_an_instrumented_request_carries_the_trace_to_the_server(backend: Backend, instrumented: None) -> None:
    """An instrumented request sends the trace in the W3C header `traceparent`."""
    seen: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.headers["traceparent"])
        return web.Response(status=404)

    app = web.Application()
    app.router.add_post(PATH, answer)
    async with TestServer(app) as server:
        async with KaizenClient(base_url=str(server.make_url("/")), on_event=backend.telemetry()) as client:
            assert isinstance(await failing(client), NotFoundError)
    (look_up,) = backend.spans(f"look_up {PATH}")
    assert look_up.context is not None
    assert seen[0].split("-")[1] == f"{look_up.context.trace_id:032x}"


async def test_telemetry_shows_no_key_and_no_body(backend: Backend, emulator: KaizenEmulator) -> None:
    """Spans and metrics contain neither the key nor the body of a response."""
    emulator.add("exec_1", Life.ended(), record={"sessionId": "in the record"})
    emulator.faults.next(Fault.status(500, body=b'{"message": "in the error"}'))
    hook = backend.telemetry()
    async with KaizenClient("very-secret", base_url=emulator.base_url, on_event=hook) as client:
        assert (await client.instructor_executions.wait("exec_1")).session_id == "in the record"
        await failing(client, "unknown")
    shown = "".join(span.to_json() for span in backend.spans()) + repr(backend.metrics())
    assert "exec_1" in shown
    assert not [text for text in ("very-secret", "in the record", "in the error") if text in shown]


def test_the_hook_imports_only_the_api() -> None:
    """The hook loads only the API of OpenTelemetry, not the SDK."""
    script = "import sys, kaizen_async.otel; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20, check=True)  # noqa: S603
    assert "opentelemetry.trace" in ran.stdout
    assert "opentelemetry.sdk" not in ran.stdout
    assert "opentelemetry.instrumentation" not in ran.stdout


@virtual_time
async def test_an_outage_is_counted_and_timed(backend: Backend) -> None:
    """Metrics count and time an outage by its error, and report the client's health before, during and after it."""
    broken = [True]
    transport = ScriptedTransport(lambda i, _: status(502) if broken[0] else record(i))

    def health() -> str:
        return next(
            str(dict(attributes)["kaizen.health"])
            for attributes, count in backend.values("kaizen.client.health").items()
            if count
        )

    async with transport.client(on_event=backend.telemetry(), deadline=60) as client:
        assert health() == "healthy"
        many = asyncio.create_task(client.instructor_executions.get_many([f"e{n}" for n in range(20)]))
        await asyncio.sleep(10)
        assert health() == "failing"
        broken[0] = False
        assert all(outcome.ok for outcome in await many)
        await client.instructor_executions.get("a")
        assert client.stats().outage_seconds == pytest.approx(10.2, abs=1)
    assert backend.values("kaizen.outages") == {having(KIND, error__type="502"): 1}
    assert backend.values("kaizen.outage.time") == {having(KIND): pytest.approx(10.2, abs=1)}
    seen = [name for span in backend.spans(f"look_up {PATH}") for name in events_of(span) if "outage" in name]
    assert sorted(seen) == ["kaizen.outage.began", "kaizen.outage.ended"]


@virtual_time
async def test_the_state_of_clients_is_read_when_metrics_are_collected(backend: Backend) -> None:
    """Collecting metrics reads the number of awaited executions and queued lookups of each client."""
    async with ScriptedTransport(never_ending).client(on_event=[print, backend.telemetry()]) as client:
        waiting = asyncio.create_task(client.instructor_executions.wait("a", poll=EVERY_TEN))
        await asyncio.sleep(5)
        assert backend.values("kaizen.wait.executions") == {frozenset(): 1}
        assert backend.values("kaizen.look_up.queued") == {frozenset(): 0}
        assert "kaizen.gate.pace" not in backend.metrics()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert backend.values("kaizen.wait.executions") == {frozenset(): 0}


@virtual_time
async def test_spans_can_be_switched_off(backend: Backend) -> None:
    """Without spans for polls or for everything, metrics stay, and the caller's span is still sent to the server."""
    seen: list[dict[str, str]] = []

    def note(event: object) -> None:
        if isinstance(event, AttemptStarted):
            seen.append(dict(event.headers))

    hooks = [backend.telemetry(spans=False), note]
    async with ScriptedTransport().client(on_event=hooks) as client:
        await client.instructor_executions.get("a")
        with backend.tracer.start_as_current_span("handler"):
            await client.instructor_executions.get("b")
    assert [list(headers) for headers in seen] == [[], ["traceparent"]]
    assert [span.name for span in backend.spans()] == ["handler"]
    assert sum(backend.values("http.client.request.duration").values()) == 2
    quiet = backend.telemetry(poll_spans=False)
    async with ScriptedTransport(ending(5)).client(on_event=quiet) as client:
        await client.instructor_executions.wait("c", poll=EVERY_TEN)
    assert [span.name for span in backend.spans()[1:]] == [f"wait {PATH}"]


@virtual_time
async def test_events_beyond_the_limit_of_a_span_are_counted(backend: Backend) -> None:
    """The span counts the events beyond its limit, which the SDK drops silently."""
    ids = [f"e{number}" for number in range(150)]
    async with (
        ScriptedTransport(ending(5)).client(on_event=backend.telemetry()) as client,
        client.instructor_executions.wait_many(ids, poll=EVERY_TEN) as outcomes,
    ):
        assert len([outcome async for outcome in outcomes]) == 150
    (span,) = backend.spans(f"wait_many {PATH}")
    assert len(span.events) == 128
    assert dict(span.attributes or {})["kaizen.events.dropped"] == 22


@virtual_time
async def test_ids_that_fail_in_a_wait_for_many_are_in_its_span(backend: Backend) -> None:
    """Each failed id of a wait is an event with its error in the span, and counts in a metric."""
    transport = ScriptedTransport(lambda i, _: status(404) if i == "a" else ending(5)(i, 0))
    async with (
        transport.client(on_event=backend.telemetry()) as client,
        client.instructor_executions.wait_many(["a", "b"], poll=EVERY_TEN) as outcomes,
    ):
        assert len([outcome async for outcome in outcomes]) == 2
    (span,) = backend.spans(f"wait_many {PATH}")
    assert events_of(span) == ["kaizen.execution.failure", "kaizen.execution.end"]
    assert dict(span.events[0].attributes or {}) == {"kaizen.execution.id": "a", "error.type": "404"}
    assert backend.values("kaizen.wait.failures") == {having(KIND, error__type="404"): 1}


@virtual_time
async def test_a_batch_is_a_span_above_its_lookups(backend: Backend) -> None:
    """A batch is a span above its lookups, with the numbers of successes and failures."""
    transport = ScriptedTransport(lambda i, _: status(404) if i == "a" else record(i))
    async with transport.client(on_event=backend.telemetry()) as client:
        await client.instructor_executions.get_many(["a", "b", "c"])
    (batch,) = backend.spans(f"get_many {PATH}")
    assert {parent_of(span) for span in backend.spans(f"look_up {PATH}")} == {id_of(batch)}
    attributes = dict(batch.attributes or {})
    assert (attributes["kaizen.batch.succeeded"], attributes["kaizen.batch.failed"]) == (2, 1)


@virtual_time
async def test_an_unknown_status_is_not_a_label(backend: Backend) -> None:
    """Metrics label unknown statuses as `_OTHER`, so that a server cannot create endless time series."""
    transport = ScriptedTransport(lambda i, _: ended(i, 0, state="x" * 100_000))
    async with transport.client(on_event=backend.telemetry()) as client:
        with contextlib.suppress(KaizenError):
            await client.instructor_executions.wait("a", poll=EVERY_TEN)
    assert backend.values("kaizen.execution.ends") == {having(KIND, kaizen__execution__status="_OTHER"): 1}
    assert not [span for span in backend.spans() if "xxx" in span.to_json()]


@virtual_time
async def test_a_hedge_is_a_second_span_and_losing_is_no_error(backend: Backend) -> None:
    """A hedge is a second span.

    The aborted request is marked as lost without an error, and metrics count the winners.
    """
    replies = {
        "won": ((NEVER, record("won")), record("won")),
        "lost": ((0.15, record("lost")), (NEVER, record("lost"))),
        "failed": ((1.0, record("failed")), (0.1, status(500))),
    }

    def play(execution_id: str, number: int) -> Reply:
        return replies[execution_id][number - 1] if execution_id in replies else record(execution_id)

    policy = HedgePolicy(min_observations=1, max_share=0.5)
    async with ScriptedTransport(play).client(hedge=policy, on_event=backend.telemetry()) as client:
        for execution_id in ("a", "b", "won", "c", "d", "lost", "e", "f", "failed"):
            await client.instructor_executions.get(execution_id)
    hedges = [span for span in attempts_of(backend) if (span.attributes or {}).get("kaizen.hedge")]
    assert [span.status.status_code for span in hedges] == [StatusCode.UNSET, StatusCode.UNSET, StatusCode.ERROR]
    assert [(span.attributes or {}).get("kaizen.hedge.lost", False) for span in hedges] == [False, True, False]
    lookups = {(span.attributes or {})["kaizen.execution.id"]: span for span in backend.spans(f"look_up {PATH}")}
    assert parent_of(hedges[0]) == id_of(lookups["won"])
    assert events_of(lookups["won"]) == ["kaizen.hedge"]
    [first] = [
        span for span in attempts_of(backend) if parent_of(span) == id_of(lookups["won"]) and span is not hedges[0]
    ]
    assert (first.attributes or {})["kaizen.hedge.lost"] is True
    assert (first.status.status_code, (first.attributes or {}).get("error.type")) == (StatusCode.UNSET, None)
    outcomes = {
        dict(key)["kaizen.hedge.outcome"]: count for key, count in backend.values("kaizen.look_up.hedges").items()
    }
    assert outcomes == {"won": 1, "lost": 1, "failed": 1}
    assert sum(backend.values("http.client.request.duration").values()) == 12
    assert list(backend.values("http.client.active_requests").values()) == [0]


async def counted(backend: Backend, **settings: Any) -> dict[str, dict[frozenset[tuple[str, Any]], float]]:
    """Return the metrics of lookups that end in every way, on kept-alive connections."""
    async with KaizenEmulator(default_life=Life.ended()) as emulator:
        server = emulator.base_url.rpartition(":")[2].strip("/")
        emulator.faults.next(Fault.status(503), id="retried")
        emulator.faults.always(Fault.html_502(), id="failing")
        emulator.faults.always(Fault.malformed_body(), id="garbled")
        emulator.faults.always(Fault.hang(), id="hanging")
        retry = RetryPolicy(max_attempts=2, initial_backoff=0.001, max_backoff=0.001)
        client = KaizenClient(base_url=emulator.base_url, on_event=backend.telemetry(**settings), retry=retry)
        async with client as kaizen:
            get = kaizen.instructor_executions.get
            await asyncio.gather(*(get(f"exec_{number}") for number in range(5)))
            await asyncio.gather(get("shared"), get("shared"))
            for execution_id in ("exec_1", "retried", "failing", "garbled"):
                with contextlib.suppress(KaizenError):
                    await get(execution_id)
            cancelled = asyncio.create_task(get("hanging"))
            await emulator.wait_for_request("hanging")
            cancelled.cancel()
            await asyncio.wait([cancelled])
    names = ("http.client.request.duration", "http.client.active_requests", "kaizen.look_up.duration")
    return {
        name: {
            frozenset((key, value) for key, value in attributes if str(value) != server): count
            for attributes, count in backend.values(name).items()
        }
        for name in (*names, "kaizen.look_up.retries")
    }


@pytest.mark.parametrize("way", ["metrics only", "sampler off"])
async def test_without_recorded_spans_the_same_is_counted(way: str) -> None:
    """Without recorded spans the metrics are the same, although successful lookups then create no events."""
    settings = {"sampler": ALWAYS_OFF} if way == "sampler off" else {}
    light = await counted(Backend(**settings), spans=way == "sampler off")
    assert light == await counted(Backend())
    assert sum(light["kaizen.look_up.duration"].values()) == 12
    assert not any(light["http.client.active_requests"].values())


async def test_durations_are_recorded_before_metrics_are_collected(emulator: KaizenEmulator, backend: Backend) -> None:
    """Each duration is in the next collection, and those in a sampled trace of the caller are examples of it."""
    emulator.accept_any()
    names = ("kaizen.look_up.duration", "http.client.request.duration")
    async with KaizenClient(base_url=emulator.base_url, on_event=backend.telemetry(spans=False)) as kaizen:
        for already, number in ((0, 3), (3, 140)):
            await kaizen.instructor_executions.get_many([f"exec_{already + index}" for index in range(number)])
            assert [sum(backend.values(name).values()) for name in names] == [already + number] * 2
        with backend.tracer.start_as_current_span("above"):
            for number in range(3):
                await kaizen.instructor_executions.get(f"exec_{number}")
    (above,) = backend.spans("above")
    assert above.context is not None
    metrics = backend.metrics()
    for name in names:
        (point,) = metrics[name]
        assert {example.trace_id for example in point.exemplars} == {above.context.trace_id}


async def test_a_meter_that_raises_does_not_affect_lookups(
    emulator: KaizenEmulator, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    """Lookups succeed although the user's histograms raise."""
    emulator.accept_any()
    histogram = Mock(record=Mock(side_effect=ZeroDivisionError))
    meters = Mock(**{"get_meter.return_value.create_histogram.return_value": histogram})
    async with KaizenClient(
        base_url=emulator.base_url, on_event=Telemetry(meter_provider=meters, spans=False)
    ) as kaizen:
        with backend.tracer.start_as_current_span("above"):
            outcomes = [await kaizen.instructor_executions.get(f"exec_{number}") for number in range(3)]
    assert len(outcomes) == 3
    assert histogram.record.call_count >= 3
    caplog.clear()


async def test_the_trace_of_the_caller_goes_to_the_server_without_spans(backend: Backend) -> None:
    """Without spans, requests still carry the caller's trace, unless an instrumented aiohttp sends it."""
    async with KaizenEmulator(default_life=Life.ended()) as emulator:
        for is_instrumented in (False, True):
            telemetry = backend.telemetry(spans=False, aiohttp_instrumented=is_instrumented)
            async with KaizenClient(base_url=emulator.base_url, on_event=telemetry) as kaizen:
                with backend.tracer.start_as_current_span("above"):
                    await kaizen.instructor_executions.get("exec_1")
                    await kaizen.instructor_executions.get("exec_2")
                await kaizen.instructor_executions.get("exec_3")
        sent = [request.headers.get("traceparent") for request in emulator.requests]
    (above, _) = backend.spans("above")
    assert above.context is not None
    trace = f"{above.context.trace_id:032x}-{id_of(above):016x}"
    assert [value and value[3:-3] for value in sent] == [trace, trace, None, None, None, None]


async def test_an_observer_that_raises_is_reported_once(
    emulator: KaizenEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    """An error of the user's sampler is logged once, and lookups continue."""
    sampler = Mock(should_sample=Mock(side_effect=ZeroDivisionError))
    async with KaizenClient(base_url=emulator.base_url, on_event=Backend(sampler=sampler).telemetry()) as kaizen:
        emulator.add_many(["exec_1", "exec_2"])
        outcomes = await kaizen.instructor_executions.get_many(["exec_1", "exec_2"])
    assert [outcome.ok for outcome in outcomes] == [True, True]
    assert [
        line.levelname for line in caplog.records if line.name == "kaizen_async" and line.levelno >= logging.WARNING
    ] == ["ERROR"]
    caplog.clear()
