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
    PollPolicy,
    RetryPolicy,
    Settings,
    require_count,
    require_duration,
    resolve_api_key,
    resolve_base_url,
    untraced,
)
from kaizen_async.errors import seconds
from kaizen_async.events import Event, Gated, Hook, OutageBegan, OutageEnded, Ungated, hooks_of, shielded
from kaizen_async.executions import Executions
from kaizen_async.models import InstructorExecution, WorkflowExecution
from kaizen_async.stats import ClientStats, Counters, total

T = TypeVar("T")

log = logging.getLogger("kaizen_async")

_inherited: Final[list[Engine]] = []
"""Engines of a parent process. Touching them, even to free them, could disturb the parent's sockets."""

MOST_POLICIES: Final = 100
"""Policies whose look-ups share requests, or whose waits have learned. Beyond that, the oldest begin anew."""


def forget_oldest(kept: dict[Any, Any]) -> None:
    """Keep no more than what belongs to `MOST_POLICIES`; what is under way goes on."""
    if len(kept) > MOST_POLICIES:
        del kept[next(iter(kept))]


def note_change(counters: Counters, on_event: Hook | None, event: Event) -> None:
    """Count, log and tell a change of the server's health. No method: a client in a cycle would be freed too late."""
    match event:
        case Gated():
            counters.pauses += 1
            log.warning(
                "the server answered %d: lookups pause for %s",
                event.status,
                seconds(event.pause),
                extra={"status": event.status, "pause": event.pause},
            )
        case OutageBegan():
            counters.outages += 1
            log.warning(
                "the server is %s (%s): lookups pause, and probes find out when it is back; the first is sent in %s",
                "refusing everything" if event.refused else "failing",
                event.error.reason,
                seconds(event.next_probe),
                extra={"error_type": type(event.error).__name__, "elapsed": event.age},
            )
        case Ungated():
            counters.pause_seconds += event.pause
        case OutageEnded():
            counters.outage_seconds += event.lasted
            log.warning(
                "the server works again after %s, in which %d requests failed",
                seconds(event.lasted),
                event.failed,
                extra={"elapsed": event.lasted, "failed_requests": event.failed},
            )
        case _:
            pass
    if on_event is not None:
        on_event(event)


class KaizenClient:
    """An asynchronous client for Kaizen executions.

        async with KaizenClient() as kaizen:
            execution = await kaizen.instructor_executions.get("exec_1")

    It may be created before any event loop runs, and be used from one loop after another. Without `async with`, call
    `aclose()` when done.

    Args:
        api_key: Sent as a bearer token. Unset: the environment's KAIZEN_API_KEY; without either no key is sent. It may
            be a function, also an `async def`, for keys that change: it is asked before the first request, and again
            after a 401, whose request is then repeated once. It may take `attempt_timeout`; if it fails, so does the
            attempt.
        base_url: Where the API is, a path prefix included. Unset: KAIZEN_BASE_URL, else the public API.
        concurrency: HTTP requests under way at the same time, at most.
        attempt_timeout: Seconds for one HTTP request, from connecting to the last byte.
        deadline: Seconds for one look-up from its start to its result; None for no limit.
        retry: When and how often failed attempts are repeated.
        poll: How waits look for the end of an execution.
        max_response_bytes: Size of an unpacked answer above which it is refused.
        connection_max_age: Seconds after which a connection is not used for another request, so that a client that is
            always busy follows changes of DNS.
        connections: How long idle connections are kept, and what a response's headers may take.
        ended_records: Records of ended executions that waits keep to answer from, and records of any that are kept
            for `get(…, max_age=…)`; 0 for none.
        keep_raw: Whether records refer to the JSON that they came from, for `raw`, `extra` and `to_dict()`. False
            saves that memory, about as much as the records themselves take.
        session: An aiohttp session to use. It stays yours: it is not closed, and its proxy, TLS, tracing and
            connector settings apply. Its timeouts and redirects do not. Excludes `ssl_context` and `trust_env`.
        ssl_context: Replaces the default TLS verification, for instance to trust a company's own authority.
        proxy: URL of an HTTP proxy, `http://user:password@host:port` or `https://…`.
        trust_env: Take the proxy from the environment, as it is when the client is created: HTTPS_PROXY or HTTP_PROXY,
            else ALL_PROXY, unless NO_PROXY names the server. Without effect if `proxy` is given.
        allow_insecure_http: Allow a plain http base_url to another machine, or to this one through a proxy or a
            connector of the session's own.
        headers: Sent with every request beside the client's own, for a gateway or a tenant. They may be secrets: errors
            and logs do not show their values.
        request_id_headers: Header fields of a response in which the server names its request, for
            `outcome.request_id` and `error.request_id`. The first that is there counts.
        limiter: A function that every request awaits before it is sent, for a rate that is shared with others:
            `AsyncLimiter(100, 1).acquire` of aiolimiter, or one over Redis that the workers of all machines use. It is
            awaited with a slot held and within the deadline of the look-up, and cancelled with it. What it returns is
            ignored; if it raises, nothing is sent, and the look-up fails with a TransportError from that.
        on_event: A function that is told what happens, or several of them: see `kaizen_async.events`.
        clock: Replaces the time that deadlines, timeouts, waits and back-off count in:
            `kaizen_async.testing.VirtualClock`.

    Raises:
        TypeError, ValueError: A setting cannot work; the message says which and why.
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
        self._closed = False
        self._clock = clock or SystemClock()
        self._random = self._clock.random
        self._counters = Counters()
        self._counters_by_path: dict[str, Counters] = {}
        self._healths: dict[str, Health] = {}
        self._ended = EndedRecords(ended_records)
        self._received = Received(ended_records)
        self._cadences: dict[tuple[object, PollPolicy], Cadence] = {}
        self._endpoints: dict[tuple[str, type, str | None], Endpoint[Any]] = {}
        # Weak, since they refer to the client: in a cycle it would be freed too late to warn that it was not closed.
        self._kinds: WeakValueDictionary[tuple[str, type, str | None], Executions[Any]] = WeakValueDictionary()
        self._set_on_kinds: dict[tuple[str, type, str | None], dict[str, Any]] = {}
        self._lookups: dict[tuple[object, RetryPolicy], Lookups[Any]] = {}
        self._scheduler: Scheduler | None = None
        for hook in hooks:
            # Metrics of states, such as the executions that are waited for, are read when they are collected.
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
        """Return the verbs for another kind of look-up, or for a record type of your own: the same for the same.

        Only for a path that reads and changes nothing: look-ups are repeated and shared.

        Args:
            path: Path below the base URL; it is sent `{"id": …}` by POST.
            record: A msgspec Struct with a field `id`. One with few fields decodes faster. A field
                `raw: msgspec.Raw = msgspec.Raw()` gets the record's whole JSON. To wait, it takes a field `end_time`
                that is None until the execution has ended, or a property `is_finished`.
            unwrap: The field of the answer that holds the record, if the answer is not the record itself.
        """
        key = (path, record, unwrap)
        known: Executions[T] | None = self._kinds.get(key)
        if known is None:
            endpoint: Endpoint[T] | None = self._endpoints.get(key)
            if endpoint is None:
                endpoint = Endpoint(path, record, unwrap, keep_raw=self._settings.keep_raw)
                endpoint.url_below(self._settings.base_url)
                self._endpoints[key] = endpoint
            known = self._kinds[key] = self._verbs(endpoint, record)
            # What a test sets on it, such as a mock in the place of a method, lasts as long as the client.
            known.__dict__ = self._set_on_kinds.setdefault(key, known.__dict__)
        return known

    def _verbs(self, endpoint: Endpoint[T], record: type[T]) -> Executions[T]:
        return Executions(
            partial(self._lookups_of, endpoint), partial(self._polls_of, endpoint, record), self._settings.deadline
        )

    def _lookups_of(self, endpoint: Endpoint[T], retry: RetryPolicy | None) -> Lookups[T]:
        """Return the look-ups of a kind under a policy in the running loop: equal ones are one, so that they share."""
        engine = self._engine_here()
        policy = self._settings.retry if retry is None else retry
        lookups: Lookups[T] | None = self._lookups.get((endpoint, policy))
        if lookups is None:
            lookups = self._lookups[endpoint, policy] = Lookups(
                engine,
                endpoint,
                endpoint.url_below(self._settings.base_url),
                policy,
                health=self._health_of(endpoint),
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
            # The rate would not count retries. The next poll takes their place.
            lookups = self._lookups_of(endpoint, msgspec.structs.replace(lookups.policy, max_attempts=1))
        cadence = self._cadences.get((endpoint, policy))
        if cadence is None:
            cadence = self._cadences[endpoint, policy] = Cadence(policy, self._random)
            forget_oldest(self._cadences)
        scheduler = self._scheduler_of(lookups.engine)
        return scheduler, scheduler.group(lookups, policy, cadence)

    def stats(self) -> ClientStats:
        """Return a snapshot of what the client has done and is doing. Cheap; no history is kept."""
        silent_since = None if self._scheduler is None else self._scheduler.silence.since
        by_path = {path: msgspec.structs.replace(counters) for path, counters in self._counters_by_path.items()}
        in_flight = 0 if self._engine is None else self._engine.in_flight
        totals = total([self._counters, *by_path.values()])
        return ClientStats(
            **totals,
            queued=max(0, totals["in_progress"] - in_flight),
            by_path=by_path,
            waiting=0 if self._scheduler is None else self._scheduler.waiting,
            poll_delay=0.0 if self._scheduler is None else self._scheduler.delay,
            polls_failing_for=0.0 if silent_since is None else max(0.0, self._clock.time() - silent_since),
            polls_failing_because=None if self._scheduler is None else self._scheduler.silence.reason,
            in_flight=in_flight,
            **self._state_of_health(),
        )

    def _state_of_health(self) -> dict[str, Any]:
        """Return what stats tell of the kinds of lookups together: of each figure, the worst."""
        states = [health.state() for health in self._healths.values()]
        return {
            "health": max((state.condition for state in states), key=SEVERITY.index, default="healthy"),
            "gate_pace": min((state.pace for state in states if state.pace is not None), default=None),
            "gate_seconds_left": max((state.seconds_left for state in states), default=0.0),
        }

    async def warm_up(self, connections: int) -> None:
        """Open connections to the server before they are needed, so that a burst of lookups need not wait for them.

        Idle connections are closed after `ConnectionPolicy.idle_seconds`. A session that is passed in and does more
        than send, for instance tracing, opens its connections only when it needs them; then nothing happens here.

        Args:
            connections: How many are to be open. More than `concurrency` would never be used and are not opened.

        Raises:
            TypeError, ValueError: That is no number of connections.
            TransportError: No connection could be opened. Not retried.
            DeadlineExceededError: They were not open within the client's `deadline`.
            ClientClosedError: The client is closed.
        """
        require_count("connections", connections)
        await self._engine_here().warm_up(
            self._settings.base_url, min(connections, self._settings.concurrency), self._settings.deadline
        )

    async def aclose(self, *, drain: float = 0.0) -> None:
        """Close the client: refuse new calls, end waits at once, and requests under way after a while.

        Whoever is waiting for a result gets one or a ClientClosedError; nobody is cancelled. Safe to call again.

        Args:
            drain: Seconds that requests under way are given to finish; math.inf for as long as they take.

        Raises:
            TypeError, ValueError: `drain` is no number of seconds. Nothing was closed.
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
        """Return an engine for this event loop, once the one before it is out of use."""
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
        )
        engine.closed = self._closed
        return engine
