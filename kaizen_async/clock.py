"""The time that a client lives in, so that a test can make three hours pass in a moment."""

import asyncio
import math
import time
from collections.abc import Callable
from random import Random, SystemRandom
from types import TracebackType
from typing import Final, Protocol

ROUNDING: Final = 0.0005
"""Seconds added to a delay. uvloop rounds delays to milliseconds, and a call that comes early comes in vain."""


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
        """Return monotonic seconds."""
        return time.monotonic()

    def wall(self) -> float:
        """Return seconds since the epoch."""
        return time.time()

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        """Call back from the running event loop when `time()` reaches `when`."""
        delay = when - time.monotonic()
        return asyncio.get_running_loop().call_later(delay + ROUNDING if delay > 0 else 0, callback)

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


async def sleep(clock: Clock, delay: float) -> None:
    """Sleep that many seconds of a clock."""
    over = asyncio.Event()
    timer = clock.call_at(clock.time() + delay, over.set)
    try:
        await over.wait()
    finally:
        timer.cancel()
