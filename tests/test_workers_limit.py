"""The limit that all workers share, by the clock of a real redis-server."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from itertools import count
from typing import Any

import pytest
from running_examples import RedisServer, require

from kaizen_async import RateLimitError
from kaizen_async.events import AttemptEnded, Gated

require("taskiq", "taskiq_redis", "redis")

from kaizen_async.workers import SharedLimit, Store  # noqa: E402 - skipped above without Redis
from kaizen_async.workers.limit import AHEAD, CATCH_UP  # noqa: E402

pytestmark = pytest.mark.timeout(60)

NAMES = count()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """Return a redis-server."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
async def stores(server: RedisServer) -> AsyncIterator[list[Store]]:
    """Return the connections of eight workers of one namespace."""
    namespace = f"limit{next(NAMES)}"
    made = [Store(server.url, namespace) for _ in range(8)]
    yield made
    for store in made:
        await store.aclose()


async def sent_in(seconds: float, limits: list[SharedLimit], at_once: int = 20) -> list[float]:
    """Return when requests were sent by workers that send as many as they may."""
    sent: list[float] = []
    ends = time.monotonic() + seconds

    async def send(limit: SharedLimit) -> None:
        while time.monotonic() < ends:
            await limit.take_turn()
            sent.append(time.monotonic())

    await asyncio.gather(*(send(limit) for limit in limits for _ in range(at_once)))
    for limit in limits:
        await limit.aclose()
    return sent


def most_within(seconds: float, sent: list[float]) -> int:
    """Return the largest number of requests in any period of that length."""
    most = first = 0
    for last, moment in enumerate(sent):
        while sent[first] < moment - seconds:
            first += 1
        most = max(most, last - first + 1)
    return most


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("rate", [50.0, 1000.0])
async def test_workers_together_send_no_more_than_the_rate(stores: list[Store], workers: int, rate: float) -> None:
    """Beyond it only what was not used in the twentieth of a second before, and what may be leased ahead."""
    began = time.monotonic()
    sent = await sent_in(1.0, [SharedLimit(store, rate) for store in stores[:workers]])
    assert len(sent) <= rate * (max(sent) - began + AHEAD + CATCH_UP) + 1
    assert len(sent) >= workers


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("rate", [50.0, 500.0])
async def test_the_limit_is_kept_within_two_percent_over_ten_seconds(
    stores: list[Store], workers: int, rate: float
) -> None:
    """By the definition: in any ten seconds."""
    sent = sorted(await sent_in(11.0, [SharedLimit(store, rate) for store in stores[:workers]]))
    assert most_within(10.0, sent) <= rate * 10 * 1.02


@pytest.mark.parametrize("rate", [None, 100_000.0])
async def test_a_throttled_worker_holds_all(stores: list[Store], rate: float | None) -> None:
    """Whether there is a rate or not, until the pause is over."""
    throttled, other = SharedLimit(stores[0], rate), SharedLimit(stores[1], rate)
    await asyncio.gather(throttled.take_turn(), other.take_turn())
    began = time.monotonic()
    throttled.notice(Gated(429, 0.8, 0.8))
    await asyncio.sleep(0.2)
    await asyncio.gather(throttled.take_turn(), other.take_turn())
    assert time.monotonic() - began >= 0.7
    await asyncio.gather(throttled.aclose(), other.aclose())


async def test_single_rejections_that_do_not_pass_hold_nobody_for_long(stores: list[Store]) -> None:
    """One pause is worth a try. If a server rejects at random, another would change nothing."""
    limit = SharedLimit(stores[0], None)
    await limit.take_turn()
    error = RateLimitError("busy", status=429, retry_after=0.3)
    for rejected, least in ((True, 0.25), (True, 0.0), (False, 0.0)):
        began = time.monotonic()
        limit.notice(AttemptEnded("a", "url", 1, 0.1, 429 if rejected else 200, error if rejected else None))
        await limit.take_turn()
        assert time.monotonic() - began >= least
        assert least or time.monotonic() - began < 0.25
    await limit.aclose()


async def test_a_foreign_pause_is_believed_for_six_hours_at_most(stores: list[Store], server: RedisServer) -> None:
    """And a schedule that is years ahead not at all: what Redis holds is input."""
    limit = SharedLimit(stores[0], 100)
    years = int((time.time() + 31 * 366 * 86_400) * 1_000_000)
    await stores[0].command("SET", f"{stores[0].tag}:rate", years)
    async with asyncio.timeout(5):
        await limit.take_turn()
    await stores[0].command("SET", f"{stores[0].tag}:rate:pause", years)
    pause, permits, _, _ = await stores[0].script("permits", f"{stores[0].tag}:rate", 100, 5, 0, 0.05, 0.05, 21_600)
    assert (pause, permits) == (21_600_000_000, 0)
    await stores[0].command("SET", f"{stores[0].tag}:rate:pause", "nonsense")
    await limit.take_turn()
    await limit.aclose()


async def test_unused_permits_go_back(stores: list[Store]) -> None:
    """Those of a request that is cancelled while it waits, and those of a worker that stops."""
    first, second = SharedLimit(stores[0], 20), SharedLimit(stores[1], 20)
    waiting = [asyncio.create_task(first.take_turn()) for _ in range(10)]
    await asyncio.sleep(0.02)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await first.aclose()
    began = time.monotonic()
    await second.take_turn()
    assert time.monotonic() - began < 1
    await second.aclose()


@pytest.mark.parametrize("rate", [0, -1, float("nan"), "10", True])
async def test_a_rate_is_a_number_above_0(stores: list[Store], rate: Any) -> None:
    """Anything else is refused at once."""
    with pytest.raises((TypeError, ValueError), match="per_second"):
        SharedLimit(stores[0], rate)
