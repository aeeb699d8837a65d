"""The time that a client uses. A test can replace it, so that three hours pass in a moment."""

import asyncio
import math
import time
from collections.abc import Callable
from random import Random, SystemRandom
from types import TracebackType
from typing import Any, Final, Protocol

ROUNDING: Final = 0.0005
"""Seconds added to a delay. uvloop rounds delays to milliseconds, and a call that comes early does nothing useful."""
BLOCKED: Final = 0.01
"""A timer that is later than this many seconds shows that something blocks the event loop. In a busy loop timers are a
few milliseconds late."""
SHORTEST_INTERVAL: Final = 0.001
"""Seconds between two checks of how late timers are, while something blocks the event loop."""
LONGEST_SHARE: Final = 0.25
"""Time between two checks otherwise, as a share of what is left of the timeout."""


class Timer(Protocol):
    """A call that is due later."""

    def cancel(self) -> None:
        """Cancel the call."""
        ...


class Clock(Protocol):
    """What a client needs of a clock. Deadlines, timeouts, pauses and polls all use it.

    Attributes:
        random: The source of jitter, which spreads in time what would otherwise happen all at once.
    """

    random: Random

    def time(self) -> float:
        """Return monotonic seconds."""
        ...

    def wall(self) -> float:
        """Return seconds since the epoch."""
        ...

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        """Call back from the running event loop when `time()` reaches `when`."""
        ...

    def hold(self) -> None:
        """Note that a request is in flight. A virtual clock must not move on until it is over."""
        ...

    def release(self) -> None:
        """Note that a request is over."""
        ...


def require_clock(clock: object) -> None:
    """Refuse what is not a clock: a function or a class, perhaps."""
    is_clock = all(hasattr(clock, name) for name in ("random", "time", "wall", "call_at", "hold", "release"))
    if clock is not None and (isinstance(clock, type) or not is_clock):
        raise TypeError(f"clock must be a clock such as VirtualClock(), not {clock!r:.100}; without it time is real")


class SystemClock:
    """Real time."""

    def __init__(self) -> None:
        # Not a Random: workers forked from one process would all draw the same numbers, and retry together.
        self.random: Random = SystemRandom()

    def time(self) -> float:
        """Return the time of the running event loop, which tests may replace. Without a loop: monotonic seconds."""
        try:
            return asyncio.get_running_loop().time()
        except RuntimeError:
            return time.monotonic()

    def wall(self) -> float:
        """Return seconds since the epoch."""
        return time.time()

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        """Call back from the running event loop when `time()` reaches `when`."""
        loop = asyncio.get_running_loop()
        delay = when - loop.time()
        return loop.call_later(delay + ROUNDING if delay > 0 else 0, callback)

    def hold(self) -> None:
        """Do nothing: real time passes anyway."""

    def release(self) -> None:
        """Do nothing."""


class Timeout:
    """An `asyncio.timeout` that expires at a time of a clock, or when `expire` is called.

    Args:
        clock: The clock that `when` counts in.
        when: The time at which it expires. math.inf: never.
    """

    __slots__ = ("_clock", "_timeout", "_timer", "_when")

    def __init__(self, clock: Clock, when: float) -> None:
        self._clock = clock
        self._when = when
        self._timeout = asyncio.timeout(None)
        self._timer: Timer | None = None

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()
        if self._when != math.inf:
            self._timer = self._clock.call_at(self._when, self.expire)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await self._timeout.__aexit__(kind, error, traceback)

    def expire(self) -> None:
        """End what is inside the block now, with a TimeoutError."""
        if not self._timeout.expired():
            self._timeout.reschedule(asyncio.get_running_loop().time())


class RunningTimer:
    """Calls back after `seconds` in which the event loop ran, or at a time of the clock if that comes first.

    No response can arrive while something else blocks the loop, so that time does not count. This class measures it by
    how late its timers are: it sets a few of them usually, and one after the other while something blocks the loop.

    Args:
        clock: The clock of all times here.
        seconds: How long the loop may run.
        when: The time of the clock at which it calls back in any case. math.inf: never.
        callback: What to call, once.
    """

    __slots__ = ("_callback", "_called_at", "_clock", "_interval", "_left", "_timer", "_when")

    def __init__(self, clock: Clock, seconds: float, when: float, callback: Callable[[], None]) -> None:
        self._clock = clock
        self._left = seconds
        self._when = when
        self._callback = callback
        self._set_timer(seconds * LONGEST_SHARE)

    @property
    def left(self) -> float:
        """Seconds for which the loop may still run."""
        return self._left - min(self._clock.time() - self._called_at, self._interval)

    def cancel(self) -> None:
        """Cancel the call."""
        self._timer.cancel()

    def _set_timer(self, interval: float) -> None:
        self._called_at = self._clock.time()
        self._interval = min(interval, self._left, self._when - self._called_at)
        self._timer = self._clock.call_at(self._called_at + self._interval, self._on_timer)

    def _on_timer(self) -> None:
        late = self._clock.time() - self._called_at - self._interval
        self._left -= self._interval
        if self._left <= 0 or self._clock.time() >= self._when:
            # The loop reads what arrived while it was blocked in its next step. Only then may the timer call back.
            self._called_at, self._interval = self._clock.time(), 0.0
            self._timer = self._clock.call_at(self._called_at, self._callback)
        else:
            self._set_timer(SHORTEST_INTERVAL if late > BLOCKED else self._left * LONGEST_SHARE + SHORTEST_INTERVAL)


class RunningTimeout:
    """Ends its block with a TimeoutError after `seconds` in which the event loop ran.

    It does what `asyncio.timeout` does, by a `RunningTimer`.

    Args:
        clock: The clock of all times here.
        seconds: How long the loop may run.
        when: The time at which it expires in any case. math.inf: never.
        sweep: Sets the timer if the block takes long. None: the timer is set at once.
    """

    __slots__ = (
        "_cancelling",
        "_clock",
        "_entered_at",
        "_is_expired",
        "_seconds",
        "_sweep",
        "_task",
        "_timer",
        "_when",
    )

    def __init__(self, clock: Clock, seconds: float, when: float, sweep: "Sweep | None" = None) -> None:
        self._clock = clock
        self._seconds = seconds
        self._when = when
        self._sweep = sweep
        self._is_expired = False
        self._task: asyncio.Task[Any] | None = None
        self._timer: RunningTimer | None = None

    def __enter__(self) -> None:
        task: Any = asyncio.current_task()
        self._task = task
        self._cancelling = task.cancelling()
        self._entered_at = self._clock.time()
        ends_at = min(self._when, self._entered_at + self._seconds)
        if self._sweep is None or ends_at <= self._sweep.next_after(self._entered_at):
            self._set_timer(self._seconds)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        # If somebody else has cancelled the task as well, the cancellation wins.
        is_ours = self._is_expired and task is not None and task.uncancel() <= self._cancelling
        if is_ours and isinstance(error, asyncio.CancelledError):
            raise TimeoutError from error

    def expire(self) -> None:
        """End what is inside the block now, with a TimeoutError."""
        if self._task is not None and not self._is_expired:
            self._is_expired = True
            self._task.cancel()

    def take_long(self, late: float) -> None:
        """Set a timer, because the block has lasted until a sweep, which came `late` seconds late."""
        if self._timer is None:
            self._set_timer(self._seconds - max(0.0, self._clock.time() - self._entered_at - late))

    def _set_timer(self, seconds: float) -> None:
        self._timer = RunningTimer(self._clock, seconds, self._when, self.expire)


class Sweep:
    """One timer for all requests in flight, because nearly all of them end before a timer of their own would be due.

    It runs now and then, and sets a timer for each request that is still in flight.

    Args:
        clock: The clock of all times here.
        now: Returns its time.
        seconds: How long the loop may run during one request.
        take_long: Called when it comes, with the seconds by which it is late: sets those timers.

    Attributes:
        interval: Seconds from the first request in flight to the next sweep.
        when: The time of the next sweep, or of the last one.
    """

    def __init__(
        self, clock: Clock, now: Callable[[], float], seconds: float, take_long: Callable[[float], None]
    ) -> None:
        self.interval = seconds * LONGEST_SHARE
        self._clock = clock
        self._now = now
        self._take_long = take_long
        self._timer: Timer | None = None
        self.when = 0.0

    def next_after(self, now: float) -> float:
        """Return the time of the next sweep."""
        if self._timer is None:
            self.when = now + self.interval
            self._timer = self._clock.call_at(self.when, self._run)
        return self.when

    def _run(self) -> None:
        self._timer = None
        self._take_long(self._now() - self.when)

    def stop(self) -> None:
        """Cancel the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


async def sleep(clock: Clock, delay: float) -> None:
    """Sleep that many seconds of a clock."""
    over = asyncio.Event()
    timer = clock.call_at(clock.time() + delay, over.set)
    try:
        await over.wait()
    finally:
        timer.cancel()
