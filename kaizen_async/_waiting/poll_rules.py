"""The rules for poll intervals: what the lag is measured in, and so how the interval grows with the age.

The lag is the time between an end and the poll that sees it. In a constant interval it is half the interval on average,
so a rule sets the interval to twice the lag that it aims at. `cadence.py` then learns, per workflow, where polls can be
saved at the same mean lag.

A new rule is a class, an entry in `RULES`, and a field of `PollPolicy` with the name of the entry.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Final

from kaizen_async.config import PollPolicy


class PollRule(ABC):
    """A rule for the intervals between the polls of a running execution.

    Args:
        aim: The mean lag to aim at, in units of the rule.

    Attributes:
        name: What checkpoints call the rule. Lags that were learned under one rule do not count under another.
        is_share: Whether the lag is a share of the duration.
        learns: Whether the durations of earlier executions may shorten and lengthen the intervals. If so, an interval
            must not be shorter at a greater age: the guarantee in `cadence.py` rests on that.
    """

    name: ClassVar[str]
    is_share: ClassVar[bool] = False
    learns: ClassVar[bool] = True

    def __init__(self, aim: float) -> None:
        self.aim = aim

    @abstractmethod
    def unit(self, age: float) -> float:
        """Return how many seconds of lag count as one unit, for an execution that ends at this age in seconds."""

    def interval(self, age: float) -> float:
        """Return the seconds until the next poll of an execution that is running at this age."""
        return 2 * self.aim * self.unit(age)


class LagShare(PollRule):
    """The lag is a share of the duration: intervals grow in proportion to the age."""

    name = "share"
    is_share = True

    def unit(self, age: float) -> float:
        """Return the age itself."""
        return age


class LagSeconds(PollRule):
    """The lag is a number of seconds: intervals stay the same."""

    name = "seconds"

    def unit(self, age: float) -> float:
        """Return one second."""
        del age
        return 1.0


RULES: Final[dict[str, type[PollRule]]] = {"lag_seconds": LagSeconds, "lag_share": LagShare}
"""By the field of `PollPolicy` that gives the aim. The first field that is not None decides."""


def rule_of(policy: PollPolicy) -> PollRule:
    """Return the rule that a policy chooses."""
    aims = ((rule, getattr(policy, field)) for field, rule in RULES.items())
    return next(rule(aim) for rule, aim in aims if aim is not None)
