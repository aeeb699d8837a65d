"""The limit that all workers share, with its scripts on a real redis-server and everything else in virtual time."""

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from itertools import count
from typing import Any, ParamSpec

import pytest
from running_examples import RedisServer, require
from virtual_time import VirtualLoop, virtual_time

from kaizen_async import RateLimitError
from kaizen_async.events import AttemptEnded, Gated

require("taskiq", "taskiq_redis", "redis")

from virtual_redis import EPOCH, VirtualStore  # noqa: E402 - skipped above without Redis

from kaizen_async.workers import SharedLimit  # noqa: E402

NAMES = count()
P = ParamSpec("P")
FAR = 0.01
"""The longest time of one way to Redis."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """Return a redis-server."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as running:
        yield running


@asynccontextmanager
async def workers(server: RedisServer, many: int, rate: float | None) -> AsyncIterator[list[SharedLimit]]:
    """Yield the limits of the workers of one namespace, all at the same distance from Redis."""
    namespace = f"limit{next(NAMES)}"
    stores = [VirtualStore(server.url, namespace, seed, FAR) for seed in range(many)]
    limits = [SharedLimit(store, rate) for store in stores]
    yield limits
    for limit, store in zip(limits, stores, strict=True):
        await limit.aclose()
        await store.aclose()


def without_debug(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Turn a coroutine function into a test in virtual time without debug mode, which would trace every timer."""

    @functools.wraps(test)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        with asyncio.Runner(loop_factory=VirtualLoop, debug=False) as runner:
            runner.run(test(*args, **kwargs))

    return wrapped


def now() -> float:
    """Return the time of the running loop."""
    return asyncio.get_running_loop().time()


async def sent_until(end: float, limits: list[SharedLimit], at_once: int) -> list[list[float]]:
    """Return the times at which each worker sent its requests, as fast as the limit allows."""

    async def send(limit: SharedLimit, sent: list[float]) -> None:
        while True:
            await limit.take_turn()
            if now() >= end:
                return
            sent.append(now())
            await asyncio.sleep(0 if limit._rate else 0.01)

    sent: list[list[float]] = [[] for _ in limits]
    pairs = zip(limits, sent, strict=True)
    await asyncio.gather(*(send(limit, into) for limit, into in pairs for _ in range(at_once)))
    return sent


def most_within(seconds: float, sent: list[float]) -> int:
    """Return the largest number of requests in any period of a given length."""
    most = first = 0
    for last, moment in enumerate(sent):
        while sent[first] <= moment - seconds:
            first += 1
        most = max(most, last - first + 1)
    return most


@pytest.mark.parametrize(
    ("rate", "many"),
    [(50, 1), (50, 2), (50, 8), (500, 2), *(pytest.param(5000, many, marks=pytest.mark.slow) for many in (1, 2, 8))],
)
@without_debug
async def test_the_limit_is_kept_and_used(server: RedisServer, rate: int, many: int) -> None:
    """The workers exceed the limit by at most 2 % in any ten seconds and use at least 95 % of it."""
    async with workers(server, many, rate) as limits:
        by_worker = await sent_until(11, limits, max(2, rate // (50 * many)))
    sent = sorted(moment for moments in by_worker for moment in moments)
    assert most_within(10, sent) <= rate * 10 * 1.02
    assert len(sent) >= 0.95 * rate * 11


@pytest.mark.parametrize("rate", [None, 200.0])
@without_debug
async def test_a_throttled_worker_holds_all_within_a_fifth_of_a_second(server: RedisServer, rate: float | None) -> None:
    """A throttled worker pauses all workers within 0.2 s until the pause ends, with and without a rate."""
    async with workers(server, 8, rate) as limits:
        sending = asyncio.create_task(sent_until(4, limits, 3))
        await asyncio.sleep(1)
        limits[0].notice(Gated(429, 1.5, 1.5))
        for sent in await sending:
            assert [moment for moment in sent if moment < 1]
            assert not [moment for moment in sent if 1.2 < moment < 2.5]
            assert [moment for moment in sent if moment > 2.5]


@virtual_time
async def test_random_rejections_pause_only_once(server: RedisServer) -> None:
    """A rejection pauses the workers once. Further rejections, which are random, do not."""
    error = RateLimitError("busy", status=429, retry_after=3)
    async with workers(server, 1, None) as (limit,):
        await limit.take_turn()
        for rejected, least in ((True, 3), (True, 0), (False, 0)):
            began = now()
            limit.notice(AttemptEnded("a", "url", 1, 0.1, 429 if rejected else 200, error if rejected else None))
            await limit.take_turn()
            assert least <= now() - began < least + 0.1


@virtual_time
async def test_a_foreign_pause_is_believed_for_six_hours_at_most(server: RedisServer) -> None:
    """A pause in Redis counts for six hours at most, and an absurd schedule is ignored, because both are untrusted."""
    async with workers(server, 1, 100) as (limit,):
        store, key = limit._store, limit._key
        years = f"{(EPOCH + 31 * 366 * 86_400) * 1e6:.0f}"
        await store.command("SET", key, years)
        await limit.take_turn()
        assert now() < 1
        await store.command("SET", f"{key}:pause", years)
        await limit._lease
        await asyncio.sleep(1)
        began = now()
        await limit.take_turn()
        assert 21_000 < now() - began <= 21_601
        await store.command("SET", f"{key}:pause", "nonsense")
        await limit.take_turn()
        assert now() - began <= 21_602


@virtual_time
async def test_what_is_no_schedule_is_replaced(server: RedisServer) -> None:
    """Neither numbers that are none nor keys of another type lift the limit or stop the workers."""
    async with workers(server, 1, 10) as (limit,):
        store, key = limit._store, limit._key
        for foreign in (
            ("SET", key, "nan"),
            ("SET", key, "-inf"),
            ("LPUSH", key, "x"),
            ("HSET", f"{key}:pause", "a", 1),
        ):
            await store.command("DEL", foreign[1])
            await store.command(*foreign)
            began = now()
            for _ in range(20):
                await limit.take_turn()
            assert 1.5 < now() - began < 2.5
        for foreign in (("SET", f"{key}:pause", "nan"), ("LPUSH", f"{key}:pause", "x")):
            await store.command("DEL", f"{key}:pause")
            await store.command(*foreign)
            limit.pause(3)
            began = now()
            await asyncio.sleep(0.1)
            await limit.take_turn()
            assert 2.9 < now() - began < 3.3


@virtual_time
async def test_unused_permits_go_back(server: RedisServer) -> None:
    """The permits of a cancelled request and of a stopped worker are returned."""
    async with workers(server, 2, 1) as (first, second):
        waiting = [asyncio.create_task(first.take_turn()) for _ in range(10)]
        await asyncio.sleep(0.2)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await first.aclose()
        await second.take_turn()
        assert now() < 1.5


@pytest.mark.parametrize("rate", [0, -1, float("nan"), "10", True])
def test_a_rate_is_a_number_above_0(server: RedisServer, rate: Any) -> None:
    """A rate that is not a number above 0 is refused at once."""
    with pytest.raises((TypeError, ValueError), match="per_second"):
        SharedLimit(VirtualStore(server.url, "x"), rate)
