"""One execution that calls wait for. It takes as few bytes as possible, because there may be a million."""

import math
from typing import Any, Final

import msgspec

from kaizen_async.errors import KaizenError

NOWHERE: Final = -1
"""The deadlines of all its calls have passed, and the calls are about to leave it."""
NEAR: Final = -2
"""In the timetable, among the entries that are due next. A later entry has the number of its bucket as its place."""
QUEUED: Final = -3
"""Due, and in the queue of a call."""
POLLING: Final = -4
"""A poll is in flight."""

LOOKED_AT: Final = 3
"""When an entry of a bucket or a queue becomes stale, this many entries are checked, and stale ones are removed. So no
step has to check 100,000 entries. With fewer than three, many stale entries would be left at the end."""


class Trouble(msgspec.Struct, gc=False):
    """What is known about an execution whose last poll failed."""

    since: float
    """When its polls began to fail, in the clock's time."""
    error: KaizenError
    """Why the last poll failed."""
    refusals: int = 0
    """Responses in a row that said nothing about the execution."""
    refused_at: float = 0.0
    missing: int = 0
    """Responses in a row that said that the execution does not exist."""
    missing_at: float = 0.0
    not_before: float = 0.0
    """The earliest time of the next poll that the server allows, in the clock's time."""
    is_silent: bool = False
    """Whether the polls have failed for so long that this was reported."""


class Entry(msgspec.Struct, gc=False, eq=False):
    """One execution that calls wait for. It is in one place at a time. References to it in other places are stale.

    The garbage collector does not visit it: with 200,000 of them that would stop the event loop for 100 ms and more. So
    nothing in it may refer back to it: it names calls and queues by their numbers, and does not hold its poll's task.
    """

    id: str
    calls: tuple[int, ...]
    """The numbers of the calls that wait for it."""
    since: float
    """When the first of them began to wait, in the clock's time."""
    started: float
    """When the execution started, in the clock's time."""
    due: float
    polled: float = -math.inf
    """When its last poll was over."""
    place: int = NOWHERE
    queue: int = -1
    """The number of the call whose queue it is in."""
    attempts: int = 0
    seen: bool = False
    """Whether its record was received."""
    last: Any = None
    """The last record, or its substitute."""
    trouble: Trouble | None = None
