"""One lookup, from an id to its outcome: turn, attempt, response, retry.

Failures travel as values in here; `Outcome.unwrap` is where they are raised.
"""

import asyncio
import copy
import logging
import math
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import Context, copy_context
from functools import partial
from http import HTTPStatus
from random import Random
from typing import Any, Final, Generic, TypeVar, cast

import msgspec
from yarl import URL

from kaizen_async._lookup.engine import BegunRequest, Engine
from kaizen_async._lookup.health import Health, Patience
from kaizen_async._lookup.hedge import Hedging, Race
from kaizen_async._lookup.received import Received
from kaizen_async._lookup.retry import OVER_BUDGET, Retrier
from kaizen_async._lookup.verdicts import Verdict, verdict
from kaizen_async._records.facts import has_ended
from kaizen_async._transport.capacity import NoConnectionError
from kaizen_async._transport.key import RotatingKey
from kaizen_async._transport.response import Answer
from kaizen_async._transport.statuses import status_error
from kaizen_async._transport.trace import RequestTrace, begin_trace
from kaizen_async._transport.transport import LARGE_RESPONSE
from kaizen_async._transport.wire import Endpoint, request_body
from kaizen_async.config import RetryPolicy
from kaizen_async.errors import (
    AttemptTimeoutError,
    AuthenticationError,
    ClientClosedError,
    DeadlineExceededError,
    DecodeError,
    KaizenError,
    NotFoundError,
    printable,
    seconds,
)
from kaizen_async.events import (
    AttemptEnded,
    AttemptHeld,
    AttemptStarted,
    BudgetRefused,
    HedgeEnded,
    HedgeStarted,
    Hook,
    LookUpEnded,
    LookUpShared,
    LookUpStarted,
    Observed,
    RetryScheduled,
)
from kaizen_async.outcomes import Found, LookupFailed, Outcome
from kaizen_async.stats import Counters

T = TypeVar("T")

log = logging.getLogger("kaizen_async")

_OK: Final = int(HTTPStatus.OK)
ROUNDING: Final = 0.001
"""Seconds by which a deadline may exceed the client's and still be the same."""
EXCUSED_PER_RETRY: Final = 2
"""Rejections that a lookup may get beside each retry: they say that the server is busy, and nothing about this id."""
SAME_MOMENT: Final = 0.1
"""Seconds for which a response outside 2xx means the same as an equal one before: it may name a time to wait."""
LONGEST_DOUBT: Final = 1.0
DOUBT_STEP: Final = 0.02
"""Seconds for which a refused lookup waits for others at most, and between two looks."""


class Call:
    """One lookup in progress.

    Attributes:
        on_turn: Called when its first request is about to be sent.
        on_back_off: Called when it begins to wait for its next attempt, and when that wait has ended.
        number: Of the request whose turn it has, if any.
        attempts: Requests sent.
        spent: Those that count against the retry policy: a failure in a pause for all does not.
        excused: Those that do not, since the server rejected them while it accepted others.
        begun: The request that was sent already, if there is one.
        patience: What ends it in a pause.
        request_id: What the server calls the last request.
        status: The status of its response.
    """

    __slots__ = (
        "attempts",
        "begun",
        "deadline_at",
        "excused",
        "execution_id",
        "last_error",
        "number",
        "on_back_off",
        "on_turn",
        "patience",
        "request_id",
        "sent_at",
        "spent",
        "status",
        "trace",
    )

    def __init__(
        self,
        execution_id: str,
        deadline_at: float,
        on_turn: Callable[[], None] | None,
        on_back_off: Callable[[bool], None] | None,
        *,
        patience: Patience,
        begun: BegunRequest | None = None,
    ) -> None:
        self.execution_id = execution_id
        self.deadline_at = deadline_at
        self.on_turn = on_turn
        self.on_back_off = on_back_off
        self.patience = patience
        self.begun = begun
        self.number: int | None = None
        self.attempts = 0 if begun is None else 1
        self.spent = 0
        self.excused = 0
        self.last_error: KaizenError | None = None
        self.request_id: str | None = None
        self.status: int | None = None
        self.sent_at = None if begun is None else begun.sent_at
        self.trace: RequestTrace | None = None


class Lookups(Generic[T]):
    """Lookups of one kind, under one retry policy, in one event loop. Equal ids in flight together share a request."""

    def __init__(
        self,
        engine: Engine,
        endpoint: Endpoint[T],
        url: URL,
        policy: RetryPolicy,
        *,
        health: Health,
        hedging: Hedging | None = None,
        received: Received,
        deadline: float,
        counters: Counters,
        random: Random,
    ) -> None:
        self.engine = engine
        self.endpoint = endpoint
        self.url = str(url)
        self._url = url
        self.policy = policy
        self._health = health
        self._hedging = hedging
        self._received = received
        self._deadline = deadline
        self._counters = counters
        self._retrier = Retrier(health, random, policy, engine.now)
        self._now = engine.now
        self._on_event = engine.on_event
        self._on_lookup = engine.on_lookup
        self._observe = engine.observe
        self._refusal_read: tuple[Answer, float, tuple[Any, ...]] | None = None
        self._followers: dict[str, list[asyncio.Future[Outcome[T] | None]]] = {}
        self._contexts: dict[str, Context] = {}

    def recent(self, execution_id: str, max_age: float) -> T | None:
        """Return the last record of an id, if it was received at most that many seconds ago, or its execution ended."""
        found = self._received.get(self.endpoint, execution_id)
        if found is None:
            return None
        record, received_at = found
        return record if self._now() - received_at <= max_age or has_ended(record) else None

    def look_up(
        self,
        execution_id: str,
        on_back_off: Callable[[bool], None] | None = None,
        on_turn: Callable[[], None] | None = None,
        *,
        seconds: float = math.inf,
        ends_at: float = math.inf,
    ) -> Coroutine[Any, Any, Outcome[T]]:
        """Look one id up, or share the lookup of the same id that is already in flight.

        The first caller's task does the work, and the others wait for its outcome. If the first is cancelled, or had
        less time than the others, one of them starts again.

        Args:
            execution_id: A valid id.
            on_back_off: Called with True when it begins to wait for its next attempt, and with False when that wait
                has ended. It holds no slot in between.
            on_turn: Called when the first request is about to be sent; not if the lookup of another is shared.
            seconds: How long the lookup may take.
            ends_at: The clock's time at which it ends in any case.
        """
        if self._on_lookup is None:
            return self._look_up(execution_id, on_back_off, on_turn, seconds, ends_at)
        return self._look_up_and_report(execution_id, on_back_off, on_turn, seconds, ends_at, self._on_lookup)

    def look_up_at_once(
        self, execution_id: str, deadline_at: float, on_turn: Callable[[], None] | None = None
    ) -> Outcome[T] | None:
        """Look one id up in a server of this process that has the record: an emulator in virtual time.

        Returns:
            The outcome. None if it takes more than one request that gets the record at once: nothing was sent then.
        """
        if self._on_event is not None or self._hedging is not None or execution_id in self._followers:
            return None
        now = self._now()
        offer = self.engine.offer(self._url, request_body(execution_id), self._health, now, deadline_at)
        if offer is None:
            return None
        response = offer.response
        kind, record = response.decoded
        if kind is not self.endpoint:
            try:
                record = self.endpoint.decode(response.answer.body, execution_id)
            except DecodeError:
                return None
            response.decoded = self.endpoint, record
        self._counters.lookups += 1
        self._counters.attempts += 1
        self._health.lookups += 1
        self._health.ended += 1
        if on_turn is not None:
            on_turn()
        offer.take()
        return self._accepted(execution_id, record, response.answer, self._health.send(), now, now)

    async def _look_up_and_report(
        self,
        execution_id: str,
        on_back_off: Callable[[bool], None] | None,
        on_turn: Callable[[], None] | None,
        seconds: float,
        ends_at: float,
        hook: Hook,
    ) -> Outcome[T]:
        outcome = None
        observed = None if self._observe is None else self._observe(execution_id, self.url)
        started = self._now()
        try:
            if observed is None:
                hook(LookUpStarted(execution_id, self.url))
            outcome = await self._look_up(execution_id, on_back_off, on_turn, seconds, ends_at, observed)
            return outcome
        finally:
            if observed is None or not observed.is_found:
                if observed is not None:
                    observed.enter()
                hook(LookUpEnded(execution_id, self.url, outcome, self._now() - started))

    async def _look_up(  # noqa: C901, PLR0912, PLR0915 - flat, since every lookup passes through it
        self,
        execution_id: str,
        on_back_off: Callable[[bool], None] | None,
        on_turn: Callable[[], None] | None,
        seconds: float,
        ends_at: float,
        observed: Observed | None = None,
    ) -> Outcome[T]:
        started = self._now()
        deadline_at = min(started + seconds, ends_at)
        while execution_id in self._followers:
            if observed is not None:
                observed.enter()
            shared = await self._follow(execution_id, deadline_at)
            if shared is not None:
                return shared
            started = self._now()
        followers: list[asyncio.Future[Outcome[T] | None]] = []
        self._followers[execution_id] = followers
        is_watched = self._on_lookup is not None
        if is_watched:
            self._contexts[execution_id] = copy_context()
        counters = self._counters
        counters.lookups += 1
        counters.in_progress += 1
        self._health.lookups += 1
        outcome: Outcome[T] | None = None
        first: BegunRequest | None = None
        # Nearly every lookup is one request that can be sent at once, and its response is the record. So each takes
        # this short way first, on which nothing is prepared for what may go wrong. If something is in the way, or does
        # go wrong, `_complete` takes over, with the request that was sent, as if there were no short way.
        try:
            if self._hedging is None and (not is_watched or (observed is not None and observed.is_light)):
                headers = None if observed is None else observed.headers
                body = request_body(execution_id)
                first = self.engine.begin(self._url, body, self._health, started, deadline_at, headers)
            if first is not None:
                counters.attempts += 1
                if on_turn is not None:
                    on_turn()
                if observed is not None:
                    observed.sent()
                if (answer := await first.response) is not None:
                    if len(answer.body) > LARGE_RESPONSE:
                        await self.engine.transport.take_turn()
                    outcome = self._found(execution_id, first, answer)
            if outcome is not None:
                if observed is not None:
                    observed.found(outcome.elapsed)
            else:
                if observed is not None:
                    observed.enter()
                patience = self._patience(deadline_at, started)
                call = Call(execution_id, deadline_at, on_turn, on_back_off, patience=patience, begun=first)
                first = None
                outcome = await self._complete(call, started)
        except BaseException as error:
            if first is not None:
                if observed is not None:
                    observed.abandon(self._now() - first.sent_at)
                self._abandon(first, error)
            if isinstance(error, asyncio.CancelledError):
                counters.cancelled += 1
            else:
                counters.failed += 1
            raise
        else:
            return outcome
        finally:
            counters.in_progress -= 1
            self._health.ended += 1
            del self._followers[execution_id]
            if is_watched:
                del self._contexts[execution_id]
            for follower in followers:
                if not follower.done():
                    follower.set_result(outcome)

    def _found(self, execution_id: str, first: BegunRequest, answer: Answer) -> Outcome[T] | None:
        """Return the outcome if the response to the first request is the record, and all is done; otherwise None."""
        body = answer.body
        if answer.status != _OK:
            return None
        try:
            record = self.endpoint.decode(body, execution_id)
        except DecodeError:
            return None
        now = self._now()
        outcome = self._accepted(execution_id, record, answer, first.number, first.sent_at, now)
        self.engine.end(first, now)
        return outcome

    def _accepted(
        self, execution_id: str, record: T, answer: Answer, number: int, sent_at: float, now: float
    ) -> Found[T]:
        """Note that the first request of a lookup got the record, and return the outcome."""
        elapsed = now - sent_at
        if log.isEnabledFor(logging.DEBUG):
            _log(execution_id, "%s: attempt %d got the record", 1, attempt=1, status=_OK, elapsed=elapsed)
        self._received.put(self.endpoint, execution_id, record, now, answer.body)
        self._health.accepted(number)
        self._counters.note_success(elapsed)
        return Found(execution_id, record, None, 1, elapsed, self.engine.transport.request_id(answer))

    def _patience(self, deadline_at: float, started: float) -> Patience:
        if deadline_at == math.inf:
            return Patience.ENDLESS
        return Patience.OWN if deadline_at - started > self._deadline + ROUNDING else Patience.CLIENT

    def _abandon(self, first: BegunRequest, error: BaseException) -> None:
        """Give up the first request, because its lookup was cancelled or crashed."""
        self._counters.note_attempt(self._now() - first.sent_at, None)
        self._health.abandoned(first.number)
        self.engine.abandon(first, error)

    async def _follow(self, execution_id: str, deadline_at: float) -> Outcome[T] | None:
        """Return the outcome of the lookup in flight; None if it came to no end that counts for this caller."""
        started = self._now()
        if self._on_lookup is not None:
            self._on_lookup(LookUpShared(execution_id, self.url, self._contexts[execution_id]))
        future: asyncio.Future[Outcome[T] | None] = self.engine.loop.create_future()
        self._followers[execution_id].append(future)
        try:
            outcome = await self.engine.wait(future, deadline_at)
        except TimeoutError:
            error = self.engine.interruption("while another lookup of the same id was in flight")
            error.execution_id = execution_id
            self._counters.failed += 1
            return LookupFailed(execution_id, None, error, 0, self._now() - started)
        except asyncio.CancelledError:
            self._counters.cancelled += 1
            raise
        if outcome is None or _only_lacked_time(outcome.error, deadline_at - self._now()):
            return None
        self._counters.shared += 1
        return separate(outcome)

    async def _complete(self, call: Call, started: float) -> Outcome[T]:
        """Look an id up with all that may take: waiting to send, reading any response, judging it, retries."""
        if self._hedging is not None:
            self._hedging.earn()
        result = await self._attempt(call)
        if call.attempts and self._retrier.is_worth_retrying(result):
            result = await self._retry(call, result)
        pause = self._health.pause
        if isinstance(result, DeadlineExceededError) and pause is not None and pause.cause is Verdict.FAILING:
            # The deadline came while this lookup was probing. It gets the same error as those that waited for it.
            result = self._health.refusal()
            result.execution_id = call.execution_id
        elapsed = self._now() - started
        if not isinstance(result, KaizenError):
            self._counters.succeeded += 1
            return Found(call.execution_id, result, None, call.attempts, elapsed, call.request_id)
        self._counters.failed += 1
        self._health.note_lost(result)
        result.attempts = call.attempts
        return LookupFailed(call.execution_id, None, result, call.attempts, elapsed, result.request_id)

    async def _attempt(self, call: Call) -> T | KaizenError:
        """Make one attempt: wait for a turn, send, read the response, and tell the health of the server."""
        queued_at = self._now()
        if call.attempts and call.begun is None:
            self._begin_another(call)
        turn = call.begun.number if call.begun else self._refusal(call) or await self._take_turn(call)
        if isinstance(turn, KaizenError):
            turn.__cause__ = turn.__cause__ or call.last_error
            return self._noted(call, turn)
        result = await self._exchange(call, turn, queued_at)
        if not isinstance(result, KaizenError):
            self._note(call, "%s: attempt %d got the record")
            return result
        if verdict(result) is Verdict.REFUSED:
            await self._await_confirmation(turn)
        return self._noted(call, result)

    def _begin_another(self, call: Call) -> None:
        """Send the next request of a lookup at once, if nothing is in the way and there is no event to report."""
        if self._hedging is not None or self._on_event is not None or self._distrusts_pool(call.last_error):
            return
        body = request_body(call.execution_id)
        call.begun = self.engine.begin(self._url, body, self._health, self._now(), call.deadline_at)
        if call.begun is not None:
            call.sent_at = call.begun.sent_at
            call.attempts += 1
            self._counters.attempts += 1

    def _take_turn(self, call: Call) -> Coroutine[Any, Any, int | KaizenError]:
        return self.engine.take_turn(self._health, call.deadline_at, patience=call.patience)

    async def _exchange(self, call: Call, number: int, queued_at: float) -> T | KaizenError:
        """Send, read the response, and report it under the request's number; then give the turn back."""
        if call.on_turn is not None and not call.attempts:
            call.on_turn()
        self._begin_turn(call, number)
        try:
            fresh = self._distrusts_pool(call.last_error)
            key = self.engine.key
            if key is None:
                result = await self._send(call, number, queued_at, fresh=fresh)
            else:
                result = await self._send_with(key, call, number, queued_at, fresh=fresh)
            if call.number is not None and isinstance(result, NotFoundError) and self._is_doubtful(call, result):
                result = await self._send(call, call.number, self._now(), fresh=True)
            self._report(call, result)
            return result
        finally:
            if call.number is not None:
                self._health.abandoned(call.number)
                self._end_turn(call)

    async def _send_with(
        self, key: RotatingKey, call: Call, number: int, queued_at: float, *, fresh: bool
    ) -> T | KaizenError:
        """Send one request with a key of the user's function; if the server refuses the key, once more with another."""
        refusal = await self.engine.renew_key(key, 0, call.deadline_at)
        if refusal is not None:
            return refusal
        key_number = key.number
        result = await self._send(call, number, queued_at, fresh=fresh)
        is_refused = isinstance(result, AuthenticationError) and result.status == HTTPStatus.UNAUTHORIZED
        if not is_refused or call.number is None:
            return result
        refusal = await self.engine.renew_key(key, key_number, call.deadline_at)
        return refusal or await self._send(call, call.number, self._now())

    def _send(
        self, call: Call, number: int, queued_at: float, *, fresh: bool = False
    ) -> Coroutine[Any, Any, T | KaizenError]:
        """Send one request, or two if the first is slow and the client hedges; read the response."""
        if self._hedging is None:
            return self._send_once(call, number, queued_at, fresh=fresh)
        return self._send_hedged(self._hedging, call, number, queued_at, fresh=fresh)

    async def _send_hedged(
        self, hedging: Hedging, call: Call, number: int, queued_at: float, *, fresh: bool
    ) -> T | KaizenError:
        first = self._send_once(call, number, queued_at, fresh=fresh)
        if hedging.delay is None:
            result = await first
        else:
            race: Race[T | KaizenError] = Race(
                self.engine.clock,
                hedging,
                hedging.delay,
                lambda: call.sent_at,
                partial(self._hedge, call),
            )
            finished = await race.run(first, partial(self._is_good, call))
            if race.winner is None:
                assert finished is not None  # noqa: S101 - without a winner, the first has run to its end
                result = finished
            else:
                result = race.winner
                if finished is not None:
                    self._report(call, finished)
                elif call.number is not None:
                    self._health.abandoned(call.number)
                    self._end_turn(call)
        if call.sent_at is not None and self._is_good(call, result):
            hedging.observe(self._now() - call.sent_at)
        return result

    def _is_good(self, call: Call, result: T | KaizenError) -> bool:
        """Return whether a response says all that there is to say about the id."""
        if isinstance(result, NotFoundError):
            return verdict(result) is Verdict.NOT_FOUND and not self._is_doubtful(call, result)
        return not isinstance(result, KaizenError)

    async def _hedge(self, call: Call, race: Race[T | KaizenError]) -> None:
        """Send the request of an attempt a second time, in a turn of its own, unless the server is not well."""
        turn = await self.engine.take_turn(self._health, call.deadline_at, is_urgent=True)
        if isinstance(turn, KaizenError):
            return
        result: T | KaizenError | None = None
        try:
            if not self._health.engaged:
                result = await self._send_second(call, turn, race)
        finally:
            if result is None:
                self._health.abandoned(turn)
            elif isinstance(result, KaizenError):
                self._health.failed(turn, result, call.execution_id)
                self._counters.throttled += verdict(result) is Verdict.THROTTLED
            else:
                self._health.accepted(turn)
            self.engine.end_turn()

    async def _send_second(self, call: Call, number: int, race: Race[T | KaizenError]) -> T | KaizenError | None:
        """Send the second request of an attempt; return None if it was not sent, or there is no connection for it."""
        race.is_second_sent = True
        self._counters.attempts += 1
        self._counters.hedges += 1
        self.engine.hedges_in_flight += 1
        began = self._now()
        answer: Answer | KaizenError | NoConnectionError | None = None
        result: T | KaizenError | None = None
        trace: RequestTrace | None = None
        self._note(call, "%s: attempt %d is slow, so a second request is sent")
        try:
            if self._on_event is not None:
                headers: dict[str, str] = {}
                after = 0.0 if call.sent_at is None else began - call.sent_at
                self._on_event(HedgeStarted(call.execution_id, self.url, call.attempts, after, headers))
                trace = begin_trace(headers)
            body = request_body(call.execution_id)
            answer = await self.engine.send(self._url, body, call.deadline_at, partial(self._health.is_held, number))
            if isinstance(answer, Answer):
                result = self._read(call, answer)
            elif isinstance(answer, KaizenError):
                result = answer
            else:
                race.is_second_sent = answer is not None and answer.was_sent
            if result is not None and self._is_good(call, result):
                race.win(result)
            return result
        finally:
            self.engine.hedges_in_flight -= 1
            won = race.winner is not None
            elapsed = self._now() - began
            status = answer.status if isinstance(answer, Answer) else None if trace is None else trace.status
            if race.is_second_sent:
                self._counters.note_attempt(elapsed, status)
                self._counters.hedges_won += won
            else:
                self._counters.attempts -= 1
                self._counters.hedges -= 1
            if self._on_event is not None:
                error = result if isinstance(result, KaizenError) and not won else None
                peer = None if trace is None else trace.peer
                self._on_event(
                    HedgeEnded(call.execution_id, self.url, call.attempts, elapsed, status, error, won, peer)
                )

    async def _send_once(self, call: Call, number: int, queued_at: float, *, fresh: bool = False) -> T | KaizenError:
        """Send one request, and read the response.

        If a pause begins while a connection is made, take another turn. If there cannot be a connection, wait for one.
        """
        begun, call.begun = call.begun, None
        if begun is None:
            call.attempts += 1
            self._counters.attempts += 1
        call.request_id = call.status = None
        answer: Answer | KaizenError | NoConnectionError | None = None
        result: T | KaizenError | None = None
        request = self._url, request_body(call.execution_id), call.deadline_at
        try:
            if begun is not None:
                if self._on_lookup is not None:
                    self._on_lookup(AttemptStarted(call.execution_id, self.url, 1, 0.0))
                answer = await self.engine.receive(begun)
            else:
                self._note_start(call, queued_at)
                answer = await self.engine.send(*request, partial(self._health.is_held, number), fresh=fresh)
            while answer is None or isinstance(answer, NoConnectionError):
                if answer is None:
                    self._note_held(call)
                    self._health.abandoned(number)
                    self._end_turn(call)
                    turn = await self._take_turn(call)
                    if isinstance(turn, KaizenError):
                        call.attempts -= 1
                        self._counters.attempts -= 1
                        answer = turn
                        break
                    number = call.number = turn
                    self._note_start(call, queued_at)
                elif (failure := await self._await_connection(call, answer, queued_at)) is not None:
                    answer = failure
                    break
                answer = await self.engine.send(*request, partial(self._health.is_held, number), fresh=fresh)
            result = self._read(call, answer) if isinstance(answer, Answer) else answer
            return result
        finally:
            self._note_end(call, answer, result)

    @staticmethod
    def _begin_turn(call: Call, number: int) -> None:
        # Set in the open, a type checker would take the number for set until the end: what is awaited may take it back.
        call.number = number

    async def _await_connection(self, call: Call, shortage: NoConnectionError, queued_at: float) -> KaizenError | None:
        """Wait until a connection may be free; return why if none will be.

        If the request was sent on a connection too many, it is sent again. That is counted as a request, but does not
        count against the retry policy and the retry budget.
        """
        error = self.engine.transport.no_connection(shortage)
        if shortage.was_sent:
            self._note_end(call, error, error)
            call.sent_at = None
            queued_at = self._now()
        failure = await self.engine.await_connection(self._url, call.deadline_at, shortage)
        if failure is None and shortage.was_sent:
            if self._on_event is not None:
                self._on_event(RetryScheduled(call.execution_id, self.url, call.attempts, 0.0, error))
            call.attempts += 1
            self._counters.attempts += 1
            self._counters.retries += 1
            self._note_start(call, queued_at)
        elif isinstance(failure, DeadlineExceededError | ClientClosedError) and not shortage.was_sent:
            call.attempts -= 1
            self._counters.attempts -= 1
            self._note_held(call)
        return failure

    def _end_turn(self, call: Call) -> None:
        call.number = None
        self.engine.end_turn()

    def _distrusts_pool(self, error: KaizenError | None) -> bool:
        """Return whether another connection of the pool may fail in the same way: by silence, or out of step."""
        is_out_of_step = isinstance(error, DecodeError) and error.path == self.endpoint.id_path
        return is_out_of_step or isinstance(error, AttemptTimeoutError)

    def _is_doubtful(self, call: Call, error: NotFoundError) -> bool:
        """Return whether a 404 that names no id may belong to another request: the client has seen such responses."""
        return self.engine.transport.is_out_of_step and call.execution_id.encode() not in error.body

    def _report(self, call: Call, result: T | KaizenError) -> None:
        """Tell the health of the server what became of the request, and give its turn back."""
        if call.number is None:
            return
        if not isinstance(result, KaizenError):
            self._health.accepted(call.number)
        else:
            self._health.failed(call.number, result, call.execution_id)
            is_rejection = verdict(result) is Verdict.THROTTLED
            self._counters.throttled += is_rejection
            most_excused = EXCUSED_PER_RETRY * (self.policy.max_attempts - 1)
            if is_rejection and self._health.pause is None and call.excused < most_excused:
                call.excused += 1
            elif not self._health.is_blamed(result):
                call.spent += 1
        self._end_turn(call)

    async def _await_confirmation(self, number: int) -> None:
        """Wait until it is clear whether a refusal is about one id or about the key: others in flight will tell."""
        until = self._now() + LONGEST_DOUBT
        with suppress(ClientClosedError):  # the lookup has a result already
            while self._health.is_doubtful(number) and self._now() < until:
                await self.engine.pause(DOUBT_STEP)

    def _note_start(self, call: Call, queued_at: float) -> None:
        """Note that a request is about to be sent."""
        call.sent_at = self._now()
        if self._on_event is not None:
            headers: dict[str, str] = {}
            waited = call.sent_at - queued_at
            self._on_event(AttemptStarted(call.execution_id, self.url, call.attempts, waited, headers))
            call.trace = begin_trace(headers)

    def _note_held(self, call: Call) -> None:
        """Note that it was not sent after all, so that the time from now on is not the network's."""
        call.sent_at = None
        if self._on_event is not None:
            self._on_event(AttemptHeld(call.execution_id, self.url, call.attempts))

    def _note_end(
        self, call: Call, answer: Answer | KaizenError | NoConnectionError | None, result: T | KaizenError | None
    ) -> None:
        """Note what became of a request, if it was sent."""
        if call.sent_at is None:
            return
        elapsed = self._now() - call.sent_at
        trace = call.trace
        status = answer.status if isinstance(answer, Answer) else None if trace is None else trace.status
        self._counters.note_attempt(elapsed, status)
        if self._on_event is not None:
            error = result if isinstance(result, KaizenError) else None
            peer = None if trace is None else trace.peer
            self._on_event(AttemptEnded(call.execution_id, self.url, call.attempts, elapsed, status, error, peer))

    def _refusal(self, call: Call) -> KaizenError | None:
        """Return why nothing more may be sent for a lookup, if so."""
        if self.engine.closed:
            return ClientClosedError("the client is closed; create a new KaizenClient")
        if call.deadline_at <= self._now():
            return DeadlineExceededError("its deadline passed before an attempt could be made")
        return None

    def _noted(self, call: Call, error: KaizenError) -> KaizenError:
        error.execution_id = call.execution_id
        if isinstance(error, DeadlineExceededError | ClientClosedError):
            error.__cause__ = error.__cause__ or call.last_error
        else:
            call.last_error = error
        self._note(call, "%s: attempt %d failed: %s", error.reason, error=error)
        return error

    def _note(
        self,
        call: Call,
        template: str,
        *details: object,
        attempt: int | None = None,
        error: KaizenError | None = None,
        **fields: Any,
    ) -> None:
        """Log what became of an attempt, with what a log line is grouped and searched by."""
        if not log.isEnabledFor(logging.DEBUG):
            return
        fields["attempt"] = call.attempts
        if call.sent_at is not None:
            fields["elapsed"] = self._now() - call.sent_at
        if error is not None:
            fields["error_type"] = type(error).__name__
        if call.status is not None:
            fields["status"] = call.status
        _log(call.execution_id, template, call.attempts if attempt is None else attempt, *details, **fields)

    def _read(self, call: Call, answer: Answer) -> T | KaizenError:
        error: KaizenError
        call.request_id = self.engine.transport.request_id(answer)
        call.status = answer.status
        if not 200 <= answer.status < 300:  # noqa: PLR2004 - the class of successes
            return self._refused(call, answer)
        try:
            record = self.endpoint.decode(answer.body, call.execution_id)
        except DecodeError as misfit:
            if misfit.path == self.endpoint.id_path:
                self.engine.transport.reject()
            error = misfit.with_traceback(None)
        else:
            self._received.put(self.endpoint, call.execution_id, record, self._now(), answer.body)
            return record
        if call.request_id is not None:
            error.request_id = call.request_id
        return self.engine.transport.withhold(error)

    def _refused(self, call: Call, answer: Answer) -> KaizenError:
        """Return the error for a response outside 2xx. Equal responses of the same moment are read once."""
        now = self._now()
        if self._refusal_read is not None:
            read, read_at, (make, state) = self._refusal_read
            if read.headers is answer.headers and read.body == answer.body and now - read_at < SAME_MOMENT:
                return cast("KaizenError", make(*state))
        error = status_error(answer.status, answer.headers, answer.body, retried=self.policy.statuses, now=time.time())
        if call.request_id is not None:
            error.request_id = call.request_id
        self.engine.transport.withhold(error)
        self._refusal_read = answer, now, error.__reduce__()
        return error

    async def _back_off(self, call: Call, delay: float) -> None:
        if call.on_back_off is None or delay <= 0:
            await self.engine.pause(delay)
            return
        call.on_back_off(True)  # noqa: FBT003 - a callback with one argument
        try:
            await self.engine.pause(delay)
        finally:
            call.on_back_off(False)  # noqa: FBT003 - the same

    async def _retry(self, call: Call, first: KaizenError) -> T | KaizenError:
        try:
            result = await self._retrier.run(first, call, self._attempt, self._back_off, self._note_retry)
        except ClientClosedError as error:
            return self._noted(call, error.with_traceback(None))
        if self._on_event is not None and isinstance(result, KaizenError) and result.gave_up == OVER_BUDGET:
            self._on_event(BudgetRefused(call.execution_id, self.url, call.attempts, result))
        return result

    def _note_retry(self, call: Call, error: KaizenError, delay: float) -> None:
        """Note that another attempt follows a failed one."""
        self._counters.retries += 1
        when = f"in {seconds(delay)}" if delay else "in its turn"
        self._note(
            call,
            "%s: attempt %d follows %s, since %s",
            when,
            error.reason,
            attempt=call.attempts + 1,
            error=error,
            delay=delay,
        )
        if self._on_event is not None:
            self._on_event(RetryScheduled(call.execution_id, self.url, call.attempts, delay, error))


def _log(execution_id: str, template: str, *details: object, **fields: Any) -> None:
    """Log what became of a lookup, with fields for logs as JSON. The id is foreign text: it may come from a URL."""
    shown = printable(execution_id)
    log.debug(template, shown, *details, extra={"execution_id": shown, **fields})


def _only_lacked_time(error: KaizenError | None, time_left: float) -> bool:
    """Return whether a lookup failed for lack of time only, and a caller with that much time may do better."""
    if isinstance(error, DeadlineExceededError):
        return True
    return error is not None and error.next_attempt_in is not None and error.next_attempt_in < time_left


def separate(outcome: Outcome[T]) -> Outcome[T]:
    """Return an equal outcome whose error another task can raise without adding to the first one's traceback."""
    if outcome.error is None:
        return outcome
    error = copy.copy(outcome.error)
    error.__cause__ = outcome.error.__cause__
    return msgspec.structs.replace(outcome, error=error)
