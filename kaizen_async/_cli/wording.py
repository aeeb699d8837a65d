"""How numbers, durations and errors are put for people."""

from collections.abc import Mapping

from kaizen_async.errors import KaizenError, printable

_MINUTE = 60
_HOUR = 60 * _MINUTE
_DAY = 24 * _HOUR
_UNITS = ((_DAY, "d", _HOUR, "h"), (_HOUR, "h", _MINUTE, "min"), (_MINUTE, "min", 1, "s"))


def spell(seconds: float) -> str:
    """Return a duration in its two leading units: `42 s`, `3 min 5 s`, `2 h 13 min`."""
    whole = round(seconds)
    for size, name, part_size, part_name in _UNITS:
        if whole >= size:
            return f"{whole // size} {name} {whole % size // part_size} {part_name}"
    return f"{whole} s"


def message_of(error: KaizenError) -> str:
    """Return what an error says, without the id that stands beside it."""
    return str(error).removeprefix(f"{printable(error.execution_id)}: ")


def described(error: KaizenError) -> dict[str, str]:
    """Return an error as it stands in a line of JSON."""
    return {"type": type(error).__name__, "message": message_of(error)}


def by_status(counts: Mapping[str, int], errors: int) -> str:
    """Return how many are in which status."""
    words = [f"{printable(status)} {count:,}" for status, count in sorted(counts.items()) if count > 0]
    return " · ".join(words + [f"errors {errors:,}"] * bool(errors))
