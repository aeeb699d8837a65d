"""Running totals of one client: a snapshot costs a copy, and no history is kept."""

import msgspec


class Counters(msgspec.Struct, gc=False):
    """Totals since the client was created, counted by the engine."""

    lookups: int = 0
    succeeded: int = 0
    failed: int = 0
    shared: int = 0
    attempts: int = 0
    retries: int = 0
    throttled: int = 0
    pauses: int = 0
    polls: int = 0


class ClientStats(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a client has done since it was created, and what it is doing now."""

    lookups: int
    """Look-ups begun, those that shared another's request not included."""
    succeeded: int
    """Look-ups that ended with a record."""
    failed: int
    """Look-ups that ended with an error. Cancelled ones count as neither."""
    shared: int
    """Look-ups answered by the request of another that asked for the same id at the same time."""
    attempts: int
    """HTTP requests sent."""
    retries: int
    """HTTP requests that followed a failed one."""
    throttled: int
    """Answers 429, and 503 with Retry-After."""
    pauses: int
    """Times that the gate closed."""
    polls: int
    """Look-ups made by waits."""
    waiting: int
    """Executions that somebody waits for now."""
    poll_delay: float
    """Seconds by which polls come later than their cadence asks for, as a running mean: above 0 when concurrency, gate
    or `max_rate` let through fewer polls than wished."""
    in_flight: int
    """HTTP requests under way now."""
    gate_pace: float | None
    """Requests per second that the gate lets pass now: 0 during a pause, None when it holds nobody back."""
    gate_seconds_left: float
    """Seconds until the gate's pause ends; 0 when it is not closed."""
    retry_tokens: int
    """What is left of the retry budget."""
