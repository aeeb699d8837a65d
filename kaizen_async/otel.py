"""OpenTelemetry: `KaizenClient(on_event=Telemetry())` makes spans and metrics of what a client does (extra `otel`).

Spans
    One for each look-up, `look_up /instructor/executions/get`, in the trace of whoever asks. Its attempts, retries and
    the pauses of the gate are events in it. One for each call of `wait`, `wait_many` and `watch`, with a look-up for
    each poll below it. A look-up that shares the request of another has a span without attempts, and `kaizen.shared`.

Metrics
    http.client.request.duration    s            histogram: the attempts
    http.client.active_requests     {request}    how many are under way
    kaizen.look_up.duration         s            histogram: the look-ups; those that failed have an `error.type`
    kaizen.look_up.time             s            the same time by `kaizen.look_up.phase`: queue (for a slot, gate and
                                                 limiter), network, backoff, shared (the request of another)
    kaizen.look_up.retries          {retry}      by the `error.type` that made them necessary
    kaizen.retry_budget.refusals    {refusal}    retries that the client's budget did not allow
    kaizen.gate.pauses              {pause}      by the status that asked for them
    kaizen.gate.time                s            how long they took
    kaizen.execution.ends           {execution}  ends that waits have seen, by `kaizen.execution.status`

Whatever starts with `http`, `url`, `server` or `error` follows the semantic conventions for HTTP clients
(https://opentelemetry.io/docs/specs/semconv/http/). Keys, headers and bodies are in none of this; the ids of executions
are in spans only.

The span of a look-up is current while its requests are sent. So those of opentelemetry-instrumentation-aiohttp-client
nest in it, and carry the trace to the server. Pass `aiohttp_instrumented=True` then, or requests are told twice.
It sees the requests of a session that the client opens after `instrument()`, and of a session passed in that was made
with `create_trace_config()`. They go through `session.post` then, which costs more than the client's own way, on which
there is nothing to instrument.
"""

import asyncio
from collections.abc import Mapping
from typing import Any, Final, cast

from opentelemetry import context
from opentelemetry.metrics import MeterProvider, get_meter
from opentelemetry.trace import Span, SpanKind, StatusCode, TracerProvider, get_tracer, set_span_in_context
from yarl import URL

from kaizen_async.config import __version__
from kaizen_async.errors import DecodeError, KaizenError, StatusError
from kaizen_async.events import (
    AttemptEnded,
    AttemptStarted,
    BudgetRefused,
    Event,
    Gated,
    LookUpEnded,
    LookUpStarted,
    RecordEnded,
    RetryScheduled,
    Ungated,
    WaitEnded,
    WaitStarted,
)

__all__ = ["Telemetry"]

SCOPE: Final = "kaizen_async"
SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.44.0"
"""The version of the semantic conventions that names and units are taken from."""
REQUEST_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
"""The bounds that the conventions give for http.client.request.duration."""
LOOK_UP_SECONDS: Final = (*REQUEST_SECONDS, 30, 60)
CANCELLED: Final = "CancelledError"

_OPEN: Final = context.create_key("kaizen_async.open")

Attributes = Mapping[str, str | int | float | bool]


class _Place:
    """What is said of all look-ups of one kind."""

    def __init__(self, url: str) -> None:
        parsed = URL(url)
        self.path = parsed.path
        self.server: Attributes = {"server.address": parsed.host or "", "server.port": parsed.port or 0}
        self.metric: Attributes = {**self.server, "url.template": self.path}
        self.request: Attributes = {"http.request.method": "POST", **self.metric}
        self.span: Attributes = {**self.server, "url.full": url}


class _Open:
    """A look-up or wait under way."""

    def __init__(self, span: Span, place: _Place) -> None:
        self.span = span
        self.place = place
        self.token = context.attach(context.set_value(_OPEN, self, set_span_in_context(span)))
        self.started = _now()
        self.attempts = 0
        self.status: int | None = None
        self.queued = 0.0
        self.network = 0.0
        self.backoff = 0.0

    def note(self, name: str, attributes: Attributes) -> None:
        """Put an event in the span."""
        if self.span.is_recording():
            self.span.add_event(name, attributes)

    def close(self, error_type: str | None, description: str | None = None) -> None:
        """End the span, and make the one before it current again."""
        if error_type is not None:
            self.span.set_attribute("error.type", error_type)
            self.span.set_status(StatusCode.ERROR, description)
        self.span.end()
        context.detach(self.token)


class Telemetry:
    """Makes spans and metrics of the events of a client. One will do for any number of clients.

    Args:
        tracer_provider: Where spans go, if not to the global provider.
        meter_provider: Where metrics go, if not to the global provider.
        aiohttp_instrumented: Whether an instrumentation of aiohttp describes the requests. Then the spans of look-ups
            leave that to its spans: they are INTERNAL instead of CLIENT, and there is no http.client.request.duration.
    """

    def __init__(
        self,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        *,
        aiohttp_instrumented: bool = False,
    ) -> None:
        self._tracer = get_tracer(SCOPE, __version__, tracer_provider, SCHEMA_URL)
        self._describes_requests = not aiohttp_instrumented
        self._places: dict[str, _Place] = {}
        self._make_instruments(meter_provider)
        self._takers: dict[type, Any] = {
            LookUpStarted: self._on_look_up_started,
            LookUpEnded: self._on_look_up_ended,
            AttemptStarted: self._on_attempt_started,
            AttemptEnded: self._on_attempt_ended,
            RetryScheduled: self._on_retry_scheduled,
            BudgetRefused: self._on_budget_refused,
            Gated: self._on_gated,
            Ungated: self._on_ungated,
            WaitStarted: self._on_wait_started,
            WaitEnded: self._on_wait_ended,
            RecordEnded: self._on_record_ended,
        }

    def _make_instruments(self, provider: MeterProvider | None) -> None:
        meter = get_meter(SCOPE, __version__, provider, SCHEMA_URL)
        self._request_duration = meter.create_histogram(
            "http.client.request.duration",
            "s",
            "Duration of HTTP client requests.",
            explicit_bucket_boundaries_advisory=REQUEST_SECONDS,
        )
        self._active_requests = meter.create_up_down_counter(
            "http.client.active_requests", "{request}", "Number of active HTTP requests."
        )
        self._duration = meter.create_histogram(
            "kaizen.look_up.duration",
            "s",
            "Duration of look-ups.",
            explicit_bucket_boundaries_advisory=LOOK_UP_SECONDS,
        )
        self._time = meter.create_counter("kaizen.look_up.time", "s", "What the time of look-ups went into.")
        self._retries = meter.create_counter("kaizen.look_up.retries", "{retry}", "Attempts after a failed one.")
        self._refusals = meter.create_counter(
            "kaizen.retry_budget.refusals", "{refusal}", "Retries that the client's budget did not allow."
        )
        self._pauses = meter.create_counter("kaizen.gate.pauses", "{pause}", "Pauses that the server asked for.")
        self._paused = meter.create_counter("kaizen.gate.time", "s", "How long pauses took.")
        self._ends = meter.create_counter("kaizen.execution.ends", "{execution}", "Ends that waits have seen.")

    def __call__(self, event: Event) -> None:
        """Take an event. Those that this version does not know are let pass."""
        take = self._takers.get(type(event))
        if take is not None:
            take(event)

    def _place(self, url: str) -> _Place:
        place = self._places.get(url)
        if place is None:
            place = self._places[url] = _Place(url)
        return place

    def _begin(self, verb: str, url: str, execution_id: str | None, kind: SpanKind, attributes: Attributes) -> None:
        place = self._place(url)
        about = {} if execution_id is None else {"kaizen.execution.id": execution_id}
        name = f"{verb} {place.path}"
        _Open(self._tracer.start_span(name, kind=kind, attributes={**place.span, **attributes, **about}), place)

    def _on_look_up_started(self, event: LookUpStarted) -> None:
        if self._describes_requests:
            self._begin("look_up", event.url, event.id, SpanKind.CLIENT, {"http.request.method": "POST"})
        else:
            self._begin("look_up", event.url, event.id, SpanKind.INTERNAL, {})

    def _on_look_up_ended(self, event: LookUpEnded) -> None:
        look_up, outcome = _current(), event.outcome
        elapsed = _now() - look_up.started
        error = None if outcome is None else outcome.error
        shared = outcome is not None and outcome.attempts > look_up.attempts
        error_type = CANCELLED if outcome is None else _type_of(error)
        metric = look_up.place.metric
        self._duration.record(elapsed, metric if error_type is None else {**metric, "error.type": error_type})
        rest = max(0.0, elapsed - look_up.network - look_up.backoff)
        phases = {"network": look_up.network, "backoff": look_up.backoff, "shared" if shared else "queue": rest}
        for phase, seconds in phases.items():
            if seconds:
                self._time.add(seconds, {**metric, "kaizen.look_up.phase": phase})
        look_up.span.set_attributes(self._result_of(look_up, event, shared=shared))
        look_up.close(error_type, _description_of(error))

    def _result_of(self, look_up: _Open, event: LookUpEnded, *, shared: bool) -> Attributes:
        result: dict[str, str | int | float | bool] = {"kaizen.attempts": look_up.attempts}
        if shared:
            result["kaizen.shared"] = True
        if event.outcome is not None:
            result |= _status_of(event.outcome.execution)
        if self._describes_requests and look_up.status is not None:
            result["http.response.status_code"] = look_up.status
        if self._describes_requests and look_up.attempts > 1:
            result["http.request.resend_count"] = look_up.attempts - 1
        return result

    def _on_attempt_started(self, event: AttemptStarted) -> None:
        look_up = _current()
        look_up.attempts = event.attempt
        look_up.queued = event.queued
        self._active_requests.add(1, look_up.place.request)

    def _on_attempt_ended(self, event: AttemptEnded) -> None:
        look_up = _current()
        look_up.status = event.status
        look_up.network += event.elapsed
        self._active_requests.add(-1, look_up.place.request)
        result: dict[str, str | int | float | bool] = {}
        if event.status is not None:
            result["http.response.status_code"] = event.status
        if event.error is not None or event.status is None:
            result["error.type"] = _type_of(event.error) or CANCELLED
        if self._describes_requests:
            self._request_duration.record(event.elapsed, {**look_up.place.request, **result})
        figures = {"number": event.attempt, "queued": look_up.queued, "duration": event.elapsed}
        look_up.note("kaizen.attempt", {f"kaizen.attempt.{name}": figure for name, figure in figures.items()} | result)

    def _on_retry_scheduled(self, event: RetryScheduled) -> None:
        look_up = _current()
        look_up.backoff += event.delay
        reason = {"error.type": _type_of(event.error) or ""}
        self._retries.add(1, {**look_up.place.metric, **reason})
        look_up.note("kaizen.retry", {"kaizen.retry.delay": event.delay, **reason})

    def _on_budget_refused(self, event: BudgetRefused) -> None:
        look_up = _current()
        self._refusals.add(1, look_up.place.metric)
        look_up.note("kaizen.retry_budget.refusal", {"kaizen.attempts": event.attempts})

    def _on_gated(self, event: Gated) -> None:
        look_up = _current()
        status = {"http.response.status_code": event.status}
        self._pauses.add(1, {**look_up.place.server, **status})
        look_up.note("kaizen.gate.closed", {"kaizen.gate.pause": event.pause, **status})

    def _on_ungated(self, event: Ungated) -> None:
        look_up = _current()
        self._paused.add(event.pause, look_up.place.server)
        look_up.note("kaizen.gate.opened", {"kaizen.gate.pause": event.pause})

    def _on_wait_started(self, event: WaitStarted) -> None:
        self._begin(event.verb, event.url, event.id, SpanKind.INTERNAL, {})

    def _on_wait_ended(self, event: WaitEnded) -> None:
        _current().close(_type_of(event.error), _description_of(event.error))

    def _on_record_ended(self, event: RecordEnded) -> None:
        wait = _current()
        status = _status_of(event.outcome.execution)
        self._ends.add(1, {**wait.place.metric, **status})
        wait.note("kaizen.execution.end", {"kaizen.execution.id": event.id, **status})


def _now() -> float:
    """Return seconds of the clock that the events count by."""
    return asyncio.get_running_loop().time()


def _current() -> _Open:
    """Return the look-up or wait in whose context an event is told: all are told in that of one."""
    return cast("_Open", context.get_value(_OPEN))


def _type_of(error: KaizenError | None) -> str | None:
    """Return the conventions' `error.type`: the status if that is the error, else its class."""
    if error is None:
        return None
    return str(error.status) if isinstance(error, StatusError) else type(error).__name__


def _description_of(error: KaizenError | None) -> str | None:
    """Return what an error says, unless it may quote the server's answer."""
    return None if error is None or isinstance(error, StatusError | DecodeError) else error.reason


def _status_of(record: object) -> dict[str, str]:
    status = getattr(record, "status", None)
    return {"kaizen.execution.status": str(status)} if isinstance(status, str) else {}
