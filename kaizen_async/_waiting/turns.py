"""Whose poll comes next: entries that are due queue up per call, and the calls take turns.

So a wait for one id is polled next even if another call has 100,000 ids overdue. When polls cannot keep up with the
wished pace, the polls of every call stretch alike. A policy's limit of polls per second is kept by spacing its polls
evenly.
"""

import math
from collections import deque
from collections.abc import Iterable
from typing import Final

from kaizen_async._waiting.calls import Call, Group
from kaizen_async._waiting.entry import NOWHERE, QUEUED, Entry

CATCH_UP: Final = 0.01
CATCH_UP_SHARE: Final = 0.25
"""Seconds, or share of a spacing if that is more, by which polls at a `max_rate` may lag behind their even spacing and
still be made up for. The timers of an event loop are late by about a millisecond, which would lower a high rate by a
good deal."""
UNSENT: Final = 0.05
"""Seconds of polls at a `max_rate` that may wait for their turn to send. Those that wait longer would be a burst."""


class Turns:
    """The queues of all calls.

    Attributes:
        resumes_at: When a group that its rate held back at the last `next` may poll again; math.inf if there is none.
    """

    def __init__(self) -> None:
        self.resumes_at = math.inf
        self._groups: deque[Group] = deque()

    def __bool__(self) -> bool:
        """Return whether anything is in the queues."""
        return bool(self._groups)

    def put(self, entry: Entry, calls: Iterable[Call], now: float) -> None:
        """Queue an entry for the call with the shortest queue among those of its calls that are not out of time."""
        in_time = [call for call in calls if call.deadline_at > now]
        call = min(in_time, key=lambda each: each.queued, default=None)
        if call is None or (entry.place == QUEUED and entry.queue == call.number):
            return
        group = call.group
        if not call.has_turns:
            if not group.calls:
                self._groups.append(group)
            group.calls.append(call)
            call.has_turns = True
        entry.place, entry.queue = QUEUED, call.number
        call.put(entry)

    def next(self, now: float) -> tuple[Entry, Group] | None:
        """Take the next entry that may be polled now.

        Returns:
            The entry, or None. If `resumes_at` is math.inf then, a stale entry was removed: ask again.
        """
        self.resumes_at = math.inf
        for _ in range(len(self._groups)):
            group = self._groups.popleft()
            if (resumes_at := self._resumes_at(group, now)) > now:
                self.resumes_at = min(self.resumes_at, resumes_at)
                self._groups.append(group)
                continue
            group.turns_left = (group.turns_left or len(group.calls)) - 1
            entry = self._take(group)
            if group.calls:
                (self._groups.appendleft if group.turns_left else self._groups.append)(group)
            return None if entry is None else (entry, group)
        return None

    @staticmethod
    def _resumes_at(group: Group, now: float) -> float:
        """Return when the rate of a group's policy allows its next poll."""
        rate, pace = group.policy.max_rate, group.pace
        if rate is not None and len(pace.unsent) >= max(1.0, rate * UNSENT):
            return max(pace.next_poll, now + UNSENT)
        return pace.next_poll

    def spend(self, entry: Entry, group: Group, now: float) -> None:
        """Note that a poll of a group begins."""
        if group.policy.max_rate is not None:
            pace, spacing = group.pace, 1.0 / group.policy.max_rate
            pace.unsent.add(entry)
            is_on_time = now - pace.next_poll <= max(CATCH_UP, CATCH_UP_SHARE * spacing)
            pace.next_poll = (pace.next_poll if is_on_time else now) + spacing

    @staticmethod
    def note_sent(entry: Entry, group: Group, now: float) -> None:
        """Note that a poll is sent. If it had to wait for that, the next one is spaced from now on."""
        pace = group.pace
        if group.policy.max_rate is not None and entry in pace.unsent:
            pace.unsent.discard(entry)
            if now > pace.next_poll:
                pace.next_poll = now + 1.0 / group.policy.max_rate

    def clear(self) -> None:
        """Remove everything; all of it must be stale."""
        for group in self._groups:
            for call in group.calls:
                call.clear()
                call.has_turns = False
            group.calls.clear()
        self._groups.clear()

    def _take(self, group: Group) -> Entry | None:
        """Take an entry of the call whose turn it is; None if it is stale."""
        call = group.calls.popleft()
        entry = call.pop()
        call.has_turns = call.queued > 0
        if call.has_turns:
            group.calls.append(call)
        if entry is not None:
            entry.place, entry.queue = NOWHERE, -1
        return entry
