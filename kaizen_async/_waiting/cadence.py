"""When to look at a running execution again: rarely while it will hardly end, often when it is likely to.

The question is an old one, from the inspection of machines that fail unseen: when to check, if each check costs and so
does each moment that a failure stays unnoticed (R. E. Barlow, L. C. Hunter, F. Proschan, "Optimum checking
procedures", J. SIAM 11, 1963). J. B. Keller ("Optimum checking schedules for systems subject to random failure",
Management Science 21, 1974) describes a schedule by its density n(t), checks per second at age t. Let h(t) be the
hazard: the chance per second of ending at age t, for what is still running. A check interval g = 1/n then finds an end
g/2 late on average, and for a given mean lag the fewest checks are spent where h(t) * g**2 / 2 is the same at every
age. If lag counts as a share of the duration, it is h(t) * g**2 / (2 * t).

The plain rule
    Without history the interval is twice the aim: 2 * lag_share * age, or 2 * lag_seconds. An end falls in the
    middle of an interval on average, so the mean lag meets the aim whatever the durations are. A growing interval
    takes O(log duration) polls.

Learning
    Per workflow, a histogram of the durations seen, over their logarithm. Every end takes 1 % off the weight of those
    before it, so a typical duration that shifts is followed. The hazard in a bin is the rate of a life table, ends over
    executions at risk, smoothed over neighbouring bins. A prior worth a quarter of an execution rules where little or
    nothing was seen: for new workflows, and for executions that outlive all before them. Its hazard is 1/(2t): one in
    two of those that run at age t still runs at 4t.

The aim
    The hazards give the schedules their shape, one factor common to all workflows gives them their pace. Every end
    shows what mean lag the factor 1 would have meant at its duration; the factor is the aim over the mean of that. So
    the mean lag over all executions meets the aim also where the hazards are poorly known. With `lag_share` it comes
    out much the same for each workflow; with `lag_seconds` short executions are noticed sooner and long ones later,
    which takes fewer polls than the same lag for each.

The limits
    Only ended executions teach. Where all start at one moment, the short ones end first and tell little of the others,
    so history saves less; and while long ones have yet to end, the mean with `lag_seconds` is up to a fifth above the
    aim.

The guarantee
    Whatever was learned, an interval is at least LOWEST and at most HIGHEST times that of the plain rule, for a
    workflow without history at most HIGHEST_UNKNOWN times (the spread aside), and within the policy's bounds. So where
    the plain rule makes n polls, a misleading history makes at most 2n + 1, and no end waits for its poll longer than 6
    times the plain interval at that age. Proof: the plain interval b(t) never falls with age. From any age t >= p on,
    two learned intervals cover b(t)/2 + b(t)/2 >= b(p); hence, by induction, the learned poll number 2i is never before
    the plain poll number i. The last interval before an end at age T starts before T, so it is at most 6 * b(T).

None of the constants is critical: on random mixes of workflows, half or double of each changed the polls at equal lag
by a few per cent.
"""

import math
from bisect import bisect_right
from itertools import accumulate
from random import Random
from typing import Annotated, Any, Final, Literal

import msgspec

from kaizen_async.config import PollPolicy

LOWEST: Final = 0.5
"""Least interval, as a multiple of the plain rule's."""
HIGHEST: Final = 6.0
"""Greatest interval, as a multiple of the plain rule's."""
HIGHEST_UNKNOWN: Final = 2.0
"""The same for a workflow of which nothing is known."""
MEMORY: Final = 100
"""Ends that a history remembers, roughly: each end leaves 1 - 1/MEMORY of the weight of those before it."""
MAX_WORKFLOWS: Final = 1000
"""Workflows remembered. Beyond that, the one that has gone longest without an end is forgotten."""
STALE: Final = 0.02
"""Share of new ends in a history from which its schedule is drawn up anew."""

_PRIOR_WEIGHT: Final = 0.25
_PRIOR_HAZARD: Final = 0.5
_START: Final = math.log(0.01)
_WIDTH: Final = 0.2
_BINS: Final = 100
_AGES: Final = [math.exp(_START + (index + 0.5) * _WIDTH) for index in range(_BINS)]
_LEAST_WEIGHT: Final = 1e-4

_Bin = Annotated[int, msgspec.Meta(ge=0, lt=_BINS)]
_Weight = Annotated[float, msgspec.Meta(gt=0, le=MEMORY)]


class _History:
    """What the ends of one workflow taught, and the schedule drawn up from it."""

    __slots__ = ("ended", "schedule", "unused", "weight")

    def __init__(self, schedule: list[float]) -> None:
        self.ended = [0.0] * _BINS
        self.weight = 0.0
        self.unused = 0.0
        self.schedule = schedule


class _State(msgspec.Struct):
    aim: Literal["share", "seconds"]
    unit_lag: Annotated[float, msgspec.Meta(ge=0)]
    ends: Annotated[int, msgspec.Meta(ge=0, le=MEMORY)]
    workflows: dict[str, list[tuple[_Bin, _Weight]]]


class Cadence:
    """Intervals between polls under one policy, learned from the ends that it is told of.

    Ages and durations must count from the same moment. The same calls with the same `random` give the same intervals.
    """

    def __init__(self, policy: PollPolicy, random: Random) -> None:
        self._policy = policy
        self._random = random
        self._kind: Literal["share", "seconds"] = "share" if policy.lag_seconds is None else "seconds"
        self._aim = policy.lag_share if policy.lag_seconds is None else policy.lag_seconds
        self._unit_lag = 0.0
        self._ends = 0
        self._histories: dict[str, _History] = {}
        self._unknown = _History(self._draw_up([0.0] * _BINS))

    def next_delay(self, age: float, workflow_id: str | None) -> float:
        """Return the seconds until the next poll of an execution that was still running at that age."""
        policy = self._policy
        interval = plain = self._plain_interval(age)
        if self._unit_lag:
            history = self._unknown if workflow_id is None else self._histories.get(workflow_id, self._unknown)
            highest = HIGHEST if history.weight else HIGHEST_UNKNOWN
            interval = min(max(self._learned_interval(age, history), LOWEST * plain), highest * plain)
            interval = min(max(interval, policy.min_interval), policy.max_interval)
        low = max(interval * (1 - policy.spread), policy.min_interval)
        high = min(interval * (1 + policy.spread), policy.max_interval)
        return low + (high - low) * self._random.random()

    def learn(self, workflow_id: str, duration: float) -> None:
        """Note that an execution of a workflow ended after that many seconds.

        A duration that is not a finite number above 0 teaches nothing: clocks of servers may run backwards.
        """
        if not self._policy.learn or not 0 < duration < math.inf:
            return
        history = self._histories.pop(workflow_id, None) or _History(self._unknown.schedule)
        self._remember(workflow_id, history)
        # Before the end is counted, so that no execution is judged by a schedule that knows it.
        self._calibrate(self._schedule(history), duration)
        kept = 1 - 1 / MEMORY
        history.ended = [weight * kept for weight in history.ended]
        history.ended[_bin_of(duration)] += 1
        history.weight = history.weight * kept + 1
        history.unused += 1

    def state(self) -> dict[str, Any]:
        """Return what was learned, as plain JSON-able values."""
        return {
            "aim": self._kind,
            "unit_lag": self._unit_lag,
            "ends": self._ends,
            "workflows": {
                workflow_id: [
                    [index, round(weight, 4)] for index, weight in enumerate(history.ended) if weight >= _LEAST_WEIGHT
                ]
                for workflow_id, history in self._histories.items()
            },
        }

    def restore(self, state: object) -> None:
        """Add what a `state()`, which may stem from another policy, tells of workflows that are not known here.

        Raises:
            ValueError: That is not such a state. What was learned before stays.
        """
        try:
            restored = msgspec.convert(state, _State)
        except (msgspec.ValidationError, RecursionError) as error:
            raise ValueError(f"not a valid checkpoint of what was learned: {error}") from None
        if restored.aim == self._kind and not self._ends:
            self._unit_lag, self._ends = restored.unit_lag, restored.ends
        for workflow_id, bins in restored.workflows.items():
            if workflow_id in self._histories:
                continue
            history = _History(self._unknown.schedule)
            for index, weight in bins:
                history.ended[index] = weight
            history.weight = history.unused = sum(history.ended)
            self._remember(workflow_id, history)

    def _plain_interval(self, age: float) -> float:
        interval = 2 * self._aim * (age if self._kind == "share" else 1)
        return min(max(interval, self._policy.min_interval), self._policy.max_interval)

    def _learned_interval(self, age: float, history: _History) -> float:
        """Return the time until the schedule asks for one poll more than up to this age."""
        schedule = self._schedule(history)
        age = max(age, self._policy.min_interval)
        place = min(max((math.log(age) - _START) / _WIDTH, 0.0), _BINS - 1.0)
        index = int(place)
        polls = schedule[index] + (schedule[index + 1] - schedule[index]) * (place - index)
        polls += self._aim / self._unit_lag
        index = bisect_right(schedule, polls)
        if index > _BINS:
            return math.inf
        place = index - 1 + (polls - schedule[index - 1]) / (schedule[index] - schedule[index - 1])
        return math.exp(_START + place * _WIDTH) - age

    def _remember(self, workflow_id: str, history: _History) -> None:
        self._histories[workflow_id] = history
        if len(self._histories) > MAX_WORKFLOWS:
            del self._histories[next(iter(self._histories))]

    def _calibrate(self, schedule: list[float], duration: float) -> None:
        """Count an end in the mean of the lags that the schedules would give with the factor 1."""
        index = _bin_of(duration)
        lag = _WIDTH / (schedule[index + 1] - schedule[index]) / 2
        if self._kind == "seconds":
            lag *= duration
        self._ends = min(self._ends + 1, MEMORY)
        self._unit_lag += (lag - self._unit_lag) / self._ends

    def _schedule(self, history: _History) -> list[float]:
        """Return the number of polls up to the lower edge of each bin, with the factor 1."""
        if history.unused > STALE * history.weight:
            history.schedule = self._draw_up(history.ended)
            history.unused = 0.0
        return history.schedule

    def _draw_up(self, ended: list[float]) -> list[float]:
        """Sum up n(t) over the ages: per unit of log t it is sqrt(h*t), or sqrt(h*t*t) if lag counts in seconds."""
        scales = [1.0] * _BINS if self._kind == "share" else _AGES
        densities = (math.sqrt(hazard * scale) for hazard, scale in zip(_hazards(ended), scales, strict=True))
        return list(accumulate((density * _WIDTH for density in densities), initial=0.0))


def _bin_of(seconds: float) -> int:
    return min(max(int((math.log(seconds) - _START) / _WIDTH), 0), _BINS - 1)


def _hazards(ended: list[float]) -> list[float]:
    """Return h(t) * t, the hazard per unit of log t, in each bin."""
    smooth = _smooth(ended)
    at_risk = reversed(list(accumulate(reversed(smooth))))
    return [
        (ends / _WIDTH + _PRIOR_WEIGHT * _PRIOR_HAZARD) / (alive + _PRIOR_WEIGHT)
        for ends, alive in zip(smooth, at_risk, strict=True)
    ]


def _smooth(weights: list[float]) -> list[float]:
    """Average each bin with its neighbours, twice."""
    for _ in range(2):
        padded = [0.0, *weights, 0.0]
        weights = [sum(three) / 3 for three in zip(padded, padded[1:], padded[2:], strict=False)]
    return weights
