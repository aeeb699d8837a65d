"""What a record tells a wait: whether the execution has ended, when it started, its workflow, how long it took.

A record of the user's own type may lack some of that. Then the wait does without it.
"""

from datetime import UTC, datetime
from typing import Any


def require_end(record: type) -> None:
    """Refuse to wait for records that do not tell whether an execution has ended.

    Raises:
        TypeError: The type has neither `end_time` nor a property `is_finished`.
    """
    finished = getattr(record, "is_finished", None)
    if callable(finished) or (finished is None and not hasattr(record, "end_time")):
        raise TypeError(
            f"waiting takes records that tell when the execution ended: give {record.__name__} a field `end_time` "
            "that is None until then, or a property `is_finished`"
        )


def workflow_of(record: Any) -> str | None:
    """Return the id of a record's workflow, if it names one."""
    workflow_id = getattr(getattr(record, "workflow", None), "id", None)
    return workflow_id if isinstance(workflow_id, str) else None


def start_of(record: Any) -> float | None:
    """Return when an execution started, in seconds since the epoch, if its record says so."""
    start_time = getattr(record, "start_time", None)
    return _timestamp(start_time) if isinstance(start_time, datetime) else None


def duration_of(record: Any) -> float | None:
    """Return the seconds that an ended execution took, if its record says so."""
    milliseconds = getattr(record, "duration_ms", None)
    if isinstance(milliseconds, (int, float)):
        return milliseconds / 1000
    start_time, end_time = getattr(record, "start_time", None), getattr(record, "end_time", None)
    if isinstance(start_time, datetime) and isinstance(end_time, datetime):
        return _timestamp(end_time) - _timestamp(start_time)
    return None


def _timestamp(moment: datetime) -> float:
    """Return seconds since the epoch. A record's time without a zone counts as UTC."""
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
