"""Everything this library raises about a look-up.

    KaizenError
    ├── TransportError                 no usable answer came back                        retried
    │   └── AttemptTimeoutError        one attempt took too long; also a TimeoutError    retried
    ├── StatusError                    an answer outside 2xx                             by status
    │   ├── AuthenticationError        401, 403                                          not retried
    │   ├── NotFoundError              404                                               not retried
    │   └── RateLimitError             429                                               retried
    ├── DecodeError                    2xx, but not such a record                        see its docstring
    ├── DeadlineExceededError          the caller's deadline passed; also a TimeoutError
    ├── InvalidIdError                 an id among many that cannot be sent; also a ValueError
    └── ClientClosedError              the client was closed under the call, or before it

Misuse (an empty id, a key with a line break, a concurrency below 1) is no look-up and raises the builtin
ValueError or TypeError before anything is sent.

Every error can be pickled and copied, holds no API key, and its text begins with the execution id. Text that came
from a server is cut and made printable before it enters a message.
"""

from typing import Any, TypeVar

MESSAGE_LIMIT = 200
"""Characters of foreign text that enter a message."""

BODY_LIMIT = 4096
"""Bytes of a refused answer that an error keeps."""

_E = TypeVar("_E", bound="KaizenError")


def printable(text: str, limit: int = MESSAGE_LIMIT) -> str:
    """Return foreign text cut to a length and freed of control characters, so that it is safe in a log line."""
    cut = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(char if char.isprintable() else "�" for char in cut)


def seconds(duration: float) -> str:
    """Return a duration as people write it."""
    return f"{duration:.0f} s" if duration >= 100 else f"{duration:.3g} s"  # noqa: PLR2004 - three digits


def _restore(cls: type[_E], args: tuple[Any, ...], state: dict[str, Any]) -> _E:
    error = cls.__new__(cls)
    error.args = args  # TimeoutError, unlike Exception, takes them in __init__ only
    error.__dict__.update(state)
    return error


class KaizenError(Exception):
    """Base of every error of this library; catch it to catch them all.

    Attributes:
        execution_id: The id whose look-up failed.
        attempts: HTTP requests sent for this look-up, the first included. 0: nothing was sent.
        reason: What happened, in one line, without the id.
        retryable: Whether a later attempt might succeed. A retryable error that reaches the caller has used up its
            attempts, its deadline or the client's retry budget; the message says which.
        next_attempt_in: Seconds after which the next attempt would have come, had the deadline not been sooner; None
            if that was not the reason to give up.
    """

    retryable = False

    def __init__(self, reason: str, *, execution_id: str = "", attempts: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.execution_id = execution_id
        self.attempts = attempts
        self.gave_up: str | None = None
        self.next_attempt_in: float | None = None

    def __str__(self) -> str:
        subject = f"{printable(self.execution_id)}: " if self.execution_id else ""
        count = f" (after {self.attempts} attempt{'s' * (self.attempts != 1)})" if self.attempts else ""
        stopped = f"; {self.gave_up}" if self.gave_up else ""
        return f"{subject}{self.reason}{count}{stopped}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.args, self.__dict__.copy())


class TransportError(KaizenError):
    """Raised when no usable answer came back: refused, reset, cut off, not HTTP. Raised `from` the cause.

    Retried; a garbled answer once, a certificate that does not verify never.

    Attributes:
        disconnected: The connection ended before the first byte of an answer. The usual reason is a kept-alive
            connection that the server had just given up, so the first retry of such a fault does not wait.
        garbled: Something came back that is not HTTP, or not what its headers say.
    """

    def __init__(
        self,
        reason: str,
        *,
        retryable: bool = True,
        disconnected: bool = False,
        garbled: bool = False,
        **context: Any,
    ) -> None:
        super().__init__(reason, **context)
        self.retryable = retryable
        self.disconnected = disconnected
        self.garbled = garbled


class AttemptTimeoutError(TransportError, TimeoutError):
    """Raised when one attempt took longer than `attempt_timeout`. Retried."""


class StatusError(KaizenError):
    """Raised when the server answered outside 2xx. Retried for the statuses of the retry policy, no others.

    Attributes:
        status: The HTTP status code.
        body: The first bytes of the answer (at most `BODY_LIMIT`).
        retry_after: Seconds the server asked to wait, or None if it named no time.
    """

    def __init__(
        self,
        reason: str,
        *,
        status: int,
        body: bytes = b"",
        retry_after: float | None = None,
        retryable: bool = False,
        **context: Any,
    ) -> None:
        super().__init__(reason, **context)
        self.status = status
        self.body = body[:BODY_LIMIT]
        self.retry_after = retry_after
        self.retryable = retryable


class AuthenticationError(StatusError):
    """Raised on 401 and 403: the API key is missing, wrong or not allowed to see this. Not retried."""


class NotFoundError(StatusError):
    """Raised on 404: no execution has this id. Not retried."""


class RateLimitError(StatusError):
    """Raised on 429. Retried after the server's Retry-After, if that fits the deadline; else raised at once.

    With `attempts` 0 nothing was sent for this id: an earlier answer told the client to pause for longer than this
    look-up may take.
    """


class DecodeError(KaizenError):
    """Raised when a 2xx answer is not a record of this kind.

    Retried once if the transfer may be at fault (the body is cut off, empty, no JSON at all, or the record of another
    id). Never retried if the JSON is well-formed and does not fit: it would not fit the next time either.

    Attributes:
        path: Where the misfit is, as in `$.workflow.name`; None when the body is no JSON at all.
        body: The first bytes of the answer (at most `BODY_LIMIT`).
    """

    def __init__(
        self, reason: str, *, path: str | None, body: bytes = b"", retryable: bool = False, **context: Any
    ) -> None:
        super().__init__(reason, **context)
        self.path = path
        self.body = body[:BODY_LIMIT]
        self.retryable = retryable


class DeadlineExceededError(KaizenError, TimeoutError):
    """Raised when a deadline passed before there was a result. Its `__cause__` is the last failed attempt, if any.

    Attributes:
        last_execution: The last record seen, when a wait ran out of time; None in a look-up.
    """

    def __init__(self, reason: str, *, last_execution: Any = None, **context: Any) -> None:
        super().__init__(reason, **context)
        self.last_execution = last_execution


class InvalidIdError(KaizenError, ValueError):
    """The error of an outcome whose id cannot be sent. Nothing was sent for it; the other ids are not affected.

    `get`, `wait` and `add` raise a builtin TypeError or ValueError instead.

    Attributes:
        position: How many ids came before this one in the call.
    """

    def __init__(self, reason: str, *, position: int | None = None, **context: Any) -> None:
        super().__init__(reason, **context)
        self.position = position


class ClientClosedError(KaizenError):
    """Raised when the client was closed before or during the call. Not retried; a new client can."""
