"""What goes over the wire and what an answer means: bytes and headers in, a record or an error out.

Nothing here touches a socket, a clock or a loop, so all of it can be tested with recorded bytes.
"""

import re
from collections.abc import Callable, Collection, Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, Final, Generic, TypeVar, cast

import msgspec
from yarl import URL

from kaizen_async.errors import (
    AuthenticationError,
    DecodeError,
    NotFoundError,
    RateLimitError,
    StatusError,
    printable,
)

T = TypeVar("T")

_NUMBER: Final = re.compile(r"[0-9]{1,10}(\.[0-9]{1,10})?", re.ASCII)
_MISFIT_PLACE: Final = re.compile(r" - at `([^`]+)`$")
_MISSING_FIELD: Final = re.compile(r"^Object missing required field `([^`]+)`")

_STATUS_CLASSES: Final[dict[int, type[StatusError]]] = {
    401: AuthenticationError,
    403: AuthenticationError,
    404: NotFoundError,
    429: RateLimitError,
}
_REDIRECT_ADVICE: Final = "; redirects are not followed, they would carry the key elsewhere: check base_url"
_KEY_ADVICE: Final = "; check api_key or KAIZEN_API_KEY"

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


def status_error(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    retried: Collection[int],
    now: float,
) -> StatusError:
    """Return the error for an answer outside 2xx.

    Args:
        status: The HTTP status code.
        headers: The answer's headers, looked up without regard to case.
        body: The answer's body, or its beginning.
        retried: The statuses that are worth another attempt.
        now: Seconds since the epoch, to read a Retry-After date by if the answer carries no date of its own.
    """
    error = _STATUS_CLASSES.get(status, StatusError)
    return error(
        f"the server answered {status}{_phrase(status)}{_explanation(body)}{_advice(error, status)}",
        status=status,
        body=body,
        retry_after=parse_retry_after(headers, now),
        retryable=status in retried,
    )


def _phrase(status: int) -> str:
    try:
        return f" {HTTPStatus(status).phrase}"
    except ValueError:
        return ""


def _advice(error: type[StatusError], status: int) -> str:
    if error is AuthenticationError:
        return _KEY_ADVICE
    return _REDIRECT_ADVICE if 300 <= status < 400 else ""  # noqa: PLR2004 - the class of redirects


class _Explained(msgspec.Struct):
    message: Any = None
    error: Any = None


def _explanation(body: bytes) -> str:
    """Return what a JSON error body says in `message` or `error`; error bodies are not documented, so none is fine."""
    try:
        explained = msgspec.json.decode(body, type=_Explained)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return ""
    text = next((part for part in (explained.message, explained.error) if part and isinstance(part, str)), "")
    return f": {printable(text)}" if text else ""


def parse_retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds a server asks to wait, or None if it does not say or says it in no known form.

    Understands `retry-after-ms` (milliseconds), and Retry-After as seconds, also with a fraction, or as an HTTP date
    (RFC 9110 section 10.2.3). A date counts from the answer's own Date header, so that a wrong clock on either side
    does no harm; a date gone by means 0. Anything else (negative, nan, other digits than ASCII) is as if not there.
    """
    milliseconds = headers.get("Retry-After-Ms", "").strip()
    if _NUMBER.fullmatch(milliseconds):
        return float(milliseconds) / 1000
    text = headers.get("Retry-After", "").strip()
    if _NUMBER.fullmatch(text):
        return float(text)
    moment = _parse_http_date(text)
    if moment is None:
        return None
    sent = _parse_http_date(headers.get("Date", ""))
    return max(0.0, moment - (now if sent is None else sent))


def _parse_http_date(text: str) -> float | None:
    try:
        moment = parsedate_to_datetime(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
