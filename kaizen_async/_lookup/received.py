"""The records that a client has received recently, for callers of `get(…, max_age=…)`."""

from typing import Any, Final

import msgspec

MOST_BYTES: Final = 12 * 1024 * 1024
"""Memory that the records of one generation may take, about."""

_MOST_PER_BYTE: Final = 24
"""The most memory in bytes that a record takes for each byte of its body."""
_SMALL_BODY: Final = 2048
"""Bytes of a body up to which no better estimate is made."""
_LARGE_BODY: Final = 8192
"""Bytes of a body from which on the body itself is remembered. To estimate its record would cost more than a lookup."""


class _Undecoded(msgspec.Struct, gc=False):
    """The body that a record was decoded from, in place of the record."""

    body: bytes


def _estimated_weight(body: bytes) -> int:
    """Return about how many bytes a record takes at most. To visit all its parts would cost more than the lookup.

    A value takes about 60 bytes beside its text, and an object 200. One rare character makes a text take four bytes for
    each of its characters, and the record keeps the body, too.
    """
    size = len(body)
    objects = body.count(b"{") + body.count(b"[")
    return min(size * _MOST_PER_BYTE, 5 * size + 60 * body.count(b",") + 200 * objects)


class Received:
    """Remembers the record that was received last for each id, for the ids that were received last.

    It keeps two generations, because keeping all records in the order of their reception costs more time than a lookup
    should. A record goes into the newer generation. Once that is full it becomes the older one, and the records of the
    older one before it are forgotten.

    Args:
        size: How many ids to remember; 0 for none.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._bytes = 0
        # Each with when it was received, and how many others its generation had then.
        self._newer: dict[tuple[object, str], tuple[Any, float, int]] = {}
        self._older: dict[tuple[object, str], tuple[Any, float, int]] = {}

    def put(self, endpoint: object, execution_id: str, record: Any, now: float, body: bytes) -> None:
        """Remember a record.

        Args:
            endpoint: The kind of record.
            execution_id: The id.
            record: The record.
            now: The clock's time.
            body: What it was decoded from.
        """
        if not self._size:
            return
        newer = self._newer
        size = len(body)
        if size > _LARGE_BODY:
            record, weight = _Undecoded(body), size
        else:
            weight = size * _MOST_PER_BYTE if size <= _SMALL_BODY else _estimated_weight(body)
        newer[endpoint, execution_id] = record, now, len(newer)
        self._bytes += weight
        if len(newer) >= self._size or self._bytes > MOST_BYTES:
            self._older, self._newer, self._bytes = newer, {}, 0

    def get(self, endpoint: Any, execution_id: str) -> tuple[Any, float] | None:
        """Return the last record of an id, and the clock's time at which it was received; None if it is not known."""
        key = endpoint, execution_id
        found = self._newer.get(key)
        if found is None:
            found = self._older.get(key)
            if found is None or len(self._older) - found[2] + len(self._newer) > self._size:
                return None
        record, received_at, _ = found
        if isinstance(record, _Undecoded):
            record = endpoint.decode(record.body, execution_id)
        return record, received_at
