"""The taskiq workers: real worker processes, a real redis-server, and the API emulated in this process."""

import json
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from running_examples import EXAMPLES, RedisServer, Running, python, require, until

from kaizen_async.testing import Fault, KaizenEmulator, Life

require("taskiq", "taskiq_redis", "redis", "pyrate_limiter")

from redis import Redis  # noqa: E402 - skipped above without it

pytestmark = [pytest.mark.example, pytest.mark.timeout(120)]

RUN = "run-1"


class Site:
    """Redis, and what runs beside it on the machines of an account.

    Attributes:
        redis: A client.
    """

    def __init__(self, stack: ExitStack, folder: Path, base_url: str) -> None:
        self._stack = stack
        self._folder = folder
        server = stack.enter_context(RedisServer(folder))
        self._settings = {"REDIS_URL": server.url, "KAIZEN_BASE_URL": base_url, "KAIZEN_RATE": "100000"}
        self.redis = stack.enter_context(Redis.from_url(server.url, decode_responses=True))

    def worker(self, *options: str, shards: int = 2, **settings: str) -> Running:
        """Start the worker of a machine, with one process; return it once it listens."""
        command = python("-m", "taskiq", "worker", "tasks:broker", "-w", "1", "--max-async-tasks", str(shards))
        worker = self._start(*command, *options, **settings)
        worker.says("Listening started.")
        return worker

    def producer(self, ids: Iterable[str], *options: str, size: int = 100) -> Running:
        """Start the producer of the run."""
        file = self._folder / "ids.txt"
        file.write_text("\n".join(ids))
        return self._start(*python("produce.py", RUN, str(file), "--size", str(size)), *options)

    def recorded(self) -> list[dict[str, Any]]:
        """Return the outcomes of the run, in the order in which they were recorded."""
        entries: Any = self.redis.xrange(f"kaizen:{RUN}:outcomes")
        return [json.loads(fields["outcome"]) for _, fields in entries]

    def count(self) -> int:
        """Return how many outcomes there are."""
        return int(self.redis.xlen(f"kaizen:{RUN}:outcomes"))

    def consumers(self) -> list[dict[str, Any]]:
        """Return what Redis knows of the workers."""
        found: Any = self.redis.xinfo_consumers("kaizen:shards", "kaizen")
        return list(found)

    def unacknowledged(self, consumer: str) -> int:
        """Return how many shards a worker has and has not acknowledged."""
        (found,) = (known["pending"] for known in self.consumers() if known["name"] == consumer)
        return int(found)

    def deliveries(self) -> int:
        """Return how often the oldest shard that is not acknowledged was given to a worker."""
        pending: Any = self.redis.xpending_range("kaizen:shards", "kaizen", "-", "+", 1)
        return int(pending[0]["times_delivered"]) if pending else 0

    def _start(self, *command: str, **settings: str) -> Running:
        log = self._folder / f"{len(list(self._folder.iterdir()))}.log"
        folder = EXAMPLES / "taskiq_workers"
        return self._stack.enter_context(
            Running(*command, folder=folder, log=log, settings={**self._settings, **settings})
        )


@pytest.fixture
def emulator() -> Iterator[KaizenEmulator]:
    """Return an emulator in which all executions have ended, but for those that do not exist."""
    with KaizenEmulator(default_life=lambda id: None if id.startswith("no_") else Life.ended()) as running:
        yield running


@pytest.fixture
def site(tmp_path: Path, emulator: KaizenEmulator) -> Iterator[Site]:
    """Return a site of which nothing is left in the end."""
    with ExitStack() as stack:
        yield Site(stack, tmp_path, emulator.base_url)


def numbered(count: int, prefix: str = "exec") -> list[str]:
    """Return as many ids."""
    return [f"{prefix}_{number}" for number in range(count)]


def assert_once_each(outcomes: list[dict[str, Any]], ids: list[str]) -> None:
    """Fail unless each id has one outcome."""
    counts = Counter(outcome["id"] for outcome in outcomes)
    assert counts == Counter(dict.fromkeys(ids, 1))


def test_each_id_of_several_shards_comes_out_once(site: Site) -> None:
    """Whether it is found or not, and although it was sent before there was a group of workers."""
    ids = [*numbered(950), *numbered(20, "no")]
    producer = site.producer(ids)
    until(lambda: site.redis.xlen("kaizen:shards") == 10, "ten shards in the queue")
    site.redis.xgroup_destroy("kaizen:shards", "kaizen")
    site.worker()
    printed = [json.loads(line) for line in producer.end().splitlines()]
    assert printed == site.recorded()
    assert_once_each(printed, ids)
    assert {outcome["status"] for outcome in printed if "error" not in outcome} == {"Completed"}
    assert {outcome["id"] for outcome in printed if "error" in outcome} == set(numbered(20, "no"))


def test_shards_that_are_delivered_twice_leave_one_outcome_for_each_id(site: Site, emulator: KaizenEmulator) -> None:
    """At the same time; and what comes later still is not looked up again."""
    ids = numbered(600)
    producers = [site.producer(ids, size=600), site.producer(ids, size=600)]
    until(lambda: site.redis.xlen("kaizen:shards") == 2, "the shard in the queue, twice")
    worker = site.worker()
    assert len({producer.end() for producer in producers}) == 1
    assert_once_each(site.recorded(), ids)
    requests = emulator.request_count
    assert site.producer(ids).end().count("\n") == 600
    assert emulator.request_count == requests
    worker.stop()


@pytest.mark.parametrize("count", [3000, pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.timeout(300)])])
def test_a_worker_that_is_killed_loses_nothing(site: Site, count: int) -> None:
    """Another is given its shards; each id has one outcome, those that both looked up too."""
    ids = numbered(count)
    settings = {"KAIZEN_SHARD_SECONDS": "4", "KAIZEN_RATE": str(count // 8)}
    doomed = site.worker(**settings)
    producer = site.producer(ids, size=200)
    until(site.consumers, "the first worker at work")
    (name,) = (consumer["name"] for consumer in site.consumers())
    site.worker(**settings)
    until(lambda: site.count() > count / 5, "a fifth of the outcomes")
    kill_at_work(doomed, site, name)
    assert site.count() < count
    assert_once_each([json.loads(line) for line in producer.end().splitlines()], ids)
    assert not site.unacknowledged(name)
    until(lambda: site.redis.xlen("kaizen:shards") < 10, "the shards that are done gone from the queue")


def kill_at_work(worker: Running, site: Site, name: str) -> None:
    """Kill a worker while it has a shard."""
    until(lambda: has_shard_when_halted(worker, site, name), "a moment at which the worker has a shard")
    worker.kill()


def has_shard_when_halted(worker: Running, site: Site, name: str) -> bool:
    """Halt a worker; let it go on if it has no shard, and return whether it has."""
    worker.signal_all(signal.SIGSTOP)
    if site.unacknowledged(name):
        return True
    worker.signal_all(signal.SIGCONT)
    return False


def test_a_worker_that_is_asked_to_stop_ends_its_shards_first(site: Site, emulator: KaizenEmulator) -> None:
    """Well, and without a request that another has to repeat."""
    ids = numbered(2000)
    worker = site.worker()
    producer = site.producer(ids, size=200)
    until(lambda: site.count() > 100, "the first hundred outcomes")
    worker.stop()
    assert site.count() % 200 == 0
    assert 0 < site.count() < 2000
    site.worker(KAIZEN_SHARD_SECONDS="4")
    producer.end()
    assert_once_each(site.recorded(), ids)
    assert {emulator.requests_for(id) for id in ids} == {1}


@pytest.mark.parametrize("seconds", ["1", "60"])
def test_a_shard_that_cannot_be_done_comes_again(tmp_path: Path, seconds: str) -> None:
    """It waits for executions that last, and its time is up, or its worker must stop; its ids get no outcome yet."""
    hours = [0.0]
    with (
        KaizenEmulator(default_life=Life.lasting(3600), clock=lambda: hours[0] * 3600) as emulator,
        ExitStack() as stack,
    ):
        site = Site(stack, tmp_path, emulator.base_url)
        ids = numbered(40)
        worker = site.worker("--wait-tasks-timeout", "0.1", KAIZEN_SHARD_SECONDS=seconds)
        producer = site.producer(ids, "--wait")
        until(lambda: {emulator.requests_for(id) > 0 for id in ids} == {True}, "a look at each execution")
        if seconds == "1":
            until(lambda: site.deliveries() > 1, "the shard again")
        worker.stop()
        assert site.count() == 0
        hours[0] = 2
        site.worker(KAIZEN_SHARD_SECONDS="2")
        producer.end()
        assert_once_each(site.recorded(), ids)
        assert {outcome["status"] for outcome in site.recorded()} == {"Completed"}


def test_workers_share_the_rate_of_the_account(site: Site, emulator: KaizenEmulator) -> None:
    """Two that each may send 100 a second never send more than 150 together, by the server's count."""
    emulator.rate_limit(150, burst=100)
    workers = [site.worker(KAIZEN_RATE="100"), site.worker(KAIZEN_RATE="100")]
    site.producer(numbered(600), size=50).end()
    assert emulator.answers == {200: 600}
    assert all("Executing task tasks:look_up" in worker.said for worker in workers)


def test_a_worker_that_is_throttled_holds_the_others(site: Site, emulator: KaizenEmulator) -> None:
    """While the pause lasts they send no more than the burst that had its turn, where 20 a second would be 60."""
    site.producer([*numbered(100, "a"), *numbered(100, "b")])
    until(lambda: site.redis.xlen("kaizen:shards") == 2, "two shards, one for each worker")
    for _ in range(2):
        site.worker(shards=1, KAIZEN_RATE="20")
    until(lambda: {whose for whose, _ in served(emulator)} == {"a", "b"}, "both at work")
    emulator.faults.next(Fault.status(429, headers={"Retry-After": "3"}))
    until(lambda: site.redis.exists("kaizen:pause"), "the pause")
    (throttled,) = (whose for whose, status in served(emulator) if status == 429)
    others = [count_of_others(emulator, throttled)]
    while site.redis.exists("kaizen:pause"):
        others.append(count_of_others(emulator, throttled))
        time.sleep(0.02)
    assert others[-2] - others[0] <= 2  # the last count may be from after the pause
    until(lambda: count_of_others(emulator, throttled) > others[-1] + 10, "the others at work again")


def served(emulator: KaizenEmulator) -> list[tuple[str, int | None]]:
    """Return of which shard the look-ups were that the server has answered, and how."""
    return [(request.id[0], request.status) for request in emulator.requests]


def count_of_others(emulator: KaizenEmulator, throttled: str) -> int:
    """Return how many look-ups were answered of other shards than the one whose worker was throttled."""
    return sum(whose != throttled for whose, _ in served(emulator))
