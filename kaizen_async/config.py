"""Policies and settings. Each is checked where it is made, so a wrong value never reaches a request."""

import functools
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar, cast

import msgspec
from yarl import URL

__version__ = "0.1.0"

F = TypeVar("F", bound=Callable[..., None])

DEFAULT_BASE_URL: Final = "https://api.kaizenautomation.com/"
"""The public API. KAIZEN_BASE_URL or `base_url=` replaces it."""

RETRIED_STATUSES: Final = frozenset({408, 425, 429, 500, 502, 503, 504, 507, 509, *range(520, 528), 529, 530})
"""Statuses that say "not now" rather than "not this" (RFC 9110 section 15, RFC 8470 for 425, RFC 6585 for 429, RFC 4918
for 507). The rest is not registered but common: 509 and 529 of hosts that are out of bandwidth or overloaded, 520 to
527 and 530 of Cloudflare when the server behind it does not work."""

MOST_CONCURRENCY: Final = 100_000
"""More requests than one machine can have in flight to one address, which has 65,535 ports. Each takes memory."""

_LOOPBACK_HOSTS: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_KEY_PATTERN: Final = re.compile(r"[\x21-\x7e]+")


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True, cache_hash=True):
    """When and how often a failed attempt is followed by another.

    The wait before attempt n+1 is drawn evenly from 0 to min(max_backoff, initial_backoff * 2**(n-1)) seconds ("full
    jitter": it spreads callers best, see https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).
    After a rejection that does not count as an attempt, it is at most a quarter of `initial_backoff`. A Retry-After of
    the server that is longer replaces it, and is never shortened.
    """

    max_attempts: int = 5
    """Attempts of one lookup at most, the first included; 1 switches retrying off. A request that fails in a pause for
    all lookups does not count, nor do a few that the server rejects while it accepts others."""
    initial_backoff: float = 0.25
    """Upper end of the first wait, in seconds."""
    max_backoff: float = 8.0
    """Upper end of every wait that the client chooses itself, in seconds."""
    statuses: frozenset[int] = RETRIED_STATUSES
    """HTTP statuses that are retried."""
    budgeted: bool = True
    """Whether retries draw on the client's retry budget, which keeps retries from overloading a server that fails."""

    def __post_init__(self) -> None:
        _require_int("max_attempts", self.max_attempts, at_least=1)
        require_duration("initial_backoff", self.initial_backoff, zero_allowed=True)
        require_duration("max_backoff", self.max_backoff, zero_allowed=True)
        if not isinstance(self.statuses, frozenset):
            raise TypeError(f"statuses must be a frozenset, such as frozenset({{503}}), not {self.statuses!r:.80}")
        for status in self.statuses:
            _require_int("statuses", status, at_least=300)


class PollPolicy(msgspec.Struct, frozen=True, kw_only=True, cache_hash=True):
    """How soon a wait notices that an execution has ended, and so how often it polls.

    The lag is the time between the end of an execution and the poll that sees it. `lag_share=0.05` aims at a mean lag
    of 5 % of the execution's duration: half a minute for ten minutes. `lag_seconds=5` aims at a mean lag of 5 seconds.
    `docs/waiting.md` explains how the intervals follow from the aim. `min_interval`, `max_interval` and `max_rate` win
    over the aim.
    """

    lag_share: float = 0.05
    """Mean lag to aim at, as a share of the execution's duration. The number of polls grows with log(duration)."""
    lag_seconds: float | None = None
    """Mean lag to aim at, in seconds. It replaces `lag_share`. The number of polls grows with the duration."""
    min_interval: float = 1.0
    """Shortest time between two polls of an execution, in seconds."""
    max_interval: float = 15.0
    """Longest time between two polls of an execution, in seconds, and so the greatest lag. A longer time saves many
    polls of long executions."""
    spread: float = 0.1
    """Share by which the client lengthens or shortens an interval at random, so that polls do not come all at once."""
    max_rate: float | None = None
    """Most requests per second of all waits under this policy, spaced evenly. The client does not retry a poll that
    fails: the next poll takes its place. None: no limit."""
    not_found_grace: float = 0.0
    """Seconds for which a wait tolerates an unbroken series of 404s, for executions that the server knows a little
    late."""
    refusal_patience: float = 30.0
    """Seconds for which a wait keeps polling after a response that says nothing about the execution (401, 403, another
    4xx, a redirect, HTML, a 2xx that is not the record). 0: such a response ends the wait at once."""
    learn: bool = True
    """Whether waits learn from ended executions of a workflow when to poll its next ones."""

    def __post_init__(self) -> None:
        _require_share("lag_share", self.lag_share, zero_allowed=False)
        if self.lag_seconds is not None:
            require_duration("lag_seconds", self.lag_seconds)
        require_duration("min_interval", self.min_interval)
        require_duration("max_interval", self.max_interval)
        _require_share("spread", self.spread, zero_allowed=True)
        if self.max_rate is not None:
            require_duration("max_rate", self.max_rate)
        require_duration("not_found_grace", self.not_found_grace, zero_allowed=True)
        require_duration("refusal_patience", self.refusal_patience, zero_allowed=True)
        if self.min_interval > self.max_interval:
            raise ValueError(f"min_interval {self.min_interval} is longer than max_interval {self.max_interval}")


class ConnectionPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """How long the client keeps idle connections, and how large the headers of a response may be."""

    idle_seconds: float = 15.0
    """How long the client keeps an idle connection, in seconds. Set it below the idle timeout of servers and load
    balancers on the way: many drop an idle connection after 60 seconds, some without closing it."""
    max_header_bytes: int = 32 * 1024
    """The most bytes in the headers of a response."""
    max_header_lines: int = 256
    """The most lines in the headers of a response."""

    def __post_init__(self) -> None:
        require_duration("idle_seconds", self.idle_seconds)
        _require_int("max_header_bytes", self.max_header_bytes, at_least=1024)
        _require_int("max_header_lines", self.max_header_lines, at_least=16)


class HedgePolicy(msgspec.Struct, frozen=True, kw_only=True):
    """When a slow request is sent a second time on another connection: `KaizenClient(hedge=HedgePolicy())`.

    The first good response wins, and the connection of the other request is aborted. A lookup only reads, so sending
    it twice is safe. This removes the rare slow response, at the price of `max_share` more requests.

    The client hedges while the server is healthy. It sends no second request during a pause or a learned pace, while
    the retry budget is low, or under a `PollPolicy.max_rate`.
    """

    quantile: float = 0.95
    """A request is slow once it takes longer than this share of the recent ones. If one response in ten is slow, the
    quantile must be below 0.9 to find them."""
    max_share: float = 0.05
    """Share of lookups that are hedged, at most. Each lookup earns this part of a second request, and at most 5 are
    saved up, so a server that slows down does not get a burst."""
    min_delay: float = 0.001
    """Seconds that a request must have taken before it is hedged, whatever the quantile says."""
    min_observations: int = 50
    """Requests that must have succeeded before the first one is hedged, because the quantile is not known earlier."""

    def __post_init__(self) -> None:
        _require_share("quantile", self.quantile, zero_allowed=False)
        _require_share("max_share", self.max_share, zero_allowed=False)
        require_duration("min_delay", self.min_delay, zero_allowed=True)
        _require_int("min_observations", self.min_observations, at_least=1)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of a client, after defaults, environment and checks."""

    base_url: URL
    concurrency: int
    attempt_timeout: float
    deadline: float | None
    retry: RetryPolicy
    poll: PollPolicy
    max_response_bytes: int
    ended_records: int
    keep_raw: bool
    connections: ConnectionPolicy
    connection_max_age: float
    hedge: HedgePolicy | None

    def __post_init__(self) -> None:
        if self.hedge is not None and not isinstance(self.hedge, HedgePolicy):
            raise TypeError(f"hedge must be None or a HedgePolicy, not {type(self.hedge).__name__}; try HedgePolicy()")
        if not isinstance(self.connections, ConnectionPolicy):
            raise TypeError(f"connections must be a ConnectionPolicy, not {type(self.connections).__name__}")
        require_duration("connection_max_age", self.connection_max_age)
        _require_int("concurrency", self.concurrency, at_least=1, at_most=MOST_CONCURRENCY)
        require_duration("attempt_timeout", self.attempt_timeout)
        if self.deadline is not None:
            require_duration("deadline", self.deadline)
        _require_int("max_response_bytes", self.max_response_bytes, at_least=1)
        _require_int("ended_records", self.ended_records, at_least=0)
        if not isinstance(self.keep_raw, bool):
            raise TypeError(f"keep_raw must be True or False, not {self.keep_raw!r:.80}")
        if not isinstance(self.poll, PollPolicy):
            raise TypeError(f"poll must be a PollPolicy, not {type(self.poll).__name__}")
        if not isinstance(self.retry, RetryPolicy):
            raise TypeError(f"retry must be a RetryPolicy, not {type(self.retry).__name__}")


def untraced(init: F) -> F:
    """Wrap a constructor so that its refusals carry no frames of it.

    Error reports print the local variables of frames. Those of the constructor hold the API key and, while it reads a
    setting, the whole environment.
    """

    @functools.wraps(init)
    def construct(*args: Any, **kwargs: Any) -> None:
        try:
            init(*args, **kwargs)
        except Exception as refusal:  # noqa: BLE001 - it is raised again
            del args, kwargs
            refusal.__context__ = None
            raise refusal.with_traceback(None) from None

    return cast("F", construct)


def resolve_api_key(api_key: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the key given, else KAIZEN_API_KEY, else None. Refuse a key that cannot be sent in a header.

    Raises:
        TypeError: The key is not a string.
        ValueError: The key is empty or contains whitespace, control characters or non-ASCII. The text hides the key.
    """
    key = environment.get("KAIZEN_API_KEY") or None if api_key is None else api_key
    return None if key is None else require_key(key)


def require_key(key: object) -> str:
    """Return the key. Refuse one that cannot be sent in a header.

    Raises:
        TypeError: The key is not a string.
        ValueError: The key is empty or contains whitespace, control characters or non-ASCII. The text hides the key.
    """
    if not isinstance(key, str):
        raise TypeError(f"api_key must be a str, not {type(key).__name__}")
    if not _KEY_PATTERN.fullmatch(key):
        raise ValueError(
            "api_key is empty or contains whitespace, a line break or a character outside ASCII; "
            "check how it was read (a key from a file often ends in a line break: use .strip())"
        )
    return key


def resolve_base_url(
    base_url: str | None,
    *,
    allow_insecure_http: bool,
    may_leave_machine: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> URL:
    """Return the URL given, else KAIZEN_BASE_URL, else the public API, with a closing slash.

    Raises:
        ValueError: The URL is not absolute http(s); or it has a user, query or fragment; or it is plain http to another
            machine, or by a route that may leave this one, without `allow_insecure_http`.
    """
    text = base_url if base_url is not None else environment.get("KAIZEN_BASE_URL") or DEFAULT_BASE_URL
    if not isinstance(text, str):
        raise TypeError(f"base_url must be a str, not {type(text).__name__}")
    url = _parse_url(text)
    if url.user is not None or url.password is not None or url.query_string or url.fragment:
        raise ValueError(
            "base_url must contain no user, password, query or fragment; "
            "pass the key as api_key, which sends it as a bearer token"
        )
    stays_here = url.host in _LOOPBACK_HOSTS and not may_leave_machine
    if url.scheme == "http" and not stays_here and not allow_insecure_http:
        route = " through a proxy (trust_env or the session's own)" if url.host in _LOOPBACK_HOSTS else ""
        raise ValueError(
            f"base_url {str(url)!r} would send the API key and every record unencrypted to another machine{route}; "
            "use https://, or pass allow_insecure_http=True if that network is yours"
        )
    path = url.raw_path
    return url.with_path(path if path.endswith("/") else f"{path}/", encoded=True)


def _parse_url(text: str) -> URL:
    try:
        url = URL(text)
        if ":" not in (url.host or ""):
            (url.host or "").encode("idna")  # as the resolver will
    except (ValueError, IndexError):  # yarl raises IndexError for "//[]@"
        url = URL()
    if url.scheme not in {"http", "https"} or not url.host:
        raise ValueError(f"base_url must be an absolute URL such as {DEFAULT_BASE_URL!r}")
    return url


def require_duration(name: str, seconds: float, *, zero_allowed: bool = False) -> None:
    """Refuse anything but a finite number of seconds above 0, or of at least 0."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, not {type(seconds).__name__}")
    if not math.isfinite(seconds) or seconds < 0 or (seconds == 0 and not zero_allowed):
        least = "of at least 0" if zero_allowed else "above 0"
        raise ValueError(f"{name} must be a finite number of seconds {least}, not {seconds!r}")


def require_count(name: str, number: int) -> None:
    """Refuse anything but a whole number above 0."""
    _require_int(name, number, at_least=1)


def _require_share(name: str, share: float, *, zero_allowed: bool) -> None:
    if isinstance(share, bool) or not isinstance(share, (int, float)):
        raise TypeError(f"{name} must be a number, not {type(share).__name__}")
    if not 0 <= share < 1 or (share == 0 and not zero_allowed):
        raise ValueError(
            f"{name} must be a share, {'at least' if zero_allowed else 'above'} 0 and below 1, not {share!r}"
        )


def _require_int(name: str, number: int, *, at_least: int, at_most: float = math.inf) -> None:
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{name} must be an int, not {type(number).__name__}")
    if number < at_least:
        raise ValueError(f"{name} must be at least {at_least}, not {number}")
    if number > at_most:
        raise ValueError(f"{name} must be at most {at_most:,}, not {number}")
