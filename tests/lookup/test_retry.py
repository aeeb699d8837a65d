"""A failed attempt is retried or not according to the policy, the deadline and the budget."""

import asyncio
import gc
import weakref
from collections.abc import Sequence
from functools import partial
from random import Random

import pytest
from virtual_time import virtual_time

from kaizen_async import (
    AttemptTimeoutError,
    DecodeError,
    KaizenError,
    NotFoundError,
    RateLimitError,
    RetryPolicy,
    StatusError,
    TransportError,
)
from kaizen_async._lookup.health import RETRIES_AT_ONCE, Health
from kaizen_async._lookup.retry import Retrier, longest_backoff


class Longest(Random):
    """A random source that returns the upper end of every range, so that waits show their bounds."""

    def uniform(self, a: float, b: float) -> float:
        """Return the upper end."""
        return b


def unavailable(retry_after: float | None = None) -> StatusError:
    """Return the error of a 503, which throttles only with a Retry-After."""
    return StatusError("unavailable", status=503, retry_after=retry_after, retryable=True)


def broken(retry_after: float | None = None) -> StatusError:
    """Return the error of a 500, which never throttles."""
    return StatusError("broken", status=500, retry_after=retry_after, retryable=True)


class Run:
    """One run of the retrier over scripted results.

    Attributes:
        waits: The waits in seconds, in order.
        reported: The arguments of `before_sleep`.
        spent: Number of attempts, including the first.
    """

    def __init__(
        self,
        results: Sequence[str | KaizenError],
        policy: RetryPolicy | None = None,
        *,
        time_left: float = 1e9,
        budget: float = RETRIES_AT_ONCE,
        random: Random | None = None,
        retrier: Retrier | None = None,
    ) -> None:
        self.waits: list[float] = []
        self.reported: list[tuple[KaizenError, float]] = []
        self.spent = 1
        self.deadline_at = time_left
        self._results = list(results)
        self.health = Health(lambda: 0.0, Random(1))
        self.health._budget = budget
        now = partial(sum, self.waits)
        self._retrier = retrier or Retrier(self.health, random or Longest(), policy or RetryPolicy(), now)

    async def result(self) -> str | KaizenError:
        """Return the result of the retrier."""
        first = self._results.pop(0)
        assert isinstance(first, KaizenError)
        return await self._retrier.run(
            first,
            self,
            lambda run: run._attempt(),
            lambda run, delay: run._sleep(delay),
            lambda run, error, delay: run.reported.append((error, delay)),
        )

    async def _attempt(self) -> str | KaizenError:
        self.spent += 1
        await asyncio.sleep(0)
        return self._results.pop(0)

    async def _sleep(self, delay: float) -> None:
        self.waits.append(delay)


async def test_the_back_off_doubles_from_its_first_value_to_its_last() -> None:
    """The bounds of the back-off are the initial value times 1, 2, 4 …, up to `max_backoff`."""
    run = Run([broken()] * 8 + ["record"], RetryPolicy(max_attempts=9, initial_backoff=0.25, max_backoff=8))
    assert await run.result() == "record"
    assert run.waits == [0.25, 0.5, 1, 2, 4, 8, 8, 8]
    assert run.spent == 9


async def test_the_back_off_is_drawn_from_zero_to_its_bound() -> None:
    """The back-off is drawn evenly between 0 and its bound."""
    waits = []
    for seed in range(400):
        run = Run([broken(), "record"], RetryPolicy(initial_backoff=4), random=Random(seed))
        await run.result()
        waits += run.waits
    assert min(waits) < 0.1
    assert max(waits) > 3.9
    assert sum(waits) / len(waits) == pytest.approx(2, abs=0.2)


async def test_very_many_attempts_do_not_overflow() -> None:
    """Any number of max_attempts works, because the exponent is bounded."""
    run = Run([broken()] * 1100 + ["record"], RetryPolicy(max_attempts=2000, initial_backoff=1e-30, budgeted=False))
    assert await run.result() == "record"
    assert len(run.waits) == 1100
    assert max(run.waits) <= 8


@pytest.mark.parametrize("max_attempts", [1, 2, 5])
async def test_attempts_end_at_the_policys_number_with_the_last_error(max_attempts: int) -> None:
    """The retrier returns the last error after max_attempts attempts, including the first."""
    errors = [broken() for _ in range(10)]
    run = Run(errors, RetryPolicy(max_attempts=max_attempts))
    assert await run.result() is errors[max_attempts - 1]
    assert run.spent == max_attempts
    assert len(run.waits) == max_attempts - 1
    assert errors[max_attempts - 1].gave_up == ""


async def test_an_error_that_is_not_retryable_ends_it_at_once() -> None:
    """An error that is not retryable ends the lookup, also after a retry."""
    missing = NotFoundError("missing", status=404)
    run = Run([broken(), missing, "record"])
    assert await run.result() is missing
    assert run.spent == 2
    assert missing.gave_up is None


async def test_a_longer_retry_after_replaces_the_back_off() -> None:
    """A Retry-After replaces a shorter back-off and does not shorten a longer one."""
    run = Run([broken(retry_after=30), broken(retry_after=0.1), "record"], RetryPolicy(initial_backoff=1))
    assert await run.result() == "record"
    assert run.waits == [30, 2]


async def test_a_retry_after_beyond_the_deadline_ends_it_at_once() -> None:
    """A Retry-After beyond the deadline ends the lookup at once, and the error says why."""
    error = RateLimitError("slow down", status=429, retry_after=3600, retryable=True)
    run = Run([error, "record"], time_left=5)
    assert await run.result() is error
    assert run.waits == []
    assert error.gave_up == "the next attempt would come in 3600 s, after the deadline"
    assert error.next_attempt_in == 3600


async def test_a_back_off_beyond_the_deadline_ends_it_at_once() -> None:
    """A back-off beyond the deadline ends the lookup at once instead of sleeping."""
    error = broken()
    run = Run([error, "record"], RetryPolicy(initial_backoff=2), time_left=2)
    assert await run.result() is error
    assert run.waits == []
    assert error.gave_up == "the next attempt would come in 2 s, after the deadline"
    just_in_time = Run([broken(), "record"], RetryPolicy(initial_backoff=2), time_left=2.01)
    assert await just_in_time.result() == "record"


async def test_the_first_retry_of_a_dropped_connection_does_not_wait() -> None:
    """The first retry after a dropped connection does not wait, because the server often just closed an idle one."""
    dropped = [TransportError("dropped", disconnected=True) for _ in range(3)]
    run = Run([*dropped, "record"], RetryPolicy(initial_backoff=1))
    assert await run.result() == "record"
    assert run.waits == [0, 2, 4]


async def test_another_transport_error_waits_like_any_other() -> None:
    """The retry after a refused connection or a timeout waits for the back-off."""
    run = Run([TransportError("refused"), AttemptTimeoutError("slow"), "record"], RetryPolicy(initial_backoff=1))
    assert await run.result() == "record"
    assert run.waits == [1, 2]


@pytest.mark.parametrize(
    "garbled", [TransportError("no HTTP", garbled=True), DecodeError("no JSON", path=None, retryable=True)]
)
async def test_an_unreadable_response_is_retried_once(garbled: KaizenError) -> None:
    """A second unreadable response ends the lookup, even if attempts are left."""
    run = Run([garbled, "record"])
    assert await run.result() == "record"
    run = Run([broken(), garbled, broken(), "record"])
    assert await run.result() == "record"
    run = Run([garbled, broken(), garbled, "record"])
    assert await run.result() is garbled
    assert run.spent == 3
    assert garbled.gave_up == "a second response was no better"


async def test_retries_draw_on_the_budget_and_stop_without() -> None:
    """Without a retry budget the lookup ends with its error, which says that the budget is used up."""
    run = Run([broken() for _ in range(4)], budget=2)
    error = await run.result()
    assert isinstance(error, StatusError)
    assert run.spent == 3
    assert run.health._budget == 0
    assert error.gave_up == "the client's retry budget is used up, since too many lookups are failing"


async def test_a_policy_outside_the_budget_neither_asks_nor_spends() -> None:
    """A policy with `budgeted=False` retries regardless of the budget and does not use it."""
    run = Run([broken(), broken(), "record"], RetryPolicy(budgeted=False), budget=0)
    assert await run.result() == "record"
    assert run.health._budget == 0


async def test_retries_after_throttling_are_free() -> None:
    """Retries after throttling do not use the budget, because the pace limits them."""
    run = Run([unavailable(1), RateLimitError("x", status=429, retryable=True), "record"])
    assert await run.result() == "record"
    assert run.health._budget == RETRIES_AT_ONCE


async def test_an_attempt_that_is_not_granted_costs_nothing() -> None:
    """A retry that does not happen does not use the budget."""
    for run in (Run([broken()], RetryPolicy(max_attempts=1)), Run([broken()], time_left=0.0)):
        await run.result()
        assert run.health._budget == RETRIES_AT_ONCE


async def test_an_error_that_says_why_nothing_was_sent_is_the_last() -> None:
    """An error that says why nothing was sent ends the lookup, although it is retryable."""
    refusal = broken()
    refusal.gave_up = "the server has been failing for 60 s"
    run = Run([broken(), refusal, "record"])
    assert await run.result() is refusal
    assert refusal.gave_up == "the server has been failing for 60 s"


async def test_each_wait_is_announced() -> None:
    """The retrier calls `before_sleep` with the error and the seconds of each wait."""
    first, second = broken(), broken()
    run = Run([first, second, "record"], RetryPolicy(initial_backoff=1))
    await run.result()
    assert run.reported == [(first, 1), (second, 2)]


async def test_an_error_of_the_sleep_ends_the_call() -> None:
    """An error of the sleep is raised, which is how a close ends a back-off."""

    class Interrupted(Run):
        async def _sleep(self, delay: float) -> None:
            raise KeyError("closed")

    with pytest.raises(KeyError, match="closed"):
        await Interrupted([broken(), "record"]).result()


async def test_an_exception_of_an_attempt_is_never_retried() -> None:
    """An exception of an attempt is a bug and is raised unchanged. Failures are returned instead."""

    class Buggy(Run):
        async def _attempt(self) -> str | KaizenError:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await Buggy([broken(), "record"]).result()


@pytest.mark.parametrize("where", ["_attempt", "_sleep"])
async def test_cancellation_passes_through(where: str) -> None:
    """A cancellation is raised and does not count as a failed attempt."""
    run = Run([broken(), "record"])
    waiting = asyncio.Event()

    async def hang(*_: object) -> None:
        waiting.set()
        await asyncio.Event().wait()

    setattr(run, where, hang)
    task = asyncio.create_task(run.result())
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert run.spent == 1


@virtual_time
async def test_two_hundred_calls_at_once_do_not_mix() -> None:
    """Concurrent calls of one retrier have their own numbers of attempts and results."""
    policy = RetryPolicy(max_attempts=6, budgeted=False)
    retrier = Retrier(Health(lambda: 0.0, Random(1)), Random(1), policy, lambda: 0.0)

    class Slow(Run):
        async def _attempt(self) -> str | KaizenError:
            await asyncio.sleep(len(self._results) % 7 / 10)
            return await super()._attempt()

    runs = [Slow([*(broken() for _ in range(number % 5 + 1)), f"{number}"], retrier=retrier) for number in range(200)]
    assert await asyncio.gather(*(run.result() for run in runs)) == [f"{number}" for number in range(200)]
    assert [run.spent for run in runs] == [number % 5 + 2 for number in range(200)]


async def test_a_rejection_that_does_not_count_waits_less() -> None:
    """After a rejection that is not an attempt, the longest back-off is a quarter of the first."""
    assert longest_backoff(RetryPolicy(initial_backoff=2), 0) == 0.5
    assert longest_backoff(RetryPolicy(initial_backoff=2, max_backoff=0.1), 0) == 0.1


async def test_an_exhausted_call_leaves_no_garbage() -> None:
    """The last error is freed with its last reference, without the garbage collector."""

    class TraceableError(StatusError):
        pass

    gc.collect()
    gc.disable()
    try:
        error = await Run([TraceableError("x", status=500, retryable=True) for _ in range(5)]).result()
        trace = weakref.ref(error)  # type: ignore[arg-type]
        del error
        assert trace() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("result", "retryable"),
    [
        (broken(), True),
        (TransportError("x"), True),
        (TransportError("x", retryable=False), False),
        (KaizenError("x"), False),
        ("record", False),
        (None, False),
        (ValueError("x"), False),
    ],
)
def test_only_a_retryable_error_of_ours_is_retryable(result: object, retryable: bool) -> None:
    """Only a retryable KaizenError is retried. Records, other exceptions and None are results."""
    retrier = Retrier(Health(lambda: 0.0, Random(1)), Random(1), RetryPolicy(), lambda: 0.0)
    assert retrier.is_worth_retrying(result) is retryable
