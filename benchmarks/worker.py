"""One run of one contender in its own process, which reads a `Job` as JSON and prints the measurements as JSON.

The CPU time covers the whole process with its threads, from the start of the run to its end. It excludes imports,
set-up and warm-up. The peak memory is that of the whole process.
"""

import asyncio
import gc
import importlib
import json
import resource
import sys
import tracemalloc
from asyncio import new_event_loop
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import data
from contender import Contender

_HEARTBEAT_SECONDS: Final = 0.001
_WARM_UP_LOOK_UPS: Final = 100
_LEARNING_LOOK_UPS: Final = 1000


@dataclass(frozen=True)
class Job:
    """The work of one worker."""

    task: str
    contender: str
    base_url: str = ""
    concurrency: int = 50
    look_ups: int = 1
    uvloop: bool = False
    in_flight: int | None = None
    patience: float = 60.0
    """Seconds after which a storm or an outage is cut short."""
    authority: str | None = None
    """File with the certificate of an authority that the contender trusts, for https."""
    traced: bool = False
    """Whether memory is counted allocation by allocation rather than as the process's."""


def load(name: str) -> type[Contender]:
    """Return a contender's class."""
    found: type[Contender] = importlib.import_module(f"contenders.{name}").Contender
    return found


@asynccontextmanager
async def warm(job: Job) -> AsyncIterator[Contender]:
    """Set a contender up, and let it open its connections."""
    contender = load(job.contender)(job.base_url, job.concurrency)
    await contender.setup()
    await contender.run(list(data.execution_ids(max(_WARM_UP_LOOK_UPS, job.concurrency))))
    gc.collect()
    yield contender
    await contender.close()


async def speed(job: Job) -> dict[str, Any]:
    """Measure CPU time, wall time, latency and peak memory."""
    ids = list(data.execution_ids(job.look_ups))
    async with warm(job) as contender:
        cpu, began = cpu_seconds(), perf_counter()
        latencies = sorted(await contender.run(ids))
        wall, cpu = perf_counter() - began, cpu_seconds() - cpu
    return {
        "cpu_us": cpu / job.look_ups * 1e6,
        "per_second": job.look_ups / wall,
        "wall_us": wall / job.look_ups * 1e6,
        "p50_ms": quantile(latencies, 0.50) * 1e3,
        "p99_ms": quantile(latencies, 0.99) * 1e3,
        "peak_mb": memory_bytes("VmHWM") / 1e6,
    }


async def tail(job: Job) -> dict[str, Any]:
    """Measure the latency of the slowest responses, after the contender has learned the usual one."""
    async with warm(job) as contender:
        await contender.run(list(data.execution_ids(_LEARNING_LOOK_UPS)))
        ids = list(data.execution_ids(job.look_ups))
        cpu = cpu_seconds()
        latencies = sorted(await contender.run(ids))
        cpu = cpu_seconds() - cpu
    p50, p99 = quantile(latencies, 0.50), quantile(latencies, 0.99)
    return {
        "p50_ms": p50 * 1e3,
        "p99_ms": p99 * 1e3,
        "p999_ms": quantile(latencies, 0.999) * 1e3,
        "p99_p50": p99 / p50,
        "cpu_us": cpu / job.look_ups * 1e6,
        "asked": job.look_ups + _LEARNING_LOOK_UPS + max(_WARM_UP_LOOK_UPS, job.concurrency),
    }


async def lag(job: Job) -> dict[str, Any]:
    """Measure the delay of another task in the same loop while the lookups run."""
    ids = list(data.execution_ids(job.look_ups))
    late: list[float] = []

    async def beat() -> None:
        while True:
            began = perf_counter()
            await asyncio.sleep(_HEARTBEAT_SECONDS)
            late.append(perf_counter() - began - _HEARTBEAT_SECONDS)

    async with warm(job) as contender:
        heart = asyncio.create_task(beat())
        await asyncio.sleep(0)
        await contender.run(ids)
        heart.cancel()
        late.sort()
    return {
        "beats": len(late),
        "p50_ms": quantile(late, 0.50) * 1e3,
        "p99_ms": quantile(late, 0.99) * 1e3,
        "max_ms": late[-1] * 1e3,
    }


async def first(job: Job) -> dict[str, Any]:
    """Measure the first lookup of a client, from its creation to the record, and then that of a second client."""
    figures = {}
    for which in ("first", "second"):
        cpu, began = cpu_seconds(), perf_counter()
        contender = load(job.contender)(job.base_url, job.concurrency)
        await contender.setup()
        await contender.look_up("exec_00000001")
        figures[f"{which}_ms"] = (perf_counter() - began) * 1e3
        figures[f"{which}_cpu_ms"] = (cpu_seconds() - cpu) * 1e3
        await contender.close()
    return figures


async def memory(job: Job) -> dict[str, Any]:
    """Measure the memory that a bulk method holds, and its peak."""
    async with warm(job) as contender:
        ids: Any = data.execution_ids(job.look_ups)
        if not contender.lazy:
            ids = list(ids)
        if job.traced:
            tracemalloc.start()
        before = memory_bytes("VmRSS")
        kept = await contender.keep(ids)
        gc.collect()
        held = tracemalloc.get_traced_memory()[0] if job.traced else memory_bytes("VmRSS") - before
        del kept
    return {"held_bytes": held / job.look_ups, "peak_mb": memory_bytes("VmHWM") / 1e6}


async def ends(job: Job) -> dict[str, Any]:
    """Count the results of lookups whose server throttles or fails."""
    contender = load(job.contender)(job.base_url, job.concurrency)
    await contender.setup()
    counted: Counter[str] = Counter()
    began = perf_counter()
    try:
        async with asyncio.timeout(job.patience):
            await contender.attempt(list(data.execution_ids(job.look_ups)), counted, in_flight=job.in_flight)
    except TimeoutError:
        counted["unfinished"] = job.look_ups - counted.total()
    wall = perf_counter() - began
    await contender.close()
    return {"wall_s": wall, "ends": dict(counted)}


TASKS: Final[dict[str, Callable[[Job], Coroutine[Any, Any, dict[str, Any]]]]] = {
    task.__name__: task for task in (speed, tail, lag, first, memory, ends)
}


def cpu_seconds() -> float:
    """Return the processor time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def memory_bytes(field: str) -> int:
    """Return a field of the process's memory in bytes, because getrusage may return the parent's peak."""
    try:
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


def quantile(ordered: list[float], share: float) -> float:
    """Return the value below which a share of the values lies."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main() -> None:
    """Run the job."""
    job = Job(**json.loads(sys.argv[1]))
    factory = importlib.import_module("uvloop").new_event_loop if job.uvloop else new_event_loop
    load(job.contender)
    with asyncio.Runner(loop_factory=factory) as runner:
        print(json.dumps(runner.run(TASKS[job.task](job))))


if __name__ == "__main__":
    main()
