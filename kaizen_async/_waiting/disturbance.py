"""Whether the whole client is being refused, so that one probe speaks for all waits.

A firewall that refuses some requests says nothing about the others: the waits that were hit ask again, each for itself.
If several executions in a row get such a response for the first time, then most likely all will: from then on one poll
at a time is made, at growing intervals. The first response from the API itself ends the disturbance. If it outlasts the
patience of a policy, the waits under that policy end.

A 400 or 422 is most likely about the id in the request, unless the record of that id was received before. While all
refusals are of this kind, the probes come faster, because each asks for another id. If that outlasts the patience, each
id is asked for, and those that get such a response end. So 1,000 invalid ids do not end the waits for 10 valid ones.

Where many executions were refused one by one before, a longer row is needed, and the probes come as fast.
"""

import math
from typing import Final

from kaizen_async._waiting.entry import Trouble
from kaizen_async._waiting.verdict import ALMOST, LEAST_REFUSALS, MOST_CHANCE, needed, pause
from kaizen_async.errors import KaizenError

SUSPICIOUS: Final = 3
"""Executions refused in a row from which on only one poll at a time is made."""
WITNESSES: Final = 3
"""Executions whose polls must have been refused before all waits end, if there are as many."""
UNLIKELY: Final = 0.01
"""Chance of a row of refused executions below which only one poll at a time is made."""
MANY: Final = 0.05
"""Share of executions refused one by one from which on probes ask for one after the other."""
PROBE_EVERY: Final = 0.3
"""Seconds between two probes that ask for one execution after the other."""
WEIGHT: Final = 0.02
"""Weight of the newest poll in the running share of refused ones."""


class Disturbance:
    """What the latest responses to all polls say together.

    Attributes:
        is_on: Whether one probe stands for all polls.
        is_about_ids: Whether all refusals of the row were about the ids of the requests.
        error: The latest refusal.
        refused_again: How often executions that had been refused were refused again, since one of them was not.
        probe_at: When the next probe may be made.
    """

    def __init__(self) -> None:
        self.is_on = False
        self.is_about_ids = True
        self.error: KaizenError | None = None
        self.refused_again = 0
        self.probe_at = -math.inf
        self._refused = 0.0
        self._missing = 0.0
        self._began = 0.0
        self._row = 0
        self._chance = 0.0
        self._probes = 0
        self._asks_each = False
        self._witnesses: set[str] = set()

    @property
    def chance_refused(self) -> float:
        """The chance that a poll is refused by accident: the running share of executions that were, but for one."""
        return max(0.0, self._refused - WEIGHT)

    @property
    def chance_missing(self) -> float:
        """The chance that an execution which was seen is reported missing by accident; in the same way."""
        return max(0.0, self._missing - WEIGHT)

    def note_response(self, trouble: Trouble | None = None) -> None:
        """Note a response of the API itself, and what was known of the execution's failed polls."""
        if trouble is not None and trouble.refusals:
            self.refused_again = 0
        self._refused -= WEIGHT * self._refused
        self._missing -= WEIGHT * self._missing
        self._end_row()

    def note_missing(self) -> None:
        """Note that an execution which was seen is reported missing, for the first time in a row."""
        self._missing += WEIGHT * (1 - self._missing)

    def note_refusal(
        self, execution_id: str, error: KaizenError, now: float, *, is_first: bool, is_about_id: bool
    ) -> None:
        """Note a response that says nothing about an execution.

        Args:
            execution_id: The id.
            error: The response.
            now: The clock's time.
            is_first: Whether it is the first of a row for this execution.
            is_about_id: Whether it may be about the id in the request.
        """
        chance_before = self.chance_refused
        self.refused_again += not is_first
        if is_first:
            self._refused += WEIGHT * (1 - self._refused)
        elif not self.is_on:
            return  # an id that has been refused before, perhaps an invalid one, tells nothing about the others
        if self.is_about_ids and not is_about_id:
            self._end_row()
            self.is_about_ids = False
        if not self._row:
            self._began, self._chance = now, chance_before
        self._row += 1
        self.error = error
        if len(self._witnesses) < WITNESSES:
            self._witnesses.add(execution_id)
        suspicious = needed(SUSPICIOUS, self._chance, unlikely=UNLIKELY, most=MOST_CHANCE)
        if self._row >= suspicious and not self._asks_each:
            self.is_on = True
        if self.is_on:
            self.wait(now)

    def wait(self, now: float) -> None:
        """Note that a probe has failed, in whatever way: the next one comes later."""
        if now >= self.probe_at:
            self._probes += 1
            is_about_one = self.is_about_ids or self._chance > MANY
            self.probe_at = now + (PROBE_EVERY if is_about_one else pause(self._probes))

    def ask_each(self) -> bool:
        """Let every execution be asked for, because the disturbance has outlasted the patience and may be about ids.

        Returns:
            Whether that is new.
        """
        is_new = not self._asks_each
        self.is_on, self._asks_each = False, True
        return is_new

    def outlasts(self, patience: float, now: float, waiting: int) -> bool:
        """Return whether waits with that patience must end, when there are `waiting` of them."""
        return (
            (self.is_on or self._asks_each)
            and now - self._began >= patience * ALMOST
            and self._row >= needed(LEAST_REFUSALS, self._chance, most=MOST_CHANCE)
            and self._probes > 1  # the first number is the pause before the first probe
            and len(self._witnesses) >= min(WITNESSES, waiting)
        )

    def _end_row(self) -> None:
        self.is_on = self._asks_each = False
        self.is_about_ids = True
        self.error = None
        self._row = self._probes = 0
        self._witnesses.clear()
