"""Rules for all tests, and the servers that tests use."""

import asyncio
import inspect
import logging
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aioresponses import aioresponses
from hypothesis import settings

from kaizen_async import InstructorExecution
from kaizen_async.testing import KaizenEmulator

settings.register_profile("kaizen_async", deadline=None)
settings.load_profile("kaizen_async")
"""A single example has no deadline, because on a busy machine it would measure the machine."""

asyncio.constants.DEBUG_STACK_DEPTH = 3
"""Frames that asyncio keeps for each task, future and handle in debug mode. Ten would take most of the tests' time."""

SAMPLES = Path(__file__).parent / "samples"


def pytest_configure(config: pytest.Config) -> None:
    """Leave the workers out of the coverage without a redis-server, because their tests are then skipped."""
    coverage = getattr(config.pluginmanager.getplugin("_cov"), "cov_controller", None)
    if coverage is not None and coverage.combining_cov is not None and shutil.which("redis-server") is None:
        needs_redis = ["kaizen_async/workers/*", "kaizen_async/_cli/run.py"]
        coverage.combining_cov.set_option("report:omit", needs_redis)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the settings of the user's environment from the tests."""
    for name in ("KAIZEN_API_KEY", "KAIZEN_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)


class _Complaints(logging.Handler):
    """A handler for errors that asyncio logs, such as unretrieved exceptions, pending tasks and open sessions."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture(autouse=True)
def _no_complaint_of_asyncio() -> Iterator[None]:
    """Fail a test about which asyncio complains."""
    complaints = _Complaints()
    logger = logging.getLogger("asyncio")
    logger.addHandler(complaints)
    yield
    logger.removeHandler(complaints)
    assert not complaints.texts, complaints.texts


@pytest.fixture
async def _no_task_left() -> AsyncIterator[None]:
    """Fail a test that leaves tasks behind. Servers in the test's loop are fixtures, so they have stopped by then."""
    yield
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, left


@pytest.fixture(autouse=True)
def _every_coroutine_test_leaves_no_task(request: pytest.FixtureRequest) -> None:
    if inspect.iscoroutinefunction(getattr(request.node, "obj", None)):
        request.getfixturevalue("_no_task_left")


@pytest.fixture
def emulator() -> Iterator[KaizenEmulator]:
    """Return an emulator in its own thread, so that all tasks and sockets of the test's loop are the client's."""
    with KaizenEmulator() as running:
        yield running


@pytest.fixture
def sample_execution() -> InstructorExecution:
    """Return the documented example as a record."""
    return msgspec.json.decode((SAMPLES / "documented.json").read_bytes(), type=InstructorExecution)


class _Writer:
    output_size = 0


class _PatchedResponse(aiohttp.ClientResponse):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("stream_writer", _Writer())
        super().__init__(*args, **kwargs)


@pytest.fixture
def mocked(monkeypatch: pytest.MonkeyPatch) -> Iterator[aioresponses]:
    """Return aioresponses, for plain responses without a socket.

    Its version 0.7.9 cannot create responses of aiohttp 3.14, which need a `stream_writer`
    (https://github.com/pnuckowski/aioresponses/issues/289). Once a release can, `_PatchedResponse` can go.
    """
    if "stream_writer" in inspect.signature(aiohttp.ClientResponse).parameters:
        monkeypatch.setattr("aioresponses.core.ClientResponse", _PatchedResponse)
    with aioresponses() as mock:
        yield mock
