"""What a response outside 2xx means: its class of error, and how long its headers ask to wait.

Nothing here touches a socket, a clock or a loop, so all of it can be tested with recorded headers.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, Final

import msgspec

from kaizen_async.errors import AuthenticationError, NotFoundError, RateLimitError, StatusError, quoted

LONGEST_INSTRUCTION: Final = 86_400.0
"""Seconds above which a time to wait is not an instruction but a mistake, such as a Unix time in place of seconds."""

THROTTLING: Final = frozenset({420, 429, 529})
"""Statuses that always mean "send less": 429 (RFC 6585), and what servers send in its place. 529 is "overloaded"."""

THROTTLING_IF_TIMED: Final = frozenset({403, 503, 509})
"""Statuses that mean it if they name a time: GitHub sends 403 for its secondary limits."""

_STATUS_CLASSES: Final[dict[int, type[StatusError]]] = {
    401: AuthenticationError,
    403: AuthenticationError,
    404: NotFoundError,
    420: RateLimitError,
    429: RateLimitError,
}
_REDIRECT_ADVICE: Final = "; redirects are not followed, they would carry the key elsewhere: check base_url"
PROXY_ADVICE: Final = "; check the user and password of the proxy"
_KEY_ADVICE: Final = "; check api_key or KAIZEN_API_KEY"

_NUMBER: Final = re.compile(r"[0-9]{1,13}(\.[0-9]{1,10})?", re.ASCII)
_SECONDS: Final = re.compile(r"[0-9]{1,13}", re.ASCII)
_LONGEST_QUOTAS: Final = 1024
"""Characters above which a `RateLimit` header is not read."""
_UNIX_TIMES: Final = 1e9
"""From here on X-RateLimit-Reset is a Unix time: as seconds to wait it would be 31 years."""
_UNIX_MILLISECONDS: Final = 1e12


def is_throttling(error: StatusError) -> bool:
    """Return whether a response asks for fewer requests: by its status, or by naming a time beside it."""
    return error.status in THROTTLING or (error.status in THROTTLING_IF_TIMED and error.retry_after is not None)


def status_error(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    retried: Collection[int],
    now: float,
) -> StatusError:
    """Return the error for a response outside 2xx.

    Args:
        status: The HTTP status code.
        headers: The response's headers, looked up without regard to case.
        body: The response's body, or its beginning.
        retried: The statuses that are worth another attempt. If 429 is among them, so is every response that throttles.
        now: Seconds since the epoch, for a time in a response that carries no Date of its own.
    """
    retry_after = parse_retry_after(headers, now)
    if retry_after is None and (status in THROTTLING or status in THROTTLING_IF_TIMED):
        retry_after = parse_reset(headers, now, is_exhausted=status in THROTTLING)
    error_class = StatusError if _is_of_proxy(status, headers) else _STATUS_CLASSES.get(status, StatusError)
    if error_class is AuthenticationError and status in THROTTLING_IF_TIMED and retry_after is not None:
        error_class = RateLimitError
    sender, advice = _sender(status, headers), _advice(error_class, status, headers)
    error = error_class(
        f"{sender} answered {status}{_phrase(status)}{_explanation(body)}{advice}",
        status=status,
        body=body,
        retry_after=retry_after,
        retryable=status in retried,
    )
    if HTTPStatus.TOO_MANY_REQUESTS in retried and is_throttling(error):
        error.retryable = True
    return error


def _phrase(status: int) -> str:
    try:
        return f" {HTTPStatus(status).phrase}"
    except ValueError:
        return ""


def _is_of_proxy(status: int, headers: Mapping[str, str]) -> bool:
    """Return whether a proxy on the way asks for a name and a password (RFC 9110 section 15.5.8)."""
    is_unauthorized = status == HTTPStatus.UNAUTHORIZED and "WWW-Authenticate" not in headers
    return status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED or (is_unauthorized and "Proxy-Authenticate" in headers)


def _sender(status: int, headers: Mapping[str, str]) -> str:
    return "the proxy" if _is_of_proxy(status, headers) else "the server"


def _advice(error: type[StatusError], status: int, headers: Mapping[str, str]) -> str:
    if _is_of_proxy(status, headers):
        return PROXY_ADVICE
    if error is AuthenticationError:
        return _KEY_ADVICE
    if status == HTTPStatus.NOT_MODIFIED:
        return "; nothing was asked for that could be unmodified: a cache on the way is at fault"
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
    return f": {quoted(text)}" if text else ""


def parse_retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds a server asks to wait, or None if it does not say or says it in no known form.

    Understands `retry-after-ms` (milliseconds), and Retry-After as seconds, also with a fraction, or as an HTTP date
    (RFC 9110 section 10.2.3). A date counts from the response's own Date header, so that a wrong clock on either side
    does no harm; a date in the past means 0. Anything else is ignored: negative, nan, other digits than ASCII, and more
    than a day.
    """
    milliseconds = headers.get("Retry-After-Ms", "").strip()
    if _NUMBER.fullmatch(milliseconds) and (wait := float(milliseconds) / 1000) <= LONGEST_INSTRUCTION:
        return wait
    text = headers.get("Retry-After", "").strip()
    if _NUMBER.fullmatch(text):
        wait = float(text)
    else:
        moment = _parse_http_date(text)
        if moment is None:
            return None
        wait = max(0.0, moment - _sent_at(headers, now))
    return wait if wait <= LONGEST_INSTRUCTION else None


def parse_reset(headers: Mapping[str, str], now: float, *, is_exhausted: bool) -> float | None:
    """Return the seconds until a quota is filled up again, as its headers tell, or None.

    Understands `RateLimit: "policy";r=0;t=30` (drafts of the IETF from 8 on), `RateLimit: limit=10, remaining=0,
    reset=30` (draft 7), `RateLimit-Reset: 30` (older drafts) and `X-RateLimit-Reset` as seconds or as a Unix time.
    Servers send these with every response, so they are an instruction only where a quota is exhausted.

    Args:
        headers: The response's headers.
        now: Seconds since the epoch, if the response carries no Date.
        is_exhausted: What to assume if the headers do not say how much is left.
    """
    waits = [
        wait
        for remaining, wait in _quotas(headers, now)
        if wait <= LONGEST_INSTRUCTION and (is_exhausted if remaining is None else remaining == 0)
    ]
    return max(waits, default=None)


def _quotas(headers: Mapping[str, str], now: float) -> Iterator[tuple[float | None, float]]:
    """Yield what is left of each quota, if known, and the seconds until it is filled up again."""
    combined = headers.get("RateLimit", "").lower()
    if len(combined) > _LONGEST_QUOTAS:
        combined = ""
    is_draft_7 = "reset" in combined
    for policy in [combined] if is_draft_7 else combined.split(","):
        parameters = _parameters(policy)
        reset = parameters.get("t", parameters.get("reset"))
        if reset is not None:
            remaining = parameters.get("r", parameters.get("remaining"))
            yield None if remaining is None else float(remaining), float(reset)
    for prefix in ("RateLimit", "X-RateLimit", "X-Rate-Limit"):
        text = headers.get(f"{prefix}-Reset", "").strip()
        if _NUMBER.fullmatch(text):
            wait = float(text)
            if wait >= _UNIX_TIMES:
                moment = wait / 1000 if wait >= _UNIX_MILLISECONDS else wait
                wait = max(0.0, moment - _sent_at(headers, now))
            left = headers.get(f"{prefix}-Remaining", "").strip()
            yield float(left) if _NUMBER.fullmatch(left) else None, wait


def _parameters(policy: str) -> dict[str, str]:
    """Return the whole numbers in a quota, by their names."""
    pairs = (part.partition("=") for part in policy.replace(",", ";").split(";"))
    return {name.strip(): value.strip() for name, _, value in pairs if _SECONDS.fullmatch(value.strip())}


def _sent_at(headers: Mapping[str, str], now: float) -> float:
    """Return when a response was sent, by the server's own clock if the response has a date."""
    sent = _parse_http_date(headers.get("Date", ""))
    return now if sent is None else sent


def _parse_http_date(text: str) -> float | None:
    try:
        moment = parsedate_to_datetime(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
