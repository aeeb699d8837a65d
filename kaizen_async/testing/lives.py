"""The script of an execution's life: which status and fields it has how many seconds after its start."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

from kaizen_async.testing.checks import check_seconds, check_type

Fields: TypeAlias = Mapping[str, Any]
Step: TypeAlias = tuple[str, float] | tuple[str, float, Fields]
"""A status, the seconds since the start of the life at which it is reached, and fields of the record from then on."""

_ENQUEUED_SHARE: Final = 0.1


@dataclass(frozen=True, slots=True)
class Life:
    """A life that the emulator plays: `Life.of(("Enqueued", 0), ("InProgress", 2), ("Completed", 5))`.

    Any text may be a status. A life that ends does so on reaching its last step: from then on the record carries
    `endTime` and `durationMs`. A step may set fields of the record, by their names in JSON, which stay until a later
    step sets them again: `("Completed", 5, {"downloads": [...]})`. Lives hold no state, so one may be given to any
    number of executions.

    Attributes:
        steps: The statuses and when they are reached; the first at 0, none earlier than the one before it.
        ends: Whether the last step is the end.
        age: Seconds of the life that are over when the emulator first hears of it.
        authentications: The steps of each authentication; without any, each login of the record gets one that
            follows the execution (Enqueued, InProgress, and at the end Finished, or Failed after `"Failed"`).
    """

    steps: tuple[Step, ...]
    ends: bool = True
    age: float = 0.0
    authentications: tuple[tuple[Step, ...], ...] = ()

    def __post_init__(self) -> None:
        _check_steps("a life", self.steps)
        check_seconds("age", self.age)
        for steps in self.authentications:
            _check_steps("an authentication", steps)

    @classmethod
    def of(
        cls,
        *steps: Step,
        ends: bool = True,
        age: float = 0.0,
        authentications: Iterable[Sequence[Step]] = (),
    ) -> "Life":
        """Return the life of these steps; see the class for their meaning."""
        return cls(steps, ends, age, tuple(tuple(track) for track in authentications))

    @classmethod
    def lasting(cls, seconds: float, *, status: str = "Completed", age: float = 0.0) -> "Life":
        """Return a life that is enqueued for a tenth of the seconds, in progress for the rest, and ends as `status`."""
        check_seconds("seconds", seconds)
        return cls((("Enqueued", 0.0), ("InProgress", seconds * _ENQUEUED_SHARE), (status, seconds)), age=age)

    @classmethod
    def running(cls, *, status: str = "InProgress", age: float = 0.0) -> "Life":
        """Return a life that never ends: `endTime` stays null."""
        return cls(((status, 0.0),), ends=False, age=age)

    @classmethod
    def ended(cls, *, duration: float = 30.0, status: str = "Completed") -> "Life":
        """Return a life that took `duration` seconds and is over when the emulator first hears of it."""
        check_seconds("duration", duration)
        return cls((("InProgress", 0.0), (status, duration)), age=duration)

    def with_fields(self, fields: Fields) -> "Life":
        """Return the same life with fields of the record, by their names in JSON, from its first step on."""
        check_type("fields", fields, Mapping, 'such as {"sessionId": "s"}')
        status, after, *before = self.steps[0]
        first: Step = (status, after, {**fields, **(before[0] if before else {})})
        return replace(self, steps=(first, *self.steps[1:]))

    def finished_at(self, seconds: float, status: str) -> "Life":
        """Return the same life up to `seconds` after its start, where it ends with a status."""
        past = tuple(step for step in self.steps if step[1] < seconds) or (self.steps[0],)
        return replace(self, steps=(*past, (status, max(seconds, 0.0))), ends=True)

    @property
    def duration(self) -> float | None:
        """Seconds from the start to the end; None if there is no end."""
        return self.steps[-1][1] if self.ends else None

    def changes_after(self, seconds: float) -> float:
        """Return when the next step comes, also of an authentication; math.inf if none does."""
        tracks = (self.steps, *self.authentications)
        return min((step[1] for steps in tracks for step in steps if step[1] > seconds), default=math.inf)

    def status_at(self, seconds: float) -> str:
        """Return the status that many seconds after the start."""
        return reached(self.steps, seconds)

    def fields_at(self, seconds: float) -> dict[str, Any]:
        """Return the fields that the steps have set that many seconds after the start."""
        fields: dict[str, Any] = {}
        for step in self.steps:
            if len(step) == 3 and (step[1] <= seconds or step is self.steps[0]):  # noqa: PLR2004 - one with fields
                fields |= step[2]
        return fields


def reached(steps: Sequence[Step], seconds: float) -> str:
    """Return the last status that is reached after `seconds`; before the start, the first."""
    current = steps[0][0]
    for step in steps:
        if step[1] > seconds:
            break
        current = step[0]
    return current


def _check_steps(owner: str, steps: Sequence[Step]) -> None:
    if not steps:
        raise ValueError(f'{owner} needs at least one step, for example ("InProgress", 0)')
    for step in steps:
        _check_step(owner, step)
    times = [step[1] for step in steps]
    if times[0] != 0:
        raise ValueError(f"{owner} must start at 0 seconds, not at {times[0]}: say what its status is until then")
    if times != sorted(times):
        raise ValueError(f"the steps of {owner} are out of order: give each the seconds since the start, not {times}")


def _check_step(owner: str, step: tuple[object, ...]) -> None:
    match step:
        case (str(status), after) | (str(status), after, Mapping()) if status:
            check_seconds(f"the time of {status!r}", after)
        case _:
            raise TypeError(
                f'a step of {owner} is a pair (status, seconds) such as ("Completed", 5.0), '
                f"or has a dict of fields as its third part; not {step!r}"
            )
