"""What an error says, and about what: one id, the pace, the server, the key, or nothing at all.

Retries, the client's health and waits decide by it, each in its own way. It is pure: an error in, a verdict out.
"""

from enum import Enum, auto
from typing import Final

from kaizen_async._transport.statuses import is_throttling
from kaizen_async.errors import (
    DecodeError,
    KaizenError,
    NotFoundError,
    StatusError,
    TransportError,
)

_REFUSING: Final = frozenset({401, 402, 403, 407, 511})
"""Statuses that say who may ask, not what was asked for: key, payment, permission, proxy, captive portal."""
_TEMPORARY: Final = frozenset({408, 425})
"""Of the 4xx, the ones that speak of the moment and not of the request (RFC 9110 section 15.5.9, RFC 8470)."""
_SERVER_ERRORS: Final = 500
_UNSUPPORTED: Final = frozenset({501, 505})
"""Of the 5xx, the ones that speak of the request and not of the moment (RFC 9110 section 15.6)."""


class Verdict(Enum):
    """What an error says."""

    NOT_FOUND = auto()
    """The API does not know the execution. The server works, and this response is final for the id."""
    THROTTLED = auto()
    """Send less: 429 and its like."""
    FAILING = auto()
    """The server, or the way to it, does not work now: refused, reset, timed out, 5xx."""
    GARBLED = auto()
    """A response came, and it could not be read. Transfer may be at fault, once."""
    REFUSED = auto()
    """The key, or the client as such, is not accepted: 401, 403, 407. Every lookup would get the same."""
    UNRELATED = auto()
    """A response that says nothing about the execution: a redirect, another 4xx, HTML, JSON that is not the record.
    Somebody else may have answered in the API's place, or the API dislikes this one request."""
    UNUSABLE = auto()
    """No request can work as the client is set up: a certificate, a URL, a session that raises, a missing codec."""
    NO_EVIDENCE = auto()
    """Says nothing about the server: the deadline passed, the client was closed, nothing was sent."""


def verdict(error: KaizenError) -> Verdict:
    """Return what an error says."""
    if isinstance(error, StatusError):
        return _verdict_of_status(error)
    if isinstance(error, DecodeError):
        return Verdict.GARBLED if error.retryable else Verdict.UNRELATED
    if isinstance(error, TransportError):
        if not error.retryable:
            return Verdict.UNUSABLE
        return Verdict.GARBLED if error.garbled else Verdict.FAILING
    return Verdict.NO_EVIDENCE


def _verdict_of_status(error: StatusError) -> Verdict:
    status = error.status
    if is_throttling(error):
        return Verdict.THROTTLED
    if isinstance(error, NotFoundError) and is_json_object(error.body):
        return Verdict.NOT_FOUND
    if status in _REFUSING:
        return Verdict.REFUSED
    if status in _TEMPORARY or (status >= _SERVER_ERRORS and status not in _UNSUPPORTED):
        return Verdict.FAILING
    return Verdict.UNRELATED


def is_json_object(body: bytes) -> bool:
    """Return whether a body is a JSON object, by its beginning: an error keeps no more of it.

    The API's own responses are; those of gateways are HTML, plain text or empty.
    """
    return body.lstrip(b" \t\r\n\xef\xbb\xbf").startswith(b"{")
