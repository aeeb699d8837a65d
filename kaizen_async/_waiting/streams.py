"""`wait_many` and `watch`: what a caller holds while the scheduler polls for it."""

import asyncio
import copy
from abc import abstractmethod
from collections import OrderedDict, deque
from itertools import repeat
from types import TracebackType
from typing import Any, ClassVar, Generic, TypeVar

from kaizen_async._bulk import READ_AHEAD, refused
from kaizen_async._ids import InvalidId, checked, require_id
from kaizen_async._ledger import Checkpoint, Ledger, Unfinished
from kaizen_async._streams import AccountedStream, all_done
from kaizen_async._waiting.calls import Call, Group, Report
from kaizen_async._waiting.scheduler import AT_ONCE, Scheduler
from kaizen_async.events import Verb
from kaizen_async.outcomes import Change, Outcome, Seen, WatchFailed

T = TypeVar("T")
R = TypeVar("R")


class PolledStream(AccountedStream[R]):
    """What the streams of ends and of changes have in common: ids go in as they come, and are polled until they end.

    When the deadline passes or the client is closed, an execution that has not ended gets its error when the consumer
    takes it. So 100,000 errors are neither made in one go nor kept for a slow consumer.
    """

    _verb: ClassVar[Verb]

    def __init__(self, scheduler: Scheduler, group: Group, ledger: Ledger, deadline_at: float) -> None:
        super().__init__(ledger)
        self._scheduler = scheduler
        self._room = asyncio.Event()
        self._over: deque[str] = deque()
        self._report: Report | None = None
        self._call = call = Call(
            group,
            deadline_at,
            on_change=self._on_change,
            on_end=self._on_end,
            on_crash=self._on_crash,
            on_over=self._on_over,
            poll_all=self._poll_all,
            on_room=self._room.set,
        )
        ledger.source.late = lambda: call.deadline_at <= scheduler.clock.time()  # not self, which would be a cycle

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

    def _start(self) -> None:
        self._report = Report(self._call, self._verb)
        self._scheduler.open(self._call)
        self._run(self._take_ids())

    def _is_over(self) -> bool:
        return super()._is_over() and not self._ledger.pending

    def _has_result(self) -> bool:
        while self._over and not self._ready:
            self._cut_off(self._over.popleft())
        return super()._has_result()

    def _take(self) -> Any:
        self._room.set()
        return super()._take()

    async def _take_ids(self) -> None:
        """Take ids up no faster than they get their first poll and their results are consumed."""
        source = self._ledger.source
        taken = 0
        while (execution_id := await source.take()) is not None:
            if isinstance(execution_id, InvalidId):
                self._refuse(execution_id)
            else:
                self._begin(execution_id)
            taken += 1
            if not taken % AT_ONCE:
                await asyncio.sleep(0)  # many ids must not block the event loop
            while not self._has_room():
                self._room.clear()
                await self._room.wait()
        self._fail(source.error)

    def _has_room(self) -> bool:
        concurrency = self._scheduler.engine.concurrency
        if len(self._ready) >= concurrency + READ_AHEAD:
            return False
        return self._call.unpolled < concurrency or self._call.is_over or self._scheduler.engine.closed

    def _begin(
        self, execution_id: str, *, count: int = 1, age: float = 0.0, delay: float = 0.0, seen: bool = False
    ) -> None:
        if self._ledger.begin(execution_id, count):
            self._scheduler.subscribe(self._call, execution_id, age=age, delay=delay, seen=seen)

    @abstractmethod
    def _refuse(self, invalid: InvalidId, count: int = 1) -> None:
        """Put the results of an invalid id in."""

    def _on_change(self, execution_id: str, before: Any, after: Any) -> None:
        """Do nothing, unless a subclass wants changes."""

    @abstractmethod
    def _on_end(self, outcome: Outcome[Any]) -> None:
        """Pass the end of an id on."""

    def _report_failure(self, outcome: Outcome[Any]) -> None:
        if self._report is not None:
            self._report.failed(outcome)

    def _on_crash(self, execution_id: str, error: Exception) -> None:
        """Have the error raised once the others have ended. An endless source is stopped, because it would hide it."""
        self._ledger.end(execution_id)
        if not self._ledger.source.has_an_end:
            self._ledger.source.fail(error)
        self._fail(error)
        self._changed.set()

    def _on_over(self) -> None:
        """End the waits, but for those whose poll is in flight when the client is closed: it may still show the end."""
        source = self._ledger.source
        if self._call.refusal is not None and not source.has_an_end:
            source.fail(copy.copy(self._call.refusal))
        if self._call.is_over:
            source.stop()
        self._over = deque(self._ledger.pending)
        self._room.set()
        self._changed.set()

    def _poll_all(self) -> int:
        """Poll every id now; return how many there are."""
        if self._tasks is not None:
            self._run(self._poll_pending())
        return len(self._ledger.pending)

    async def _poll_pending(self) -> None:
        for number, execution_id in enumerate(list(self._ledger.pending)):
            if execution_id in self._ledger.pending:
                self._scheduler.poll_soon(self._call, execution_id)
            if not number % AT_ONCE:
                await asyncio.sleep(0)  # as above

    def _cut_off(self, execution_id: str) -> None:
        if execution_id not in self._ledger.pending:
            return
        if self._call.is_over or not self._scheduler.is_polling(self._call, execution_id):
            self._on_end(self._scheduler.cut_off(self._call, execution_id))

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._report is not None:
            self._report.end(cancelled=bool(self._ledger.pending))
        self._scheduler.end_timer(self._call)
        try:
            await super().__aexit__(exc_type, exc, traceback)
        finally:
            # In a task of its own, so that a cancellation of the caller does not leave half of it behind.
            await all_done([asyncio.create_task(self._leave())])

    async def _leave(self) -> None:
        """Stop the polls that nobody else waits for."""
        scheduler, call, pending = self._scheduler, self._call, self._ledger.pending
        while pending:
            now = scheduler.clock.time()
            for _ in range(min(AT_ONCE, len(pending))):
                execution_id, count = pending.popitem()
                self._on_left(execution_id, count, now)
                scheduler.unsubscribe(call, execution_id)
            await asyncio.sleep(0)  # leaving many ids must not block the event loop
        if self._report is not None:
            self._scheduler.close_call(self._call)
            self._report = None
        await all_done(self._call.cancelled_polls)

    def _on_left(self, execution_id: str, count: int, now: float) -> None:
        """Do nothing, unless a subclass wants to know what was not waited out."""


class WaitStream(PolledStream[Outcome[T]], Generic[T]):
    """Outcomes of executions as these end. Use it as `async with … as outcomes: async for outcome in outcomes`.

    Exactly one for each id, duplicates included; an invalid id gets an outcome with an `InvalidIdError`. An exception
    raised by the source of the ids comes out of the loop once those before have ended. Leaving the block stops the
    polls.
    """

    _verb = "wait_many"

    def __init__(self, scheduler: Scheduler, group: Group, ledger: Ledger, deadline_at: float) -> None:
        super().__init__(scheduler, group, ledger, deadline_at)
        self._unwaited: list[Unfinished] = []
        self._unwaited_at: float | None = None

    def checkpoint(self) -> dict[str, Any]:
        """Return what a later `wait_many(checkpoint=…)` needs to resume from here, in this process or another.

        It holds the ids whose outcome the consumer has not got yet (those of a collection that were not taken yet too),
        their ages, and what was learned about durations: plain dicts, lists, strings and numbers. Store it after
        handling an outcome: each id is then handled once, or again if the process died in between. The time it takes
        grows with the number of ids, so with very many store it now and then. It can be taken after leaving the block,
        too.

        Ids that a generator or asynchronous source has not handed out yet are not in it. The field `taken` tells how
        many ids of the source are accounted for, so pass the rest of the same source to the later call:
        `itertools.islice(ids, state["taken"], None)`.
        """
        return self.left().plain()

    def left(self) -> Checkpoint:
        """Return the checkpoint before it is made plain, which takes long for a million ids."""
        now = self._scheduler.clock.time()
        pending = self._ledger.pending.items()
        return self._ledger.checkpoint(
            [*self._unwaited, *(self._waiting(execution_id, count, now) for execution_id, count in pending)],
            (outcome.id for outcome in self._ready),
            now=self._scheduler.clock.wall() if self._unwaited_at is None else self._unwaited_at,
            learned=self._call.group.cadence.state(),
        )

    def _on_end(self, outcome: Outcome[Any]) -> None:
        """Pass the outcome on, once for each time that the id was taken up."""
        self._report_failure(outcome)
        self._ready.extend(repeat(outcome, self._ledger.end(outcome.id)))
        self._changed.set()

    def _refuse(self, invalid: InvalidId, count: int = 1) -> None:
        self._ready.extend(repeat(refused(invalid), count))
        self._changed.set()

    def _take(self) -> Outcome[T]:
        self._ledger.done += 1
        outcome: Outcome[T] = super()._take()
        return outcome

    def _start(self) -> None:
        super()._start()
        self._run(self._resume())

    async def _resume(self) -> None:
        """Wait for the ids of a checkpoint. Overdue polls are spread as their next ones would be."""
        ledger = self._ledger
        while ledger.resumed:
            entry = ledger.resume()
            execution_id = checked(entry.id)
            if isinstance(execution_id, InvalidId):
                self._refuse(execution_id, entry.count)
            else:
                due_in = entry.due_in
                if entry.age and due_in <= 0:
                    due_in = self._scheduler.spread(self._call.group, entry.age)
                self._begin(execution_id, count=entry.count, age=entry.age, delay=due_in, seen=entry.seen)
            if not len(ledger.resumed) % AT_ONCE:
                await asyncio.sleep(0)  # a large checkpoint must not block the event loop

    def _waiting(self, execution_id: str, count: int, now: float) -> Unfinished:
        return Unfinished(execution_id, count, *self._scheduler.due_in(self._call, execution_id, now))

    def _on_left(self, execution_id: str, count: int, now: float) -> None:
        if self._unwaited_at is None:
            self._unwaited_at = self._scheduler.clock.wall()
        self._unwaited.append(self._waiting(execution_id, count, now))


class ChangeStream(PolledStream[Change[T]], Generic[T]):
    """Changes of executions as they are seen. Use it as `async with … as changes: async for change in changes`.

    The first change of an id has no `before`. If the consumer is slow, changes of one id that wait for it become one,
    or none if they cancel out, so memory stays bounded by the number of ids. Ends when all have ended.
    """

    _verb = "watch"

    def __init__(self, scheduler: Scheduler, group: Group, ledger: Ledger, deadline_at: float) -> None:
        super().__init__(scheduler, group, ledger, deadline_at)
        self._ready: OrderedDict[tuple[object, bool], Change[T]] = OrderedDict()

    def _on_change(self, execution_id: str, before: Any, after: Any) -> None:
        """Put the change in, merged with one of the same id that the consumer has not taken yet."""
        unread = self._ready.get((execution_id, True))
        if unread is not None:
            before = unread.before
        if before == after:
            self._ready.pop((execution_id, True), None)
        else:
            self._put(Seen(execution_id, before, after, None))

    def _on_end(self, outcome: Outcome[Any]) -> None:
        """Put the error in that ended the watch of an id. A record that ended it has come as a change already."""
        self._report_failure(outcome)
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
