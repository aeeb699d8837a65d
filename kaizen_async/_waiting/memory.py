"""What waits keep of records: those of ended executions, and the last one of each wait. Both are bounded in bytes."""

from collections import OrderedDict
from typing import Any, Final

import msgspec

from kaizen_async._records.base import bytes_held

MOST_PER_RECORD: Final = 64 * 1024
"""Bytes of a record above which it is handed to the caller and not kept. The documented example takes 3 KiB."""
MOST_ENDED: Final = 20 * 1024 * 1024
"""Bytes of all remembered records of ended executions."""
LIGHT: Final = 8 * 1024
"""Bytes of a record up to which the last one of every wait is kept, however many waits there are."""
MOST_HEAVY: Final = 12 * 1024 * 1024
"""Bytes of the heavier last records of all waits."""


class EndedRecords:
    """The records of executions that have ended, the latest used kept. An ended execution never changes again.

    Args:
        most: How many records are kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._records: OrderedDict[tuple[object, str], tuple[Any, int]] = OrderedDict()
        self._weight = 0

    def get(self, endpoint: object, execution_id: str) -> Any:
        """Return the record, or None."""
        kept = self._records.get((endpoint, execution_id))
        if kept is None:
            return None
        self._records.move_to_end((endpoint, execution_id))
        return kept[0]

    def put(self, endpoint: object, execution_id: str, record: Any) -> None:
        """Keep a record, and forget those that were not asked for the longest."""
        weight = bytes_held(record, MOST_PER_RECORD)
        if not self._most or weight > MOST_PER_RECORD:
            return
        self._forget(self._records.pop((endpoint, execution_id), None))
        self._records[endpoint, execution_id] = record, weight
        self._weight += weight
        while len(self._records) > self._most or self._weight > MOST_ENDED:
            self._forget(self._records.popitem(last=False)[1])

    def _forget(self, kept: tuple[Any, int] | None) -> None:
        if kept is not None:
            self._weight -= kept[1]


class TooHeavy(msgspec.Struct, gc=False, frozen=True):
    """Stands for a last record that is too heavy to be kept."""

    digest: int | None

    @classmethod
    def of(cls, record: Any) -> "TooHeavy":
        """Return what stands for a record."""
        try:
            return cls(hash(record))
        except TypeError:
            return cls(None)

    def stands_for(self, record: Any) -> bool:
        """Return whether it stands for an equal record."""
        return self.digest is not None and self.digest == TooHeavy.of(record).digest


class HeavyRecords:
    """Bounds the last records of waits in bytes."""

    def __init__(self) -> None:
        self._weights: dict[tuple[object, str], int] = {}
        self._weight = 0

    def keep(self, endpoint: object, execution_id: str, record: Any) -> Any:
        """Return what is to be kept of the last record of a wait: the record, or what stands for it."""
        self.forget(endpoint, execution_id)
        weight = bytes_held(record, MOST_PER_RECORD)
        if weight <= LIGHT:
            return record
        if weight > MOST_PER_RECORD or self._weight + weight > MOST_HEAVY:
            return TooHeavy.of(record)
        self._weights[endpoint, execution_id] = weight
        self._weight += weight
        return record

    def forget(self, endpoint: object, execution_id: str) -> None:
        """Note that nothing is kept of the last record any more."""
        if self._weights:
            self._weight -= self._weights.pop((endpoint, execution_id), 0)
