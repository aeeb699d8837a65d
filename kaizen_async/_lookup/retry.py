"""When a failed attempt is followed by another. tenacity decides that; it stays in this file.

A lookup only reads: sending it twice is safe, whatever became of the first. That one fact is why this library may
retry, share one request between callers who ask for the same id, and poll.

Attempts return their errors instead of raising them, so that no traceback ties tenacity's state to the error, and
cancellation, which is always raised, is never taken for a failed attempt.
"""

from collections.abc import Awaitable, Callable
from random import Random
from typing import Any, Final, Protocol, TypeGuard, TypeVar

from tenacity import DoSleep, RetryCallState, Retrying

from kaizen_async._lookup.health import Health
from kaizen_async._lookup.verdicts import Verdict, verdict
from kaizen_async.config import RetryPolicy
from kaizen_async.errors import KaizenError, StatusError, TransportError, seconds

T = TypeVar("T")

OVER_BUDGET: Final = "the client's retry budget is used up, since too many lookups are failing"
"""What the last error of a lookup says in `gave_up` that the retry budget refused another attempt."""

REJECTED_SHARE: Final = 0.25
"""Share of the first back-off that is the longest one after a rejection that does not count as an attempt: it says
nothing about the lookup, and the pace spares the server."""


class Retried(Protocol):
    """What is retried: a lookup.

    Attributes:
        spent: Attempts that count against the policy: those that failed in a pause for all do not.
        deadline_at: The time at which the lookup ends.
    """

    spent: int
    deadline_at: float


C = TypeVar("C", bound=Retried)


class State(RetryCallState):
    """What tenacity knows of one lookup.

    Attributes:
        retried: The lookup.
        failure: The error of the last attempt.
        garbled: Responses that could not be read.
    """

    failure: KaizenError

    def __init__(self, retrying: Retrying, retried: Retried) -> None:
        super().__init__(retrying, None, (), {})
        self.retried = retried
        self.garbled = 0


class Retrier:
    """Decides about waits and ends for the lookups of one kind under one policy.

    Args:
        health: Of the server.
        random: Spreads the waits.
        policy: Bounds attempts and waits.
        now: Returns the time that deadlines count in.
    """

    def __init__(self, health: Health, random: Random, policy: RetryPolicy, now: Callable[[], float]) -> None:
        self._health = health
        self._random = random
        self._policy = policy
        self._now = now
        # One for all lookups: it keeps what it knows of each in a state that belongs to the lookup, and each of its
        # steps ends before another lookup can take one.
        decisions: dict[str, Any] = {"wait": self._wait, "stop": self._stops, "retry": self._is_retried}
        self._retrying = Retrying(**decisions, retry_error_callback=lambda _: None)

    async def run(
        self,
        first: KaizenError,
        retried: C,
        attempt: Callable[[C], Awaitable[T | KaizenError]],
        sleep: Callable[[C, float], Awaitable[None]],
        before_sleep: Callable[[C, KaizenError, float], None],
    ) -> T | KaizenError:
        """Return the result of the first attempt that needs no other, or the last error.

        Args:
            first: The error of the attempt already made. It counts: making that attempt outside spares every lookup
                that succeeds at once the cost of tenacity.
            retried: The lookup; every function below is called with it.
            attempt: Makes another attempt.
            sleep: Waits that many seconds between attempts; may raise to end the call.
            before_sleep: Called with the error and the seconds before each wait.
        """
        # tenacity's own loop for coroutines inspects every callback at every step, which costs more than the request.
        self._retrying.begin()  # tenacity keeps statistics for each thread
        state = State(self._retrying, retried)
        result: T | KaizenError = first
        while isinstance(result, KaizenError):
            state.failure = result
            state.set_result(result)
            step = self._retrying.iter(state)
            if not isinstance(step, DoSleep):
                break
            before_sleep(retried, result, step)
            state.prepare_for_next_attempt()
            await sleep(retried, step)
            result = await attempt(retried)
        return result

    def _is_retried(self, state: State) -> bool:
        return self.is_worth_retrying(state.failure)

    def is_worth_retrying(self, result: object) -> TypeGuard[KaizenError]:
        """Return whether another attempt may lead to another result."""
        return isinstance(result, KaizenError) and (result.retryable or self._health.is_confirming(result))

    def _wait(self, state: State) -> float:
        """Return the seconds before the next attempt.

        In a pause it is 0: the pause holds everyone back, this lookup included, and it may be the next probe.
        """
        failure, spent, policy = state.failure, state.retried.spent, self._policy
        if self._health.pause is not None:
            return 0.0
        if spent == 1 and isinstance(failure, TransportError) and failure.disconnected:
            return 0.0
        return max(self._random.uniform(0.0, longest_backoff(policy, spent)), _retry_after(failure))

    def _stops(self, state: State) -> bool:
        """Return whether no attempt follows, and write the reason into the error."""
        failure = state.failure
        failure.gave_up = self._reason_to_stop(state, failure, state.retried)
        return failure.gave_up is not None

    def _reason_to_stop(self, state: State, failure: KaizenError, retried: Retried) -> str | None:
        """Return why there is no next attempt ("" if the number of attempts says it all), or None if there is one."""
        if failure.gave_up is not None:
            return failure.gave_up
        spent, policy = retried.spent, self._policy
        said = verdict(failure)
        state.garbled += said is Verdict.GARBLED
        if self._health.is_blamed(failure):
            if policy.max_attempts == 1:
                return ""
        elif spent >= policy.max_attempts:
            return ""
        elif said is Verdict.GARBLED and state.garbled > 1:
            return "a second response was no better"
        wait = max(state.upcoming_sleep, _retry_after(failure))
        if wait >= retried.deadline_at - self._now():
            failure.next_attempt_in = wait
            return f"the next attempt would come in {seconds(wait)}, after the deadline"
        is_free = said is Verdict.THROTTLED or self._health.pause is not None
        if policy.budgeted and not is_free and not self._health.may_retry():
            return OVER_BUDGET
        return None


def longest_backoff(policy: RetryPolicy, spent: int) -> float:
    """Return the most seconds to wait after so many attempts that count."""
    if not spent:  # the server rejected the request while it accepted others
        return min(policy.max_backoff, policy.initial_backoff * REJECTED_SHARE)
    return min(policy.max_backoff, policy.initial_backoff * 2.0 ** min(spent - 1, 64))


def _retry_after(failure: KaizenError) -> float:
    return (failure.retry_after or 0.0) if isinstance(failure, StatusError) else 0.0
