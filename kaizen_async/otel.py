"""OpenTelemetry: `KaizenClient(on_event=Telemetry())` makes spans and metrics of what a client does (extra `otel`).

Spans
    look_up /instructor/executions/get   INTERNAL  one lookup, in the trace of its caller. Retries and pauses are events
                                                   in it. If it shares the request of another, it links to that lookup.
    POST /instructor/executions/get      CLIENT    one attempt, below its lookup, as the conventions for HTTP say. Its
                                                   context travels to the server in the header `traceparent`.
                                                   A hedge is a second such span with `kaizen.hedge`. Of the two, the
                                                   request that was aborted has `kaizen.hedge.lost` and is no error.
    get_many, stream                     INTERNAL  one call, above its lookups.
    wait, wait_many, watch               INTERNAL  one call, above its polls, which are lookups. The ends of executions,
                                                   and the errors of ids, are events in it.

    A span holds 128 events at most, which is the SDK's own limit; `kaizen.events.dropped` says how many more
    there were.

Metrics
    http.client.request.duration    s            histogram: the attempts
    http.client.active_requests     {request}    attempts in flight
    kaizen.look_up.duration         s            histogram: the lookups; those that failed have an `error.type`
    kaizen.look_up.time             s            the same time by `kaizen.look_up.phase`: queue (for a slot, pace, pause
                                                 and limiter), network, backoff, shared (the request of another)
    kaizen.look_up.retries          {retry}      by the `error.type` that made them necessary
    kaizen.look_up.hedges           {request}    second requests by `kaizen.hedge.outcome`: won, lost, failed
    kaizen.look_up.queued           {look_up}    lookups in progress without a request in flight
    kaizen.retry_budget.refusals    {refusal}    retries that the client's budget did not allow
    kaizen.gate.pauses              {pause}      by the status that asked for them
    kaizen.gate.time                s            how long they took
    kaizen.gate.pace                {request}/s  what may be sent now; no value when nothing is held back
    kaizen.outages                  {outage}     times that everything failed, by the `error.type` of it
    kaizen.outage.time              s            how long that lasted, counted when it is over
    kaizen.client.health            {client}     clients by `kaizen.health`: healthy, throttled, refused, failing
    kaizen.wait.duration            s            histogram: calls of wait, wait_many and watch, by `kaizen.wait.method`
                                                 and `kaizen.wait.outcome`: succeeded, failed, cancelled
    kaizen.wait.failures            {execution}  ids for which wait_many and watch ended with an error, by `error.type`
    kaizen.wait.executions          {execution}  executions that are waited for now
    kaizen.poll.delay               s            by which polls come later than they are due, as a running mean
    kaizen.execution.ends           {execution}  ends that waits have seen, by `kaizen.execution.status`

Names that start with `http`, `url`, `server`, `network` or `error` follow the semantic conventions for HTTP clients
(https://opentelemetry.io/docs/specs/semconv/http/). No key, header or body is in any of this. The ids of executions are
in spans only. Of statuses, only those that this version knows are named; others count as `_OTHER`.

With an instrumentation of aiohttp, pass `aiohttp_instrumented=True`: then its spans describe the requests, below those
of the lookups, and carry the trace to the server. It sees the requests of a session that the client opens after
`instrument()`, and of a session passed in that was made with `create_trace_config()`.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from contextvars import Context
from typing import Any, Final, Literal, Protocol, cast, get_args
from weakref import WeakSet

from aiohttp import ClientOSError
from opentelemetry import context, propagate
from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation, get_meter
from opentelemetry.trace import (
    INVALID_SPAN,
    Span,
    SpanKind,
    StatusCode,
    TracerProvider,
    get_current_span,
    get_tracer,
    set_span_in_context,
)
from yarl import URL

from kaizen_async.config import __version__
from kaizen_async.errors import MESSAGE_LIMIT, DecodeError, KaizenError, StatusError, printable
from kaizen_async.events import (
    AttemptEnded,
    AttemptHeld,
    AttemptStarted,
    BatchEnded,
    BatchStarted,
    BudgetRefused,
    Event,
    Gated,
    HedgeEnded,
    HedgeStarted,
    LookUpEnded,
    LookUpShared,
    LookUpStarted,
    OutageBegan,
    OutageEnded,
    PollShared,
    RecordEnded,
    RecordFailed,
    RetryScheduled,
    Ungated,
    WaitEnded,
    WaitStarted,
)
from kaizen_async.models import ExecutionStatus
from kaizen_async.stats import ClientStats, HealthState

__all__ = ["Telemetry"]

SCOPE: Final = "kaizen_async"
SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.44.0"
"""The version of the semantic conventions that names and units are taken from."""
REQUEST_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
"""The bounds that the conventions give for http.client.request.duration."""
LOOK_UP_SECONDS: Final = (*REQUEST_SECONDS, 30, 60)
WAIT_SECONDS: Final = (1, 5, 15, 60, 300, 900, 3600, 10_800, 43_200, 86_400)
MOST_EVENTS: Final = 128
"""Events in a span: the default limit of SDKs, which drop further ones without a word."""
MOST_UNRECORDED: Final = 64
"""Durations of lookups that are recorded together. One by one, each takes the SDK twice as long, because what it needs
is no longer in the processor's cache. More would hold up the event loop for longer than a millisecond."""
CANCELLED: Final = "CancelledError"
OTHER: Final = "_OTHER"
"""What the conventions put in place of values that are not known, so that a server cannot make up new time series."""

_PROTOCOL: Final = {"network.protocol.version": "1.1"}
_KNOWN_STATUSES: Final = frozenset(status.value for status in ExecutionStatus)
_OPEN: Final = context.create_key("kaizen_async.open")

Attributes = Mapping[str, str | int | float | bool]
Phase = Literal["queue", "network", "backoff", "shared"]


class _Client(Protocol):
    def stats(self) -> ClientStats: ...


class _Place:
    """What is known about all lookups of one kind: attributes, and totals that are read when metrics are collected."""

    def __init__(self, url: str) -> None:
        parsed = URL(url)
        self.path = parsed.path
        self.server: Attributes = {"server.address": parsed.host or "", "server.port": parsed.port or 0}
        self.metric: Attributes = {**self.server, "url.template": self.path}
        self.request: Attributes = {"http.request.method": "POST", **self.metric}
        self.span: Attributes = {**self.server, "url.full": url, "url.template": self.path}
        self.attempt: Attributes = {**self.span, **_PROTOCOL, "http.request.method": "POST"}
        self.active = 0
        self.unrecorded: deque[float] = deque()
        self.seconds: dict[Phase, float] = {"queue": 0.0, "network": 0.0, "backoff": 0.0, "shared": 0.0}
        self.retries: defaultdict[str, int] = defaultdict(int)
        self.hedges: defaultdict[str, int] = defaultdict(int)
        self.refusals = 0
        self.pauses: defaultdict[int, int] = defaultdict(int)
        self.paused = 0.0
        self.outages: defaultdict[str, int] = defaultdict(int)
        self.failing = 0.0
        self.ends: defaultdict[str, int] = defaultdict(int)
        self.failures: defaultdict[str, int] = defaultdict(int)
        self._results: dict[tuple[str | None, int | None], Attributes] = {}

    def looked_up(self, error_type: str | None) -> Attributes:
        """Return the attributes of a lookup's duration."""
        return self.metric if error_type is None else {**self.metric, "error.type": error_type}

    def requested(self, error_type: str | None, status: int | None) -> Attributes:
        """Return the attributes of a request's duration; the same object for the same result, which is cheap."""
        known = self._results.get((error_type, status))
        if known is None:
            known = self._results[error_type, status] = {**self.request, **_PROTOCOL, **_result(error_type, status)}
        return known


class _Open:
    """A lookup, a wait or a batch in progress."""

    __slots__ = (
        "_noted",
        "_token",
        "attempt",
        "attempts",
        "backoff",
        "hedge",
        "is_hedge_won",
        "is_wait",
        "network",
        "place",
        "shares",
        "span",
    )

    def __init__(self, span: Span, place: _Place, *, is_wait: bool) -> None:
        self.span = span
        self.place = place
        self.is_wait = is_wait
        current = context.get_current() if span is INVALID_SPAN else set_span_in_context(span)
        self._token = context.attach(context.set_value(_OPEN, self, current))
        self.attempts = 0
        self.attempt: Span | None = None
        self.hedge: Span | None = None
        self.is_hedge_won = False
        self.shares = False
        self.network = 0.0
        self.backoff = 0.0
        self._noted = 0

    def note(self, name: str, attributes: Attributes) -> None:
        """Put an event in the span, unless it is full."""
        if self.span.is_recording():
            self._noted += 1
            if self._noted <= MOST_EVENTS:
                self.span.add_event(name, attributes)

    def close(self, error_type: str | None, description: str | None = None) -> None:
        """End the span, and make the one before it current again."""
        if self._noted > MOST_EVENTS:
            self.span.set_attribute("kaizen.events.dropped", self._noted - MOST_EVENTS)
        _end(self.span, error_type, description)
        context.detach(self._token)


class _Light:
    """A lookup that takes no events as long as its first request brings the record. That saves half of the cost.

    Attributes:
        headers: Carry the trace to the server.
        is_light: Whether it has needed no events so far.
        is_found: Whether its first request brought the record.
        is_sampled: Whether its caller's trace is recorded. Then its durations can be exemplars of that trace.
    """

    __slots__ = (
        "_is_sent",
        "_open",
        "_place",
        "_span",
        "_telemetry",
        "headers",
        "is_found",
        "is_light",
        "is_sampled",
    )

    def __init__(self, telemetry: "Telemetry", span: Span, place: _Place, *, is_light: bool) -> None:
        self._telemetry = telemetry
        self._span = span
        self._place = place
        self._open: _Open | None = None
        self._is_sent = False
        self.headers: dict[str, str] = {}
        self.is_light = is_light
        self.is_found = False
        self.is_sampled = False

    def sent(self) -> None:
        """Note that the first request was sent."""
        self._is_sent = True
        self._place.active += 1

    def found(self, elapsed: float) -> None:
        """Note that it brought the record."""
        self.is_found = True
        place = self._place
        place.active -= 1
        place.seconds["network"] += elapsed
        try:  # noqa: SIM105 - `suppress` costs a microsecond
            self._telemetry.record(place, elapsed, at_once=self.is_sampled)
        except Exception:  # noqa: BLE001, S110 - what a meter of the user's raises does not affect the lookup
            pass

    def abandon(self, elapsed: float) -> None:
        """Note that it was given up."""
        look_up = self.enter()
        look_up.attempts = 1
        look_up.network = elapsed
        self._telemetry.record_request(self._place, elapsed, CANCELLED, None)

    def enter(self) -> _Open:
        """Make its span the current one. `AttemptStarted` comes again if a request was sent."""
        if self._is_sent:
            self._is_sent = False
            self._place.active -= 1
        self.is_light = False
        if self._open is None:
            self._open = _Open(self._span, self._place, is_wait=False)
        return self._open


class Telemetry:
    """Makes spans and metrics of the events of a client. One instance serves any number of clients.

    Args:
        tracer_provider: Where spans go, if not to the global provider.
        meter_provider: Where metrics go, if not to the global provider.
        aiohttp_instrumented: Whether an instrumentation of aiohttp describes the requests. Then there are no spans of
            attempts, no http.client.request.duration, and no `traceparent` from here.
        spans: Whether there are spans. Without them, `traceparent` carries the span of the caller, if there is one.
        poll_spans: Whether the polls of waits have spans.
    """

    def __init__(
        self,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        *,
        aiohttp_instrumented: bool = False,
        spans: bool = True,
        poll_spans: bool = True,
    ) -> None:
        self._tracer = get_tracer(SCOPE, __version__, tracer_provider, SCHEMA_URL)
        self._describes_requests = not aiohttp_instrumented
        self._spans = spans
        self._poll_spans = poll_spans
        self._places: dict[str, _Place] = {}
        self._clients: WeakSet[_Client] = WeakSet()
        self._make_instruments(get_meter(SCOPE, __version__, meter_provider, SCHEMA_URL))
        self._handlers: dict[type, Any] = {
            LookUpStarted: self._on_look_up_started,
            LookUpShared: self._on_look_up_shared,
            LookUpEnded: self._on_look_up_ended,
            AttemptStarted: self._on_attempt_started,
            AttemptHeld: self._on_attempt_held,
            AttemptEnded: self._on_attempt_ended,
            HedgeStarted: self._on_hedge_started,
            HedgeEnded: self._on_hedge_ended,
            RetryScheduled: self._on_retry_scheduled,
            BudgetRefused: self._on_budget_refused,
            Gated: self._on_gated,
            Ungated: self._on_ungated,
            OutageBegan: self._on_outage_began,
            OutageEnded: self._on_outage_ended,
            WaitStarted: self._on_wait_started,
            WaitEnded: self._on_wait_ended,
            RecordEnded: self._on_record_ended,
            RecordFailed: self._on_record_failed,
            PollShared: self._on_poll_shared,
            BatchStarted: self._on_batch_started,
            BatchEnded: self._on_batch_ended,
        }

    def watch_client(self, client: _Client) -> None:
        """Report the state of a client too. Every client calls this for what is passed to it as `on_event`."""
        self._clients.add(client)

    def observe(self, execution_id: str, url: str) -> _Light:
        """Begin to observe a lookup, in place of `LookUpStarted`; with few events if no span of it is recorded."""
        place = self._place(url)
        span = self._start("look_up", place, execution_id, is_wait=False)
        look_up = _Light(self, span, place, is_light=not span.is_recording())
        if not look_up.is_light:
            look_up.enter()
        else:
            current = get_current_span() if span is INVALID_SPAN else span
            trace = current.get_span_context()
            if trace.is_valid:
                look_up.is_sampled = trace.trace_flags.sampled
                if self._describes_requests:
                    propagate.inject(look_up.headers, set_span_in_context(current))
        return look_up

    def __call__(self, event: Event) -> None:
        """Handle an event. Those that this version does not know are ignored."""
        handle = self._handlers.get(type(event))
        if handle is not None:
            handle(event)

    def _make_instruments(self, meter: Meter) -> None:
        self._request_duration = meter.create_histogram(
            "http.client.request.duration",
            "s",
            "Duration of HTTP client requests.",
            explicit_bucket_boundaries_advisory=REQUEST_SECONDS,
        )
        self._duration = meter.create_histogram(
            "kaizen.look_up.duration",
            "s",
            "Duration of lookups.",
            explicit_bucket_boundaries_advisory=LOOK_UP_SECONDS,
        )
        self._wait_duration = meter.create_histogram(
            "kaizen.wait.duration",
            "s",
            "Duration of calls that wait for executions.",
            explicit_bucket_boundaries_advisory=WAIT_SECONDS,
        )
        self._observe_places(meter)
        self._observe_clients(meter)

    def _observe_places(self, meter: Meter) -> None:
        """Make the instruments that cost nothing while lookups run: they read totals when metrics are collected."""

        def counter(name: str, unit: str, description: str, read: "Callable[[_Place], Iterable[Observation]]") -> None:
            meter.create_observable_counter(name, [self._reader(read)], unit, description)

        meter.create_observable_up_down_counter(
            "http.client.active_requests",
            [self._reader(lambda place: [Observation(place.active, place.request)])],
            "{request}",
            "Number of active HTTP requests.",
        )
        counter("kaizen.look_up.time", "s", "Time of lookups by phase.", _phases)
        counter(
            "kaizen.look_up.retries", "{retry}", "Attempts after a failed one.", _by("retries", "error.type", "metric")
        )
        counter(
            "kaizen.look_up.hedges",
            "{request}",
            "Second requests for slow ones.",
            _by("hedges", "kaizen.hedge.outcome", "metric"),
        )
        counter(
            "kaizen.retry_budget.refusals",
            "{refusal}",
            "Retries that the client's budget did not allow.",
            lambda place: [Observation(place.refusals, place.metric)] if place.refusals else [],
        )
        counter(
            "kaizen.gate.pauses",
            "{pause}",
            "Pauses that the server asked for.",
            _by("pauses", "http.response.status_code", "server"),
        )
        counter(
            "kaizen.gate.time",
            "s",
            "Seconds of pauses.",
            lambda place: [Observation(place.paused, place.server)] if place.paused else [],
        )
        counter("kaizen.outages", "{outage}", "Times that everything failed.", _by("outages", "error.type", "metric"))
        counter(
            "kaizen.outage.time",
            "s",
            "Seconds for which everything failed.",
            lambda place: [Observation(place.failing, place.metric)] if place.failing else [],
        )
        counter(
            "kaizen.execution.ends",
            "{execution}",
            "Ends that waits have seen.",
            _by("ends", "kaizen.execution.status", "metric"),
        )
        counter(
            "kaizen.wait.failures",
            "{execution}",
            "Ids for which a wait for many ended with an error.",
            _by("failures", "error.type", "metric"),
        )

    def _observe_clients(self, meter: Meter) -> None:
        def state(read: "Callable[[Any], float | None]") -> "Callable[[CallbackOptions], Iterable[Observation]]":
            def observe(_: CallbackOptions) -> Iterable[Observation]:
                values = [read(client.stats()) for client in list(self._clients)]
                known = [value for value in values if value is not None]
                return [Observation(sum(known))] if known else []

            return observe

        def health(_: CallbackOptions) -> Iterable[Observation]:
            states = Counter(client.stats().health for client in list(self._clients))
            return [Observation(states[state], {"kaizen.health": state}) for state in get_args(HealthState)]

        meter.create_observable_up_down_counter(
            "kaizen.client.health", [health], "{client}", "Clients by how the server is doing in their view."
        )
        meter.create_observable_up_down_counter(
            "kaizen.wait.executions",
            [state(lambda stats: stats.waiting)],
            "{execution}",
            "Executions that are waited for now.",
        )
        meter.create_observable_up_down_counter(
            "kaizen.look_up.queued",
            [state(lambda stats: stats.queued)],
            "{look_up}",
            "Lookups in progress without a request in flight.",
        )
        meter.create_observable_gauge(
            "kaizen.poll.delay", [state(lambda stats: stats.poll_delay)], "s", "By which polls come later than due."
        )
        meter.create_observable_gauge(
            "kaizen.gate.pace", [state(lambda stats: stats.gate_pace)], "{request}/s", "What may be sent now."
        )

    def _reader(
        self, read: "Callable[[_Place], Iterable[Observation]]"
    ) -> "Callable[[CallbackOptions], Iterable[Observation]]":
        def observe(_: CallbackOptions) -> Iterable[Observation]:
            observations: list[Observation] = []
            for place in list(self._places.values()):
                self._record_all(place)  # SDKs call this before they collect the histograms
                observations += read(place)
            return observations

        return observe

    def _place(self, url: str) -> _Place:
        place = self._places.get(url)
        if place is None:
            place = self._places[url] = _Place(url)
        return place

    def _begin(self, method: str, url: str, execution_id: str | None, *, is_wait: bool) -> None:
        """Open a lookup, a wait or a batch, with a span if it is to have one."""
        place = self._place(url)
        _Open(self._start(method, place, execution_id, is_wait=is_wait), place, is_wait=is_wait)

    def _start(self, method: str, place: _Place, execution_id: str | None, *, is_wait: bool) -> Span:
        if not self._spans or not (self._poll_spans or is_wait or not _is_poll()):
            return INVALID_SPAN
        attributes = place.span if execution_id is None else {**place.span, "kaizen.execution.id": _shown(execution_id)}
        return self._tracer.start_span(f"{method} {place.path}", attributes=attributes)

    def record(self, place: _Place, elapsed: float, *, at_once: bool) -> None:
        """Record a lookup whose first request brought the record: at once, or together with others."""
        if at_once:
            self._record_found(place, elapsed)
            return
        place.unrecorded.append(elapsed)
        if len(place.unrecorded) >= MOST_UNRECORDED:
            self._record_all(place)

    def _record_all(self, place: _Place) -> None:
        """Record the lookups that have not been recorded yet. Threads that collect metrics call this, too."""
        with suppress(IndexError):  # another thread may take the last one
            while place.unrecorded:
                self._record_found(place, place.unrecorded.pop())

    def _record_found(self, place: _Place, elapsed: float) -> None:
        self._duration.record(elapsed, place.metric)
        self.record_request(place, elapsed, None, 200)

    def record_request(self, place: _Place, elapsed: float, error_type: str | None, status: int | None) -> None:
        """Record the duration of a request, unless an instrumentation of aiohttp does."""
        if self._describes_requests:
            self._request_duration.record(elapsed, place.requested(error_type, status))

    def _on_look_up_started(self, event: LookUpStarted) -> None:
        self._begin("look_up", event.url, event.id, is_wait=False)

    def _on_look_up_shared(self, event: LookUpShared) -> None:
        look_up = _current()
        look_up.shares = True
        _link(look_up.span, event.leader)

    @staticmethod
    def _on_poll_shared(event: PollShared) -> None:
        _link(_current().span, event.leader)

    def _on_look_up_ended(self, event: LookUpEnded) -> None:
        look_up, outcome = _current(), event.outcome
        place = look_up.place
        error = None if outcome is None else outcome.error
        error_type = CANCELLED if outcome is None else _type_of(error)
        self._duration.record(event.elapsed, place.looked_up(error_type))
        place.seconds["network"] += look_up.network
        place.seconds["backoff"] += look_up.backoff
        rest = max(0.0, event.elapsed - look_up.network - look_up.backoff)
        place.seconds["shared" if look_up.shares else "queue"] += rest
        if look_up.span.is_recording():
            result: dict[str, str | int | float | bool] = {"kaizen.attempts": look_up.attempts}
            if look_up.shares:
                result["kaizen.shared"] = True
            if outcome is not None:
                result |= _status_of(outcome.execution)
            look_up.span.set_attributes(result)
        look_up.close(error_type, _description_of(error))

    def _on_attempt_started(self, event: AttemptStarted) -> None:
        look_up = _current()
        look_up.attempts = event.attempt
        look_up.shares = False
        look_up.place.active += 1
        look_up.is_hedge_won = False
        attributes: dict[str, str | int | float | bool] = {"kaizen.attempt.queued": event.queued}
        if event.attempt > 1:
            attributes["http.request.resend_count"] = event.attempt - 1
        look_up.attempt = self._begin_request(look_up, attributes, event.headers)

    def _begin_request(self, look_up: _Open, attributes: Attributes, headers: dict[str, str]) -> Span | None:
        """Return the span of a request, if it is to have one, and add the trace to the headers of the request."""
        if not self._describes_requests:
            return None
        if look_up.span.is_recording():
            span = self._tracer.start_span(
                f"POST {look_up.place.path}", kind=SpanKind.CLIENT, attributes={**look_up.place.attempt, **attributes}
            )
            propagate.inject(headers, set_span_in_context(span))
            return span
        if get_current_span().get_span_context().is_valid:
            propagate.inject(headers)
        return None

    def _on_attempt_held(self, _: AttemptHeld) -> None:
        look_up = _current()
        look_up.place.active -= 1
        if look_up.attempt is not None:
            look_up.attempt.set_attributes({"kaizen.attempt.held": True})
            _end(look_up.attempt, None)
            look_up.attempt = None

    def _on_attempt_ended(self, event: AttemptEnded) -> None:
        look_up = _current()
        look_up.network += event.elapsed
        look_up.place.active -= 1
        span, look_up.attempt = look_up.attempt, None
        self._end_request(look_up, event, span, is_lost=look_up.is_hedge_won and event.status is None)

    def _on_hedge_started(self, event: HedgeStarted) -> None:
        look_up = _current()
        look_up.place.active += 1
        look_up.note("kaizen.hedge", {"kaizen.hedge.after": event.after})
        attributes = {"kaizen.hedge": True, "http.request.resend_count": event.attempt}
        look_up.hedge = self._begin_request(look_up, attributes, event.headers)

    def _on_hedge_ended(self, event: HedgeEnded) -> None:
        look_up = _current()
        look_up.is_hedge_won = event.won
        look_up.place.active -= 1
        is_lost = not event.won and event.error is None
        look_up.place.hedges["won" if event.won else "lost" if is_lost else "failed"] += 1
        span, look_up.hedge = look_up.hedge, None
        self._end_request(look_up, event, span, is_lost=is_lost)

    def _end_request(
        self, look_up: _Open, event: AttemptEnded | HedgeEnded, span: Span | None, *, is_lost: bool
    ) -> None:
        """Record the duration of a request, and end its span. Losing against the other of two is no error."""
        if not self._describes_requests:
            return
        error_type = None if is_lost else _cause_of(event)
        self.record_request(look_up.place, event.elapsed, error_type, event.status)
        if span is not None:
            result = _result(error_type, event.status)
            if event.peer is not None:
                result |= {"network.peer.address": event.peer[0], "network.peer.port": event.peer[1]}
            if is_lost:
                result["kaizen.hedge.lost"] = True
            span.set_attributes(result)
            _end(span, error_type, _description_of(event.error))

    def _on_retry_scheduled(self, event: RetryScheduled) -> None:
        look_up = _current()
        look_up.backoff += event.delay
        error_type = _type_of(event.error) or OTHER
        look_up.place.retries[error_type] += 1
        look_up.note("kaizen.retry", {"kaizen.retry.delay": event.delay, "error.type": error_type})

    def _on_budget_refused(self, event: BudgetRefused) -> None:
        look_up = _current()
        look_up.place.refusals += 1
        look_up.note("kaizen.retry_budget.refusal", {"kaizen.attempts": event.attempts})

    def _on_gated(self, event: Gated) -> None:
        look_up = _current()
        look_up.place.pauses[event.status] += 1
        look_up.note(
            "kaizen.gate.closed", {"kaizen.gate.pause": event.pause, "http.response.status_code": event.status}
        )

    def _on_ungated(self, event: Ungated) -> None:
        look_up = _current()
        look_up.place.paused += event.pause
        look_up.note("kaizen.gate.opened", {"kaizen.gate.pause": event.pause})

    def _on_outage_began(self, event: OutageBegan) -> None:
        look_up = _current()
        error_type = _type_of(event.error) or OTHER
        look_up.place.outages[error_type] += 1
        look_up.note("kaizen.outage.began", {"error.type": error_type, "kaizen.outage.age": event.age})

    def _on_outage_ended(self, event: OutageEnded) -> None:
        look_up = _current()
        look_up.place.failing += event.lasted
        look_up.note("kaizen.outage.ended", {"kaizen.outage.duration": event.lasted})

    def _on_wait_started(self, event: WaitStarted) -> None:
        self._begin(event.verb, event.url, event.id, is_wait=True)

    def _on_wait_ended(self, event: WaitEnded) -> None:
        wait = _current()
        error_type = CANCELLED if event.cancelled else _type_of(event.error)
        outcome = "cancelled" if event.cancelled else "succeeded" if event.error is None else "failed"
        attributes = {"kaizen.wait.method": event.verb, "kaizen.wait.outcome": outcome}
        self._wait_duration.record(event.elapsed, {**wait.place.looked_up(error_type), **attributes})
        if wait.span.is_recording():
            wait.span.set_attribute("kaizen.wait.outcome", outcome)
        wait.close(error_type, _description_of(event.error))

    def _on_record_ended(self, event: RecordEnded) -> None:
        wait = _current()
        status = _status_of(event.outcome.execution)
        wait.place.ends[status.get("kaizen.execution.status", OTHER)] += 1
        wait.note("kaizen.execution.end", {"kaizen.execution.id": _shown(event.id), **status})

    def _on_record_failed(self, event: RecordFailed) -> None:
        wait = _current()
        error_type = _type_of(event.outcome.error) or OTHER
        wait.place.failures[error_type] += 1
        wait.note("kaizen.execution.failure", {"kaizen.execution.id": _shown(event.id), "error.type": error_type})

    def _on_batch_started(self, event: BatchStarted) -> None:
        self._begin(event.verb, event.url, None, is_wait=False)

    def _on_batch_ended(self, event: BatchEnded) -> None:
        batch = _current()
        if batch.span.is_recording():
            batch.span.set_attributes({"kaizen.batch.succeeded": event.succeeded, "kaizen.batch.failed": event.failed})
        batch.close(CANCELLED if event.cancelled else None)


def _shown(execution_id: str) -> str:
    """Return an id as it stands in a span. Strangers may choose ids, so a long one is cut."""
    return execution_id if len(execution_id) <= MESSAGE_LIMIT else printable(execution_id)


def _current() -> _Open:
    """Return the lookup, wait or batch in whose context an event happens."""
    return cast("_Open", context.get_value(_OPEN))


def _is_poll() -> bool:
    """Return whether a lookup that begins now is a poll."""
    above = context.get_value(_OPEN)
    return isinstance(above, _Open) and above.is_wait


def _link(span: Span, leader: Context) -> None:
    """Link a span to the one that is current in another context."""
    if span.is_recording():
        linked = leader.run(get_current_span).get_span_context()
        if linked.is_valid:
            span.add_link(linked)


def _end(span: Span, error_type: str | None, description: str | None = None) -> None:
    if error_type is not None:
        span.set_attribute("error.type", error_type)
        span.set_status(StatusCode.ERROR, description)
    span.end()


def _phases(place: _Place) -> list[Observation]:
    return [
        Observation(seconds, {**place.metric, "kaizen.look_up.phase": phase})
        for phase, seconds in place.seconds.items()
        if seconds
    ]


def _by(
    totals: str, attribute: str, common: Literal["metric", "server"]
) -> "Callable[[_Place], Iterable[Observation]]":
    """Return a function that reads the totals of a place by an attribute."""

    def read(place: _Place) -> list[Observation]:
        counts: dict[Any, int] = getattr(place, totals)
        return [Observation(count, {**getattr(place, common), attribute: value}) for value, count in counts.items()]

    return read


def _result(error_type: str | None, status: int | None) -> dict[str, str | int | float | bool]:
    result: dict[str, str | int | float | bool] = {}
    if status is not None:
        result["http.response.status_code"] = status
    if error_type is not None:
        result["error.type"] = error_type
    return result


def _type_of(error: KaizenError | None) -> str | None:
    """Return the conventions' `error.type`: the status if that is the error, else its class."""
    if error is None:
        return None
    return str(error.status) if isinstance(error, StatusError) else type(error).__name__


def _cause_of(event: AttemptEnded | HedgeEnded) -> str | None:
    """Return the `error.type` of an attempt: the class of what really happened, such as ConnectionRefusedError."""
    error = event.error
    if error is None:
        return None if event.status is not None else CANCELLED
    if isinstance(error, StatusError) or error.__cause__ is None:
        return _type_of(error)
    cause: BaseException = error.__cause__
    cause = getattr(cause, "os_error", cause)
    if isinstance(cause, ClientOSError) and cause.errno is not None:
        cause = OSError(cause.errno, "")  # Python makes it a ConnectionResetError, or whatever the number stands for
    return type(cause).__name__


def _description_of(error: KaizenError | None) -> str | None:
    """Return what an error says, unless it may quote the server's response."""
    return None if error is None or isinstance(error, StatusError | DecodeError) else error.reason


def _status_of(record: object) -> dict[str, str]:
    """Return the status of a record, if it has one: only those are named that this version knows."""
    status = getattr(record, "status", None)
    if not isinstance(status, str):
        return {}
    return {"kaizen.execution.status": str(status) if status in _KNOWN_STATUSES else OTHER}
