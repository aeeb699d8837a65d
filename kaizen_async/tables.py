"""Outcomes as columns, for pandas, polars and pyarrow."""

import math
from collections.abc import Iterable, Sized
from datetime import UTC, datetime
from typing import Any, cast

import msgspec

from kaizen_async.outcomes import Outcome


def to_columns(outcomes: Iterable[Outcome[Any]]) -> dict[str, list[Any]]:
    """Return outcomes as columns, which all libraries of tables take: `pandas.DataFrame(to_columns(outcomes))`.

    There is one row for each outcome. The columns are the fields of the record in snake case, those of a part by both
    names (`workflow_name`), and of a list its length (`logins_count`). They are followed by `succeeded`, `attempts`,
    `elapsed` (seconds), `request_id`, `error_type` and `error`, the text of the error. A field of the record with one
    of these names gets the column `execution_…`. What an outcome does not have is None. Times are datetimes in UTC.

    Args:
        outcomes: What `get_many` returns, or any other outcomes, such as `[outcome async for outcome in outcomes]`.
    """
    rows = [_row(outcome) for outcome in outcomes]
    names = dict.fromkeys(name for row in rows for name in row)
    trailing = [name for name in _LOOKUP_COLUMNS if name in names]
    ordered = [*(name for name in names if name not in _LOOKUP_COLUMNS), *trailing]
    return {name: [row.get(name) for row in rows] for name in ordered}


_LOOKUP_COLUMNS = ("succeeded", "attempts", "elapsed", "request_id", "error_type", "error")


def _row(outcome: Outcome[Any]) -> dict[str, Any]:
    error, record = outcome.error, outcome.execution
    fields = {} if record is None else _flat(record)
    return {
        "id": outcome.id,
        **{f"execution_{name}" if name in _LOOKUP_COLUMNS else name: value for name, value in fields.items()},
        "succeeded": getattr(record, "succeeded", None),
        "attempts": outcome.attempts,
        "elapsed": outcome.elapsed,
        "request_id": outcome.request_id,
        "error_type": None if error is None else type(error).__name__,
        "error": None if error is None else str(error),
    }


def _flat(part: msgspec.Struct) -> dict[str, Any]:
    """Return the fields of a Struct, and those of the Structs in it, as plain values that one column can hold."""
    row: dict[str, Any] = {}
    for name in part.__struct_fields__:
        value = getattr(part, name)
        match value:
            case msgspec.Struct():
                row |= {f"{name}_{inner}": inner_value for inner, inner_value in _flat(value).items()}
            case tuple() | list() | set() | frozenset():
                row[f"{name}_count"] = len(cast("Sized", value))
            case datetime():
                row[name] = _in_utc(value)
            case str():
                row[name] = str.__str__(value)  # a status is a text of a class of its own
            case bool() | None:
                row[name] = value
            case int() | float():
                row[name] = _as_float(value)
            case _:
                row[name] = msgspec.json.encode(value).decode()
    return row


def _in_utc(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        return moment.replace(tzinfo=UTC)
    try:
        return moment.astimezone(UTC)
    except OverflowError:  # within a day of the years 1 and 9999, beyond which there is no datetime
        return moment.replace(tzinfo=UTC)


def _as_float(number: float) -> float:
    """Return a number as a float: JSON makes no difference, so a column must not mix the two."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf
