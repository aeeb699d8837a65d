"""One execution that somebody waits for, in as few bytes as possible: there may be a million."""

import math
from typing import Any, Final

import msgspec

from kaizen_async.errors import KaizenError

NOWHERE: Final = -1
"""All who wait for it are out of time and about to leave."""
NEAR: Final = -2
"""In the timetable, among those that are due next. A later one has the number of its bucket as its place."""
QUEUED: Final = -3
"""Due, and in the queue of a call."""
POLLING: Final = -4
"""A poll is in flight."""

LOOKED_AT: Final = 3
"""Entries of a bucket or a queue that are looked at when one of them becomes stale, to remove what is stale. So no step
has to look at 100,000 entries. With fewer than three, many stale entries would be left at the end."""


class Trouble(msgspec.Struct, gc=False):
    """What is known of an execution whose last poll failed."""

    since: float
    """When its polls began to fail, in the clock's time."""
    error: KaizenError
    """Why the last one failed."""
    refusals: int = 0
    """Responses in a row that said nothing about the execution."""
    refused_at: float = 0.0
    missing: int = 0
    """Responses in a row that said that the execution does not exist."""
    missing_at: float = 0.0
    not_before: float = 0.0
    """When the server allowed the next poll, in the clock's time."""
    is_silent: bool = False
    """Whether this has gone on for so long that it was reported."""


class Entry(msgspec.Struct, gc=False, eq=False):
    """One execution that is waited for. It is in one place at a time; what other places hold of it is stale.

    The garbage collector does not visit it: with 200,000 of them that would stop the event loop for 100 ms and more. So
    nothing in it may refer back to it: calls and queues are told by their numbers, and its poll's task is elsewhere.
    """

    id: str
    calls: tuple[int, ...]
    """The numbers of the calls that wait for it."""
    since: float
    """When the first of them began to, in the clock's time."""
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
    """The last record, or what stands for it."""
    trouble: Trouble | None = None
