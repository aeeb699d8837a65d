"""One rate limit for the workers of all machines, kept in Redis.

A worker leases permits for the next moments in one call and hands them to its requests, so most requests cost no round
trip. Permits that are not used in time go back. Redis keeps the time, so the clocks of the machines do not matter.
"""

import asyncio
import math
import random
from collections import deque
from contextlib import suppress
from typing import Any, Final

from kaizen_async.events import AttemptEnded, Event, Gated
from kaizen_async.workers.store import Store
from kaizen_async.workers.tasks import end

AHEAD: Final = 0.05
"""Seconds for which permits are leased ahead."""
CATCH_UP: Final = 0.05
"""Seconds of permits that nobody used and that may still be used later, all at once."""
UNUSED: Final = 0.05
"""Seconds after its time at which a permit that is not used goes back."""
APART: Final = 0.01
"""Seconds between two leases of a worker: many permits in one call, not one call for each."""
LOOK_AGAIN: Final = 0.15
"""Seconds after which a worker without a limit looks for a pause again."""
LONGEST_PAUSE: Final = 21_600.0
"""Seconds of a pause that are believed."""
UNNAMED_PAUSE: Final = 1.0
"""Seconds of a pause for which the server named no time."""
CALM: Final = 10.0
"""After a pause for a single throttled request, no other single one causes a pause for this many times as long: if the
pause did not help, the rejections do not depend on what the workers send."""


def require_rate(per_second: object) -> None:
    """Refuse what is neither None nor a number of requests per second.

    Raises:
        TypeError, ValueError: It is not.
    """
    if per_second is None:
        return
    if isinstance(per_second, bool) or not isinstance(per_second, (int, float)):
        raise TypeError(f"per_second must be a number of requests per second, not {per_second!r:.40}")
    if not 0 < per_second < math.inf:
        raise ValueError(f"per_second must be a finite number of requests per second above 0, not {per_second!r:.40}")


class SharedLimit:
    """Keeps what all workers send together below a rate, and holds them all while the server throttles one.

    Give it to a client as its `limiter`, and `notice` as its `on_event`. It belongs to one event loop.

    Args:
        store: Where it is kept; all users of the same namespace share it.
        per_second: Requests a second of all workers together; None for no limit but the server's pauses.

    Raises:
        TypeError, ValueError: `per_second` is not a number above 0.
    """

    def __init__(self, store: Store, per_second: float | None) -> None:
        require_rate(per_second)
        self._store = store
        self._key = f"{store.tag}:rate"
        self._rate = per_second or 0.0
        self._permits: deque[float] = deque()
        self._held_until = -math.inf
        self._free_until = -math.inf
        self._told_until = -math.inf
        self._calm_until = -math.inf
        self._leased_at = -math.inf
        self._waiting = 0
        self._taken = 0
        self._returned = 0
        self._lease: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    async def take_turn(self) -> None:
        """Wait until a request may be sent."""
        if self.take_now():
            return
        self._waiting += 1
        try:
            await self._wait_for_permit()
        finally:
            self._waiting -= 1

    __call__ = take_turn

    def take_now(self) -> bool:
        """Return whether a request may be sent now, and count it if so."""
        now = asyncio.get_running_loop().time()
        if now < self._held_until:
            return False
        if not self._rate:
            if now > self._free_until - LOOK_AGAIN / 2:
                self._begin_lease()
            return now < self._free_until
        permits = self._permits
        if self._waiting or not permits or not now - UNUSED <= permits[0] <= now:
            return False
        permits.popleft()
        self._taken += 1
        if len(permits) <= self._rate * AHEAD / 2:
            self._begin_lease()
        return True

    def put_back(self) -> None:
        """Return the permit that `take_now` took: the request was not sent."""
        self._returned += 1

    async def _wait_for_permit(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wait_out_pause()
            if not self._permits:
                await asyncio.shield(self._begin_lease())
                continue
            at = self._permits.popleft()
            now = loop.time()
            if at < now - UNUSED:
                self._returned += 1
                continue
            if len(self._permits) <= self._rate * AHEAD / 2:
                self._begin_lease()
            try:
                await asyncio.sleep(at - now)
            except BaseException:
                self._permits.appendleft(at)
                raise
            if loop.time() < self._held_until:
                self._returned += 1
                continue
            self._taken += 1
            return

    async def _wait_out_pause(self) -> None:
        now = asyncio.get_running_loop().time()
        if now < self._held_until:
            await asyncio.sleep(self._held_until - now)

    def _begin_lease(self) -> "asyncio.Task[None]":
        if self._lease is None or self._lease.done():
            self._lease = asyncio.ensure_future(self._refill())
        return self._lease

    async def _refill(self) -> None:
        """Lease permits, or wait as long as Redis says that there are none."""
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self._leased_at + APART - loop.time())
        wanted = max(self._waiting - len(self._permits), self._taken, 1)
        returned, self._returned, self._taken = self._returned, 0, 0
        pause, permits, wait, interval = await self._permits_of(wanted, returned)
        now = self._leased_at = loop.time()
        if pause:
            self._hold(min(pause / 1e6, LONGEST_PAUSE))
        if not self._rate:
            self._free_until = now + LOOK_AGAIN
        first = now + wait / 1e6
        self._permits.extend(first + number * interval / 1e6 for number in range(permits))
        if self._rate and permits:
            loop.call_at(self._permits[-1] + UNUSED, self._give_back)
        if not permits and not pause:
            await asyncio.sleep(min(wait / 1e6, 1.0) + random.uniform(0.0, AHEAD / 4))  # noqa: S311 - spreads load

    def _give_back(self) -> None:
        """Return permits whose time is over, unless some wait for them."""
        now = asyncio.get_running_loop().time()
        while self._permits and self._permits[0] < now - UNUSED / 2:
            self._permits.popleft()
            self._returned += 1
        if self._returned and not self._waiting:
            returned, self._returned = self._returned, 0
            self._spawn(self._permits_of(0, returned))

    async def _permits_of(self, wanted: int, returned: int) -> Any:
        limits = (AHEAD, CATCH_UP, LONGEST_PAUSE)
        return await self._store.script("permits", self._key, self._rate, wanted, returned, *limits)

    def _hold(self, seconds: float) -> None:
        until = asyncio.get_running_loop().time() + seconds
        self._held_until = max(self._held_until, until)
        self._calm_until = max(self._calm_until, until + CALM * seconds)

    def notice(self, event: Event) -> None:
        """Let a throttling response to this worker hold all workers."""
        if isinstance(event, Gated):
            self.pause(event.pause)
        elif isinstance(event, AttemptEnded) and event.status == 429:  # noqa: PLR2004 - Too Many Requests
            asked = getattr(event.error, "retry_after", None)
            if asyncio.get_running_loop().time() >= self._calm_until:
                self.pause(UNNAMED_PAUSE if asked is None else asked)

    def pause(self, seconds: float) -> None:
        """Hold all workers for that long, in seconds."""
        seconds = min(seconds, LONGEST_PAUSE)
        until = asyncio.get_running_loop().time() + seconds
        if seconds <= 0 or until <= self._told_until + UNUSED:
            return
        self._told_until = until
        self._hold(seconds)
        self._spawn(self._store.script("pause", self._key, seconds, LONGEST_PAUSE))

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def aclose(self) -> None:
        """Return what was leased and not used."""
        await end(*self._tasks, self._lease)
        unused = self._returned + len(self._permits)
        self._permits.clear()
        if unused and self._rate:
            # The schedule continues in real time: permits that are not returned are lost for a moment only.
            with suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self._permits_of(0, unused)
