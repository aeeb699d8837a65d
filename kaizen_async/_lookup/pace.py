"""How fast to send to a server that rejects a part of it: learned from rejections that depend on what the client does.

Two limits can be in force: the rate in requests per second, and the width, the number of requests in flight. Both are
infinite until there is a reason.

- After a pause the rate doubles every `DOUBLING` seconds, or in some times the latency if that is longer: until the
  first rejection comes, requests are sent above the limit. The rejections show how much the server takes.
- Rejections at a constant rate are put to a test: send a little slower than was accepted. A share of rejections that
  vanishes was the edge of a limit, and the slower rate is right. A share that stays is chance: a slower client would be
  rejected as often. So the old rate returns, and that share is ignored from then on.
- A rate that is right grows, slowly at first, so that a limit that was raised is found.
- The width is what was accepted while the rest was rejected at once. It grows while it is all in use, and a rejection
  right after it has grown takes that back.

How much a server takes is read off what it accepted before it rejected. A token bucket of rate r gives, in any s
seconds, its burst and r * s more at most, and exactly that since it was last full. What it gave at first, in t seconds,
is burst + r * t. So r is the largest (accepted in the last s seconds - accepted at first) / (s - t). A fixed window
allows accepted / (time + pause).
"""

import math
from collections import deque
from typing import Final

DOUBLING: Final = 0.15
DOUBLING_LATENCIES: Final = 2.5
"""Seconds in which the rate doubles after a pause, and the least time for it in multiples of the latency."""
BURST_RATE: Final = 2.5
"""Requests per second after a pause of a second or more that the server asked for, for each request that it accepted at
first: its limit has recovered, and allows as many again."""
SEARCH_DOUBLING: Final = 4.0
"""Seconds in which a learned rate doubles that is known to be too low."""
FREE_RATE: Final = 20_000.0
"""Requests per second. A doubling rate above this limits no lookup."""
SLOWEST_RATE: Final = 0.5
"""Requests per second that are always sent."""
SLOWEST_TEST: Final = 20.0
"""Requests per second at which a first test may send: a slower one would take too long."""
CATCH_UP: Final = 0.02
"""Seconds by which sends may lag behind their even spacing and still be made up for: timers are late."""
BELOW: Final = 0.96
"""Share of what was accepted at which a test sends."""
BELOW_ESTIMATE: Final = 0.92
"""The same for what is only estimated: from the short time in which the rate doubled, or before another pause."""
CURVE: Final = 0.008
CURVE_AFTER: Final = 2.5
CURVE_SECONDS: Final = 5.0
FAR_DOUBLING: Final = 2.0
"""A learned rate grows by CURVE * (s + s²) after s seconds: slowly near what is known, and faster with time, in the
manner of CUBIC (RFC 9438). Before it does, some seconds show that it is right. If it has grown for CURVE_SECONDS and
nothing was rejected, it was far too low, and doubles every FAR_DOUBLING seconds from then on."""

SAMPLE: Final = 16
TEST: Final = 40
BETWEEN_SAMPLES: Final = 0.25
"""Seconds after a sample with nothing unusual in it until the next: while some rejections are chance, one would follow
the other, and each costs time."""
SHORTEST_TEST: Final = 0.2
LONGEST_TEST: Final = 1.0
ENOUGH_REJECTED: Final = 20
SHORTEST_SAMPLE: Final = 0.05
"""Requests that tell whether there is anything to test, and that make a test; the seconds that it takes at least and at
most; and the rejections that end it sooner, if most are rejected or some time has passed."""
FEWEST: Final = 10
"""Results from which a share is computed; fewer are noise."""
EXPECTED: Final = 6
"""Rejections that chance must produce in a test of a slower rate, so that their absence is a sign of a limit."""
RETURNED: Final = 0.9
"""Share of the requests of a test whose results must have come: rejections are often quicker than the rest."""
TOLERATED: Final = 0.04
TOLERATED_AT_FIRST: Final = 0.1
"""Share of rejections that costs less than finding out about it: at a learned rate, and before there is one."""
STAYS: Final = 0.4
"""A share of rejections that falls below this part of what it was depends on the rate."""
USUAL: Final = 1.5
"""Factor by which a share that is chance may vary."""
MOST_IGNORED: Final = 0.5
LAST_SENDS: Final = 24
"""Requests whose times tell how fast the client really sends: the width, or the work to do, may allow less."""
FEW_ACCEPTED: Final = 24
"""Accepted requests from which a rate is learned that may be far too low."""
LAST_RESULTS: Final = 12
FEWEST_REJECTED: Final = 3
"""How many rejections among the last results stop the doubling."""
REMEMBERED: Final = 1024
"""Accepted results whose times are remembered."""
LEAST_SECONDS: Final = 0.1
"""Time over which a rate is computed; over less, the latency of responses blurs it."""
LEAST_SAMPLE_SECONDS: Final = 0.01
LEARNED_AFTER: Final = 0.3
LEARNED_FROM: Final = 8
"""Seconds and accepted results from which a pause teaches a rate."""

WIDTH_HOLD: Final = 10
LONGEST_WIDTH_HOLD: Final = 1000
"""Times that the whole width is used before it grows again, once it was too much; and the most, as that doubles."""


class Pace:
    """The rate and the width at which requests are sent."""

    def __init__(self) -> None:
        self._mode = "free"
        self._doubling = DOUBLING
        self._width = math.inf
        self._start = math.inf
        self._since = 0.0
        self._next = -math.inf
        self._is_searching = False
        self._is_sampling = False
        self._samples_at = -math.inf
        self._known = 0.0
        self._burst = 0
        self._burst_seconds = 0.0
        self._accepted_at: deque[float] = deque(maxlen=REMEMBERED)
        self._sent_at: deque[float] = deque(maxlen=LAST_SENDS)
        self._last: deque[bool] = deque(maxlen=LAST_RESULTS)
        # A test: the requests after `_stale` up to `_newest`. Before it, the share `_before` of `_compared` was bad.
        self._stale = 0
        self._newest = math.inf
        self._test_since = self._test_until = 0.0
        self._accepted = self._rejected = 0
        self._before: float | None = None
        self._compared = 0
        self._stayed = 0
        self._ignored = 0.0
        self._width_used = 0
        self._width_hold = 1
        self._has_just_grown = False

    @property
    def is_open(self) -> bool:
        """Whether nobody is held back."""
        return self._mode == "free" and self._width == math.inf

    @property
    def is_free(self) -> bool:
        """Whether nobody is held back, and nothing is being measured."""
        return self.is_open and not self._is_sampling

    @property
    def is_ramping(self) -> bool:
        """Whether the rate doubles after a pause."""
        return self._mode == "ramp"

    def rate(self, now: float) -> float:
        """Return the requests per second allowed now."""
        elapsed = max(0.0, now - self._since)
        if self._mode == "ramp":
            rate = self._start * math.exp2(min(elapsed / self._doubling, 40.0))
            return rate if rate < FREE_RATE else math.inf
        if self._mode == "paced":
            growing = max(0.0, elapsed - CURVE_AFTER)
            if self._is_searching:
                return self._start * math.exp2(min(max(0.0, elapsed - 0.5) / SEARCH_DOUBLING, 40.0))
            slow = min(growing, CURVE_SECONDS)
            return self._start * (1 + CURVE * (slow + slow**2)) * math.exp2(min((growing - slow) / FAR_DOUBLING, 40.0))
        return math.inf

    def delay(self, now: float, in_flight: int) -> float:
        """Return the seconds until a request may be sent; math.inf if one in flight must come back first."""
        if in_flight >= self._width:
            return math.inf
        return 0.0 if self.rate(now) == math.inf else max(0.0, self._next - now)

    def sent(self, now: float) -> None:
        """Take note of a request."""
        self._sent_at.append(now)
        rate = self.rate(now)
        if rate < math.inf:
            self._next = max(self._next, now - CATCH_UP) + 1 / rate

    def note_burst(self, count: int, seconds: float) -> None:
        """Note how many requests the server accepted before its limit applied, and in which time."""
        self._burst, self._burst_seconds = count, seconds

    def learn(self, now: float, pause: float) -> None:
        """Learn, when a pause begins, from the requests that were accepted since the last one.

        Args:
            now: The clock's time.
            pause: Seconds until the first probe.
        """
        if self._mode == "free":
            return
        span = now - self._accepted_at[0] if self._accepted_at else 0.0
        if span > LEARNED_AFTER and len(self._accepted_at) >= LEARNED_FROM:
            window = len(self._accepted_at) / (span + pause)
            self._known = max(window, BELOW_ESTIMATE * min(self._bucket_rate(now), self.rate(now)))
        else:
            self._known *= BELOW_ESTIMATE

    def resume(
        self,
        now: float,
        number: int,
        start: float,
        width: float | None = None,
        *,
        rested: float = 0.0,
        latency: float = 0.0,
    ) -> None:
        """Start again after a pause.

        Args:
            now: The time.
            number: Of the latest request; results of older ones say nothing about the new pace.
            start: Requests per second to begin with.
            width: Requests in flight at most; None after a pause that was not about a limit.
            latency: Seconds that a response takes.
            rested: Seconds in which a limit had time to recover, because the client waited as long as the server asked.
        """
        self._doubling = max(DOUBLING, DOUBLING_LATENCIES * latency)
        self._before, self._stayed = None, 0
        self._is_searching = self._is_sampling = False
        self._accepted_at.clear()
        self._sent_at.clear()
        self._width_used, self._width_hold, self._has_just_grown = 0, 1, False
        if width is None:
            self._known, self._width = 0.0, math.inf
        else:
            self._width = width
        if self._known > start:
            self._go(now, number, "paced", self._known)
        else:
            self._go(now, number, "ramp", max(start, BURST_RATE * self._burst * min(1.0, rested)))
        self._next = now

    def accepted(self, number: int, now: float, sent: int, in_flight: int) -> None:
        """Take note of an accepted request.

        Args:
            number: Of the request.
            now: The time.
            sent: The number of the latest request.
            in_flight: Requests still without a result.
        """
        self._accepted_at.append(now)
        if number <= self._stale:
            return
        self._accepted += number <= self._newest
        self._last.append(False)
        if in_flight + 1 >= self._width:
            self._note_full_width()
        self._judge(now, sent)

    def rejected(self, number: int, now: float, sent: int) -> None:
        """Take note of a rejected request while others are accepted; the arguments are those of `accepted`."""
        if number <= self._stale:
            return
        if self._has_just_grown:
            self._width -= 1
            self._width_hold = min(max(WIDTH_HOLD, 2 * self._width_hold), LONGEST_WIDTH_HOLD)
            self._width_used, self._has_just_grown = 0, False
            self._stale = sent
            return
        if self._mode == "free" and not self._is_sampling:
            if now >= self._samples_at:
                self._is_sampling = True
                self._restart(now, sent)
            return
        self._rejected += number <= self._newest
        self._last.append(True)
        if self._mode != "ramp":
            self._judge(now, sent)
        elif sum(self._last) >= max(FEWEST_REJECTED, LAST_RESULTS * (USUAL * self._ignored + 0.1)):
            rate = self._real_rate(now)
            learned = min(max(self._bucket_rate(now), rate / 4), rate)
            self._is_searching = learned == rate / 4 or len(self._accepted_at) < FEW_ACCEPTED
            self._before, self._compared = sum(self._last) / len(self._last), len(self._last)
            self._go(now, sent, "paced", max(min(SLOWEST_TEST, rate), BELOW_ESTIMATE * learned))

    def _note_full_width(self) -> None:
        self._width_used += 1
        if self._width_used > 2 * self._width:
            self._has_just_grown = False
        if self._width_used >= self._width_hold * self._width:
            self._width_used = 0
            self._width += 1
            self._has_just_grown = True

    def _bucket_rate(self, now: float) -> float:
        """Return the largest rate that a token bucket must have had to accept what it did, 0 if it took too little."""
        taken = len(self._accepted_at)
        return max(
            (
                (taken - index - self._burst)
                / max(now - moment - min(self._burst_seconds, (now - moment) / 2), LEAST_SECONDS)
                for index, moment in enumerate(self._accepted_at)
            ),
            default=0.0,
        )

    def _real_rate(self, now: float) -> float:
        """Return the requests per second that were really sent of late: at most the rate allowed."""
        span = self._sent_at[-1] - self._sent_at[0] if self._sent_at else 0.0
        return min(self.rate(now), len(self._sent_at) / span if span > 0 else math.inf)

    def _go(self, now: float, number: int, mode: str, start: float) -> None:
        start = max(start, SLOWEST_RATE)
        self._mode, self._start, self._since = mode, start, now
        # What was not sent at the rate before is not made up for.
        self._next = min(max(self._next, now), now + 1 / start)
        self._restart(now, number)

    def _restart(self, now: float, number: int) -> None:
        """Begin another test with what is sent from now on."""
        self._stale, self._newest = number, math.inf
        self._test_since = now
        self._accepted = self._rejected = 0
        self._last.clear()

    def _is_known(self, now: float, sent: int) -> bool:
        """Whether enough was sent since the last change, and enough of it has come back, to judge by its share."""
        if self._newest == math.inf:
            least: float = SAMPLE if self._is_sampling and not self._ignored else TEST
            if self._before is not None:
                least = max(least, EXPECTED / self._before)
            tested, elapsed = sent - self._stale, now - self._test_since
            is_enough = tested >= least and elapsed >= SHORTEST_TEST
            is_long = tested >= FEWEST and elapsed >= LONGEST_TEST
            has_enough_rejected = self._rejected >= ENOUGH_REJECTED and (
                elapsed >= SHORTEST_SAMPLE or self._rejected > self._accepted
            )
            if not is_enough and not is_long and not has_enough_rejected:
                return False
            self._newest, self._test_until = sent, now
        count = self._accepted + self._rejected
        return count >= RETURNED * (self._newest - self._stale) or now - self._test_until > LONGEST_TEST

    def _judge(self, now: float, sent: int) -> None:
        """Change the rate if the share of rejections says so."""
        if self._mode == "ramp":
            if self.rate(now) == math.inf:
                self._go(now, sent, "free", math.inf)
            return
        if (self._mode == "free" and not self._is_sampling) or not self._is_known(now, sent):
            return
        count = self._accepted + self._rejected
        share = self._rejected / count
        tolerated = TOLERATED_AT_FIRST if self._is_sampling else TOLERATED
        is_unusual = count >= FEWEST and self._rejected > 1 and share > max(tolerated, USUAL * self._ignored)
        if self._before is not None and count >= FEWEST:
            self._compare(now, sent, share, count, self._before)
        elif is_unusual and self._is_sampling:
            self._before, self._compared = share, count
            self._is_sampling = False
            self._is_searching = share > 1 / 2
            # In less than the time of a response, only what was in flight has been sent. So that time counts.
            took = max(self._test_until - self._test_since, now - self._test_until, LEAST_SAMPLE_SECONDS)
            self._go(now, sent, "paced", max(SLOWEST_TEST, BELOW * self._accepted / took))
        elif is_unusual:
            self._before, self._compared = share, count
            self._is_searching = False
            self._go(now, sent, "paced", BELOW * self._real_rate(now) * (1 - share))
        else:
            self._is_sampling = False
            self._samples_at = now + BETWEEN_SAMPLES
            self._restart(now, sent)

    def _compare(self, now: float, sent: int, share: float, count: int, before: float) -> None:
        """Compare the share of rejections at the slower rate with the share before."""
        if share <= TOLERATED:
            self._before, self._stayed = None, 0
            if self._rejected:
                self._go(now, sent, "paced", BELOW * self._real_rate(now))
            else:
                self._restart(now, sent)
            return
        self._stayed = self._stayed + 1 if share > STAYS * before else 0
        if self._stayed > 1:
            self._before, self._stayed = None, 0
            self._ignored = min(MOST_IGNORED, max(share, before))
            self._go(now, sent, "free", math.inf)
            return
        if self._stayed:
            # What both tests say together is less noisy.
            share = (share * count + before * self._compared) / (count + self._compared)
            count += self._compared
        self._before, self._compared = share, count
        self._is_searching = False
        self._go(now, sent, "paced", BELOW * self._real_rate(now) * (1 - share))
