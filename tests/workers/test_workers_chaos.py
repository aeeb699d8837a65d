"""Every id of a run gets exactly one outcome, whatever breaks during the run.

CHAOS_SEEDS="1 2 3" adds long runs with these seeds, each with twelve failures and network cuts of a minute.
"""

import os
import random
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM

import pytest
from running_examples import require, until

from kaizen_async.testing import KaizenEmulator, Life

require("taskiq", "taskiq_redis", "redis")

from worker_plant import A_MINUTE_AHEAD, TASKIQ, Plant, Producer  # noqa: E402 - skipped above without Redis

from kaizen_async.workers.session import DEAD_MS  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

RUNS = {"looks-up": (), "waits": ("--wait",)}
"""Runs that the same workers work on at the same time, and their options."""
SOME_FAILED, UNUSABLE = 1, 2
"""Exit statuses of a producer."""


@pytest.fixture
def emulator() -> Iterator[KaizenEmulator]:
    """Yield an API whose executions take up to 1.5 seconds. One in fifty does not exist."""

    def life(execution_id: str) -> Life | None:
        number = int(execution_id.split("_")[1])
        return None if number % 50 == 0 else Life.lasting(number % 4 / 2)

    with KaizenEmulator(default_life=life) as running:
        yield running


class Trouble:
    """A source of failures, one at a time, chosen by a seed."""

    def __init__(self, plant: Plant, seed: int, ids: list[str], cut: float) -> None:
        self.random = random.Random(seed)
        self.plant = plant
        self.ids = ids
        self.cut_seconds = cut
        self.producers: list[Producer] = []
        for run in RUNS:
            self.start_producer(run)
        plant.start_workers(TASKIQ, TASKIQ, A_MINUTE_AHEAD)

    def kill_worker(self) -> None:
        """Kill a worker and start another."""
        workers = self.plant.workers
        workers.pop(self.random.randrange(len(workers))).kill()
        self.plant.worker()

    def stop_worker(self) -> None:
        """Stop a worker in order and start another."""
        self.plant.workers.pop(0).stop()
        self.plant.worker()

    def kill_producer(self) -> None:
        """Kill a producer and start it again."""
        producer = self.take_producer()
        producer.kill()
        self.start_producer(producer.run)

    def interrupt_producer(self) -> None:
        """Interrupt a producer with Ctrl-C and start it again."""
        producer = self.take_producer()
        with suppress(ProcessLookupError):
            producer.signal_all(SIGINT)
        producer.process.wait(30)
        self.start_producer(producer.run)

    def take_producer(self) -> Producer:
        """Remove and return one of the producers."""
        return self.producers.pop(self.random.randrange(len(self.producers)))

    def add_producer(self) -> None:
        """Start a further producer of a run."""
        self.start_producer(self.random.choice(list(RUNS)))

    def start_producer(self, run: str) -> None:
        """Start a producer of a run."""
        self.producers.append(self.plant.producer(run, self.ids, *RUNS[run], "--size", "100"))

    def see_producers_end(self) -> None:
        """Wait until all producers end. Restart any that failed because Redis was away."""
        while self.producers:
            producer = self.producers.pop()
            until(lambda one=producer: one.process.poll() is not None, "the end of the producer")
            if producer.process.returncode == UNUSABLE:
                assert "Error: Redis at" in producer.said
                self.start_producer(producer.run)
            else:
                assert producer.process.returncode == SOME_FAILED

    def restart_redis(self) -> None:
        """Restart Redis after a SIGTERM or a SIGKILL."""
        self.plant.restart_redis(self.random.choice([SIGTERM, SIGKILL]))

    def cut_network(self) -> None:
        """Cut the network for a while."""
        self.plant.network.cut()
        time.sleep(self.cut_seconds)
        self.plant.network.mend()

    def fill_redis(self) -> None:
        """Let Redis run out of memory for a while."""
        redis = self.plant.redis
        redis.config_set("maxmemory", 1)
        time.sleep(2)
        redis.config_set("maxmemory", 0)

    def repeat_invitations(self) -> None:
        """Deliver every message of the queue again."""
        for _, fields in self.plant.redis.xrange("{kaizen}:invitations"):
            self.plant.redis.xadd("{kaizen}:invitations", fields)

    def strike(self) -> None:
        """Cause one of these failures."""
        self.random.choice(
            [
                self.kill_worker,
                self.kill_worker,
                self.stop_worker,
                self.kill_producer,
                self.interrupt_producer,
                self.add_producer,
                self.restart_redis,
                self.cut_network,
                self.fill_redis,
                self.repeat_invitations,
            ]
        )()


@pytest.mark.parametrize(
    ("seed", "count", "strikes", "cut", "silence"),
    [
        pytest.param(1, 200, 3, 1.0, 2000, id="short"),
        *((int(seed), 20_000, 12, 60.0, DEAD_MS) for seed in os.environ.get("CHAOS_SEEDS", "").split()),
    ],
)
def test_every_id_ends_with_one_outcome_whatever_breaks(
    tmp_path: Path, emulator: KaizenEmulator, seed: int, count: int, strikes: int, cut: float, silence: int
) -> None:
    """Every id gets one outcome despite kills, restarts, network cuts, a full Redis, and repeated messages."""
    ids = [f"exec_{number}" for number in range(1, count + 1)]
    settings = {"KAIZEN_RATE": str(2 * count // strikes), "TEST_SILENCE": str(silence)}
    with Plant(tmp_path, emulator.base_url, **settings) as plant:
        trouble = Trouble(plant, seed, ids, cut)
        for strike in range(strikes):
            part = (strike + 1) * count // (strikes + 1)
            until(lambda part=part: sum(map(plant.done, RUNS)) >= part, "some outcomes")
            trouble.strike()
        trouble.see_producers_end()
        for run in RUNS:
            outcomes = {outcome["number"]: outcome for outcome in plant.outcomes(run)}
            assert [outcomes[number]["id"] for number in range(1, count + 1)] == ids
            assert plant.fact(run, "done") == plant.fact(run, "read") == count
            failed = {outcome["id"] for outcome in outcomes.values() if "error" in outcome}
            assert failed == {id for id in ids if int(id.split("_")[1]) % 50 == 0}
            assert plant.fact(run, "failed") == len(failed)
