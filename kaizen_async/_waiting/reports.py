"""The events of one call that waits."""

from typing import Any

from kaizen_async._waiting.calls import Call
from kaizen_async._waiting.scheduler import Scheduler
from kaizen_async.errors import KaizenError
from kaizen_async.events import RecordFailed, Verb, WaitEnded, WaitStarted
from kaizen_async.outcomes import Outcome


class Report:
    """Reports the start of a call when it is made, and its end, in the context that the call's polls inherit."""

    def __init__(self, scheduler: Scheduler, call: Call, verb: Verb, execution_id: str | None = None) -> None:
        self._hook = scheduler.engine.on_event
        self._now = scheduler.clock.time
        self._call = call
        self._facts = (verb, call.group.lookups.url, execution_id)
        self._started = 0.0
        if self._hook is not None:
            self._started = self._now()
            call.context.run(self._hook, WaitStarted(*self._facts))

    def failed(self, outcome: Outcome[Any]) -> None:
        """Tell that the call ends for one id, if that is with an error."""
        if self._hook is not None and outcome.error is not None:
            _, url, _ = self._facts
            self._call.context.run(self._hook, RecordFailed(outcome.id, url, outcome))

    def end(self, error: KaizenError | None = None, *, cancelled: bool) -> None:
        """Tell the end."""
        if self._hook is not None:
            elapsed = self._now() - self._started
            self._call.context.run(self._hook, WaitEnded(*self._facts, elapsed, error, cancelled))
