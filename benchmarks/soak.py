"""Use a client for minutes in every way at once, while its server fails in every way, and check every result.

    python benchmarks/soak.py             # ten minutes
    python benchmarks/soak.py 60 --seed 7

Callers get, look up many, stream, wait and watch. Some of the calls are cancelled or have too little time. Every few
seconds the client is closed, with or without a drain, and a new one replaces it. The server is the emulator in its own
process. At the end, each call that was not cancelled must have one outcome per id, no task and no socket may be left,
and the memory must not be higher than halfway.
"""

import argparse
import asyncio
import gc
import logging
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvloop

from kaizen_async import KaizenClient, KaizenError, PollPolicy, RetryPolicy
from kaizen_async.testing import Fault, KaizenEmulator, Life

CALLERS = 24
CONCURRENCY = 32
KNOWN_IDS = 2000
MEBIBYTE = 1 << 20

FAULTS = [
    (Fault.latency(0.05), 0.05),
    (Fault.status(500), 0.01),
    (Fault.status(503, headers={"Retry-After-Ms": "30"}), 0.0001),
    (Fault.status(429, headers={"Retry-After-Ms": "50"}), 0.0001),
    (Fault.status(403), 0.002),
    (Fault.html_502(), 0.005),
    (Fault.reset(), 0.01),
    (Fault.disconnect(), 0.01),
    (Fault.truncated_body(), 0.005),
    (Fault.reset_mid_body(), 0.005),
    (Fault.malformed_body(), 0.005),
    (Fault.body(b"[" * 100_000), 0.001),
    (Fault.stalled_body(), 0.001),
    (Fault.hang(), 0.001),
    (Fault.trickle(0.002), 0.002),
    (Fault.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", 0.03, b"ZZ\r\n", then="hang"), 0.001),
]


def life_of(execution_id: str) -> Life | None:
    """Return a short life for most ids, an endless one for some, and none for a few."""
    number = int(execution_id[1:])
    if number % 97 == 0:
        return None
    return Life.running() if number % 13 == 0 else Life.lasting(number % 5 / 4)


def serve(pipe: Connection, seed: int) -> None:
    """Run the emulator until a stop message, then send the numbers of requests and of open connections."""
    with KaizenEmulator(default_life=life_of, seed=seed) as emulator:
        for fault, probability in FAULTS:
            emulator.faults.chance(fault, probability)
        pipe.send(emulator.base_url)
        pipe.recv()
        time.sleep(0.5)
        pipe.send((emulator.request_count, emulator.open_connections))


class Soak:
    """All calls in flight, and their counts."""

    def __init__(self, base_url: str, seconds: float, seed: int) -> None:
        self._base_url = base_url
        self._ends_at = time.monotonic() + seconds
        self._random = random.Random(seed)
        self._fresh = KNOWN_IDS
        self._client = self._new_client()
        self.tally: Counter[str] = Counter()
        self.totals: Counter[str] = Counter()

    async def run(self) -> None:
        """Run all callers until the time is over, then close the last client."""
        async with asyncio.TaskGroup() as group:
            for _ in range(CALLERS):
                group.create_task(self._call_on())
            group.create_task(self._close_on())
        await self._close(self._client)

    def is_over(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() >= self._ends_at

    def _new_client(self) -> KaizenClient:
        return KaizenClient(
            "sk-soak",
            base_url=self._base_url,
            concurrency=CONCURRENCY,
            attempt_timeout=1.0,
            deadline=10.0,
            retry=RetryPolicy(initial_backoff=0.02, max_backoff=0.5),
            poll=PollPolicy(min_interval=0.2, max_interval=1.0),
        )

    async def _close(self, client: KaizenClient) -> None:
        await client.aclose(drain=self._random.choice([0.0, 0.05, 1.0]))
        stats = client.stats()
        for name in ("lookups", "attempts", "retries", "shared", "polls", "throttled", "pauses"):
            self.totals[name] += getattr(stats, name)
        self.totals["clients"] += 1

    async def _close_on(self) -> None:
        while not self.is_over():
            await asyncio.sleep(self._random.uniform(1, 8))
            before, self._client = self._client, self._new_client()
            await self._close(before)

    async def _call_on(self) -> None:
        calls = [self._get, self._get, self._get_many, self._stream, self._wait, self._wait_many, self._watch]
        while not self.is_over():
            call = asyncio.create_task(self._random.choice(calls)(self._client))
            if self._random.random() < 0.15:
                await asyncio.wait([call], timeout=self._random.expovariate(10))
                call.cancel()
            await asyncio.wait([call])
            if call.cancelled():
                self.tally["calls cancelled"] += 1
            else:
                call.result()
                self.tally["calls"] += 1

    def _known(self) -> str:
        return f"e{self._random.randrange(KNOWN_IDS)}"

    def _unseen(self) -> str:
        self._fresh += 1
        return f"e{self._fresh}"

    def _ids(self, most: int) -> list[str]:
        return [self._known() for _ in range(self._random.randint(0, most))]

    def _deadline(self) -> float:
        return self._random.choice([0.2, 2.0, 10.0])

    def _note(self, asked: int, errors: list[KaizenError | None]) -> None:
        self.tally["ids"] += asked
        self.tally["outcomes"] += len(errors)
        for error in errors:
            self.tally["a record" if error is None else type(error).__name__] += 1

    async def _one(self, call: Callable[..., Awaitable[Any]], execution_id: str, **settings: Any) -> None:
        try:
            record = await call(execution_id, **settings)
        except KaizenError as error:
            self._note(1, [error])
        else:
            if record.id != execution_id:
                raise AssertionError(f"asked for {execution_id}, got {record.id}")
            self._note(1, [None])

    async def _get(self, client: KaizenClient) -> None:
        await self._one(client.instructor_executions.get, self._known())

    async def _get_many(self, client: KaizenClient) -> None:
        ids = self._ids(200)
        outcomes = await client.instructor_executions.get_many(ids, deadline=self._deadline())
        if [outcome.id for outcome in outcomes] != ids:
            raise AssertionError("outcomes do not match the ids")
        self._note(len(ids), [outcome.error for outcome in outcomes])

    async def _stream(self, client: KaizenClient) -> None:
        ids = self._ids(400)
        async with client.instructor_executions.stream(ids, deadline=self._deadline()) as outcomes:
            if self._random.random() < 0.2:
                self.tally["streams left early"] += 1
                async for _ in outcomes:
                    return
            errors = [outcome.error async for outcome in outcomes]
        self._note(len(ids), errors)

    async def _wait(self, client: KaizenClient) -> None:
        await self._one(client.instructor_executions.wait, self._unseen(), deadline=self._deadline())

    async def _wait_many(self, client: KaizenClient) -> None:
        ids = [self._unseen() for _ in range(self._random.randint(0, 60))]
        async with client.instructor_executions.wait_many(ids, deadline=self._deadline()) as outcomes:
            self._note(len(ids), [outcome.error async for outcome in outcomes])

    async def _watch(self, client: KaizenClient) -> None:
        ids = [self._unseen() for _ in range(self._random.randint(0, 20))]
        async with client.instructor_executions.watch(ids, deadline=self._deadline()) as changes:
            last = {change.id: change async for change in changes}
        self._note(len(ids), [change.error for change in last.values()])


def memory() -> float:
    """Return the memory of this process in MiB."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MEBIBYTE


def sockets() -> int:
    """Return the number of open sockets of this process."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            count += str(link.readlink()).startswith("socket:")
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
    return count


async def soak(base_url: str, seconds: float, seed: int) -> bool:
    """Run for a number of seconds, print the counts, and return whether they balance."""
    before = sockets()
    job = Soak(base_url, seconds, seed)
    measured: list[float] = []

    async def measure() -> None:
        for share in (0.1, 0.4, 0.49):
            await asyncio.sleep(share * seconds)
            measured.append(memory())

    measuring = asyncio.create_task(measure())
    await job.run()
    await measuring
    for _ in range(10):
        await asyncio.sleep(0.01)
    tasks, left = len(asyncio.all_tasks()) - 1, sockets() - before
    print(f"seconds {seconds:.0f}, seed {seed}, loop {type(asyncio.get_running_loop()).__module__}")
    for name, count in [*job.totals.items(), *job.tally.items()]:
        print(f"{name:>28}  {count:,}")
    print(f"{'memory, MiB':>28}  " + ", ".join(f"{size:.1f}" for size in measured) + " (after 10 %, 50 %, 99 %)")
    print(f"{'tasks left':>28}  {tasks}\n{'sockets left':>28}  {left}")
    return job.tally["ids"] == job.tally["outcomes"] and not tasks and left <= 0


@contextmanager
def server(seed: int) -> Any:
    """Run the emulator in another process, and yield its base URL."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, seed), daemon=True)
    process.start()
    try:
        yield here.recv()
        here.send("stop")
        requests, connections = here.recv()
        print(f"{'requests that came':>28}  {requests:,}\n{'connections that stayed':>28}  {connections}")
    finally:
        process.terminate()
        process.join()


def main() -> None:
    """Run the soak, and exit with 1 if the counts do not balance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", type=float, nargs="?", default=600.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--uvloop", action="store_true", help="run the client on uvloop")
    arguments = parser.parse_args()
    logging.getLogger("kaizen_async").setLevel(logging.ERROR)
    loop = uvloop.new_event_loop if arguments.uvloop else asyncio.new_event_loop
    with server(arguments.seed) as base_url, asyncio.Runner(loop_factory=loop) as runner:
        balances = runner.run(soak(base_url, arguments.seconds, arguments.seed))
    print("it balances" if balances else "it does not balance")
    sys.exit(not balances)


if __name__ == "__main__":
    main()
