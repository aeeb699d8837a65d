"""A token bucket: the usual way in which servers limit a rate."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from kaizen_async.testing.checks import check_count, check_number, check_seconds

_SLOWEST: Final = 1e-9
_FASTEST: Final = 1e9


@dataclass(slots=True)
class TokenBucket:
    """Lets `rate` requests a second pass, and `burst` at once after a rest."""

    rate: float
    burst: int
    retry_after: float | None
    clock: Callable[[], float]
    _tokens: float = field(init=False)
    _filled: float = field(init=False)

    def __post_init__(self) -> None:
        check_number("rate", self.rate, _SLOWEST, _FASTEST, "rate_limit(None) lifts the limit")
        check_count("burst", self.burst, "with less nothing would ever pass")
        if self.retry_after is not None:
            check_seconds("retry_after", self.retry_after)
        self._tokens = self.burst
        self._filled = self.clock()

    def take(self) -> bool:
        """Take a token if there is one; return whether there was."""
        now = self.clock()
        self._tokens = min(self.burst, self._tokens + (now - self._filled) * self.rate)
        self._filled = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def headers(self) -> dict[str, str]:
        """Return the headers of a refusal."""
        return {} if self.retry_after is None else {"Retry-After": f"{self.retry_after:.10g}"}
