"""The parts behind a client: its engine in the running event loop, and the state that outlives a loop."""

import asyncio
import logging
import math
import os
import warnings
from functools import partial
from ssl import SSLContext
from typing import Any, Final, NoReturn, TypeVar

import aiohttp
import msgspec

from kaizen_async._lookup.engine import Engine, Limiter
from kaizen_async._lookup.health import SEVERITY, Health
from kaizen_async._lookup.hedge import Hedging
from kaizen_async._lookup.lookup import Lookups
from kaizen_async._lookup.received import Received
from kaizen_async._records.facts import require_end
from kaizen_async._transport.key import KeyFunction, RotatingKey
from kaizen_async._transport.proxies import Proxy
from kaizen_async._transport.request_id import RequestIds
from kaizen_async._transport.transport import Transport
from kaizen_async._transport.wire import Endpoint
from kaizen_async._waiting.cadence import Cadence
from kaizen_async._waiting.calls import Group
from kaizen_async._waiting.memory import EndedRecords
from kaizen_async._waiting.scheduler import Scheduler
from kaizen_async.clock import Clock
from kaizen_async.config import PollPolicy, RetryPolicy, Settings
from kaizen_async.errors import StatusError, seconds
from kaizen_async.events import Event, Gated, Hook, OutageBegan, OutageEnded, Ungated, observer_of, shielded
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


class Binding:
    """The state behind a client and its `Executions`, which refer to it and not to each other.

    A client may be used in one event loop after another. Engine and scheduler belong to one loop, and follow the client
    into the next. Counters, the health of the server, and what waits have learned stay.

    Args:
        settings: The client's settings, checked.
        headers: Headers of every request.
        key_function: Returns the API key. None: the headers have it, or there is none.
        session: An aiohttp session of the caller's.
        ssl_context: TLS settings. None: the default ones.
        proxy: The proxy of every request.
        request_ids: Reads from responses how the server names the request.
        limiter: The client awaits it before every request.
        hooks: The functions that get the client's events.
        clock: The time of deadlines, waits and back-off.
        created_at: File and line of the client's construction, for the warning that it was not closed.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        headers: dict[str, str],
        key_function: KeyFunction | None,
        session: aiohttp.ClientSession | None,
        ssl_context: SSLContext | None,
        proxy: Proxy | None,
        request_ids: RequestIds,
        limiter: Limiter | None,
        hooks: tuple[Hook, ...],
        clock: Clock,
        created_at: str,
    ) -> None:
        self.engine: Engine | None = None
        self.scheduler: Scheduler | None = None
        self.closed = False
        self.settings = settings
        self.clock = clock
        self.random = clock.random
        self.healths: dict[str, Health] = {}
        self.hedgings: dict[str, Hedging] = {}
        self.known_lookups: dict[tuple[object, RetryPolicy, bool], Lookups[Any]] = {}
        self.cadences: dict[tuple[object, PollPolicy], Cadence] = {}
        self._headers = headers
        self._key_function = key_function
        self._session = session
        self._ssl_context = ssl_context
        self._proxy = proxy
        self._request_ids = request_ids
        self._limiter = limiter
        self._on_event = shielded(hooks)
        self._observe = observer_of(hooks)
        self._every_lookup = any(getattr(hook, "every_lookup", True) for hook in hooks)
        self._longest_lookup = math.inf if settings.deadline is None else settings.deadline
        self._counters = Counters()
        self._counters_by_path: dict[str, Counters] = {}
        self._ended = EndedRecords(settings.ended_records)
        self._received = Received(settings.ended_records)
        self._created_at = created_at

    def lookups(self, endpoint: Endpoint[T], retry: RetryPolicy | None, *, may_hedge: bool = True) -> Lookups[T]:
        """Return the object that does the lookups of a kind under a policy in this loop. Equal lookups in it share.

        Raises:
            TypeError: `retry` is not a RetryPolicy.
            RuntimeError: See `engine_here`.
        """
        if retry is not None and not isinstance(retry, RetryPolicy):
            raise TypeError(f"retry must be a RetryPolicy, not {type(retry).__name__}")
        engine = self.engine_here()
        policy = self.settings.retry if retry is None else retry
        lookups: Lookups[T] | None = self.known_lookups.get((endpoint, policy, may_hedge))
        if lookups is None:
            lookups = self.known_lookups[endpoint, policy, may_hedge] = Lookups(
                engine,
                endpoint,
                endpoint.url_below(self.settings.base_url),
                policy,
                health=self.health_of(endpoint),
                hedging=self._hedging_of(endpoint) if may_hedge else None,
                received=self._received,
                deadline=self._longest_lookup,
                counters=self._counters_of(endpoint),
                random=self.random,
            )
            forget_oldest(self.known_lookups)
        return lookups

    def health_of(self, endpoint: Endpoint[Any]) -> Health:
        """Return the health of the server for the lookups of a path, whatever their policy or record."""
        url = str(endpoint.url_below(self.settings.base_url))
        health = self.healths.get(url)
        if health is None:
            health = self.healths[url] = Health(
                self.clock.time,
                self.random,
                url=url,
                concurrency=self.settings.concurrency,
                deadline=self._longest_lookup,
                report=partial(note_change, self._counters_of(endpoint), self._on_event),
            )
        return health

    def _hedging_of(self, endpoint: Endpoint[Any]) -> Hedging | None:
        """Return what decides about second requests for a path, if the client sends any."""
        policy = self.settings.hedge
        if policy is None:
            return None
        health = self.health_of(endpoint)
        return self.hedgings.setdefault(health.url, Hedging(policy, health))

    def _counters_of(self, endpoint: Endpoint[Any]) -> Counters:
        return self._counters_by_path.setdefault(f"/{endpoint.url.path}", Counters())

    def polls(self, endpoint: Endpoint[T], poll: PollPolicy | None) -> tuple[Scheduler, Group]:
        """Return the scheduler of this loop, and what the waits of a kind under a policy have in common.

        Raises:
            TypeError: `poll` is not a PollPolicy, or a record does not say whether its execution has ended.
        """
        if poll is not None and not isinstance(poll, PollPolicy):
            raise TypeError(f"poll must be a PollPolicy, not {type(poll).__name__}")
        require_end(endpoint.record)
        policy = self.settings.poll if poll is None else poll
        if policy.max_rate is None:
            lookups = self.lookups(endpoint, None)
        else:
            # The rate would count neither retries nor second requests. The next poll takes the place of a retry.
            once = msgspec.structs.replace(self.settings.retry, max_attempts=1)
            lookups = self.lookups(endpoint, once, may_hedge=False)
        cadence = self.cadences.get((endpoint, policy))
        if cadence is None:
            cadence = self.cadences[endpoint, policy] = Cadence(policy, self.random)
            forget_oldest(self.cadences)
        engine = lookups.engine
        if self.scheduler is None or self.scheduler.engine is not engine:
            self.scheduler = Scheduler(engine, self._ended, self._counters, deadline=self.settings.deadline)
        return self.scheduler, self.scheduler.group(lookups, policy, cadence)

    def stats(self) -> ClientStats:
        """Return a snapshot of what the client has done and is doing."""
        silent_since = None if self.scheduler is None else self.scheduler.silence.since
        by_path = {path: msgspec.structs.replace(counters) for path, counters in self._counters_by_path.items()}
        in_flight = 0 if self.engine is None else self.engine.in_flight
        hedges_in_flight = 0 if self.engine is None else self.engine.hedges_in_flight
        totals = total([self._counters, *by_path.values()])
        return ClientStats(
            **totals,
            queued=max(0, totals["in_progress"] - in_flight + hedges_in_flight),
            by_path=by_path,
            waiting=0 if self.scheduler is None else self.scheduler.waiting,
            poll_delay=0.0 if self.scheduler is None else self.scheduler.delay,
            polls_failing_for=0.0 if silent_since is None else max(0.0, self.clock.time() - silent_since),
            polls_failing_because=None if self.scheduler is None else self.scheduler.silence.reason,
            in_flight=in_flight,
            **self._state_of_health(),
        )

    def _state_of_health(self) -> dict[str, Any]:
        """Return the health for `stats()`: of each figure, the worst among all kinds of lookups."""
        states = [health.state() for health in self.healths.values()]
        return {
            "health": max((state.condition for state in states), key=SEVERITY.index, default="healthy"),
            "gate_pace": min((state.pace for state in states if state.pace is not None), default=None),
            "gate_seconds_left": max((state.seconds_left for state in states), default=0.0),
        }

    def engine_here(self) -> Engine:
        """Return the engine of the running event loop.

        Raises:
            RuntimeError: No event loop is running, or the client belongs to another one.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise RuntimeError(
                "no running event loop: call this in an `async def` function, run by asyncio.run(main())"
            ) from None
        engine = self.engine
        if engine is None or engine.loop is not loop or engine.process_id != os.getpid():
            engine = self.engine = self._bind()
        return engine

    def _bind(self) -> Engine:
        """Return an engine for this event loop. The engine of an earlier loop must be out of use."""
        before = self.engine
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
        settings = self.settings
        self.known_lookups.clear()
        for health in self.healths.values():
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
            random=self.random,
            request_ids=self._request_ids,
            deliver=getattr(self.clock, "deliver", None),  # a virtual clock knows the emulators of this process
            offer=getattr(self.clock, "offer", None),
        )
        key = None
        if self._key_function is not None:
            key = RotatingKey(self._key_function, transport.use_key, transport.failed)
        engine = Engine(
            transport,
            self.clock,
            concurrency=settings.concurrency,
            attempt_timeout=settings.attempt_timeout,
            limiter=self._limiter,
            key=key,
            on_event=self._on_event,
            every_lookup=self._every_lookup,
            observe=self._observe,
        )
        engine.closed = self.closed
        return engine

    async def close(self, drain: float) -> None:
        """Close the scheduler, then the engine: see `KaizenClient.aclose`."""
        self.closed = True
        engine = self.engine
        if engine is None or engine.loop.is_closed() or engine.process_id != os.getpid():
            return
        if engine.loop is not asyncio.get_running_loop():
            raise RuntimeError("this KaizenClient is in use by another event loop; close it there")
        engine.closed = True
        if self.scheduler is not None and self.scheduler.engine is engine:
            self.scheduler.close()
        await engine.close(drain)

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled: a copy would share connections, and close them when it is dropped."""
        raise TypeError(
            "a KaizenClient cannot be copied or pickled, because it owns connections and holds the API key; "
            "create one client in each process"
        )

    def __del__(self) -> None:
        engine = self.engine
        if engine is not None and engine.transport.is_open and engine.process_id == os.getpid():
            engine.transport.abandon(engine.loop)
            warnings.warn(
                f"KaizenClient created at {self._created_at} was never closed; "
                "use it as `async with KaizenClient() as kaizen:` or call `await kaizen.aclose()`",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )
