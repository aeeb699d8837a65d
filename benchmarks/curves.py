"""The polls and lags of a run as a point, and interpolation between points."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from simulation import Measured
from workload import Execution


@dataclass(frozen=True)
class Point:
    """The result of a method for a workload. Lags are in seconds, and shares are lags divided by the duration."""

    polls: float
    lag: float
    lag_p95: float
    share: float
    share_p95: float

    @classmethod
    def of(cls, executions: Sequence[Execution], measured: Measured, chosen: Iterable[int] | None = None) -> "Point":
        """Return the point of all executions, or of those at the given places."""
        places = range(len(executions)) if chosen is None else list(chosen)
        lags = [measured.lags[place] for place in places]
        shares = [measured.lags[place] / executions[place].duration for place in places]
        polls = statistics.mean(measured.polls[place] for place in places)
        return cls(polls, statistics.mean(lags), _p95(lags), statistics.mean(shares), _p95(shares))


def read(curve: Sequence[Point], key: str, *, where: str, equals: float) -> float | None:
    """Return a curve's value at the place where another of its values equals a number, or None beyond its ends.

    Between two points, the curve is a straight line on logarithmic axes.
    """
    along = sorted((math.log(getattr(point, where)), math.log(getattr(point, key))) for point in curve)
    wanted = math.log(equals)
    for (x, y), (next_x, next_y) in pairwise(along):
        if x <= wanted <= next_x:
            return math.exp(y + (next_y - y) * (wanted - x) / (next_x - x))
    return None


def _p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20, method="inclusive")[-1]
