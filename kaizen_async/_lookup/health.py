"""What a client knows about the health of the server for one kind of lookup. It decides which requests may be sent.

While the server is healthy, `engaged` is false and lookups need no permission. A lookup takes a number when it sends,
and returns the number with the result. Bad results are judged by when their requests were sent (`evidence.py`):

- A few bad results among good ones concern only the lookups that got them. Rejections among them set the pace
  (`pace.py`).
- A series of bad results that is too long for chance concerns all lookups, so a pause begins. During a pause the client
  sends only probes, one at a time, at growing intervals or after the time that the server named. The first probe that
  succeeds ends the pause. Within two seconds the pace then grows to the earlier one.

A pause has one of three causes:

- The server is *failing*: it refuses or resets connections, times out, or sends 5xx.
- The server *throttles*.
- The server *refuses* the key.

If the server fails or throttles, all waiting lookups get that error without a request once the client's deadline has
passed since the first such result. A time that the server names is waited for once. If the server refuses the key, a
few seconds confirm that. Then all waiting lookups get the refusal without a request. Lookups without a deadline get the
error after `LONGEST_PAUSE`. Whatever the cause, probes continue as long as lookups wait.

This module neither waits nor sends. The engine and the lookups report results to it, and ask it what may be sent.
"""

import copy
import logging
import math
from collections.abc import Callable
from enum import Enum, auto
from random import Random
from typing import Final, Literal, NamedTuple, TypeAlias

from kaizen_async._lookup.evidence import Run
from kaizen_async._lookup.pace import Pace
from kaizen_async._lookup.verdicts import Verdict, is_json_object, verdict
from kaizen_async.errors import (
    DeadlineExceededError,
    DecodeError,
    KaizenError,
    RateLimitError,
    StatusError,
    seconds,
)
from kaizen_async.events import Gated, Hook, OutageBegan, OutageEnded, Ungated

log = logging.getLogger("kaizen_async")

OUTAGE_CHANCE: Final = 1e-6
PAUSE_CHANCE: Final = 1e-8
"""Probability of a run of bad results at which it is no chance any more. A pause that a server asks for lasts longer
than one that a probe can end at once, so it takes better evidence."""
SHORTEST_RUN: Final = 6
LONGEST_RUN: Final = 40
"""Bad results in a row that are always, and never, chance."""
SHORTEST_REJECTED: Final = 4
LONGEST_REJECTED: Final = 30
UNKNOWN: Final = 8
"""Good results without which it is not known how usual bad ones are; and how many rejections in a row decide then."""
MOST_LOOKUPS: Final = 3
"""Different lookups that a run must consist of: one id may fail for ever in a server that works."""

FIRST_PROBE: Final = 0.1
GAP_GROWTH: Final = 1.6
LONGEST_GAP: Final = 0.8
"""Seconds before the first probe, the factor by which they grow, and the most while it is likely to be a restart."""
PATIENT_AFTER: Final = 30.0
PATIENT_GAP: Final = 2.0
REJECTED_GAP: Final = 0.4
"""The most at first if rejections name no time: limits are often per second."""
OVERDUE_PROBE: Final = 1.0
"""Seconds after which a probe without response no longer keeps the next one from being sent."""

CONFIRMATION: Final = 2.0
CONFIRMATIONS: Final = 3
"""Seconds and failed probes after which a key counts as refused."""
LONGEST_PAUSE: Final = 300.0
"""Seconds after which a pause ends lookups that have no deadline, so that every lookup ends."""
LONGEST_DOUBT: Final = 1.0
"""Seconds for which a first rejection may hold back other lookups until it is clear whether it concerns them."""
LEAST_PAUSE: Final = 0.1
"""Seconds of a pause for which the server asked for less: it says 0 when it means less than one."""
YOUNG: Final = 1.0
"""Seconds from the first request on in which what was accepted is taken for the burst that a limit allows."""

START_RATE: Final = 50.0
"""Requests per second after an outage, to begin with."""
START_RATE_LIMITED: Final = 20.0
"""The same after rejections."""
RETRIES_PER_LOOKUP: Final = 0.97
RETRIES_AT_ONCE: Final = 90.0
"""Retries that every lookup adds to the budget, and what is in it at first. While half of the server fails, independent
attempts take 0.94; so the load stays below twice the lookups, and nothing is lost to the budget before."""

SERVICE_UNAVAILABLE: Final = 503
"""Sent by a server that is down, and by nginx when it limits the rate: requests accepted at the same time show it."""

_BAD: Final = {
    Verdict.FAILING: Verdict.FAILING,
    Verdict.GARBLED: Verdict.FAILING,
    Verdict.THROTTLED: Verdict.THROTTLED,
    Verdict.REFUSED: Verdict.REFUSED,
    Verdict.UNUSABLE: Verdict.REFUSED,
}


Condition: TypeAlias = Literal["healthy", "throttled", "refused", "failing"]
STATES: Final[dict[Verdict, Condition]] = {
    Verdict.FAILING: "failing",
    Verdict.THROTTLED: "throttled",
    Verdict.REFUSED: "refused",
}

SEVERITY: Final[tuple[Condition, ...]] = ("healthy", "throttled", "refused", "failing")


class Patience(Enum):
    """What ends a lookup that waits in a pause."""

    CLIENT = auto()
    """The client's deadline, counted from the first failure, or its own deadline if that comes first."""
    ENDLESS = auto()
    """It has no deadline, so `LONGEST_PAUSE` ends it."""
    OWN = auto()
    """Its own deadline, which is later than the client's."""


class State(NamedTuple):
    """A snapshot of the health of the server."""

    condition: Condition
    pace: float | None
    seconds_left: float


class Doubt(NamedTuple):
    """A first rejection. It is not clear yet whether it concerns all lookups."""

    number: int
    error: KaizenError
    since: float


class Pause:
    """A time in which the client sends only probes.

    Attributes:
        cause: FAILING, THROTTLED or REFUSED.
        error: The latest of the errors that say so.
        first: When the first error of any cause came.
        begun: When the pause began, or when its cause became this one.
        asked_until: When the time that the server named is over.
        next_probe: When a probe may be sent.
        run_end: The number of the last request whose result made it begin.
        last_bad: When the last error came that is not a probe's.
        probed_at: When the last probe was sent.
        accepted_late: Requests accepted late that were sent before.
        failed: How many requests failed, from the first on.
        lost: How many lookups ended with such an error.
    """

    def __init__(self, cause: Verdict, error: KaizenError, run: Run, since: float, begun: float) -> None:
        self.cause = cause
        self.error = error
        self._since = {cause: since}
        self.first = since
        self.begun = begun
        self.asked_until = self.next_probe = begun
        self.last_bad = self.probed_at = begun
        self.gap = FIRST_PROBE
        self.lookups = run.lookups
        self.newest_bad = self.run_end = run.numbers[-1]
        self.failed = len(run)
        self.probes: set[int] = set()
        self.failed_probes = 0
        self.lost = 0
        self.accepted_late = 0

    @property
    def since(self) -> float:
        """When the first error of this cause came."""
        return self._since[self.cause]

    def change(self, cause: Verdict, now: float) -> bool:
        """Note that another cause holds everybody back now, and return whether it does so for the first time.

        A server that fails and throttles in turn has failed since the first time, and gets no more probes for it.
        """
        is_new = cause not in self._since
        self._since.setdefault(cause, now)
        self.cause, self.begun, self.failed_probes = cause, now, 0
        if is_new:
            self.gap = FIRST_PROBE
        return is_new

    def is_late(self, now: float) -> bool:
        """Whether a response comes later than those that belong together with the rejections.

        A server that limits how many requests it accepts at a time rejects the others at once, and the responses to
        those accepted come late. From a server that limits the rate they come together.
        """
        return now - self.last_bad > self.last_bad - self.first

    @property
    def is_shared(self) -> bool:
        """Whether it is about more than one lookup, so that none of them need count its failures as its own."""
        return len(self.lookups) > 1

    @property
    def is_limit(self) -> bool:
        """Whether a limit of the server may be behind it, so that what it accepts has to be learned."""
        unavailable = isinstance(self.error, StatusError) and self.error.status == SERVICE_UNAVAILABLE
        return self.cause is Verdict.THROTTLED or unavailable


class Health:
    """The health of the server for one kind of lookup, shared by all event loops of a client.

    Args:
        clock: Returns monotonic seconds.
        random: Spreads probes, so that clients do not come back together.
        url: Where the lookups of this kind go, for events.
        concurrency: Requests in flight, at most.
        deadline: Seconds after which an outage ends lookups that were not sent.
        report: Called with every change.

    Attributes:
        engaged: Whether a lookup must ask for `delay` before it sends.
        sent: Requests sent; the latest has this number.
        lookups: Lookups begun.
        ended: Those of them that have ended.
        url: Where the lookups of this kind go.
        pause: The present pause, if any.
        pace: How fast to send otherwise.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        random: Random,
        *,
        url: str = "",
        concurrency: int = 50,
        deadline: float = math.inf,
        report: Hook = lambda _: None,
    ) -> None:
        self._clock = clock
        self._random = random
        self.url = url
        self._concurrency = concurrency
        self._deadline = deadline
        self._report = report
        self._born = clock()
        self.engaged = False
        self._is_watching = True
        self._first_accepted_at: float | None = None
        self.sent = self._finished = self._accepted = 0
        self.pause: Pause | None = None
        self.pace = Pace()
        self._run = Run()
        self._run_since = 0.0
        self._accepted_before_run = 0
        self._doubt: Doubt | None = None
        self._accepted_in_doubt = 0
        self.lookups = self.ended = self._lookups_counted = 0
        self._budget = RETRIES_AT_ONCE
        self._is_out_of_retries = False

    @property
    def in_flight(self) -> int:
        """Requests without a result."""
        return self.sent - self._finished

    @property
    def accepted_requests(self) -> int:
        """Requests that the server accepted."""
        return self._accepted

    def forget_in_flight(self) -> None:
        """Give up the requests in flight: their event loop ended without their results."""
        self._finished = self.sent
        self.ended = self.lookups
        if self.pause is not None:
            self.pause.probes.clear()

    # What is sent, and what becomes of it.

    def send(self) -> int:
        """Take note of a request that is sent now, and return its number. Every number gets exactly one result."""
        self.sent += 1
        if self.engaged:
            now = self._clock()
            if self.pause is None:
                self.pace.sent(now)
            else:
                probes = self.pause.probes
                probes.add(self.sent)
                self.pause.probed_at = now
                self.pause.next_probe = now + max(OVERDUE_PROBE, self.pause.gap) * (1 if len(probes) < 5 else 2)  # noqa: PLR2004
        return self.sent

    def accepted(self, number: int) -> None:
        """Take note of a response that shows the server at work."""
        self._finished += 1
        self._accepted += 1
        if self._is_watching:
            self._note_accepted(number)

    def failed(self, number: int, error: KaizenError, lookup: object) -> None:
        """Take note of an error.

        Args:
            number: Of the request.
            error: What came in place of a record.
            lookup: Identifies the lookup.
        """
        said = verdict(error)
        cause = _BAD.get(said)
        if cause is None:
            is_api = said is Verdict.NOT_FOUND or (
                isinstance(error, StatusError | DecodeError) and is_json_object(error.body)
            )
            (self.accepted if is_api else self.abandoned)(number)
            return
        self._finished += 1
        now = self._clock()
        if self.pause is None:
            self._note_bad(number, cause, error, lookup, now)
        else:
            self._note_bad_in_pause(self.pause, number, cause, error, lookup, now)

    def abandoned(self, number: int) -> None:
        """Take note that a request ended without saying anything about the server, or was not sent after all."""
        self._finished += 1
        pause = self.pause
        if pause is not None and number in pause.probes:
            pause.probes.discard(number)
            if not pause.probes:
                pause.next_probe = min(pause.next_probe, max(self._clock(), pause.asked_until))

    # What follows for those who want to send.

    def delay(self) -> float:
        """Return the seconds until a lookup may send; math.inf if the result of another must come first."""
        now = self._clock()
        self._resolve_doubt(now)
        if self.pause is not None:
            return max(0.0, self.pause.next_probe - now)
        if self._doubt is not None:
            return self._doubt.since + LONGEST_DOUBT - now
        return self.pace.delay(now, self.in_flight)

    def is_held(self, number: int) -> bool:
        """Whether a request that has its number but is not on its way yet must wait after all: a pause has begun."""
        self._resolve_doubt(self._clock())
        return self.pause is not None and number not in self.pause.probes

    def is_doubtful(self, number: int) -> bool:
        """Whether it is open if the bad result of a request concerns everybody: others in flight will tell."""
        return self.pause is None and number in self._run and self.in_flight > 0

    def is_blamed(self, error: KaizenError) -> bool:
        """Whether an error belongs to a pause for all, rather than to the lookup that got it."""
        return self.pause is not None and self.pause.is_shared and verdict(error) in _BAD

    def is_confirming(self, error: KaizenError) -> bool:
        """Whether an error that would be final is not yet, since a refusal of everything is being confirmed."""
        return self.pause is not None and _BAD.get(verdict(error)) is Verdict.REFUSED and self.ends_in() > 0

    def ends_in(self, patience: Patience = Patience.CLIENT) -> float:
        """Return the seconds until the pause ends lookups unsent, at most 0 if it does so now; math.inf for never."""
        pause = self.pause
        if pause is None:
            return math.inf
        now = self._clock()
        if pause.cause is Verdict.REFUSED:
            left = pause.begun + CONFIRMATION - now
            return left if left > 0 or pause.failed_probes >= CONFIRMATIONS else math.inf
        if patience is Patience.OWN or (not pause.failed_probes and pause.asked_until > pause.begun):
            return math.inf  # the latter: the server named a time, and has not broken its word yet
        if patience is Patience.ENDLESS:
            return pause.first + max(LONGEST_PAUSE, self._deadline if self._deadline < math.inf else 0.0) - now
        return pause.since + self._deadline - now

    def note_lost(self, error: KaizenError) -> None:
        """Take note that a lookup ended with an error."""
        if self.pause is not None and (verdict(error) in _BAD or isinstance(error, DeadlineExceededError)):
            self.pause.lost += 1

    def may_retry(self) -> bool:
        """Return whether the budget allows another retry while a part of the server fails, and charge it."""
        self._earn_retries()
        if self._budget < 1:
            if not self._is_out_of_retries:
                self._is_out_of_retries = self._is_watching = True
                log.warning("many lookups fail: the retry budget is used up, so some lookups are not retried")
            return False
        self._budget -= 1
        return True

    def _earn_retries(self) -> None:
        """Add to the budget for the lookups made since the last time; report if it allows every retry again."""
        earned = RETRIES_PER_LOOKUP * (self.lookups - self._lookups_counted)
        self._lookups_counted = self.lookups
        # No more is kept than at first, except for the lookups in progress: their retries are still to come.
        self._budget = min(RETRIES_AT_ONCE + self.lookups - self.ended, self._budget + earned)
        if self._is_out_of_retries and self._budget >= RETRIES_AT_ONCE / 2:
            self._is_out_of_retries = False
            log.warning("fewer lookups fail: the retry budget allows every retry again")

    @property
    def has_retries_to_spare(self) -> bool:
        """Whether at least half of the first retry budget is left."""
        earned = RETRIES_PER_LOOKUP * (self.lookups - self._lookups_counted)
        return self._budget + earned >= RETRIES_AT_ONCE / 2

    def refusal(self) -> KaizenError:
        """Return the error for a lookup that is not sent because of the pause: the known cause, and since when."""
        pause = self.pause
        assert pause is not None  # noqa: S101 - asked in a pause only
        error = copy.copy(pause.error)
        error.__cause__ = pause.error.__cause__
        error.attempts = 0
        doing = {
            Verdict.FAILING: "failing",
            Verdict.THROTTLED: "rejecting every request",
            Verdict.REFUSED: "refusing every request",
        }[pause.cause]
        error.gave_up = f"the server has been {doing} for {seconds(self._clock() - pause.since)}"
        return error

    def too_long(self, time_left: float) -> RateLimitError | None:
        """Return the error for a lookup with less time left than the server has asked to wait."""
        self._resolve_doubt(self._clock())
        pause = self.pause
        if pause is None or pause.cause is not Verdict.THROTTLED:
            return None
        wait = pause.next_probe - self._clock()
        if wait <= time_left or pause.asked_until <= self._clock():
            return None
        refusal = RateLimitError(
            "not sent: the server asked this client to pause, and it would be the turn of this lookup "
            f"in {seconds(wait)}, which is longer than it may take",
            status=pause.error.status if isinstance(pause.error, StatusError) else 429,
            retry_after=wait,
            retryable=True,
        )
        refusal.next_attempt_in = wait
        return refusal

    def state(self) -> "State":
        """Return a snapshot for statistics."""
        now = self._clock()
        pause = self.pause
        if pause is not None:
            return State(STATES[pause.cause], 0.0, max(0.0, pause.next_probe - now))
        if self.pace.is_open:
            return State("healthy", None, 0.0)
        rate = self.pace.rate(now)
        return State("throttled", None if rate == math.inf else rate, 0.0)

    # How results become a state.

    def _note_accepted(self, number: int) -> None:
        if self._is_out_of_retries:
            self._earn_retries()
        now = self._clock()
        if self._first_accepted_at is None:
            self._first_accepted_at = now
        pause = self.pause
        if pause is not None:
            if number in pause.probes or (number > pause.newest_bad and now >= pause.asked_until):
                self._resume(pause, now)
            elif pause.is_late(now):
                pause.accepted_late += number < pause.run_end
            else:
                self._note_burst(now)
            return
        run = self._run
        if run.numbers:
            run.succeeded(number)
        if self._doubt is not None:
            self._accepted_in_doubt += number > self._doubt.number
            if not run.numbers or self._accepted_in_doubt > 1:
                self._doubt, self._accepted_in_doubt = None, 0
        self.pace.accepted(number, now, self.sent, self.in_flight)
        self._settle()

    def _note_bad(self, number: int, cause: Verdict, error: KaizenError, lookup: object, now: float) -> None:
        run = self._run
        if not run:
            self._run_since = now
        run.note_successes(self._accepted - self._accepted_before_run)
        self._accepted_before_run = self._accepted
        run.add(number, lookup)
        if self._is_no_chance(cause, error, now):
            self._begin(cause, error, now)
            return
        if cause is Verdict.THROTTLED or (isinstance(error, StatusError) and error.status == SERVICE_UNAVAILABLE):
            self.pace.rejected(number, now, self.sent)
        self._settle()

    def _is_no_chance(self, cause: Verdict, error: KaizenError, now: float) -> bool:
        run = self._run
        if cause is not Verdict.THROTTLED:
            least = min(LONGEST_RUN, max(SHORTEST_RUN, run.least(OUTAGE_CHANCE)), max(4, 4 * self._concurrency))
            return len(run.lookups) >= min(MOST_LOOKUPS, max(2, self._concurrency)) and run.is_solid(least)
        is_usual = self._doubt is None and (not self.pace.is_free or (run.successes >= UNKNOWN and not run.is_first))
        if is_usual and len(run.numbers) < SHORTEST_REJECTED:
            return False
        least = min(LONGEST_REJECTED, max(SHORTEST_REJECTED, run.least(PAUSE_CHANCE)))
        if self.pace.is_ramping:
            return run.is_solid(max(UNKNOWN, least))
        if is_usual:
            return run.is_solid(least)
        # A first rejection. Other requests in flight will show whether it concerns all lookups. Until then, send none.
        if run.is_solid(least if run.successes >= UNKNOWN else UNKNOWN) or self.sent - run.numbers[0] + 1 == len(run):
            return True
        if self._doubt is None:
            self._doubt = Doubt(run.numbers[0], error, now)
        return False

    def _resolve_doubt(self, now: float) -> None:
        """Begin a pause if whatever else was in flight stays silent: then all that is known was rejected."""
        if self._doubt is not None and now >= self._doubt.since + LONGEST_DOUBT:
            self._begin(Verdict.THROTTLED, self._doubt.error, self._doubt.since)

    def _begin(self, cause: Verdict, error: KaizenError, now: float) -> None:
        self._doubt, self._accepted_in_doubt = None, 0
        pause = self.pause = Pause(cause, error, self._run, self._run_since, now)
        self._plan_probe(pause, error, now)
        self._note_burst(now)
        self.pace.learn(now, pause.next_probe - now)
        self.engaged = self._is_watching = True
        self._tell(pause, now)

    def _note_burst(self, now: float) -> None:
        """Take what a young client got accepted for the burst that a limit allows."""
        if now - self._born < YOUNG and self._first_accepted_at is not None:
            self.pace.note_burst(self._accepted, now - self._first_accepted_at)

    def _tell(self, pause: Pause, now: float) -> None:
        wait = pause.next_probe - now
        if pause.cause is Verdict.THROTTLED and isinstance(pause.error, StatusError):
            self._report(Gated(pause.error.status, pause.error.retry_after, wait))
        else:
            refused = pause.cause is Verdict.REFUSED
            self._report(OutageBegan(self.url, pause.error, refused, now - pause.since, wait, LONGEST_GAP))

    def _plan_probe(self, pause: Pause, error: KaizenError, now: float) -> None:
        asked = error.retry_after if isinstance(error, StatusError) and verdict(error) is Verdict.THROTTLED else None
        if asked is None:
            pause.next_probe = max(now + pause.gap * self._random.uniform(0.5, 1.0), pause.asked_until)
        elif now + max(asked, LEAST_PAUSE) > pause.asked_until:
            asked = max(asked, LEAST_PAUSE)
            pause.asked_until = now + asked
            pause.next_probe = pause.asked_until + self._random.uniform(0.0, min(asked / 10, 1.0))

    def _note_bad_in_pause(
        self, pause: Pause, number: int, cause: Verdict, error: KaizenError, lookup: object, now: float
    ) -> None:
        pause.newest_bad = max(pause.newest_bad, number)
        pause.failed += 1
        pause.lookups.add(lookup)
        if number not in pause.probes:
            pause.last_bad = now
            if cause is Verdict.THROTTLED and isinstance(error, StatusError) and error.retry_after is not None:
                self._plan_probe(pause, error, now)
            return
        pause.probes.discard(number)
        pause.failed_probes += 1
        pause.error = error
        if cause is not pause.cause:
            # A server that comes back may throttle first, and one that throttles may fail: what it says last counts.
            is_new = pause.change(cause, now)
            self._plan_probe(pause, error, now)
            if is_new:
                self._tell(pause, now)
                return
        longest = REJECTED_GAP if cause is Verdict.THROTTLED else LONGEST_GAP
        pause.gap = min(pause.gap * GAP_GROWTH, longest if now - pause.first < PATIENT_AFTER else PATIENT_GAP)
        self._plan_probe(pause, error, now)

    def _resume(self, pause: Pause, now: float) -> None:
        self.pause = None
        self._run.clear()
        self._accepted_before_run = self._accepted
        latency = now - pause.probed_at
        if pause.is_limit:
            width = pause.accepted_late if pause.accepted_late > 1 else math.inf
            start = START_RATE_LIMITED if width == math.inf else max(START_RATE_LIMITED, 5 * width)
            rested = max(0.0, pause.asked_until - pause.begun)
            self.pace.resume(now, self.sent, start, width, rested=rested, latency=latency)
        else:
            self.pace.resume(now, self.sent, START_RATE, latency=latency)
        self._settle()
        if pause.cause is Verdict.THROTTLED:
            self._report(Ungated(now - pause.begun, pause.failed, pause.lost))
        else:
            self._report(OutageEnded(self.url, now - pause.first, pause.failed, pause.lost))

    def _settle(self) -> None:
        self.engaged = not self.pace.is_open or self._doubt is not None
        self._is_watching = self.engaged or bool(self._run) or not self.pace.is_free or self._is_out_of_retries
