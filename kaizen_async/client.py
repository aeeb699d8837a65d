"""The client: settings, ownership, and the state that outlives an event loop."""

import asyncio
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from ssl import SSLContext
from types import TracebackType
from typing import Any, Final, NoReturn, Self, TypeVar
from weakref import WeakValueDictionary

import aiohttp
import msgspec

from kaizen_async._kinds import EXECUTIONS, INSTRUCTOR_EXECUTIONS, Kind
from kaizen_async._lookup.engine import Engine, Limiter, require_limiter
from kaizen_async._lookup.health import SEVERITY, Health
from kaizen_async._lookup.hedge import Hedging
from kaizen_async._lookup.lookup import Lookups
from kaizen_async._lookup.received import Received
from kaizen_async._transport.key import KeyFunction, RotatingKey
from kaizen_async._transport.proxies import environment_proxy, parse_proxy
from kaizen_async._transport.request_id import REQUEST_ID_HEADERS, RequestIds
from kaizen_async._transport.transport import (
    Transport,
    may_leave_machine,
    own_headers,
    request_headers,
    require_session,
)
from kaizen_async._transport.wire import Endpoint
from kaizen_async._waiting.cadence import Cadence
from kaizen_async._waiting.calls import Group
from kaizen_async._waiting.facts import require_end
from kaizen_async._waiting.memory import EndedRecords
from kaizen_async._waiting.scheduler import Scheduler
from kaizen_async.clock import Clock, SystemClock
from kaizen_async.config import (
    ConnectionPolicy,
    HedgePolicy,
    PollPolicy,
    RetryPolicy,
    Settings,
    require_count,
    require_duration,
    resolve_api_key,
    resolve_base_url,
    untraced,
)
from kaizen_async.errors import StatusError, seconds
from kaizen_async.events import Event, Gated, Hook, OutageBegan, OutageEnded, Ungated, hooks_of, observer_of, shielded
from kaizen_async.executions import Executions
from kaizen_async.models import InstructorExecution, WorkflowExecution
from kaizen_async.stats import ClientStats, Counters, total

T = TypeVar("T")

log = logging.getLogger("kaizen_async")

_inherited: Final[list[Engine]] = []
"""Engines of a parent process. Touching them, even to free them, could disturb the parent's sockets."""

MOST_POLICIES: Final = 100
"""How many policies a client remembers: lookups share requests under one, and waits learn under one. Each further
policy replaces the oldest, whose lookups and waits start again without shared requests or learned durations."""


def forget_oldest(kept: dict[Any, Any]) -> None:
    """Drop the oldest entry beyond `MOST_POLICIES`. Calls that use it keep their own reference and continue."""
    if len(kept) > MOST_POLICIES:
        del kept[next(iter(kept))]


def note_change(counters: Counters, on_event: Hook | None, event: Event) -> None:
    """Count, log and report a change of the server's health.

    This is a function, not a method: a method would tie the client into a reference cycle, and a client that was not
    closed would be freed too late to warn.
    """
    match event:
        case Gated():
            counters.pauses += 1
            log.warning(
                "The server has rejected every request of late (%d). Paused; probing in %s.",
                event.status,
                seconds(event.pause),
                extra={"status": event.status, "pause": event.pause},
            )
        case OutageBegan():
            counters.outages += 1
            error = event.error
            log.warning(
                "The server has been %s for %s (%s). Paused; probing every %.3g to %s.",
                "refusing every request" if event.refused else "failing",
                seconds(event.age),
                error.status if isinstance(error, StatusError) else error.reason,
                event.next_probe,
                seconds(event.longest_gap),
                extra={"error_type": type(error).__name__, "elapsed": event.age},
            )
        case Ungated():
            counters.pause_seconds += event.pause
            log.warning(
                "The server accepts requests again after a pause of %s. It cost %d rejected requests and %d lookups.",
                seconds(event.pause),
                event.failed,
                event.lost,
                extra={"pause": event.pause, "failed_requests": event.failed, "lost_lookups": event.lost},
            )
        case OutageEnded():
            counters.outage_seconds += event.lasted
            log.warning(
                "The server works again after %s. The outage cost %d failed requests and %d lookups.",
                seconds(event.lasted),
                event.failed,
                event.lost,
                extra={"elapsed": event.lasted, "failed_requests": event.failed, "lost_lookups": event.lost},
            )
        case _:
            pass
    if on_event is not None:
        on_event(event)


class KaizenClient:
    """An asynchronous client for Kaizen executions.

        async with KaizenClient() as kaizen:
            execution = await kaizen.instructor_executions.get("exec_1")

    You may create it before an event loop runs, and use it in one loop after another. Without `async with`, call
    `aclose()` when you are done.

    Args:
        api_key: The client sends it as a bearer token. Unset: the client reads KAIZEN_API_KEY from the environment, and
            sends no key if that is missing too. For keys that change, pass a function or an `async def` function. The
            client calls it before the first request, and again after a 401; then it repeats the refused request once.
            The function may take up to `attempt_timeout`. If it raises, the attempt fails.
        base_url: URL of the API, with its path prefix if there is one. Unset: KAIZEN_BASE_URL, else the public API.
        concurrency: The most HTTP requests in flight at the same time.
        attempt_timeout: Seconds for one HTTP request, from connecting to the last byte.
        deadline: Seconds for one lookup, from its start to its result. None: no limit, but a server that is down or
            rejects everything for five minutes ends it.
        retry: When and how often the client repeats a failed attempt.
        poll: How often waits poll an execution.
        hedge: When the client sends a slow request a second time, on another connection. None: never.
        max_response_bytes: Size of a decompressed response in bytes. The client refuses a larger one.
        connection_max_age: Age of a connection in seconds. The client sends no further request on an older one, so a
            busy client follows changes of DNS.
        connections: How long the client keeps idle connections, and how large the headers of a response may be.
        ended_records: How many records of ended executions the client remembers, so that a wait needs no request for
            them; and how many of any execution, for `get(…, max_age=…)`. 0: none.
        keep_raw: Whether a record keeps the JSON that it was decoded from, for `raw`, `extra` and `to_dict()`. False
            saves that memory, about as much as the records themselves take.
        session: An aiohttp session of yours. The client uses it with its proxy, TLS, tracing and connector settings,
            but not with its timeouts and redirects, and does not close it. Excludes `ssl_context`, `proxy` and
            `trust_env`.
        ssl_context: Replaces the default TLS settings, for instance to trust a company's own certificate authority.
        proxy: URL of an HTTP proxy, `http://user:password@host:port` or `https://…`.
        trust_env: Whether the client takes the proxy from the environment: HTTPS_PROXY or HTTP_PROXY, else ALL_PROXY,
            unless NO_PROXY names the server. The client reads the environment once, when you create it. `proxy` wins.
        allow_insecure_http: Allow a plain http base_url to another machine, or to this one through a proxy or a
            connector of the session's own.
        headers: Further headers for every request, for a gateway or a tenant. They may be secrets: errors and logs do
            not show their values.
        request_id_headers: Response headers in which the server names the request, for `outcome.request_id` and
            `error.request_id`. The first one that the response has counts.
        limiter: An async function that the client awaits before every request, for a rate that you share with others:
            `AsyncLimiter(100, 1).acquire` of aiolimiter, or one over Redis for the workers of all machines. The lookup
            holds its slot while it waits, and its deadline includes that time. The client ignores what the function
            returns. If it raises, the client sends nothing, and the lookup fails with a TransportError that has this
            cause. If it has the methods `take_now() -> bool` and `put_back()`, the client asks the first one before it
            waits, and calls the second one if it could not send the request after all.
        on_event: A function that the client calls with every event, or several functions: see `kaizen_async.events`.
            Functions whose attribute `every_lookup` is False spare the client the events of lookups whose first
            request brings the record.
        clock: Replaces real time for deadlines, timeouts, waits and back-off: see `kaizen_async.testing.VirtualClock`.

    Raises:
        TypeError, ValueError: A setting cannot work. The message says which one and why.
    """

    @untraced
    def __init__(
        self,
        api_key: str | KeyFunction | None = None,
        *,
        base_url: str | None = None,
        concurrency: int = 50,
        attempt_timeout: float = 30.0,
        deadline: float | None = 60.0,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - frozen
        poll: PollPolicy = PollPolicy(),  # noqa: B008 - frozen
        hedge: HedgePolicy | None = None,
        max_response_bytes: int = 512 * 1024,
        connection_max_age: float = 300.0,
        connections: ConnectionPolicy = ConnectionPolicy(),  # noqa: B008 - frozen
        ended_records: int = 1000,
        keep_raw: bool = True,
        session: aiohttp.ClientSession | None = None,
        ssl_context: SSLContext | None = None,
        proxy: str | None = None,
        trust_env: bool = False,
        allow_insecure_http: bool = False,
        headers: Mapping[str, str] | None = None,
        request_id_headers: Iterable[str] = REQUEST_ID_HEADERS,
        limiter: Limiter | None = None,
        on_event: Hook | Iterable[Hook] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._engine: Engine | None = None
        self._key_function: KeyFunction | None = None
        key = None
        if api_key is None or isinstance(api_key, str) or not callable(api_key):
            key = resolve_api_key(api_key)
        else:
            self._key_function = api_key
        has_key = key is not None or self._key_function is not None
        self._headers = request_headers(key, own_headers(headers, has_key=has_key))
        has_auth = has_key or any(name.lower() == "authorization" for name in self._headers)
        require_session(
            session,
            has_auth=has_auth,
            ssl_context=ssl_context,
            trust_env=trust_env,
            proxy=proxy,
        )
        self._settings = Settings(
            base_url=resolve_base_url(
                base_url,
                allow_insecure_http=allow_insecure_http,
                may_leave_machine=trust_env or proxy is not None or may_leave_machine(session),
            ),
            concurrency=concurrency,
            attempt_timeout=attempt_timeout,
            deadline=deadline,
            retry=retry,
            poll=poll,
            max_response_bytes=max_response_bytes,
            ended_records=ended_records,
            keep_raw=keep_raw,
            connections=connections,
            connection_max_age=connection_max_age,
            hedge=hedge,
        )
        self._session = session
        self._ssl_context = ssl_context
        self._proxy = None
        if proxy is not None:
            self._proxy = parse_proxy(proxy, "proxy")
        elif trust_env:
            self._proxy = environment_proxy(self._settings.base_url)
        self._request_ids = RequestIds(request_id_headers)
        require_limiter(limiter)
        self._limiter = limiter
        hooks = hooks_of(on_event)
        self._on_event = shielded(hooks)
        self._observe = observer_of(hooks)
        self._every_lookup = any(getattr(hook, "every_lookup", True) for hook in hooks)
        self._closed = False
        self._clock = clock or SystemClock()
        self._random = self._clock.random
        self._counters = Counters()
        self._counters_by_path: dict[str, Counters] = {}
        self._healths: dict[str, Health] = {}
        self._hedgings: dict[str, Hedging] = {}
        self._ended = EndedRecords(ended_records)
        self._received = Received(ended_records)
        self._cadences: dict[tuple[object, PollPolicy], Cadence] = {}
        self._endpoints: dict[tuple[str, type, str | None], Endpoint[Any]] = {}
        # Weak, because they refer to the client: in a reference cycle it would be freed too late to warn that it is
        # open.
        self._kinds: WeakValueDictionary[tuple[str, type, str | None], Executions[Any]] = WeakValueDictionary()
        self._set_on_kinds: dict[tuple[str, type, str | None], dict[str, Any]] = {}
        self._lookups: dict[tuple[object, RetryPolicy, bool], Lookups[Any]] = {}
        self._scheduler: Scheduler | None = None
        for hook in hooks:
            # An exporter reads metrics of states, such as the number of waiting executions, whenever it collects them.
            watch_client = getattr(hook, "watch_client", None)
            if watch_client is not None:
                watch_client(self)
        frame = sys._getframe(2)  # noqa: SLF001 - the cheap way to say in a warning where a client was made
        self._created_at = f"{frame.f_code.co_filename}:{frame.f_lineno}"

    @property
    def instructor_executions(self) -> Executions[InstructorExecution]:
        """Instructor executions: `POST /instructor/executions/get`."""
        return self._of(INSTRUCTOR_EXECUTIONS)

    @property
    def executions(self) -> Executions[WorkflowExecution]:
        """Workflow executions: `POST /executions/get`. Provisional: see `WorkflowExecution`."""
        return self._of(EXECUTIONS)

    def _of(self, kind: Kind[T]) -> Executions[T]:
        return self.lookups(kind.path, kind.record, unwrap=kind.unwrap)

    def lookups(self, path: str, record: type[T], *, unwrap: str | None = None) -> Executions[T]:
        """Return the methods for another path of the API, or for a record type of your own.

        Equal arguments return the same object. Use it only for paths that read and change nothing, because the client
        repeats lookups and lets equal ones share a request.

        Args:
            path: Path below the base URL. The client sends `{"id": …}` there by POST.
            record: A msgspec Struct with a field `id`. One with few fields decodes faster. A field
                `raw: msgspec.Raw = msgspec.Raw()` gets the record's whole JSON. To wait, it takes a field `end_time`
                that is None until the execution has ended, or a property `is_finished`.
            unwrap: The field of the response that holds the record. None: the response is the record.

        Raises:
            TypeError, ValueError: The path leads away from `base_url`, or the record has no field `id`.
        """
        key = (path, record, unwrap)
        known: Executions[T] | None = self._kinds.get(key)
        if known is None:
            endpoint: Endpoint[T] | None = self._endpoints.get(key)
            if endpoint is None:
                endpoint = Endpoint(path, record, unwrap, keep_raw=self._settings.keep_raw)
                endpoint.url_below(self._settings.base_url)
                self._endpoints[key] = endpoint
            known = self._kinds[key] = self._methods_of(endpoint, record)
            # What a test sets on it, such as a mock in the place of a method, lasts as long as the client.
            known.__dict__ = self._set_on_kinds.setdefault(key, known.__dict__)
        return known

    def _methods_of(self, endpoint: Endpoint[T], record: type[T]) -> Executions[T]:
        return Executions(
            partial(self._lookups_of, endpoint), partial(self._polls_of, endpoint, record), self._settings.deadline
        )

    def _lookups_of(self, endpoint: Endpoint[T], retry: RetryPolicy | None, *, may_hedge: bool = True) -> Lookups[T]:
        """Return the object that does the lookups of a kind under a policy in this loop. Equal lookups in it share."""
        engine = self._engine_here()
        policy = self._settings.retry if retry is None else retry
        lookups: Lookups[T] | None = self._lookups.get((endpoint, policy, may_hedge))
        if lookups is None:
            lookups = self._lookups[endpoint, policy, may_hedge] = Lookups(
                engine,
                endpoint,
                endpoint.url_below(self._settings.base_url),
                policy,
                health=self._health_of(endpoint),
                hedging=self._hedging_of(endpoint) if may_hedge else None,
                received=self._received,
                deadline=self._longest_lookup,
                counters=self._counters_of(endpoint),
                random=self._random,
            )
            forget_oldest(self._lookups)
        return lookups

    def _health_of(self, endpoint: Endpoint[Any]) -> Health:
        """Return the health of the server for the lookups of a path, whatever their policy or record."""
        url = str(endpoint.url_below(self._settings.base_url))
        health = self._healths.get(url)
        if health is None:
            health = self._healths[url] = Health(
                self._clock.time,
                self._random,
                url=url,
                concurrency=self._settings.concurrency,
                deadline=self._longest_lookup,
                report=partial(note_change, self._counters_of(endpoint), self._on_event),
            )
        return health

    def _hedging_of(self, endpoint: Endpoint[Any]) -> Hedging | None:
        """Return what decides about second requests for a path, if the client sends any."""
        policy = self._settings.hedge
        if policy is None:
            return None
        health = self._health_of(endpoint)
        return self._hedgings.setdefault(health.url, Hedging(policy, health))

    def _counters_of(self, endpoint: Endpoint[Any]) -> Counters:
        return self._counters_by_path.setdefault(f"/{endpoint.url.path}", Counters())

    @property
    def _longest_lookup(self) -> float:
        return math.inf if self._settings.deadline is None else self._settings.deadline

    def _polls_of(
        self, endpoint: Endpoint[T], record: type[T], lookups: Lookups[T], poll: PollPolicy | None
    ) -> tuple[Scheduler, Group]:
        require_end(record)
        policy = self._settings.poll if poll is None else poll
        if policy.max_rate is not None:
            # The rate would count neither retries nor second requests. The next poll takes the place of a retry.
            once = msgspec.structs.replace(lookups.policy, max_attempts=1)
            lookups = self._lookups_of(endpoint, once, may_hedge=False)
        cadence = self._cadences.get((endpoint, policy))
        if cadence is None:
            cadence = self._cadences[endpoint, policy] = Cadence(policy, self._random)
            forget_oldest(self._cadences)
        scheduler = self._scheduler_of(lookups.engine)
        return scheduler, scheduler.group(lookups, policy, cadence)

    def stats(self) -> ClientStats:
        """Return a snapshot of what the client has done and is doing. It is cheap, and no history is kept."""
        silent_since = None if self._scheduler is None else self._scheduler.silence.since
        by_path = {path: msgspec.structs.replace(counters) for path, counters in self._counters_by_path.items()}
        in_flight = 0 if self._engine is None else self._engine.in_flight
        hedges_in_flight = 0 if self._engine is None else self._engine.hedges_in_flight
        totals = total([self._counters, *by_path.values()])
        return ClientStats(
            **totals,
            queued=max(0, totals["in_progress"] - in_flight + hedges_in_flight),
            by_path=by_path,
            waiting=0 if self._scheduler is None else self._scheduler.waiting,
            poll_delay=0.0 if self._scheduler is None else self._scheduler.delay,
            polls_failing_for=0.0 if silent_since is None else max(0.0, self._clock.time() - silent_since),
            polls_failing_because=None if self._scheduler is None else self._scheduler.silence.reason,
            in_flight=in_flight,
            **self._state_of_health(),
        )

    def _state_of_health(self) -> dict[str, Any]:
        """Return the health for `stats()`: of each figure, the worst among all kinds of lookups."""
        states = [health.state() for health in self._healths.values()]
        return {
            "health": max((state.condition for state in states), key=SEVERITY.index, default="healthy"),
            "gate_pace": min((state.pace for state in states if state.pace is not None), default=None),
            "gate_seconds_left": max((state.seconds_left for state in states), default=0.0),
        }

    async def warm_up(self, connections: int) -> None:
        """Open connections to the server before they are needed, so that a burst of lookups does not wait for them.

        The client closes idle connections after `ConnectionPolicy.idle_seconds`. With a session of yours that does
        more than send, for instance tracing, this method does nothing: such a session opens connections on demand.

        Args:
            connections: How many connections to open. The client opens no more than `concurrency`.

        Raises:
            TypeError, ValueError: `connections` is not a positive whole number.
            TransportError: No connection could be opened. Not retried.
            DeadlineExceededError: The connections were not open within the client's `deadline`.
            ClientClosedError: The client is closed.
        """
        require_count("connections", connections)
        await self._engine_here().warm_up(
            self._settings.base_url, min(connections, self._settings.concurrency), self._settings.deadline
        )

    async def aclose(self, *, drain: float = 0.0) -> None:
        """Close the client: refuse new calls, end all waits, and end requests in flight after `drain` seconds.

        Every caller that waits for a result gets the result or a ClientClosedError. No task is cancelled. A second
        call is safe.

        Args:
            drain: Seconds that requests in flight have to finish. math.inf: as long as they take.

        Raises:
            TypeError, ValueError: `drain` is not a number of seconds. The client stays open.
            RuntimeError: The client is in use in another event loop.
        """
        if drain != math.inf:
            require_duration("drain", drain, zero_allowed=True)
        self._closed = True
        engine = self._engine
        if engine is None or engine.loop.is_closed() or engine.process_id != os.getpid():
            return
        if engine.loop is not asyncio.get_running_loop():
            raise RuntimeError("this KaizenClient is in use by another event loop; close it there")
        engine.closed = True
        if self._scheduler is not None and self._scheduler.engine is engine:
            self._scheduler.close()
        await engine.close(drain)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        if not hasattr(self, "_created_at"):
            return "<KaizenClient not constructed: an argument was refused>"
        return f"<KaizenClient {self._settings.base_url} {'closed' if self._closed else 'open'}>"

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled: a copy would share connections, and close them when it is dropped."""
        raise TypeError(
            "a KaizenClient cannot be copied or pickled, because it owns connections and holds the API key; "
            "create one client in each process"
        )

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None and engine.transport.is_open and engine.process_id == os.getpid():
            engine.transport.abandon(engine.loop)
            warnings.warn(
                f"KaizenClient created at {self._created_at} was never closed; "
                "use it as `async with KaizenClient() as kaizen:` or call `await kaizen.aclose()`",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )

    def _engine_here(self) -> Engine:
        """Return the engine of the running event loop.

        Raises:
            RuntimeError: No event loop is running, or the client belongs to another one.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            raise RuntimeError(
                "no running event loop: call this in an `async def` function, run by asyncio.run(main())"
            ) from None
        engine = self._engine
        if engine is None or engine.loop is not asyncio.get_running_loop() or engine.process_id != os.getpid():
            engine = self._engine = self._bind()
        return engine

    def _scheduler_of(self, engine: Engine) -> Scheduler:
        if self._scheduler is None or self._scheduler.engine is not engine:
            self._scheduler = Scheduler(engine, self._ended, self._counters, deadline=self._settings.deadline)
        return self._scheduler

    def _bind(self) -> Engine:
        """Return an engine for this event loop. The engine of an earlier loop must be out of use."""
        before = self._engine
        if before is not None:
            if before.process_id != os.getpid():
                if before.loop is asyncio.get_running_loop():
                    raise RuntimeError(
                        "this event loop was made before the process forked and shares its sockets with the parent; "
                        "run a new one, as asyncio.run does"
                    )
                _inherited.append(before)
            elif not before.loop.is_closed():
                raise RuntimeError(
                    "this KaizenClient is in use by another event loop that is still open; "
                    "create one client for each event loop, or close the other loop first"
                )
            if self._session is not None:
                raise RuntimeError(
                    "the aiohttp session passed to this KaizenClient belongs to another event loop or process; "
                    "leave session out, and the client opens one for each"
                )
        settings = self._settings
        self._lookups.clear()
        for health in self._healths.values():
            health.forget_in_flight()
        transport = Transport(
            headers=self._headers,
            max_response_bytes=settings.max_response_bytes,
            session=self._session,
            ssl_context=self._ssl_context,
            proxy=self._proxy,
            attempt_timeout=settings.attempt_timeout,
            connection_max_age=settings.connection_max_age,
            connections=settings.connections,
            random=self._random,
            request_ids=self._request_ids,
            deliver=getattr(self._clock, "deliver", None),  # a virtual clock knows the emulators of this process
            offer=getattr(self._clock, "offer", None),
        )
        key = None
        if self._key_function is not None:
            key = RotatingKey(self._key_function, transport.use_key, transport.failed)
        engine = Engine(
            transport,
            self._clock,
            concurrency=settings.concurrency,
            attempt_timeout=settings.attempt_timeout,
            limiter=self._limiter,
            key=key,
            on_event=self._on_event,
            every_lookup=self._every_lookup,
            observe=self._observe,
        )
        engine.closed = self._closed
        return engine
