"""What a failed poll means for a wait: it ends, or the execution is asked for again, and when.

Pure: what is known goes in, a decision comes out. What an error as such says is in `_lookup/verdicts.py`.

- The server, or the way to it, fails or throttles: never an end. The wait continues until its deadline.
- A response that says nothing about the execution (a firewall's 403, a redirect, HTML, a 2xx that is not the record):
  asked again at growing intervals. Only if it lasts does it end the wait.
- The API says that the execution does not exist: an end. After its record was seen, only if it says so repeatedly.
- No request can work as the client is set up (a certificate, say): an end.
"""

import math
from enum import Enum, auto
from http import HTTPStatus
from typing import Final

import msgspec

from kaizen_async._lookup.verdicts import Verdict, is_json_object, verdict
from kaizen_async._waiting.entry import Trouble
from kaizen_async.config import PollPolicy
from kaizen_async.errors import DecodeError, KaizenError, StatusError

LEAST_REFUSALS: Final = 5
"""Responses in a row that say nothing about an execution before they can end its wait."""
LEAST_MISSING: Final = 4
"""Responses in a row that say that an execution does not exist, after its record was seen, before they end its wait."""
CHANCE: Final = 1e-9
"""Chance below which such a row is not taken for an accident."""
MOST_CHANCE: Final = 0.8
"""Greatest chance of an accident that is reckoned with for the refusals of all executions together."""
ALMOST: Final = 0.99
"""Share of the patience after which a response counts as the last one. Else one that is a moment early costs 15 s."""
LONGEST_PAUSE: Final = 15.0
"""Seconds between two questions at most, while it is to be found out whether a response was an accident."""


class Kind(Enum):
    """What a failed poll says."""

    MISSING = auto()
    REFUSED = auto()
    FAILING = auto()
    HOPELESS = auto()


_KINDS: Final = {
    Verdict.NOT_FOUND: Kind.MISSING,
    Verdict.REFUSED: Kind.REFUSED,
    Verdict.UNRELATED: Kind.REFUSED,
    Verdict.UNUSABLE: Kind.HOPELESS,
}


def kind_of(error: KaizenError) -> Kind:
    """Return what a failed poll says."""
    if isinstance(error, DecodeError) and error.body and not is_json_object(error.body):
        return Kind.REFUSED  # HTML with status 200; JSON that breaks off is a fault of the transfer
    return _KINDS.get(verdict(error), Kind.FAILING)


def is_about_id(error: KaizenError) -> bool:
    """Return whether a refusal is most likely about the id in the request: each id deserves a question of its own."""
    return isinstance(error, StatusError) and error.status in {HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY}


class Again(msgspec.Struct, frozen=True, gc=False):
    """The execution is to be asked for again.

    Attributes:
        at_least: Seconds for which the server asked to wait.
        within: Seconds after which to ask, if the policy would wait for longer; None to leave it to the policy.
    """

    at_least: float = 0.0
    within: float | None = None


def judge(
    kind: Kind,
    error: KaizenError,
    trouble: Trouble,
    *,
    seen: bool,
    policy: PollPolicy,
    chance: float,
    refused_again: int = 0,
    now: float,
) -> Again | None:
    """Return when to ask again; None if the wait ends with the error. Counts the failure in `trouble`.

    Args:
        kind: What the error says.
        error: Why the poll failed.
        trouble: What is known of the execution's failed polls.
        seen: Whether its record was received before.
        policy: How patient the wait is.
        chance: The chance that a poll of any execution gets such a response by accident.
        refused_again: Executions of the client that were refused and, asked again, refused again, since one of them got
            a response of the API. Many of these are no accident, even if each execution was asked a few times only.
        now: The clock's time.
    """
    trouble.error = error
    if kind is Kind.HOPELESS:
        return None
    if kind is Kind.FAILING:
        trouble.missing = 0
        return Again(at_least=(isinstance(error, StatusError) and error.retry_after) or 0.0)
    if kind is Kind.MISSING:
        trouble.refusals = 0
        trouble.missing_at = trouble.missing_at if trouble.missing else now
        trouble.missing += 1
        if not seen:
            return None if now - trouble.missing_at >= policy.not_found_grace else Again()
        is_over = (
            trouble.missing >= needed(LEAST_MISSING, chance) and now - trouble.missing_at >= policy.not_found_grace
        )
        return None if is_over else Again(within=pause(trouble.missing))
    trouble.missing = 0
    trouble.refused_at = trouble.refused_at if trouble.refusals else now
    trouble.refusals += 1
    lasted = now - trouble.refused_at >= policy.refusal_patience * ALMOST
    is_no_accident = trouble.refusals >= LEAST_REFUSALS and (
        trouble.refusals >= needed(LEAST_REFUSALS, chance)
        or refused_again >= needed(LEAST_REFUSALS, chance, most=MOST_CHANCE)
    )
    is_confirmed = not policy.refusal_patience or is_no_accident
    return None if lasted and is_confirmed else Again(within=pause(trouble.refusals))


def needed(least: int, chance: float, *, unlikely: float = CHANCE, most: float = 0.5) -> int:
    """Return how many responses in a row are too unlikely to be an accident, if each is one with that chance.

    A chance above `most` counts as `most`. Otherwise no number of responses might be enough.
    """
    return max(least, math.ceil(math.log(unlikely) / math.log(min(max(chance, 1e-6), most))))


def pause(count: int) -> float:
    """Return the seconds before the next poll, after a number of polls with such responses."""
    return min(math.ldexp(1.0, min(count - 1, 10)), LONGEST_PAUSE)
