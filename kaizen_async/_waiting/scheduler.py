"""One scheduler for all waits of a client: it polls what is due, and reports the results to the calls.

An execution costs one entry, however many calls wait for it, and no task: a task exists only for a poll in flight, and
those are as many as the client's concurrency. The parts are in files of their own:

- `entry.py`: one execution that is waited for; `calls.py`: one call, and what calls under one policy share
- `timetable.py`: when each execution is due; `cadence.py`: after how long it is due again
- `turns.py`: whose poll comes next, and how fast
- `verdict.py`: what a failed poll means; `disturbance.py`: whether the whole client is being refused
- `memory.py`: what is kept of ended executions, and how much of records; `facts.py`: what a record tells
- `silence.py`: how long polls have been failing, for people

Only this file calls the others.
"""

import asyncio
import copy
import functools
import math
from collections.abc import Iterable, Iterator
from contextvars import copy_context
from itertools import islice
from typing import Any, Final

from kaizen_async._lookup.engine import Engine
from kaizen_async._lookup.lookup import Lookups, separate
from kaizen_async._records.base import without_raw
from kaizen_async._records.facts import duration_of, has_ended, start_of, workflow_id_of
from kaizen_async._waiting.cadence import Cadence
from kaizen_async._waiting.calls import Call, Group, Pace
from kaizen_async._waiting.disturbance import Disturbance
from kaizen_async._waiting.entry import NOWHERE, POLLING, QUEUED, Entry, Trouble
from kaizen_async._waiting.memory import EndedRecords, HeavyRecords, TooHeavy
from kaizen_async._waiting.silence import Silence
from kaizen_async._waiting.timetable import Timetable
from kaizen_async._waiting.turns import Turns
from kaizen_async._waiting.verdict import Kind, is_about_id, judge, kind_of
from kaizen_async.clock import Timer
from kaizen_async.config import PollPolicy
from kaizen_async.errors import ClientClosedError, DeadlineExceededError, DecodeError, KaizenError, StatusError
from kaizen_async.events import PollShared, RecordEnded
from kaizen_async.outcomes import Found, LookupFailed, Outcome
from kaizen_async.stats import Counters

MOST_GROUPS: Final = 100
"""Kinds and policies from which on those without calls are forgotten."""
MOST_CANDIDATES: Final = 10_000
"""Executions looked at, per group, for one that has not been refused: a few milliseconds once in a while."""
AT_ONCE: Final = 200
"""Entries dealt with in one step of the event loop, so that 100,000 due or given up at once do not block it."""
LAST_POLL_MARGIN: Final = 1.0
"""Seconds before a deadline at which a last poll is made, if the next would come too late."""
LAST_POLLS_RATE: Final = 1000.0
"""Polls per second to which the last ones before a common deadline are spread out, each at random."""
DELAY_WEIGHT: Final = 0.05
"""Weight of the newest poll in the running mean of the delay."""
FROZEN: Final = 1.0
"""If a deadline is noticed later than this many seconds, the process was frozen."""
AFTER_THAW: Final = 5.0
"""Seconds that a call has for one more poll after the process was frozen, and more if it waits for many."""
MOST_AGE: Final = 366 * 86_400.0
"""Seconds for which an execution may say to have been running. More is a broken clock, and teaches nothing."""


class Scheduler:
    """Polls all executions that calls wait for, within one event loop.

    Args:
        engine: Bounds the polls in flight.
        ended: Answers for executions known to have ended.
        counters: Of the client.
        deadline: Seconds for one poll; None for no limit.

    Attributes:
        delay: Seconds by which polls come later than they are due, as a running mean.
        silence: Since when and why polls have been failing.
    """

    def __init__(self, engine: Engine, ended: EndedRecords, counters: Counters, *, deadline: float | None) -> None:
        self.engine = engine
        self.clock = engine.clock
        self.delay = 0.0
        self.silence = Silence(engine.on_event)
        self._ended = ended
        self._heavy = HeavyRecords()
        self._counters = counters
        self._deadline = math.inf if deadline is None else deadline
        # Read once: a wall clock that is set later changes no age.
        self._epoch = self.clock.wall() - self.clock.time()
        self._groups: dict[tuple[object, PollPolicy], Group] = {}
        self._calls: dict[int, Call] = {}
        self._numbers = 0
        self._waiting = 0
        self._timetable = Timetable()
        self._turns = Turns()
        self._disturbance = Disturbance()
        self._polls = 0
        self._timer: Timer | None = None
        self._timer_at = math.inf

    @property
    def waiting(self) -> int:
        """The number of executions that calls wait for."""
        return self._waiting

    def group(self, lookups: Lookups[Any], policy: PollPolicy, cadence: Cadence) -> Group:
        """Return what calls of that kind and policy share."""
        key = (lookups.endpoint, policy)
        group = self._groups.get(key)
        if group is None:
            if len(self._groups) >= MOST_GROUPS:
                self._groups = {key: group for key, group in self._groups.items() if group.open_calls}
            pace = next((other.pace for other in self._groups.values() if other.policy == policy), None) or Pace()
            group = self._groups[key] = Group(lookups, policy, cadence, pace)
        return group

    # Calls

    def open(self, call: Call) -> None:
        """Take a call up. Until `close_call`, it gets every result, and its group is not forgotten."""
        call.group = self._groups.setdefault((call.group.lookups.endpoint, call.group.policy), call.group)
        call.group.open_calls += 1
        self._numbers += 1
        call.number, call.alone = self._numbers, (self._numbers,)
        self._calls[call.number] = call
        if call.deadline_at < math.inf:
            call.timer = self.clock.call_at(call.deadline_at, functools.partial(self._expire, call))

    def end_timer(self, call: Call) -> None:
        """Poll nothing more for a call."""
        call.deadline_at = -math.inf
        if call.timer is not None:
            call.timer.cancel()

    def close_call(self, call: Call) -> None:
        """Forget a call that waits for nothing any more."""
        del self._calls[call.number]
        call.group.open_calls -= 1
        call.detach()
        self._reset_if_idle()

    def _expire(self, call: Call) -> None:
        now = self.clock.time()
        late = now - call.deadline_at
        if late > FROZEN and not call.has_thawed:
            # The process stood still beyond the deadline. A last poll of everything shows what has ended since.
            call.has_thawed = True
            call.deadline_at = now + min(late, AFTER_THAW)
            call.deadline_at += min(late, call.poll_all() / LAST_POLLS_RATE)
            call.timer = self.clock.call_at(call.deadline_at, functools.partial(self._expire, call))
        else:
            self.end_timer(call)
            call.on_over()

    def subscribe(
        self, call: Call, execution_id: str, *, age: float = 0.0, delay: float = 0.0, seen: bool = False
    ) -> None:
        """Have an execution polled until it has ended. The call may get a result at once.

        Args:
            call: An open call.
            execution_id: A valid id.
            age: Seconds that it is known to have been running already.
            delay: Seconds until its first poll.
            seen: Whether its record was received before, in another process.
        """
        now = self.clock.time()
        group = call.group
        outcome = self._outcome_at_once(call, execution_id, now)
        if outcome is not None:
            if outcome.execution is not None:
                call.on_change(execution_id, None, outcome.execution)
            call.on_end(outcome)
            return
        entry = group.entries.get(execution_id)
        if entry is not None:
            self._join(entry, call, now)
            return
        entry = Entry(execution_id, call.alone, now, now - age if age else now, now, seen=seen)
        group.entries[execution_id] = entry
        self._waiting += 1
        if delay > 0:
            self._schedule(entry, group, now + min(delay, group.policy.max_interval))
        else:
            self._queue(entry, now)
            self._arm(now)

    def unsubscribe(self, call: Call, execution_id: str) -> None:
        """Wait no longer. Without other calls the polls stop; one in flight is cancelled."""
        group = call.group
        entry = group.entries.get(execution_id)
        if entry is None or call.number not in entry.calls:
            return
        if len(entry.calls) > 1:
            entry.calls = tuple(number for number in entry.calls if number != call.number)
            return
        self._forget(entry, group)
        poll = group.polls.get(execution_id)
        if poll is not None:
            poll.cancel()
            call.cancelled_polls.append(poll)

    def cut_off(self, call: Call, execution_id: str) -> Outcome[Any]:
        """Wait no longer for an execution that has not ended, and return the outcome that says why."""
        entry = call.group.entries[execution_id]
        outcome = self._failed(entry, self._unfinished(entry, call))
        self.unsubscribe(call, execution_id)
        return outcome

    def poll_soon(self, call: Call, execution_id: str) -> None:
        """Poll an execution now rather than when it would be due."""
        entry = call.group.entries[execution_id]
        now = self.clock.time()
        if entry.place == NOWHERE:  # it was due after the deadline, before the call got more time
            entry.due = now
            self._queue(entry, now)
            self._arm(now)
        elif entry.place not in {QUEUED, POLLING}:
            self._schedule(entry, call.group, now)

    def is_polling(self, call: Call, execution_id: str) -> bool:
        """Return whether a poll of an execution that is waited for is in flight."""
        return call.group.entries[execution_id].place == POLLING

    def spread(self, group: Group, age: float) -> float:
        """Return a delay within which polls that fell due together can be spread."""
        return self.clock.random.uniform(0.0, group.cadence.next_delay(age, None))

    def due_in(self, call: Call, execution_id: str, now: float) -> tuple[float, float, bool]:
        """Return an execution's age, the time until its next poll, in seconds, and whether its record was seen."""
        entry = call.group.entries[execution_id]
        return max(0.0, now - entry.started), max(0.0, entry.due - now), entry.seen

    def close(self) -> None:
        """Poll no more. Waits end with ClientClosedError; those whose poll is in flight, when that ends."""
        self._disarm()
        for call in list(self._calls.values()):
            call.on_over()

    def _outcome_at_once(self, call: Call, execution_id: str, now: float) -> Outcome[Any] | None:
        """Return the outcome of an execution if that takes no poll."""
        error: KaizenError
        if self.engine.closed:
            error = ClientClosedError("the client is closed; create a new KaizenClient")
        else:
            record = self._ended.get(call.group.lookups.endpoint, execution_id)
            if record is not None:
                return Found(execution_id, record, None, 0, 0.0)
            if call.refusal is not None:
                error = copy.copy(call.refusal)
            elif call.deadline_at <= now:
                error = DeadlineExceededError("the deadline passed before a poll could be made")
            else:
                return None
        error.execution_id, error.attempts = execution_id, 0
        return LookupFailed(execution_id, None, error, 0, 0.0)

    def _join(self, entry: Entry, call: Call, now: float) -> None:
        """Have a call share the polls of an entry, which may make the next one come sooner."""
        entry.calls = (*entry.calls, call.number)
        if entry.last is not None and not isinstance(entry.last, TooHeavy):
            call.on_change(entry.id, None, entry.last)
        else:
            entry.last = None  # so that the next record counts as a change, for this call too
        if entry.place == POLLING:
            return
        if entry.place not in {QUEUED, NOWHERE}:
            due = max(now, self._in_time(entry, call.group, (call,), entry.due))
            if due < entry.due:
                self._schedule(entry, call.group, due)
            return
        if entry.place == NOWHERE:
            entry.due = now
        self._queue(entry, now)
        self._arm(now)

    # Due times and turns

    def _calls_of(self, entry: Entry) -> Iterator[Call]:
        return (self._calls[number] for number in entry.calls)

    def _in_time(self, entry: Entry, group: Group, calls: Iterable[Call], due: float) -> float:
        """Return when to poll: then, or sooner if that were too late for a last poll before the deadline of a call.

        Of many that end with one deadline, each has its own last moment. Otherwise all would be polled in the same one.
        """
        for call in calls:
            ends = call.deadline_at - LAST_POLL_MARGIN
            begins = ends - len(group.entries) // AT_ONCE * AT_ONCE / LAST_POLLS_RATE
            if due > ends and entry.polled < begins:
                allowed = entry.polled + group.policy.min_interval
                if entry.trouble is not None:
                    allowed = max(allowed, entry.trouble.not_before)
                last_chance = max(self.clock.random.uniform(begins, ends), allowed)
                if last_chance < min(due, call.deadline_at):
                    due = last_chance
        return due

    def _schedule(self, entry: Entry, group: Group, due: float) -> None:
        """Put an entry in the timetable, no later than its calls need."""
        due = self._in_time(entry, group, [self._calls[number] for number in entry.calls], due)
        self._timetable.put(entry, due)
        self._arm(due)

    def _queue(self, entry: Entry, now: float) -> None:
        self._turns.put(entry, self._calls_of(entry), now)

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
        self._timer_at = -math.inf  # polls that end at once schedule the next ones; one timer at the end does for all
        now = self.clock.time()
        for _ in range(AT_ONCE):
            entry = self._timetable.pop(now)
            if entry is None:
                break
            if not (self.engine.transport.is_inside and self._poll_directly(entry, now)):
                self._queue(entry, now)
        try:
            serve_at = self._serve(now)
        finally:
            self._disarm()
        self._arm(min(serve_at, max(now, self._timetable.next_due())))

    def _serve(self, now: float) -> float:
        """Start polls while there are slots; return when to try again, unless the end of a poll comes first."""
        if self._disturbance.is_on:
            return self._serve_probe(now)
        for _ in range(AT_ONCE):
            if self.engine.closed or not self._turns or self._polls >= self.engine.concurrency:
                return math.inf
            taken = self._turns.next(now)
            if taken is not None:
                self._start(*taken, now)
            elif self._turns.resumes_at < math.inf:
                return self._turns.resumes_at
        return now

    def _serve_probe(self, now: float) -> float:
        """Start the one poll that speaks for all, if it is time for it; return when to try again."""
        if self.engine.closed or self._polls:
            return math.inf
        if now < self._disturbance.probe_at:
            return self._disturbance.probe_at
        witness = self._find_witness(now)
        if witness is not None:
            entry, group = witness
            queue = self._calls.get(entry.queue) if entry.place == QUEUED else None
            self._start(entry, group, now)
            if queue is not None:
                queue.skip_stale()
            return math.inf if self._polls else now
        while self._turns and not self._polls:
            taken = self._turns.next(now)
            if taken is not None:
                self._start(*taken, now)
                if not self._disturbance.is_on:
                    return now
            elif self._turns.resumes_at < math.inf:
                return self._turns.resumes_at
        return math.inf

    def _find_witness(self, now: float) -> tuple[Entry, Group] | None:
        """Return an execution that was answered before and has not been refused; else one that was not refused.

        It need not be due. Invalid ids are refused for ever, so they cannot tell whether the server serves the others.
        """
        second_best: tuple[Entry, Group] | None = None
        for group in self._groups.values():
            if group.pace.next_poll > now:
                continue
            for entry in islice(group.entries.values(), MOST_CANDIDATES):
                is_candidate = entry.trouble is None and entry.polled + group.policy.min_interval <= now
                if is_candidate and any(call.deadline_at > now for call in self._calls_of(entry)):
                    if entry.seen:
                        return entry, group
                    second_best = second_best or (entry, group)
        return second_best

    def _reset_if_idle(self) -> None:
        """If no call waits any longer, drop stale entries and the timer."""
        if not self._waiting:
            self._disarm()
            self.delay = 0.0
            self._timetable = Timetable()
            self._turns.clear()
            self._disturbance = Disturbance()

    # Polls

    def _start(self, entry: Entry, group: Group, now: float) -> None:
        calls = [call for call in self._calls_of(entry) if call.deadline_at > now]
        if not calls:
            return
        self._turns.spend(entry, group, now)
        self._timetable.remove(entry)
        # The timer runs in the context of the code that set it. The poll belongs to a call, so it runs in that call's.
        context = calls[0].context.copy()
        if self.engine.transport.is_inside and context.run(self._poll_at_once, entry, group, now):
            return
        self._polls += 1
        entry.place = POLLING
        poll = asyncio.create_task(self._poll(entry, group), context=context)
        group.polls[entry.id] = poll
        poll.add_done_callback(functools.partial(self._on_poll_done, entry, group))

    def _poll_directly(self, entry: Entry, now: float) -> bool:
        """Poll a server in this process without a turn, since nothing waits for one; return whether that was done."""
        call = self._calls[entry.calls[0]]
        group = call.group
        is_contested = self._turns or self._disturbance.is_on or len(entry.calls) > 1
        if is_contested or self.engine.closed or call.deadline_at <= now or group.policy.max_rate is not None:
            return False
        return call.context.copy().run(self._poll_at_once, entry, group, now)

    def _poll_at_once(self, entry: Entry, group: Group, now: float) -> bool:
        """Poll a server in this process, and return True; False if that takes a task, and nothing was sent."""
        if self._ended.get(group.lookups.endpoint, entry.id) is not None:
            return False
        note_sent = functools.partial(self._note_sent, entry, group)
        outcome = group.lookups.look_up_at_once(entry.id, now + self._deadline, note_sent)
        if outcome is not None:
            self._counters.polls += 1
            self._note_outcome(entry, group, outcome)
        return outcome is not None

    async def _poll(self, entry: Entry, group: Group) -> None:
        try:
            outcome = await self._look_up(entry, group)
        except Exception as error:  # noqa: BLE001 - what hooks of a session or a record raise is for those who wait
            self._crash(entry, group, error)
        else:
            if entry.calls:
                self._note_outcome(entry, group, outcome)

    def _note_outcome(self, entry: Entry, group: Group, outcome: Outcome[Any]) -> None:
        try:
            entry.place = NOWHERE
            entry.attempts += outcome.attempts
            if outcome.error is None:
                self._note_record(entry, group, outcome.execution, outcome.request_id)
            else:
                self._note_failure(entry, group, outcome.error, was_sent=outcome.attempts > 0)
        except Exception as error:  # noqa: BLE001 - what a record raises is for those who wait
            self._crash(entry, group, error)

    def _crash(self, entry: Entry, group: Group, error: Exception) -> None:
        calls = list(self._calls_of(entry))
        self._forget(entry, group)
        for call in calls:
            call.on_crash(entry.id, error)

    async def _look_up(self, entry: Entry, group: Group) -> Outcome[Any]:
        record = self._ended.get(group.lookups.endpoint, entry.id)
        if record is not None:
            return Found(entry.id, record, None, 0, 0.0)
        deadline_at = self.clock.time() + self._deadline
        return await group.lookups.look_up(
            entry.id, on_turn=functools.partial(self._note_sent, entry, group), ends_at=deadline_at
        )

    def _note_sent(self, entry: Entry, group: Group) -> None:
        """Note when a poll is sent: slots, the health of the server and the limiter have let it pass."""
        now = self.clock.time()
        self.delay += DELAY_WEIGHT * (now - entry.due - self.delay)
        self._turns.note_sent(entry, group, now)

    def _on_poll_done(self, entry: Entry, group: Group, poll: "asyncio.Task[None]") -> None:
        # Not a `finally` of the poll: of a task that is cancelled before its first step nothing runs.
        if group.polls.get(entry.id) is poll:
            del group.polls[entry.id]
        group.pace.unsent.discard(entry)
        self._polls -= 1
        self._counters.polls += 1
        if not poll.cancelled():
            self._arm(self._serve(self.clock.time()))
        elif entry.calls:
            # None of its calls did it. The end of a program cancels all tasks, and that should not start new ones.
            self._schedule_next(entry, group)
        else:
            self._arm(self.clock.time())

    def _note_record(self, entry: Entry, group: Group, record: Any, request_id: str | None) -> None:
        before = entry.last
        endpoint = group.lookups.endpoint
        is_first = not entry.seen
        self._note_answered(entry)
        entry.seen = True
        if before is None or not (before.stands_for(record) if isinstance(before, TooHeavy) else record == before):
            # The JSON of a running execution is not kept: there may be 200,000 of them.
            last = record if has_ended(record) else without_raw(record)
            entry.last = self._heavy.keep(endpoint, entry.id, last)
            self._note_start(entry, record)
            for call in self._calls_of(entry):
                call.on_change(entry.id, None if isinstance(before, TooHeavy) else before, record)
        self._learn(entry, group, record, is_first=is_first)
        if not has_ended(record):
            self._schedule_next(entry, group)
            return
        elapsed = self.clock.time() - entry.since
        outcome = Found(entry.id, record, None, entry.attempts, elapsed, request_id)
        if self._ended.get(endpoint, entry.id) is not record:
            self._ended.put(endpoint, entry.id, record)
            if self.engine.on_event is not None:
                self.engine.on_event(RecordEnded(entry.id, group.lookups.url, outcome))
        self._end(entry, group, outcome)

    def _note_start(self, entry: Entry, record: Any) -> None:
        """Take over when an execution says to have started, if that can be true."""
        start = start_of(record)
        if start is not None:
            age = self.clock.time() - (start - self._epoch)
            if age < MOST_AGE:
                entry.started = self.clock.time() - max(0.0, age)

    def _learn(self, entry: Entry, group: Group, record: Any, *, is_first: bool) -> None:
        """Teach the cadence that an execution has ended, or that it was still running at this age."""
        workflow_id = workflow_id_of(record)
        if workflow_id is None:
            return
        age = self.clock.time() - entry.started
        known_from = age if is_first else entry.polled - entry.started
        if not has_ended(record):
            group.cadence.note_running(workflow_id, known_from, age)
        elif (duration := duration_of(record)) is not None:
            group.cadence.learn(workflow_id, duration, known_from=0.0 if is_first else known_from)

    def _note_answered(self, entry: Entry) -> None:
        """Note that the API itself has answered."""
        self._disturbance.note_response(entry.trouble)
        self.silence.note_response()
        self.silence.end(entry.trouble, self.clock.time())
        entry.trouble = None

    def _note_failure(self, entry: Entry, group: Group, error: KaizenError, *, was_sent: bool) -> None:
        now = self.clock.time()
        disturbance = self._disturbance
        kind = kind_of(error)
        trouble = entry.trouble
        if trouble is None:
            trouble = entry.trouble = Trouble(now, error)
        if kind is Kind.REFUSED and not was_sent and not trouble.refusals:
            # The client has found its key refused, and did not send the poll. That says nothing about this execution.
            kind = Kind.FAILING
        ends_alone = self._note_disturbance(entry, group, error, kind, trouble)
        chance = disturbance.chance_missing if kind is Kind.MISSING else disturbance.chance_refused
        again = judge(
            kind,
            error,
            trouble,
            seen=entry.seen,
            policy=group.policy,
            chance=chance,
            refused_again=disturbance.refused_again,
            now=now,
        )
        waits_for_probes = kind is Kind.REFUSED and disturbance.is_on and group.policy.refusal_patience
        if ends_alone or (again is None and not waits_for_probes):
            self._end(entry, group, self._failed(entry, error))
            return
        trouble.error = self.silence.note_failure(entry.id, trouble, _without_details(error), now)
        self._schedule_next(
            entry, group, at_least=again.at_least if again else 0.0, within=again.within if again else 0.0
        )
        if kind is Kind.REFUSED:
            self._end_refused(now)

    def _note_disturbance(self, entry: Entry, group: Group, error: KaizenError, kind: Kind, trouble: Trouble) -> bool:
        """Note what a failed poll says about the polls of others; return whether it ends the wait for this id alone."""
        now = self.clock.time()
        disturbance = self._disturbance
        if kind is Kind.MISSING:
            disturbance.note_response(trouble)
            self.silence.note_response()
            if entry.seen and not trouble.missing:
                disturbance.note_missing()
        elif kind is Kind.REFUSED:
            may_be_id = not entry.seen and is_about_id(error)
            is_first = not trouble.refusals
            disturbance.note_refusal(entry.id, error, now, is_first=is_first, is_about_id=may_be_id)
            if disturbance.is_about_ids and self._outlasts(group.policy, now):
                if disturbance.ask_each():
                    for call in self._calls.values():
                        call.poll_all()
                return True
        elif disturbance.is_on:
            disturbance.wait(now)
        return False

    def _end_refused(self, now: float) -> None:
        """End all waits under policies whose patience a disturbance has outlasted."""
        disturbance = self._disturbance
        if not disturbance.is_on or disturbance.is_about_ids:
            return
        for call in list(self._calls.values()):
            if not call.is_over and self._outlasts(call.group.policy, now):
                call.refusal = disturbance.error
                self.end_timer(call)
                call.on_over()

    def _outlasts(self, policy: PollPolicy, now: float) -> bool:
        return self._disturbance.outlasts(policy.refusal_patience, now, self._waiting)

    def _schedule_next(self, entry: Entry, group: Group, *, at_least: float = 0.0, within: float | None = None) -> None:
        if self.engine.closed:
            self._end(entry, group, self._failed(entry, self._unfinished(entry, None)))
            return
        now = self.clock.time()
        if within is None:
            delay = group.cadence.next_delay(now - entry.started, workflow_id_of(entry.last))
        else:
            delay = max(within, group.policy.min_interval)
        entry.polled = now
        if entry.trouble is not None:
            entry.trouble.not_before = now + at_least
        self._schedule(entry, group, now + max(delay, at_least))

    # Ends

    def _unfinished(self, entry: Entry, call: Call | None) -> KaizenError:
        """Return the error for a wait that is over before the execution is."""
        if call is not None and call.refusal is not None:
            return copy.copy(call.refusal)
        failure = None if entry.trouble is None else entry.trouble.error
        polled = "" if failure is None else f"; its last poll failed: {failure.reason}"
        error: KaizenError
        if self.engine.closed:
            error = ClientClosedError(f"the client was closed during the wait{polled}")
        else:
            last = None if isinstance(entry.last, TooHeavy) else entry.last
            error = DeadlineExceededError(f"it had not ended when the deadline passed{polled}", last_execution=last)
        error.__cause__ = failure
        return error

    def _failed(self, entry: Entry, error: KaizenError) -> Outcome[Any]:
        error.execution_id = entry.id
        error.attempts = entry.attempts
        elapsed = self.clock.time() - entry.since
        return LookupFailed(entry.id, None, error, entry.attempts, elapsed, error.request_id)

    def _end(self, entry: Entry, group: Group, outcome: Outcome[Any]) -> None:
        hook = self.engine.on_event
        calls = list(self._calls_of(entry))
        self._forget(entry, group)
        for index, call in enumerate(calls):
            if index and hook is not None:
                call.context.run(hook, PollShared(entry.id, group.lookups.url, copy_context()))
            call.on_end(separate(outcome) if index else outcome)

    def _forget(self, entry: Entry, group: Group) -> None:
        """Remove an entry for which no call waits any longer."""
        entry.calls = ()
        if entry.place == QUEUED:
            entry.place = NOWHERE
            if (call := self._calls.get(entry.queue)) is not None:
                call.drop_stale(entry)
        self._timetable.remove(entry)
        entry.place = NOWHERE
        entry.last = None  # a queue may hold the entry a little longer, but not its record
        if group.entries.get(entry.id) is entry:  # while its last poll was being cancelled, another may have come
            del group.entries[entry.id]
            self._waiting -= 1
        self._heavy.forget(group.lookups.endpoint, entry.id)
        if entry.trouble is not None:
            self.silence.end(entry.trouble, self.clock.time())
            entry.trouble = None
        if not self._waiting:
            self._reset_if_idle()


def _without_details(error: KaizenError) -> KaizenError:
    """Return an error without its body and its id, because in an outage one may be kept for each of 100,000 ids."""
    error = copy.copy(error)  # a lookup of the same id may share the error, and needs its details
    error.execution_id, error.attempts, error.request_id = "", 0, None
    if isinstance(error, StatusError | DecodeError):
        error.body = b""
    return error
