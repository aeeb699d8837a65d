"""A client's view of the server's health: its rules one by one, and against servers of all kinds."""

import math
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from simulated_servers import (
    Batch,
    Result,
    Server,
    by_chance,
    failure,
    fixed_window,
    in_turn,
    limited_concurrency,
    outage,
    refusal,
    rejection,
    sliding_window,
    token_bucket,
)

from kaizen_async._lookup.health import Health

SEEDS = range(10)


def paused(error: Any) -> Health:
    """Return the health of a server in a pause, with a clock that stands still at 0."""
    health = Health(lambda: 0.0, Random(0))
    for number in [health.send() for _ in range(40)]:
        health.failed(number, error, number)
    assert health.pause is not None
    return health


def test_a_cancelled_probe_is_replaced() -> None:
    """A cancelled probe is replaced at once if no other probe is in flight, so it does not extend a pause."""
    health = paused(failure())
    first, second = health.send(), health.send()
    assert health.delay() > 0
    health.abandoned(first)
    assert health.delay() > 0
    health.abandoned(second)
    assert health.delay() == 0


def test_probes_of_a_loop_that_ended_keep_nobody_waiting() -> None:
    """Probes of an event loop that has ended do not delay later requests."""
    health = paused(failure())
    health.send()
    health.forget_in_flight()
    assert not health.in_flight
    health.abandoned(health.send())
    assert health.delay() == 0


def test_a_used_up_retry_budget_is_reported_once_and_its_recovery_too(caplog: pytest.LogCaptureFixture) -> None:
    """One warning says that no retries are left, and one that they are back, also if nothing fails any more."""
    health = Health(lambda: 0.0, Random(0))
    while health.may_retry():
        pass
    assert not health.may_retry()
    for _ in range(200):
        health.lookups += 1
        health.accepted(health.send())
    assert [line.msg.partition(":")[0] for line in caplog.records] == ["many lookups fail", "fewer lookups fail"]


def limited() -> Any:
    """Return the error of nginx's rate limit: a 503 without a Retry-After."""
    return failure(503)


def in_a_second() -> Any:
    """Return the error of a 429 with Retry-After 1."""
    return rejection(1)


LIMITS: dict[str, tuple[Callable[[], Server], int, float, float, float]] = {
    "storm": (lambda: token_bucket(100, 20, in_a_second), 500, 4.8, 1.35, 1.12),
    "storm without a time": (lambda: token_bucket(100, 20), 500, 4.8, 1.25, 1.12),
    "storm, slow": (lambda: token_bucket(100, 20, in_a_second, latency=0.1), 500, 4.8, 1.38, 1.13),
    "nginx limit_req": (lambda: token_bucket(50, 10, limited), 300, 5.8, 2.5, 2.0),
    "1000/s": (lambda: token_bucket(1000, 200, in_a_second), 20_000, 20, 1.1, 1.03),
    "1000/s without a time": (lambda: token_bucket(1000, 100, latency=0.02), 5000, 4.9, 1.25, 1.04),
    "window of a second": (lambda: fixed_window(100, 1), 1000, 9, 1.45, 1.15),
    "haproxy http_req_rate": (lambda: sliding_window(100), 2000, 19, 1.25, 1.08),
    "10 at once": (lambda: limited_concurrency(10, 0.05), 600, 3, 1.5, 1.15),
    "10 at once, varying": (lambda: limited_concurrency(10, 0.05, 0.6), 2000, 10, 1.5, 1.15),
    "30 at once": (lambda: limited_concurrency(30, 0.05), 2000, 3.4, 1.6, 1.15),
    "nginx limit_conn": (lambda: limited_concurrency(10, 0.05, error=limited), 2000, 10, 1.33, 1.15),
}
"""Servers with a limit: lookups, the seconds that they take at least, and bounds of time and requests, as factors."""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_is_found_and_used(name: str, seed: int) -> None:
    """Under any kind of limit, no lookup is lost, few requests are wasted, and the limit is used fully."""
    server, count, floor, time_factor, request_factor = LIMITS[name]
    result = Batch(server(), count, seed=seed).run()
    assert result.found == count
    assert result.seconds <= time_factor * floor
    assert len(result.sent) <= request_factor * count


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("retry_after", [None, 1.0])
@pytest.mark.parametrize("latency", [0.02, 0.2])
def test_random_rejections_slow_nothing_down(latency: float, retry_after: float | None, seed: int) -> None:
    """If the server rejects one request in five at random, only the affected lookups are delayed."""
    server = by_chance(0.2, lambda: rejection(retry_after), latency, 0.002 if latency > 0.1 else None)
    count = int(200 / latency)
    result = Batch(server, count, seed=seed).run()
    assert result.lost <= 0.002 * count
    several_in_a_row = 6 if retry_after else 4
    assert result.seconds <= 1.8 * count * latency / 50 + several_in_a_row
    assert len(result.sent) <= 1.3 * count


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize(
    ("seconds", "latency", "error_latency"), [(0.3, 0.05, 0.03), (3, 0.05, 0.03), (3, 0.2, 0.001), (25, 0.02, 0.02)]
)
def test_a_short_outage_costs_only_time(
    seconds: float, latency: float, error_latency: float, gathered: bool, seed: int
) -> None:
    """In an outage within half the deadline no lookup is lost and few requests are sent.

    After two seconds all is normal.
    """
    count = int(2.5 * 50 / latency)
    result = Batch(outage(0.5, 0.5 + seconds, latency, error_latency), count, gathered=gathered, seed=seed).run()
    assert result.found == count
    during = sum(0.5 <= moment < 0.5 + seconds for moment in result.sent)
    assert during <= max(0.1 * seconds * 50 / latency, 75)
    undisturbed = count * latency * 1.1 / 50
    assert result.seconds <= undisturbed + seconds + 2


@pytest.mark.parametrize("seed", SEEDS)
def test_a_permanent_outage_ends_all_lookups(seed: int) -> None:
    """In a permanent outage, all lookups end together at the client's deadline, with few requests."""
    result = Batch(outage(0, math.inf), 5000, seed=seed).run()
    assert result.lost == 5000
    assert result.seconds <= 61
    assert len(result.sent) <= 0.3 * 5000


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("status", [500, 503])
@pytest.mark.parametrize(("share", "lost", "load"), [(1 / 3, 0.01, 1.65), (1 / 2, 0.04, 2.0), (2 / 3, 0.4, 2.0)])
def test_partial_failures_are_not_an_outage(share: float, lost: float, load: float, status: int, seed: int) -> None:
    """If a part of the requests fails, each lookup is retried by itself, with at most twice as many requests."""
    result = Batch(by_chance(share, lambda: failure(status), 0.01), 3000, seed=seed).run()
    assert result.lost <= lost * 3000
    assert len(result.sent) <= load * 3000


@pytest.mark.parametrize("seed", SEEDS)
def test_quick_failures_are_not_an_outage(seed: int) -> None:
    """Quick failures are not an outage while slower requests in flight may still succeed."""
    result = Batch(by_chance(1 / 3, failure, 0.2, 0.002), 3000, seed=seed).run()
    assert result.lost <= 30
    assert result.seconds <= 1.4 * 3000 * 0.2 / 50


@pytest.mark.parametrize("seed", SEEDS)
def test_a_refused_key_ends_a_batch(seed: int) -> None:
    """A refused key ends a batch after a hundred requests. A short disturbance affects only its first lookups."""
    revoked = in_turn((1.0, by_chance(0, refusal)), (math.inf, by_chance(1, refusal)))
    result = Batch(revoked, 20_000, seed=seed).run()
    assert sum(moment >= 1.0 for moment in result.sent) <= 100
    assert result.seconds <= 5
    disturbed = in_turn((1.0, by_chance(0, refusal)), (1.4, by_chance(1, refusal)), (math.inf, by_chance(0, refusal)))
    result = Batch(disturbed, 10_000, seed=seed).run()
    assert result.lost <= 15


@pytest.mark.parametrize("seed", SEEDS)
def test_an_outage_may_end_in_throttling_and_a_limit_may_rise(seed: int) -> None:
    """The client follows a server that throttles after an outage, or that raises its limit."""
    server = in_turn((1.0, by_chance(0, failure)), (3.0, by_chance(1, failure)), (math.inf, token_bucket(200, 20)))
    result = Batch(server, 4000, seed=seed).run()
    assert result.found == 4000
    night = in_turn((10.0, token_bucket(100, 20)), (math.inf, token_bucket(1000, 20)))
    result = Batch(night, 20_000, seed=seed).run()
    assert result.found == 20_000
    assert result.seconds <= 60


@pytest.mark.parametrize("seed", SEEDS)
def test_a_rate_that_was_learned_by_chance_is_left_again(seed: int) -> None:
    """A rate that is far too low, because random rejections around an outage looked like a limit, grows again."""
    rejecting = by_chance(0.2, rejection, 0.004)
    server = in_turn(
        (0.3, rejecting), (1.5, by_chance(1, failure)), (3.0, rejecting), (math.inf, by_chance(0, failure))
    )
    result = Batch(server, 6000, seed=seed).run()
    assert result.found == 6000
    assert result.seconds <= 30


@pytest.mark.parametrize("seed", range(40))
def test_random_mixtures_lose_no_lookup(seed: int) -> None:
    """Random mixtures of limits, rejections and outages of up to half the deadline lose no lookup."""
    random = Random(seed)
    kinds: list[Callable[[], Server]] = [
        lambda: token_bucket(random.uniform(50, 2000), random.randint(5, 100), in_a_second),
        lambda: limited_concurrency(random.randint(5, 40), random.uniform(0.01, 0.1)),
        lambda: by_chance(random.uniform(0, 0.1), rejection, random.uniform(0.005, 0.1)),
        lambda: by_chance(0, failure, random.uniform(0.005, 0.1)),
    ]
    phases: list[tuple[float, Server]] = []
    end = 0.0
    for _ in range(3):
        end += random.uniform(0.5, 3)
        phases.append((end, random.choice(kinds)()))
        end += random.uniform(0.1, 8)
        phases.append((end, by_chance(1, failure, random.uniform(0.001, 0.05))))
    phases.append((math.inf, random.choice(kinds)()))
    count = random.randint(1000, 4000)
    result: Result = Batch(in_turn(*phases), count, gathered=random.random() < 0.3, deadline=300, seed=seed).run()
    assert result.lost <= 0.002 * count
    assert result.found + result.lost == count
    assert len(result.sent) <= 2 * count
