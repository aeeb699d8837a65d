"""Which request meets which fault."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from kaizen_async.testing.chance import fraction
from kaizen_async.testing.checks import check_count, check_id, check_number, check_seconds, check_type
from kaizen_async.testing.faults import Fault

CHAOS: Final = (
    Fault.status(503),
    Fault.status(429, headers={"Retry-After": "1"}),
    Fault.reset(),
    Fault.html_502(),
    Fault.truncated_body(),
    Fault.malformed_body(),
    Fault.latency(0.2),
)
"""What goes wrong under `FaultPlan.chaos`, each as often as the others."""


@dataclass(slots=True)
class _Queued:
    fault: Fault
    times: int


@dataclass(slots=True)
class _Rule:
    """A fault that stays in the plan, and which requests meet it."""

    fault: Fault
    id: str | None
    applies: Callable[[str, int], bool]
    is_due: bool = True
    was_met: bool = False


@dataclass(slots=True)
class _Rules:
    queued: dict[str | None, deque[_Queued]] = field(default_factory=dict[str | None, deque[_Queued]])
    """By id, those that some request is still to meet."""
    chance: list[_Rule] = field(default_factory=list[_Rule])
    always: list[_Rule] = field(default_factory=list[_Rule])

    def __bool__(self) -> bool:
        return bool(self.queued or self.chance or self.always)


class FaultPlan:
    """The faults that requests are to meet: `emulator.faults`.

    Of all faults that apply to a request, those which only delay (`Fault.latency`) come first and add up; then the
    first of `next`, `chance` and `chaos`, `nth`, `between` and `always`, in this order and within each in the order of
    the calls, decides the response. All methods may be called at any time and from any thread.
    Only later requests meet the fault.
    """

    def __init__(self, seed: int = 0, now: Callable[[], datetime] | None = None) -> None:
        self._seed = seed
        self._now = now
        self._started = None if now is None else now()
        self._rules = _Rules()
        self._total = 0

    def __bool__(self) -> bool:
        return bool(self._rules)

    def next(self, fault: Fault, times: int = 1, *, id: str | None = None) -> None:
        """Let the next requests meet a fault, after the faults that were queued before.

        Args:
            fault: The fault.
            times: How many requests meet it.
            id: The id whose requests meet it. Without it: the requests of any id that has no queued fault of its own.
        """
        _check(fault, id)
        check_count("times", times)
        self._rules.queued.setdefault(id, deque()).append(_Queued(fault, times))

    def always(self, fault: Fault, *, id: str | None = None) -> None:
        """Let every request meet a fault, or every one for an id, until `clear`."""
        _check(fault, id)
        self._rules.always.append(_Rule(fault, id, lambda _, __: True))

    def nth(self, fault: Fault, number: int, *, id: str | None = None) -> None:
        """Let one request meet a fault, counted from 1: `nth(Fault.status(503), 3)` makes the third request fail.

        Args:
            fault: The fault.
            number: Which request, of those for the id, or without one of all that came in since the last `reset`.
            id: The id whose requests are counted.
        """
        _check(fault, id)
        check_count("number", number)

        def is_it(_: str, number_for_id: int) -> bool:
            return (self._total if id is None else number_for_id) == number

        self._rules.always.append(_Rule(fault, id, is_it))

    def between(self, fault: Fault, start: datetime | float, end: datetime | float, *, id: str | None = None) -> None:
        """Let every request meet a fault that comes in from one moment until before another.

        Args:
            fault: The fault.
            start: A date and time with a time zone, as the emulator's clock has it; or seconds since the emulator was
                made or reset.
            end: The same for the end.
            id: The id whose requests meet it; without it, those of any id.
        """
        _check(fault, id)
        if self._now is None:
            raise RuntimeError("a plan without an emulator has no clock; use emulator.faults")
        now = self._now
        begins, ends = self._second(start, "start"), self._second(end, "end")
        if begins >= ends:
            raise ValueError(f"start must be before end, not {start!r} and {end!r}")
        self._rules.always.append(_Rule(fault, id, lambda _, __: begins <= now().timestamp() < ends))

    def chance(self, fault: Fault, probability: float, *, id: str | None = None) -> None:
        """Let requests meet a fault with a probability from 0 to 1.

        The emulator's seed, the id and the number of requests for that id decide which requests meet the fault. So
        these are the same in every run, however the requests overlap.
        """
        _check(fault, id)
        check_number("probability", probability, 0, 1, "5 % is 0.05")
        rules = self._rules.chance
        place = len(rules)

        def is_hit(execution_id: str, number: int) -> bool:
            return probability >= 1 or fraction(self._seed, place, execution_id, number) < probability

        rules.append(_Rule(fault, id, is_hit, is_due=False))

    def chaos(self, share: float, *, seed: int | None = None, id: str | None = None) -> None:
        """Let a share of the requests, from 0 to 1, meet one of several faults, each as often as the others.

        Args:
            share: 0.2 for one request in five.
            seed: What the requests and their faults are drawn from. Defaults to the emulator's.
            id: The id whose requests meet it; without it, those of any id.
        """
        check_number("share", share, 0, 1, "5 % is 0.05")
        if seed is not None:
            check_type("seed", seed, int)
        drawn_from = self._seed if seed is None else seed
        for place, fault in enumerate(CHAOS):
            _check(fault, id)

            def is_hit(execution_id: str, number: int, place: int = place) -> bool:
                drawn = fraction(drawn_from, "chaos", execution_id, number)
                return drawn < share and int(drawn / share * len(CHAOS)) == place

            self._rules.chance.append(_Rule(fault, id, is_hit, is_due=False))

    def clear(self) -> None:
        """Forget all faults. Requests that are meeting a fault still do."""
        self._rules = _Rules()

    def reset(self) -> None:
        """Forget all faults, and count requests and seconds from now on."""
        self.clear()
        self._total = 0
        self._started = None if self._now is None else self._now()

    def unused(self) -> list[str]:
        """Return what was scripted and has not happened: queued faults, and rules that no request has met."""
        rules = self._rules
        queued = [
            f"{queued.fault.name}{_whose(id)} {queued.times} more times"
            for id in rules.queued
            for queued in rules.queued[id]
        ]
        return queued + [
            f"{rule.fault.name}{_whose(rule.id)}" for rule in rules.always if rule.is_due and not rule.was_met
        ]

    def needs_connection(self, execution_id: str, request_number: int) -> bool:
        """Return whether the n-th request of an id, should it come now, would meet a fault that needs a connection."""
        rules = self._rules
        self._total += 1
        queue = _queue_for(rules.queued, execution_id)
        faults = ([queue[0].fault] if queue else []) + [rule.fault for rule in self._met(execution_id, request_number)]
        self._total -= 1
        return any(fault.needs_connection for fault in faults)

    def note_request(self) -> None:
        """Note a request that meets no fault, because none is scripted."""
        self._total += 1

    def due(self, execution_id: str, request_number: int) -> list[Fault]:
        """Return the faults that the n-th request of an id meets, in order, and take the queued one off the queue."""
        self._total += 1
        rules = self._rules
        if not rules:
            return []
        faults = _take(rules.queued, execution_id)
        for rule in self._met(execution_id, request_number):
            rule.was_met = True
            faults.append(rule.fault)
        return sorted(faults, key=lambda fault: not fault.delays)

    def _met(self, execution_id: str, request_number: int) -> list[_Rule]:
        return [
            rule
            for rule in (*self._rules.chance, *self._rules.always)
            if rule.id in {None, execution_id} and rule.applies(execution_id, request_number)
        ]

    def _second(self, moment: datetime | float, name: str) -> float:
        """Return seconds since the epoch of 1970."""
        if isinstance(moment, datetime):
            if moment.tzinfo is None:
                raise ValueError(f"{name} must carry a time zone: datetime(2026, 1, 1, 10, 0, tzinfo=UTC)")
            return moment.timestamp()
        check_seconds(name, moment)
        return moment + (self._started.timestamp() if self._started else 0.0)


def _queue_for(queues: dict[str | None, deque[_Queued]], execution_id: str) -> deque[_Queued] | None:
    return queues.get(execution_id) or queues.get(None)


def _take(queues: dict[str | None, deque[_Queued]], execution_id: str) -> list[Fault]:
    queue = _queue_for(queues, execution_id)
    if not queue:
        return []
    queued = queue[0]
    queued.times -= 1
    if not queued.times:
        queue.popleft()
        for owner in (execution_id, None):
            if owner in queues and not queues[owner]:
                del queues[owner]
    return [queued.fault]


def _whose(execution_id: str | None) -> str:
    return "" if execution_id is None else f" for {execution_id!r}"


def _check(fault: Fault, execution_id: str | None) -> None:
    check_type("fault", fault, Fault, "make one such as Fault.status(503)")
    if execution_id is not None:
        check_id(execution_id)
