"""50 concurrent lookups with hostile responses, in a separate process that prints their cost as JSON."""

import argparse
import asyncio
import gc
import importlib
import json
import ssl
from collections import Counter
from time import perf_counter, thread_time
from typing import Any

import aiohttp
from worker import cpu_seconds, memory_bytes

from kaizen_async import KaizenClient, RetryPolicy

LOOKUPS = 50
ATTEMPT_TIMEOUT = 1.0
BEAT = 0.002


async def measure(base_url: str, *, by_post: bool, ca_file: str | None) -> dict[str, Any]:
    """Return the delays of another task and of timeouts, and the CPU time and the memory."""
    late: list[float] = []
    busy: list[float] = []
    ends: Counter[str] = Counter()
    context = ssl.create_default_context(cafile=ca_file) if ca_file else None

    async def beat() -> None:
        while True:
            began, worked = perf_counter(), thread_time()
            await asyncio.sleep(BEAT)
            late.append(perf_counter() - began - BEAT)
            busy.append(thread_time() - worked)

    async def look_up(client: KaizenClient, number: int) -> None:
        (outcome,) = await client.instructor_executions.get_many([f"exec_{number:08}"])
        ends[str(getattr(outcome.error, "reason", None) or "a record")[:60]] += 1

    gc.collect()
    before = memory_bytes("VmRSS")
    settings: dict[str, Any] = {"ssl_context": context}
    session = None
    if by_post:  # with tracing, the client uses `session.post`
        connector = aiohttp.TCPConnector(limit=0, ssl=context or True)
        session = aiohttp.ClientSession(connector=connector, trace_configs=[aiohttp.TraceConfig()])
        settings = {"session": session}
    client = KaizenClient(
        base_url=base_url,
        concurrency=LOOKUPS,
        attempt_timeout=ATTEMPT_TIMEOUT,
        retry=RetryPolicy(max_attempts=1),
        **settings,
    )
    heart = asyncio.create_task(beat())
    await asyncio.sleep(0.05)
    late.clear()
    busy.clear()
    began, cpu = perf_counter(), cpu_seconds()
    async with client:
        await asyncio.gather(*(look_up(client, number) for number in range(LOOKUPS)))
        wall, cpu = perf_counter() - began, cpu_seconds() - cpu
    heart.cancel()
    if session is not None:
        await session.close()
    return {
        "stall_ms": max(late) * 1e3,
        "busy_ms": max(busy) * 1e3,
        "over_ms": max(0.0, wall - ATTEMPT_TIMEOUT) * 1e3,
        "cpu_ms": cpu * 1e3,
        "memory_mb": (memory_bytes("VmHWM") - before) / 1e6,
        "ends": dict(ends),
    }


def main() -> None:
    """Measure once."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base_url")
    parser.add_argument("--post", action="store_true")
    parser.add_argument("--uvloop", action="store_true")
    parser.add_argument("--ca-file")
    asked = parser.parse_args()
    factory = importlib.import_module("uvloop").new_event_loop if asked.uvloop else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        print(json.dumps(runner.run(measure(asked.base_url, by_post=asked.post, ca_file=asked.ca_file))))


if __name__ == "__main__":
    main()
