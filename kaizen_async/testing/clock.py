"""A clock for tests in which hours of waiting pass in milliseconds."""

import asyncio
import heapq
from collections.abc import Callable
from datetime import UTC, datetime
from random import Random
from typing import Final

IDLE_STEPS: Final = 50
"""Steps of the event loop without a request under way, or a new call to come, after which time jumps: enough for a
result to travel through a few tasks and lead to the next request."""


class VirtualTimer:
    """A call to come in virtual time."""

    __slots__ = ("_callback", "_on_cancel")

    def __init__(self, callback: Callable[[], None], on_cancel: Callable[[], None]) -> None:
        self._callback: Callable[[], None] | None = callback
        self._on_cancel = on_cancel

    @property
    def is_cancelled(self) -> bool:
        """Whether it will not come."""
        return self._callback is None

    def cancel(self) -> None:
        """Make it not come. Something has happened then, which may lead to more before time jumps."""
        self._callback = None
        self._on_cancel()

    def fire(self) -> None:
        """Call back, unless cancelled."""
        if self._callback is not None:
            self._callback()


class VirtualClock:
    """Time that stands still while anything happens, and jumps to the next thing that is due when nothing does.

    Give the same clock to the client and to the emulator:

        clock = VirtualClock()
        async with KaizenEmulator(clock=clock.time, epoch=clock.epoch) as emulator:
            async with KaizenClient(base_url=emulator.base_url, clock=clock) as kaizen:
                await kaizen.instructor_executions.wait("exec_1", deadline=4 * 3600)

    Polls, back-off, the pauses of the gate and the deadlines of waits live in it; requests take the real time that they
    take, and so do their timeouts and the deadlines of look-ups. The scheduler is the real one. What is random in it
    is drawn from the seed, so a test sees the same polls at the same times in every run.

    What else your test awaits in real time (a database, `asyncio.sleep`) does not hold the clock back, unless you call
    `hold()` before and `release()` after it. A clock may be used in one event loop after another; what was to come in
    the one before is forgotten.

    Args:
        seed: What random numbers are drawn from.
        epoch: The date and time at which the clock starts, by default the present.

    Attributes:
        epoch: The same. The emulator takes its own if you give it none, which is a few milliseconds off.
        random: The source of what is random.
    """

    def __init__(self, *, seed: int = 0, epoch: datetime | None = None) -> None:
        if epoch is not None and epoch.tzinfo is None:
            raise ValueError("epoch must carry a time zone: datetime(2026, 1, 1, tzinfo=UTC)")
        self.epoch = epoch or datetime.now(UTC)
        self.random = Random(seed)  # noqa: S311 - spreads polls, guards nothing
        self._now = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timers: list[tuple[float, int, VirtualTimer]] = []
        self._serial = 0
        self._held = 0
        self._watching = False
        self._steps_left = 0

    def time(self) -> float:
        """Return the virtual seconds that have passed."""
        return self._now

    def wall(self) -> float:
        """Return virtual seconds since the epoch of 1970."""
        return self.epoch.timestamp() + self._now

    def call_at(self, when: float, callback: Callable[[], None]) -> VirtualTimer:
        """Call back when `time()` reaches `when`."""
        timer = VirtualTimer(callback, self._restart_countdown)
        loop = self._settle_in()
        if when <= self._now:
            loop.call_soon(timer.fire)
        else:
            self._serial += 1
            heapq.heappush(self._timers, (when, self._serial, timer))
        self._watch(loop)
        return timer

    def _restart_countdown(self) -> None:
        self._steps_left = IDLE_STEPS

    def hold(self) -> None:
        """Stand still until `release`."""
        self._settle_in()
        self._held += 1

    def release(self) -> None:
        """Undo one `hold`."""
        self._held -= 1
        self._watch(self._settle_in())

    def _settle_in(self) -> asyncio.AbstractEventLoop:
        """Return the running loop; if it is another one than before, begin anew."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop = loop
            self._timers.clear()
            self._held = 0
            self._watching = False
        return loop

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        self._restart_countdown()
        if not self._watching and self._timers:
            self._watching = True
            loop.call_soon(self._step, loop)

    def _step(self, loop: asyncio.AbstractEventLoop) -> None:
        self._steps_left -= 1
        if self._held:
            self._watching = False
        elif self._steps_left:
            loop.call_soon(self._step, loop)
        else:
            self._watching = False
            self._jump(loop)

    def _jump(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._timers and self._timers[0][2].is_cancelled:
            heapq.heappop(self._timers)
        if self._timers:
            self._now = self._timers[0][0]
        while self._timers and self._timers[0][0] == self._now:
            loop.call_soon(heapq.heappop(self._timers)[2].fire)
        self._watch(loop)
