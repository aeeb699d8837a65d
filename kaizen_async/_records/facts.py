"""What waits and the command read from a record of any kind: whether it has ended, its status, workflow and times.

Records of some kinds lack some of these attributes. Then the function returns None or an empty text.
"""

from datetime import UTC, datetime
from typing import Any


def require_end(record: type) -> None:
    """Refuse to wait for records that do not say whether an execution has ended.

    Raises:
        TypeError: The type has neither `end_time` nor a property `is_finished`.
    """
    finished = getattr(record, "is_finished", None)
    if callable(finished) or (finished is None and not hasattr(record, "end_time")):
        raise TypeError(
            f"a wait cannot see in a {record.__name__} whether the execution has ended; give {record.__name__} a field "
            "`end_time` that is None until then, or a property `is_finished`"
        )


def has_ended(record: Any) -> bool:
    """Return whether the execution has ended: `is_finished`, or else whether there is an `end_time`."""
    finished: bool | None = getattr(record, "is_finished", None)
    return getattr(record, "end_time", None) is not None if finished is None else finished


def status_of(record: Any) -> str:
    """Return the status of an execution."""
    status = getattr(record, "status", None)
    return status if isinstance(status, str) else ""


def workflow_name_of(record: Any) -> str:
    """Return the name of a record's workflow."""
    name = getattr(getattr(record, "workflow", None), "name", None)
    return name if isinstance(name, str) else ""


def workflow_id_of(record: Any) -> str | None:
    """Return the id of a record's workflow."""
    workflow_id = getattr(getattr(record, "workflow", None), "id", None)
    return workflow_id if isinstance(workflow_id, str) else None


def start_time_of(record: Any) -> datetime | None:
    """Return when an execution started."""
    start_time = getattr(record, "start_time", None)
    return start_time if isinstance(start_time, datetime) else None


def start_of(record: Any) -> float | None:
    """Return when an execution started, in seconds since the epoch."""
    start_time = start_time_of(record)
    return None if start_time is None else _timestamp(start_time)


def duration_of(record: Any) -> float | None:
    """Return the seconds that an ended execution took."""
    milliseconds = getattr(record, "duration_ms", None)
    if isinstance(milliseconds, (int, float)):
        return milliseconds / 1000
    start_time, end_time = start_time_of(record), getattr(record, "end_time", None)
    if start_time is not None and isinstance(end_time, datetime):
        return _timestamp(end_time) - _timestamp(start_time)
    return None


def _timestamp(moment: datetime) -> float:
    """Return seconds since the epoch. A record's time without a zone counts as UTC."""
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
