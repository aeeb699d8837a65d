"""The time that a client lives in, so that a test can make three hours pass in a moment."""

import asyncio
import math
import time
from collections.abc import Callable
from random import Random, SystemRandom
from types import TracebackType
from typing import Any, Final, Protocol

ROUNDING: Final = 0.0005
"""Seconds added to a delay. uvloop rounds delays to milliseconds, and a call that comes early comes in vain."""
BLOCKED: Final = 0.01
"""Seconds by which a timer is late from which on the event loop counts as blocked. A busy loop is a few late."""
SHORTEST_INTERVAL: Final = 0.001
"""Seconds between two looks at how late timers are, while the event loop is being blocked."""
LONGEST_SHARE: Final = 0.25
"""The same otherwise, as a share of what is left of the timeout."""


class Timer(Protocol):
    """A call to come."""

    def cancel(self) -> None:
        """Make it not come."""
        ...


class Clock(Protocol):
    """What a client asks of time. Its deadlines, timeouts, pauses and polls all count in it.

    Attributes:
        random: Spreads in time what would otherwise come all at once.
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
        """Note that a request is under way, which a clock that is not real must wait for."""
        ...

    def release(self) -> None:
        """Note that it is over."""
        ...


class SystemClock:
    """Real time."""

    def __init__(self) -> None:
        # Not a Random: workers forked from one process would all draw the same, and come back together.
        self.random: Random = SystemRandom()

    def time(self) -> float:
        """Return the seconds of the running event loop, which tests may replace; without a loop, monotonic seconds."""
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
    """An `asyncio.timeout` that ends at a time of a clock, or when `expire` is called.

    Args:
        clock: The clock that `when` counts in.
        when: The time at which it ends; math.inf for no time.
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


class RunningTimeout:
    """Ends what is inside its block with a TimeoutError after so many seconds in which the event loop ran.

    Nothing can arrive while something else blocks the loop, so that time is not counted. It is measured by how late
    the timers here are called: a few in the usual case, and one after the other while the loop is being blocked.

    It is what `asyncio.timeout` is, without its coroutines: every request passes through here.

    Args:
        clock: The clock that all times count in.
        seconds: How long the loop may run.
        when: The time at which it ends in any case; math.inf for no time.
        sweep: What sets its timer if it takes long; without one, the timer is set at once.
    """

    __slots__ = (
        "_called_at",
        "_cancelling",
        "_clock",
        "_interval",
        "_is_expired",
        "_left",
        "_sweep",
        "_task",
        "_timer",
        "_when",
    )

    def __init__(self, clock: Clock, seconds: float, when: float, sweep: "Sweep | None" = None) -> None:
        self._clock = clock
        self._left = seconds
        self._when = when
        self._sweep = sweep
        self._interval = self._called_at = 0.0
        self._is_expired = False
        self._task: asyncio.Task[Any] | None = None
        self._timer: Timer | None = None

    def __enter__(self) -> None:
        task: Any = asyncio.current_task()
        self._task = task
        self._cancelling = task.cancelling()
        if self._sweep is None:
            self._set_timer(self._left * LONGEST_SHARE)
            return
        self._called_at = now = self._sweep.now()
        if self._when <= self._sweep.next_after(now):
            self._set_timer(self._left * LONGEST_SHARE)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        if self._timer is not None:
            self._timer.cancel()
        # If somebody else has cancelled the task as well, that counts more.
        is_ours = self._is_expired and task is not None and task.uncancel() <= self._cancelling
        if is_ours and isinstance(error, asyncio.CancelledError):
            raise TimeoutError from error

    def expire(self) -> None:
        """End what is inside the block now, with a TimeoutError."""
        if self._task is not None and not self._is_expired:
            self._is_expired = True
            self._task.cancel()

    def take_long(self, late: float) -> None:
        """Set a timer after all, when a sweep comes; that many seconds late, because the loop was blocked."""
        if self._timer is None:
            self._left -= max(0.0, self._clock.time() - self._called_at - late)
            self._set_timer(self._left * LONGEST_SHARE)

    def _set_timer(self, interval: float) -> None:
        self._called_at = self._clock.time()
        self._interval = min(interval, self._left, self._when - self._called_at)
        self._timer = self._clock.call_at(self._called_at + self._interval, self._on_timer)

    def _on_timer(self) -> None:
        late = self._clock.time() - self._called_at - self._interval
        self._left -= self._interval
        if self._left <= 0 or self._clock.time() >= self._when:
            # What arrived while the loop was blocked is read in the loop's next step.
            self._timer = self._clock.call_at(self._clock.time(), self.expire)
        else:
            self._set_timer(SHORTEST_INTERVAL if late > BLOCKED else self._left * LONGEST_SHARE + SHORTEST_INTERVAL)


class Sweep:
    """One timer for all requests in flight, because nearly all of them are over before a timer of theirs would come.

    It comes now and then, and has a timer set for each that is still in flight.

    Args:
        clock: The clock that all times count in.
        now: Returns its time.
        seconds: How long the loop may run during one request.
        in_flight: The timeouts of the requests in flight.
    """

    def __init__(self, clock: Clock, now: Callable[[], float], seconds: float, in_flight: set[RunningTimeout]) -> None:
        self.now = now
        self._clock = clock
        self._interval = seconds * LONGEST_SHARE
        self._in_flight = in_flight
        self._timer: Timer | None = None
        self._when = 0.0

    def next_after(self, now: float) -> float:
        """Return when the next sweep comes."""
        if self._timer is None:
            self._when = now + self._interval
            self._timer = self._clock.call_at(self._when, self._run)
        return self._when

    def _run(self) -> None:
        self._timer = None
        late = self.now() - self._when
        for timeout in self._in_flight:
            timeout.take_long(late)

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
