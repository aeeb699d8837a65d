"""Waits on real sockets survive server restarts, killed processes and many callers for the same ids."""

import asyncio
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kaizen_async import DeadlineExceededError, KaizenClient, PollPolicy
from kaizen_async.clock import sleep
from kaizen_async.testing import Fault, KaizenEmulator, Life, VirtualClock

QUICK = PollPolicy(min_interval=0.05, max_interval=0.1)


def world(clock: VirtualClock, **settings: Any) -> tuple[KaizenEmulator, Any]:
    """Return an emulator in virtual time, and a function that creates a client for it."""
    emulator = KaizenEmulator(clock=clock)
    return emulator, lambda: KaizenClient(base_url=emulator.base_url, clock=clock, **settings)


async def down_for(emulator: KaizenEmulator, clock: VirtualClock, at: float, seconds: float) -> None:
    """Stop an emulator at a virtual time, and start it again after a number of seconds."""
    await sleep(clock, at)
    await emulator.stop()
    await sleep(clock, seconds)
    clock.hold()
    await emulator.start()
    clock.release()


@pytest.mark.parametrize("seconds", [3.0, 600.0])
async def test_a_server_that_restarts_costs_nothing_but_time(seconds: float) -> None:
    """If the server restarts during a wait, every execution still gets its record."""
    clock = VirtualClock()
    emulator, client_here = world(clock, deadline=5)
    ids = [f"e{number}" for number in range(8)]
    async with emulator:
        for number, execution_id in enumerate(ids):
            emulator.add(execution_id, Life.lasting(20 + 10 * number))
        emulator.faults.always(Fault.latency(0.01))
        async with client_here() as client:
            restart = asyncio.create_task(down_for(emulator, clock, 30.0, seconds))
            ends: dict[str, float] = {}
            async with client.instructor_executions.wait_many(ids, deadline=3600) as outcomes:
                async for outcome in outcomes:
                    assert outcome.unwrap().is_finished
                    assert outcome.id not in ends
                    ends[outcome.id] = clock.time()
            await restart
            assert client.stats().attempts > client.stats().succeeded
        assert set(ends) == set(ids)
        late = [end - (20 + 10 * number) for number, end in enumerate(ends[i] for i in ids)]
        assert max(late) <= seconds + 2 * 15


async def test_the_error_names_an_unreachable_server() -> None:
    """The deadline's error has the last record, and the reason why later polls failed."""
    clock = VirtualClock()
    emulator, client_here = world(clock)
    async with emulator:
        emulator.add("exec_1", Life.running())
        async with client_here() as client:
            stop = asyncio.create_task(down_for(emulator, clock, 20, 1000))
            with pytest.raises(DeadlineExceededError, match="its last poll failed: could not connect") as caught:
                await client.instructor_executions.wait("exec_1", deadline=100)
            assert caught.value.last_execution.id == "exec_1"
            assert clock.time() == 100
            await stop


def test_waits_work_in_one_loop_after_another(emulator: KaizenEmulator) -> None:
    """On real sockets, a client remembers finished executions in the next event loop."""
    emulator.add("a", Life.lasting(0.2))
    emulator.add("b", Life.lasting(0.4))
    client = KaizenClient(base_url=emulator.base_url, poll=QUICK)

    async def wait_for(*ids: str) -> list[str]:
        async with client.instructor_executions.wait_many(ids, deadline=20) as outcomes:
            return [outcome.unwrap().id async for outcome in outcomes]

    async def close() -> None:
        assert (await client.instructor_executions.wait("b")).is_finished
        await client.aclose()

    assert asyncio.run(wait_for("a")) == ["a"]
    requests = emulator.requests_for("a")
    assert asyncio.run(wait_for("b", "a")) == ["a", "b"]
    assert emulator.requests_for("a") == requests
    asyncio.run(close())


async def test_many_callers_on_ten_executions_make_the_polls_for_ten() -> None:
    """The server receives as many polls for 300 callers of ten executions as for ten callers."""

    async def requests(callers: int) -> int:
        clock = VirtualClock()
        emulator, client_here = world(clock, poll=PollPolicy(max_interval=60))
        async with emulator:
            for number in range(10):
                emulator.add(f"e{number}", Life.lasting(100))
            async with client_here() as client:
                wait = client.instructor_executions.wait
                found = await asyncio.gather(*(wait(f"e{number % 10}") for number in range(callers)))
                assert all(execution.is_finished for execution in found)
            return emulator.request_count

    assert await requests(300) <= 1.1 * await requests(10)


WAITING_PROCESS = """
import asyncio, json, os, sys
from pathlib import Path
from kaizen_async import KaizenClient, PollPolicy

base_url, path, ids = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])

def store(done, checkpoint):
    path.with_suffix(".new").write_text(json.dumps({"done": done, "checkpoint": checkpoint}))
    os.replace(path.with_suffix(".new"), path)

async def main():
    earlier = json.loads(path.read_text()) if path.exists() else {"done": [], "checkpoint": None}
    done = earlier["done"]
    async with KaizenClient(base_url=base_url, poll=PollPolicy(min_interval=0.02, max_interval=0.1)) as kaizen:
        stream = kaizen.instructor_executions.wait_many(ids, checkpoint=earlier["checkpoint"])
        async with stream as outcomes:
            async for outcome in outcomes:
                done.append(outcome.unwrap().id)
                store(done, outcomes.checkpoint())
                print(outcome.id, flush=True)

asyncio.run(main())
"""


def test_a_killed_wait_resumes_in_another_process(tmp_path: Path) -> None:
    """After a SIGKILL, a second process resumes, and both together yield every id exactly once."""
    ids = [f"e{number}" for number in range(60)]
    seconds = 0.0
    state = tmp_path / "state.json"

    def run(emulator: KaizenEmulator, ids: list[str]) -> "subprocess.Popen[str]":
        arguments = [emulator.base_url, str(state), json.dumps(ids)]
        return subprocess.Popen(  # noqa: S603 - our own script
            [sys.executable, "-c", WAITING_PROCESS, *arguments], stdout=subprocess.PIPE, text=True, bufsize=1
        )

    with KaizenEmulator(clock=lambda: seconds) as emulator:
        for number, execution_id in enumerate(ids):
            emulator.add(execution_id, Life.lasting(1.0 + number))
        with run(emulator, [*ids, "e5", "e50"]) as process:
            assert process.stdout is not None
            seconds = 30.0
            for _ in range(20):
                assert process.stdout.readline().startswith("e")
            process.kill()
        assert process.returncode < 0
        stored = json.loads(state.read_text())
        assert 20 <= len(stored["done"]) <= 31
        left = Counter({entry[0]: entry[1] for entry in stored["checkpoint"]["ids"]})
        assert Counter(stored["done"]) + left >= Counter(ids)
        polled = {i: emulator.requests_for(i) for i in ids}
        seconds = 100.0
        with run(emulator, []) as process:
            process.communicate(timeout=20)
        assert process.returncode == 0
        assert Counter(json.loads(state.read_text())["done"]) == Counter([*ids, "e5", "e50"])
        again = [i for i in stored["done"][:-1] if emulator.requests_for(i) > polled[i] and i not in left]
        assert not again
