"""One run of many waits in its own process, which reads a `Job` as JSON and prints the measurements as JSON.

The server is `answering.py living`, whose executions never end, or end some seconds after the first request.
"""

import asyncio
import gc
import json
import sys
import tracemalloc
from asyncio import new_event_loop
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import import_module
from time import perf_counter
from typing import Any, Final

from worker import cpu_seconds, memory_bytes, quantile

from kaizen_async import InstructorExecution, KaizenClient, PollPolicy

HEARTBEAT_SECONDS: Final = 0.001
SAMPLE_SECONDS: Final = 0.02
CONCURRENCY: Final = 50


@dataclass(frozen=True)
class Job:
    """The work of one process."""

    task: str
    base_url: str
    ids: int
    callers: int = 0
    seconds: float = 10.0
    uvloop: bool = False


async def idle(job: Job) -> dict[str, Any]:
    """Measure the delay of a heartbeat in an idle loop."""
    late: list[float] = []
    heart = asyncio.create_task(_beat(late))
    await asyncio.sleep(job.seconds)
    await _stop(heart)
    return _lag(late)


async def looking_up(job: Job) -> dict[str, Any]:
    """Measure the delay of a heartbeat beside a stream of lookups at full speed."""
    late: list[float] = []
    async with KaizenClient(base_url=job.base_url, concurrency=CONCURRENCY) as kaizen:
        stream = kaizen.instructor_executions.stream(f"never_{number}" for number in range(10**9))
        async with stream as outcomes, asyncio.timeout(job.seconds + 60):
            began, heart = perf_counter(), asyncio.create_task(_beat(late))
            async for _ in outcomes:
                if perf_counter() - began > job.seconds:
                    break
            await _stop(heart)
        return {**_lag(late), "per_second": kaizen.stats().attempts / (perf_counter() - began)}


async def waiting(job: Job) -> dict[str, Any]:
    """Measure the delay of a heartbeat beside a wait for more polls than are possible. Count tasks and CPU time."""
    late: list[float] = []
    tasks: list[int] = []
    ids = _ids(job)
    async with KaizenClient(base_url=job.base_url, concurrency=CONCURRENCY) as kaizen:
        await kaizen.instructor_executions.get_many(ids[: 2 * CONCURRENCY])
        resident = memory_bytes("VmRSS")
        # Each id is due again at once, so that there are always more polls than are possible.
        policy = PollPolicy(min_interval=1.0, max_interval=1.0)
        async with kaizen.instructor_executions.wait_many(ids, deadline=None, poll=policy):
            began = perf_counter()
            await _until(lambda: kaizen.stats().waiting == job.ids)
            taken_in = perf_counter() - began
            others = [asyncio.create_task(_beat(late)), asyncio.create_task(_count(tasks))]
            began, cpu, polls = perf_counter(), cpu_seconds(), kaizen.stats().polls
            await asyncio.sleep(job.seconds)
            wall, cpu, polls = perf_counter() - began, cpu_seconds() - cpu, kaizen.stats().polls - polls
            await _stop(*others)
            resident = memory_bytes("VmRSS") - resident
            stats = kaizen.stats()
            if stats.failed:
                raise RuntimeError(f"{stats.failed} polls failed")
            left = perf_counter()
        left = perf_counter() - left
    return {
        **_lag(late),
        "per_second": polls / wall,
        "cpu_us": cpu / polls * 1e6,
        "tasks": max(tasks) - len(others),
        "taken_in_s": taken_in,
        "left_s": left,
        "poll_delay": stats.poll_delay,
        "resident": resident / job.ids,
    }


async def memory(job: Job) -> dict[str, Any]:
    """Count the bytes of a wait for each id after its first poll, and those of the records alone."""
    ids = _ids(job)
    async with KaizenClient(base_url=job.base_url, concurrency=CONCURRENCY) as kaizen:
        await kaizen.instructor_executions.get_many(ids[: 2 * CONCURRENCY])
        records = await _held_by_records(kaizen, ids)
        tracemalloc.start()
        policy = PollPolicy(min_interval=3600, max_interval=7200)
        async with kaizen.instructor_executions.wait_many(ids, deadline=None, poll=policy):
            await _until(lambda: kaizen.stats().polls == job.ids)
            gc.collect()
            held = tracemalloc.get_traced_memory()[0]
            tracemalloc.stop()
    return {"held": held / job.ids, "records": records}


async def sharing(job: Job) -> dict[str, Any]:
    """Let many callers wait for the same few executions, and count the polls."""
    ids = [f"{job.seconds:g}_{job.callers}_{number}" for number in range(job.ids)]
    async with KaizenClient(
        base_url=job.base_url, concurrency=CONCURRENCY, poll=PollPolicy(max_interval=1.0)
    ) as kaizen:
        wait = kaizen.instructor_executions.wait
        began, cpu = perf_counter(), cpu_seconds()
        await asyncio.gather(*(wait(ids[number % job.ids]) for number in range(job.callers)))
        wall, cpu = perf_counter() - began, cpu_seconds() - cpu
        return {"polls": kaizen.stats().polls, "requests": kaizen.stats().attempts, "wall_s": wall, "cpu_s": cpu}


TASKS: Final[dict[str, Callable[[Job], Awaitable[dict[str, Any]]]]] = {
    task.__name__: task for task in (idle, looking_up, waiting, memory, sharing)
}


def _ids(job: Job) -> list[str]:
    return [f"never_{number:08d}" for number in range(job.ids)]


async def _held_by_records(kaizen: KaizenClient, ids: list[str]) -> float:
    gc.collect()
    tracemalloc.start()
    records: list[InstructorExecution] = []
    async with kaizen.instructor_executions.stream(ids) as outcomes:
        async for outcome in outcomes:
            records.append(outcome.unwrap())  # noqa: PERF401 - a list comprehension would hold more
    gc.collect()
    held = tracemalloc.get_traced_memory()[0] / len(records)
    tracemalloc.stop()
    return held


async def _beat(late: list[float]) -> None:
    while True:
        began = perf_counter()
        await asyncio.sleep(HEARTBEAT_SECONDS)
        late.append(perf_counter() - began - HEARTBEAT_SECONDS)


async def _count(tasks: list[int]) -> None:
    while True:
        tasks.append(len(asyncio.all_tasks()))
        await asyncio.sleep(SAMPLE_SECONDS)


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - there is no event to await
        await asyncio.sleep(SAMPLE_SECONDS)


async def _stop(*tasks: "asyncio.Task[None]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def _lag(late: list[float]) -> dict[str, Any]:
    late.sort()
    return {
        "p50_ms": quantile(late, 0.50) * 1e3,
        "p99_ms": quantile(late, 0.99) * 1e3,
        "max_ms": late[-1] * 1e3,
    }


def main() -> None:
    """Run the job."""
    job = Job(**json.loads(sys.argv[1]))
    factory = import_module("uvloop").new_event_loop if job.uvloop else new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        print(json.dumps(runner.run(TASKS[job.task](job))))


if __name__ == "__main__":
    main()
