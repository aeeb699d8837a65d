"""When a failed attempt is followed by another, and when not: the policy, the deadline, the budget."""

import asyncio
import gc
import weakref
from collections.abc import Sequence
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
from kaizen_async._lookup.retry import Retrier


class Longest(Random):
    """Draws the upper end of every range, so that waits show their bounds."""

    def uniform(self, a: float, b: float) -> float:
        """Return the upper end."""
        return b


def unavailable(retry_after: float | None = None) -> StatusError:
    """Return the error of a 503; it throttles only if it names a time."""
    return StatusError("unavailable", status=503, retry_after=retry_after, retryable=True)


def broken(retry_after: float | None = None) -> StatusError:
    """Return the error of a 500, which never throttles."""
    return StatusError("broken", status=500, retry_after=retry_after, retryable=True)


class Run:
    """One run of the retrier over scripted results.

    Attributes:
        waits: The seconds slept, in order.
        told: What `before_sleep` was told.
        attempts: How many attempts were made, the first included.
    """

    def __init__(
        self,
        results: Sequence[str | KaizenError],
        policy: RetryPolicy | None = None,
        *,
        time_left: float = 1e9,
        budget: float = RETRIES_AT_ONCE,
        random: Random | None = None,
    ) -> None:
        self.waits: list[float] = []
        self.told: list[tuple[KaizenError, float]] = []
        self.attempts = 1
        self.time_left = time_left
        self._results = list(results)
        self._policy = policy or RetryPolicy()
        self.health = Health(lambda: 0.0, Random(1))
        self.health._budget = budget
        self._retrier = Retrier(self.health, random or Longest())

    async def result(self) -> str | KaizenError:
        """Return what the retrier returns."""
        first = self._results.pop(0)
        assert isinstance(first, KaizenError)
        return await self._retrier.run(
            first,
            self._attempt,
            policy=self._policy,
            spent=lambda: self.attempts,
            time_left=lambda: self.time_left,
            sleep=self._sleep,
            before_sleep=lambda error, delay: self.told.append((error, delay)),
        )

    async def _attempt(self) -> str | KaizenError:
        self.attempts += 1
        await asyncio.sleep(0)
        return self._results.pop(0)

    async def _sleep(self, delay: float) -> None:
        self.waits.append(delay)
        self.time_left -= delay


async def test_the_back_off_doubles_from_its_first_value_to_its_last() -> None:
    """With the greatest draws, the waits show the bounds: initial times 2, 4, 8 …, at most `max_backoff`."""
    run = Run([broken()] * 8 + ["record"], RetryPolicy(max_attempts=9, initial_backoff=0.25, max_backoff=8))
    assert await run.result() == "record"
    assert run.waits == [0.25, 0.5, 1, 2, 4, 8, 8, 8]
    assert run.attempts == 9


async def test_the_back_off_is_drawn_from_zero_to_its_bound() -> None:
    """Full jitter: over many draws, the whole range is used evenly."""
    waits = []
    for seed in range(400):
        run = Run([broken(), "record"], RetryPolicy(initial_backoff=4), random=Random(seed))
        await run.result()
        waits += run.waits
    assert min(waits) < 0.1
    assert max(waits) > 3.9
    assert sum(waits) / len(waits) == pytest.approx(2, abs=0.2)


async def test_very_many_attempts_do_not_overflow() -> None:
    """The exponent is bounded, whatever `max_attempts` is."""
    run = Run([broken()] * 1100 + ["record"], RetryPolicy(max_attempts=2000, initial_backoff=1e-30, budgeted=False))
    assert await run.result() == "record"
    assert len(run.waits) == 1100
    assert max(run.waits) <= 8


@pytest.mark.parametrize("max_attempts", [1, 2, 5])
async def test_attempts_end_at_the_policys_number_with_the_last_error(max_attempts: int) -> None:
    """The number counts the first attempt; what comes out is the error itself, of the last attempt."""
    errors = [broken() for _ in range(10)]
    run = Run(errors, RetryPolicy(max_attempts=max_attempts))
    assert await run.result() is errors[max_attempts - 1]
    assert run.attempts == max_attempts
    assert len(run.waits) == max_attempts - 1
    assert errors[max_attempts - 1].gave_up == ""


async def test_an_error_that_is_not_retryable_ends_it_at_once() -> None:
    """After a 503 a 404 is as final as at first."""
    missing = NotFoundError("missing", status=404)
    run = Run([broken(), missing, "record"])
    assert await run.result() is missing
    assert run.attempts == 2
    assert missing.gave_up is None


async def test_a_longer_retry_after_replaces_the_back_off() -> None:
    """A server that asks for more time than the back-off gets it; one that asks for less does not shorten it."""
    run = Run([broken(retry_after=30), broken(retry_after=0.1), "record"], RetryPolicy(initial_backoff=1))
    assert await run.result() == "record"
    assert run.waits == [30, 2]


async def test_a_retry_after_beyond_the_deadline_ends_it_at_once() -> None:
    """The error comes out with its `retry_after`, and says why there was no further attempt."""
    error = RateLimitError("slow down", status=429, retry_after=3600, retryable=True)
    run = Run([error, "record"], time_left=5)
    assert await run.result() is error
    assert run.waits == []
    assert error.gave_up == "the next attempt would come in 3600 s, after the deadline"
    assert error.next_attempt_in == 3600


async def test_a_back_off_beyond_the_deadline_ends_it_at_once() -> None:
    """Nobody sleeps towards a deadline that passes first."""
    error = broken()
    run = Run([error, "record"], RetryPolicy(initial_backoff=2), time_left=2)
    assert await run.result() is error
    assert run.waits == []
    assert error.gave_up == "the next attempt would come in 2 s, after the deadline"
    just_in_time = Run([broken(), "record"], RetryPolicy(initial_backoff=2), time_left=2.01)
    assert await just_in_time.result() == "record"


async def test_the_first_retry_of_a_dropped_connection_does_not_wait() -> None:
    """A kept-alive connection that the server had just given up is the usual reason, and no reason to wait."""
    dropped = [TransportError("dropped", disconnected=True) for _ in range(3)]
    run = Run([*dropped, "record"], RetryPolicy(initial_backoff=1))
    assert await run.result() == "record"
    assert run.waits == [0, 2, 4]


async def test_another_transport_error_waits_like_any_other() -> None:
    """Refused or timed out says nothing about a stale connection."""
    run = Run([TransportError("refused"), AttemptTimeoutError("slow"), "record"], RetryPolicy(initial_backoff=1))
    assert await run.result() == "record"
    assert run.waits == [1, 2]


@pytest.mark.parametrize(
    "garbled", [TransportError("no HTTP", garbled=True), DecodeError("no JSON", path=None, retryable=True)]
)
async def test_an_unreadable_answer_is_retried_once(garbled: KaizenError) -> None:
    """A second one that is no better ends it, though attempts are left."""
    run = Run([garbled, "record"])
    assert await run.result() == "record"
    run = Run([garbled, garbled, "record"])
    assert await run.result() is garbled
    assert run.attempts == 2
    assert garbled.gave_up == "a second answer was no better"


async def test_retries_draw_on_the_budget_and_stop_without() -> None:
    """The error of the attempt comes out, and says that the client as a whole is failing."""
    run = Run([broken() for _ in range(4)], budget=2)
    error = await run.result()
    assert isinstance(error, StatusError)
    assert run.attempts == 3
    assert run.health._budget == 0
    assert error.gave_up == "the client's retry budget is used up, since too many lookups are failing"


async def test_a_policy_outside_the_budget_neither_asks_nor_spends() -> None:
    """`budgeted=False` retries whatever the budget says."""
    run = Run([broken(), broken(), "record"], RetryPolicy(budgeted=False), budget=0)
    assert await run.result() == "record"
    assert run.health._budget == 0


async def test_retries_after_throttling_are_free() -> None:
    """The pace holds them back; the budget is for failures."""
    run = Run([unavailable(1), RateLimitError("x", status=429, retryable=True), "record"])
    assert await run.result() == "record"
    assert run.health._budget == RETRIES_AT_ONCE


async def test_an_attempt_that_is_not_granted_costs_nothing() -> None:
    """Neither the last attempt nor one beyond the deadline takes from the budget for a retry that does not come."""
    for run in (Run([broken()], RetryPolicy(max_attempts=1)), Run([broken()], time_left=0.0)):
        await run.result()
        assert run.health._budget == RETRIES_AT_ONCE


async def test_an_error_that_says_why_nothing_was_sent_is_the_last() -> None:
    """It is retryable, but not by this lookup."""
    refusal = broken()
    refusal.gave_up = "the server has been failing for 60 s"
    run = Run([broken(), refusal, "record"])
    assert await run.result() is refusal
    assert refusal.gave_up == "the server has been failing for 60 s"


async def test_each_wait_is_announced() -> None:
    """`before_sleep` hears of the error and the seconds, for logs and counts."""
    first, second = broken(), broken()
    run = Run([first, second, "record"], RetryPolicy(initial_backoff=1))
    await run.result()
    assert run.told == [(first, 1), (second, 2)]


async def test_what_the_sleep_raises_ends_the_call() -> None:
    """Closing the client ends a back-off that way."""

    class Interrupted(Run):
        async def _sleep(self, delay: float) -> None:
            raise KeyError("closed")

    with pytest.raises(KeyError, match="closed"):
        await Interrupted([broken(), "record"]).result()


async def test_what_an_attempt_raises_is_never_retried() -> None:
    """Failures are returned; an exception is a bug, and comes out as it is."""

    class Buggy(Run):
        async def _attempt(self) -> str | KaizenError:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await Buggy([broken(), "record"]).result()


@pytest.mark.parametrize("where", ["_attempt", "_sleep"])
async def test_cancellation_passes_through(where: str) -> None:
    """It is neither swallowed nor taken for a failed attempt."""
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
    assert run.attempts == 1


@virtual_time
async def test_two_hundred_calls_at_once_do_not_mix() -> None:
    """Each call has retry state of its own: its own number of attempts and its own result."""
    retrier = Retrier(Health(lambda: 0.0, Random(1)), Random(1))

    async def call(number: int) -> None:
        results: list[str | KaizenError] = [broken() for _ in range(number % 5)]
        results.append(f"record {number}")
        made = 1

        async def attempt() -> str | KaizenError:
            nonlocal made
            made += 1
            await asyncio.sleep(number % 7 / 10)
            return results.pop(0)

        result = await retrier.run(
            broken(),
            attempt,
            policy=RetryPolicy(max_attempts=6, budgeted=False),
            spent=lambda: made,
            time_left=lambda: 1e9,
            sleep=asyncio.sleep,
            before_sleep=lambda _, __: None,
        )
        assert result == f"record {number}"
        assert made == number % 5 + 2

    await asyncio.gather(*(call(number) for number in range(200)))


async def test_an_exhausted_call_leaves_no_garbage() -> None:
    """The last error dies with its last reference: nothing waits for the garbage collector."""

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
    """Records, foreign errors and nothing at all are results."""
    retrier = Retrier(Health(lambda: 0.0, Random(1)), Random(1))
    assert retrier.is_worth_retrying(result) is retryable
