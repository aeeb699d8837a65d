"""How many bad results in a row are more than chance.

Results count in the order in which their requests were *sent*. A success says that the server worked when that request
was sent, so it takes back what is older, and nothing that is newer: responses to requests from before a fault still
arrive while everything sent since fails.
"""

import math
from bisect import bisect_left, insort
from typing import Final

MEMORY: Final = 200
"""Results over which the usual share of bad ones is known."""
DENSITY: Final = 0.9
"""Share of the requests of a run that must have come back badly. The others may still be in flight, and succeed."""

MOST_KEPT: Final = 100
"""Bad results in a row that are remembered: a single id that fails for ever makes no outage, and no end of them."""


class Run:
    """Bad results since the last success, and how usual bad results have been before.

    Attributes:
        numbers: The numbers of the requests, sorted.
    """

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self._lookups: dict[int, object] = {}
        self._bad = 0.0
        self._good = 0.0

    def __len__(self) -> int:
        return len(self.numbers)

    def __contains__(self, number: int) -> bool:
        return number in self._lookups

    @property
    def lookups(self) -> set[object]:
        """The lookups that it consists of."""
        return set(self._lookups.values())

    def add(self, number: int, lookup: object) -> None:
        """Add the bad result of a request."""
        insort(self.numbers, number)
        self._lookups[number] = lookup
        if len(self.numbers) > MOST_KEPT:
            self._forget(1)

    def succeeded(self, number: int) -> None:
        """Take back what was sent before a request that succeeded."""
        older = bisect_left(self.numbers, number)
        self._bad += older
        self._forget(older)

    def _forget(self, count: int) -> None:
        for number in self.numbers[:count]:
            del self._lookups[number]
        del self.numbers[:count]

    def clear(self) -> None:
        """Forget the run: it was no chance, so it says nothing about the usual share."""
        self.numbers.clear()
        self._lookups.clear()

    def note_successes(self, count: int) -> None:
        """Count the successes since then."""
        self._good += count
        if (total := self._good + self._bad) > MEMORY:
            self._good *= MEMORY / total
            self._bad *= MEMORY / total

    @property
    def is_first(self) -> bool:
        """Whether nothing bad is remembered from before this run."""
        return self._bad < 1

    @property
    def successes(self) -> float:
        """How many of the results that are remembered were good."""
        return self._good

    def least(self, chance: float) -> int:
        """Return how many bad results in a row happen by chance with that probability, given their usual share."""
        share = (self._bad + 0.5) / (self._good + self._bad + 1)
        return math.ceil(math.log(chance) / math.log(min(share, 0.95)))

    def is_solid(self, length: int) -> bool:
        """Return whether the last so many belong together: hardly another request was sent in between."""
        if len(self.numbers) < length:
            return False
        return length >= DENSITY * (self.numbers[-1] - self.numbers[-length] + 1)
