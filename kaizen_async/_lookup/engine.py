"""What a client has within one event loop: connections, slots, and every wait that closing it must end.

A wait of a lookup always happens inside a `Timeout` that the engine knows. So a deadline ends it,
cancellation passes through it, and closing the client ends it by moving the deadline to now: nobody is cancelled.
"""

import asyncio
import math
import os
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from typing import Final, Protocol, TypeAlias, TypeVar, cast

import msgspec
from yarl import URL

from kaizen_async._lookup.health import Health, Patience
from kaizen_async._transport.capacity import NoConnectionError
from kaizen_async._transport.connection import Connection, ExpiredError
from kaizen_async._transport.failures import text_of, without_frames
from kaizen_async._transport.key import RotatingKey
from kaizen_async._transport.pool import Pool
from kaizen_async._transport.response import Answer, Offer
from kaizen_async._transport.transport import Transport
from kaizen_async.clock import Clock, RunningTimeout, RunningTimer, Sweep, SystemClock, Timeout, Timer, sleep
from kaizen_async.errors import (
    AttemptTimeoutError,
    ClientClosedError,
    DeadlineExceededError,
    KaizenError,
    TransportError,
    quoted,
    seconds,
)
from kaizen_async.events import Hook, Observe

T = TypeVar("T")
Limiter: TypeAlias = Callable[[], Awaitable[object]]

OPEN_AT_FIRST: Final = 50
OPENING_STEP: Final = 0.25
"""Requests in flight until half as many have been accepted, and the seconds in which silence doubles them. From then on
each accepted request adds one. So a server that would reject most of a thousand requests gets few of them in vain."""


class ReadyLimiter(Protocol):
    """A limiter that knows without waiting whether a request may be sent."""

    def __call__(self) -> Awaitable[object]:
        """Wait until a request may be sent."""
        ...

    def take_now(self) -> bool:
        """Return whether a request may be sent now, and count it if so."""
        ...

    def put_back(self) -> None:
        """Count the last request no more: it was not sent."""
        ...


class FirstRequest(msgspec.Struct, eq=False):
    """The first request of a lookup, if it could be sent at once.

    Attributes:
        pool: Where its connection came from.
        connection: On which it was sent.
        response: Receives the response.
        number: Of the request.
        sent_at: The clock's time.
        deadline_at: The clock's time at which the lookup ends.
        timer: Ends the wait for the response, once it has taken long.
    """

    pool: Pool
    connection: Connection
    response: asyncio.Future[Answer | None]
    number: int
    sent_at: float
    deadline_at: float
    timer: RunningTimer | None = None

    def expire(self) -> None:
        """End the wait for the response."""
        if not self.response.done():
            self.connection.expire()


class Engine:
    """Sends requests for all lookups of a client that run in one event loop.

    Failures are returned, not raised, since most of them are not the end of a lookup.

    Args:
        transport: Sends one request; closed with the engine.
        clock: The time that deadlines, timeouts and waits count in.
        concurrency: The most requests in flight at the same time.
        attempt_timeout: Seconds for one request.
        limiter: Awaited before each request, as the last thing of its turn. If it has the methods of `ReadyLimiter`,
            requests that may be sent at once need not wait for it.
        key: Gives the API key, if a function of the user's does.
        on_event: Called with every event.
        every_lookup: Whether it is called for lookups whose first request brings the record, too.
        observe: Observes lookups without events as long as nothing but that happens.
    """

    def __init__(
        self,
        transport: Transport,
        clock: Clock,
        *,
        concurrency: int,
        attempt_timeout: float,
        limiter: Limiter | None = None,
        key: RotatingKey | None = None,
        on_event: Hook | None = None,
        every_lookup: bool = True,
        observe: Observe | None = None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.process_id = os.getpid()
        self.transport = transport
        self.clock = clock
        self.concurrency = concurrency
        self.closed = False
        self.key = key
        self.on_event = on_event
        self.on_lookup = on_event if every_lookup else None
        self.observe = observe
        self._attempt_timeout = attempt_timeout
        self._limiter = limiter
        self.hedges_in_flight = 0
        self._free_slots = min(concurrency, OPEN_AT_FIRST)
        self._unopened_slots = concurrency - self._free_slots
        self._accepted_at_opening = 0
        self._opens_at: float | None = None
        self._queues: dict[Health, OrderedDict[asyncio.Future[int | KaizenError], Patience]] = {}
        self._timer: Timer | None = None
        self._sending: set[RunningTimeout] = set()
        self._begun: set[FirstRequest] = set()
        # A timer that comes in vain is cheap in real time. In a virtual one it would be a moment to stop at.
        is_real = isinstance(clock, SystemClock)
        self.now = self.loop.time if is_real else clock.time
        self._sweep = Sweep(clock, self.now, attempt_timeout, self._take_long) if is_real else None
        # Asked of its class: a mock has every attribute.
        self._ready = cast("ReadyLimiter", limiter) if hasattr(type(limiter), "take_now") else None
        self._sweep_for_first = self._sweep if key is None and (limiter is None or self._ready is not None) else None
        self._waiting: set[Timeout] = set()
        self._cut_off = False
        self._all_sent = asyncio.Event()
        self._close_lock = asyncio.Lock()

    @property
    def in_flight(self) -> int:
        """Requests in flight."""
        return len(self._sending) + len(self._begun)

    async def take_turn(
        self,
        health: Health,
        deadline_at: float,
        *,
        patience: Patience = Patience.CLIENT,
        is_urgent: bool = False,
    ) -> int | KaizenError:
        """Wait until a request may be sent: for a slot, the health of the server, and the limiter.

        Args:
            health: Of the server, for this kind of lookup.
            deadline_at: The clock's time at which to give up.
            patience: What ends it in a pause.
            is_urgent: Whether it gets the next free slot, before all that wait.

        Returns:
            The number of the request, which `end_turn` and one method of `health` must be called with or after; or why
            nothing may be sent.
        """
        turn: int | KaizenError | None = None
        if self._free_slots and not self._queues and (not health.engaged or health.delay() == 0):
            self._free_slots -= 1
            turn = health.send()
        elif (refusal := health.too_long(deadline_at - self.clock.time())) is not None:
            return refusal
        else:
            turn = await self._queue(health, deadline_at, patience=patience, is_urgent=is_urgent)
        if self._limiter is None or isinstance(turn, KaizenError):
            return turn
        return await self._pass_limiter(
            self._limiter, health, turn, deadline_at, patience=patience, is_urgent=is_urgent
        )

    async def _queue(
        self, health: Health, deadline_at: float, *, patience: Patience, is_urgent: bool
    ) -> int | KaizenError:
        turn: asyncio.Future[int | KaizenError] = self.loop.create_future()
        queue = self._queues.setdefault(health, OrderedDict())
        queue[turn] = patience
        if is_urgent:
            queue.move_to_end(turn, last=False)
        self._serve()
        try:
            result = await self.wait(turn, deadline_at)
            if not self.closed:
                return result
            self._give_up(health, turn)
            return self.interruption("while it waited for its turn to send")
        except TimeoutError:
            self._give_up(health, turn)
            if self.closed or health.pause is None:
                return self.interruption("while it waited for its turn to send")
            refusal = health.refusal()
            refusal.next_attempt_in = health.delay()
            return refusal
        except BaseException:
            self._give_up(health, turn)
            raise

    def _give_up(self, health: Health, turn: asyncio.Future[int | KaizenError]) -> None:
        """Leave the queue; or return the turn, if it came in the same moment."""
        queue = self._queues.get(health)
        if queue is not None and queue.pop(turn, None) is not None:
            if not queue:
                del self._queues[health]
            return
        if turn.done() and not turn.cancelled() and isinstance(number := turn.result(), int):
            health.abandoned(number)
            self.end_turn()

    def end_turn(self) -> None:
        """Give the slot back."""
        self._free_slots += 1
        if self._queues:
            self._serve()

    def _serve(self) -> None:
        """Give turns to those who wait, one kind of lookup after the other, and set the timer for the next turn."""
        self._disarm()
        if self.closed:
            return
        wake_in = self._open_slots() if self._unopened_slots else math.inf
        kinds = deque(self._queues)
        while kinds:
            health = kinds.popleft()
            queue = self._queues[health]
            if not queue:
                del self._queues[health]
                continue
            delay = health.delay() if health.engaged else 0.0
            if self._free_slots and delay == 0:
                self._free_slots -= 1
                turn, _ = queue.popitem(last=False)
                if turn.cancelled():
                    self._free_slots += 1
                else:
                    turn.set_result(health.send())
                kinds.append(health)
                continue
            if health.pause is not None:
                wake_in = min(wake_in, self._end_unsent(health, queue))
                if not queue:
                    del self._queues[health]
                    continue
            wake_in = min(wake_in, delay or math.inf)
        if wake_in < math.inf:
            self._timer = self.clock.call_at(self.clock.time() + wake_in, self._serve)

    def _open_slots(self) -> float:
        """Open further slots, as the server accepts requests or stays silent; return the seconds until the next."""
        now = self.clock.time()
        accepted = sum(health.accepted_requests for health in self._queues)
        if self._opens_at is None:
            self._opens_at, self._accepted_at_opening = now + OPENING_STEP, accepted + OPEN_AT_FIRST // 2
        more = max(0, accepted - self._accepted_at_opening)
        self._accepted_at_opening += more
        if now >= self._opens_at:
            more += self.concurrency - self._unopened_slots
            self._opens_at = now + OPENING_STEP
        more = min(more, self._unopened_slots)
        self._unopened_slots -= more
        self._free_slots += more
        return self._opens_at - now if self._unopened_slots else math.inf

    @staticmethod
    def _end_unsent(health: Health, queue: OrderedDict[asyncio.Future[int | KaizenError], Patience]) -> float:
        """End lookups that have waited long enough for a pause to end, and return the seconds until others have."""
        next_in = math.inf
        for ended in Patience:
            ends_in = health.ends_in(ended)
            if ends_in > 0:
                next_in = min(next_in, ends_in)
                continue
            for turn in [turn for turn, patience in queue.items() if patience is ended]:
                del queue[turn]
                if not turn.cancelled():
                    turn.set_result(health.refusal())
        return next_in

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _pass_limiter(
        self,
        limiter: Limiter,
        health: Health,
        number: int,
        deadline_at: float,
        *,
        patience: Patience,
        is_urgent: bool,
    ) -> int | KaizenError:
        """Wait for the limiter; and for another turn if a pause has begun before it let through."""
        passed = False
        try:
            refusal = await self.wait(self._ask_limiter(limiter), deadline_at)
            passed = refusal is None and not self.closed and not health.is_held(number)
        except TimeoutError:
            refusal = self.interruption("while it waited for its turn to send")
        finally:
            if not passed:
                health.abandoned(number)
                self.end_turn()
        if passed:
            return number
        if refusal is None and self.closed:
            refusal = self.interruption("while it waited for its turn to send")
        return refusal or await self.take_turn(health, deadline_at, patience=patience, is_urgent=is_urgent)

    async def _ask_limiter(self, limiter: Limiter) -> KaizenError | None:
        """Wait for the limiter. Like a request it takes real time, and what it raises fails one lookup only."""
        self.clock.hold()
        try:
            await limiter()
        except Exception as error:  # noqa: BLE001 - it is the caller's code, often with a network behind it
            failure = TransportError(f"not sent: the limiter failed: {type(error).__name__}: {quoted(text_of(error))}")
            return self.transport.failed(failure, error)
        finally:
            self.clock.release()
        return None

    def begin(
        self,
        url: URL,
        body: bytes,
        health: Health,
        now: float,
        deadline_at: float,
        headers: Mapping[str, str] | None = None,
    ) -> FirstRequest | None:
        """Send the first request of a lookup at once: without waiting for anything, and without a timer of its own.

        That takes a free slot, an idle connection, and a server that is doing well. Then the request goes out before
        this returns; it must be given to `end`, or to `receive`. Otherwise None is returned, and nothing was sent.
        """
        sweep = self._sweep_for_first
        if sweep is None or not self._free_slots or self._queues or health.engaged or self.closed:
            return None
        if deadline_at <= now:
            return None
        ready = self._ready
        if ready is not None and not ready.take_now():
            return None
        begun = self.transport.begin(url, body, now, headers)
        if begun is None:
            if ready is not None:
                ready.put_back()
            return None
        self._free_slots -= 1
        pool, connection, response = begun
        first = FirstRequest(pool, connection, response, health.send(), now, deadline_at)
        self._begun.add(first)
        if deadline_at <= (sweep.when if sweep.when > now else sweep.next_after(now)):
            self._set_timer(first, self._attempt_timeout)
        return first

    def offer(self, url: URL, body: bytes, health: Health, now: float, deadline_at: float) -> Offer | None:
        """Return the response that a server in this process would give at once, if nothing keeps a request waiting."""
        if not self._free_slots or self._queues or health.engaged or self.closed or deadline_at <= now:
            return None
        return self.transport.offer(url, body) if self._limiter is None and self.key is None else None

    def end(self, first: FirstRequest, now: float) -> None:
        """Give the slot of a request back, and the connection on which its response was received completely."""
        first.pool.complete(first.connection, now)
        self._finish(first)

    def abandon(self, first: FirstRequest, error: BaseException) -> None:
        """Give the slot of a request back, and close its connection, because its lookup was cancelled or crashed."""
        try:
            first.pool.fail(first.connection, error)
        finally:
            self._finish(first)

    def _finish(self, first: FirstRequest) -> None:
        self._begun.discard(first)
        if first.timer is not None:
            first.timer.cancel()
        self._free_slots += 1
        if self._queues:
            self._serve()
        if self.closed:
            self._note_end()

    def _set_timer(self, first: FirstRequest, seconds: float) -> None:
        first.timer = RunningTimer(self.clock, seconds, first.deadline_at, first.expire)

    def _take_long(self, late: float) -> None:
        """Set timers for the requests in flight, when the sweep comes, that many seconds late."""
        for timeout in self._sending:
            timeout.take_long(late)
        for first in self._begun:
            if first.timer is None:
                self._set_timer(first, self._attempt_timeout - max(0.0, self.now() - first.sent_at - late))

    async def send(
        self, url: URL, body: bytes, deadline_at: float, is_held: Callable[[], bool], *, fresh: bool = False
    ) -> Answer | KaizenError | NoConnectionError | None:
        """Send one request within the attempt's timeout and the deadline, whichever ends first.

        Nothing was sent, and None is returned, if `is_held` says so once there is a connection.
        After a NoConnectionError, `await_connection` waits until it is time to try again.
        """
        send = self.transport.send_fresh if fresh else self.transport.send
        return await self._bounded(send(url, body, is_held), self._attempt_timeout, deadline_at)

    async def receive(self, first: FirstRequest) -> Answer | KaizenError | NoConnectionError | None:
        """Return the response to a request that `begin` sent, or why there is none: as `send`."""
        left = self._attempt_timeout
        if first.timer is not None:
            left = first.timer.left
        elif self._sweep is not None:
            left -= min(self.now() - first.sent_at, self._sweep.interval)
        self._begun.discard(first)
        if first.timer is not None:
            first.timer.cancel()
        return await self._bounded(
            self.transport.receive((first.pool, first.connection, first.response)), max(0.0, left), first.deadline_at
        )

    async def _bounded(
        self, response: Awaitable[Answer | None], allowed: float, deadline_at: float
    ) -> Answer | KaizenError | NoConnectionError | None:
        """Wait for a response within `allowed` seconds, or until the deadline if that comes first."""
        timeout = RunningTimeout(self.clock, allowed, deadline_at, self._sweep)
        self._sending.add(timeout)
        self.clock.hold()
        try:
            with timeout:
                if self._cut_off:
                    self.loop.call_soon(timeout.expire)  # what begins after the cut ends at once, too
                return await response
        except (TimeoutError, ExpiredError) as error:
            without_frames(error)  # the connection keeps it, and its frames refer to the connection
            if self._cut_off or deadline_at <= self.clock.time():
                return self.interruption("during an attempt")
            return AttemptTimeoutError(f"no complete response within {seconds(self._attempt_timeout)}")
        except KaizenError as error:
            return error.with_traceback(None)
        except NoConnectionError as error:
            without_frames(error)  # its frames refer to it, so it would keep itself alive
            return error
        finally:
            self.clock.release()
            self._sending.discard(timeout)
            self._note_end()

    def _note_end(self) -> None:
        if self.closed and not self.in_flight:
            self._all_sent.set()

    async def renew_key(self, key: RotatingKey, number: int, deadline_at: float) -> KaizenError | None:
        """Have the API key asked for, unless that was done since key `number`; return None, or why there is none.

        Like a request it takes real time, and no longer than one may.
        """
        ends_at = min(deadline_at, self.clock.time() + self._attempt_timeout)
        self.clock.hold()
        try:
            await self.wait(key.renew(number), ends_at)
        except TimeoutError:
            if self.closed or ends_at == deadline_at:
                return self.interruption("while it waited for the API key")
            return AttemptTimeoutError(f"not sent: no API key came within {seconds(self._attempt_timeout)}")
        except KaizenError as error:
            return error.with_traceback(None)
        finally:
            self.clock.release()
        return None

    async def await_connection(self, url: URL, deadline_at: float, shortage: NoConnectionError) -> KaizenError | None:
        """Wait for one of the connections that work; return why if there will be none. No attempt's time passes."""
        has_room = None
        with suppress(TimeoutError):
            has_room = await self.wait(self.transport.room(url), deadline_at)
        if has_room is None or self.closed:
            interruption = self.interruption("while it waited for a connection")
            interruption.__cause__ = self.transport.no_connection(shortage)
            return interruption
        return None if has_room else self.transport.no_connection(shortage)

    async def pause(self, delay: float) -> None:
        """Sleep, unless the client is closed.

        Raises:
            ClientClosedError: The client was closed.
        """
        try:
            await self.wait(sleep(self.clock, delay), math.inf)
        except TimeoutError:
            raise ClientClosedError("the client was closed during back-off") from None

    async def wait(self, awaitable: Awaitable[T], deadline_at: float) -> T:
        """Wait for something other than the network.

        Raises:
            TimeoutError: The deadline passed or the client was closed; `interruption` says which.
        """
        timeout = Timeout(self.clock, self.clock.time() if self.closed else deadline_at)
        self._waiting.add(timeout)
        try:
            async with timeout:
                return await awaitable
        finally:
            self._waiting.discard(timeout)

    def interruption(self, when: str) -> KaizenError:
        """Return the error for a wait that was ended: by the client's closing if it is closed, else by its deadline."""
        if self.closed:
            return ClientClosedError(f"the client was closed {when}")
        return DeadlineExceededError(f"its deadline passed {when}")

    async def warm_up(self, url: URL, count: int, deadline: float | None) -> None:
        """Open connections until that many are open.

        Raises:
            TransportError: None could be opened.
            DeadlineExceededError, ClientClosedError: They were not open in time.
        """
        if self.closed:
            raise ClientClosedError("the client is closed; create a new KaizenClient")
        deadline_at = math.inf if deadline is None else self.clock.time() + deadline
        try:
            await self.wait(self.transport.warm_up(url, count), deadline_at)
        except TimeoutError:
            raise self.interruption("while connections were opened") from None

    async def close(self, drain: float) -> None:
        """Refuse new lookups, end all waits, give requests in flight `drain` seconds, then cut them off.

        A second call shortens the drain of the first if it asks for less, and returns when all is closed.
        """
        self.closed = True
        self._disarm()
        self._interrupt(self._waiting)
        cut = self.loop.call_later(drain, self._cut)
        try:
            async with self._close_lock:
                if self.in_flight:
                    await self._all_sent.wait()
                await self.transport.close()
        finally:
            cut.cancel()
            if self._sweep is not None:
                self._sweep.stop()

    def _cut(self) -> None:
        self._cut_off = True
        self._interrupt(self._sending)
        self._interrupt(self._begun)

    def _interrupt(self, timeouts: Iterable[Timeout | RunningTimeout | FirstRequest]) -> None:
        for timeout in timeouts:
            timeout.expire()


def require_limiter(limiter: object) -> None:
    """Refuse a limiter that cannot be called: most likely it is an object of which a method is meant."""
    if limiter is not None and not callable(limiter):
        name = type(limiter).__name__
        raise TypeError(f"limiter must be a function to await before each request: the method {name}.acquire, perhaps")
