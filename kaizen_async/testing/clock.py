"""A clock for tests in which hours of waiting pass in milliseconds."""

import asyncio
import heapq
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from contextvars import copy_context
from datetime import UTC, datetime
from random import Random
from typing import TYPE_CHECKING, Any, Final, TypeVar
from weakref import WeakValueDictionary

from yarl import URL

from kaizen_async._transport.response import Offer
from kaizen_async.clock import sleep
from kaizen_async.testing.checks import check_epoch, check_seconds, check_type
from kaizen_async.testing.hold import Hold
from kaizen_async.testing.hosts import reachable

if TYPE_CHECKING:
    from kaizen_async.testing.emulator import KaizenEmulator

T = TypeVar("T")

IDLE_STEPS: Final = 50
"""Steps of the event loop without a request in flight, or a new call to come, after which time jumps: enough for a
result to travel through a few tasks and lead to the next request."""
QUIET_STEPS: Final = 1
"""The same for steps in which the loop had nothing else to do, and no data on its sockets."""
JUMPS_AT_ONCE: Final = 20
"""Jumps in one step of the event loop, while nothing but one timer after the other happens. A step of the loop costs
more than most timers. Data on its sockets waits for that long."""
BLOCKED_AFTER: Final = 0.05
"""Real seconds without a step after which a loop is blocked, or is not being run: time does not wait for it."""


class VirtualTimer:
    """A call that is due at a virtual time."""

    __slots__ = ("_callback", "_part")

    def __init__(self, callback: Callable[[], None], part: "_LoopPart") -> None:
        self._callback: Callable[[], None] | None = callback
        self._part = part

    @property
    def is_cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self._callback is None

    def cancel(self) -> None:
        """Cancel the call. Whatever led to that may lead to more before time jumps."""
        self._callback = None
        self._part.steps_left = IDLE_STEPS

    def fire(self) -> None:
        """Call back, unless cancelled."""
        if self._callback is not None:
            self._callback()


class _LoopPart:
    """What one event loop has of a clock: its calls to come, its holds, and the steps until it counts as idle."""

    __slots__ = (
        "holds",
        "is_blocked",
        "is_stepping",
        "is_watching",
        "loop",
        "ready",
        "stepped_at",
        "steps_left",
        "timers",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.timers: list[tuple[float, int, VirtualTimer]] = []
        self.holds = 0
        # The queue of asyncio's own loops is private, but it shows what no count of steps can. For other loops, steps
        # are counted.
        self.ready: Any = getattr(loop, "_ready", None)
        self.steps_left = IDLE_STEPS
        self.is_stepping = False
        self.is_blocked = False
        self.is_watching = False
        self.stepped_at = 0.0

    def drop_cancelled(self) -> None:
        """Forget the next timers if they were cancelled."""
        while self.timers and self.timers[0][2].is_cancelled:
            heapq.heappop(self.timers)

    def take_due(self, now: float) -> list[VirtualTimer]:
        """Remove and return the timers that are due."""
        due: list[VirtualTimer] = []
        while self.timers and self.timers[0][0] <= now:
            due.append(heapq.heappop(self.timers)[2])
        return due


class VirtualClock:
    """Time that stands still while anything happens, and jumps to the next thing that is due when nothing does.

    Give the same clock to the client and to the emulator:

        clock = VirtualClock()
        async with KaizenEmulator(clock=clock) as emulator:
            async with KaizenClient(base_url=emulator.base_url, clock=clock) as kaizen:
                await kaizen.instructor_executions.wait("exec_1", deadline=4 * 3600)

    Polls, back-off, pauses, deadlines, `attempt_timeout`, and the latency and hanging of the emulator's faults count in
    virtual time. A request takes no virtual time unless a fault says so. The scheduler is the real one. What is random
    in it is drawn from the seed, so a test sees the same polls at the same times in every run.

    Requests to an emulator with the same clock in the same process do not pass through sockets, as long as nothing is
    scripted that needs a connection: the body goes to the emulator, and the bytes of its response to the client's
    decoder. TLS and faults such as `Fault.reset()` use real sockets.

    Real time that your test spends on something else (a database, `asyncio.sleep`, a thread) does not hold the clock.
    Call `hold()` before it and `release()` after it.

    Several event loops may use one clock at the same time: an application in a thread, and the test's own loop. Time
    then jumps when all of them are idle. What was due in a loop that is closed is forgotten.

    Args:
        seed: What random numbers are drawn from.
        epoch: The date and time at which the clock starts, with a time zone. Defaults to the present.

    Attributes:
        epoch: The same.
        random: The source of what is random.

    Raises:
        TypeError, ValueError: An argument is not of its type, or `epoch` has no time zone.
    """

    def __init__(self, *, seed: int = 0, epoch: datetime | None = None) -> None:
        check_type("seed", seed, int)
        check_epoch(epoch)
        self.epoch = epoch or datetime.now(UTC)
        self.random = Random(seed)  # noqa: S311 - spreads polls, guards nothing
        self._now = 0.0
        self._serial = 0
        self._lock = threading.RLock()
        self._parts: dict[asyncio.AbstractEventLoop | None, _LoopPart] = {}
        self._holds_outside = 0
        self._settling: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._firing: tuple[int, _LoopPart] | None = None
        self._emulators: WeakValueDictionary[tuple[str, int], KaizenEmulator] = WeakValueDictionary()

    def time(self) -> float:
        """Return the virtual seconds that have passed."""
        return self._now

    def wall(self) -> float:
        """Return virtual seconds since the epoch of 1970."""
        return self.epoch.timestamp() + self._now

    def call_at(self, when: float, callback: Callable[[], None]) -> VirtualTimer:
        """Call back from the running event loop when `time()` reaches `when`."""
        with self._lock:
            part = self._part_here()
            timer = VirtualTimer(callback, part)
            if when <= self._now:
                part.loop.call_soon(timer.fire)
            else:
                self._serial += 1
                heapq.heappush(part.timers, (when, self._serial, timer))
            self._touch(part)
        return timer

    async def sleep(self, seconds: float) -> None:
        """Sleep that many virtual seconds."""
        check_seconds("seconds", seconds)
        await sleep(self, seconds)

    async def advance(self, seconds: float) -> None:
        """Let that many virtual seconds pass, and return when all that they brought about has happened.

        What is due on the way happens in order, each thing at its own time.
        """
        await self.sleep(seconds)
        loop = asyncio.get_running_loop()
        settled: asyncio.Future[None] = loop.create_future()
        with self._lock:
            self._settling.append((loop, settled))
            self._touch(self._part_here())
        await settled

    def hold(self) -> None:
        """Make time stand still until `release`. May be called with or without a running event loop."""
        with self._lock:
            part = self._part_here() if _is_in_loop() else None
            if part is None:
                self._holds_outside += 1
            else:
                part.holds += 1

    def release(self) -> None:
        """Undo one `hold` that was called from the same event loop, or like this outside of any.

        Raises:
            RuntimeError: The clock is not held.
        """
        with self._lock:
            part = self._part_here() if _is_in_loop() else None
            if not (self._holds_outside if part is None else part.holds):
                raise RuntimeError(
                    "release() without a hold(): nothing here holds the clock; "
                    "call hold() before, in the same event loop"
                )
            if part is not None:
                part.holds -= 1
                self._touch(part)
                return
            self._holds_outside -= 1
            for other in self._open_parts():
                self._touch_from_outside(other)

    def register(self, host: str, port: int, emulator: "KaizenEmulator | None") -> None:
        """Say which emulator in this process serves an address; None for none."""
        if emulator is None:
            self._emulators.pop((reachable(host), port), None)
        else:
            self._emulators[reachable(host), port] = emulator

    def offer(self, url: URL, headers: Mapping[str, str], body: bytes) -> Offer | None:
        """Return the response that an emulator of this process gives at once; None if the request must be delivered."""
        emulator = self._emulator_at(url)
        return None if emulator is None else emulator.offer(url.raw_path, headers, body)

    async def deliver(
        self,
        url: URL,
        headers: Mapping[str, str],
        body: bytes,
        over_the_wire: Callable[[], Awaitable[T]],
        *,
        by_wire: bool = False,
    ) -> Any:
        """Deliver a request of a client to an emulator of this process, or over the wire if it needs a connection.

        The client holds the clock until the response is there. An emulator lets go of it while virtual time has to
        pass.

        Args:
            url: Where the request goes.
            headers: Its headers.
            body: Its body.
            over_the_wire: Sends it.
            by_wire: Whether the client needs a connection, such as that of a session which was passed in.

        Returns:
            The response as the client's transport has it; or what `over_the_wire` returns.
        """
        emulator = self._emulator_at(url)
        if emulator is not None and not by_wire:
            offer = emulator.offer(url.raw_path, headers, body)
            if offer is not None:
                offer.take()
                return offer.response.answer
        hold = Hold(self)
        try:
            if emulator is not None:
                answer = await emulator.deliver(url.raw_path, headers, body, hold, by_wire=by_wire)
                if answer is not None:
                    return answer
            with hold.for_the_wire():
                return await over_the_wire()
        finally:
            hold.end()

    def let_go(self, loop: asyncio.AbstractEventLoop) -> None:
        """Undo a hold of another event loop."""
        with self._lock:
            part = self._parts.get(loop)
            if part is not None and part.holds:
                part.holds -= 1
                self._touch_from_outside(part)

    def take_back(self, loop: asyncio.AbstractEventLoop) -> None:
        """Hold time again for another event loop."""
        with self._lock:
            part = self._parts.get(loop)
            if part is not None:
                part.holds += 1

    def _emulator_at(self, url: URL) -> "KaizenEmulator | None":
        return self._emulators.get((reachable(url.host or ""), url.port or 0))

    def _part_here(self) -> _LoopPart:
        firing = self._firing
        if firing is not None and firing[0] == threading.get_ident():
            return firing[1]  # before Python 3.12, asking for the running loop takes a system call
        loop = asyncio.get_running_loop()
        part = self._parts.get(loop)
        if part is None:
            self._open_parts()
            part = self._parts[loop] = _LoopPart(loop)
        return part

    def _open_parts(self) -> list[_LoopPart]:
        """Return the parts of loops that are not closed, and forget the others."""
        for loop, part in list(self._parts.items()):
            if part.loop.is_closed():
                del self._parts[loop]
        return list(self._parts.values())

    def _touch(self, part: _LoopPart) -> None:
        """Restart the count of idle steps of the running loop."""
        part.steps_left = IDLE_STEPS
        if not part.is_stepping:
            part.is_stepping = True
            part.stepped_at = time.monotonic()
            part.loop.call_soon(self._step, part)

    def _touch_from_outside(self, part: _LoopPart) -> None:
        """Restart the count of idle steps of another loop. From now on time waits for that loop."""
        part.steps_left = IDLE_STEPS
        if not part.is_stepping:
            part.is_stepping = True
            part.stepped_at = time.monotonic()
            _call_if_open(part.loop, self._step, part)

    def _step(self, part: _LoopPart) -> None:
        with self._lock:
            part.stepped_at = time.monotonic()
            part.is_blocked = False
            is_idle = part.ready is not None and not part.ready
            part.steps_left -= max(1, IDLE_STEPS // QUIET_STEPS) if is_idle else 1
            if part.steps_left > 0 and not part.holds:
                part.loop.call_soon(self._step, part)
                return
            part.is_stepping = False
        self._jump_on(part)

    def _jump_on(self, part: _LoopPart) -> None:
        """Jump from timer to timer, until more happens than one timer, or the event loop should look at its sockets."""
        for _ in range(JUMPS_AT_ONCE):
            with self._lock:
                part.is_stepping = False
                due = self._jump(part)
                if not due:
                    return
                # What the timer leads to is still to come. Until this loop has taken a step, others must not jump.
                self._firing, part.is_stepping = (threading.get_ident(), part), True
            try:
                _fire_first(due, part.loop)
            finally:
                self._firing = None
            if len(self._parts) > 1 or part.ready is None or part.ready:
                break
        with self._lock:
            part.is_stepping = False
            self._touch(part)

    def _jump(self, here: _LoopPart) -> list[VirtualTimer]:
        """Move to the next thing that is due, if all loops are idle and nothing holds time.

        Returns:
            The timers of the running loop that are due. Those of other loops are passed to their loops.
        """
        parts = [here]
        if len(self._parts) > 1:
            parts = self._open_parts()
            self._watch(here)
        if self._holds_outside or any(part.holds for part in parts):
            return []
        if busy := [part for part in parts if part.is_stepping and not part.is_blocked]:
            now = time.monotonic()
            for part in busy:
                part.is_blocked = now - part.stepped_at >= BLOCKED_AFTER
            return []
        if self._settling:
            self._settle(parts)
            return []
        for part in parts:
            part.drop_cancelled()
        self._now = min([part.timers[0][0] for part in parts if part.timers], default=self._now)
        for part in parts:
            if part is not here and (due := part.take_due(self._now)):
                for timer in due:
                    _call_if_open(part.loop, timer.fire)
                self._touch_from_outside(part)
        return here.take_due(self._now)

    def _settle(self, parts: list[_LoopPart]) -> None:
        """End the calls of `advance`, now that everything has happened."""
        for loop, settled in self._settling:
            _call_if_open(loop, _set_done, settled)
        self._settling.clear()
        for part in parts:
            self._touch_from_outside(part)

    def _watch(self, part: _LoopPart) -> None:
        """Try again later while this loop waits for something: the others may block, or close before they jump."""
        if not part.is_watching and (part.timers or self._settling):
            part.is_watching = True
            part.loop.call_later(BLOCKED_AFTER / 2, self._jump_if_idle, part)

    def _jump_if_idle(self, part: _LoopPart) -> None:
        with self._lock:
            part.is_watching = False
            is_idle = not part.is_stepping
        if is_idle:
            self._jump_on(part)


def _is_in_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _call_if_open(loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *args: object) -> None:
    """Call in another loop. That loop may close at any moment, and what was to come in it is forgotten then."""
    try:
        loop.call_soon_threadsafe(callback, *args)
    except RuntimeError:
        if not loop.is_closed():
            raise


def _fire_first(due: list[VirtualTimer], loop: asyncio.AbstractEventLoop) -> None:
    """Call back now if one timer is due. Of several, each may lead to more before the next one, as in real time."""
    if len(due) > 1:
        for timer in due:
            loop.call_soon(timer.fire)
        return
    try:
        copy_context().run(due[0].fire)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # noqa: BLE001 - the event loop reports what a callback raises, and so does this
        loop.call_exception_handler({"message": "a timer in virtual time failed", "exception": error})


def _set_done(settled: asyncio.Future[None]) -> None:
    if not settled.done():
        settled.set_result(None)
