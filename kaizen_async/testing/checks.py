"""Refusing misuse where it happens, with a word on what to do instead."""

from typing import Final

_LONGEST: Final = 1e9


def check_type(name: str, value: object, kind: type, advice: str = "") -> None:
    """Refuse a value of another type; True and False are no numbers."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name} must be {kind.__name__}, not {value!r:.100}{advice and '; '}{advice}")


def check_number(name: str, value: object, lowest: float, highest: float, advice: str = "") -> None:
    """Refuse what is not a number in a range; nan is in none."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, not {value!r:.100}")
    if not lowest <= value <= highest:
        raise ValueError(f"{name} must be from {lowest:g} to {highest:g}, not {value!r}{advice and '; '}{advice}")


def check_count(name: str, value: object, advice: str = "") -> None:
    """Refuse what is not a whole number above 0."""
    check_type(name, value, int)
    check_number(name, value, 1, _LONGEST, advice)


def check_seconds(name: str, value: object) -> None:
    """Refuse what is not a number of seconds from 0 to about thirty years."""
    check_number(name, value, 0, _LONGEST, "give seconds")


def check_id(value: object) -> None:
    """Refuse an id that no look-up can ask for."""
    check_type("an id", value, str)
    if not value:
        raise ValueError("an id must not be empty")
