"""When a failed attempt is followed by another. tenacity runs the loop; it stays in this file.

A look-up only reads: sending it twice is safe, whatever became of the first. That one fact is why this library may
retry, share one request between callers who ask for the same id, and poll.

Attempts return their errors instead of raising them, so that no traceback ties tenacity's state to the error, and
cancellation, which is always raised, is never taken for a failed attempt.
"""

from collections.abc import Awaitable, Callable
from random import Random
from typing import Any, Final, TypeGuard, TypeVar, cast

from tenacity import AsyncRetrying, Future, RetryCallState
from tenacity.retry import retry_if_result

from kaizen_async._lookup.throttle import Gate, RetryBudget, is_throttling
from kaizen_async.config import RetryPolicy
from kaizen_async.errors import DecodeError, KaizenError, StatusError, TransportError, seconds

T = TypeVar("T")

OVER_BUDGET: Final = "the client's retry budget is used up, since too many look-ups are failing"
"""What the last error of a look-up says in `gave_up` that the retry budget refused another attempt."""


def is_retryable(result: object) -> TypeGuard[KaizenError]:
    """Return whether the result of an attempt is an error that another attempt may mend."""
    return isinstance(result, KaizenError) and result.retryable


def is_garbled(error: KaizenError) -> bool:
    """Return whether an answer came that could not be read. Worth one more attempt, not a series."""
    return isinstance(error, DecodeError) or (isinstance(error, TransportError) and error.garbled)


class Retrier:
    """Decides about waits and ends for the look-ups of one client."""

    def __init__(self, budget: RetryBudget, gate: Gate, random: Random) -> None:
        self._budget = budget
        self._gate = gate
        self._random = random

    async def run(
        self,
        first: KaizenError,
        attempt: Callable[[], Awaitable[T | KaizenError]],
        *,
        policy: RetryPolicy,
        time_left: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
        before_sleep: Callable[[KaizenError, float], None],
    ) -> T | KaizenError:
        """Return the result of the first attempt that needs no other, or the last error.

        Args:
            first: The retryable error of the attempt already made. It counts: making that attempt outside spares
                every look-up that succeeds at once the cost of tenacity.
            attempt: Makes another attempt.
            policy: Bounds attempts and waits.
            time_left: Seconds until the deadline.
            sleep: Waits between attempts; may raise to end the call.
            before_sleep: Told the error and the seconds before each wait.
        """
        made: list[KaizenError] = [first]

        async def replay_then_attempt() -> T | KaizenError:
            return made.pop() if made else await attempt()

        def wait(state: RetryCallState) -> float:
            return self._wait(_failure(state), state.attempt_number, policy)

        def stop(state: RetryCallState) -> bool:
            failure = _failure(state)
            failure.gave_up = self._reason_to_stop(failure, state, policy, time_left())
            return failure.gave_up is not None

        retrying = AsyncRetrying(
            sleep=sleep,
            wait=wait,
            stop=stop,
            retry=retry_if_result(is_retryable),
            before_sleep=lambda state: before_sleep(_failure(state), state.upcoming_sleep),
            retry_error_callback=_failure,
        )
        result: T | KaizenError = await retrying(replay_then_attempt)
        return result

    def _wait(self, failure: KaizenError, attempts: int, policy: RetryPolicy) -> float:
        """Return the seconds before the next attempt.

        After a throttling answer the gate holds everyone back, this look-up included; waiting here as well would only
        lose its place.
        """
        if is_throttling(failure):
            return 0.0
        if attempts == 1 and isinstance(failure, TransportError) and failure.disconnected:
            return 0.0
        ceiling = min(policy.max_backoff, policy.initial_backoff * 2.0 ** min(attempts - 1, 64))
        backoff = self._random.uniform(0.0, ceiling)
        return max(backoff, _retry_after(failure))

    def _reason_to_stop(
        self, failure: KaizenError, state: RetryCallState, policy: RetryPolicy, time_left: float
    ) -> str | None:
        """Return why there is no next attempt ("" if the number of attempts says it all), or None if there is one."""
        if state.attempt_number >= policy.max_attempts:
            return ""
        if is_garbled(failure) and state.attempt_number > 1:
            return "a second answer was no better"
        wait = max(state.upcoming_sleep, _retry_after(failure))
        if wait >= time_left:
            failure.next_attempt_in = wait
            return f"the next attempt would come in {seconds(wait)}, after the deadline"
        is_paced = is_throttling(failure) and not self._gate.is_barren
        if policy.budgeted and not is_paced and not self._budget.spend():
            return OVER_BUDGET
        return None


def _failure(state: RetryCallState) -> Any:
    return cast("Future", state.outcome).result()


def _retry_after(failure: KaizenError) -> float:
    return (failure.retry_after or 0.0) if isinstance(failure, StatusError) else 0.0
