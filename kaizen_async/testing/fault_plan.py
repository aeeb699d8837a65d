"""Which request meets which fault."""

from collections import deque
from dataclasses import dataclass, field

from kaizen_async.testing.chance import fraction
from kaizen_async.testing.checks import check_count, check_id, check_number, check_type
from kaizen_async.testing.faults import Fault


@dataclass(slots=True)
class _Queued:
    fault: Fault
    times: int


@dataclass(frozen=True, slots=True)
class _Rule:
    fault: Fault
    id: str | None
    probability: float
    number: int

    def applies(self, seed: int, execution_id: str, request_number: int) -> bool:
        if self.id is not None and self.id != execution_id:
            return False
        return self.probability >= 1 or fraction(seed, self.number, execution_id, request_number) < self.probability


@dataclass(slots=True)
class _Rules:
    queued: dict[str | None, deque[_Queued]] = field(default_factory=dict[str | None, deque[_Queued]])
    chance: list[_Rule] = field(default_factory=list[_Rule])
    always: list[_Rule] = field(default_factory=list[_Rule])

    def __bool__(self) -> bool:
        return bool(self.queued or self.chance or self.always)


class FaultPlan:
    """The faults that look-ups are to meet: `emulator.faults`.

    Of all faults that apply to a request, those which only delay (`Fault.latency`) come first and add up; then the
    first of `next`, `chance` and `always`, in this order and within each in the order of the calls, decides the answer.
    All may be called at any time and from any thread; only requests that come after it meet the fault.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._rules = _Rules()

    def next(self, fault: Fault, times: int = 1, *, id: str | None = None) -> None:
        """Let the next requests meet a fault, after those queued before.

        Args:
            fault: The fault.
            times: How many requests meet it.
            id: Whose requests; without it those of any id that has nothing of its own queued.
        """
        _check(fault, id)
        check_count("times", times)
        self._rules.queued.setdefault(id, deque()).append(_Queued(fault, times))

    def always(self, fault: Fault, *, id: str | None = None) -> None:
        """Let every request meet a fault, or every one for an id, until `clear`."""
        _check(fault, id)
        self._rules.always.append(_Rule(fault, id, 1.0, 0))

    def chance(self, fault: Fault, probability: float, *, id: str | None = None) -> None:
        """Let requests meet a fault with a probability from 0 to 1.

        Each request's lot is drawn from the emulator's seed, the id and the how-manieth request of that id it is: which
        requests are hit is the same in every run, however they overlap.
        """
        _check(fault, id)
        check_number("probability", probability, 0, 1, "5 % is 0.05")
        rules = self._rules.chance
        rules.append(_Rule(fault, id, probability, len(rules)))

    def clear(self) -> None:
        """Forget all faults; requests that are meeting one go on doing so."""
        self._rules = _Rules()

    def due(self, execution_id: str, request_number: int) -> list[Fault]:
        """Return the faults that the n-th request of an id meets, in order, and take the queued one off the queue."""
        rules = self._rules
        if not rules:
            return []
        faults = _take(rules.queued, execution_id)
        faults += [
            rule.fault
            for rule in (*rules.chance, *rules.always)
            if rule.applies(self._seed, execution_id, request_number)
        ]
        return sorted(faults, key=lambda fault: not fault.delays)


def _take(queues: dict[str | None, deque[_Queued]], execution_id: str) -> list[Fault]:
    for owner in (execution_id, None):
        queue = queues.get(owner)
        if queue:
            queued = queue[0]
            queued.times -= 1
            if not queued.times:
                queue.popleft()
            return [queued.fault]
    return []


def _check(fault: Fault, execution_id: str | None) -> None:
    check_type("fault", fault, Fault, "make one such as Fault.status(503)")
    if execution_id is not None:
        check_id(execution_id)
