"""Runs of workers in one process, with a real redis-server, an emulated API and taskiq's in-memory broker."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import count
from typing import Any

import pytest
from running_examples import RedisServer, require

from kaizen_async import KaizenClient, PollPolicy, RetryPolicy
from kaizen_async.testing import Fault, KaizenEmulator, Life

require("taskiq", "taskiq_redis", "redis")

from redis.asyncio import Redis  # noqa: E402 - skipped above without Redis
from taskiq import InMemoryBroker  # noqa: E402

from kaizen_async.workers import (  # noqa: E402
    Limits,
    OtherInputError,
    Run,
    RunCancelledError,
    RunError,
    RunOutcome,
    UnknownRunError,
    follower,
    lookups,
    register,
    session,
    waits,
)
from kaizen_async.workers import run as run_module  # noqa: E402
from kaizen_async.workers import worker as worker_module  # noqa: E402
from kaizen_async.workers.shards import pack  # noqa: E402

pytestmark = pytest.mark.timeout(60)

NAMES = count()
SOON = 0.05
QUICK = PollPolicy(min_interval=SOON, max_interval=4 * SOON)
"""Polls of waits for executions that take a second or less."""


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let workers and runs look and report more often than the machines of a real site should."""
    for module in (session, worker_module):
        monkeypatch.setattr(module, "BEAT_SECONDS", SOON)
    for module in (session, lookups, waits):
        monkeypatch.setattr(module, "LOOK_AGAIN", SOON)
    monkeypatch.setattr(waits, "CLAIM_SECONDS", SOON)
    monkeypatch.setattr(run_module, "INVITE_SECONDS", SOON)
    monkeypatch.setattr(follower, "BLOCK_MS", round(SOON * 1000))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """Yield a redis-server for all tests of this file. Each test has its own namespace."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
async def redis(server: RedisServer) -> AsyncIterator[Any]:
    """Yield a client of Redis."""
    async with Redis.from_url(server.url, decode_responses=True) as client:
        yield client


@pytest.fixture
def emulator() -> Iterator[KaizenEmulator]:
    """Yield an API in which executions have ended, except missing ones and slow ones."""

    def life(execution_id: str) -> Life | None:
        if execution_id.startswith("no_"):
            return None
        return Life.lasting(0.3) if execution_id.startswith("slow_") else Life.ended()

    with KaizenEmulator(default_life=life) as running:
        yield running


class Site:
    """Workers and runs in this process."""

    def __init__(self, url: str, base_url: str) -> None:
        self.url = url
        self.namespace = f"test{next(NAMES)}"
        self.base_url = base_url
        self.broker = InMemoryBroker()

    @asynccontextmanager
    async def worker(
        self, *, per_second: float | None = None, client: Any = KaizenClient, **limits: Any
    ) -> AsyncIterator[InMemoryBroker]:
        """Run a worker with its own broker, as in its own process."""
        broker = InMemoryBroker()
        register(
            broker,
            url=self.url,
            namespace=self.namespace,
            client=partial(client, base_url=self.base_url),
            per_second=per_second,
            limits=Limits(**limits),
        )
        await broker.startup()
        try:
            yield broker
        finally:
            await broker.shutdown()

    def run(self, name: str, broker: InMemoryBroker | None = None, **settings: Any) -> Run:
        """Return a run."""
        return Run(name, broker=broker, url=self.url, namespace=self.namespace, **settings)

    def key(self, name: str, part: str = "") -> str:
        """Return a key of a run."""
        return f"{{{self.namespace}}}:run:{name}{part and ':' + part}"


@pytest.fixture
def site(server: RedisServer, emulator: KaizenEmulator) -> Site:
    """Return a site without workers."""
    return Site(server.url, emulator.base_url)


def numbered(many: int, prefix: str = "exec") -> list[str]:
    """Return a number of ids."""
    return [f"{prefix}_{number}" for number in range(many)]


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - another thread or process changes it
            await asyncio.sleep(0.05)


async def all_of(run: Run) -> list[RunOutcome[Any]]:
    """Return all outcomes of a run."""
    async with run.follow() as outcomes:
        return [outcome async for outcome in outcomes]


def assert_once_each(outcomes: list[RunOutcome[Any]], ids: list[str]) -> None:
    """Fail unless each id of the input has exactly one outcome with its number."""
    assert [outcome.id for outcome in sorted(outcomes, key=lambda one: one.number)] == ids
    assert {outcome.number for outcome in outcomes} == set(range(1, len(ids) + 1))


@pytest.mark.parametrize("wait", [False, True])
async def test_every_id_of_a_run_gets_one_outcome(site: Site, redis: Any, *, wait: bool) -> None:
    """Every id of a run, also a missing or repeated one, gets one outcome. Afterwards Redis holds only a summary."""
    ids = [*numbered(100), *numbered(20, "no"), *numbered(20, "slow"), *numbered(20)]
    client = partial(KaizenClient, poll=QUICK)
    async with site.worker(client=client) as broker, site.run("r", broker) as run:
        async with run.process(ids, wait=wait, size=40) as outcomes:
            found = [outcome async for outcome in outcomes]
        status = await run.status()
    assert_once_each(found, ids)
    assert {one.error.type for one in found if one.error is not None} == {"NotFoundError"}
    assert {one.id for one in found if not one.ok} == set(numbered(20, "no"))
    assert all(one.execution.is_finished for one in found if one.ok and (wait or not one.id.startswith("slow")))
    assert (status.done, status.read, status.failed, status.total) == (160, 160, 20, 160)
    assert (status.state, status.unread_bytes, status.workers, status.seconds_left) == ("finished", 0, 0, None)
    left = [key async for key in redis.scan_iter(f"{{{site.namespace}}}:run:r*")]
    assert {key.rpartition(":")[2] for key in left} <= {"r", "out", "failed", "members", "invited"}
    assert await redis.xlen(site.key("r", "out")) == 0
    assert not [key for key in left if await redis.ttl(key) == -1]  # each key expires


async def test_the_same_input_again_resumes_and_another_is_refused(site: Site, emulator: KaizenEmulator) -> None:
    """The same input resumes a run.

    Other ids, another number or other options are refused, and the error shows both.
    """
    ids = numbered(100)
    async with site.worker() as broker, site.run("r", broker) as run:
        await run.produce(ids, size=30)
        await run.produce(iter(ids), size=7)
        assert_once_each(await all_of(run), ids)
        assert await all_of(run) == []
        await run.produce(ids)
        requests = emulator.request_count
        for other in (ids[:-1], [*ids, "more"], [*ids[:50], "other", *ids[51:]], ["first", *ids[1:]]):
            with pytest.raises(OtherInputError, match=r"100 of digest \w{12}; these are \d+ or more of digest \w{12}"):
                await run.produce(other, size=40)
        with pytest.raises(OtherInputError, match="instructor-executions, not with executions, waiting for each"):
            await run.produce(ids, kind="executions", wait=True)
        assert emulator.request_count == requests == 100


async def test_two_producers_send_an_input_once(site: Site) -> None:
    """Several producers of one run send its input once, although they split it differently."""
    ids = numbered(400)
    async with site.worker() as broker, site.run("r", broker) as run, site.run("r", broker) as other:
        await asyncio.gather(run.produce(ids, size=30), other.produce(iter(ids), size=70), run.produce(ids, size=11))
        assert_once_each(await all_of(run), ids)


async def test_an_invalid_id_gets_an_outcome_when_it_is_sent(site: Site) -> None:
    """An invalid id gets an outcome when it is sent, and the others are looked up."""
    given: list[Any] = ["exec_1", "", b"exec_\xff", "a\x00b", "exec_2\u200b", "exec_\udc80", 7, b"exec_3", "exec_4\n"]
    async with site.worker() as broker, site.run("r", broker) as run:
        status = await run.produce(given)
        assert (status.invalid, status.failed) == (7, 7)
        found = sorted(await all_of(run), key=lambda one: one.number)
        assert await run.retry_failed() == 0
    assert [one.number for one in found] == list(range(1, 10))
    assert [one.id for one in found if one.ok] == ["exec_1", "exec_3"]
    assert {one.error.type for one in found if one.error} == {"TypeError", "ValueError"}


async def test_a_run_without_ids_is_finished_at_once(site: Site) -> None:
    """A run without ids finishes at once and refuses another input."""
    async with site.worker() as broker, site.run("r", broker) as run:
        status = await run.produce([])
        assert (status.state, status.total, status.done) == ("finished", 0, 0)
        assert await all_of(run) == []
        with pytest.raises(OtherInputError, match="0 of digest"):
            await run.produce(["exec_1"])


async def test_a_slow_source_does_not_delay_outcomes(site: Site) -> None:
    """The first ids of a slow source get outcomes before its last one arrives. An error of the source is raised."""
    seen = asyncio.Event()

    async def slow() -> AsyncIterator[str]:
        yield "exec_1"
        await seen.wait()
        yield "exec_2"

    async def broken() -> AsyncIterator[str]:
        yield "exec_1"
        raise OSError("the cable")

    def broken_too() -> Iterator[str]:
        yield "exec_1"
        raise OSError("the cable")

    async with site.worker() as broker:
        async with site.run("slow", broker) as run, run.process(slow()) as outcomes:
            numbers = []
            async for outcome in outcomes:
                numbers.append(outcome.number)
                seen.set()
        assert numbers == [1, 2]
        for source in (broken, broken_too):
            async with site.run(source.__name__, broker) as run:
                with pytest.raises(OSError, match="the cable"):
                    await run.produce(source())
                assert (await run.status()).total is None
                await run.produce(["exec_1", "exec_2"])
                assert_once_each(await all_of(run), ["exec_1", "exec_2"])


async def test_a_reader_can_stop_and_continue(site: Site) -> None:
    """Outcomes that a reader has not acknowledged come again with the same numbers.

    Two readers do not share outcomes.
    """
    ids = numbered(150)
    async with site.worker() as broker, site.run("r", broker) as run, site.run("r", broker) as other:
        await run.produce(ids, size=25)
        read: list[RunOutcome[Any]] = []
        async with run.follow() as outcomes:
            async for outcome in outcomes:
                read.append(outcome)
                if len(read) == 50:
                    break
        together = await asyncio.gather(all_of(run), all_of(other))
        assert not all(together)
        assert {one.number for one in [*read, *together[0], *together[1]]} == set(range(1, 151))
        assert (await run.status()).read == 150


async def test_failed_ids_can_be_tried_again(site: Site, emulator: KaizenEmulator) -> None:
    """Failed ids can be retried, and their new outcomes have the old numbers."""
    ids = [*numbered(5), *numbered(3, "no")]
    async with site.worker() as broker, site.run("r", broker) as run:
        await run.produce(ids)
        assert sum(not one.ok for one in await all_of(run)) == 3
        emulator.add_many(numbered(2, "no"))
        assert await run.retry_failed() == 3
        again = sorted(await all_of(run), key=lambda one: one.number)
        assert [(one.number, one.ok) for one in again] == [(6, True), (7, True), (8, False)]
        status = await run.status()
        assert (status.done, status.failed, status.state) == (8, 1, "finished")


async def test_a_run_can_be_cancelled_and_purged(site: Site, redis: Any, emulator: KaizenEmulator) -> None:
    """Workers leave a run that is cancelled and purged, and its name can be used again."""
    emulator.add_many(ids := numbered(50, "long"), Life.lasting(600))
    async with site.worker() as broker, site.run("r", broker) as run:
        async with run.process(["exec_1", *ids], wait=True) as outcomes:
            await anext(outcomes)
            assert (await run.cancel()).state == "cancelled"
            with pytest.raises(RunCancelledError):
                async for _ in outcomes:
                    pass
        for action in (run.produce(["x"], wait=True), run.retry_failed(), all_of(run)):
            with pytest.raises(RunCancelledError):
                await action
        await run.purge()
        assert [key async for key in redis.scan_iter(f"{{{site.namespace}}}:run:r*")] == []
        for action in (run.status(), run.purge(), run.cancel(), run.retry_failed(), all_of(run)):
            with pytest.raises(UnknownRunError, match=r"there is no run r in redis://127.0.0.1:\d+"):
                await action
        await run.produce(["exec_1"])
        assert_once_each(await all_of(run), ["exec_1"])


async def test_a_purged_run_does_not_affect_the_next_one(site: Site, redis: Any) -> None:
    """A late worker, producer and reader of a purged run change nothing in the next run of the same name."""
    async with site.run("r") as run:
        await run.produce(numbered(20), size=10)
        old = await redis.hget(site.key("r"), "id")
        state, *_ = await run._store.script("claim", site.key("r"), 60_000, "late", 9, 0, 0, "token", old)
        assert state == b"running"
        async with run.follow() as reader:
            await run.purge()
            await run.produce(numbered(20, "other"), size=10)
            before = [await redis.dump(site.key("r", part)) for part in ("", "todo", "ids", "state", "held", "out")]
            late = {
                "claim": (60_000, "late", 9, 0, 0, "token"),
                "beat": (f"{{{site.namespace}}}:workers", "late", 8000, 60_000, 1, 2),
                "record": ("runs", "r", 1, "token", 1, 10, 0, 0, b"\xff\x03", b"outcomes", b""),
                "release": (1, "token", "failed", 0, b"waits", "why"),
                "leave": ("late",),
                "append": (60_000, 20, 1, "digest", b"ids", 1, b"", 0),
                "produced": ("runs", "r", 20, "digest"),
                "ack": (60_000, "reader", 10_000, "0-0", "9-0", 5, 5),
            }
            replies = {name: await run._store.script(name, site.key("r"), *words, old) for name, words in late.items()}
            assert replies["claim"] == [b"unknown"]
            assert (replies["beat"], replies["record"], replies["ack"][1]) == (b"unknown", [0], b"unknown")
            assert (replies["append"][:2], replies["produced"][:2]) == ([0, None], [0, None])
            after = [await redis.dump(site.key("r", part)) for part in ("", "todo", "ids", "state", "held", "out")]
            assert before == after
            async with site.worker() as broker, site.run("r", broker) as new:
                await new.produce(numbered(20, "other"), size=10)
                while not await redis.xlen(site.key("r", "out")):  # noqa: ASYNC110 - another process changes it
                    await asyncio.sleep(0.01)
                reader._has_lease = True
                with pytest.raises(UnknownRunError):
                    await reader._fetch()
                assert_once_each(await all_of(new), numbered(20, "other"))


async def test_workers_are_invited_as_soon_as_one_is_missing(site: Site, redis: Any) -> None:
    """An invitation is not repeated for a while, unless a worker has left the run or failed ids are retried."""
    async with site.run("r") as run:

        async def invited(worker: str = "a") -> list[Any]:
            store = run._store
            _, *pairs = await store.script("workers", store.workers, store.run(""), store.runs, worker, 8000)
            return pairs

        await run.produce(["exec_1", ""])
        assert await invited() == [b"r", 1]
        assert await invited() == []
        await run._store.script("beat", site.key("r"), run._store.workers, "a", 8000, 60_000, "")
        assert await invited() == []
        await run._store.script("leave", site.key("r"), "a", "")
        assert await invited() == [b"r", 1]
        for foreign in ("x", "nan", "-inf", "1e308"):
            await redis.hset(site.key("r"), mapping={"invites": foreign, "members": foreign})
            await redis.delete(site.key("r", "invited"))
            assert await invited() == [b"r", 1]
        assert await invited() == []
        await redis.rpush(site.key("r", "failed"), "1:x")
        await run._store.script("retry", site.key("r"), run._store.runs, "r", 1, "")
        assert await invited() == [b"r", 1]


async def test_workers_leave_a_purged_run(site: Site, emulator: KaizenEmulator) -> None:
    """Workers leave a purged run and process the next run of the same name with its own options."""
    emulator.add_many(ids := numbered(20, "long"), Life.lasting(600))
    async with site.worker() as broker, site.run("r", broker) as run:
        await run.produce(ids, wait=True, size=10)
        await until(lambda: emulator.requests_for(ids[-1]) > 0)
        await run.purge()
        await run.produce(ids)
        assert_once_each(await all_of(run), ids)


async def test_a_worker_that_ends_hands_its_shards_over(site: Site, emulator: KaizenEmulator) -> None:
    """A stopped worker hands its waits over with their ages, so the next worker polls as rarely as one process."""
    emulator.add_many(ids := numbered(12, "long"), Life.lasting(3))
    emulator.add_many(others := numbered(12, "alone"), Life.lasting(3))
    client = partial(
        KaizenClient, poll=PollPolicy(min_interval=0.02, lag_share=0.2, learn=False)
    )  # intervals grow with the age

    def polls(ids: list[str]) -> int:
        return sum(emulator.requests_for(id) for id in ids)

    async with client(base_url=site.base_url) as kaizen, site.run("r") as run:
        await run.produce(ids, wait=True, size=4)
        alone = asyncio.create_task(all_ends_of(kaizen, others))
        async with site.worker(client=client) as broker:
            run.broker = broker
            reading = asyncio.create_task(all_of(run))
            await until(lambda: polls(ids) >= 4 * 12)
        assert (await run.status()).shards_held == 0
        async with site.worker(client=client) as broker:
            run.broker = broker
            assert_once_each(await reading, ids)
        assert await alone == 12
    assert polls(ids) <= 1.3 * polls(others)


async def all_ends_of(kaizen: KaizenClient, ids: list[str]) -> int:
    """Wait for executions, and return the number of ends."""
    async with kaizen.instructor_executions.wait_many(ids) as outcomes:
        return len([outcome async for outcome in outcomes if outcome.ok])


async def test_the_shard_of_a_dead_worker_goes_to_another(
    site: Site, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A silent worker's shard goes to another worker after a time, and late outcomes of the first are refused."""
    monkeypatch.setattr(session, "DEAD_MS", 600)
    monkeypatch.setattr(session, "BEAT_SECONDS", 0.1)
    ids = numbered(40)
    async with site.run("r") as run:
        await run.produce(ids, size=20)
        claim = ("claim", site.key("r"), 60_000, "dead", 9, 0, 0, "first", "")
        _, *rows = await run._store.script(*claim)
        assert [row[:3] for row in rows] == [[1, 20, 0], [2, 20, 0]]
        await run._store.script("release", site.key("r"), 1, "first", "back", 0, b"waits", b"", "")
        _, row = await run._store.script(*claim[:-2], "second", "")
        assert (row[0], row[7]) == (1, b"waits")
        assert 0 <= row[4] <= row[3] < 60_000  # milliseconds since the waits were saved, and since the first claim
        async with site.worker() as broker:
            run.broker = broker
            assert_once_each(await all_of(run), ids)
        late = ("record", site.key("r"), "{x}:runs", "r", 1, "first", 1, 1, 0, 0, b"\x01", b"late", b"", "")
        assert await run._store.script(*late) == [0]
        assert (await run.status()).done == 40


async def test_a_claim_whose_reply_was_lost_is_taken_back(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis takes back a claim that a live worker does not report, because its reply was lost."""
    async with site.worker() as broker, site.run("r", broker) as run:
        await run.produce(numbered(20), size=20)
        ((live, _),) = await run._store.command("ZRANGE", run._store.workers, 0, 0, "WITHSCORES")
        await run._store.script("claim", site.key("r"), 60_000, live, 9, 0, 0, "lost", "")
        assert_once_each(await all_of(run), numbered(20))


async def test_a_shard_that_fails_again_and_again_is_set_aside(
    site: Site, emulator: KaizenEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After repeated failures of a shard, its failing ids get their error, and the others are not delayed."""
    monkeypatch.setattr(session, "RETRY_DELAYS", (0.05,))
    emulator.faults.always(Fault.status(500), id="bad")
    ids = ["exec_1", "bad", "exec_2"]
    client = partial(KaizenClient, retry=RetryPolicy(max_attempts=2, initial_backoff=0))
    async with site.worker(client=client) as broker, site.run("r", broker) as run:
        await run.produce(ids, size=3)
        found = await all_of(run)
        status = await run.status()
    assert_once_each(found, ids)
    (failed,) = (one for one in found if one.error)
    assert (failed.id, failed.error and failed.error.type, failed.error and failed.error.status) == (
        "bad",
        "StatusError",
        500,
    )
    assert (status.set_aside, status.failed, emulator.requests_for("bad")) == (1, 1, 10)


@pytest.mark.parametrize("part", ["", "todo", "members"])
async def test_a_run_that_cannot_be_worked_on_concerns_no_other(site: Site, redis: Any, part: str) -> None:
    """Its reader gets to know why."""
    troubles: list[str] = []
    async with site.run("bad", on_trouble=troubles.append) as bad:
        await bad.produce(numbered(3))
        await redis.delete(site.key("bad", part))
        await redis.set(site.key("bad", part), '{"foreign":1}')
        async with site.worker() as broker, site.run("good", broker) as good:
            await redis.sadd(f"{{{site.namespace}}}:runs", "bad")
            await good.produce(numbered(3))
            assert_once_each(await all_of(good), numbered(3))
            with pytest.raises(RunError, match="refused a command: WRONGTYPE"):
                await bad.status()
            if part == "todo":
                bad.broker = broker
                reading = asyncio.create_task(all_of(bad))
                await until(lambda: bool(troubles))
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)
                assert troubles[0].startswith("a worker cannot work on the run: Redis at ")


@pytest.mark.parametrize("facts", [{"options": "{}"}, {"options": "junk", "state": "running"}, {"state": "running"}])
async def test_a_run_that_cannot_be_read_is_named(site: Site, redis: Any, facts: dict[str, str]) -> None:
    """Whatever is asked of it. It can be purged."""
    async with site.run("r") as run:
        await redis.hset(site.key("r"), mapping={"id": "x", **facts})
        for action in (run.produce(["a"]), run.status(), all_of(run)):
            with pytest.raises(RunError):
                await action
        await run.purge()
        await run.produce(["a"])


async def test_an_unreadable_shard_is_set_aside(site: Site, redis: Any) -> None:
    """A shard that cannot be read is set aside, with a failed outcome for each of its ids. The others are looked up."""
    unreadable = [b"", b"no zlib", b"x\x9c", pack(b"{}"), pack(b'{"ids":["a"]}'), pack(b"\0" * 99)]
    count = 2 * len(unreadable)
    async with site.run("r") as run:
        await run.produce(numbered(count + 2), size=2)
        for shard, stored in enumerate(unreadable, 1):
            await redis.hset(site.key("r", "ids"), shard, stored)
        async with site.worker() as broker:
            run.broker = broker
            found = await all_of(run)
        assert (await run.status()).set_aside == len(unreadable)
    assert sorted(one.number for one in found if one.ok) == [count + 1, count + 2]
    assert sum(not one.ok for one in found) == count
    assert {one.error.type for one in found if one.error} == {"ShardFailedError"}
    assert all("cannot be read" in one.error.message for one in found if one.error)
