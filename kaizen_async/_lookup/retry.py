"""When a failed attempt is followed by another. tenacity decides that; it stays in this file.

A lookup only reads: sending it twice is safe, whatever became of the first. That one fact is why this library may
retry, share one request between callers who ask for the same id, and poll.

Attempts return their errors instead of raising them, so that no traceback ties tenacity's state to the error, and
cancellation, which is always raised, is never taken for a failed attempt.
"""

from collections.abc import Awaitable, Callable
from random import Random
from typing import Any, Final, TypeGuard, TypeVar, cast

from tenacity import DoAttempt, DoSleep, Future, RetryCallState, Retrying
from tenacity.retry import retry_if_result

from kaizen_async._lookup.health import Health
from kaizen_async._lookup.verdicts import Verdict, verdict
from kaizen_async.config import RetryPolicy
from kaizen_async.errors import KaizenError, StatusError, TransportError, seconds

T = TypeVar("T")

OVER_BUDGET: Final = "the client's retry budget is used up, since too many lookups are failing"
"""What the last error of a lookup says in `gave_up` that the retry budget refused another attempt."""


class Retrier:
    """Decides about waits and ends for the lookups of one kind."""

    def __init__(self, health: Health, random: Random) -> None:
        self._health = health
        self._random = random

    async def run(
        self,
        first: KaizenError,
        attempt: Callable[[], Awaitable[T | KaizenError]],
        *,
        policy: RetryPolicy,
        spent: Callable[[], int],
        time_left: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
        before_sleep: Callable[[KaizenError, float], None],
    ) -> T | KaizenError:
        """Return the result of the first attempt that needs no other, or the last error.

        Args:
            first: The error of the attempt already made. It counts: making that attempt outside spares every lookup
                that succeeds at once the cost of tenacity.
            attempt: Makes another attempt.
            policy: Bounds attempts and waits.
            spent: Attempts that count against the policy: those that failed in a pause for all do not.
            time_left: Seconds until the deadline.
            sleep: Waits between attempts; may raise to end the call.
            before_sleep: Called with the error and the seconds before each wait.
        """

        def wait(state: RetryCallState) -> float:
            return self._wait(_failure(state), spent(), policy)

        def stop(state: RetryCallState) -> bool:
            failure = _failure(state)
            reason = self._reason_to_stop(failure, spent(), state.upcoming_sleep, policy, time_left())
            failure.gave_up = reason
            return reason is not None

        # tenacity's own loop for coroutines inspects every callback at every step, which costs more than the request.
        retrying = Retrying(
            wait=wait,
            stop=stop,
            retry=retry_if_result(self.is_worth_retrying),
            before_sleep=lambda state: before_sleep(_failure(state), state.upcoming_sleep),
            retry_error_callback=_failure,
        )
        retrying.begin()
        state = RetryCallState(retrying, None, (), {})
        state.set_result(first)
        try:
            while True:
                step = retrying.iter(state)
                if isinstance(step, DoAttempt):
                    state.set_result(await attempt())
                elif isinstance(step, DoSleep):
                    state.prepare_for_next_attempt()
                    await sleep(step)
                else:
                    return cast("T | KaizenError", step)
        finally:
            # tenacity's state refers to itself by way of its actions: without this, only the cycle collector frees it.
            retrying.iter_state.reset()

    def is_worth_retrying(self, result: object) -> TypeGuard[KaizenError]:
        """Return whether another attempt may lead to another result."""
        return isinstance(result, KaizenError) and (result.retryable or self._health.is_confirming(result))

    def _wait(self, failure: KaizenError, spent: int, policy: RetryPolicy) -> float:
        """Return the seconds before the next attempt.

        In a pause it is 0: the pause holds everyone back, this lookup included, and it may be the next probe.
        """
        if self._health.pause is not None:
            return 0.0
        if spent == 1 and isinstance(failure, TransportError) and failure.disconnected:
            return 0.0
        ceiling = min(policy.max_backoff, policy.initial_backoff * 2.0 ** min(max(spent - 1, 0), 64))
        backoff = self._random.uniform(0.0, ceiling)
        return max(backoff, _retry_after(failure))

    def _reason_to_stop(
        self, failure: KaizenError, spent: int, upcoming: float, policy: RetryPolicy, time_left: float
    ) -> str | None:
        """Return why there is no next attempt ("" if the number of attempts says it all), or None if there is one."""
        if failure.gave_up is not None:
            return failure.gave_up
        said = verdict(failure)
        if self._health.is_blamed(failure):
            if policy.max_attempts == 1:
                return ""
        elif spent >= policy.max_attempts:
            return ""
        elif said is Verdict.GARBLED and spent > 1:
            return "a second response was no better"
        wait = max(upcoming, _retry_after(failure))
        if wait >= time_left:
            failure.next_attempt_in = wait
            return f"the next attempt would come in {seconds(wait)}, after the deadline"
        is_free = said is Verdict.THROTTLED or self._health.pause is not None
        if policy.budgeted and not is_free and not self._health.may_retry():
            return OVER_BUDGET
        return None


def _failure(state: RetryCallState) -> Any:
    return cast("Future", state.outcome).result()


def _retry_after(failure: KaizenError) -> float:
    return (failure.retry_after or 0.0) if isinstance(failure, StatusError) else 0.0
