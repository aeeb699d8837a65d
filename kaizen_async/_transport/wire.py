"""What goes over the wire and what an answer means: bytes and headers in, a record or an error out.

Nothing here touches a socket, a clock or a loop, so all of it can be tested with recorded bytes.
"""

import re
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar, cast
from urllib.parse import unquote

import msgspec
from yarl import URL

from kaizen_async.errors import (
    DecodeError,
    printable,
)

T = TypeVar("T")

_MISFIT_PLACE: Final = re.compile(r" - at `([^`]+)`$")
_MISSING_FIELD: Final = re.compile(r"^Object missing required field `([^`]+)`")

_encode: Final = msgspec.json.Encoder().encode


def request_body(execution_id: str) -> bytes:
    """Return the JSON body that asks for one execution."""
    return _encode({"id": execution_id})


class Endpoint(Generic[T]):
    """One kind of look-up: where it is asked, and how its 2xx answers become records.

    Args:
        path: Path below the base URL.
        record: A msgspec Struct type with a field `id`. A field `raw: msgspec.Raw` gets the record's whole JSON.
        unwrap: Name of the field of the answer that holds the record; None if the answer is the record.
    """

    def __init__(self, path: str, record: type[T], unwrap: str | None = None) -> None:
        self.path = path
        self.url = URL(path)
        if self.url.scheme or not path or path.startswith("/"):
            raise ValueError(f"path must be relative to base_url, without a leading slash: {path!r}")
        if "id" not in getattr(record, "__struct_fields__", ()):
            raise TypeError(f"record must be a msgspec.Struct type with a field `id`, not {record!r}")
        fields = msgspec.structs.fields(cast("type[msgspec.Struct]", record))
        keeps_raw = any(field.name == "raw" and field.type is msgspec.Raw for field in fields)
        self._id_path = "$.id" if unwrap is None else f"$.{unwrap}.id"
        self._decode = _decoder(record, unwrap)
        self._decode_raw = _decoder(msgspec.Raw, unwrap) if keeps_raw else None

    def url_below(self, base_url: URL) -> URL:
        """Return the URL to ask.

        Raises:
            ValueError: It is not below the base URL, so the key would go to another place.
        """
        url = base_url.join(self.url)
        # yarl drops control characters and resolves dots. Servers may read dots and slashes that are escaped as well.
        below = _unquoted(url.raw_path.removeprefix(base_url.raw_path)).replace("\\", "/")
        climbs = any(segment.partition(";")[0] == ".." for segment in below.split("/"))
        is_elsewhere = (url.scheme, url.raw_authority) != (base_url.scheme, base_url.raw_authority)
        if is_elsewhere or climbs or not url.raw_path.startswith(base_url.raw_path):
            raise ValueError(f"path must lead to a place below base_url, and {self.path!r:.200} does not")
        return url

    def decode(self, body: bytes, execution_id: str) -> T:
        """Return the record in a body.

        Raises:
            DecodeError: No JSON, JSON that does not fit, or the record of another id.
        """
        try:
            record: Any = self._decode(body)
            if self._decode_raw is not None:
                msgspec.structs.force_setattr(record, "raw", self._decode_raw(body))
        except Exception as error:  # noqa: BLE001 - the hooks of a user's Struct may raise anything; it costs one record
            raise _misfit(error.with_traceback(None), body) from None
        if record.id != execution_id:
            reason = f"the server answered with the record of another id, {printable(str(record.id))!r}"
            raise DecodeError(reason, path=self._id_path, body=body, retryable=True)
        found: T = record
        return found


def _unquoted(path: str) -> str:
    """Return a path with all that is escaped in it read, also what was escaped more than once."""
    while (read := unquote(path)) != path:
        path = read
    return path


def _decoder(record: Any, unwrap: str | None) -> Callable[[bytes], Any]:
    if unwrap is None:
        decode: Callable[[bytes], Any] = msgspec.json.Decoder(record).decode
        return decode
    answer = msgspec.defstruct("Answer", [("record", record)], rename={"record": unwrap})
    decode_answer: Any = msgspec.json.Decoder(answer).decode
    return lambda body: decode_answer(body).record


def _misfit(error: Exception, body: bytes) -> DecodeError:
    """Return the DecodeError for what a decoder raised.

    Malformed JSON may be a body that was cut off on its way (a truncated gzip body arrives as a complete one), so it is
    worth another attempt. The rest is what the server meant to say. ValidationError is a subclass of msgspec's
    DecodeError, so it is looked at first.
    """
    text = printable(str(error))
    if isinstance(error, msgspec.ValidationError):
        reason, path, retryable = (
            f"the answer does not fit the record: {text}",
            _misfit_path(str(error)),
            False,
        )
    elif isinstance(error, msgspec.DecodeError):
        reason = f"the answer is not JSON: {text}" if body else "the answer is empty"
        path, retryable = None, True
    elif isinstance(error, RecursionError):
        reason, path, retryable = "the answer is nested too deeply", "$", False
    else:
        reason = f"the answer does not fit the record: {type(error).__name__}: {text}"
        path, retryable = "$", False
    return DecodeError(reason, path=path, body=body, retryable=retryable)


def _misfit_path(message: str) -> str:
    place = _MISFIT_PLACE.search(message)
    path = place[1] if place else "$"
    field = _MISSING_FIELD.match(message)
    return f"{path}.{field[1]}" if field else path
