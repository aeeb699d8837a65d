"""Reads JSON that is slightly off, where a wrong guess is cheap. `models.py` lists what is read how, and why.

None of this runs for a response that decodes at once and has no zero time.
"""

import re
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Final, TypeAlias, cast

import msgspec
from msgspec import inspect

Repair: TypeAlias = Callable[[Any], Any]

LARGEST_REPAIR: Final = 128 * 1024
"""Bytes of JSON above which nothing is repaired, because Python code that walks through more would hold up the loop."""

MOST_PARTS: Final = 256
"""Elements of a list of the API in a record. A list of empty objects takes 19 times its size on the wire in memory."""

_HALVES: Final = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"  # a whole pair
    rb"|(?P<escaped>\\u[dD][89a-fA-F][0-9a-fA-F]{2})"
    rb"|\\."
    rb"|(?P<encoded>\xed[\xa0-\xbf][\x80-\xbf])",
    re.DOTALL,
)
_BOM: Final = b"\xef\xbb\xbf"

_MOMENT: Final = re.compile(
    r"(?P<date>\d{4}-\d\d-\d\d)"
    r"(?:[Tt ](?P<hour>\d\d):(?P<minute>\d\d)(?::(?P<second>\d\d)(?:[.,](?P<fraction>\d+))?)?)?"
    r" ?(?P<zone>[Zz]|UTC|[+-]\d\d(?::?\d\d)?)?",
    re.ASCII,
)
_NO_YEAR: Final = "0000-00-00"
"""How MySQL writes a time that is not set."""


def parse(body: bytes) -> Any:
    """Return the Python objects in a body of JSON, read as tolerantly as a record is.

    Raises:
        msgspec.DecodeError: The body is not JSON.
    """
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return msgspec.json.decode(clean(body))


def clean(body: bytes) -> bytes:
    r"""Return JSON without a byte order mark and without half surrogates, which become U+FFFD as in a browser.

    JavaScript and .NET keep text in UTF-16. Cut in the middle of a character there, half of a pair remains: escaped
    (`"\ud83d"`), or encoded as if it were a character. What is replaced keeps its length, so that places in the JSON
    stay the same.
    """
    if body.startswith(_BOM):
        body = b"   " + body[3:]
    return _HALVES.sub(_whole, body)


def _whole(found: re.Match[bytes]) -> bytes:
    if found["escaped"]:
        return rb"\ufffd"
    return "\ufffd".encode() if found["encoded"] else found[0]


def is_zero(moment: datetime | None) -> bool:
    """Return whether a time says "not set", as Go and .NET write it: 0001-01-01."""
    return moment is not None and moment.year == 1 and moment.timetuple().tm_yday == 1


def parse_moment(text: str) -> datetime | str | None:
    """Return the time in a text, None if the text says "not set", or the text itself if it is not a time.

    A leap second is the first moment of the next minute, and 24:00 is the midnight that follows. Digits beyond the
    microsecond are dropped. A time without an offset is in UTC, and a date alone is its midnight.
    """
    if text.startswith(_NO_YEAR):
        return None
    found = _MOMENT.fullmatch(text.strip())
    if found is None:
        return text
    hour, minute, second = (int(found[name] or 0) for name in ("hour", "minute", "second"))
    zone = (found["zone"] or "Z").upper().replace("UTC", "Z")
    microsecond = int((found["fraction"] or "0")[:6].ljust(6, "0"))
    try:
        moment = datetime.fromisoformat(f"{found['date']}T00:00:00{zone}")
        if hour > 24 or minute > 59 or second > 60 or (hour == 24 and (minute or second or microsecond)):  # noqa: PLR2004 - the clock
            return text
        moment += timedelta(hours=hour, minutes=minute, seconds=second, microseconds=microsecond)
    except (ValueError, OverflowError):
        return text
    return None if is_zero(moment) else moment


def time_fields(record: type[Any]) -> set[str]:
    """Return the names of the fields of a Struct that hold times."""
    return {
        field.name
        for field in _fields_of(record)
        if any(isinstance(one, inspect.DateTimeType) for one in _kinds(field.type))
    }


def _fields_of(record: type[Any]) -> tuple[inspect.Field, ...]:
    kind = inspect.type_info(record)
    return kind.fields if isinstance(kind, inspect.StructType) else ()


@lru_cache(maxsize=256)
def repair_of(record: type[Any]) -> Repair:
    """Return the function that repairs parsed JSON so that it fits a type, as far as that is safe."""
    return cast("Repair", _repair(inspect.type_info(record), {}))  # of a Struct there always is one


def _repair(kind: inspect.Type, known: dict[type, Repair | None]) -> Repair | None:
    """Return the repair for values of a type; None if there is nothing to repair in them."""
    match kind:
        case inspect.DateTimeType():
            return lambda value: parse_moment(value) if isinstance(value, str) else value
        case inspect.StructType(cls=cls):
            if cls not in known:
                known[cls] = None  # ends the recursion for a type that contains itself
                known[cls] = _repair_struct(kind, known)
            return lambda value: cast("Repair", known[cls])(value)  # noqa: PLW0108 - it may be unknown as yet
        case inspect.Metadata(type=inner):
            return _repair(inner, known)
        case inspect.ListType(item_type=item) | inspect.VarTupleType(item_type=item):
            return _repair_items(_repair(item, known))
        case inspect.UnionType(types=kinds):
            repairs = [repair for repair in (_repair(one, known) for one in kinds) if repair is not None]
            return repairs[0] if len(repairs) == 1 else None
        case _:
            return None


def _repair_items(repair: Repair | None) -> Repair | None:
    if repair is None:
        return None

    def repair_items(value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        items = cast("list[Any]", value)
        return [repair(item) for item in items] if len(items) <= MOST_PARTS else items

    return repair_items


def _repair_struct(kind: inspect.StructType, known: dict[type, Repair | None]) -> Repair:
    repairs = {field.encode_name: _repair(field.type, known) for field in kind.fields}
    may_lack = {field.encode_name for field in kind.fields if not field.required and not _allows_null(field.type)}

    def repair_fields(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        repaired: dict[str, Any] = {}
        for name, part in cast("Mapping[str, Any]", value).items():
            if part is None and name in may_lack:
                continue  # null says as little as a field that is absent
            repair = repairs.get(name)
            repaired[name] = part if repair is None else repair(part)
        return repaired

    return repair_fields


def _allows_null(kind: inspect.Type) -> bool:
    return any(isinstance(one, inspect.NoneType | inspect.AnyType) for one in _kinds(kind))


def _kinds(kind: inspect.Type) -> tuple[inspect.Type, ...]:
    """Return the members of a union, or a type alone."""
    inner = kind.type if isinstance(kind, inspect.Metadata) else kind
    return inner.types if isinstance(inner, inspect.UnionType) else (inner,)
