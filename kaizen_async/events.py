"""What a client tells about its work while it does it: `KaizenClient(on_event=…)` takes a function of one event.

    def on_event(event: Event) -> None:
        match event:
            case RetryScheduled(id=execution_id, delay=delay, error=error):
                log.info("%s: again in %.1f s, since %s", execution_id, delay, error.reason)
            case Gated(pause=pause):
                tell_the_other_workers(pause)

The function is called in the task that does the work, at the very place in it, so it must be quick and must not wait.
What it raises is logged once, as an error of the logger `kaizen_async`, and disturbs no look-up. More kinds of events
may come in later versions: let the ones that you do not know pass.

A look-up tells, in this order: `LookUpStarted`; then for each request `AttemptStarted` and `AttemptEnded`, and between
two requests `RetryScheduled`; `LookUpEnded`. A look-up that shares the request of another tells only its start and its
end. A poll of a wait is a look-up.

All times are seconds. No event holds a key or a header; records and errors are those that the caller gets.
"""

import inspect
import logging
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import msgspec

from kaizen_async.errors import KaizenError
from kaizen_async.outcomes import Outcome

__all__ = [
    "AttemptEnded",
    "AttemptStarted",
    "BudgetRefused",
    "Event",
    "Gated",
    "LookUpEnded",
    "LookUpStarted",
    "RecordEnded",
    "RetryScheduled",
    "Ungated",
    "WaitEnded",
    "WaitStarted",
]

log = logging.getLogger("kaizen_async")

Verb: TypeAlias = Literal["wait", "wait_many", "watch"]


class LookUpStarted(msgspec.Struct, frozen=True):
    """Somebody asks for a record: a caller, or a wait that polls."""

    id: str
    """The execution that is looked up."""
    url: str
    """Where it is looked up, which tells the kinds of look-ups apart."""


class LookUpEnded(msgspec.Struct, frozen=True):
    """A look-up is over."""

    id: str
    url: str
    outcome: Outcome[Any] | None
    """What its caller gets; None if the caller was cancelled."""


class AttemptStarted(msgspec.Struct, frozen=True):
    """A request is about to be sent."""

    id: str
    url: str
    attempt: int
    """Which request of the look-up it is, from 1."""
    queued: float
    """Seconds for which it waited for a slot, the gate and the limiter."""


class AttemptEnded(msgspec.Struct, frozen=True):
    """A request is over, in whatever way."""

    id: str
    url: str
    attempt: int
    elapsed: float
    """Seconds from its start to the last byte of the answer, or to the fault in its place."""
    status: int | None
    """The HTTP status of the answer; None if none came, or none that could be read to its end."""
    error: KaizenError | None
    """Why there is no record; None if there is one. A cancelled attempt has neither status nor error."""


class RetryScheduled(msgspec.Struct, frozen=True):
    """A failed attempt is going to be followed by another."""

    id: str
    url: str
    attempts: int
    """Requests sent so far."""
    delay: float
    """Seconds of back-off, after which the next attempt queues. 0 after a throttling answer: the gate holds it then."""
    error: KaizenError
    """Why the attempt failed; `error.reason` says it in one line."""


class BudgetRefused(msgspec.Struct, frozen=True):
    """A failed attempt would have been followed by another, but the client's retry budget is used up."""

    id: str
    url: str
    attempts: int
    """Requests sent."""
    error: KaizenError
    """Why the last one failed."""


class Gated(msgspec.Struct, frozen=True):
    """The server asked for less: no look-up of this client is sent until a pause is over."""

    status: int
    """The status of the answer: 429 or 503."""
    retry_after: float | None
    """Seconds that the server named; None if it named none."""
    pause: float
    """Seconds until the client sends again, at a pace that it learns."""


class Ungated(msgspec.Struct, frozen=True):
    """A pause is over. Told with the first look-up that is sent after it."""

    pause: float
    """Seconds that it took."""


class WaitStarted(msgspec.Struct, frozen=True):
    """Somebody begins to wait for executions to end."""

    verb: Verb
    url: str
    id: str | None
    """The execution that `wait` is for; None for the verbs that take many."""


class WaitEnded(msgspec.Struct, frozen=True):
    """A wait is over: it has its outcome, or its caller has left it."""

    verb: Verb
    url: str
    id: str | None
    elapsed: float
    error: KaizenError | None
    """What `wait` raises; None if it returns a record, and for the verbs that take many."""


class RecordEnded(msgspec.Struct, frozen=True):
    """A poll saw that an execution has ended. Told once, however many wait for it."""

    id: str
    url: str
    outcome: Outcome[Any]
    """What those who wait get: the record, the requests sent for it, and the seconds since the first began to wait."""


Event: TypeAlias = (
    LookUpStarted
    | LookUpEnded
    | AttemptStarted
    | AttemptEnded
    | RetryScheduled
    | BudgetRefused
    | Gated
    | Ungated
    | WaitStarted
    | WaitEnded
    | RecordEnded
)
Hook: TypeAlias = Callable[[Event], None]


def shielded(hook: object) -> Hook:
    """Return a hook that raises nothing.

    Raises:
        TypeError: What was passed in is no plain function of one argument.
    """
    if not callable(hook) or inspect.iscoroutinefunction(hook) or inspect.iscoroutinefunction(type(hook).__call__):
        raise TypeError(f"on_event must be a plain function of one event, not {hook!r}; it is called, and not awaited")
    failed = False

    def tell(event: Event) -> None:
        nonlocal failed
        try:
            hook(event)
        except Exception:
            if not failed:
                failed = True
                log.exception("on_event raised; look-ups go on, and what else it may raise is not logged")

    return tell
