"""Waiting for executions to end, and watching them change: what callers hold while the scheduler polls for them."""

import asyncio
import math
from collections import OrderedDict, deque
from collections.abc import Callable
from itertools import repeat
from types import TracebackType
from typing import Any, ClassVar, Generic, TypeVar

from kaizen_async._bulk import READ_AHEAD, refused
from kaizen_async._ids import InvalidId, checked, require_id
from kaizen_async._ledger import Ledger, Unfinished
from kaizen_async._streams import AccountedStream, all_done
from kaizen_async._waiting.polling import AT_ONCE, Flow, Group, Scheduler
from kaizen_async.clock import Timer
from kaizen_async.errors import KaizenError
from kaizen_async.events import RecordFailed, Verb, WaitEnded, WaitStarted
from kaizen_async.outcomes import AnyOutcome, Change, Outcome, Seen, WatchFailed

T = TypeVar("T")
R = TypeVar("R")


class _Told:
    """What the hook is told about one call, in the context that the call's polls inherit."""

    def __init__(self, scheduler: Scheduler, flow: Flow, verb: Verb, execution_id: str | None = None) -> None:
        self._hook = scheduler.engine.on_event
        self._now = scheduler.clock.time
        self._flow = flow
        self._call = (verb, flow.group.lookups.url, execution_id)
        self._started = 0.0

    def start(self) -> None:
        if self._hook is not None:
            self._started = self._now()
            self._flow.context.run(self._hook, WaitStarted(*self._call))

    def failed(self, outcome: Outcome[Any]) -> None:
        if self._hook is not None and outcome.error is not None:
            url = self._flow.group.lookups.url
            self._flow.context.run(self._hook, RecordFailed(outcome.id, url, outcome))

    def end(self, error: KaizenError | None = None, *, cancelled: bool) -> None:
        if self._hook is not None:
            elapsed = self._now() - self._started
            self._flow.context.run(self._hook, WaitEnded(*self._call, elapsed, error, cancelled))


class Waiter(Generic[T]):
    """One caller who waits for one execution."""

    def __init__(self, scheduler: Scheduler, group: Group, execution_id: str, deadline_at: float) -> None:
        self.flow = Flow(group)
        self.deadline_at = deadline_at
        self._scheduler = scheduler
        self._id = execution_id
        self._told = _Told(scheduler, self.flow, "wait", execution_id)
        self._future: asyncio.Future[Outcome[T] | Exception] = scheduler.engine.loop.create_future()

    async def wait(self) -> Outcome[T]:
        """Return how the execution ended, or the error that ended the wait."""
        timer = _call_at(self._scheduler, self.deadline_at, self._cut_off)
        self._told.start()
        try:
            self._scheduler.subscribe(self._id, self)
            result = await self._future
        finally:
            self._tell_of_end()
            if timer is not None:
                timer.cancel()
            self._scheduler.unsubscribe(self._id, self)
            await all_done(self.flow.cancelled_polls)
        if isinstance(result, Exception):
            raise result
        return result

    def _tell_of_end(self) -> None:
        result = self._future.result() if self._future.done() and not self._future.cancelled() else None
        if isinstance(result, AnyOutcome):
            self._told.end(result.error, cancelled=False)
        else:
            self._told.end(cancelled=True)

    def on_change(self, execution_id: str, before: Any, after: Any) -> None:
        """Do nothing: only the end counts."""

    def on_end(self, outcome: Outcome[T]) -> None:
        """Pass the outcome on."""
        self._finish(outcome)

    def on_crash(self, execution_id: str, error: Exception) -> None:  # noqa: ARG002 - there is only one
        """Have it raised."""
        self._finish(error)

    def on_close(self) -> None:
        """End the wait, unless a poll is under way: that may still show the end."""
        if not self._scheduler.is_polling(self.flow.group, self._id):
            self._cut_off()

    def _cut_off(self) -> None:
        if not self._future.done():
            self._finish(self._scheduler.cut_off(self._id, self))

    def _finish(self, result: Outcome[T] | Exception) -> None:
        if not self._future.done():
            self._future.set_result(result)


class PolledStream(AccountedStream[R]):
    """What the streams of ends and of changes have in common: ids go in as they come, and are polled until they end.

    When the deadline passes or the client is closed, an execution that has not ended gets its error when it is taken:
    no 100,000 errors are made in one go, nor kept for a consumer who takes his time.
    """

    _verb: ClassVar[Verb]

    def __init__(self, scheduler: Scheduler, group: Group, ledger: Ledger, deadline_at: float) -> None:
        super().__init__(ledger)
        self._room = asyncio.Event()
        self.flow = Flow(group, self._room)
        self.deadline_at = deadline_at
        self._scheduler = scheduler
        self._cut: deque[str] = deque()
        self._is_late = False
        self._timer: Timer | None = None
        self._told = _Told(scheduler, self.flow, self._verb)

    def add(self, *ids: str) -> None:
        """Wait for more ids. Allowed until the loop over the stream has ended, so in its last turn too.

        Raises:
            RuntimeError: The stream has not been entered, or has ended.
            TypeError, ValueError: An id is invalid. None of them was added.
        """
        if self._tasks is None or self._ended:
            raise RuntimeError("ids can be added from entering the stream until it has ended")
        valid = [require_id(execution_id) for execution_id in ids]
        self._ledger.add(len(valid))
        for execution_id in valid:
            self._begin(execution_id)

    def _start(self) -> list[asyncio.Task[None]]:
        self._told.start()
        self._timer = _call_at(self._scheduler, self.deadline_at, self._expire)
        return [asyncio.create_task(self._take_ids())]

    def _is_over(self) -> bool:
        return super()._is_over() and not self._ledger.pending

    def _has_result(self) -> bool:
        while self._cut and not self._ready:
            self._cut_off(self._cut.popleft())
        return super()._has_result()

    def _take(self) -> Any:
        self._room.set()
        return super()._take()

    async def _take_ids(self) -> None:
        """Take ids in no faster than they get their first poll and their results are consumed."""
        taken = 0
        while (execution_id := await self._ledger.source.take()) is not None:
            if isinstance(execution_id, InvalidId):
                self._refuse(execution_id)
            else:
                self._begin(execution_id)
            taken += 1
            if not taken % AT_ONCE:
                await asyncio.sleep(0)
            while not self._has_room():
                self._room.clear()
                await self._room.wait()
        self._fail(self._ledger.source.error)

    def _has_room(self) -> bool:
        concurrency = self._scheduler.engine.concurrency
        if len(self._ready) >= concurrency + READ_AHEAD:
            return False
        return self.flow.unpolled < concurrency or self._is_late or self._scheduler.engine.closed

    def _refuse(self, invalid: InvalidId, count: int = 1) -> None:
        """Put the results of an invalid id in."""
        raise NotImplementedError

    def _begin(self, execution_id: str, *, count: int = 1, age: float = 0.0, delay: float = 0.0) -> None:
        if self._ledger.begin(execution_id, count):
            self._scheduler.subscribe(execution_id, self, age=age, delay=delay)

    def on_change(self, execution_id: str, before: Any, after: Any) -> None:
        """Do nothing, unless a subclass wants changes."""

    def on_end(self, outcome: Outcome[Any]) -> None:
        """Pass the end of an id on."""
        raise NotImplementedError

    def on_crash(self, execution_id: str, error: Exception) -> None:
        """Have it raised once the others have ended."""
        self._ledger.end(execution_id)
        self._fail(error)
        self._changed.set()

    def on_close(self) -> None:
        """End the waits, but for those whose poll is under way: that may still show the end."""
        self._cut_all_off()

    def _expire(self) -> None:
        self._is_late = True
        self.deadline_at = -math.inf
        self._ledger.source.stop()
        self._cut_all_off()

    def _cut_all_off(self) -> None:
        self._cut = deque(self._ledger.pending)
        self._room.set()
        self._changed.set()

    def _cut_off(self, execution_id: str) -> None:
        if execution_id not in self._ledger.pending:
            return
        if self._is_late or not self._scheduler.is_polling(self.flow.group, execution_id):
            self.on_end(self._scheduler.cut_off(execution_id, self))

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._told.end(cancelled=bool(self._ledger.pending))
        self.deadline_at = -math.inf
        if self._timer is not None:
            self._timer.cancel()
        try:
            await super().__aexit__(exc_type, exc, traceback)
        finally:
            await all_done([asyncio.create_task(self._leave())])

    async def _leave(self) -> None:
        """Stop the polls that nobody else waits for."""
        left = 0
        while self._ledger.pending:
            execution_id, count = self._ledger.pending.popitem()
            self._on_left(execution_id, count)
            self._scheduler.unsubscribe(execution_id, self)
            left += 1
            if not left % AT_ONCE:
                await asyncio.sleep(0)
        await all_done(self.flow.cancelled_polls)

    def _on_left(self, execution_id: str, count: int) -> None:
        """Do nothing, unless a subclass wants to know what was not waited out."""


class WaitStream(PolledStream[Outcome[T]], Generic[T]):
    """Outcomes of executions as these end. Use it as `async with … as outcomes: async for outcome in outcomes`.

    Exactly one for each id taken in, duplicates included. An exception raised by the source of the ids, and the
    TypeError or ValueError of an invalid id, comes out of the loop once those taken in before have ended. Leaving the
    block stops the polls.
    """

    _verb = "wait_many"

    def __init__(self, scheduler: Scheduler, group: Group, ledger: Ledger, deadline_at: float) -> None:
        super().__init__(scheduler, group, ledger, deadline_at)
        self._unwaited: list[Unfinished] = []
        self._unwaited_at: float | None = None

    def on_end(self, outcome: Outcome[Any]) -> None:
        """Pass the outcome on, once for each time that the id was taken up."""
        self._told.failed(outcome)
        self._ready.extend(repeat(outcome, self._ledger.end(outcome.id)))
        self._changed.set()

    def _refuse(self, invalid: InvalidId, count: int = 1) -> None:
        self._ready.extend(repeat(refused(invalid), count))
        self._changed.set()

    def _take(self) -> Outcome[T]:
        self._ledger.done += 1
        outcome: Outcome[T] = super()._take()
        return outcome

    def checkpoint(self) -> dict[str, Any]:
        """Return what a later `wait_many(checkpoint=…)` needs to go on from here, in this process or another.

        It holds the ids whose outcome the consumer has not got yet (those of a collection that were not taken yet too),
        their ages, and what was learned about durations: plain dicts, lists, strings and numbers. Store it after
        handling an outcome: each id is then handled once, or again if the process died in between. The time it takes
        grows with the number of ids, so with very many store it now and then. It can be taken after leaving the block,
        too.

        Ids that a generator or asynchronous source has not handed out yet are not in it. The field `taken` tells how
        many ids of the source are accounted for, so pass the rest of the same source to the later call:
        `itertools.islice(ids, state["taken"], None)`.
        """
        pending = self._ledger.pending.items()
        return self._ledger.checkpoint(
            [*self._unwaited, *(self._waiting(execution_id, count) for execution_id, count in pending)],
            (outcome.id for outcome in self._ready),
            now=self._scheduler.clock.wall() if self._unwaited_at is None else self._unwaited_at,
            learned=self.flow.group.cadence.state(),
        )

    def _start(self) -> list[asyncio.Task[None]]:
        return [*super()._start(), asyncio.create_task(self._resume())]

    async def _resume(self) -> None:
        """Take the ids of a checkpoint in. Polls that fell due meanwhile are spread as their next ones would be."""
        while self._ledger.resumed:
            entry = self._ledger.resume()
            execution_id = checked(entry.id)
            if isinstance(execution_id, InvalidId):
                self._refuse(execution_id, entry.count)
            else:
                due_in = entry.due_in
                if entry.age and due_in <= 0:
                    due_in = self._scheduler.spread(self.flow.group, entry.age)
                self._begin(execution_id, count=entry.count, age=entry.age, delay=due_in)
            if not len(self._ledger.resumed) % AT_ONCE:
                await asyncio.sleep(0)

    def _waiting(self, execution_id: str, count: int) -> Unfinished:
        return Unfinished(execution_id, count, *self._scheduler.due_in(self.flow.group, execution_id))

    def _on_left(self, execution_id: str, count: int) -> None:
        if self._unwaited_at is None:
            self._unwaited_at = self._scheduler.clock.wall()
        self._unwaited.append(self._waiting(execution_id, count))


class ChangeStream(PolledStream[Change[T]], Generic[T]):
    """Changes of executions as they are seen. Use it as `async with … as changes: async for change in changes`.

    The first change of an id has no `before`. If the consumer is slow, changes of one id that wait for it become one,
    or none if they cancel out, so memory stays bounded by the number of ids. Ends when all have ended.
    """

    _verb = "watch"

    def __init__(self, scheduler: Scheduler, group: Group, ledger: Ledger, deadline_at: float) -> None:
        super().__init__(scheduler, group, ledger, deadline_at)
        self._ready: OrderedDict[tuple[object, bool], Change[T]] = OrderedDict()

    def on_change(self, execution_id: str, before: Any, after: Any) -> None:
        """Put the change in, merged with one of the same id that the consumer has not taken yet."""
        unread = self._ready.get((execution_id, True))
        if unread is not None:
            before = unread.before
        if before == after:
            self._ready.pop((execution_id, True), None)
        else:
            self._put(Seen(execution_id, before, after, None))

    def on_end(self, outcome: Outcome[Any]) -> None:
        """Put the error in that ended the watch of an id. A record that ended it has come as a change already."""
        self._told.failed(outcome)
        self._ledger.done += self._ledger.end(outcome.id)
        if outcome.error is not None:
            self._put(WatchFailed(outcome.id, None, None, outcome.error))
        self._changed.set()

    def _refuse(self, invalid: InvalidId, count: int = 1) -> None:
        self._ledger.done += count
        self._ready[object(), False] = WatchFailed(invalid.id, None, None, invalid.error)
        self._changed.set()

    def _put(self, result: Change[T]) -> None:
        self._ready[result.id, result.error is None] = result
        self._changed.set()

    def _take(self) -> Change[T]:
        self._room.set()
        return self._ready.popitem(last=False)[1]


def _call_at(scheduler: Scheduler, when: float, callback: Callable[[], None]) -> Timer | None:
    return None if when == math.inf else scheduler.clock.call_at(when, callback)
