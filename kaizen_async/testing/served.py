"""Kinds of lookups of a user's own: `emulator.serve("invoices/get", {...})`."""

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any, TypeAlias, cast

from kaizen_async.testing.faults import Answer
from kaizen_async.testing.lives import Life
from kaizen_async.testing.records import Record

Served: TypeAlias = Mapping[str, Any] | Life | Callable[[str], Mapping[str, Any] | Life | Answer | None]
"""One record, records by id, a life, or a function from an id to a record, a life, a response or None."""


def finder(served: Any) -> Callable[[str], Mapping[str, Any] | Life | Answer | None]:
    """Return a function from an id to its record, life or response; None for an id that does not exist."""
    if isinstance(served, Life):
        life = served
        return lambda _: life
    if isinstance(served, Mapping):
        records = cast("Mapping[str, Any]", served)
        if isinstance(records.get("id"), str):
            return lambda execution_id: records if execution_id == records["id"] else None
        if all(isinstance(record, (Mapping, Life)) for record in records.values()):
            return records.get
        return lambda _: records
    if callable(served):
        function: Callable[[str], Any] = served
        return function
    raise TypeError(
        f"serve() takes a record, records by id, a Life, or a function from an id to one of these, not {served!r:.100}"
    )


def record_of(execution_id: str, life: Life, start: datetime, age: float) -> Record:
    """Return the record of a life: what waiting needs, and the fields that the life sets."""
    duration = life.duration if life.duration is not None and age >= life.duration else None
    return {
        "id": execution_id,
        "status": life.status_at(age),
        "startTime": start,
        "endTime": None if duration is None else start + timedelta(seconds=duration),
        "durationMs": None if duration is None else round(duration * 1000),
        **life.fields_at(age),
    }
