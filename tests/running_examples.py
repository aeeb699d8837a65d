"""Helpers to run the examples as users do, with real processes and a real redis-server."""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SECONDS = 60.0
"""Longest time in seconds that a test waits for anything."""
_LOOK_AGAIN = 0.02


def require(*modules: str, program: str = "redis-server", package: str = "redis-server") -> None:
    """Skip a whole test file if a module or program is missing, and say what to install."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(f"without {', '.join(missing)}: pip install -e '.[test,examples]'", allow_module_level=True)
    if shutil.which(program) is None:
        pytest.skip(f"without {program}: apt-get install {package}", allow_module_level=True)


def until(condition: Callable[[], Any], what: str) -> None:
    """Wait until a condition holds."""
    assert within(SECONDS, condition), f"not within {SECONDS:.0f} s: {what}"


def within(seconds: float, condition: Callable[[], Any]) -> bool:
    """Wait until a condition holds or the time is over, and return whether it holds."""
    deadline = time.monotonic() + seconds
    while not (holds := bool(condition())) and time.monotonic() < deadline:
        time.sleep(_LOOK_AGAIN)
    return holds


class Running:
    """A process group that ends completely at the end of the block.

    Args:
        command: The command line.
        folder: The working directory.
        log: The file for the output on both streams.
        settings: Additional environment variables.
        given: The file for standard input.
    """

    def __init__(
        self, *command: str, folder: Path, log: Path, settings: dict[str, str], given: Path | None = None
    ) -> None:
        self._log = log
        with log.open("wb") as file, Path(given or os.devnull).open("rb") as stdin:
            self.process = subprocess.Popen(  # noqa: S603 - our own
                command,
                cwd=folder,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **settings},
                stdin=stdin,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        """The output so far."""
        return self._log.read_text()

    def says(self, text: str) -> None:
        """Wait until the output contains a text."""
        within(SECONDS, lambda: text in self.said or self.process.poll() is not None)
        assert text in self.said, self.said

    def end(self) -> str:
        """Wait until the process ends successfully, and return its output."""
        status = self.process.wait(SECONDS)
        assert status == 0, self.said
        return self.said

    def stop(self) -> str:
        """Send SIGTERM, wait until the whole group has ended successfully, and return the output."""
        self.process.send_signal(signal.SIGTERM)
        said = self.end()
        assert not self._is_left(), "the leader of the group has ended, but some of its processes still run"
        return said

    def signal_all(self, signum: int) -> None:
        """Send a signal to the whole group."""
        os.killpg(self.process.pid, signum)

    def kill(self) -> None:
        """Kill the whole group."""
        if self._is_left():
            self.signal_all(signal.SIGKILL)
        self.process.wait(SECONDS)

    def _is_left(self) -> bool:
        try:
            self.signal_all(0)
        except ProcessLookupError:
            return False
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()


class RedisServer(Running):
    """A redis-server on a free port, which stores nothing on disk by default.

    Attributes:
        port: The port on which it listens.
        url: Its URL.
    """

    def __init__(self, folder: Path, *options: str, port: int = 0) -> None:
        self.port = port or free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        log = folder / f"redis-{self.port}.log"
        where = ("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "")
        super().__init__("redis-server", *where, *options, folder=folder, log=log, settings={})
        self.says("Ready to accept connections")


def python(*arguments: str) -> tuple[str, ...]:
    """Return the command line of this Python."""
    return (sys.executable, *arguments)


def taskiq(*arguments: str) -> tuple[str, ...]:
    """Return the command line of taskiq.

    Python 3.14 would start its workers in a way in which taskiq 0.13 does not set their logging up.
    """
    program = 'import multiprocessing as m; m.set_start_method("fork"); from taskiq.__main__ import main; main()'
    return python("-c", program, *arguments)


def free_port() -> int:
    """Return a port of loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
