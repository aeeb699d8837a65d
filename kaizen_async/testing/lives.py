"""The script of an execution's life: which status it has how many seconds after its start, and whether it ends."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from kaizen_async.testing.checks import check_seconds

Step: TypeAlias = tuple[str, float]
"""A status, and the seconds since the start of the life at which it is reached."""

_ENQUEUED_SHARE: Final = 0.1


@dataclass(frozen=True, slots=True)
class Life:
    """A life that the emulator plays: `Life.of(("Enqueued", 0), ("InProgress", 2), ("Completed", 5))`.

    Any text may be a status. A life that ends does so on reaching its last step: from then on the record carries
    `endTime` and `durationMs`. Lives hold no state, so one may be given to any number of executions.

    Attributes:
        steps: The statuses and when they are reached; the first at 0, none earlier than the one before it.
        ends: Whether the last step is the end.
        age: Seconds of the life that are over when the emulator gets to know it.
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
        """Return a life that took `duration` seconds and is over the moment the emulator gets to know it."""
        check_seconds("duration", duration)
        return cls((("InProgress", 0.0), (status, duration)), age=duration)

    @property
    def duration(self) -> float | None:
        """Seconds from the start to the end; None if there is no end."""
        return self.steps[-1][1] if self.ends else None

    def status_at(self, seconds: float) -> str:
        """Return the status that many seconds after the start."""
        return reached(self.steps, seconds)


def reached(steps: Sequence[Step], seconds: float) -> str:
    """Return the last status that is reached after so many seconds; before the start, the first."""
    current = steps[0][0]
    for status, after in steps:
        if after > seconds:
            break
        current = status
    return current


def _check_steps(owner: str, steps: Sequence[Step]) -> None:
    if not steps:
        raise ValueError(f'{owner} needs at least one step, for example ("InProgress", 0)')
    for step in steps:
        _check_step(owner, step)
    times = [after for _, after in steps]
    if times[0] != 0:
        raise ValueError(f"{owner} must start at 0 seconds, not at {times[0]}: say what its status is until then")
    if times != sorted(times):
        raise ValueError(f"the steps of {owner} are out of order: give each the seconds since the start, not {times}")


def _check_step(owner: str, step: tuple[object, ...]) -> None:
    match step:
        case (str(status), after) if status:
            check_seconds(f"the time of {status!r}", after)
        case _:
            raise TypeError(f'a step of {owner} is a pair (status, seconds) such as ("Completed", 5.0), not {step!r}')
