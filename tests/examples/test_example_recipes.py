"""The recipes run unchanged: a Celery worker with one event loop per task, Dask, Ray, and a plain script."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from running_examples import EXAMPLES, RedisServer, Running, python, require

from kaizen_async.testing import KaizenEmulator, Life

require("celery", "redis")

pytestmark = [pytest.mark.example, pytest.mark.timeout(120)]

FOLDER = EXAMPLES / "recipes"


@pytest.fixture
def emulator() -> Iterator[KaizenEmulator]:
    """Return an emulator in which all executions have ended, except `no_1`, which does not exist."""
    with KaizenEmulator(default_life=lambda id: None if id == "no_1" else Life.ended()) as running:
        yield running


def test_one_client_serves_all_tasks_of_a_celery_process(emulator: KaizenEmulator, tmp_path: Path) -> None:
    """One client serves the event loops of all tasks in turn, and leaves no connection open and no warning."""
    ids = [f"exec_{number}" for number in range(5)]
    with RedisServer(tmp_path) as redis:
        settings = {
            "REDIS_URL": redis.url,
            "KAIZEN_BASE_URL": emulator.base_url,
            "PYTHONWARNINGS": "always::ResourceWarning",
        }
        command = python(
            "-m",
            "celery",
            "-A",
            "celery_tasks",
            "worker",
            "--loglevel",
            "INFO",
            "--pool",
            "prefork",
            "--concurrency",
            "1",
        )
        with Running(*command, folder=FOLDER, log=tmp_path / "worker.log", settings=settings) as worker:
            worker.says("ready.")
            asking = python("celery_tasks.py", *ids)
            with Running(*asking, folder=FOLDER, log=tmp_path / "asking.log", settings=settings) as asker:
                assert asker.end().splitlines() == ["Completed"] * 5
            assert emulator.open_connections == 0
            said = worker.stop()
    assert re.findall(r"/(\w+-\d+)\] Task \S+ succeeded", said) == ["ForkPoolWorker-1"] * 5
    assert "ResourceWarning" not in said
    assert "Traceback" not in said
    assert [emulator.requests_for(id) for id in ids] == [1] * 5


def test_the_plain_script_prints_a_line_for_each_id(emulator: KaizenEmulator, tmp_path: Path) -> None:
    """The script prints the status or the error of each id."""
    command = python("plain_script.py", "exec_1", "no_1", "exec_2")
    settings = {"KAIZEN_BASE_URL": emulator.base_url, "PYTHONWARNINGS": "error"}
    with Running(*command, folder=FOLDER, log=tmp_path / "script.log", settings=settings) as script:
        lines = sorted(script.end().splitlines())
    assert lines[:2] == ["exec_1 Completed", "exec_2 Completed"]
    assert lines[2].startswith("no_1 no_1: ")


@pytest.mark.parametrize("engine", ["dask", "ray"])
def test_data_engines_look_ids_up(engine: str, emulator: KaizenEmulator, tmp_path: Path) -> None:
    """Dask and Ray return the status or the error of each id, with one request for each id."""
    pytest.importorskip(engine, reason=f"without {engine}: pip install 'dask[bag]' 'ray[data]'")
    (recipe,) = FOLDER.glob(f"{engine}_*.py")
    ids = [f"exec_{number}" for number in range(20)]
    settings = {"KAIZEN_BASE_URL": emulator.base_url, "RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0"}
    command = python(recipe.name, *ids, "no_1")
    with Running(*command, folder=FOLDER, log=tmp_path / "said.log", settings=settings) as script:
        said = script.end()
    found = dict(re.findall(r"^(exec_\d+|no_1) (.*)$", said, re.MULTILINE))
    assert {id: found[id] for id in ids} == dict.fromkeys(ids, "Completed")
    assert found["no_1"].startswith("no_1: ")
    assert [emulator.requests_for(id) for id in [*ids, "no_1"]] == [1] * 21
    assert len(recipe.read_text().splitlines()) <= 40
