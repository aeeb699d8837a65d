"""Many lookups: a bounded number of workers share the ids. There is no task and no future for each id."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import copy_context
from types import TracebackType
from typing import Any, Final, Generic, TypeAlias, TypeVar

from kaizen_async._ids import IdSource, InvalidId, checked
from kaizen_async._ledger import Ledger
from kaizen_async._streams import AccountedStream
from kaizen_async.events import BatchEnded, BatchStarted, BatchVerb, Hook
from kaizen_async.outcomes import LookupFailed, Outcome

T = TypeVar("T")

OnBackOff: TypeAlias = Callable[[bool], None]
"""Called with True when a lookup begins to wait for its next attempt, and with False when that wait has ended."""
LookUp: TypeAlias = Callable[[str, OnBackOff], Awaitable[Outcome[T]]]

READ_AHEAD: Final = 16
"""Outcomes that may wait for a slow consumer of a stream, beside the lookups in flight; or one for each worker, if
these are more. So even if all lookups end in one step, no worker stands still for a consumer that keeps up."""

MOST_IN_BACK_OFF: Final = 50
"""Lookups in back-off for each worker, at most, so that the memory of a call stays bounded. A server that takes 10,000
requests per second and rejects one in five for a second keeps 2,000 waiting."""


def refused(invalid: InvalidId) -> Outcome[Any]:
    """Return the outcome of an id that cannot be sent."""
    return LookupFailed(invalid.id, None, invalid.error, 0, 0.0)


async def collect_ids(source: IdSource) -> list[str | InvalidId]:
    """Return all ids of a source, or raise the error in it."""
    collection = source.take_all()
    if collection is not None:
        return collection
    ids: list[str | InvalidId] = []
    while (execution_id := await source.take()) is not None:
        ids.append(execution_id)
    if source.error is not None:
        raise source.error
    return ids


class Report:
    """Reports one call of `get_many` or `stream` to `on_event`.

    Its lookups run in copies of `context`, so that their events belong to this call. The caller's own code does not run
    in it.
    """

    def __init__(self, hook: Hook | None, now: Callable[[], float], verb: BatchVerb, url: str) -> None:
        self.context = copy_context()
        self._hook = hook
        self._now = now
        self._facts = (verb, url)
        self._started = now()
        self._succeeded = self._failed = 0
        if hook is not None:
            self.context.run(hook, BatchStarted(verb, url))

    def count(self, outcome: Outcome[Any]) -> None:
        """Count an outcome."""
        if outcome.error is None:
            self._succeeded += 1
        else:
            self._failed += 1

    def end(self, *, cancelled: bool) -> None:
        """Report the end of the call."""
        if self._hook is not None:
            elapsed = self._now() - self._started
            self.context.run(self._hook, BatchEnded(*self._facts, elapsed, self._succeeded, self._failed, cancelled))


class Crew:
    """The workers of one call. While a lookup waits for its next attempt, another worker takes the place of its own.

    Args:
        places: Workers whose lookups are not in back-off.
        start: Starts a worker.

    Attributes:
        is_too_large: Whether a worker without a lookup must leave: back-offs have ended, or there is no other id.
    """

    def __init__(self, places: int, start: Callable[[], object]) -> None:
        self._places = places
        self._most = places * (1 + MOST_IN_BACK_OFF)
        self._start = start
        self._size = self._in_back_off = 0
        self.is_too_large = False

    def fill(self) -> None:
        """Start workers for all free places."""
        while self._size - self._in_back_off < self._places and self._size < self._most:
            self._size += 1
            self._start()
        self.is_too_large = self._size - self._in_back_off > self._places

    def leave(self) -> None:
        """Note that a worker ends."""
        self._size -= 1
        self.is_too_large = self._size - self._in_back_off > self._places

    def close(self) -> None:
        """Start no further worker: there is no other id, or the call is over.

        The owner is let go of. It holds the crew, and in a cycle all its outcomes would be freed by the collector only.
        """
        self._places = 0
        self._start = object
        self.is_too_large = True

    def on_back_off(self, begins: bool) -> None:  # noqa: FBT001 - a callback with one argument
        """Note that a lookup begins or ends to wait for its next attempt."""
        self._in_back_off += 1 if begins else -1
        self.fill()


async def look_up_all(
    ids: Sequence[str | InvalidId], look_up: LookUp[T], workers: int, report: Report
) -> list[Outcome[T]]:
    """Return the outcomes of all ids, in their order. Equal ids share one lookup."""
    outcomes: dict[str, Outcome[T]] = {}
    todo = deque(dict.fromkeys(each for each in ids if isinstance(each, str)))

    async def work() -> None:
        on_back_off = crew.on_back_off
        while todo and not crew.is_too_large:
            execution_id = todo.popleft()
            outcome = outcomes[execution_id] = await look_up(execution_id, on_back_off)
            if not outcome.attempts:
                await asyncio.sleep(0)  # nothing was sent, so nothing was awaited: give other tasks a turn
        if not todo:
            crew.close()
        crew.leave()

    cancelled = True
    group = asyncio.TaskGroup()
    crew = Crew(min(workers, len(todo)), lambda: group.create_task(work(), context=report.context.copy()))
    try:
        async with group:
            crew.fill()
        cancelled = False
    except BaseExceptionGroup as crash:
        # What a hook of the caller's session or record raised is raised as `get` raises it, not in a group.
        raise crash.exceptions[0] from None
    finally:
        crew.close()
        for outcome in outcomes.values():
            report.count(outcome)
        report.end(cancelled=cancelled)
    return [refused(each) if isinstance(each, InvalidId) else outcomes[each] for each in ids]


class Room:
    """Places for the outcomes of a stream: those of lookups in flight, and those that wait for the consumer.

    It is a semaphore that costs next to nothing while there are free places.

    Args:
        places: How many there are.
    """

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiters: deque[asyncio.Future[None]] = deque()

    def take_now(self) -> bool:
        """Take a place; return False if none is free."""
        if not self._free:
            return False
        self._free -= 1
        return True

    async def take(self) -> None:
        """Wait for a place, and take it."""
        if self.take_now():
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled():
                self.give_back()  # the place that came in the same moment
            raise

    def give_back(self) -> None:
        """Give a place back; the worker that has waited longest gets it."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        self._free += 1


class OutcomeStream(AccountedStream[Outcome[T]], Generic[T]):
    """Outcomes in the order in which lookups end. Use it as `async with … as outcomes: async for outcome in outcomes`.

    The stream takes ids from their source only as fast as outcomes are consumed. So memory stays bounded, and a slow
    consumer slows the requests. Leaving the `async with` block stops everything that is in flight. If the source
    raises, the loop raises that exception after the outcomes of the ids before. An invalid id gets an outcome with an
    `InvalidIdError`.
    """

    def __init__(
        self,
        ledger: Ledger,
        look_up: LookUp[T],
        workers: int,
        wall: Callable[[], float],
        begin_report: Callable[[], Report],
    ) -> None:
        super().__init__(ledger)
        self._begin_report = begin_report
        self._report: Report | None = None
        self._look_up = look_up
        self._crew = Crew(workers, self._start_worker)
        self._wall = wall
        self._room = Room(workers + max(READ_AHEAD, workers))

    def checkpoint(self) -> dict[str, Any]:
        """Return a checkpoint, from which a later `stream(checkpoint=…)` resumes in this process or another.

        It holds the ids whose outcome the consumer does not have yet, and the rest of a collection, as plain dicts,
        lists, strings and numbers. Store it after you have handled an outcome. Each id is then handled once, or again
        if the process dies before the next checkpoint is stored. The time that this takes grows with the number of ids
        in the checkpoint. You may call it after leaving the block, too.

        The checkpoint does not hold ids that a generator or asynchronous source has not yielded yet. Its field `taken`
        counts the ids of the source that are accounted for, so pass the rest of the same source to the later call:
        `itertools.islice(ids, state["taken"], None)`.
        """
        ready = (outcome.id for outcome in self._ready)
        return self._ledger.checkpoint(self._ledger.unfinished(), ready, now=self._wall()).plain()

    def _start(self) -> None:
        self._report = self._begin_report()
        self._crew.fill()

    def _start_worker(self) -> None:
        assert self._report is not None  # noqa: S101 - workers start with the stream
        self._run(self._work(self._report), self._report.context.copy())

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        is_over = self._is_over() and not self._ready
        try:
            await super().__aexit__(exc_type, exc, traceback)
        finally:
            self._crew.close()
            if self._report is not None:
                self._report.end(cancelled=not is_over)

    def _take(self) -> Any:
        self._room.give_back()
        self._ledger.done += 1
        return self._ready.popleft()

    async def _work(self, report: Report) -> None:
        ledger, source, room, crew = self._ledger, self._ledger.source, self._room, self._crew
        has_room = True

        def on_back_off(begins: bool) -> None:  # noqa: FBT001 - a callback with one argument
            nonlocal has_room
            if has_room:
                room.give_back()
                has_room = False
            crew.on_back_off(begins)

        try:
            while not crew.is_too_large:
                if not room.take_now():
                    await room.take()
                has_room = True
                must_wait = source.must_wait and not ledger.resumed
                execution_id = await source.take() if must_wait else self._next_id()
                if execution_id is None:
                    room.give_back()
                    crew.close()
                    break
                if isinstance(execution_id, InvalidId):
                    self._put(refused(execution_id))
                    continue
                ledger.begin(execution_id)
                # In back-off a lookup leaves its room to another id, and its outcome takes room again.
                outcome = await self._look_up(execution_id, on_back_off)
                if not outcome.attempts:
                    await asyncio.sleep(0)  # as in `look_up_all`
                if not has_room:
                    await room.take()
                ledger.end_one(execution_id)
                report.count(outcome)
                self._put(outcome)
        except Exception as crash:
            # The id of this worker has no outcome. Without this, an endless source would hide that for ever.
            source.fail(crash)
            raise
        crew.leave()
        self._fail(source.error)

    def _next_id(self) -> str | InvalidId | None:
        """Return the next id of the checkpoint, or of a source that need not be waited for."""
        ledger = self._ledger
        return checked(ledger.resume(1).id) if ledger.resumed else ledger.source.take_now()
