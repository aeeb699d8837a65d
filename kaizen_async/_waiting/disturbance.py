"""Whether the whole client is being refused, so that one probe speaks for all waits.

A firewall that refuses some requests says nothing about the others: the waits that were hit ask again, each for itself.
If several executions in a row get such a response for the first time, then most likely all will: from then on one poll
at a time is made, at growing intervals. The first response from the API itself ends the disturbance. If it outlasts the
patience of a policy, the waits under that policy end.
"""

import math
from typing import Final

from kaizen_async._waiting.verdict import ALMOST, LEAST_REFUSALS, pause
from kaizen_async.errors import KaizenError

SUSPICIOUS: Final = 3
"""Executions refused in a row from which on only one poll at a time is made."""
WITNESSES: Final = 3
"""Executions whose polls must have been refused before all waits end, if there are as many."""
WEIGHT: Final = 0.02
"""Weight of the newest poll in the running share of refused ones."""


class Disturbance:
    """What the latest responses to all polls say together.

    Attributes:
        is_on: Whether one probe stands for all polls.
        error: The latest refusal.
    """

    def __init__(self) -> None:
        self.is_on = False
        self.error: KaizenError | None = None
        self._refused = 0.0
        self._missing = 0.0
        self.probe_at = -math.inf
        self._began = 0.0
        self._row = 0
        self._probes = 0
        self._witnesses: set[str] = set()

    @property
    def chance_refused(self) -> float:
        """The chance that a poll is refused by accident: the running share of executions that were, but for one."""
        return max(0.0, self._refused - WEIGHT)

    @property
    def chance_missing(self) -> float:
        """The chance that an execution which was seen is reported missing by accident; in the same way."""
        return max(0.0, self._missing - WEIGHT)

    def note_response(self) -> None:
        """Note a response of the API itself."""
        self._refused -= WEIGHT * self._refused
        self._missing -= WEIGHT * self._missing
        self.is_on = False
        self.error = None
        self._row = self._probes = 0
        self._witnesses.clear()

    def note_missing(self) -> None:
        """Note that an execution which was seen is reported missing, for the first time in a row."""
        self._missing += WEIGHT * (1 - self._missing)

    def note_refusal(self, execution_id: str, error: KaizenError, now: float, *, is_first: bool) -> None:
        """Note a response that says nothing about an execution, and whether it is the first of a row for this one."""
        if is_first:
            self._refused += WEIGHT * (1 - self._refused)
        elif not self.is_on:
            return  # an id that has been refused before, perhaps an invalid one, tells nothing about the others
        if not self._row:
            self._began = now
        self._row += 1
        self.error = error
        if len(self._witnesses) < WITNESSES:
            self._witnesses.add(execution_id)
        if self._row == SUSPICIOUS:
            self.is_on = True
        if self.is_on:
            self.wait(now)

    def wait(self, now: float) -> None:
        """Note that a probe has failed, in whatever way: the next one comes later."""
        if now >= self.probe_at:
            self._probes += 1
            self.probe_at = now + pause(self._probes)

    def outlasts(self, patience: float, now: float, waiting: int) -> bool:
        """Return whether all waits with that patience must end, when there are `waiting` of them."""
        return (
            self.is_on
            and now - self._began >= patience * ALMOST
            and self._row >= LEAST_REFUSALS
            and self._probes > 1  # the first number is the pause before the first probe
            and len(self._witnesses) >= min(WITNESSES, waiting)
        )
