"""The methods of a kind of executions: `get`, `get_many`, `stream`, `wait`, `wait_many`, `watch` and `learn`."""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, Generic, TypeVar

from msgspec import UNSET, UnsetType

from kaizen_async._binding import Binding
from kaizen_async._bulk import LookUp, OutcomeStream, Report, collect_ids, look_up_all
from kaizen_async._ids import Ids, IdSource, require_id, require_ids
from kaizen_async._ledger import Checkpoint, Ledger
from kaizen_async._lookup.engine import Engine
from kaizen_async._lookup.lookup import Lookups
from kaizen_async._transport.wire import Endpoint
from kaizen_async._waiting.calls import Group
from kaizen_async._waiting.scheduler import Scheduler
from kaizen_async._waiting.streams import ChangeStream, WaitStream
from kaizen_async._waiting.waiter import Waiter
from kaizen_async.config import PollPolicy, RetryPolicy, require_duration
from kaizen_async.events import BatchVerb
from kaizen_async.outcomes import Outcome

T = TypeVar("T")


class Executions(Generic[T]):
    """Looks up executions of one kind, and waits for them. Get it from a client: `kaizen.instructor_executions`.

    All methods share the client's connections, its concurrency, its retry budget and what it knows about the server.
    Any number of tasks of one event loop may call them at the same time.
    """

    def __init__(self, binding: Binding, endpoint: Endpoint[T]) -> None:
        self._binding = binding
        self._endpoint = endpoint

    async def get(
        self,
        execution_id: str,
        *,
        deadline: float | UnsetType | None = UNSET,
        retry: RetryPolicy | None = None,
        max_age: float | None = None,
    ) -> T:
        """Look up one execution.

        The client retries a retryable failure (see `RetryPolicy`) until the deadline. Concurrent lookups of the same id
        share one request.

        Args:
            execution_id: The id.
            deadline: Seconds for the whole lookup, including the wait for a slot, all attempts and back-off. Unset:
                the client's deadline. None: only the number of attempts limits the lookup.
            retry: Replaces the client's retry policy.
            max_age: Seconds. If the client received a record of this id within this time, or one of an ended execution
                at any time, it may return that record without a request. None: the client always sends a request.

        Returns:
            The record.

        Raises:
            NotFoundError: The API does not know the execution. Not retried.
            AuthenticationError: The key is missing or refused. Not retried.
            RateLimitError: The server still throttles after all attempts, or asks the client to wait past the deadline;
                see `.retry_after`.
            StatusError: The server responded with another status outside 2xx. Retried for the policy's statuses.
            TransportError: The client got no usable response. Retried.
            DecodeError: The response is not a record of this kind. Retried once if the JSON breaks off.
            DeadlineExceededError: The deadline passed. Its `__cause__` is the last failed attempt.
            ClientClosedError: The client is closed, or was closed during the call.
            TypeError, ValueError: The id or an argument is invalid. Nothing was sent.
        """
        execution_id = require_id(execution_id)
        seconds = self._binding.settings.deadline if deadline is UNSET else _checked(deadline)
        lookups = self._binding.lookups(self._endpoint, retry)
        if max_age is not None:
            require_duration("max_age", max_age, zero_allowed=True)
            recent = lookups.recent(execution_id, max_age)
            if recent is not None:
                return recent
        return (await lookups.look_up(execution_id, seconds=math.inf if seconds is None else seconds)).unwrap()

    async def get_many(
        self, ids: Ids, *, deadline: float | None = None, retry: RetryPolicy | None = None
    ) -> list[Outcome[T]]:
        """Look up many executions and return all outcomes together.

        If the records do not fit in memory, use `stream`.

        Args:
            ids: Any iterable or asynchronous iterable of ids. The client reads it to its end before it sends anything.
                If a source without a length has not ended by the deadline, the client stops reading it.
            deadline: Seconds for the whole call. Ids without a result by then get a DeadlineExceededError. The client's
                own deadline also limits each lookup.
            retry: Replaces the client's retry policy.

        Returns:
            One outcome for each id, in the order of the ids. Equal ids share one request and one outcome. A failed
            lookup does not affect the others: its outcome carries the error that `get` would have raised. An invalid
            id (None, NaN, an empty string, a line with its line break) gets an outcome with an InvalidIdError.

        Raises:
            ClientClosedError: The client was closed before the ids of a generator were read. Nothing was sent.
            TypeError, ValueError: An argument is invalid. Nothing was sent. An exception of the source of the ids is
                raised unchanged.
        """
        require_ids(ids)
        lookups = self._binding.lookups(self._endpoint, retry)
        ends_at = _after(lookups.engine, _checked(deadline))
        collected = await collect_ids(_source(ids, lookups.engine, ends_at, wait_until=ends_at))
        report = _report(lookups, "get_many")
        return await look_up_all(collected, self._bounded(lookups, ends_at), lookups.engine.concurrency, report)

    def stream(
        self,
        ids: Ids = (),
        *,
        deadline: float | None = None,
        retry: RetryPolicy | None = None,
        checkpoint: object = None,
    ) -> OutcomeStream[T]:
        """Look up any number of executions, even an endless source, and yield each outcome when it is there.

        Use it as `async with executions.stream(ids) as outcomes: async for outcome in outcomes: ...`.

        Args:
            ids: Any iterable or asynchronous iterable of ids. This call copies a collection. From any other source, the
                client reads ids while you consume outcomes: at most twice its concurrency ahead of you, or 16 more than
                its concurrency if that is more.
            deadline: Seconds for the whole call. Then ids in flight, and the rest of a source with a length, get a
                DeadlineExceededError. The client stops reading a source without a length.
            retry: Replaces the client's retry policy.
            checkpoint: The result of `outcomes.checkpoint()` of an earlier call. The client looks up its ids before the
                others.

        Returns:
            An asynchronous context manager and iterator of outcomes: one for each id taken, in any order. The outcome
            of an invalid id has an InvalidIdError. If the source raises, the stream first yields the outcomes of the
            ids before, and then raises the exception of the source.

        Raises:
            TypeError, ValueError: An argument is invalid.
        """
        require_ids(ids)
        lookups = self._binding.lookups(self._endpoint, retry)
        ends_at = _after(lookups.engine, _checked(deadline))
        state = None if checkpoint is None else Checkpoint.load(checkpoint)
        ledger = Ledger(_source(ids, lookups.engine, ends_at, wait_until=ends_at), state)
        clock = lookups.engine.clock
        return OutcomeStream(
            ledger,
            self._bounded(lookups, ends_at),
            lookups.engine.concurrency,
            clock.wall,
            lambda: _report(lookups, "stream"),
        )

    async def wait(self, execution_id: str, *, deadline: float | None = 3600.0, poll: PollPolicy | None = None) -> T:
        """Wait for one execution to end, and return its record.

        An execution has ended when `is_finished` of its record is true: an instructor execution when `end_time` is set,
        whatever its status. If polls fail temporarily (see `KaizenError.retryable`), the wait continues. Waits for the
        same id share their polls. If a wait of this client has seen the execution end before, there is no poll.

        Args:
            execution_id: The id.
            deadline: Seconds for the whole wait; None for no limit.
            poll: Replaces the client's poll policy.

        Returns:
            The record of the ended execution. Its `succeeded` says whether the execution ended well.

        Raises:
            DeadlineExceededError: The execution did not end in time; see `.last_execution`.
            NotFoundError: The API did not know the execution for longer than the policy's `not_found_grace`.
            AuthenticationError, StatusError, TransportError, DecodeError: A poll failed, and every further poll would
                fail in the same way.
            ClientClosedError: The client is closed, or was closed during the call.
            TypeError, ValueError: The id or an argument is invalid. Nothing was sent.
        """
        execution_id = require_id(execution_id)
        _checked(deadline)
        scheduler, group = self._binding.polls(self._endpoint, poll)
        deadline_at = _after(scheduler.engine, deadline)
        # Nothing here may refer to the outcome: an error that it raises refers to this frame.
        return (await Waiter[T](scheduler, group, execution_id, deadline_at).wait()).unwrap()

    def wait_many(
        self,
        ids: Ids = (),
        *,
        deadline: float | None = 3600.0,
        poll: PollPolicy | None = None,
        checkpoint: object = None,
    ) -> WaitStream[T]:
        """Wait for many executions to end, and yield the outcome of each when it has ended.

        Use it as `async with executions.wait_many(ids) as outcomes: async for outcome in outcomes: ...`. More ids can
        be added later: `outcomes.add(id)`. All waits of a client share one scheduler, which takes turns between them.

        Args:
            ids: Any iterable or asynchronous iterable of ids. The client reads them as fast as it can poll them and as
                you consume outcomes.
            deadline: Seconds for the whole call; None for no limit. Then each id that was taken and has not ended gets
                a DeadlineExceededError with the last record, and so does the rest of a collection. The client stops
                reading a generator.
            poll: Replaces the client's poll policy.
            checkpoint: The result of `outcomes.checkpoint()` of an earlier call. The client resumes its ids beside the
                others.

        Returns:
            An asynchronous context manager and iterator of outcomes: exactly one for each id taken. The error of an
            outcome is the one that `wait` would have raised.

        Raises:
            TypeError, ValueError: An argument is invalid. (An invalid id yields an InvalidIdError.)
        """
        state = None if checkpoint is None else Checkpoint.load(checkpoint)
        scheduler, group, ledger, deadline_at = self._watched(ids, deadline, poll, state)
        if state is not None and state.learned is not None:
            group.cadence.restore(state.learned)
        return WaitStream(scheduler, group, ledger, deadline_at)

    def watch(
        self, ids: str | Ids, *, deadline: float | None = 3600.0, poll: PollPolicy | None = None
    ) -> ChangeStream[T]:
        """Yield the first state of each execution, and then every change that a poll sees, until all have ended.

        Use it as `async with executions.watch(ids) as changes: async for change in changes: ...`.

        Args:
            ids: One id, or any iterable or asynchronous iterable of ids.
            deadline: Seconds for the whole call; None for no limit. An execution that has not ended by then yields a
                change with a DeadlineExceededError.
            poll: Replaces the client's poll policy.

        Returns:
            An asynchronous context manager and iterator of changes. If an id cannot be watched any longer, its last
            change has the error, and the other ids continue.

        Raises:
            TypeError, ValueError: An argument is invalid. (An invalid id yields an InvalidIdError.)
        """
        scheduler, group, ledger, deadline_at = self._watched([ids] if isinstance(ids, str) else ids, deadline, poll)
        return ChangeStream(scheduler, group, ledger, deadline_at)

    def learn(self, durations: Iterable[tuple[str, float]], *, poll: PollPolicy | None = None) -> None:
        """Learn from executions that other processes saw end, as if waits of this client had seen it.

        How often a wait polls an execution depends on how long earlier executions of its workflow took. Processes that
        share these durations send as few polls as one process would.

        Args:
            durations: Workflow id and duration in seconds of each execution, in the order in which they ended.
            poll: The poll policy whose waits learn; the client's if None.
        """
        _, group = self._binding.polls(self._endpoint, poll)
        for workflow_id, seconds in durations:
            group.cadence.learn(workflow_id, seconds)

    def _watched(
        self, ids: Ids, deadline: float | None, poll: PollPolicy | None, checkpoint: Checkpoint | None = None
    ) -> tuple[Scheduler, Group, Ledger, float]:
        require_ids(ids)
        _checked(deadline)
        scheduler, group = self._binding.polls(self._endpoint, poll)
        deadline_at = _after(scheduler.engine, deadline)
        source = _source(ids, scheduler.engine, deadline_at, wait_until=math.inf)
        return scheduler, group, Ledger(source, checkpoint, now=scheduler.clock.wall()), deadline_at

    def _bounded(self, lookups: Lookups[T], ends_at: float) -> LookUp[T]:
        """Return a lookup that ends with the client's deadline for it, or with the whole call."""
        deadline = self._binding.settings.deadline
        seconds = math.inf if deadline is None else deadline
        return partial(lookups.look_up, seconds=seconds, ends_at=ends_at)


def _report(lookups: Lookups[Any], verb: BatchVerb) -> Report:
    engine = lookups.engine
    return Report(engine.on_event, engine.clock.time, verb, lookups.url)


def _source(ids: Ids, engine: Engine, late_at: float, *, wait_until: float) -> IdSource:
    return IdSource(
        ids,
        closed=lambda: engine.closed,
        late=lambda: engine.clock.time() >= late_at,
        wait=lambda awaitable: engine.wait(awaitable, wait_until),
        clock=engine.clock,
    )


def _after(engine: Engine, seconds: float | None) -> float:
    """Return the clock's time that many seconds from now."""
    return math.inf if seconds is None else engine.clock.time() + seconds


def _checked(deadline: float | None) -> float | None:
    if deadline is not None:
        require_duration("deadline", deadline)
    return deadline
