"""Refuses misuse where it happens, and says what to do instead."""

from datetime import datetime
from typing import Final

LONGEST: Final = 1e9
LATEST: Final = 1e10
"""Seconds of a clock at most, which are more than those since 1970."""
MOST_ID_CHARACTERS: Final = 512
_FIRST_YEAR: Final = 1000
_LAST_YEAR: Final = 9000


def check_type(name: str, value: object, kind: type, advice: str = "") -> None:
    """Refuse a value of another type; True and False are not numbers."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name} must be {kind.__name__}, not {value!r:.100}{advice and '; '}{advice}")


def check_number(name: str, value: object, lowest: float, highest: float, advice: str = "") -> None:
    """Refuse what is not a number in a range; nan is not in any."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, not {value!r:.100}")
    if not lowest <= value <= highest:
        raise ValueError(f"{name} must be from {lowest:g} to {highest:g}, not {value!r}{advice and '; '}{advice}")


def check_count(name: str, value: object, advice: str = "") -> None:
    """Refuse what is not a whole number above 0."""
    check_type(name, value, int)
    check_number(name, value, 1, LONGEST, advice)


def check_seconds(name: str, value: object) -> None:
    """Refuse what is not a number of seconds from 0 to about thirty years."""
    check_number(name, value, 0, LONGEST, "give seconds")


def check_id(value: object) -> None:
    """Refuse an id that no lookup can ask for."""
    check_type("an id", value, str)
    if not value:
        raise ValueError("an id must not be empty")
    if len(str(value)) > MOST_ID_CHARACTERS:
        raise ValueError(f"an id must have at most {MOST_ID_CHARACTERS} characters, not {len(str(value))}")


def check_epoch(epoch: object) -> None:
    """Refuse what is not a date and time with a time zone; None is the present."""
    if epoch is None:
        return
    if not isinstance(epoch, datetime):
        raise TypeError(f"epoch must be a datetime such as datetime(2026, 1, 1, tzinfo=UTC), not {epoch!r:.100}")
    if epoch.tzinfo is None:
        raise ValueError("epoch must carry a time zone: datetime(2026, 1, 1, tzinfo=UTC)")
    if not _FIRST_YEAR <= epoch.year <= _LAST_YEAR:
        raise ValueError(f"epoch must be in one of the years {_FIRST_YEAR} to {_LAST_YEAR}, not {epoch.isoformat()}")
