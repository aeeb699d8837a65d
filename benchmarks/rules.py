"""Other rules for the time of the next poll, in place of `Cadence`, with the same scheduler."""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from random import Random
from typing import Final

from workload import Durations, Execution

SHORTEST: Final = 1.0
"""Least interval of the rules that have a choice, ours among them, in seconds."""
_WIDTH: Final = 0.02
_FIRST: Final = math.log(0.05)
_STEPS: Final = 800
_RAREST: Final = 1e-12
"""Chance of lasting longer below which the hazard is taken not to change any more."""
_LEAST_HAZARD: Final = 1e-4
_NEVER: Final = 1e5


class Rule(ABC):
    """A rule for the intervals of the scheduler, which learns nothing.

    Args:
        asked: Returns the execution that was polled last. The scheduler requests the next interval in the same step.
    """

    def __init__(self, asked: Callable[[], Execution]) -> None:
        self._asked = asked

    def next_delay(self, age: float, workflow_id: str | None) -> float:
        """Return the seconds until the next poll of the last polled execution, at its given age."""
        execution = self._asked()
        if execution.workflow != workflow_id:
            raise RuntimeError("the interval of another execution is asked for than was polled")
        return self.interval(execution, age)

    def learn(self, workflow_id: str, duration: float, *, known_from: float = 0.0) -> None:  # noqa: B027
        """Do nothing, because these rules do not learn."""

    def note_running(self, workflow_id: str, known_from: float, age: float) -> None:  # noqa: B027
        """Do nothing, because these rules do not learn."""

    @abstractmethod
    def interval(self, execution: Execution, age: float) -> float:
        """Return the seconds until the next poll."""


class Fixed(Rule):
    """A constant interval."""

    def __init__(self, asked: Callable[[], Execution], seconds: float) -> None:
        super().__init__(asked)
        self._seconds = seconds

    def interval(self, execution: Execution, age: float) -> float:  # noqa: ARG002 - not needed here
        """Return the seconds until the next poll."""
        return self._seconds


class Age(Rule):
    """An interval that is a share of the age."""

    def __init__(self, asked: Callable[[], Execution], share: float) -> None:
        super().__init__(asked)
        self._share = share

    def interval(self, execution: Execution, age: float) -> float:  # noqa: ARG002 - not needed here
        """Return the seconds until the next poll."""
        return max(SHORTEST, self._share * age)


class Exponential(Rule):
    """The rule of google-api-core 2.44: a random interval up to a bound that grows from 1 s with each poll."""

    def __init__(self, asked: Callable[[], Execution], multiplier: float, maximum: float, random: Random) -> None:
        super().__init__(asked)
        self._multiplier = multiplier
        self._maximum = maximum
        self._random = random
        self._polls: Counter[str] = Counter()

    def interval(self, execution: Execution, age: float) -> float:  # noqa: ARG002 - the rule counts polls
        """Return the seconds until the next poll."""
        polls = self._polls[execution.id]
        self._polls[execution.id] += 1
        return self._random.uniform(0.0, min(self._multiplier**polls, self._maximum))


class Oracle(Rule):
    """A rule that knows each duration's distribution, and polls so that hazard * interval**2 / 2 is a constant.

    For a lag as a share of the duration, the constant is hazard * interval**2 / (2 * age). Because the hazard changes
    within an interval, its root is integrated. A poll is due when the integral has grown by the root of 2 * constant.
    """

    def __init__(self, asked: Callable[[], Execution], constant: float, *, by_share: bool) -> None:
        super().__init__(asked)
        self._step = math.sqrt(2 * constant)
        self._by_share = by_share
        self._schedules: dict[Durations, list[float]] = {}

    def interval(self, execution: Execution, age: float) -> float:
        """Return the seconds until the next poll."""
        schedule = self._schedules.get(execution.durations)
        if schedule is None:
            schedule = self._schedules[execution.durations] = _integral(execution.durations, by_share=self._by_share)
        place = max(0.0, (math.log(max(age, SHORTEST)) - _FIRST) / _WIDTH)
        index = min(int(place), _STEPS - 1)
        wanted = schedule[index] + (schedule[index + 1] - schedule[index]) * (place - index) + self._step
        index = bisect_right(schedule, wanted)
        if index > _STEPS:
            return _NEVER
        place = index - 1 + (wanted - schedule[index - 1]) / (schedule[index] - schedule[index - 1])
        return max(SHORTEST, math.exp(_FIRST + place * _WIDTH) - age)


def _integral(durations: Durations, *, by_share: bool) -> list[float]:
    """Integrate the root of the hazard, divided by the age for a lag as a share, up to ages of equal ratio."""
    parts = []
    hazard = _LEAST_HAZARD
    for step in range(_STEPS):
        before, after = (durations.survival(math.exp(_FIRST + (step + end) * _WIDTH)) for end in (0, 1))
        if after > _RAREST:
            hazard = max(_LEAST_HAZARD, math.log(before / after) / _WIDTH)
        scale = 1.0 if by_share else math.exp(_FIRST + (step + 0.5) * _WIDTH)
        parts.append(math.sqrt(hazard * scale) * _WIDTH)
    return list(accumulate(parts, initial=0.0))
