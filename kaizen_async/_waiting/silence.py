"""Since when and why polls have been failing: in `stats()`, and one line in the log when it lasts."""

import logging
from typing import Final

from kaizen_async._waiting.entry import Trouble
from kaizen_async.errors import KaizenError, printable, seconds
from kaizen_async.events import Hook, PollsFailing, PollsRecovered

log = logging.getLogger("kaizen_async")

REPORTED_AFTER: Final = 60.0
"""Seconds for which the polls of a wait have failed when that is reported."""


class Silence:
    """Reports polls that fail, for people.

    Args:
        hook: Called with what is logged, too.

    Attributes:
        since: When the first poll failed after the last one that was answered; None if none has.
        reason: Why the last one failed.
    """

    def __init__(self, hook: Hook | None) -> None:
        self.since: float | None = None
        self.reason: str | None = None
        self._hook = hook
        self._silent = 0
        self._began = 0.0
        self._last: KaizenError | None = None

    def note_failure(self, execution_id: str, trouble: Trouble, error: KaizenError, now: float) -> KaizenError:
        """Note that a poll has failed; report it if that has lasted for too long.

        Returns:
            The error to keep for it: one object for many executions that fail for the same reason.
        """
        if self.since is None:
            self.since = now
        self.reason = error.reason
        facts = printable(execution_id), error.reason
        fields = {"execution_id": facts[0], "error_type": type(error).__name__}
        if not trouble.is_silent and now - trouble.since >= REPORTED_AFTER:
            trouble.is_silent = True
            self._silent += 1
            if self._silent == 1:
                self._began = trouble.since
                lasted = now - trouble.since
                log.warning(
                    "%s: its polls have failed for %s, and the wait continues: %s",
                    facts[0],
                    seconds(lasted),
                    facts[1],
                    extra=fields,
                )
                if self._hook is not None:
                    self._hook(PollsFailing(execution_id, lasted, error.reason))
        log.debug("%s: a poll failed, the wait continues: %s", *facts, extra=fields)
        if type(error) is not type(self._last) or error.reason != getattr(self._last, "reason", None):
            self._last = error
        return self._last or error

    def note_response(self) -> None:
        """Note that a poll was answered."""
        self.since = self.reason = self._last = None

    def end(self, trouble: Trouble | None, now: float) -> None:
        """Note that the trouble with an execution is over, or that nobody waits for it any more."""
        if trouble is not None and trouble.is_silent:
            self._silent -= 1
            if not self._silent:
                lasted = now - self._began
                log.warning("polls are answered again, after %s", seconds(lasted))
                if self._hook is not None:
                    self._hook(PollsRecovered(lasted))
