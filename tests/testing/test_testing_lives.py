"""The scripts of lives, and random numbers that depend only on their arguments."""

from collections.abc import Callable
from typing import Any

import pytest

from kaizen_async import testing
from kaizen_async.testing import Life, fraction


def test_a_life_has_the_status_of_the_last_step_reached() -> None:
    """A step applies from its exact second until the next step."""
    life = Life.of(("Enqueued", 0), ("InProgress", 2.0), ("Completed", 5.0))
    assert [life.status_at(t) for t in (0, 1.9, 2, 4.9, 5, 500)] == [
        *("Enqueued", "Enqueued", "InProgress", "InProgress", "Completed", "Completed")
    ]
    assert life.duration == 5.0


def test_of_two_steps_at_the_same_second_the_later_holds() -> None:
    """Of two steps at the same second, the later one applies, so a life of no length has ended at once."""
    life = Life.ended(duration=0)
    assert life.status_at(0) == "Completed"
    assert life.duration == 0


def test_shortcuts_are_scripts_like_any_other() -> None:
    """The lives of `lasting`, `running` and `ended` equal lives written with `of`."""
    assert Life.lasting(50) == Life.of(("Enqueued", 0), ("InProgress", 5), ("Completed", 50))
    assert Life.lasting(50, status="Zorp", age=7) == Life.of(("Enqueued", 0), ("InProgress", 5), ("Zorp", 50), age=7)
    assert Life.running() == Life.of(("InProgress", 0), ends=False)
    assert Life.running(status="Paused", age=9) == Life.of(("Paused", 0), ends=False, age=9)
    assert Life.ended(duration=3, status="Failed") == Life.of(("InProgress", 0), ("Failed", 3), age=3)


def test_a_life_without_end_has_no_duration() -> None:
    """A life that does not end has no duration."""
    assert Life.running().duration is None


def test_lives_are_values() -> None:
    """Equal lives compare and hash equal, and a life cannot be changed."""
    assert len({Life.lasting(5), Life.lasting(5), Life.lasting(6)}) == 2
    with pytest.raises(AttributeError):
        Life.running().age = 5  # type: ignore[misc]


MISUSES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no step": (Life.of, ValueError, "at least one step"),
    "late start": (lambda: Life.of(("InProgress", 1)), ValueError, "start at 0"),
    "disorder": (lambda: Life.of(("Enqueued", 0), ("InProgress", 3), ("Completed", 2)), ValueError, "out of order"),
    "negative": (lambda: Life.of(("Enqueued", 0), ("Completed", -1)), ValueError, "'Completed' must be from 0"),
    "nan": (lambda: Life.of(("Enqueued", 0), ("Completed", float("nan"))), ValueError, "'Completed' must be from 0"),
    "text": (lambda: Life.of(("Enqueued", 0), ("Completed", "5")), TypeError, "'Completed' must be a number"),
    "truth": (lambda: Life.of(("Enqueued", 0), ("Completed", True)), TypeError, "'Completed' must be a number"),
    "empty status": (lambda: Life.of(("", 0)), TypeError, "a pair"),
    "no pair": (lambda: Life.of("Enqueued"), TypeError, "a pair"),
    "flat track": (lambda: Life.of(("A", 0), authentications=[("A", 0)]), TypeError, "an authentication is a pair"),
    "empty track": (lambda: Life.of(("A", 0), authentications=[[]]), ValueError, "an authentication needs at least"),
    "negative length": (lambda: Life.lasting(-1), ValueError, "seconds must be from 0"),
    "length as text": (lambda: Life.lasting("5"), TypeError, "seconds must be a number"),
    "endless end": (lambda: Life.ended(duration=float("inf")), ValueError, "duration must be from 0"),
    "negative age": (lambda: Life.running(age=-1), ValueError, "age must be from 0"),
}


@pytest.mark.parametrize(("make", "error", "advice"), MISUSES.values(), ids=MISUSES)
def test_misuse_is_refused_with_advice(make: Callable[[], Any], error: type[Exception], advice: str) -> None:
    """An invalid script raises an error where it is written."""
    with pytest.raises(error, match=advice):
        make()


def test_fraction_depends_on_each_argument_and_nothing_else() -> None:
    """Equal arguments give equal fractions in any process, and others give other fractions."""
    assert fraction(7, "exec_1", 3) == fraction(7, "exec_1", 3) == 0.9372840580229129
    assert len({fraction(7, "a"), fraction(8, "a"), fraction(7, "b"), fraction(7, "a", 1), fraction(7, "a1")}) == 5


def test_fractions_are_spread_evenly() -> None:
    """About a tenth of the fractions falls into each tenth of the range."""
    tenths = [int(10 * fraction(0, number)) for number in range(10_000)]
    assert {tenth: 850 < tenths.count(tenth) < 1150 for tenth in range(10)} == dict.fromkeys(range(10), True)


def test_the_package_offers_what_it_lists_and_nothing_else() -> None:
    """Every name in `__all__` is available, and any other raises an AttributeError."""
    assert all(getattr(testing, name) for name in testing.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Emulator'"):
        _ = testing.Emulator
