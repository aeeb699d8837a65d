"""What the scheduler knows of one call: `wait`, `wait_many` or `watch`."""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import copy_context
from typing import Any, Final

from kaizen_async._lookup.lookup import Lookups
from kaizen_async._waiting.cadence import Cadence
from kaizen_async._waiting.entry import LOOKED_AT, QUEUED, Entry
from kaizen_async.clock import Timer
from kaizen_async.config import PollPolicy
from kaizen_async.errors import KaizenError
from kaizen_async.events import RecordFailed, Verb, WaitEnded, WaitStarted
from kaizen_async.outcomes import Outcome

BLOCK: Final = 256
"""Entries of a tuple in a queue."""


class Pace:
    """When the next poll under a policy with a `max_rate` may be made.

    Attributes:
        next_poll: The clock's time.
        unsent: Polls that have begun and wait for their turn to send. They would all be sent at the end of a pause.
    """

    def __init__(self) -> None:
        self.next_poll = -math.inf
        self.unsent: set[Entry] = set()


class Group:
    """What all calls for one kind of executions under one policy share.

    Attributes:
        entries: The executions that they wait for.
        polls: The tasks of the polls in flight.
        calls: Their calls that have entries in their queues, in the order of their turns.
        open_calls: How many calls there are.
        turns_left: Polls that it may make before it is the turn of another group: one for each call in `calls`.
    """

    def __init__(self, lookups: Lookups[Any], policy: PollPolicy, cadence: Cadence, pace: Pace) -> None:
        self.lookups = lookups
        self.policy = policy
        self.cadence = cadence
        self.pace = pace
        self.entries: dict[str, Entry] = {}
        self.polls: dict[str, asyncio.Task[None]] = {}
        self.calls: deque[Call] = deque()
        self.open_calls = 0
        self.turns_left = 0


class Queue:
    """Entries that are due, in the order of their turns.

    All but the ends are in tuples. The garbage collector does not visit a tuple of entries, because it does not visit
    entries. In a list or deque it looks at each of them, which takes it 20 ms with a million.
    """

    __slots__ = ("_at", "_blocks", "_head", "_length", "_tail")

    def __init__(self) -> None:
        self._head: Sequence[Entry] = ()
        self._at = 0
        self._blocks: deque[tuple[Entry, ...]] = deque()
        self._tail: list[Entry] = []
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, entry: Entry) -> None:
        """Add an entry at the end."""
        self._tail.append(entry)
        self._length += 1
        if len(self._tail) == BLOCK:
            self._blocks.append(tuple(self._tail))
            self._tail = []

    def first(self) -> Entry:
        """Return the first entry of a queue that is not empty."""
        if self._at == len(self._head):
            self._at = 0
            if self._blocks:
                self._head = self._blocks.popleft()
            else:
                self._head, self._tail = self._tail, []
        return self._head[self._at]

    def popleft(self) -> Entry:
        """Remove and return the first entry of a queue that is not empty."""
        entry = self.first()
        self._at += 1
        self._length -= 1
        return entry


class Call:
    """One call, from its start to its end.

    Of the entries that are due, those that were never polled queue apart, and every second turn is theirs: polls that
    cannot keep up do not keep new ids from their first poll, and an endless source of new ids does not keep others from
    their next.

    Args:
        group: What it shares with other calls.
        deadline_at: When it stops waiting, in the clock's time. From then on nothing is polled for it.
        on_change: Called with an id, the record before (None for the first) and a record that differs from it.
        on_end: Called with the outcome of an id. Nothing follows for this id.
        on_crash: Called with an id and an exception that is not a KaizenError but a fault in a program.
        on_over: Called when nothing more is polled for the call; `Scheduler.cut_off` gives the outcomes.
        poll_all: Called to poll every id of the call now; returns how many there are.
        on_room: Called whenever an entry has left the queue.

    Attributes:
        number: By which entries refer to it.
        alone: The numbers of the calls of an entry that only this call waits for.
        context: The context variables of the caller, which its polls inherit.
        refusal: The error with which all its waits end, if that has been decided.
        has_turns: Whether it is among the calls of its group that take turns.
        cancelled_polls: Polls that were given up and have yet to end.
    """

    def __init__(
        self,
        group: Group,
        deadline_at: float,
        *,
        on_change: Callable[[str, Any, Any], None],
        on_end: Callable[[Outcome[Any]], None],
        on_crash: Callable[[str, Exception], None],
        on_over: Callable[[], None],
        poll_all: Callable[[], int],
        on_room: Callable[[], None],
    ) -> None:
        self.group = group
        self.deadline_at = deadline_at
        self.on_change = on_change
        self.on_end = on_end
        self.on_crash = on_crash
        self.on_over = on_over
        self.poll_all = poll_all
        self.on_room = on_room
        self.number = -1
        self.alone: tuple[int, ...] = ()
        self.context = copy_context()
        self.timer: Timer | None = None
        self.has_thawed = False
        self.refusal: KaizenError | None = None
        self.has_turns = False
        self.cancelled_polls: list[asyncio.Task[None]] = []
        self._first = Queue()
        self._again = Queue()
        self._first_is_next = True

    @property
    def is_over(self) -> bool:
        """Whether nothing is polled for it any more: its deadline has passed, it was refused, or it was left."""
        return self.deadline_at == -math.inf

    @property
    def queued(self) -> int:
        """How many entries are in its queue, stale ones included."""
        return len(self._first) + len(self._again)

    @property
    def unpolled(self) -> int:
        """How many of them were never polled."""
        return len(self._first)

    def put(self, entry: Entry) -> None:
        """Add an entry to the queue."""
        self._queue_of(entry).append(entry)

    def pop(self) -> Entry | None:
        """Remove the entry whose turn it is; return None if it is stale, or there is none."""
        queue = self._first if self._first and (self._first_is_next or not self._again) else self._again
        self._first_is_next = queue is self._again
        self.on_room()
        if not queue:
            return None
        entry = queue.popleft()
        return entry if self._holds(entry) else None

    def skip_stale(self) -> None:
        """Remove stale entries that would be next: they were polled before their turn."""
        for queue in (self._first, self._again):
            while queue and not self._holds(queue.first()):
                queue.popleft()
        self.on_room()

    def drop_stale(self, entry: Entry) -> None:
        """Look at the next entries of a queue in which this one has become stale, and remove what is stale.

        An entry that is not stale goes to the end: it is polled for other calls, because this one gives its entries up.
        """
        queue = self._queue_of(entry)
        for _ in range(min(LOOKED_AT, len(queue))):
            first = queue.popleft()
            if self._holds(first):
                queue.append(first)

    def _queue_of(self, entry: Entry) -> Queue:
        return self._first if entry.polled == -math.inf else self._again

    def _holds(self, entry: Entry) -> bool:
        return entry.place == QUEUED and entry.queue == self.number

    def clear(self) -> None:
        """Remove all."""
        self._first, self._again = Queue(), Queue()

    def detach(self) -> None:
        """Let go of the owner, which holds the call: in a cycle, an error would be freed by the collector only."""
        self.on_change = self.on_crash = _ignore
        self.on_end = self.on_over = self.on_room = _ignore
        self.poll_all = int  # gives 0: nothing is left to be polled once more


class Report:
    """Reports the start of a call when it is made, and its end, in the context that the call's polls inherit."""

    def __init__(self, call: Call, verb: Verb, execution_id: str | None = None) -> None:
        lookups = call.group.lookups
        self._hook = lookups.engine.on_event
        self._now = lookups.engine.clock.time
        self._call = call
        self._facts = (verb, lookups.url, execution_id)
        self._started = 0.0
        if self._hook is not None:
            self._started = self._now()
            call.context.run(self._hook, WaitStarted(*self._facts))

    def failed(self, outcome: Outcome[Any]) -> None:
        """Report the outcome of one id, if it is an error."""
        if self._hook is not None and outcome.error is not None:
            _, url, _ = self._facts
            self._call.context.run(self._hook, RecordFailed(outcome.id, url, outcome))

    def end(self, error: KaizenError | None = None, *, cancelled: bool) -> None:
        """Report the end of the call."""
        if self._hook is not None:
            elapsed = self._now() - self._started
            self._call.context.run(self._hook, WaitEnded(*self._facts, elapsed, error, cancelled))


def _ignore(*_: object) -> None:
    pass
