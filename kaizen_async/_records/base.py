"""The base of all records: typed fields, and behind them the JSON that they came from.

A record refers to the bytes of its response, which were read anyway. They are not decoded until a program reads
`raw`, `extra` or `to_dict()`. The reference lies in a slot that is not a field, so comparing, hashing, printing and
encoding a record never look at it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from itertools import chain
from sys import getsizeof
from typing import Any, ClassVar, Final, Self, TypeAlias, TypeVar, cast

import msgspec

from kaizen_async._records.schema import PydanticSerializer, record_schema
from kaizen_async._records.tolerance import clean, parse, repair_of

P = TypeVar("P", bound="Part")
R = TypeVar("R")

Source: TypeAlias = bytes | tuple[Any, str | int] | str
"""Where the JSON of a record is: a body; a place in another source; or, if it was not kept, the reason."""

NOT_KEPT: Final = "the client was created with keep_raw=False"
STILL_RUNNING: Final = "waits keep it only for executions that have ended"


class _Sourced:
    """Adds one slot that is not a field of the Struct."""

    __slots__ = ("_source",)
    _source: Source


class Part(_Sourced, msgspec.Struct, frozen=True, rename="camel", gc=False):
    """Base of every Struct of the API: immutable, in camel case on the wire, not tracked by the garbage collector."""

    @property
    def extra(self) -> dict[str, Any]:
        """The fields that the server sent and that have no attribute here, by the API's names.

        Empty for a record that was not received. It is decoded each time it is read.

        Raises:
            AttributeError: The JSON was not kept, so the unknown fields are not known.
        """
        source = source_of(self)
        if source is None:
            return {}
        known = _known_names(type(self))
        return {name: value for name, value in _object_at(source).items() if name not in known}

    def to_dict(self) -> dict[str, Any]:
        """Return all that the server sent, by the API's names, as plain Python objects.

        Times are texts, numbers are as they were sent. If the JSON was not kept, it is the typed fields alone.
        """
        source = source_of(self)
        if source is None or isinstance(source, str):
            return cast("dict[str, Any]", msgspec.to_builtins(self))
        return _object_at(source)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Return the record in a JSON object that was parsed already, as `to_dict()` gives it.

        Raises:
            msgspec.ValidationError: The object is not such a record. It is a ValueError.
        """
        record = msgspec.convert(repair_of(cls)(fields), cls)
        with suppress(TypeError):  # what JSON cannot hold was not received as JSON
            set_source(record, msgspec.json.encode(fields))
        return record

    def __copy__(self) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, arguments = cast("tuple[Any, Any]", super().__reduce__())
        return _restore, (rebuild, arguments, source_of(self))

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Yield names and values, so that `dict(record)` works, which FastAPI's `jsonable_encoder` tries."""
        return iter(self.to_dict().items())

    def __json__(self, _request: object = None) -> dict[str, Any]:
        """Return what the JSON serializers of Celery and Pyramid write."""
        return self.to_dict()

    __pydantic_serializer__: ClassVar = PydanticSerializer()
    """Pydantic uses it to write a record whose annotation is not a record type, such as `Any`."""

    @classmethod
    def __get_pydantic_core_schema__(cls, _source_type: object, handler: Any) -> Any:
        """Tell pydantic how to read, write and describe a record."""
        return record_schema(cls, handler)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> Any:
        """Add the first line of the docstring to what pydantic describes."""
        described = handler(schema)
        handler.resolve_ref_schema(described)["description"] = (cls.__doc__ or "").partition("\n")[0]
        return described


class Record(Part, frozen=True, gc=False):
    """Base of the records that lookups return.

    A record type of your own gets `raw`, `extra` and `to_dict()` by deriving from it:
    `class Brief(Record, frozen=True, gc=False)`.
    """

    @property
    def raw(self) -> bytes:
        """The JSON of the record, byte for byte as it was received and unpacked.

        Raises:
            AttributeError: The record was not received, or its JSON was not kept; the message says why.
        """
        source = source_of(self)
        if isinstance(source, bytes):
            return source
        if source is None:
            raise AttributeError("this record has no raw JSON, because no lookup returned it in this form")
        if isinstance(source, str):
            raise AttributeError(f"the raw JSON of this record was not kept: {source}")  # noqa: TRY004 - as for any attribute
        body, name = source
        return unwrapped(cast("bytes", body), cast("str", name))


_slot: Final[Any] = _Sourced.__dict__["_source"]
set_source: Final[Callable[[Part, Source], None]] = _slot.__set__
"""Sets where the JSON of a record is."""


def source_of(part: Part) -> Source | None:
    """Return where the JSON of a record or part is; None if it was not received."""
    return getattr(part, "_source", None)


def without_raw(record: R) -> R:
    """Return an equal record that does not hold on to the body of its response. Others are returned as they are."""
    if not isinstance(record, Part) or isinstance(source_of(record), str | None):
        return record
    light = msgspec.structs.replace(record)
    set_source(light, STILL_RUNNING)
    return light


def bytes_held(record: object, most: float = math.inf) -> int:
    """Return about how many bytes of memory a record holds, its JSON included. Counting stops above `most`.

    A small response can become a large record, so what is kept is bounded in bytes.
    """
    weight = 0
    counted: set[int] = set()
    todo: list[Any] = [record]
    while todo and weight <= most:
        part = todo.pop()
        if id(part) in counted:
            continue
        counted.add(id(part))
        if isinstance(part, msgspec.Raw):
            weight += memoryview(part).nbytes  # getsizeof of a Raw returns any number
            continue
        weight += getsizeof(part)
        if isinstance(part, msgspec.Struct):
            todo.extend(msgspec.structs.astuple(part))
            if isinstance(part, Part) and not isinstance(source := source_of(part), str):
                todo.append(source)
        elif isinstance(part, (tuple, list, set, frozenset)):
            todo.extend(cast("Iterable[Any]", part))
        elif isinstance(part, Mapping):
            todo.extend(chain.from_iterable(cast("Iterable[tuple[Any, Any]]", part.items())))
    return weight


def linked(*names: str) -> Callable[[type[P]], type[P]]:
    """Have the parts in these fields know where in the JSON they are, from the moment that they are read.

    Telling each part when a record is decoded would cost every lookup; this costs the readers of a field.
    """

    def link(cls: type[P]) -> type[P]:
        for field in msgspec.structs.fields(cls):
            if field.name in names:
                setattr(cls, field.name, _Link(cls.__dict__[field.name], field.encode_name))
        return cls

    return link


class _Link:
    """Reads a field, and tells the parts in it where in the JSON they are.

    Equal copies of a record share their parts, and so do all records in which a part is absent. So a part that does not
    belong to this JSON yet is replaced by a copy that does.
    """

    def __init__(self, member: Any, name: str) -> None:
        self._read = member.__get__
        self._write = member.__set__
        self._name = name

    def __get__(self, part: Part | None, owner: type[Part] | None = None) -> Any:
        if part is None:
            return self
        value: Any = self._read(part, owner)
        source: Source | None = getattr(part, "_source", None)
        if source is None or not value:
            return value
        is_list = isinstance(value, tuple)
        first = cast("Any", value)[0] if is_list else value
        known: Any = getattr(first, "_source", None)
        # Of a part that was read before, it is a place in the JSON of its record, or in a list there.
        if isinstance(known, tuple):
            known = cast("Any", known)[0]
            known = known[0] if is_list else known
        if known is not source:
            value = self._copied(value, source)
            self._write(part, value)
        return value

    def _copied(self, value: Part | tuple[Part, ...], source: Source) -> Part | tuple[Part, ...]:
        if isinstance(value, Part):
            return _copy_at(value, source if isinstance(source, str) else (source, self._name))
        return tuple(
            _copy_at(part, source if isinstance(source, str) else ((source, self._name), index))
            for index, part in enumerate(value)
        )


def _copy_at(part: P, place: Source) -> P:
    copy = msgspec.structs.replace(part)
    set_source(copy, place)
    return copy


def _object_at(source: Source) -> dict[str, Any]:
    found: Any = _at(source)
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def _at(source: Source) -> Any:
    if isinstance(source, bytes):
        return parse(source)
    if isinstance(source, str):
        raise AttributeError(f"the unknown fields of this record were not kept: {source}")  # noqa: TRY004 - as above
    outer, place = source
    found = _at(outer)
    try:
        return found[place]
    except (KeyError, TypeError):  # the part was absent or null, and is read as empty
        return None


@lru_cache(maxsize=256)
def _known_names(cls: type[Part]) -> frozenset[str]:
    return frozenset(field.encode_name for field in msgspec.structs.fields(cls))


@lru_cache(maxsize=256)
def _raw_decoder(name: str) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(msgspec.defstruct("Body", [("record", msgspec.Raw)], rename={"record": name}))


def unwrapped(body: bytes, name: str) -> bytes:
    """Return the bytes of the record in a body that wraps it in a field."""
    decode = _raw_decoder(name).decode
    try:
        return bytes(decode(body).record)
    except (msgspec.DecodeError, UnicodeDecodeError):
        cleaned = clean(body)
        record = bytes(decode(cleaned).record)
    start = cleaned.index(record)
    return body[start : start + len(record)]


def _restore(rebuild: Callable[..., P], arguments: tuple[Any, ...], source: Source | None) -> P:
    """Rebuild a record or part from a pickle."""
    part = rebuild(*arguments)
    if source is not None:
        set_source(part, source)
    return part
