"""What keeps one client from hurting the server, or itself: the gate and the retry budget.

The gate: after a throttling answer (429, or 503 with Retry-After) nobody of the client sends before the time that the
server named has passed. Then sends are paced, evenly spaced, at a rate that is learned:

- Nothing known yet: start slowly and double every `RAMP_SECONDS`, as TCP's slow start (RFC 5681) does. The next
  throttling answer shows how much the server takes. It costs one more pause, whatever the limit is.
- Known: start a little below it and follow the cubic curve of CUBIC (RFC 9438; AWS SDKs pace retries with it in
  their adaptive mode): quick at first, flat around the known rate, then probing for more, and at last doubling. A rate
  that is refused before it was probed for more was too high, and is lowered.
- Refused at once, as in an outage: what was known no longer holds; start slowly again.

How much the server takes is read off what it accepted before it refused. A token bucket of rate r gives, in any s
seconds, its burst and r * s more at most, and exactly that since it was last full; so r is the largest (accepted in the
last s seconds - burst) / s. The burst is what it took at once at the very first. Accepted / (time + pause) is what a
fixed window allows, and never too much for a token bucket.

The retry budget is a token bucket in the manner of botocore's standard mode and gRPC's retry throttling.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from random import Random
from typing import Final, TypeGuard

from kaizen_async.errors import KaizenError, StatusError

TOO_MANY_REQUESTS: Final = 429
SERVICE_UNAVAILABLE: Final = 503

RAMP_SECONDS: Final = 0.15
"""Time in which the pace doubles while the server's limit is unknown."""
SAFETY: Final = 0.97
"""Share of the learned rate at which sending resumes."""
PROBE_SECONDS: Final = 10.0
"""Time after which the pace is back at the learned rate; after twice this time it starts doubling."""
PROBE_DOUBLING: Final = 2.0
"""Time in which the pace then doubles: whatever was the limit seems to be gone."""
DECREASE: Final = 0.85
"""Factor for a learned rate that turns out too high before it was probed for more."""
CALM_SECONDS: Final = 30.0
"""Time without throttling after which a pace that holds nobody back is dropped."""
SLOWEST_RATE: Final = 0.5
"""Sends per second that are always tried, as in AWS adaptive mode."""
LEAST_EVIDENCE: Final = 4
"""Answers since the last pause from which a rate is computed; fewer are noise."""
LEAST_SECONDS: Final = 0.1
"""Time over which a burst is counted and a rate computed; over less, the latency of answers blurs them."""
LEAST_PAUSE: Final = 0.1
"""Seconds of a pause for which the server asked for less: it says 0 when it means less than one."""
MOST_ASKED: Final = 21_600.0
"""Seconds of a pause that are believed; urllib3 believes as many. What asks for more is most likely a broken clock, and
nothing would undo it. The look-up that it answers still gets the whole number."""
SHORTEST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 8.0
"""Seconds of the first and the longest pause after a 429 that names no time; it doubles in between."""
RECENT_ANSWERS: Final = 1024
"""Accepted answers whose times are remembered."""


def is_throttling(error: KaizenError) -> TypeGuard[StatusError]:
    """Return whether an answer asks the whole client, not just one look-up, to send less."""
    if not isinstance(error, StatusError):
        return False
    if error.status == TOO_MANY_REQUESTS:
        return True
    return error.status == SERVICE_UNAVAILABLE and error.retry_after is not None


class Gate:
    """Holds back all sends of one client after a throttling answer, and paces what follows.

    A sender waits until `seconds_left` is 0, and no longer if it has less time than `next_in` says. It calls `reserve`,
    waits as long as that says, and sends if the `epoch` is still the same; else it begins again. One that gives up
    calls `give_back`. While nobody is throttled `engaged` is false and senders need not ask.

    Args:
        clock: Returns monotonic seconds.
        random: Spreads the ends of pauses, so that clients throttled together do not come back together.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, random: Random | None = None) -> None:
        self._clock = clock
        self._random = random or Random()  # noqa: S311 - spreads load, guards nothing
        self.engaged = False
        self.epoch = 0
        self.status = 0
        self._closed_at = self._closed_until = -math.inf
        self._is_paused = False
        self._next_send = -math.inf
        self._resumed = clock()
        self._pauses = 0
        self._is_barren = False
        self._burst = 0
        self._first_pause = 0.0
        self._proven_rate = 0.0
        self._learned_rate = 0.0
        self._start_rate = SLOWEST_RATE
        self._accepted = 0
        self._recent: deque[float] = deque(maxlen=RECENT_ANSWERS)

    @property
    def is_barren(self) -> bool:
        """Whether pauses follow each other with hardly an answer accepted in between, as in an outage."""
        return self._is_barren and self._accepted < LEAST_EVIDENCE

    def accepted(self) -> None:
        """Count an answer that did not throttle."""
        now = self._clock()
        if now >= self._closed_until:
            self._accepted += 1
            self._recent.append(now)
        elif self._first_pause:
            self._burst += 1
            self._start_rate = max(self._start_rate, self._burst / self._first_pause)

    def throttled(self, status: int, retry_after: float | None, epoch: int) -> bool:
        """Close the gate for `retry_after` seconds; return whether this began a new pause.

        Args:
            status: The status of the answer.
            retry_after: What the server asked for, or None if it named no time.
            epoch: The gate's epoch when the request was sent. The answers to requests that were under way when the
                gate closed tell nothing new about the rate; they can only make the pause longer.
        """
        now = self._clock()
        self.status = status
        begins = epoch == self.epoch
        if begins:
            self._is_barren = self._accepted < LEAST_EVIDENCE
            self._pauses = self._pauses + 1 if self._is_barren else 1
        pause = self._default_pause() if retry_after is None else min(max(retry_after, LEAST_PAUSE), MOST_ASKED)
        until = now + pause
        if begins:
            self._learn(now, pause)
            until += self._random.uniform(0.0, min(pause / 10, 1.0))
        if begins or until > self._closed_until:
            self._close(now, until)
        return begins

    def reserve(self) -> float:
        """Return the seconds after which the caller may send, and keep that moment free for the caller."""
        now = self._clock()
        at = max(now, self._next_send)
        self._next_send = at + self._gap(at)
        if at == now and now - self._resumed > CALM_SECONDS:
            self._open(now)
        return at - now

    def next_in(self) -> float:
        """Return what `reserve` would."""
        return max(0.0, self._next_send - self._clock())

    def give_back(self, epoch: int, moment: float) -> None:
        """Take back a `reserve` of that epoch. The moments of others stay theirs, so what gets free is a later one."""
        if epoch == self.epoch:
            self._next_send -= self._gap(moment)

    def resumed(self) -> float | None:
        """Return the seconds of a pause that is over to the first sender after it, None to all others."""
        if not self._is_paused:
            return None
        self._is_paused = False
        return self._closed_until - self._closed_at

    def seconds_left(self) -> float:
        """Return the seconds until the pause ends; 0 when there is none."""
        return max(0.0, self._closed_until - self._clock())

    def pace(self) -> float | None:
        """Return the sends per second allowed now, 0 while closed, None while the gate is open."""
        if not self.engaged:
            return None
        now = self._clock()
        return 0.0 if now < self._closed_until else self._rate(now)

    def _close(self, now: float, until: float) -> None:
        if not self._is_paused:
            self._closed_at = now
            self._is_paused = True
        self.engaged = True
        self.epoch += 1
        self._closed_until = self._resumed = self._next_send = until
        self._accepted = 0
        self._recent.clear()

    def _open(self, now: float) -> None:
        self.engaged = False
        self._resumed = now
        self._pauses = 0
        self._accepted = 0
        self._recent.clear()

    def _default_pause(self) -> float:
        return min(LONGEST_PAUSE, SHORTEST_PAUSE * math.ldexp(1.0, min(self._pauses - 1, 10)))

    def _rate(self, at: float) -> float:
        elapsed = max(0.0, at - self._resumed)
        if not self._learned_rate:
            return self._start_rate * math.exp2(min(elapsed / RAMP_SECONDS, 30.0))
        probing = max(0.0, elapsed - 2 * PROBE_SECONDS)
        curve = 1.0 + (1.0 - SAFETY) * (min(elapsed, 2 * PROBE_SECONDS) / PROBE_SECONDS - 1.0) ** 3
        return self._learned_rate * curve * math.exp2(min(probing / PROBE_DOUBLING, 30.0))

    def _gap(self, at: float) -> float:
        """Return the time that one send takes at the pace from then on, which may double meanwhile."""
        rate = self._rate(at)
        if self._learned_rate:
            return 1.0 / rate
        return RAMP_SECONDS * math.log2(1.0 + math.log(2) / (RAMP_SECONDS * rate))

    def _learn(self, now: float, pause: float) -> None:
        if not self.engaged:
            self._burst = sum(moment > now - LEAST_SECONDS for moment in self._recent)
            self._first_pause = max(pause, SHORTEST_PAUSE)
            self._proven_rate = self._bucket_rate(now)
            self._start_rate = max(SLOWEST_RATE, self._burst / self._first_pause, self._proven_rate)
            self._learned_rate = 0.0
            return
        self._first_pause = 0.0
        before = self._learned_rate or self._start_rate
        if self._accepted < LEAST_EVIDENCE:
            self._start_rate = max(SLOWEST_RATE, before / 2)
            self._learned_rate = 0.0
            return
        elapsed = now - self._resumed
        window_rate = self._accepted / (elapsed + pause)
        bucket_rate = min(self._bucket_rate(now), self._rate(now))
        if self._learned_rate and elapsed < PROBE_SECONDS:
            bucket_rate = min(bucket_rate, DECREASE * self._learned_rate)
        self._learned_rate = max(SLOWEST_RATE, window_rate, bucket_rate, before / 2, self._proven_rate)
        self._proven_rate = 0.0

    def _bucket_rate(self, now: float) -> float:
        """Return the largest rate that a token bucket must have had to accept what it did, 0 if it took too little."""
        taken = len(self._recent)
        rates = (
            (taken - index - self._burst) / max(now - moment, LEAST_SECONDS)
            for index, moment in enumerate(self._recent)
        )
        return max(rates, default=0.0)


class RetryBudget:
    """A token bucket that lets single failures be retried and refuses to answer an outage with a storm.

    A retry costs `COST` tokens. An answer that needs no retry (a record, a 404) returns one, and one that came after a
    retry the cost of it: retries that work are free, those that do not may add a fifth to the traffic for ever. Retries
    of throttled look-ups are the gate's to pace and cost nothing, unless nothing is accepted between its pauses: then
    it is an outage by another name.

    A client whose look-ups all fail sends `CAPACITY / COST` retries and then none: under a tenth more than its look-ups
    once there are a thousand. The numbers are botocore's (500 tokens, 5 a retry, 1 or the last cost back), with a tenth
    less capacity for that last bound. Like there, a retry that finds no tokens is not delayed but given up, and the
    error of the attempt is what the caller gets.
    """

    CAPACITY: Final = 450
    COST: Final = 5

    def __init__(self) -> None:
        self.tokens = self.CAPACITY

    def earn(self, *, retried: bool) -> None:
        """Return tokens for an answer that shows the server at work."""
        if self.tokens < self.CAPACITY:
            self.tokens = min(self.CAPACITY, self.tokens + (self.COST if retried else 1))

    def spend(self) -> bool:
        """Take the tokens of a retry; return whether there were enough."""
        if self.tokens < self.COST:
            return False
        self.tokens -= self.COST
        return True
