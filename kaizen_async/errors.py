"""Everything this library raises about a lookup.

    KaizenError
    ├── TransportError                 no usable response came back                      retried
    │   └── AttemptTimeoutError        one attempt took too long; also a TimeoutError    retried
    ├── StatusError                    a response outside 2xx                            by status
    │   ├── AuthenticationError        401, and 403 that names no time                   not retried
    │   ├── NotFoundError              404                                               not retried
    │   └── RateLimitError             420, 429, and 403 that names a time               retried
    ├── DecodeError                    2xx, but not such a record                        see its docstring
    ├── DeadlineExceededError          the caller's deadline passed; also a TimeoutError
    ├── InvalidIdError                 an id among many that cannot be sent; also a ValueError
    └── ClientClosedError              the client was closed under the call, or before it

Misuse (an empty id, a key with a line break, a concurrency below 1) is no lookup and raises the builtin
ValueError or TypeError before anything is sent.

Every error can be pickled and copied, and rebuilt from its `args` as task queues do. It holds no API key, and its text
begins with the execution id. Text that came from a server is cut and made printable before it enters a message.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

MESSAGE_LIMIT = 200
"""Characters of foreign text that enter a message."""

BODY_LIMIT = 4096
"""Bytes of a refused response that an error keeps."""

_E = TypeVar("_E", bound="KaizenError")
_QUOTE, _UNQUOTE = "\ufdd0", "\ufdd1"
"""Around foreign text in a reason. They stand for no character, so `printable` leaves none of them in such a text."""
_MARKS: Final = re.compile(f"[{_QUOTE}{_UNQUOTE}]")


def printable(text: str, limit: int = MESSAGE_LIMIT) -> str:
    """Return foreign text cut to a length and freed of control characters, so that it is safe in a log line."""
    cut = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(char if char.isprintable() else "�" for char in cut)


def quoted(text: str, limit: int = MESSAGE_LIMIT) -> str:
    """Return foreign text as `printable` does, marked for the reason of an error: it may show the API key."""
    return f"{_QUOTE}{printable(text, limit)}{_UNQUOTE}" if text else ""


def seconds(duration: float) -> str:
    """Return a duration as people write it."""
    return f"{duration:.0f} s" if duration >= 100 else f"{duration:.3g} s"  # noqa: PLR2004 - three digits


def _restore(cls: type[_E], state: dict[str, Any]) -> _E:
    error = cls.__new__(cls)
    error.__dict__.update(state)
    return error


class KaizenError(Exception):
    """Base of all errors of this library. Catch it to catch any of them.

    `type(error)(*error.args)` rebuilds an error with its class, text and attributes, even after `args` was written as
    JSON and read again. Task queues rebuild errors in this way. Then the values that JSON cannot hold are missing:
    `last_execution`, and bytes that are not text.

    Attributes:
        execution_id: The id whose lookup failed.
        attempts: HTTP requests sent for this lookup, the first included. 0: nothing was sent.
        reason: What happened, in one line, without the id.
        retryable: Whether a later attempt might succeed. A retryable error that reaches the caller has used up its
            attempts, its deadline or the client's retry budget; the message says which.
        next_attempt_in: Seconds until the next attempt, if the deadline prevented it. None if the client gave up for
            another reason.
        request_id: The server's id of the failed request, for its support. None if the server did not send one.
        gave_up: Why the client made no further attempt. None if the error is never retried.
    """

    execution_id: str = ""
    attempts: int = 0
    retryable: bool = False
    gave_up: str | None = None
    next_attempt_in: float | None = None
    request_id: str | None = None

    _pieces: list[str]
    """The reason in pieces, until the key was removed from it. Every second piece is foreign text."""
    _details: ClassVar[tuple[str, ...]] = ("execution_id", "attempts", "gave_up", "next_attempt_in", "request_id")
    """The attributes that `args` holds, besides the reason."""

    def __init__(
        self,
        reason: str = "",
        details: Mapping[str, Any] | None = None,
        *,
        execution_id: str = "",
        attempts: int = 0,
    ) -> None:
        super().__init__()
        pieces = _MARKS.split(reason)
        self.reason = "".join(pieces)
        if len(pieces) > 1:
            self._pieces = pieces
        self._set(execution_id=execution_id, attempts=attempts)
        for name, value in (details or {}).items():
            # What comes back from a task queue is input, so only known names are taken.
            if name in self._details:
                setattr(self, name, value.encode()[:BODY_LIMIT] if name == "body" and isinstance(value, str) else value)

    def _set(self, **values: Any) -> None:
        """Set attributes. Those at their defaults stay with the class, because errors may pile up by the thousand."""
        for name, value in values.items():
            if value != getattr(type(self), name):
                setattr(self, name, value)

    if not TYPE_CHECKING:  # pragma: no branch - checkers know `args` as an attribute of every exception

        @property
        def args(self) -> tuple[Any, ...]:
            """The reason, and the other attributes that are not at their defaults, in a form that JSON can hold."""
            values = {name: getattr(self, name) for name in self._details}
            details = {
                name: value.decode(errors="replace") if isinstance(value, bytes) else value
                for name, value in values.items()
                if value != getattr(type(self), name)
            }
            return (self.reason, details) if details else (self.reason,)

        @args.setter
        def args(self, args: tuple[Any, ...]) -> None:
            self.reason = str(args[0]) if args else ""

    def __str__(self) -> str:
        subject = f"{printable(self.execution_id)}: " if self.execution_id else ""
        notes = [f"after {self.attempts} attempt{'s' * (self.attempts != 1)}"] if self.attempts else []
        if self.request_id:
            notes.append(f"request id {printable(self.request_id)}")
        noted = f" ({', '.join(notes)})" if notes else ""
        stopped = f"; {self.gave_up}" if self.gave_up else ""
        return f"{subject}{self.reason}{noted}{stopped}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.__dict__.copy())


class TransportError(KaizenError):
    """Raised when the client got no usable response: the connection was refused, reset or cut off, or it was not HTTP.

    Retried. A garbled response is retried once, and a certificate that does not verify is never retried. The error is
    raised `from` its cause.

    Attributes:
        disconnected: The connection ended before the first byte of a response. Usually the server had just closed an
            idle connection, so the first retry does not wait.
        garbled: The response is not HTTP, or its body does not match its headers.
    """

    retryable = True
    disconnected: bool = False
    garbled: bool = False

    _details = (*KaizenError._details, "retryable", "disconnected", "garbled")  # noqa: SLF001 - of its base

    def __init__(
        self,
        reason: str = "",
        details: Mapping[str, Any] | None = None,
        *,
        retryable: bool = True,
        disconnected: bool = False,
        garbled: bool = False,
        **context: Any,
    ) -> None:
        self._set(retryable=retryable, disconnected=disconnected, garbled=garbled)
        super().__init__(reason, details, **context)


class AttemptTimeoutError(TransportError, TimeoutError):
    """Raised when one attempt took longer than `attempt_timeout`. Retried."""


class StatusError(KaizenError):
    """Raised when the status of the response is outside 2xx. Retried only for the statuses of the retry policy.

    Attributes:
        status: The HTTP status code.
        body: The first bytes of the response (at most `BODY_LIMIT`).
        retry_after: Seconds that the server asked the client to wait. None if it named no time.
    """

    status: int = 0
    body: bytes = b""
    retry_after: float | None = None

    _details = (*KaizenError._details, "status", "body", "retry_after", "retryable")  # noqa: SLF001 - of its base

    def __init__(
        self,
        reason: str = "",
        details: Mapping[str, Any] | None = None,
        *,
        status: int = 0,
        body: bytes = b"",
        retry_after: float | None = None,
        retryable: bool = False,
        **context: Any,
    ) -> None:
        self._set(status=status, body=body[:BODY_LIMIT], retry_after=retry_after, retryable=retryable)
        super().__init__(reason, details, **context)


class AuthenticationError(StatusError):
    """Raised on 401, and on a 403 that names no time to wait: the API key is missing, wrong, or lacks the permission.

    Not retried.
    """


class NotFoundError(StatusError):
    """Raised on 404: no execution has this id. Not retried."""


class RateLimitError(StatusError):
    """Raised on 420 and 429, and on a 403 that names a time to wait.

    Retried after the time that the server named. If that is after the deadline, it is raised at once.

    With `attempts` 0 nothing was sent for this id: an earlier response asked the client to pause for longer than this
    lookup may take.
    """


class DecodeError(KaizenError):
    """Raised when a 2xx response is not a record of this kind.

    Retried once if the transfer may be at fault: the body is cut off, empty, not JSON, or the record of another id.
    Well-formed JSON that does not fit is never retried, because the next response would not fit either.

    Attributes:
        path: The part that does not fit, such as `$.workflow.name`. None if the body is not JSON.
        body: The first bytes of the response (at most `BODY_LIMIT`).
    """

    path: str | None = None
    body: bytes = b""

    _details = (*KaizenError._details, "path", "body", "retryable")  # noqa: SLF001 - of its base

    def __init__(
        self,
        reason: str = "",
        details: Mapping[str, Any] | None = None,
        *,
        path: str | None = None,
        body: bytes = b"",
        retryable: bool = False,
        **context: Any,
    ) -> None:
        self._set(path=path, body=body[:BODY_LIMIT], retryable=retryable)
        super().__init__(reason, details, **context)


class DeadlineExceededError(KaizenError, TimeoutError):
    """Raised when a deadline passed before there was a result. Its `__cause__` is the last failed attempt, if any.

    Attributes:
        last_execution: The last record that a wait received before its deadline. None for a lookup.
    """

    last_execution: Any = None

    def __init__(
        self,
        reason: str = "",
        details: Mapping[str, Any] | None = None,
        *,
        last_execution: Any = None,
        **context: Any,
    ) -> None:
        self._set(last_execution=last_execution)
        super().__init__(reason, details, **context)


class InvalidIdError(KaizenError, ValueError):
    """The error of an outcome whose id is invalid. Nothing was sent for it. The other ids are not affected.

    `get`, `wait` and `add` raise a builtin TypeError or ValueError instead.

    Attributes:
        position: How many ids came before this one in the call.
    """

    position: int | None = None

    _details = (*KaizenError._details, "position")  # noqa: SLF001 - of its base

    def __init__(
        self,
        reason: str = "",
        details: Mapping[str, Any] | None = None,
        *,
        position: int | None = None,
        **context: Any,
    ) -> None:
        self._set(position=position)
        super().__init__(reason, details, **context)


class ClientClosedError(KaizenError):
    """Raised when the client was closed before or during the call. Not retried. Repeat the call with a new client."""
