"""What a client reports about its work: `KaizenClient(on_event=…)` takes a function of one event.

    def on_event(event: Event) -> None:
        match event:
            case RetryScheduled(id=execution_id, delay=delay, error=error):
                log.info("%s: again in %.1f s, since %s", execution_id, delay, error.reason)
            case Gated(pause=pause):
                tell_the_other_workers(pause)

The client calls the function in the task that does the work, so the function must return quickly and must not wait.
What it raises is logged once, as an error of the logger `kaizen_async`, and does not affect lookups. Later versions may
add kinds of events, so ignore those that you do not know.

A lookup reports, in this order: `LookUpStarted`; then for each request `AttemptStarted` and `AttemptEnded`, and between
two requests `RetryScheduled`; `LookUpEnded`. If a slow request is sent a second time, `HedgeStarted` and
`HedgeEnded` come between its `AttemptStarted` and the next `RetryScheduled` or `LookUpEnded`. A lookup that shares the
request of another reports only its start and its end. A poll of a wait is a lookup.

All times are seconds. No event holds a key or a header; records and errors are those that the caller gets.
"""

import inspect
import logging
from collections.abc import Callable, Iterable
from contextvars import Context
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias

import msgspec

from kaizen_async.errors import KaizenError
from kaizen_async.outcomes import Outcome

__all__ = [
    "AttemptEnded",
    "AttemptHeld",
    "AttemptStarted",
    "BatchEnded",
    "BatchStarted",
    "BudgetRefused",
    "Event",
    "Gated",
    "HedgeEnded",
    "HedgeStarted",
    "LookUpEnded",
    "LookUpShared",
    "LookUpStarted",
    "OutageBegan",
    "OutageEnded",
    "PollShared",
    "PollsFailing",
    "PollsRecovered",
    "RecordEnded",
    "RecordFailed",
    "RetryScheduled",
    "Ungated",
    "WaitEnded",
    "WaitStarted",
]

log = logging.getLogger("kaizen_async")
log.addHandler(logging.NullHandler())  # what to do with the lines is up to the application

Verb: TypeAlias = Literal["wait", "wait_many", "watch"]
BatchVerb: TypeAlias = Literal["get_many", "stream"]


class LookUpStarted(msgspec.Struct, frozen=True):
    """A lookup begins: for a caller, or as a poll of a wait."""

    id: str
    """The execution that is looked up."""
    url: str
    """Where it is looked up, which identifies the kind of lookup."""


class LookUpShared(msgspec.Struct, frozen=True):
    """A lookup waits for another one of the same id that is in flight, instead of sending a request of its own."""

    id: str
    url: str
    leader: Context
    """The context variables of the lookup that sends, for tracing. They belong to another caller."""


class LookUpEnded(msgspec.Struct, frozen=True):
    """A lookup has ended."""

    id: str
    url: str
    outcome: Outcome[Any] | None
    """What its caller gets; None if the caller was cancelled."""
    elapsed: float
    """Seconds for which this caller waited."""


class AttemptStarted(msgspec.Struct, frozen=True):
    """A request is about to be sent."""

    id: str
    url: str
    attempt: int
    """Which request of the lookup it is, from 1."""
    queued: float
    """Seconds for which it waited for a slot, the gate and the limiter."""
    headers: dict[str, str] = msgspec.field(default_factory=dict[str, str])
    """Headers to send with this request beside the client's own, such as `traceparent`: the function may add some."""


class AttemptHeld(msgspec.Struct, frozen=True):
    """A request that was about to be sent is not: a pause began while its connection was made. It queues again.

    `AttemptStarted` follows once more when it is sent after all.
    """

    id: str
    url: str
    attempt: int


class AttemptEnded(msgspec.Struct, frozen=True):
    """A request has ended, with or without a response."""

    id: str
    url: str
    attempt: int
    elapsed: float
    """Seconds from its start to the last byte of the response, or to the fault in its place."""
    status: int | None
    """The HTTP status of the response, also of one that broke off; None if none came."""
    error: KaizenError | None
    """Why there is no record; None if there is one. A cancelled attempt has no error."""
    peer: tuple[str, int] | None = None
    """Address and port of the server, or of the proxy, if they are known."""


class HedgeStarted(msgspec.Struct, frozen=True):
    """The request of an attempt is slow, so a second one is about to be sent on another connection."""

    id: str
    url: str
    attempt: int
    """The attempt to which both requests belong."""
    after: float
    """Seconds that the first request has taken."""
    headers: dict[str, str] = msgspec.field(default_factory=dict[str, str])
    """Headers to send with the second request beside the client's own: the function may add some."""


class HedgeEnded(msgspec.Struct, frozen=True):
    """The second request of an attempt is over.

    If its response was the first good one, the first request is aborted. `AttemptEnded` then reports that request
    without a status and without an error.
    """

    id: str
    url: str
    attempt: int
    elapsed: float
    """Seconds from the start of the second request to the last byte of its response, or to its end without one."""
    status: int | None
    """The HTTP status of the response; None if none came."""
    error: KaizenError | None
    """Why the second request did not help; None if it won, or was aborted because the first request won."""
    won: bool
    """Whether its response was the first good one."""
    peer: tuple[str, int] | None = None
    """Address and port of the server, or of the proxy, if they are known."""


class RetryScheduled(msgspec.Struct, frozen=True):
    """Another attempt is going to follow a failed one."""

    id: str
    url: str
    attempts: int
    """Requests sent so far."""
    delay: float
    """Seconds of back-off, after which the next attempt queues. 0 after throttling: then the gate holds it."""
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
    """The server throttles: the client sends no lookup of this kind until the pause is over."""

    status: int
    """The status of the response: 429 or 503."""
    retry_after: float | None
    """Seconds that the server named; None if it named none."""
    pause: float
    """Seconds until the client sends again, at a pace that it learns."""


class Ungated(msgspec.Struct, frozen=True):
    """A pause is over: the server accepted a request."""

    pause: float
    """Seconds that it took."""
    failed: int = 0
    """Requests that the server rejected, from the first that led to the pause."""
    lost: int = 0
    """Lookups that ended with an error because of it."""


class OutageBegan(msgspec.Struct, frozen=True):
    """Everything that was sent lately failed: lookups of this kind pause, and probes find out when the server is back.

    This event comes again if the cause changes before the outage ends.
    """

    url: str
    """Where these lookups go."""
    error: KaizenError
    """What the server, or the way to it, says; `error.reason` says it in one line."""
    refused: bool
    """Whether the key is refused. If a few seconds confirm that, lookups fail without being sent."""
    age: float
    """Seconds since the first failure."""
    next_probe: float
    """Seconds until the first probe."""
    longest_gap: float = 0.0
    """Seconds between two probes, at most, for the first half minute."""


class OutageEnded(msgspec.Struct, frozen=True):
    """A probe succeeded. The lookups that waited are sent, at a pace that grows to the usual one within two seconds."""

    url: str
    lasted: float
    """Seconds from the first failure to the success."""
    failed: int
    """Requests that failed during the outage, probes included."""
    lost: int = 0
    """Lookups that ended with an error because of it."""


class WaitStarted(msgspec.Struct, frozen=True):
    """A call begins to wait for executions to end."""

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
    """What `wait` raises; None if it returns a record, and for the methods that take many."""
    cancelled: bool = False
    """Whether the caller was cancelled, or left the block of a method that takes many before all had ended."""


class RecordEnded(msgspec.Struct, frozen=True):
    """A poll saw that an execution has ended. This event comes once, even if many calls wait for it."""

    id: str
    url: str
    outcome: Outcome[Any]
    """What those who wait get: the record, the requests sent for it, and the seconds since the first began to wait."""


class RecordFailed(msgspec.Struct, frozen=True):
    """A call of `wait_many` or `watch` ends for one id with an error. It comes for each call that waits for the id."""

    id: str
    url: str
    outcome: Outcome[Any]


class PollShared(msgspec.Struct, frozen=True):
    """A call that waits for an execution got its end from the polls of another call. It comes for each such call."""

    id: str
    url: str
    leader: Context
    """The context variables of the poll, for tracing. They belong to the other call."""


class BatchStarted(msgspec.Struct, frozen=True):
    """A call of `get_many` or `stream` begins."""

    verb: BatchVerb
    url: str


class BatchEnded(msgspec.Struct, frozen=True):
    """A call of `get_many` or `stream` is over."""

    verb: BatchVerb
    url: str
    elapsed: float
    succeeded: int
    """Lookups that found a record."""
    failed: int
    """Lookups that ended with an error."""
    cancelled: bool
    """Whether the caller was cancelled, or left the block before the end."""


class PollsFailing(msgspec.Struct, frozen=True):
    """The polls of a wait have failed for a minute. This event comes once, even with many waits. The waits continue."""

    id: str
    """The execution whose polls have failed for the longest."""
    elapsed: float
    """Seconds since its first failed poll."""
    reason: str
    """Why the last one failed, in one line."""


class PollsRecovered(msgspec.Struct, frozen=True):
    """The polls of all waits get responses again, after `PollsFailing`."""

    elapsed: float
    """Seconds for which they failed."""


Event: TypeAlias = (
    LookUpStarted
    | LookUpShared
    | LookUpEnded
    | AttemptStarted
    | AttemptHeld
    | AttemptEnded
    | HedgeStarted
    | HedgeEnded
    | RetryScheduled
    | BudgetRefused
    | Gated
    | Ungated
    | OutageBegan
    | OutageEnded
    | WaitStarted
    | WaitEnded
    | RecordEnded
    | RecordFailed
    | PollShared
    | BatchStarted
    | BatchEnded
    | PollsFailing
    | PollsRecovered
)
Hook: TypeAlias = Callable[[Event], None]


class Observed(Protocol):
    """A lookup that is observed without events, as long as its first request brings the record.

    Attributes:
        headers: Headers to send with the first request beside the client's own.
        is_light: Whether it needs no events so far.
        is_found: Whether `found` was called.
    """

    headers: dict[str, str]
    is_light: bool
    is_found: bool

    def sent(self) -> None:
        """Note that the first request was sent."""
        ...

    def found(self, elapsed: float) -> None:
        """Note that it brought the record after that many seconds. Nothing follows."""
        ...

    def abandon(self, elapsed: float) -> None:
        """Note that it was given up after that many seconds."""
        ...

    def enter(self) -> object:
        """Enter the lookup in the current context, as `LookUpStarted` would: its other events follow."""
        ...


Observe: TypeAlias = Callable[[str, str], Observed | None]
"""Takes an id and a URL, and observes that lookup in place of `LookUpStarted`. None: it wants the event."""


def observer_of(hooks: tuple[Hook, ...]) -> Observe | None:
    """Return what observes lookups without events, if there is one function, and it has the method `observe`."""
    observe: Observe | None = getattr(hooks[0], "observe", None) if len(hooks) == 1 else None
    if observe is None:
        return None
    begin = observe

    def safely(execution_id: str, url: str) -> Observed | None:
        try:
            return begin(execution_id, url)
        except Exception:  # noqa: BLE001 - the event that follows in its place reports it
            return None

    return safely


def hooks_of(on_event: "Hook | Iterable[Hook] | None") -> tuple[Hook, ...]:
    """Return the functions that `on_event` names: one, or an iterable of several.

    Raises:
        TypeError: One of them is not a plain function of one argument.
    """
    if on_event is None:
        return ()
    hooks: tuple[Hook, ...] = (on_event,) if callable(on_event) or not isinstance(on_event, Iterable) else (*on_event,)
    for hook in hooks:
        if isinstance(hook, type):
            raise TypeError(f"on_event must be a plain function of one event, not a class; make a {hook.__name__}()")
        if not callable(hook) or _is_coroutine_function(hook) or not _takes_one(hook):
            raise TypeError(
                f"on_event must be a plain function of one event, or several of them, not {hook!r:.100}; "
                "it is called and not awaited"
            )
    return hooks


def _takes_one(hook: Hook) -> bool:
    """Return whether a hook can be called with one argument, as far as its signature is known."""
    try:
        inspect.signature(hook).bind(None)
    except TypeError:
        return False
    except ValueError:  # functions written in C may have no signature
        return True
    return True


def _is_coroutine_function(hook: Any) -> bool:
    """Return whether calling a hook makes a coroutine or generator, as far as that shows without calling it."""
    while isinstance(hook, partial):
        hook = hook.func
    never_run = (inspect.iscoroutinefunction, inspect.isasyncgenfunction, inspect.isgeneratorfunction)
    parts = (hook, type(hook).__call__, inspect.unwrap(hook))
    if any(is_such(each) for is_such in never_run for each in parts):
        return True
    returned = str(getattr(hook, "__annotations__", {}).get("return", ""))
    return "Coroutine" in returned or "Awaitable" in returned


def shielded(hooks: tuple[Hook, ...]) -> Hook | None:
    """Return one hook that calls all of them and raises nothing; None if there are none."""
    if not hooks:
        return None
    calls = tuple(_shielded(hook) for hook in hooks)
    if len(calls) == 1:
        return calls[0]

    def call_all(event: Event) -> None:
        for call in calls:
            call(event)

    return call_all


def _shielded(hook: Callable[[Event], object]) -> Hook:
    failed = False

    def call(event: Event) -> None:
        nonlocal failed
        try:
            returned = hook(event)
            if inspect.iscoroutine(returned):
                returned.close()
            if returned is None or failed:
                return
        except Exception:
            if not failed:
                failed = True
                log.exception("on_event raised; lookups continue, and further errors of on_event are not logged")
            return
        failed = True
        log.error("on_event returned something, which is ignored: it must be a plain function that returns None")

    return call
