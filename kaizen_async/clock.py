"""The time that waits live in, so that a test can make three hours pass in a moment."""

import asyncio
import time
from collections.abc import Callable
from random import Random, SystemRandom
from typing import Final, Protocol

ROUNDING: Final = 0.0005
"""Seconds added to a delay. uvloop rounds delays to milliseconds, and a call that comes early comes in vain."""


class Timer(Protocol):
    """A call to come."""

    def cancel(self) -> None:
        """Make it not come."""
        ...


class Clock(Protocol):
    """What the client asks of time when it waits between requests. The requests themselves take real time.

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


async def sleep(clock: Clock, delay: float) -> None:
    """Sleep that many seconds of a clock."""
    over = asyncio.Event()
    timer = clock.call_at(clock.time() + delay, over.set)
    try:
        await over.wait()
    finally:
        timer.cancel()
