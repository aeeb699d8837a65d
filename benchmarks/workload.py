"""Executions that start one after another with random durations, drawn from a seed."""

import math
from dataclasses import dataclass
from random import Random
from typing import Final, Protocol

SECONDS: Final = 3000.0
"""Within how long all executions of the usual workload start, at random."""
COUNT: Final = 2000
LEARNED: Final = 50
"""Ended executions of a workflow from which it counts as known."""
_SHORTEST: Final = 0.3


class Durations(Protocol):
    """A distribution of durations, in seconds."""

    def draw(self, random: Random) -> float:
        """Return a random duration."""
        ...

    def survival(self, seconds: float) -> float:
        """Return the probability of a longer duration."""
        ...


@dataclass(frozen=True)
class LogNormal:
    """Durations whose logarithm is normal."""

    median: float
    sigma: float

    def draw(self, random: Random) -> float:
        """Return a random duration."""
        return self.median * math.exp(random.gauss(0.0, self.sigma))

    def survival(self, seconds: float) -> float:
        """Return the probability of a longer duration."""
        return 0.5 * math.erfc(math.log(seconds / self.median) / self.sigma / math.sqrt(2))


@dataclass(frozen=True)
class HeavyTailed:
    """Durations by Lomax's law: the longer an execution has run, the longer it is likely to continue."""

    median: float
    exponent: float

    def draw(self, random: Random) -> float:
        """Return a random duration."""
        return self._scale * ((1 - random.random()) ** (-1 / self.exponent) - 1)

    def survival(self, seconds: float) -> float:
        """Return the probability of a longer duration."""
        return float((1 + seconds / self._scale) ** -self.exponent)

    @property
    def _scale(self) -> float:
        return float(self.median / (2 ** (1 / self.exponent) - 1))


@dataclass(frozen=True)
class Either:
    """Durations that follow one of two distributions."""

    share_of_first: float
    first: Durations
    second: Durations

    def draw(self, random: Random) -> float:
        """Return a random duration."""
        return (self.first if random.random() < self.share_of_first else self.second).draw(random)

    def survival(self, seconds: float) -> float:
        """Return the probability of a longer duration."""
        share = self.share_of_first
        return share * self.first.survival(seconds) + (1 - share) * self.second.survival(seconds)


LOG_NORMALS: Final[dict[str, tuple[Durations, Durations]]] = {
    f"log-normal, median {median} s, sigma {sigma}": (LogNormal(median, sigma),) * 2
    for median, sigma in ((20, 0.5), (56, 1.0), (155, 0.5), (431, 1.0), (1200, 0.5))
}
"""Workflows: the durations of each, before and after half of the time."""
WORKFLOWS: Final[dict[str, tuple[Durations, Durations]]] = {
    **LOG_NORMALS,
    "heavy-tailed": (HeavyTailed(60, 1.5),) * 2,
    "bimodal": (Either(0.6, LogNormal(15, 0.3), LogNormal(600, 0.3)),) * 2,
    "shifting": (LogNormal(60, 0.4), LogNormal(300, 0.4)),
}


@dataclass(frozen=True)
class Execution:
    """An execution with its start in seconds, its duration, and the distribution of its duration."""

    id: str
    workflow: str
    start: float
    duration: float
    durations: Durations

    @property
    def end(self) -> float:
        """The end of the execution in seconds."""
        return self.start + self.duration


@dataclass(frozen=True)
class Workload:
    """The executions to wait for, which are the same for every method."""

    seed: int = 1
    count: int = COUNT
    seconds: float = SECONDS
    log_normal_only: bool = False

    def executions(self) -> list[Execution]:
        """Return the executions in the order of their starts."""
        random = Random(self.seed)
        workflows = LOG_NORMALS if self.log_normal_only else WORKFLOWS
        names = list(workflows)
        starts = sorted(random.uniform(0.0, self.seconds) for _ in range(self.count))
        executions = []
        for number, start in enumerate(starts):
            workflow = random.choice(names)
            durations = workflows[workflow][2 * number >= self.count]
            duration = max(_SHORTEST, durations.draw(random))
            executions.append(Execution(f"exec_{number}", workflow, start, duration, durations))
        return executions


def known(executions: list[Execution]) -> list[int]:
    """Return the executions that start after enough ends of their workflow."""
    ends: dict[str, list[float]] = {}
    for execution in executions:
        ends.setdefault(execution.workflow, []).append(execution.end)
    since = {name: sorted(times)[LEARNED - 1] if len(times) >= LEARNED else math.inf for name, times in ends.items()}
    return [index for index, execution in enumerate(executions) if execution.start >= since[execution.workflow]]


def most_in_flight(executions: list[Execution]) -> int:
    """Return the highest number of executions that run at the same time."""
    moments = sorted([(each.start, 1) for each in executions] + [(each.end, -1) for each in executions])
    running = most = 0
    for _, change in moments:
        running += change
        most = max(most, running)
    return most
