"""When each execution is due: a calendar of short spans of time, and a heap for the span that has begun.

An entry costs one place in a list until its span begins. A heap of all entries would take a tuple and a number for
each, ten times the memory.
"""

import heapq
import math
from typing import Final

from kaizen_async._waiting.entry import NEAR, NOWHERE, Entry

SPAN: Final = 0.25
"""Seconds of a span: so short that few of very many entries are in the heap, so long that there are few spans."""
LEAST_STALE: Final = 100
"""Stale entries that are not worth a sweep."""


class _Bucket:
    """The entries that are due in one span, in no order."""

    __slots__ = ("earliest", "entries", "key")

    def __init__(self, key: int) -> None:
        self.key = key
        self.earliest = math.inf
        self.entries: list[Entry] = []


class Timetable:
    """Entries with their due times."""

    def __init__(self) -> None:
        self._buckets: dict[int, _Bucket] = {}
        self._keys: list[int] = []
        self._near: list[tuple[float, int, Entry]] = []
        self._near_key = -1
        self._serial = 0
        self._size = 0
        self._stale = 0

    @property
    def held(self) -> int:
        """How many entries it holds, stale ones included."""
        return self._size + self._stale

    def put(self, entry: Entry, due: float) -> None:
        """Add an entry, or move it."""
        if entry.place == NEAR or entry.place >= 0:
            self._stale += 1
        else:
            self._size += 1
        entry.due = due
        key = int(due / SPAN)
        if key <= self._near_key:
            self._put_near(entry)
            return
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = _Bucket(key)
            heapq.heappush(self._keys, key)
        bucket.earliest = min(bucket.earliest, due)
        bucket.entries.append(entry)
        entry.place = bucket.key
        self._sweep()

    def remove(self, entry: Entry) -> None:
        """Remove an entry, if it is here."""
        if entry.place == NEAR or entry.place >= 0:
            entry.place = NOWHERE
            self._size -= 1
            self._stale += 1
            self._sweep()

    def next_due(self) -> float:
        """Return when to call `pop` next: when the first entry is due, or a little sooner; math.inf without any."""
        due = self._near[0][0] if self._near else math.inf
        return min(due, self._buckets[self._keys[0]].earliest) if self._keys else due

    def pop(self, now: float) -> Entry | None:
        """Remove and return an entry that is due, the first to become so first; None if none is."""
        while self._keys and self._buckets[self._keys[0]].earliest <= now:
            self._open(self._buckets.pop(heapq.heappop(self._keys)))
        while self._near and self._near[0][0] <= now:
            due, _, entry = heapq.heappop(self._near)
            if entry.place == NEAR and entry.due == due:
                entry.place = NOWHERE
                self._size -= 1
                return entry
            self._stale -= 1
        return None

    def _open(self, bucket: _Bucket) -> None:
        self._near_key = bucket.key
        for entry in bucket.entries:
            if entry.place == bucket.key:
                self._put_near(entry)
            else:
                self._stale -= 1

    def _put_near(self, entry: Entry) -> None:
        self._serial += 1
        entry.place = NEAR
        heapq.heappush(self._near, (entry.due, self._serial, entry))

    def _sweep(self) -> None:
        """Free it of what is stale if that is most of it."""
        if self._stale <= max(self._size, LEAST_STALE):
            return
        for bucket in self._buckets.values():
            # An entry that was moved away and back is in its bucket twice.
            bucket.entries = list({id(entry): entry for entry in bucket.entries if entry.place == bucket.key}.values())
        self._near = [item for item in self._near if item[2].place == NEAR and item[2].due == item[0]]
        heapq.heapify(self._near)
        empty = [key for key, bucket in self._buckets.items() if not bucket.entries]
        for key in empty:
            del self._buckets[key]
        self._keys = sorted(self._buckets)
        self._stale = sum(len(bucket.entries) for bucket in self._buckets.values()) + len(self._near) - self._size
