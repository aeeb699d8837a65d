"""The examples as their users run them: real processes, and a real redis-server."""

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
"""How long anything may take that a test waits for."""
_LOOK_AGAIN = 0.02


def require(*modules: str, program: str = "redis-server", package: str = "redis-server") -> None:
    """Skip a whole file of tests, saying what to install, if some of what it needs is not there."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(f"without {', '.join(missing)}: pip install -e '.[test,examples]'", allow_module_level=True)
    if shutil.which(program) is None:
        pytest.skip(f"without {program}: apt-get install {package}", allow_module_level=True)


def until(condition: Callable[[], Any], what: str) -> None:
    """Wait until a condition holds."""
    assert within(SECONDS, condition), f"not within {SECONDS:.0f} s: {what}"


def within(seconds: float, condition: Callable[[], Any]) -> bool:
    """Wait until a condition holds, at most so many seconds; return whether it does."""
    deadline = time.monotonic() + seconds
    while not (holds := bool(condition())) and time.monotonic() < deadline:
        time.sleep(_LOOK_AGAIN)
    return holds


class Running:
    """A process with all that it starts: a group of its own, of which nothing is left in the end.

    Args:
        command: What to run.
        folder: Where.
        log: The file for what it says, on both streams.
        settings: Added to the environment.
        given: The file that it reads as standard input.
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
        """What it has said so far."""
        return self._log.read_text()

    def says(self, text: str) -> None:
        """Wait until it says something."""
        within(SECONDS, lambda: text in self.said or self.process.poll() is not None)
        assert text in self.said, self.said

    def end(self) -> str:
        """Wait until it ends well; return what it said."""
        status = self.process.wait(SECONDS)
        assert status == 0, self.said
        return self.said

    def stop(self) -> str:
        """Ask it to end, and wait until it does well, with all that it has started; return what it said."""
        self.process.send_signal(signal.SIGTERM)
        said = self.end()
        assert not self._is_left(), "its leader has ended, but some of it goes on"
        return said

    def signal_all(self, signum: int) -> None:
        """Send a signal to all of it."""
        os.killpg(self.process.pid, signum)

    def kill(self) -> None:
        """End all of it at once."""
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
    """A redis-server on a free port, which keeps nothing unless the options say so.

    Attributes:
        port: Where it listens.
        url: Where it is.
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


def free_port() -> int:
    """Return a port of loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
