"""What a client has within one event loop: connections, slots, and every wait that closing it must end.

A wait of a lookup always happens inside a `Timeout` that the engine knows. So a deadline ends it,
cancellation passes through it, and closing the client ends it by moving the deadline to now: nobody is cancelled.
"""

import asyncio
import math
import os
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import TypeAlias, TypeVar

from yarl import URL

from kaizen_async._lookup.throttle import Gate
from kaizen_async._transport.capacity import NoConnectionError
from kaizen_async._transport.response import Answer
from kaizen_async._transport.transport import Transport
from kaizen_async.clock import Clock, RunningTimeout, Timeout, sleep
from kaizen_async.errors import (
    AttemptTimeoutError,
    ClientClosedError,
    DeadlineExceededError,
    KaizenError,
    RateLimitError,
    TransportError,
    printable,
    seconds,
)
from kaizen_async.events import Hook, Ungated

T = TypeVar("T")
Limiter: TypeAlias = Callable[[], Awaitable[object]]


class Engine:
    """Sends requests for all look-ups of a client that run in one event loop.

    Failures are returned, not raised, since most of them are not the end of a look-up.

    Args:
        transport: Sends one request; closed with the engine.
        gate: Says when to send; shared by all engines of a client.
        clock: The time that deadlines, timeouts and waits count in.
        concurrency: Requests under way at the same time, at most.
        attempt_timeout: Seconds for one request.
        limiter: Awaited before each request, as the last thing of its turn.
        on_event: Told what happens.
    """

    def __init__(
        self,
        transport: Transport,
        gate: Gate,
        clock: Clock,
        *,
        concurrency: int,
        attempt_timeout: float,
        limiter: Limiter | None = None,
        on_event: Hook | None = None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.process_id = os.getpid()
        self.transport = transport
        self.gate = gate
        self.clock = clock
        self.concurrency = concurrency
        self.closed = False
        self.on_event = on_event
        self._attempt_timeout = attempt_timeout
        self._limiter = limiter
        self._slots = asyncio.Semaphore(concurrency)
        self._sending: set[Timeout] = set()
        self._waiting: set[Timeout] = set()
        self._cut_off = False
        self._all_sent = asyncio.Event()
        self._close_lock = asyncio.Lock()

    @property
    def in_flight(self) -> int:
        """Requests under way."""
        return len(self._sending)

    async def take_turn(self, deadline_at: float) -> KaizenError | None:
        """Take a slot, pass gate and limiter; return None, or why nothing may be sent. Call `end_turn` after None."""
        if self._limiter is None and not self._slots.locked() and not self.gate.engaged:
            await self._slots.acquire()
            return None
        try:
            return await self.wait(self._queue(deadline_at), deadline_at)
        except TimeoutError:
            return self.interruption("while it waited for its turn to send")

    async def _queue(self, deadline_at: float) -> KaizenError | None:
        await self._slots.acquire()
        refusal: KaizenError | None = None
        passed = False
        try:
            refusal = await self._permission(deadline_at)
            if refusal is None and self.closed:
                refusal = self.interruption("while it waited for its turn to send")
            passed = refusal is None
        finally:
            if not passed:
                self._slots.release()
        return refusal

    def end_turn(self) -> None:
        """Give the slot back."""
        self._slots.release()

    async def _permission(self, deadline_at: float) -> KaizenError | None:
        """Pass the gate, then the limiter; and both again if the gate has closed before the limiter let through."""
        while (refusal := await self._pass_gate(deadline_at)) is None and self._limiter is not None:
            epoch = self.gate.epoch
            refusal = await self._pass_limiter(self._limiter)
            if refusal is not None or self.gate.epoch == epoch:
                break
        return refusal

    async def _pass_limiter(self, limiter: Limiter) -> KaizenError | None:
        """Wait for the limiter. Like a request it takes real time, and what it raises fails one look-up only."""
        self.clock.hold()
        try:
            await limiter()
        except Exception as error:  # noqa: BLE001 - it is the caller's code, often with a network behind it
            failure = TransportError(f"not sent: the limiter failed: {type(error).__name__}: {printable(str(error))}")
            return self.transport.failed(failure, error)
        finally:
            self.clock.release()
        return None

    async def _pass_gate(self, deadline_at: float) -> KaizenError | None:
        gate = self.gate
        while gate.engaged:
            pause = gate.seconds_left()
            wait = pause or gate.next_in()
            if wait > deadline_at - self.clock.time():
                return self._too_long(wait, "pause" if pause else "send less")
            if pause:
                await sleep(self.clock, pause)
            elif await self._wait_for_moment():
                self._tell_resumed()
                break
        return None

    async def _wait_for_moment(self) -> bool:
        """Wait for a moment to send that the gate keeps free; return whether it is still open then."""
        epoch = self.gate.epoch
        delay = self.gate.reserve()
        moment = self.clock.time() + delay
        try:
            await sleep(self.clock, delay)
        except BaseException:
            self.gate.give_back(epoch, moment)
            raise
        return self.gate.epoch == epoch

    def _too_long(self, wait: float, asked: str) -> KaizenError:
        refusal = RateLimitError(
            f"not sent: the server asked this client to {asked}, and it would be the turn of this look-up "
            f"in {seconds(wait)} only, which is longer than it may take",
            status=self.gate.status,
            retry_after=wait,
            retryable=True,
        )
        refusal.next_attempt_in = wait
        return refusal

    def _tell_resumed(self) -> None:
        if self.on_event is not None and (pause := self.gate.resumed()) is not None:
            self.on_event(Ungated(pause))

    async def send(
        self, url: URL, body: bytes, deadline_at: float, *, fresh: bool = False
    ) -> Answer | KaizenError | None:
        """Send one request within the attempt's timeout and the deadline, whichever ends first.

        Nothing was sent, and None is returned, if the gate closed while a connection was being made: `pass_again`.
        Waiting for one of the connections that work, if there cannot be more, takes nothing of the attempt's time.
        """
        while True:
            try:
                return await self._send_once(url, body, deadline_at, fresh=fresh)
            except NoConnectionError as error:
                shortage = error
            has_room = True
            try:
                has_room = await self.wait(self.transport.room(url), deadline_at)
            except TimeoutError:
                is_over = True
            else:
                is_over = self.closed
            if is_over:
                interruption = self.interruption("while it waited for a connection")
                interruption.__cause__ = self.transport.no_connection(shortage)
                return interruption
            if not has_room:
                return self.transport.no_connection(shortage)

    async def _send_once(
        self, url: URL, body: bytes, deadline_at: float, *, fresh: bool
    ) -> Answer | KaizenError | None:
        is_held = partial(self._is_held, self.gate.epoch)
        timeout = RunningTimeout(self.clock, self._attempt_timeout, deadline_at)
        self._sending.add(timeout)
        self.clock.hold()
        try:
            async with timeout:
                return await (self.transport.send_fresh if fresh else self.transport.send)(url, body, is_held)
        except TimeoutError:
            if self._cut_off or deadline_at <= self.clock.time():
                return self.interruption("during an attempt")
            return AttemptTimeoutError(f"no complete answer within {seconds(self._attempt_timeout)}")
        except KaizenError as error:
            return error.with_traceback(None)
        finally:
            self.clock.release()
            self._sending.discard(timeout)
            if self.closed and not self._sending:
                self._all_sent.set()

    def _is_held(self, epoch: int) -> bool:
        return self.gate.epoch != epoch

    async def pass_again(self, deadline_at: float) -> KaizenError | None:
        """Wait for the gate once more with a request that was held; return None, or why it may not be sent."""
        try:
            return await self.wait(self._permission(deadline_at), deadline_at)
        except TimeoutError:
            return self.interruption("while it waited for its turn to send")

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
            TimeoutError: The deadline passed or the client was closed; `interruption` tells which.
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
        """Refuse new look-ups, end all waits, give requests under way `drain` seconds, then cut them off.

        A second call shortens the drain of the first if it asks for less, and returns when all is closed.
        """
        self.closed = True
        self._interrupt(self._waiting)
        cut = self.loop.call_later(drain, self._cut)
        try:
            async with self._close_lock:
                if self._sending:
                    await self._all_sent.wait()
                await self.transport.close()
        finally:
            cut.cancel()

    def _cut(self) -> None:
        self._cut_off = True
        self._interrupt(self._sending)

    def _interrupt(self, timeouts: Iterable[Timeout]) -> None:
        for timeout in timeouts:
            timeout.expire()


def require_limiter(limiter: object) -> None:
    """Refuse a limiter that cannot be called: most likely it is an object of which a method is meant."""
    if limiter is not None and not callable(limiter):
        name = type(limiter).__name__
        raise TypeError(f"limiter must be a function to await before each request: the method {name}.acquire, perhaps")
