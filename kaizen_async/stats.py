"""Running totals of one client: a snapshot costs a copy, and no history is kept."""

from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

import msgspec

HealthState: TypeAlias = Literal["healthy", "throttled", "refused", "failing"]


class Counters(msgspec.Struct, gc=False):
    """Totals since the client was created: of one kind of lookup, or of what concerns all."""

    lookups: int = 0
    in_progress: int = 0
    succeeded: int = 0
    failed: int = 0
    shared: int = 0
    cancelled: int = 0
    attempts: int = 0
    retries: int = 0
    hedges: int = 0
    hedges_won: int = 0
    throttled: int = 0
    pauses: int = 0
    pause_seconds: float = 0.0
    outages: int = 0
    outage_seconds: float = 0.0
    polls: int = 0
    responses_2xx: int = 0
    responses_3xx: int = 0
    responses_4xx: int = 0
    responses_5xx: int = 0
    unanswered: int = 0
    attempt_seconds: float = 0.0

    def note_success(self, elapsed: float) -> None:
        """Count the request of a lookup that it brought to its record."""
        self.attempt_seconds += elapsed
        self.responses_2xx += 1
        self.succeeded += 1

    def note_attempt(self, elapsed: float, status: int | None) -> None:
        """Count a request that is over, by its status if there was one."""
        self.attempt_seconds += elapsed
        if status is None:
            self.unanswered += 1
        elif status < 300:  # noqa: PLR2004 - the classes of statuses
            self.responses_2xx += 1
        elif status < 400:  # noqa: PLR2004 - the same
            self.responses_3xx += 1
        elif status < 500:  # noqa: PLR2004 - the same
            self.responses_4xx += 1
        else:
            self.responses_5xx += 1


def total(counters: Iterable[Counters]) -> dict[str, Any]:
    """Return the sums, by their names."""
    each = list(counters)
    return {name: sum(getattr(one, name) for one in each) for name in Counters.__struct_fields__}


class ClientStats(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a client has done since it was created, and what it is doing now."""

    lookups: int
    """Lookups begun, those that shared another's request not included."""
    succeeded: int
    """Lookups that ended with a record."""
    failed: int
    """Lookups that ended with an error."""
    shared: int
    """Lookups that ended with the outcome of another one, which asked for the same id at the same time."""
    cancelled: int
    """Lookups whose caller was cancelled. Each call ends as one of succeeded, failed, shared and cancelled."""
    in_progress: int
    """Lookups that have begun and not ended, those that wait for another's request not included."""
    queued: int
    """Those of them that have no request in flight: they wait for a slot, for a pause to end, or in back-off."""
    attempts: int
    """HTTP requests sent, hedges included."""
    retries: int
    """HTTP requests that followed a failed one."""
    hedges: int
    """HTTP requests sent because the first request of an attempt was slow: see `HedgePolicy`."""
    hedges_won: int
    """Hedges whose response was the first good one. The slow request was then aborted, and counts as `unanswered`."""
    throttled: int
    """Responses that asked for fewer requests: 420, 429, 529, and 403, 503 or 509 that name a time."""
    pauses: int
    """Times that all lookups of a kind paused because the server rejected everything."""
    pause_seconds: float
    """Seconds that those pauses took, the present one not included."""
    outages: int
    """Times that all lookups of a kind paused because every request failed, or the server refused the key."""
    outage_seconds: float
    """Seconds that those outages took, the present one not included."""
    responses_2xx: int
    """Responses by the class of their status, also those that broke off after it."""
    responses_3xx: int
    responses_4xx: int
    responses_5xx: int
    unanswered: int
    """Requests without a response: not connected, timed out, reset, cancelled."""
    attempt_seconds: float
    """Seconds that all requests took together; divided by their number, the mean latency."""
    by_path: dict[str, Counters]
    """The same totals for each kind of lookup, by its path below the base URL."""
    polls: int
    """Lookups made by waits."""
    waiting: int
    """Executions that calls wait for now."""
    poll_delay: float
    """Seconds by which polls come later than their cadence asks for, as a running mean: above 0 when concurrency, gate
    or `max_rate` let through fewer polls than wished."""
    polls_failing_for: float
    """Seconds since the first of the polls that have failed in a row; 0 if the last poll got its response."""
    polls_failing_because: str | None
    """Why the last of those failed, in one line; None if there are none."""
    in_flight: int
    """HTTP requests in flight now."""
    health: HealthState
    """How the server is doing, in the view of this client. Of several kinds of lookups, the worst: "throttled" while
    the client sends less than it could, "refused" while the key is, "failing" in an outage."""
    gate_pace: float | None
    """Requests per second that are allowed now: 0 during a pause, None when nothing is held back."""
    gate_seconds_left: float
    """Seconds until the next probe of a pause may be sent; 0 when there is no pause."""
