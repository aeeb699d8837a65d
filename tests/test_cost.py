"""The cost of a lookup in requests, tasks and bytes, checked by counting, so that regressions show without a clock."""

import asyncio
import gc
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from yarl import URL

from kaizen_async import KaizenClient, RetryPolicy, TransportError
from kaizen_async._transport.transport import Answer, Transport
from kaizen_async._transport.wire import Endpoint
from kaizen_async.models import InstructorExecution
from kaizen_async.testing import KaizenEmulator, Life

RECORD = (Path(__file__).parent / "samples" / "documented.json").read_bytes()
BYTES_PER_OUTCOME = 150
BYTES_PER_ERROR = 1500
BYTES_PER_STREAMED_ID = 20  # a record would take over 1,000
MODULES_OF_OURS = 65
FOREIGN_MODULES = {"html", "html.entities", "array"}  # of the standard library; Python 3.11 has loaded array before


def body_for(execution_id: str) -> bytes:
    """Return the body of a response with the requested id."""
    return json.dumps(json.loads(RECORD) | {"id": execution_id}).encode()


@pytest.fixture(autouse=True)
async def no_debug_mode() -> None:
    """Turn off asyncio's debug mode, because it keeps a stack for each task, handle and future."""
    asyncio.get_running_loop().set_debug(False)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Respond to each request at once, so that the test measures only the library's own allocations."""
    template = body_for("@")

    async def send(self: Transport, url: URL, body: bytes, is_held: Callable[[], bool]) -> Answer:
        await asyncio.sleep(0)
        return Answer(200, {}, template.replace(b'"@"', body[6:-1]))

    monkeypatch.setattr(Transport, "send", send)


async def tasks_created(work: Coroutine[Any, Any, object]) -> int:
    """Return how many tasks a piece of work creates."""
    created = 0

    def count(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        nonlocal created
        created += 1
        return asyncio.Task(coroutine, loop=loop, **options)

    loop = asyncio.get_running_loop()
    loop.set_task_factory(count)
    try:
        await work
    finally:
        loop.set_task_factory(None)
    return created


def bytes_kept(make: Callable[[], object]) -> int:
    """Return the size in bytes of the object that `make` returns."""
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    kept = make()
    gc.collect()
    taken = tracemalloc.get_traced_memory()[0] - before
    del kept
    return taken


async def test_a_successful_lookup_is_one_request() -> None:
    """Each successful lookup sends exactly one request."""
    async with KaizenEmulator(default_life=Life.ended(duration=5)) as emulator:
        async with KaizenClient(base_url=emulator.base_url) as kaizen:
            await kaizen.instructor_executions.get_many([f"exec_{number}" for number in range(300)])
        assert emulator.request_count == 300


async def test_equal_ids_in_flight_are_one_request() -> None:
    """A hundred concurrent lookups of one id share one request."""
    async with KaizenEmulator(default_life=Life.ended(duration=5)) as emulator:
        async with KaizenClient(base_url=emulator.base_url) as kaizen:
            await asyncio.gather(*(kaizen.instructor_executions.get("exec_1") for _ in range(100)))
        assert emulator.request_count == 1


async def test_get_creates_no_task(no_network: None) -> None:
    """A single lookup runs in its caller's task."""
    async with KaizenClient() as kaizen:
        assert await tasks_created(kaizen.instructor_executions.get("exec_1")) == 0


async def test_get_many_creates_as_many_tasks_as_its_concurrency(no_network: None) -> None:
    """A thousand lookups share as many worker tasks as the concurrency."""
    async with KaizenClient(concurrency=20) as kaizen:
        ids = [f"exec_{number}" for number in range(1000)]
        assert await tasks_created(kaizen.instructor_executions.get_many(ids)) == 20


@pytest.mark.no_cover
async def test_an_outcome_takes_few_bytes_beside_its_record(no_network: None) -> None:
    """`get_many` keeps few bytes for each id besides the id and its record."""
    ids = [f"exec_{number}" for number in range(2000)]
    decode = Endpoint("path", InstructorExecution).decode
    tracemalloc.start()
    try:
        records = bytes_kept(lambda: [decode(body_for(execution_id), execution_id) for execution_id in ids])
        async with KaizenClient(ended_records=0) as kaizen:
            await kaizen.instructor_executions.get_many(ids[:100])
            gc.collect()
            before = tracemalloc.get_traced_memory()[0]
            outcomes = await kaizen.instructor_executions.get_many(ids)
            gc.collect()
            taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert all(outcome.ok for outcome in outcomes)
    assert (taken - records) / len(ids) < BYTES_PER_OUTCOME


@pytest.mark.no_cover
async def test_a_stream_keeps_nothing(no_network: None) -> None:
    """The memory of a stream does not grow with the number of ids that have passed through it.

    The consumer measures it a few ids before the end, with all lookups in flight.
    """

    async def held_after(count: int) -> int:
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        async with kaizen.instructor_executions.stream(f"exec_{number}" for number in range(count)) as outcomes:
            seen = 0
            async for _ in outcomes:
                seen += 1
                if seen == count - 20:
                    gc.collect()
                    held = tracemalloc.get_traced_memory()[0] - before
        return held

    tracemalloc.start()
    try:
        # The records that a client keeps for `max_age` have their own bound.
        async with KaizenClient(concurrency=10, ended_records=0) as kaizen:
            await held_after(500)
            short, long = await held_after(500), await held_after(4500)
    finally:
        tracemalloc.stop()
    assert long - short < 4000 * BYTES_PER_STREAMED_ID


def test_importing_loads_nothing_beside_the_dependencies() -> None:
    """Importing the package adds only its own modules to those of aiohttp, msgspec and tenacity."""
    code = (
        "import sys, aiohttp, msgspec, msgspec.json, tenacity; before = set(sys.modules); import kaizen_async; "
        "print(*sorted(set(sys.modules) - before))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()  # noqa: S603
    foreign = [name for name in loaded if not name.startswith("kaizen_async")]
    assert set(foreign) <= FOREIGN_MODULES
    assert len(loaded) - len(foreign) <= MODULES_OF_OURS
    assert not {"kaizen_async.testing", "kaizen_async._cli"} & set(loaded)


def ours_in_cycles() -> list[object]:
    """Return the package's own objects that only the cycle collector could free."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        return [each for each in gc.garbage if str(getattr(each, "__module__", "")).startswith("kaizen_async")]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Disable the automatic cycle collector during the test."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("method", ["get", "get_many", "stream", "wait", "wait_many", "watch"])
async def test_a_call_leaves_nothing_for_the_cycle_collector(no_network: None, no_collector: None, method: str) -> None:
    """A finished call frees its objects at once, so that memory does not grow until the collector runs."""
    async with KaizenClient(concurrency=10) as kaizen:
        call = getattr(kaizen.instructor_executions, method)
        if method in {"get", "wait"}:
            await call("exec_1")
        elif method == "get_many":
            await call([f"exec_{number}" for number in range(100)])
        else:
            async with call(f"exec_{number}" for number in range(100)) as results:
                assert len([result async for result in results]) == 100
            del results
        del call
        assert ours_in_cycles() == []


async def test_failed_lookups_are_small_and_leave_nothing_for_the_cycle_collector(no_collector: None) -> None:
    """Stored connection errors are small and form no reference cycles."""
    policy = RetryPolicy(max_attempts=1)
    async with KaizenClient(base_url="http://127.0.0.1:1", concurrency=10, retry=policy) as kaizen:
        await kaizen.instructor_executions.get_many(["warm up"])
        tracemalloc.start()
        try:
            outcomes = await kaizen.instructor_executions.get_many([f"exec_{n}" for n in range(200)])
            assert all(isinstance(outcome.error, TransportError) for outcome in outcomes)
            assert ours_in_cycles() == []
            held, _ = tracemalloc.get_traced_memory()
            del outcomes
            left, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert (held - left) / 200 < BYTES_PER_ERROR
