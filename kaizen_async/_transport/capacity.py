"""How many connections an address allows, learned from those that it refuses.

A process that may not open more files, a machine without free ports, or a server that accepts ten connections from one
client is not down: the connections that are open work. So a lookup that cannot have one of its own waits for one of
these, and from time to time one more is tried.

A server that resets a part of all requests is something else. It ends connections that have served responses too, and
new ones however few there are. When such failures come often, no limit is learned from resets.
"""

import asyncio
import logging
from collections import deque
from typing import Final

from kaizen_async._transport.failures import LOCAL_SHORTAGES, shortage

log = logging.getLogger("kaizen_async")

_FIRST_PROBE: Final = 0.1
_LONGEST_PROBE: Final = 10.0
"""Seconds after which a connection beyond the known limit is tried: the first time, and at most."""
_SETTLING_SECONDS: Final = 0.25
"""Seconds after the first refusal until which the number of connections that work has shown itself."""
_SHORTEST_TIMER: Final = 0.01
_FEWEST_RESPONSES: Final = 10
"""Responses between two failures that no limit explains, on average, from which on a limit may explain the others."""
_MOST_RESPONSES: Final = 100
"""Responses without such a failure after which the ones before are forgotten."""


class NoConnectionError(Exception):
    """Raised when a connection cannot be opened, or ended at once, while others work. `room` waits for these.

    Attributes:
        failure: What happened. It is the result of the attempt if no connection is left that works.
        was_sent: Whether the request was sent on the connection before it ended.
    """

    def __init__(self, failure: Exception, *, was_sent: bool = False) -> None:
        super().__init__()
        self.failure = failure
        self.was_sent = was_sent


class Capacity:
    """Counts the connections to one address, and lets lookups wait for one of them when there cannot be more.

    Attributes:
        open: Connections that are open or being opened.
        most: How many the address was seen to allow; None if it has not refused one.
        responses: Responses read so far.
        waiters: What lookups wait for that need a connection.
    """

    __slots__ = (
        "_gap",
        "_growth",
        "_has_warned",
        "_loop",
        "_probe_at",
        "_probe_delay",
        "_responses_before",
        "_shortage",
        "_timer",
        "most",
        "open",
        "responses",
        "waiters",
    )

    def __init__(self) -> None:
        self.open = 0
        self.most: int | None = None
        self.responses = 0
        self._responses_before = 0
        self._gap: float = _MOST_RESPONSES
        self._shortage: int | None = None
        self._loop = asyncio.get_running_loop()
        self._growth = 1
        self._has_warned = False
        self._probe_at = 0.0
        self._probe_delay = _FIRST_PROBE
        self._timer: asyncio.TimerHandle | None = None
        self.waiters: deque[asyncio.Future[bool]] = deque()

    def add(self) -> bool:
        """Count a connection that is going to be opened; return whether the address is known to allow that many.

        Raises:
            NoConnectionError: There cannot be another one now.
        """
        is_expected = self.most is not None and self.open < self.most
        if self.most is not None and not is_expected:
            if self._loop.time() < self._probe_at:
                raise NoConnectionError(OSError("no more connections can be opened"))
            self._probe_at = self._loop.time() + self._probe_delay
        self.open += 1
        return is_expected

    def works(self) -> None:
        """Note the first response on a connection: if it was one more, try more of them, twice as many each time."""
        if self.most is not None and self.open > self.most:
            self.most = self.open + self._growth
            self._growth *= 2
            self._probe_delay = _FIRST_PROBE
            for _ in range(self._growth):
                self.wake()

    def remove(self, *, works: bool = False) -> None:
        """Stop counting a connection.

        Args:
            works: Whether its last response was read to the end. Otherwise, if it was the last connection, a lookup
                that waits has nothing to wait for.
        """
        self.open -= 1
        if self.open or works:
            for _ in range(max(1, (self.most or 0) - self.open)):
                self.wake()
            return
        self.most = None
        while self.waiters:
            self._end(self.waiters.popleft(), has_room=False)

    def refused(self, error: Exception, *, is_expected: bool, was_sent: bool = False) -> None:
        """Learn from a connection that could not be opened, or ended before its first response.

        Args:
            error: How it ended.
            is_expected: What `add` returned for it.
            was_sent: Whether a request was sent on it.

        Raises:
            NoConnectionError: Others are open, and a limit explains the failure.
        """
        if not self.open:
            return
        number = shortage(error)
        if number is None:
            if is_expected:
                self.failed()
            if not self._may_be_limit():
                return
        if self.most is None:
            self.most = self.open
            self._probe_delay = _FIRST_PROBE
            if not self._has_warned:
                self._has_warned = True
                self._loop.call_later(_SETTLING_SECONDS, self._warn)
        else:
            self.most = min(self.most, self.open)
            if not is_expected:
                self._probe_delay = min(2 * self._probe_delay, _LONGEST_PROBE)
        self._shortage = number
        self._growth = 1
        self._probe_at = self._loop.time() + self._probe_delay
        raise NoConnectionError(error, was_sent=was_sent)

    def failed(self) -> None:
        """Note a failure that no limit explains: of a connection that had worked, or was one of few."""
        gap = self.responses - self._responses_before
        if not gap:
            return  # nothing works, so all this is one failure: the server restarts
        self._responses_before = self.responses
        self._gap = (self._gap + min(gap, _MOST_RESPONSES)) / 2
        if self.most is not None and self._shortage is None and not self._may_be_limit():
            self.most = None
            for _ in range(len(self.waiters)):
                self.wake()

    def _may_be_limit(self) -> bool:
        return self._gap >= _FEWEST_RESPONSES or self.responses - self._responses_before >= _MOST_RESPONSES

    def wake(self) -> None:
        """Let the first that waits try again."""
        while self.waiters:
            if self._end(self.waiters.popleft(), has_room=True):
                return

    async def room(self) -> bool:
        """Wait until a connection may be free; return False if none is left that works."""
        if self.most is None:
            return self.open > 0
        waiter: asyncio.Future[bool] = self._loop.create_future()
        self.waiters.append(waiter)
        self._watch()
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter in self.waiters:
                self.waiters.remove(waiter)
            elif not waiter.cancelled():
                self.wake()  # the turn of this one goes to the next
            raise

    def close(self) -> None:
        """End the timer."""
        if self._timer is not None:
            self._timer.cancel()

    @staticmethod
    def _end(waiter: asyncio.Future[bool], *, has_room: bool) -> bool:
        if waiter.done():
            return False
        waiter.set_result(has_room)
        return True

    def _watch(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_at(max(self._probe_at, self._loop.time() + _SHORTEST_TIMER), self._probe)

    def _probe(self) -> None:
        """Let one that waits try whether there can be one more by now."""
        self._timer = None
        self.wake()
        if self.waiters:
            self._watch()

    def _warn(self) -> None:
        if self.most is None or self.open < self.most or not self.responses:
            self._has_warned = False
            return
        advice = (
            "the server, or something on the way to it, refuses more of them from this address; "
            "raise that limit, or set concurrency to this number"
            if self._shortage is None
            else LOCAL_SHORTAGES[self._shortage]
        )
        log.warning("only %d connections can be open at once, so lookups wait for one of them: %s", self.most, advice)
