"""What goes over the wire and what a response means: bytes and headers in, a record or an error out.

Nothing here touches a socket, a clock or a loop, so all of it can be tested with recorded bytes.
"""

import re
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar, cast
from unicodedata import normalize
from urllib.parse import unquote

import msgspec
from yarl import URL

from kaizen_async._records.base import NOT_KEPT, Record, bytes_held, set_source, unwrapped
from kaizen_async._records.tolerance import LARGEST_REPAIR, clean, repair_of, time_fields
from kaizen_async.errors import DecodeError, printable, quoted

T = TypeVar("T")

_MISFIT_PLACE: Final = re.compile(r" - at `([^`]+)`$")
_MISSING_FIELD: Final = re.compile(r"^Object missing required field `([^`]+)`")

_CLIMBING: Final = re.compile(r"[\s\x00-\x1f]*\.[\s\x00-\x1f]*\.[\s\x00-\x1f.]*(;.*)?", re.DOTALL)
_STEPS: Final = re.compile(r"\.([^.\[]+)|\[(\d+)\]")
LARGE_BODY: Final = 32 * 1024
LARGEST_RECORD: Final = 256 * 1024
"""Bytes of memory that the documented fields of a record may take, if its body is larger than `LARGE_BODY`."""

_encode: Final = msgspec.json.Encoder().encode


def request_body(execution_id: str) -> bytes:
    """Return the JSON body that asks for one execution."""
    return _encode({"id": execution_id})


class Endpoint(Generic[T]):
    """One kind of lookup: its path, and how its 2xx responses become records.

    Args:
        path: Path below the base URL.
        record: A msgspec Struct type with a field `id`. A field `raw: msgspec.Raw` gets the record's whole JSON.
        unwrap: Name of the field of the response that holds the record; None if the response is the record.
        keep_raw: Whether a record of the library keeps the body that it came from.
    """

    def __init__(self, path: str, record: type[T], unwrap: str | None = None, *, keep_raw: bool = True) -> None:
        self.path = path
        try:
            self.url = URL(path)
        except (ValueError, IndexError):  # yarl raises IndexError for "//[]@"
            raise ValueError(f"path must be part of a URL, and {path!r:.200} is not") from None
        if self.url.scheme or not path or path.startswith("/"):
            raise ValueError(f"path must be relative to base_url, without a leading slash: {path!r}")
        if "id" not in getattr(record, "__struct_fields__", ()):
            raise TypeError(f"record must be a msgspec.Struct type with a field `id`, not {record!r}")
        fields = msgspec.structs.fields(cast("type[msgspec.Struct]", record))
        self._unwrap = unwrap
        self.id_path = "$.id" if unwrap is None else f"$.{unwrap}.id"
        self._has_source = issubclass(record, Record)
        self._keep_raw = keep_raw
        self._fills_raw = any(field.name == "raw" and field.type is msgspec.Raw for field in fields)
        times = time_fields(record)
        self._has_start, self._has_end = "start_time" in times, "end_time" in times
        self.record = record
        self._body: Any = record
        if unwrap is not None:
            self._body = msgspec.defstruct("Body", [("record", record)], rename={"record": unwrap})
        self._decode: Callable[[bytes], Any] = msgspec.json.Decoder(self._body).decode

    def url_below(self, base_url: URL) -> URL:
        """Return the URL to ask.

        Raises:
            ValueError: It is not below the base URL, so the key would go to another place.
        """
        url = base_url.join(self.url)
        # yarl drops control characters and resolves dots. A server may also resolve escaped dots, wide dots, dots
        # before a space, and bytes that are not valid UTF-8.
        below = normalize("NFKC", _unquoted(url.raw_path.removeprefix(base_url.raw_path))).replace("\\", "/")
        climbs = "\ufffd" in below or any(_CLIMBING.fullmatch(segment) for segment in below.split("/"))
        is_elsewhere = (url.scheme, url.raw_authority) != (base_url.scheme, base_url.raw_authority)
        if is_elsewhere or climbs or not url.raw_path.startswith(base_url.raw_path):
            raise ValueError(f"path must lead to a place below base_url, and {self.path!r:.200} does not")
        return url

    def decode(self, body: bytes, execution_id: str) -> T:
        """Return the record in a body.

        Raises:
            DecodeError: The body is not JSON, does not fit, or holds the record of another id.
        """
        try:
            record: Any = self._decode(body)
            if self._unwrap is not None:
                record = record.record
            if (self._has_end and (end := record.end_time) is not None and end.year == 1) or (
                self._has_start and (start := record.start_time) is not None and start.year == 1
            ):
                record = self._repaired(body)
        except Exception as error:  # noqa: BLE001 - the hooks of a user's Struct may raise anything; it costs one record
            record = self._read_again(body, error.with_traceback(None))
        if record.id != execution_id and _spelling(record.id) != _spelling(execution_id):
            reason = f"the server returned the record of another id, {quoted(repr(printable(str(record.id))))}"
            raise DecodeError(reason, path=self.id_path, body=body, retryable=True)
        if len(body) > LARGE_BODY and bytes_held(record, LARGEST_RECORD) > LARGEST_RECORD:
            reason = f"the documented fields of the record take more than {LARGEST_RECORD} bytes of memory"
            raise DecodeError(reason, path="$", body=body)
        if self._has_source:
            source: Any = body if self._unwrap is None else (body, self._unwrap)
            set_source(record, source if self._keep_raw else NOT_KEPT)
        elif self._fills_raw:
            msgspec.structs.force_setattr(record, "raw", msgspec.Raw(self._raw(body)))
        found: T = record
        return found

    def _read_again(self, body: bytes, error: Exception) -> Any:
        """Return the record in a body that did not decode, read more tolerantly, or raise the error that says why not.

        Raises:
            DecodeError: It cannot be read.
        """
        if isinstance(error, (msgspec.DecodeError, UnicodeDecodeError)) and len(body) <= LARGEST_REPAIR:
            try:
                return self._repaired(clean(body))
            except Exception as second:  # noqa: BLE001 - as in `decode`
                error = second.with_traceback(None)
        raise self._misfit(error, body) from None

    def _repaired(self, body: bytes) -> Any:
        found: Any = msgspec.convert(repair_of(self._body)(msgspec.json.decode(body)), self._body)
        return found if self._unwrap is None else found.record

    def _raw(self, body: bytes) -> bytes:
        return body.strip() if self._unwrap is None else unwrapped(body, self._unwrap)

    def _misfit(self, error: Exception, body: bytes) -> DecodeError:
        """Return the DecodeError for what a decoder raised.

        Malformed JSON may be a body that was cut off on its way (a truncated gzip body arrives as a complete one), so
        it is worth another attempt. The rest is what the server meant to say. ValidationError is a subclass of
        msgspec's DecodeError, so it is looked at first.
        """
        text = quoted(str(error))
        if isinstance(error, msgspec.ValidationError):
            path = _misfit_path(str(error))
            reason = f"the response does not fit the record: {text}{_shown_value(body, path)}{self._advice()}"
            return DecodeError(reason, path=path, body=body)
        if isinstance(error, msgspec.DecodeError):
            reason = f"the response is not JSON: {text}" if body else "the response is empty"
            return DecodeError(reason, path=None, body=body, retryable=True)
        if isinstance(error, RecursionError):
            return DecodeError("the response is nested too deeply", path="$", body=body)
        reason = f"the response does not fit the record: {type(error).__name__}: {text}"
        return DecodeError(reason, path="$", body=body)

    def _advice(self) -> str:
        if not self._has_source:
            return ""
        wrapped = "" if self._unwrap is None else f", unwrap={self._unwrap!r}"
        call = f"kaizen.lookups({self.path!r}, MyStruct{wrapped})"
        return f". To read it all the same, declare the fields that you use: {call}"


def _unquoted(path: str) -> str:
    """Return a path with all that is escaped in it read, also what was escaped more than once."""
    while (read := unquote(path)) != path:
        path = read
    return path


def _spelling(execution_id: object) -> str:
    """Return an id without what servers change when they repeat it: its case, its Unicode form, the space around it."""
    return normalize("NFKC", normalize("NFKC", str(execution_id)).casefold()).strip()


def _misfit_path(message: str) -> str:
    place = _MISFIT_PLACE.search(message)
    path = place[1] if place else "$"
    field = _MISSING_FIELD.match(message)
    return f"{path}.{field[1]}" if field else path


def _shown_value(body: bytes, path: str) -> str:
    """Return what came at a place of a body, for an error text; nothing for what is absent, long or not plain."""
    if len(body) > LARGEST_REPAIR:
        return ""
    try:
        value = msgspec.json.decode(clean(body))
        for name, index in _STEPS.findall(path):
            value = value[name] if name else value[int(index)]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, LookupError, TypeError):
        return ""
    return "" if isinstance(value, dict | list) else f"; it is {quoted(msgspec.json.encode(value).decode(), 60)}"
