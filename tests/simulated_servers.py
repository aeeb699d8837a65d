"""Simulated servers of many kinds, and a batch of lookups against one of them in simulated time.

The batch sends requests as the engine does, but without sockets, tasks or a loop. This makes hundreds of runs with
different seeds affordable, and their results depend only on the rules in `_lookup/health.py`.
"""

import heapq
import math
from collections import deque
from collections.abc import Callable
from random import Random
from typing import NamedTuple, TypeAlias

from kaizen_async import AuthenticationError, KaizenError, RateLimitError, RetryPolicy, StatusError
from kaizen_async._bulk import MOST_IN_BACK_OFF
from kaizen_async._lookup.health import Health
from kaizen_async._lookup.lookup import EXCUSED_PER_RETRY
from kaizen_async._lookup.retry import longest_backoff

Server: TypeAlias = Callable[[float, Random], tuple[float, KaizenError | None]]
"""A function of the time that returns the duration of a response and its error, if there is one."""


def rejection(retry_after: float | None = None) -> RateLimitError:
    """Return the error of a 429."""
    return RateLimitError("rejected", status=429, retry_after=retry_after, retryable=True)


def failure(status: int = 502) -> StatusError:
    """Return the error of a server that does not work."""
    return StatusError("failing", status=status, retryable=True)


def refusal() -> AuthenticationError:
    """Return the error of a key that is refused."""
    return AuthenticationError("refused", status=401)


def token_bucket(
    rate: float, burst: int, error: Callable[[], KaizenError] = rejection, latency: float = 0.005
) -> Server:
    """Return a server that accepts a burst and then a number of requests per second."""
    tokens, filled = float(burst), 0.0

    def respond(now: float, _: Random) -> tuple[float, KaizenError | None]:
        nonlocal tokens, filled
        tokens, filled = min(burst, tokens + (now - filled) * rate), now
        if tokens < 1:
            return latency, error()
        tokens -= 1
        return latency, None

    return respond


def fixed_window(limit: int, seconds: float) -> Server:
    """Return a server that accepts a number of requests per window and names its remaining whole seconds."""
    accepted: dict[int, int] = {}

    def respond(now: float, _: Random) -> tuple[float, KaizenError | None]:
        window = int(now / seconds)
        accepted[window] = accepted.get(window, 0) + 1
        return 0.005, None if accepted[window] <= limit else rejection(math.ceil((window + 1) * seconds - now))

    return respond


def sliding_window(limit: int) -> Server:
    """Return a server that counts the requests of the last second, rejected ones too, as haproxy's http_req_rate."""
    counts: dict[int, int] = {}

    def respond(now: float, _: Random) -> tuple[float, KaizenError | None]:
        second = int(now)
        counts[second] = counts.get(second, 0) + 1
        rate = counts[second] + counts.get(second - 1, 0) * (1 - (now - second))
        return 0.005, None if rate <= limit else rejection()

    return respond


def limited_concurrency(
    limit: int, latency: float, spread: float = 0.0, error: Callable[[], KaizenError] = rejection
) -> Server:
    """Return a server that rejects requests above its number of slots at once."""
    busy: list[float] = []

    def respond(now: float, random: Random) -> tuple[float, KaizenError | None]:
        busy[:] = [until for until in busy if until > now]
        if len(busy) >= limit:
            return 0.002, error()
        took = latency * random.uniform(1 - spread, 1 + spread)
        busy.append(now + took)
        return took, None

    return respond


def by_chance(
    share: float, error: Callable[[], KaizenError], latency: float = 0.02, error_latency: float | None = None
) -> Server:
    """Return a server that fails a share of the requests, whatever the client does."""

    def respond(_: float, random: Random) -> tuple[float, KaizenError | None]:
        if random.random() < share:
            return latency if error_latency is None else error_latency, error()
        return latency, None

    return respond


def outage(begin: float, end: float, latency: float = 0.05, error_latency: float = 0.03) -> Server:
    """Return a server that fails for a while."""
    return lambda now, _: (error_latency, failure()) if begin <= now < end else (latency, None)


def in_turn(*servers: tuple[float, Server]) -> Server:
    """Return a server that behaves like another one after each given time."""

    def respond(now: float, random: Random) -> tuple[float, KaizenError | None]:
        return next(server for until, server in servers if now < until)(now, random)

    return respond


class Result(NamedTuple):
    """The result of a batch.

    Attributes:
        sent: The time of each request.
        reports: The reports of the server's health, with their times.
    """

    found: int
    lost: int
    seconds: float
    sent: list[float]
    rejected: int
    reports: list[tuple[float, object]]


class Batch:
    """Lookups of one client.

    Args:
        server: Responds to them.
        count: How many.
        gathered: Whether all begin at once, as with many tasks; else no more than are in flight or resting.
        concurrency: Requests in flight, at most.
        deadline: Seconds for each, and for an outage.
        jitter: Share by which latencies vary.
        seed: Of all that is random.
    """

    def __init__(
        self,
        server: Server,
        count: int,
        *,
        gathered: bool = False,
        concurrency: int = 50,
        deadline: float = 60.0,
        jitter: float = 0.2,
        seed: int = 0,
    ) -> None:
        self.now = 0.0
        self._random = Random(seed)
        self._reports: list[tuple[float, object]] = []
        self.health = Health(
            lambda: self.now,
            self._random,
            concurrency=concurrency,
            deadline=deadline,
            report=lambda event: self._reports.append((self.now, event)),
        )
        self._server = server
        self._concurrency = concurrency
        self._deadline = deadline
        self._jitter = jitter
        self._policy = RetryPolicy()
        self._fresh = deque(range(count))
        self._queue: deque[int] = deque()
        self._most_active = count if gathered else concurrency
        self._active = self._resting = 0
        self._spent = [0] * count
        self._excused = [0] * count
        self._started = [0.0] * count
        self._found: list[float] = []
        self._lost: list[float] = []
        self._sent: list[float] = []
        self._rejected = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0
        self._wakes_at = math.inf

    def run(self) -> Result:
        """Let time pass until all lookups have ended."""
        self._send()
        while self._events:
            self.now, _, happen = heapq.heappop(self._events)
            happen()
            self._send()
        seconds = max(self._found + self._lost)
        return Result(len(self._found), len(self._lost), seconds, self._sent, self._rejected, self._reports)

    def _at(self, moment: float, happen: Callable[[], None]) -> None:
        self._serial += 1
        heapq.heappush(self._events, (moment, self._serial, happen))

    def _send(self) -> None:
        while self.health.in_flight < self._concurrency:
            allowed = self._most_active + min(self._resting, MOST_IN_BACK_OFF * self._concurrency)
            while self._fresh and self._active < allowed and len(self._queue) < self._concurrency:
                self._begin(self._fresh.popleft())
            delay = self.health.delay() if self.health.engaged else 0.0
            if self.health.ends_in() <= 0 and delay > 0:
                self._end_unsent()
            if not self._queue:
                return
            if delay > 0:
                self._wake_at(self.now + min(delay, max(self.health.ends_in(), 0.0)))
                return
            lookup = self._queue.popleft()
            if self.now - self._started[lookup] > self._deadline:
                self._end(self._lost)
                continue
            number = self.health.send()
            self._sent.append(self.now)
            latency, error = self._server(self.now, self._random)
            took = latency * (1 + self._jitter * self._random.random())
            self._at(
                self.now + took, lambda lookup=lookup, number=number, error=error: self._respond(lookup, number, error)
            )

    def _begin(self, lookup: int) -> None:
        self._started[lookup] = self.now
        self.health.lookups += 1
        self._active += 1
        self._queue.append(lookup)

    def _wake_at(self, moment: float) -> None:
        if moment < self._wakes_at - 1e-9 or self._wakes_at <= self.now:
            self._wakes_at = moment
            if moment < math.inf:
                self._at(moment + 1e-9, lambda: None)

    def _end_unsent(self) -> None:
        for _ in range(len(self._queue) + len(self._fresh)):
            self._lost.append(self.now)
        self._queue.clear()
        self._fresh.clear()

    def _end(self, ended: list[float]) -> None:
        ended.append(self.now)
        self._active -= 1
        self.health.ended += 1

    def _respond(self, lookup: int, number: int, error: KaizenError | None) -> None:
        if error is None:
            self.health.accepted(number)
            self._end(self._found)
            return
        self._rejected += 1
        self.health.failed(number, error, lookup)
        in_pause = self.health.pause is not None
        most_excused = EXCUSED_PER_RETRY * (self._policy.max_attempts - 1)
        if isinstance(error, RateLimitError) and not in_pause and self._excused[lookup] < most_excused:
            self._excused[lookup] += 1
        elif not self.health.is_blamed(error):
            self._spent[lookup] += 1
        is_final = not error.retryable and not self.health.is_confirming(error)
        is_spent = self._spent[lookup] >= self._policy.max_attempts and not self.health.is_blamed(error)
        is_over = not in_pause and not isinstance(error, RateLimitError) and not (is_final or self.health.may_retry())
        if is_final or is_spent or is_over:
            self._end(self._lost)
            return
        ceiling = longest_backoff(self._policy, self._spent[lookup])
        asked = error.retry_after if isinstance(error, StatusError) else None
        wait = 0.0 if in_pause else max(asked or 0.0, self._random.uniform(0, ceiling))
        self._resting += 1
        self._at(self.now + wait, lambda: self._return(lookup))

    def _return(self, lookup: int) -> None:
        self._resting -= 1
        self._queue.append(lookup)
