"""When each execution is due: a calendar of short spans of time, and a heap for the span that has begun.

An entry costs one place in a list until its span begins. A heap of all entries would take a tuple and a number for
each, ten times the memory.
"""

import heapq
import math
from typing import Final

from kaizen_async._waiting.entry import LOOKED_AT, NEAR, NOWHERE, Entry

SPAN: Final = 0.25
"""Seconds of a span: so short that few of very many entries are in the heap, so long that there are few spans."""
LEAST_EMPTY: Final = 100
"""Keys of empty buckets that are not worth sorting the others out."""


class _Bucket:
    """The entries that are due in one span, in no order."""

    __slots__ = ("earliest", "entries", "key", "looked_at")

    def __init__(self, key: int) -> None:
        self.key = key
        self.earliest = math.inf
        self.entries: list[Entry] = []
        self.looked_at = 0

    def drop_stale(self) -> None:
        """Look at the next few entries, and remove those that are stale."""
        entries = self.entries
        for _ in range(min(LOOKED_AT, len(entries))):
            self.looked_at %= len(entries)
            if entries[self.looked_at].place == self.key:
                self.looked_at += 1
            else:
                entries[self.looked_at] = entries[-1]
                entries.pop()


class Timetable:
    """Entries with their due times."""

    def __init__(self) -> None:
        self._buckets: dict[int, _Bucket] = {}
        self._keys: list[int] = []
        self._near: list[tuple[float, int, Entry]] = []
        self._near_key = -1
        self._serial = 0

    @property
    def held(self) -> int:
        """How many entries it holds, stale ones included."""
        return sum(len(bucket.entries) for bucket in self._buckets.values()) + len(self._near)

    def put(self, entry: Entry, due: float) -> None:
        """Add an entry, or move it."""
        self.remove(entry)
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

    def remove(self, entry: Entry) -> None:
        """Remove an entry, if it is here. What a list or heap still holds of it is stale."""
        place = entry.place
        if place >= 0:
            entry.place = NOWHERE
            bucket = self._buckets[place]
            bucket.drop_stale()
            if not bucket.entries:
                del self._buckets[place]
                if len(self._keys) > 2 * len(self._buckets) + LEAST_EMPTY:
                    self._keys = sorted(self._buckets)
        elif place == NEAR:
            entry.place = NOWHERE

    def next_due(self) -> float:
        """Return when to call `pop` next: when the first entry is due, or a little sooner; math.inf without any."""
        due = self._near[0][0] if self._near else math.inf
        bucket = self._first_bucket()
        return due if bucket is None else min(due, bucket.earliest)

    def pop(self, now: float) -> Entry | None:
        """Remove and return an entry that is due, the first to become so first; None if none is."""
        while (bucket := self._first_bucket()) is not None and bucket.earliest <= now:
            self._open(bucket)
        while self._near and self._near[0][0] <= now:
            due, _, entry = heapq.heappop(self._near)
            if entry.place == NEAR and entry.due == due:
                entry.place = NOWHERE
                return entry
        return None

    def _first_bucket(self) -> _Bucket | None:
        keys = self._keys
        while keys and keys[0] not in self._buckets:
            heapq.heappop(keys)
        return self._buckets[keys[0]] if keys else None

    def _open(self, bucket: _Bucket) -> None:
        """Move the entries of a span that has begun to the heap."""
        del self._buckets[bucket.key]
        self._near_key = bucket.key
        for entry in bucket.entries:
            if entry.place == bucket.key:
                self._put_near(entry)

    def _put_near(self, entry: Entry) -> None:
        self._serial += 1
        entry.place = NEAR
        heapq.heappush(self._near, (entry.due, self._serial, entry))
