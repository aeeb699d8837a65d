"""The taskiq example runs with real worker processes, a real redis-server and an emulated API."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from running_examples import EXAMPLES, RedisServer, Running, python, require, taskiq, until

from kaizen_async.testing import KaizenEmulator, Life

require("taskiq", "taskiq_redis", "redis")

pytestmark = [pytest.mark.example, pytest.mark.timeout(120)]

GREET = """
import asyncio
from tasks import broker, greet

async def main():
    await broker.startup()
    await greet.kiq("world")
    await broker.shutdown()

asyncio.run(main())
"""


@pytest.fixture
def emulator() -> Iterator[KaizenEmulator]:
    """Return an emulator in which all executions have ended, except the ids that start with `no_`."""
    with KaizenEmulator(default_life=lambda id: None if id.startswith("no_") else Life.ended()) as running:
        yield running


def test_the_example_loses_nothing_when_a_worker_is_killed(tmp_path: Path, emulator: KaizenEmulator) -> None:
    """Another worker continues the ids of a killed worker.

    A stopped worker ends cleanly, and other tasks run beside.
    """
    ids = [*(f"exec_{number}" for number in range(2500)), "no_1", "no_2", "a\tb"]
    given = tmp_path / "ids.txt"
    given.write_text("\n".join(ids))
    with ExitStack() as stack:
        server = stack.enter_context(RedisServer(tmp_path, "--appendonly", "yes"))
        settings = {"REDIS_URL": server.url, "KAIZEN_BASE_URL": emulator.base_url, "KAIZEN_RATE": "600"}

        def start(name: str, *command: str, given: Path | None = None) -> Running:
            log = tmp_path / f"{name}.log"
            running = Running(*command, folder=EXAMPLES / "taskiq_workers", log=log, settings=settings, given=given)
            return stack.enter_context(running)

        worker = taskiq("worker", "tasks:broker", "-w", "1", "--shutdown-timeout", "10")
        doomed, other = start("doomed", *worker), start("other", *worker)
        for each in (doomed, other):
            each.says("Listening started.")
        producer = start("producer", *python("produce.py", "first-run"), given=given)
        until(lambda: emulator.request_count > 500, "the first requests")
        doomed.kill()
        start("greeter", *python("-c", GREET)).end()
        other.says("Hello, world")
        printed = [line.split(" ", 2) for line in producer.end().splitlines()]
        assert "Traceback" not in other.stop()
    numbers = [int(number) for number, _, _ in printed]
    assert len(set(numbers)) == len(numbers) == len(ids)
    valid = {int(number): id for number, id, _ in printed if int(number) < len(ids)}
    assert valid == dict(enumerate(ids[:-1], 1))
    assert sum(said == "Completed" for _, _, said in printed) == 2500
