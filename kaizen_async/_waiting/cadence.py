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
    Per workflow, over the logarithm of the age in bins: how many executions ended, and for how long executions were
    seen running. The hazard in a bin is the one over the other, smoothed over neighbouring bins: the rate of a life
    table. Every poll that finds an execution running counts at once, whether it has ended since or not. So 1,000
    executions that start together teach as well as 1,000 that come one by one: the short ones, which end first, are not
    taken for all.
    Every end takes 1 % off the weight of everything before it, so a typical duration that shifts is followed. A prior
    worth a quarter of an execution rules where little or nothing was seen: for new workflows, and for executions that
    outlive all before them. For a workflow without history its hazard is 1/(2t): one in two of those that run at age t
    still runs at 4t. From one bin to the next the prior goes a quarter of the way back to that from the hazard of the
    bin before, on a logarithmic scale. So where nothing ends at ages that were seen, hardly anything is expected to end
    at the next age, which was not: of 1,000 executions that start together, each shows what is likely for the others.

The aim
    The hazards give the schedules their shape, one factor common to all workflows gives them their pace. Every end
    shows what mean lag the factor 1 would have meant at its duration; the factor is the aim over the mean of that. So
    the mean lag over all executions meets the aim also where the hazards are poorly known. With `lag_share` it comes
    out much the same for each workflow; with `lag_seconds` short executions are noticed sooner and long ones later,
    which takes fewer polls than the same lag for each.

A wrong record
    Counts like a right one, once: a duration beyond the last bin counts as the last bin's, and the lag of one end
    counts at most `MOST_OVER_MEDIAN` times the median. So an execution that says to have run for 57 years, or for 1e308
    milliseconds, changes the pace of the others by a few per cent.

The guarantee
    Whatever was learned, an interval is at least LOWEST and at most HIGHEST_SURE times that of the plain rule (the
    spread aside), and within the policy's bounds. With few ends it is at most HIGHEST times, and at an age at which
    nothing is known of a workflow at most HIGHEST_UNKNOWN times. So where the plain rule makes n polls, a misleading
    history makes at most 2n + 1, and no end waits for its poll longer than 9 times the plain interval at that age.
    Proof: the plain interval b(t) never falls with age. From any age t >= p on, two learned intervals cover b(t)/2 +
    b(t)/2 >= b(p); hence, by induction, the learned poll number 2i is never before the plain poll number i. The last
    interval before an end at age T starts before T, so it is at most 9 * b(T).

None of the constants is critical: on random mixes of workflows, half or double of each changed the polls at equal lag
by a few per cent.
"""

import math
from array import array
from bisect import bisect_right
from collections import deque
from itertools import accumulate
from random import Random
from typing import Annotated, Any, Final

import msgspec

from kaizen_async._waiting.poll_rules import RULES, rule_of
from kaizen_async.config import PollPolicy

LOWEST: Final = 0.5
"""Least interval, as a multiple of the plain rule's."""
HIGHEST_SURE: Final = 9.0
"""Greatest interval, as a multiple of the plain rule's, for a workflow of which many ends were seen."""
SURE: Final = 25.0
"""Ends that are many."""
HIGHEST: Final = 6.0
"""The same for a workflow of which fewer ends were seen."""
HIGHEST_UNKNOWN: Final = 2.0
"""The same at an age at which nothing is known of a workflow."""
KNOWN: Final = 3.0
"""Executions seen running through an age from which on the workflow is known there, even if none has ended."""
MEMORY: Final = 100
"""Ends that a history remembers, roughly: each end leaves 1 - 1/MEMORY of the weight of what was before it."""
MAX_WORKFLOWS: Final = 1000
"""Workflows remembered. Beyond that, the one that has gone longest without an end is forgotten."""
LONGEST_NAME: Final = 200
"""Characters of the id of a workflow that is remembered. A longer one is polled as an unknown workflow is."""
STALE: Final = 0.002
"""Share of new experience in a history from which its schedule is drawn up again. That takes as long as ten polls."""
LAGS: Final = 300
"""Ends from which the common factor is computed. They are more than those of a history: where many executions start
together, the short ones end first, and their lags say little about the long ones."""
PRIOR_LAGS: Final = 3
"""Ends that the prior counts for in the factor."""
MOST_OVER_MEDIAN: Final = 10.0
"""How many times the median lag a single end can count in the mean."""
LONGEST_LAG: Final = 1e7
"""A lag in a checkpoint above this, in seconds or as a share, is not one."""

_PRIOR_WEIGHT: Final = 0.25
_PRIOR_HAZARD: Final = 0.5
_PRIOR_LAG: Final = 0.5 / math.sqrt(_PRIOR_HAZARD)
"""Lag with the factor 1, as a share of the duration, if that hazard is right."""
_REVERSION: Final = 0.25
"""How far the prior of a bin is from the hazard of the bin before, on the way to the prior of an unknown workflow."""
_KEPT: Final = 1 - _REVERSION
_REVERTED: Final = _PRIOR_HAZARD**_REVERSION
_LEAST_HAZARD: Final = 1e-6
_START: Final = math.log(0.01)
_WIDTH: Final = 0.2
_BINS: Final = 100
_AGES: Final = [math.exp(_START + (index + 0.5) * _WIDTH) for index in range(_BINS)]
_LONGEST: Final = _AGES[-1]
_LEAST_WEIGHT: Final = 1e-4
_MOST_WEIGHT: Final = 1e7
_MOST_RESTORED: Final = 1e4
"""Executions seen running through a bin that count from a checkpoint at most. A wrong one is outweighed sooner."""

_Bin = Annotated[int, msgspec.Meta(ge=0, lt=_BINS)]
_Ends = Annotated[float, msgspec.Meta(ge=0, le=MEMORY)]
_Time = Annotated[float, msgspec.Meta(ge=0, le=_MOST_WEIGHT)]
_Lag = Annotated[float, msgspec.Meta(ge=0, le=LONGEST_LAG)]
_Name = Annotated[str, msgspec.Meta(max_length=LONGEST_NAME)]


class _History:
    """What the executions of one workflow taught, and the schedule drawn up from it.

    Attributes:
        ended: Ends in each bin.
        running: How much of each bin executions were seen to live through, in bins.
        weight: Ends in all.
        experience: Ends and bins lived through in all.
        unused: How much of that came after the schedule was drawn up.
    """

    __slots__ = ("ended", "experience", "running", "schedule", "unused", "weight")

    def __init__(self, schedule: list[float]) -> None:
        self.ended = array("d", bytes(8 * _BINS))
        self.running = array("d", bytes(8 * _BINS))
        self.weight = 0.0
        self.experience = 0.0
        self.unused = 0.0
        self.schedule = schedule

    def note(self, experience: float) -> None:
        """Note that something was learned, and how much."""
        self.experience += experience
        self.unused += experience

    def highest(self, age: float) -> float:
        """Return how many times the plain interval an interval from that age on may be."""
        if self.weight >= SURE:
            return HIGHEST_SURE
        return HIGHEST if self.weight or self.running[_bin_of(age)] >= KNOWN else HIGHEST_UNKNOWN


class _State(msgspec.Struct):
    aim: str
    lags: Annotated[list[_Lag], msgspec.Meta(max_length=LAGS)]
    workflows: Annotated[
        dict[_Name, Annotated[list[tuple[_Bin, _Ends, _Time]], msgspec.Meta(max_length=_BINS)]],
        msgspec.Meta(max_length=MAX_WORKFLOWS),
    ]


class Cadence:
    """Intervals between polls under one policy, learned from the executions that are reported to it.

    Ages and durations must count from the same moment. The same calls with the same `random` give the same intervals.
    """

    def __init__(self, policy: PollPolicy, random: Random) -> None:
        self._policy = policy
        self._random = random
        self._rule = rule_of(policy)
        self._scales = [age / self._rule.unit(age) for age in _AGES]
        self._lags: deque[float] = deque(maxlen=LAGS)
        self._prior_lags = [_PRIOR_LAG] * PRIOR_LAGS if self._rule.is_share else []
        self._unit_lag = 0.0
        self._recalibrate()
        self._histories: dict[str, _History] = {}
        nothing = [0.0] * _BINS
        self._unknown = _History(self._draw_up(nothing, nothing))

    def next_delay(self, age: float, workflow_id: str | None) -> float:
        """Return the seconds until the next poll of an execution that was still running at that age."""
        policy = self._policy
        interval = plain = self._plain_interval(age)
        history = self._unknown if workflow_id is None else self._histories.get(workflow_id, self._unknown)
        if self._rule.learns and self._unit_lag and (self._lags or history is not self._unknown):
            interval = min(max(self._learned_interval(age, history), LOWEST * plain), history.highest(age) * plain)
            interval = min(max(interval, policy.min_interval), policy.max_interval)
        low = max(interval * (1 - policy.spread), policy.min_interval)
        high = min(interval * (1 + policy.spread), policy.max_interval)
        return low + (high - low) * self._random.random()

    def note_running(self, workflow_id: str, known_from: float, age: float) -> None:
        """Note that an execution was running all the time between two ages, in seconds."""
        if self._policy.learn and known_from < age and len(workflow_id) <= LONGEST_NAME:
            history = self._histories.get(workflow_id)
            if history is None:
                history = self._remember(workflow_id, _History(self._unknown.schedule))
            history.note(_live(history.running, known_from, age))

    def learn(self, workflow_id: str, duration: float, *, known_from: float = 0.0) -> None:
        """Note that an execution of a workflow ended after that many seconds.

        A duration that is not a finite number above 0 teaches nothing: clocks of servers may run backwards.

        Args:
            workflow_id: The workflow.
            duration: Seconds that the execution took.
            known_from: The age up to which `note_running` reported that it was running, in seconds.
        """
        if not self._policy.learn or not 0 < duration < math.inf or len(workflow_id) > LONGEST_NAME:
            return
        duration = min(duration, _LONGEST)
        history = self._histories.pop(workflow_id, None) or _History(self._unknown.schedule)
        self._remember(workflow_id, history)
        # Before the end is counted, so that no execution is judged by a schedule that knows it.
        self._calibrate(self._schedule(history), duration)
        kept = 1 - 1 / MEMORY
        for index in range(_BINS):
            history.ended[index] *= kept
            history.running[index] *= kept
        history.weight = history.weight * kept + 1
        history.experience *= kept
        history.note(_live(history.running, known_from, duration) + 1)
        history.ended[_bin_of(duration)] += 1

    def state(self) -> dict[str, Any]:
        """Return what was learned, as plain JSON-able values."""
        return {
            "aim": self._rule.name,
            "lags": [round(lag, 6) for lag in self._lags],
            "workflows": {
                workflow_id: [
                    [index, round(ended, 4), round(running, 4)]
                    for index, (ended, running) in enumerate(zip(history.ended, history.running, strict=True))
                    if ended >= _LEAST_WEIGHT or running >= _LEAST_WEIGHT
                ]
                for workflow_id, history in self._histories.items()
                if history.weight
            },
        }

    def restore(self, state: object) -> None:
        """Add what a `state()`, which may stem from another policy, tells of workflows that are not known here.

        Raises:
            ValueError: That is not such a state. What was learned before stays.
        """
        restored = _checked(state)
        if restored.aim == self._rule.name and not self._lags:
            self._lags.extend(restored.lags)
            self._recalibrate()
        for workflow_id, bins in restored.workflows.items():
            if workflow_id in self._histories:
                continue
            history = _History(self._unknown.schedule)
            for index, ended, running in bins:
                history.ended[index] = ended
                history.running[index] = min(running, _MOST_RESTORED)
            history.weight = min(sum(history.ended), MEMORY)
            history.note(history.weight + sum(history.running))
            self._remember(workflow_id, history)

    def _plain_interval(self, age: float) -> float:
        return min(max(self._rule.interval(age), self._policy.min_interval), self._policy.max_interval)

    def _learned_interval(self, age: float, history: _History) -> float:
        """Return the time until the schedule asks for one poll more than up to this age."""
        schedule = self._schedule(history)
        age = max(age, self._policy.min_interval)
        place = _place_of(age)
        index = int(place)
        polls = schedule[index] + (schedule[index + 1] - schedule[index]) * (place - index)
        polls += self._rule.aim / self._unit_lag
        index = bisect_right(schedule, polls)
        if index > _BINS:
            return math.inf
        place = index - 1 + (polls - schedule[index - 1]) / (schedule[index] - schedule[index - 1])
        return math.exp(_START + place * _WIDTH) - age

    def _remember(self, workflow_id: str, history: _History) -> _History:
        self._histories[workflow_id] = history
        if len(self._histories) > MAX_WORKFLOWS:
            del self._histories[next(iter(self._histories))]
        return history

    def _calibrate(self, schedule: list[float], duration: float) -> None:
        """Count an end in the mean of the lags that the schedules would give with the factor 1."""
        index = _bin_of(duration)
        lag_share = _WIDTH / (schedule[index + 1] - schedule[index]) / 2
        self._lags.append(lag_share * (duration / self._rule.unit(duration)))
        self._recalibrate()

    def _recalibrate(self) -> None:
        lags = sorted([*self._prior_lags, *self._lags])
        if lags:
            most = MOST_OVER_MEDIAN * lags[len(lags) // 2]
            self._unit_lag = sum(min(lag, most) for lag in lags) / len(lags)

    def _schedule(self, history: _History) -> list[float]:
        """Return the number of polls up to the lower edge of each bin, with the factor 1."""
        if history.unused > STALE * history.experience:
            history.schedule = self._draw_up(history.ended, history.running)
            history.unused = 0.0
        return history.schedule

    def _draw_up(self, ended: "list[float] | array[float]", running: "list[float] | array[float]") -> list[float]:
        """Sum up n(t) over the ages: per unit of log t it is sqrt(h*t) if the lag counts as a share of t.

        If it counts in other units, it is sqrt(h*t*t / unit(t)).
        """
        hazards = _hazards(ended, running)
        densities = (math.sqrt(hazard * scale) for hazard, scale in zip(hazards, self._scales, strict=True))
        return list(accumulate((density * _WIDTH for density in densities), initial=0.0))


def require_learned(state: object) -> None:
    """Refuse what `Cadence.restore` would refuse.

    Raises:
        ValueError: That is not what a cadence has learned.
    """
    _checked(state)


def _checked(state: object) -> _State:
    try:
        checked = msgspec.convert(state, _State)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ValueError(f"not a valid checkpoint of what was learned: {error}") from None
    if checked.aim not in {rule.name for rule in RULES.values()}:
        raise ValueError("not a valid checkpoint of what was learned: Invalid value - at `$.aim`")
    return checked


def _place_of(age: float) -> float:
    """Return an age on the scale of the bins."""
    return min(max((math.log(age) - _START) / _WIDTH, 0.0), _BINS - 1.0)


def _bin_of(seconds: float) -> int:
    if seconds <= 0:
        return 0
    return min(max(int((math.log(seconds) - _START) / _WIDTH), 0), _BINS - 1)


def _live(running: "array[float]", known_from: float, age: float) -> float:
    """Add the time between two ages to the bins that it lies in; return how many bins it is."""
    begin = _place_of(known_from) if known_from > 0 else 0.0
    end = _place_of(age) if age > 0 else 0.0
    first = int(begin)
    if first == int(end) and begin <= end:  # as for most polls
        running[first] = min(running[first] + (end - begin), _MOST_WEIGHT)
        return end - begin
    for index in range(first, min(int(end) + 1, _BINS)):
        part = min(end, index + 1.0) - max(begin, index)
        running[index] = min(running[index] + max(part, 0.0), _MOST_WEIGHT)
    return max(end - begin, 0.0)


def _hazards(ended: "list[float] | array[float]", running: "list[float] | array[float]") -> list[float]:
    """Return h(t) * t, the hazard per unit of log t, in each bin."""
    hazards: list[float] = []
    hazard = _PRIOR_HAZARD
    for ends, lived in zip(_smooth(ended), _smooth(running), strict=True):
        prior = hazard**_KEPT * _REVERTED
        hazard = max((ends / _WIDTH + _PRIOR_WEIGHT * prior) / (lived + _PRIOR_WEIGHT), _LEAST_HAZARD)
        hazards.append(hazard)
    return hazards


def _smooth(weights: "list[float] | array[float]") -> list[float]:
    """Average each bin with its neighbours, twice."""
    smooth = list(weights)
    for _ in range(2):
        padded = [0.0, *smooth, 0.0]
        smooth = [(left + here + right) / 3 for left, here, right in zip(padded, padded[1:], padded[2:], strict=False)]
    return smooth
