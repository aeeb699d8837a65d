"""One scheduler for all waits of a client: who is due, and who goes first.

A heap holds the due times of all executions that somebody waits for. An execution costs one entry, however many wait
for it, and no task: a task exists only for a poll that is under way, and those are as many as the client's concurrency.

Entries that are due queue up per call (`Flow`), and the calls take turns. So a wait for one id is polled next even if
another call has 100,000 ids overdue. When polls cannot keep up with the wished pace, every call's polls stretch alike;
`delay` says by how much.

Each policy has its cadence, which learns from every end that it sees, and its own limit of polls per second, kept by
spacing the polls evenly.
"""

import asyncio
import copy
import functools
import heapq
import logging
import math
from collections import OrderedDict, deque
from contextvars import copy_context
from datetime import UTC, datetime
from typing import Any, Final, Protocol

from kaizen_async._lookup.engine import Engine
from kaizen_async._lookup.lookup import Lookups, separate
from kaizen_async._waiting.cadence import Cadence
from kaizen_async.clock import Timer
from kaizen_async.config import RETRIED_STATUSES, PollPolicy
from kaizen_async.errors import (
    ClientClosedError,
    DeadlineExceededError,
    DecodeError,
    KaizenError,
    NotFoundError,
    StatusError,
    printable,
)
from kaizen_async.events import PollShared, RecordEnded
from kaizen_async.outcomes import Found, LookupFailed, Outcome
from kaizen_async.stats import Counters

log = logging.getLogger("kaizen_async")

MOST_GROUPS: Final = 100
"""Kinds and policies from which on those that nobody waits under are forgotten."""
AT_ONCE: Final = 200
"""Entries dealt with in one step of the event loop, so that 100,000 due or given up at once do not block it."""
LAST_POLL_MARGIN: Final = 1.0
"""Seconds before a deadline at which a last poll is made, if the next would come too late."""
CATCH_UP: Final = 0.05
"""Seconds by which polls at a `max_rate` may lag behind their even spacing and still be made up for. The timers of an
event loop are late by about a millisecond, which would make a high rate a good deal lower."""
SERVER_ERRORS: Final = 500
"""From this status on it is the server that failed, which a wait rides out, whatever a look-up would retry: gateways
answer 52x, and others 507 or 529."""
_UNSUPPORTED: Final = frozenset({501, 505})
"""Of those, the ones that it would give to every poll (RFC 9110 section 15.6)."""
LAST_POLLS_RATE: Final = 1000.0
"""Polls per second to which the last ones before a common deadline are spread out, each at random."""
DELAY_WEIGHT: Final = 0.05
"""Weight of the newest poll in the running mean of the delay."""


class Subscriber(Protocol):
    """A call that waits for executions.

    Attributes:
        flow: Where those of its executions that are due queue up.
        deadline_at: When it stops waiting, in the clock's time. From then on nothing is polled for it.
    """

    flow: "Flow"
    deadline_at: float

    def on_change(self, execution_id: str, before: Any, after: Any) -> None:
        """Take note of a record that differs from the one before; `before` is None for the first."""
        ...

    def on_end(self, outcome: Outcome[Any]) -> None:
        """Take the outcome. No call follows it for this id."""
        ...

    def on_crash(self, execution_id: str, error: Exception) -> None:
        """Take an error that is none of a look-up but a fault in a program. No call follows it for this id."""
        ...

    def on_close(self) -> None:
        """Take note that nothing is polled any more; `Scheduler.cut_off` tells the outcome of what is not under way."""
        ...


class Pace:
    """When the next poll under a policy with a `max_rate` may be made."""

    def __init__(self) -> None:
        self.next_poll = -math.inf


class Group:
    """What all waits of one kind under one policy share.

    Attributes:
        turns_left: Polls that it may make before it is the turn of another: one for each of its calls with some due.
    """

    def __init__(self, lookups: Lookups[Any], policy: PollPolicy, cadence: Cadence, pace: Pace) -> None:
        self.lookups = lookups
        self.policy = policy
        self.cadence = cadence
        self.pace = pace
        self.entries: dict[str, Entry] = {}
        self.flows: deque[Flow] = deque()
        self.turns_left = 0


class Flow:
    """The entries of one call that are due, in the order in which they became so.

    Those that were never polled queue apart, and every second turn is theirs: neither do polls that cannot keep up keep
    new ids from their first one, nor does an endless source of new ids keep others from their next.

    Attributes:
        room: Set whenever an entry has left the queue, for whoever adds ids no faster than that.
        context: The context variables of whoever made the call, which its polls inherit: those that a shared timer
            happens to run with belong to anyone.
        cancelled_polls: Polls that were given up; they have yet to end.
    """

    __slots__ = ("_again", "_first", "_first_is_next", "cancelled_polls", "context", "group", "room")

    def __init__(self, group: Group, room: asyncio.Event | None = None) -> None:
        self.group = group
        self.room = room
        self.context = copy_context()
        self.cancelled_polls: list[asyncio.Task[None]] = []
        self._first: deque[Entry] = deque()
        self._again: deque[Entry] = deque()
        self._first_is_next = True

    def __len__(self) -> int:
        return len(self._first) + len(self._again)

    @property
    def unpolled(self) -> int:
        """How many of the entries were never polled."""
        return len(self._first)

    def put(self, entry: "Entry") -> None:
        """Add an entry."""
        (self._first if entry.polled == -math.inf else self._again).append(entry)

    def pop(self) -> "Entry":
        """Remove the entry whose turn it is."""
        queue = self._first if self._first and (self._first_is_next or not self._again) else self._again
        self._first_is_next = queue is self._again
        if self.room is not None:
            self.room.set()
        return queue.popleft()

    def clear(self) -> None:
        """Remove all."""
        self._first.clear()
        self._again.clear()


class Entry:
    """One execution that is waited for.

    It is in one place at a time: scheduled under its `serial`, in its `queue`, or polled by its `task`; or in none,
    when all who wait for it are out of time and about to leave. What queues hold of it beside that is stale.
    """

    __slots__ = (
        "attempts",
        "due",
        "earliest",
        "group",
        "id",
        "last",
        "last_error",
        "not_found_at",
        "polled",
        "queue",
        "serial",
        "since",
        "started",
        "subscribers",
        "task",
    )

    def __init__(self, execution_id: str, group: Group, started: float, now: float) -> None:
        self.id = execution_id
        self.group = group
        self.since = self.due = self.earliest = now
        self.started = started
        self.attempts = 0
        self.last: Any = None
        self.last_error: KaizenError | None = None
        self.not_found_at = math.inf
        self.polled = -math.inf
        self.subscribers: tuple[Subscriber, ...] = ()
        self.serial = 0
        self.queue: Flow | None = None
        self.task: asyncio.Task[None] | None = None


class EndedRecords:
    """The records of executions that have ended, the latest used kept. An ended execution never changes again."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._records: OrderedDict[tuple[object, str], Any] = OrderedDict()

    def get(self, endpoint: object, execution_id: str) -> Any:
        """Return the record, or None."""
        record = self._records.get((endpoint, execution_id))
        if record is not None:
            self._records.move_to_end((endpoint, execution_id))
        return record

    def put(self, endpoint: object, execution_id: str, record: Any) -> None:
        """Keep a record, and forget the one that was not asked for the longest."""
        if self._size:
            self._records[endpoint, execution_id] = record
            if len(self._records) > self._size:
                self._records.popitem(last=False)


class Scheduler:
    """Polls whatever somebody waits for, within one event loop.

    Args:
        engine: Bounds the polls under way.
        ended: Answers for executions known to have ended.
        counters: Of the client.
        deadline: Seconds for one poll.

    Attributes:
        delay: Seconds by which polls come later than they are due, as a running mean.
    """

    def __init__(self, engine: Engine, ended: EndedRecords, counters: Counters, *, deadline: float | None) -> None:
        self.engine = engine
        self.clock = engine.clock
        self.delay = 0.0
        self._ended = ended
        self._counters = counters
        self._deadline = math.inf if deadline is None else deadline
        self._groups: dict[tuple[object, PollPolicy], Group] = {}
        self._turns: deque[Group] = deque()
        # No entry in it, and one tuple for all entries of a call: the garbage collector visits what can refer to others
        # and stops the loop meanwhile, a quarter of a second for a few hundred thousand.
        self._heap: list[tuple[float, int]] = []
        self._scheduled: dict[int, Entry] = {}
        self._newest: tuple[Subscriber, ...] = ()
        self._serial = 0
        self._polls = 0
        self._timer: Timer | None = None
        self._timer_at = math.inf

    @property
    def waiting(self) -> int:
        """Executions that somebody waits for."""
        return sum(len(group.entries) for group in self._groups.values())

    def group(self, lookups: Lookups[Any], policy: PollPolicy, cadence: Cadence) -> Group:
        """Return what waits of that kind and policy share."""
        key = (lookups.endpoint, policy)
        group = self._groups.get(key)
        if group is None:
            self._forget_idle()
            pace = next((other.pace for other in self._groups.values() if other.policy == policy), None) or Pace()
            group = self._groups[key] = Group(lookups, policy, cadence, pace)
        return group

    def _forget_idle(self) -> None:
        """Bound what is kept for policies that nobody waits under any more."""
        if len(self._groups) >= MOST_GROUPS:
            self._groups = {key: group for key, group in self._groups.items() if group.entries}

    def subscribe(self, execution_id: str, subscriber: Subscriber, *, age: float = 0.0, delay: float = 0.0) -> None:
        """Have an execution polled until it has ended.

        Args:
            execution_id: A valid id.
            subscriber: Told what happens; may be told at once.
            age: Seconds that it is known to have been running already.
            delay: Seconds until its first poll.
        """
        group = subscriber.flow.group
        now = self.clock.time()
        if self._answers_at_once(execution_id, subscriber, now):
            return
        entry = group.entries.get(execution_id)
        if entry is not None:
            self._join(entry, subscriber, now)
            return
        entry = group.entries[execution_id] = Entry(execution_id, group, now - age, now)
        if subscriber not in self._newest:
            self._newest = (subscriber,)
        entry.subscribers = self._newest
        if delay > 0:
            self._schedule(entry, now + delay)
        else:
            self._queue(entry, now)
            self._arm(now)

    def unsubscribe(self, execution_id: str, subscriber: Subscriber) -> None:
        """Stop telling a subscriber. Without others the polls stop; one under way is cancelled."""
        flow = subscriber.flow
        entry = flow.group.entries.get(execution_id)
        if entry is None or subscriber not in entry.subscribers:
            return
        place = entry.subscribers.index(subscriber)
        entry.subscribers = entry.subscribers[:place] + entry.subscribers[place + 1 :]
        if entry.subscribers:
            return
        del flow.group.entries[execution_id]
        entry.queue = None
        self._unschedule(entry)
        if entry.task is not None:
            entry.task.cancel()
            flow.cancelled_polls.append(entry.task)
        self._rest()

    def cut_off(self, execution_id: str, subscriber: Subscriber) -> Outcome[Any]:
        """Stop telling a subscriber of an execution that has not ended, and return the outcome that says why."""
        entry = subscriber.flow.group.entries[execution_id]
        outcome = self._failed(entry, self._unfinished(entry))
        self.unsubscribe(execution_id, subscriber)
        return outcome

    def is_polling(self, group: Group, execution_id: str) -> bool:
        """Whether a poll of an execution that is waited for is under way."""
        return group.entries[execution_id].task is not None

    def spread(self, group: Group, age: float) -> float:
        """Return a delay within which polls that fell due together can be spread."""
        return self.clock.random.uniform(0.0, group.cadence.next_delay(age, None))

    def due_in(self, group: Group, execution_id: str) -> tuple[float, float]:
        """Return a waited-for execution's age and the time until its next poll, in seconds, for a checkpoint."""
        now = self.clock.time()
        entry = group.entries[execution_id]
        return now - entry.started, max(0.0, entry.due - now)

    def close(self) -> None:
        """Poll no more. Waits end with ClientClosedError, those whose poll is under way when it ends."""
        self._disarm()
        entries = (entry for group in self._groups.values() for entry in group.entries.values())
        for subscriber in dict.fromkeys(subscriber for entry in entries for subscriber in entry.subscribers):
            subscriber.on_close()

    def _answers_at_once(self, execution_id: str, subscriber: Subscriber, now: float) -> bool:
        """Tell a subscriber the outcome if that takes no poll; return whether it did."""
        if self.engine.closed:
            closed = ClientClosedError("the client is closed; create a new KaizenClient", execution_id=execution_id)
            subscriber.on_end(LookupFailed(execution_id, None, closed, 0, 0.0))
            return True
        record = self._ended.get(subscriber.flow.group.lookups.endpoint, execution_id)
        if record is not None:
            subscriber.on_change(execution_id, None, record)
            subscriber.on_end(Found(execution_id, record, None, 0, 0.0))
            return True
        if subscriber.deadline_at <= now:
            late = DeadlineExceededError("the deadline passed before a poll could be made", execution_id=execution_id)
            subscriber.on_end(LookupFailed(execution_id, None, late, 0, 0.0))
            return True
        return False

    def _join(self, entry: Entry, subscriber: Subscriber, now: float) -> None:
        """Have a subscriber share the polls of an entry, which may make the next one come sooner."""
        entry.subscribers += (subscriber,)
        if entry.last is not None:
            subscriber.on_change(entry.id, None, entry.last)
        if entry.task is not None:
            return
        if entry.serial:
            due = max(now, self._in_time(entry, (subscriber,), entry.due))
            if due < entry.due:
                self._schedule(entry, due)
            return
        if entry.queue is None:
            entry.due = now
        self._queue(entry, now)
        self._arm(now)

    def _in_time(self, entry: Entry, subscribers: tuple[Subscriber, ...], due: float) -> float:
        """Return when to poll: then, or sooner if that were too late for a last poll before a subscriber's deadline.

        Of many that end with one deadline, each has its own last moment, lest all be polled in the same.
        """
        for subscriber in subscribers:
            ends = subscriber.deadline_at - LAST_POLL_MARGIN
            begins = ends - len(entry.group.entries) // AT_ONCE * AT_ONCE / LAST_POLLS_RATE
            if due > ends and entry.polled < begins:
                last_chance = max(self.clock.random.uniform(begins, ends), entry.earliest)
                if last_chance < min(due, subscriber.deadline_at):
                    due = last_chance
        return due

    def _schedule(self, entry: Entry, due: float) -> None:
        self._unschedule(entry)
        due = self._in_time(entry, entry.subscribers, due)
        self._serial += 1
        entry.due, entry.serial = due, self._serial
        self._scheduled[self._serial] = entry
        heapq.heappush(self._heap, (due, self._serial))
        self._arm(due)

    def _unschedule(self, entry: Entry) -> None:
        if entry.serial:
            del self._scheduled[entry.serial]
            entry.serial = 0
            self._sweep()

    def _sweep(self) -> None:
        """Free the heap of what is stale if that is most of it."""
        if len(self._heap) > 2 * len(self._scheduled):
            self._heap = [item for item in self._heap if item[1] in self._scheduled]
            heapq.heapify(self._heap)

    def _rest(self) -> None:
        """If nobody waits any more, keep nothing that is stale, and no timer for it."""
        if not self.waiting:
            self._disarm()
            self.delay = 0.0
            self._heap.clear()
            self._newest = ()
            self._turns.clear()
            for group in self._groups.values():
                for flow in group.flows:
                    flow.clear()
                group.flows.clear()

    def _arm(self, when: float) -> None:
        if when < self._timer_at:
            self._disarm()
            self._timer_at = when
            self._timer = self.clock.call_at(when, self._run)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_at = None, math.inf

    def _run(self) -> None:
        """Start what is due, and set the timer for what is next."""
        self._disarm()
        now = self.clock.time()
        self._queue_due(now)
        self._arm(self._serve(now))
        if self._heap:
            self._arm(max(now, self._heap[0][0]))

    def _queue_due(self, now: float) -> None:
        for _ in range(AT_ONCE):
            if not self._heap or self._heap[0][0] > now:
                break
            entry = self._scheduled.pop(heapq.heappop(self._heap)[1], None)
            if entry is not None:
                entry.serial = 0
                self._queue(entry, now)
        self._sweep()

    def _queue(self, entry: Entry, now: float) -> None:
        """Put an entry that is due behind the others of whichever call that waits for it has the fewest."""
        flows = [subscriber.flow for subscriber in entry.subscribers if subscriber.deadline_at > now]
        flow = min(flows, key=len, default=None)
        if flow is None or flow is entry.queue:
            return
        group = flow.group
        if not flow:
            if not group.flows:
                self._turns.append(group)
            group.flows.append(flow)
        entry.queue = flow
        flow.put(entry)

    def _serve(self, now: float) -> float:
        """Start polls while there are slots; return when to go on, unless the end of a poll comes first."""
        resumes = math.inf
        held: list[Group] = []
        for _ in range(AT_ONCE):
            if self.engine.closed or not self._turns or self._polls >= self.engine.concurrency:
                break
            group = self._turns.popleft()
            if group.pace.next_poll > now:
                resumes = min(resumes, group.pace.next_poll)
                held.append(group)
                continue
            group.turns_left = (group.turns_left or len(group.flows)) - 1
            entry = self._next(group)
            if group.flows:
                (self._turns.appendleft if group.turns_left else self._turns.append)(group)
            if entry is not None:
                self._start(entry, now)
        else:
            resumes = now
        self._turns.extend(held)
        return resumes

    def _next(self, group: Group) -> Entry | None:
        """Take an entry of the call whose turn it is; None if nobody waits for that one any more, or not there."""
        flow = group.flows.popleft()
        entry = flow.pop()
        if flow:
            group.flows.append(flow)
        if entry.queue is not flow:
            return None
        entry.queue = None
        return entry

    def _start(self, entry: Entry, now: float) -> None:
        if all(subscriber.deadline_at <= now for subscriber in entry.subscribers):
            return
        group = entry.group
        if group.policy.max_rate is not None:
            on_time = now - group.pace.next_poll <= CATCH_UP
            group.pace.next_poll = (group.pace.next_poll if on_time else now) + 1.0 / group.policy.max_rate
        self._polls += 1
        entry.task = asyncio.create_task(self._poll(entry), context=entry.subscribers[0].flow.context.copy())
        entry.task.add_done_callback(functools.partial(self._on_poll_done, entry))

    async def _poll(self, entry: Entry) -> None:
        try:
            outcome = await self._ask(entry)
            entry.task = None
            self._judge(entry, outcome)
        except Exception as error:  # noqa: BLE001 - what hooks of a session or record raise is for those who wait
            self._crash(entry, error)

    def _on_poll_done(self, entry: Entry, task: asyncio.Task[None]) -> None:
        # Not a `finally` of the poll: of a task that is cancelled before its first step nothing runs.
        if entry.task is task:
            entry.task = None
        self._polls -= 1
        self._counters.polls += 1
        if not task.cancelled():
            self._arm(self._serve(self.clock.time()))
        elif entry.subscribers:
            # None of them did it. Whoever ends a program cancels all tasks, and no new ones should come of that.
            self._schedule_next(entry)
        else:
            self._arm(self.clock.time())

    async def _ask(self, entry: Entry) -> Outcome[Any]:
        lookups = entry.group.lookups
        record = self._ended.get(lookups.endpoint, entry.id)
        if record is not None:
            return Found(entry.id, record, None, 0, 0.0)
        deadline_at = self.clock.time() + self._deadline
        return await lookups.look_up(entry.id, deadline_at, functools.partial(self._note_delay, entry.due))

    def _note_delay(self, due: float) -> None:
        """Note when a poll is sent: slots, gate and limiter have let it pass."""
        self.delay += DELAY_WEIGHT * (self.clock.time() - due - self.delay)

    def _judge(self, entry: Entry, outcome: Outcome[Any]) -> None:
        entry.attempts += outcome.attempts
        error = outcome.error
        if not entry.subscribers:
            return
        if error is None:
            self._note_record(entry, outcome.execution)
        elif self._is_final(entry, error):
            self._end(entry, self._failed(entry, error))
        else:
            fields = {"execution_id": printable(entry.id), "error_type": type(error).__name__}
            log.debug("%s: a poll failed, the wait continues: %s", printable(entry.id), error.reason, extra=fields)
            entry.last_error = _slimmed(error)
            asked = error.retry_after if isinstance(error, StatusError) else None
            self._schedule_next(entry, at_least=asked or 0.0)

    def _note_record(self, entry: Entry, record: Any) -> None:
        before = entry.last
        entry.not_found_at = math.inf
        entry.last_error = None
        if before is None or record != before:
            entry.last = record
            entry.started = self._started(entry, record)
            for subscriber in entry.subscribers:
                subscriber.on_change(entry.id, before, record)
        if not has_ended(record):
            self._schedule_next(entry)
            return
        workflow_id, duration = workflow_of(record), duration_of(record)
        if workflow_id is not None and duration is not None:
            entry.group.cadence.learn(workflow_id, duration)
        outcome = Found(entry.id, record, None, entry.attempts, self.clock.time() - entry.since)
        lookups = entry.group.lookups
        if self._ended.get(lookups.endpoint, entry.id) is not record:
            self._ended.put(lookups.endpoint, entry.id, record)
            if self.engine.on_event is not None:
                self.engine.on_event(RecordEnded(entry.id, lookups.url, outcome))
        self._end(entry, outcome)

    def _is_final(self, entry: Entry, error: KaizenError) -> bool:
        """Whether an error ends the wait. A poll that fails is no execution that fails, unless it always would."""
        if isinstance(error, NotFoundError):
            now = self.clock.time()
            entry.not_found_at = min(entry.not_found_at, now)
            return now - entry.not_found_at >= entry.group.policy.not_found_grace
        entry.not_found_at = math.inf
        if isinstance(error, StatusError) and (error.status in RETRIED_STATUSES or error.status >= SERVER_ERRORS):
            return error.status in _UNSUPPORTED
        return not error.retryable and not isinstance(error, DeadlineExceededError)

    def _unfinished(self, entry: Entry) -> KaizenError:
        """Return the error for a wait that is over before the execution is."""
        failure = entry.last_error
        polled = "" if failure is None else f"; its last poll failed: {failure.reason}"
        error: KaizenError
        if self.engine.closed:
            error = ClientClosedError(f"the client was closed during the wait{polled}")
        else:
            error = DeadlineExceededError(
                f"it had not ended when the deadline passed{polled}", last_execution=entry.last
            )
        error.__cause__ = failure
        return error

    def _failed(self, entry: Entry, error: KaizenError) -> Outcome[Any]:
        error.execution_id = entry.id
        error.attempts = entry.attempts
        return LookupFailed(entry.id, None, error, entry.attempts, self.clock.time() - entry.since)

    def _end(self, entry: Entry, outcome: Outcome[Any]) -> None:
        hook, url = self.engine.on_event, entry.group.lookups.url
        for index, subscriber in enumerate(self._forget(entry)):
            if index and hook is not None:
                subscriber.flow.context.run(hook, PollShared(entry.id, url, copy_context()))
            subscriber.on_end(separate(outcome) if index else outcome)

    def _crash(self, entry: Entry, error: Exception) -> None:
        for subscriber in self._forget(entry):
            subscriber.on_crash(entry.id, error)

    def _forget(self, entry: Entry) -> tuple[Subscriber, ...]:
        """Remove an entry whose poll is over, and return who must be told."""
        subscribers, entry.subscribers = entry.subscribers, ()
        if subscribers:
            del entry.group.entries[entry.id]
            self._rest()
        return subscribers

    def _schedule_next(self, entry: Entry, *, at_least: float = 0.0) -> None:
        if self.engine.closed:
            self._end(entry, self._failed(entry, self._unfinished(entry)))
            return
        group = entry.group
        now = self.clock.time()
        delay = group.cadence.next_delay(now - entry.started, workflow_of(entry.last))
        entry.polled = now
        entry.earliest = now + max(group.policy.min_interval, at_least)
        self._schedule(entry, now + max(delay, at_least))

    def _started(self, entry: Entry, record: Any) -> float:
        """Return when an execution started, in the clock's time, by its own word if it gives one."""
        start_time = getattr(record, "start_time", None)
        if not isinstance(start_time, datetime):
            return entry.started
        return self.clock.time() - max(0.0, self.clock.wall() - _timestamp(start_time))


def _slimmed(error: KaizenError) -> KaizenError:
    """Return an error without what it is about in full: in an outage, one is kept for each of 100,000 ids."""
    error = copy.copy(error)  # others may share it: who looks the same id up, and asked for all of it
    if isinstance(error, StatusError | DecodeError):
        error.body = b""
    return error


def require_end(record: type) -> None:
    """Refuse to wait for records that do not tell whether an execution has ended.

    Raises:
        TypeError: The type has neither `end_time` nor a property `is_finished`.
    """
    finished = getattr(record, "is_finished", None)
    if callable(finished) or (finished is None and not hasattr(record, "end_time")):
        raise TypeError(
            f"waiting takes records that tell when the execution ended: give {record.__name__} a field `end_time` "
            "that is None until then, or a property `is_finished`"
        )


def has_ended(record: Any) -> bool:
    """Return whether a record says that its execution has ended."""
    finished: bool | None = getattr(record, "is_finished", None)
    return record.end_time is not None if finished is None else finished


def workflow_of(record: Any) -> str | None:
    """Return the id of a record's workflow, if it names one."""
    workflow_id = getattr(getattr(record, "workflow", None), "id", None)
    return workflow_id if isinstance(workflow_id, str) else None


def duration_of(record: Any) -> float | None:
    """Return the seconds that an ended execution took, if its record tells."""
    milliseconds = getattr(record, "duration_ms", None)
    if isinstance(milliseconds, (int, float)):
        return milliseconds / 1000
    start_time, end_time = getattr(record, "start_time", None), getattr(record, "end_time", None)
    if isinstance(start_time, datetime) and isinstance(end_time, datetime):
        return _timestamp(end_time) - _timestamp(start_time)
    return None


def _timestamp(moment: datetime) -> float:
    """Return seconds since the epoch; a record's time that names no zone is taken for UTC."""
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
