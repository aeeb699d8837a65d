"""The records that a client has received lately, for callers to whom one of some seconds ago is good enough."""

from collections import OrderedDict
from typing import Any, Final

MOST_BYTES: Final = 24 * 1024 * 1024
"""Memory that all of them may take, about."""

_SMALL_BODY: Final = 2048
_MOST_PER_BYTE: Final = 24
"""The most memory in bytes that a record takes for each byte of its body."""


def _estimated_weight(body: bytes) -> int:
    """Return about how many bytes a record takes at most. To visit all its parts would cost more than the lookup.

    A value takes about 60 bytes beside its text, and an object 200. One rare character makes a text take four bytes for
    each of its characters, and the record keeps the body, too.
    """
    size = len(body)
    most = size * _MOST_PER_BYTE
    if size <= _SMALL_BODY:
        return most
    objects = body.count(b"{") + body.count(b"[")
    return min(most, 5 * size + 60 * body.count(b",") + 200 * objects)


class Received:
    """Remembers the record that was received last for each id; of these, as many as were received last.

    Args:
        size: How many to remember; 0 for none.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._bytes = 0
        self._records: OrderedDict[tuple[object, str], tuple[Any, float, int]] = OrderedDict()

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
        key = endpoint, execution_id
        weight = _estimated_weight(body)
        before = self._records.pop(key, None)
        self._records[key] = record, now, weight
        self._bytes += weight - (0 if before is None else before[2])
        while len(self._records) > self._size or self._bytes > MOST_BYTES:
            self._bytes -= self._records.popitem(last=False)[1][2]

    def get(self, endpoint: object, execution_id: str) -> tuple[Any, float] | None:
        """Return the last record of an id, and the clock's time at which it was received; None if it is not known."""
        found = self._records.get((endpoint, execution_id))
        return None if found is None else found[:2]
