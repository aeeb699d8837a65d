"""What a client has within one event loop: connections, slots, and every wait that closing it must end.

A wait of a lookup always happens inside a `Timeout` that the engine knows. So a deadline ends it,
cancellation passes through it, and closing the client ends it by moving the deadline to now, without cancelling a task.
"""

import asyncio
import math
import os
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, Final, Generic, Protocol, TypeAlias, TypeVar, cast

import msgspec
from yarl import URL

from kaizen_async._lookup.health import Health, Patience
from kaizen_async._transport.capacity import NoConnectionError
from kaizen_async._transport.connection import Connection, ExpiredError
from kaizen_async._transport.failures import text_of, without_frames
from kaizen_async._transport.key import RotatingKey
from kaizen_async._transport.pool import Pool
from kaizen_async._transport.response import Answer, Offer
from kaizen_async._transport.transport import LARGE_RESPONSE, Transport
from kaizen_async.clock import Clock, RunningTimeout, RunningTimer, Sweep, SystemClock, Timeout, Timer
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
Turn: TypeAlias = asyncio.Future[int | KaizenError | None]
"""Receives the number of a request that may be sent, or why none may; None if there was no turn in time."""

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


class BegunRequest(msgspec.Struct, eq=False):
    """A request that could be sent at once.

    Attributes:
        pool: Where its connection came from.
        connection: On which it was sent.
        response: Receives the response.
        sent_at: The clock's time.
        deadline_at: The clock's time at which the lookup ends.
        timer: Ends the wait for the response, once it has taken long.
        number: Of the request.
    """

    pool: Pool
    connection: Connection
    response: asyncio.Future[Answer | None]
    sent_at: float
    deadline_at: float
    timer: RunningTimer | None = None
    number: int = 0

    def expire(self) -> None:
        """End the wait for the response."""
        if not self.response.done():
            self.connection.expire()


class Wait(Generic[T]):
    """A wait for a result, which is None if it was not there in time.

    Args:
        clock: The clock of `until`.
        loop: The running event loop.
        until: The time at which it ends without a result. math.inf: never.

    Attributes:
        result: Receives the result. None may be waited for like any other.
    """

    __slots__ = ("_timer", "result")

    def __init__(self, clock: Clock, loop: asyncio.AbstractEventLoop, until: float) -> None:
        self.result: asyncio.Future[T | None] = loop.create_future()
        self._timer = None if until == math.inf else clock.call_at(until, self.expire)

    def expire(self) -> None:
        """End the wait without a result."""
        if not self.result.done():
            self.result.set_result(None)

    def end(self) -> None:
        """Forget the time, since the wait is over."""
        if self._timer is not None:
            self._timer.cancel()


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
        self._queues: dict[Health, OrderedDict[Turn, Patience]] = {}
        self._timer: Timer | None = None
        self._sending: set[RunningTimeout] = set()
        self._begun: set[BegunRequest] = set()
        # A timer that comes in vain is cheap in real time. In a virtual one it would be a moment to stop at.
        is_real = isinstance(clock, SystemClock)
        self.now = self.loop.time if is_real else clock.time
        self._sweep = Sweep(clock, self.now, attempt_timeout, self._take_long) if is_real else None
        # Asked of its class: a mock has every attribute.
        self._ready = cast("ReadyLimiter", limiter) if hasattr(type(limiter), "take_now") else None
        self._sweep_at_once = self._sweep if key is None and (limiter is None or self._ready is not None) else None
        self._waiting: set[Timeout | Wait[Any]] = set()
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
        wait: Wait[int | KaizenError] = Wait(self.clock, self.loop, deadline_at)
        turn = wait.result
        queue = self._queues.setdefault(health, OrderedDict())
        queue[turn] = patience
        if is_urgent:
            queue.move_to_end(turn, last=False)
        self._serve()
        result = None
        try:
            result = await self._end_of(wait)
        finally:
            if result is None or self.closed:
                self._give_up(health, turn)
        if result is not None and not self.closed:
            return result
        if self.closed or health.pause is None:
            return self.interruption("while it waited for its turn to send")
        refusal = health.refusal()
        refusal.next_attempt_in = health.delay()
        return refusal

    def _give_up(self, health: Health, turn: Turn) -> None:
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
                if turn.done():
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
    def _end_unsent(health: Health, queue: OrderedDict[Turn, Patience]) -> float:
        """End lookups that have waited long enough for a pause to end, and return the seconds until others have."""
        next_in = math.inf
        for ended in Patience:
            ends_in = health.ends_in(ended)
            if ends_in > 0:
                next_in = min(next_in, ends_in)
                continue
            for turn in [turn for turn, patience in queue.items() if patience is ended]:
                del queue[turn]
                if not turn.done():
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
    ) -> BegunRequest | None:
        """Send a request at once: without waiting for anything, and without a timer of its own.

        That takes a free slot, an idle connection, and a server that is ready for it. Then the request goes out before
        this returns; it must be given to `end`, or to `receive`. Otherwise None is returned, and nothing was sent.
        """
        sweep = self._sweep_at_once
        if sweep is None or not self._free_slots or self._queues or self.closed or deadline_at <= now:
            return None
        if health.engaged and health.delay() > 0:
            return None
        ready = self._ready
        if ready is not None and not ready.take_now():
            return None
        request = self._begin(url, body, now, deadline_at, headers)
        if request is None:
            if ready is not None:
                ready.put_back()
            return None
        self._free_slots -= 1
        request.number = health.send()
        return request

    def _begin(
        self, url: URL, body: bytes, now: float, deadline_at: float, headers: Mapping[str, str] | None = None
    ) -> BegunRequest | None:
        """Send a request on an idle connection, if there is one."""
        begun = self.transport.begin(url, body, now, headers)
        if begun is None:
            return None
        pool, connection, response = begun
        request = BegunRequest(pool, connection, response, now, deadline_at)
        self._begun.add(request)
        sweep = self._sweep
        if sweep is None or deadline_at <= (sweep.when if sweep.when > now else sweep.next_after(now)):
            self._set_timer(request, self._attempt_timeout)
        return request

    def offer(self, url: URL, body: bytes, health: Health, now: float, deadline_at: float) -> Offer | None:
        """Return the response that a server in this process would give at once, if nothing keeps a request waiting."""
        if not self._free_slots or self._queues or health.engaged or self.closed or deadline_at <= now:
            return None
        return self.transport.offer(url, body) if self._limiter is None and self.key is None else None

    def end(self, request: BegunRequest, now: float) -> None:
        """Give the slot of a request back, and the connection on which its response was received completely."""
        request.pool.complete(request.connection, now)
        self._forget(request)
        self.end_turn()

    def abandon(self, request: BegunRequest, error: BaseException) -> None:
        """Give the slot of a request back, and close its connection, because its lookup was cancelled or crashed."""
        try:
            request.pool.fail(request.connection, error)
        finally:
            self._forget(request)
            self.end_turn()

    def _forget(self, request: BegunRequest) -> None:
        self._begun.discard(request)
        if request.timer is not None:
            request.timer.cancel()
        if self.closed:
            self._note_end()

    def _set_timer(self, request: BegunRequest, seconds: float) -> None:
        request.timer = RunningTimer(self.clock, seconds, request.deadline_at, request.expire)

    def _take_long(self, late: float) -> None:
        """Set timers for the requests in flight, when the sweep comes, that many seconds late."""
        for timeout in self._sending:
            timeout.take_long(late)
        for request in self._begun:
            if request.timer is None:
                self._set_timer(request, self._attempt_timeout - max(0.0, self.now() - request.sent_at - late))

    async def send(
        self, url: URL, body: bytes, deadline_at: float, is_held: Callable[[], bool], *, fresh: bool = False
    ) -> Answer | KaizenError | NoConnectionError | None:
        """Send one request within the attempt's timeout and the deadline, whichever ends first.

        Nothing was sent, and None is returned, if `is_held` says so once there is a connection.
        After a NoConnectionError, `await_connection` waits until it is time to try again.
        """
        if self._sweep is not None and self.on_event is None and not (fresh or self.closed or is_held()):
            now = self.now()
            if now < deadline_at and (request := self._begin(url, body, now, deadline_at)) is not None:
                return await self.receive(request)
        send = self.transport.send_fresh if fresh else self.transport.send
        return await self._bounded(send(url, body, is_held), self._attempt_timeout, deadline_at)

    async def receive(self, request: BegunRequest) -> Answer | KaizenError | NoConnectionError | None:
        """Return the response to a request that `begin` sent, or why there is none: as `send`."""
        begun = request.pool, request.connection, request.response
        try:
            answer = await request.response
        except BaseException as error:
            self._forget(request)
            request.pool.fail(request.connection, error)
            raise
        if answer is not None and len(answer.body) <= LARGE_RESPONSE:
            self._forget(request)
            self.transport.complete(begun)
            return answer
        left = self._attempt_timeout
        if request.timer is not None:
            left = request.timer.left
        elif self._sweep is not None:
            left -= min(self.now() - request.sent_at, self._sweep.interval)
        self._begun.discard(request)
        if request.timer is not None:
            request.timer.cancel()
        return await self._bounded(self.transport.receive(begun), max(0.0, left), request.deadline_at)

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
        wait: Wait[None] = Wait(self.clock, self.loop, self.clock.time() + delay)
        await self._end_of(wait)
        if self.closed:
            raise ClientClosedError("the client was closed during back-off")

    async def _end_of(self, wait: Wait[T]) -> T | None:
        """Return the result of a wait; None if its time is over, or the client is closed."""
        self._waiting.add(wait)
        if self.closed:
            wait.expire()
        try:
            return await wait.result
        finally:
            wait.end()
            self._waiting.discard(wait)

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

    def _interrupt(self, waits: Iterable[Timeout | RunningTimeout | Wait[Any] | BegunRequest]) -> None:
        for wait in waits:
            wait.expire()


def require_limiter(limiter: object) -> None:
    """Refuse a limiter that cannot be called: most likely it is an object of which a method is meant."""
    if limiter is not None and not callable(limiter):
        name = type(limiter).__name__
        raise TypeError(f"limiter must be a function to await before each request: the method {name}.acquire, perhaps")
