"""`wait`: one caller who waits for one execution."""

import asyncio
from typing import Generic, TypeVar, cast

from kaizen_async._streams import all_done
from kaizen_async._waiting.calls import Call, Group, Report
from kaizen_async._waiting.scheduler import Scheduler
from kaizen_async.outcomes import AnyOutcome, Outcome

T = TypeVar("T")


class Waiter(Generic[T]):
    """One `wait`."""

    def __init__(self, scheduler: Scheduler, group: Group, execution_id: str, deadline_at: float) -> None:
        self._scheduler = scheduler
        self._id = execution_id
        self._future: asyncio.Future[Outcome[T] | Exception] = scheduler.engine.loop.create_future()
        self._call = Call(
            group,
            deadline_at,
            on_change=lambda _id, _before, _after: None,
            on_end=self._finish,
            on_crash=lambda _, error: self._finish(error),
            on_over=self._on_over,
            poll_all=self._poll_all,
            on_room=lambda: None,
        )

    async def wait(self) -> Outcome[T]:
        """Return how the execution ended, or the error that ended the wait."""
        scheduler, call = self._scheduler, self._call
        report = Report(call, "wait", self._id)
        scheduler.open(call)
        try:
            scheduler.subscribe(call, self._id)
            await self._future
        finally:
            result = self._future.result() if self._future.done() and not self._future.cancelled() else None
            if isinstance(result, AnyOutcome):
                report.end(result.error, cancelled=False)
            else:
                report.end(cancelled=True)
            scheduler.end_timer(call)
            scheduler.unsubscribe(call, self._id)
            scheduler.close_call(call)
            await all_done(call.cancelled_polls)
        if isinstance(result, Exception):
            raise result
        return cast("Outcome[T]", result)

    def _on_over(self) -> None:
        """End the wait. A poll that is in flight when the client is closed may still show the end."""
        is_polling = not self._future.done() and self._scheduler.is_polling(self._call, self._id)
        if not self._future.done() and (self._call.is_over or not is_polling):
            self._finish(self._scheduler.cut_off(self._call, self._id))

    def _poll_all(self) -> int:
        if self._future.done():
            return 0
        self._scheduler.poll_soon(self._call, self._id)
        return 1

    def _finish(self, result: Outcome[T] | Exception) -> None:
        if not self._future.done():
            self._future.set_result(result)
