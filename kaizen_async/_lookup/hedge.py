"""Hedging: a request that takes longer than most is sent a second time, and the first good response wins.

A server that is fast on average has slow moments: a full queue, a garbage collection, a lost packet. They rarely hit
the same request twice (Dean and Barroso, "The Tail at Scale", CACM 2013). So a second request, sent only for the
slowest few, removes most of the tail for a few per cent more load.

`Hedging` learns how long requests take, and bounds how many are hedged. `Race` runs the two requests of one attempt.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import copy_context
from typing import Any, Final, Generic, TypeVar

from kaizen_async._lookup.health import Health
from kaizen_async._streams import all_done
from kaizen_async.clock import BLOCKED, SHORTEST_INTERVAL, Clock, Timeout, Timer
from kaizen_async.config import HedgePolicy

T = TypeVar("T")

REMEMBERED: Final = 1000
"""Requests whose times are remembered."""
RELEARN_AFTER: Final = 50
"""Requests after which the quantile is computed again: sorting the times after each one would cost more than it."""
MARGIN: Final = 1.01
"""Factor by which a request must exceed the quantile, so that one of exactly that time is not slow."""
MOST_SAVED: Final = 5.0
"""Second requests that quiet times can save up. More would be a burst when the whole server slows down."""


class Hedging:
    """Decides when a slow request is sent a second time, for all lookups of one path.

    Attributes:
        delay: Seconds after which a request is slow; None until enough requests were seen.
    """

    def __init__(self, policy: HedgePolicy, health: Health) -> None:
        self._policy = policy
        self._health = health
        self._seconds: deque[float] = deque(maxlen=max(REMEMBERED, policy.min_observations))
        self._not_learned = 0
        # The bucket is empty at first, so the share of hedged lookups is below `max_share` at any time.
        self._saved = 0.0
        self.delay: float | None = None

    def observe(self, seconds: float) -> None:
        """Learn from a first request that succeeded, or was aborted because the second one was quicker.

        Of the latter it is only known that it takes longer. That is enough for a quantile below its time.
        """
        self._seconds.append(seconds)
        self._not_learned += 1
        if len(self._seconds) >= self._policy.min_observations and (
            self.delay is None or self._not_learned >= RELEARN_AFTER
        ):
            self._not_learned = 0
            self.delay = max(self._policy.min_delay, self._quantile() * MARGIN)

    def _quantile(self) -> float:
        """Return the quantile, by one standard error less.

        Few requests say little about their slowest part. A delay that is too short wastes some second requests, and
        their number is bounded; one that is too long, because some slow requests came first, would be useless.
        """
        in_order = sorted(self._seconds)
        count, share = len(in_order), self._policy.quantile
        return in_order[max(0, int(share * count - math.sqrt(share * (1 - share) * count)))]

    def earn(self) -> None:
        """Note that a lookup begins."""
        self._saved = min(MOST_SAVED, self._saved + self._policy.max_share)

    def take(self) -> bool:
        """Take a second request out of what was saved; return False if there is none, or the server is not well."""
        if self._saved < 1 or self._health.engaged or not self._health.has_retries_to_spare:
            return False
        self._saved -= 1
        return True

    def give_back(self) -> None:
        """Note that a second request was not sent after all."""
        self._saved = min(MOST_SAVED, self._saved + 1)


class Race(Generic[T]):
    """The requests of one attempt.

    The first runs in the task of the caller, because most lookups need no other. The second has a task of its own.

    Args:
        clock: The time that the delay counts in.
        hedging: Says when the first request is slow, and whether a second may be sent.
        delay: Its delay.
        sent_at: Returns when the first request was sent; None while it is not.
        send_second: Sends the second request, and calls `win` if its response is good.

    Attributes:
        is_second_sent: Whether a second request is on its way.
        winner: The good response to the second request, if it came first.
    """

    def __init__(
        self,
        clock: Clock,
        hedging: Hedging,
        delay: float,
        sent_at: Callable[[], float | None],
        send_second: "Callable[[Race[T]], Coroutine[Any, Any, None]]",
    ) -> None:
        self._clock = clock
        self._hedging = hedging
        self._delay = delay
        self._sent_at = sent_at
        self._send_second = send_second
        self._context = copy_context()
        self._interruption = Timeout(clock, math.inf)
        self._task: asyncio.Task[None] | None = None
        self.is_second_sent = False
        self.winner: T | None = None
        self._set_timer(delay)

    async def run(self, first: Coroutine[Any, Any, T], is_good: Callable[[T], bool]) -> T | None:
        """Return the response to the first request; None if `winner` came while it was in flight.

        If the response to the first is not good, that to the second is waited for. Nothing of a second request is left
        when this returns or raises.
        """
        response: T | None = None
        try:
            async with self._interruption:
                response = await first
                if self._task is not None and self.is_second_sent and not is_good(response):
                    await asyncio.wait({self._task})
        except TimeoutError:
            pass  # that is `win`
        finally:
            self._timer.cancel()
            if self._task is not None:
                self._task.cancel()
                try:
                    await all_done([self._task])
                finally:
                    if not self.is_second_sent:
                        self._hedging.give_back()
        if self._task is not None and not self._task.cancelled():
            self._task.result()  # raises what should not happen
        return response

    def win(self, response: T) -> None:
        """Take the response to the second request, and end the first."""
        self.winner = response
        self._interruption.expire()

    def _set_timer(self, seconds: float) -> None:
        self._due = self._clock.time() + seconds
        self._timer: Timer = self._clock.call_at(self._due, self._on_timer)

    def _on_timer(self) -> None:
        now = self._clock.time()
        sent_at = self._sent_at()
        if now - self._due > BLOCKED:
            self._set_timer(SHORTEST_INTERVAL)  # what arrived while the loop was blocked is read first
        elif sent_at is None or now < sent_at + self._delay:
            self._set_timer(self._delay if sent_at is None else sent_at + self._delay - now)
        elif not self._hedging.take():
            # The slowest requests are still in flight when the next lookup has earned a second one.
            self._set_timer(max(self._delay / 4, SHORTEST_INTERVAL))
        else:
            loop = asyncio.get_running_loop()
            self._task = loop.create_task(self._send_second(self), context=self._context)
