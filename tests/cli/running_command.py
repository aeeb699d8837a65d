"""Helpers that run the command `kaizen-async` in the test's process, or in its own with pipes or a terminal."""

import csv
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import pytest
from click.testing import CliRunner, Result

from kaizen_async._cli.app import cli
from kaizen_async.testing import KaizenEmulator

Command = Callable[..., Result]

SECONDS = 20.0
"""How long anything may take that a test waits for."""

_LAUNCH = """
import fcntl, os, sys, termios
how = sys.argv[1]
if "tty" in how:
    fcntl.ioctl(2, termios.TIOCSCTTY, 0)
if "asyncio" in how:
    sys.modules["uvloop"] = None
sys.argv[:2] = ["kaizen-async"]
from _kaizen_async_command import main
if "announced" in how:
    os.write(1, b"starts\\n")
main()
"""
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def in_process(server: KaizenEmulator, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Return a function that runs the command against an emulator in the test's process."""
    monkeypatch.setenv("KAIZEN_BASE_URL", server.base_url)

    def run(*arguments: object, given: str | bytes = "") -> Result:
        result = CliRunner().invoke(cli, [str(argument) for argument in arguments], input=given)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


def ids_in(file: Path) -> list[str]:
    """Return the ids in a file of results."""
    text = file.read_text()
    if file.suffix == ".csv":
        return [row["id"] for row in csv.DictReader(text.splitlines())]
    records = json.loads(text) if file.suffix == ".json" else map(json.loads, text.splitlines())
    return [record["id"] for record in records]


def environment(base_url: str, **more: str) -> dict[str, str]:
    """Return the environment of a command that uses an emulator."""
    return {**os.environ, "KAIZEN_BASE_URL": base_url, "PYTHONUNBUFFERED": "1", "TERM": "xterm", **more}


def launch(*arguments: str, how: str = "") -> list[str]:
    """Return the command line. `how` may contain "tty", "asyncio" and "announced"."""
    return [sys.executable, "-c", _LAUNCH, how, *arguments]


class Piped:
    """A command whose standard streams are pipes or files."""

    def __init__(
        self,
        *arguments: str,
        base_url: str,
        loop: str = "",
        how: str = "",
        settings: Mapping[str, str] | None = None,
        stdin: Any = subprocess.PIPE,
        stdout: Any = subprocess.PIPE,
    ) -> None:
        self.process = subprocess.Popen(  # noqa: S603 - our own
            launch(*arguments, how=loop + how),
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.PIPE,
            env={**environment(base_url), **(settings or {})},
            bufsize=0,  # `communicate` would omit bytes that a buffer has read ahead
        )

    def feed(self, text: bytes) -> None:
        """Write to its standard input."""
        stdin = _open(self.process.stdin)
        stdin.write(text)
        stdin.flush()

    def line(self) -> bytes:
        """Return the next line of its standard output."""
        return _open(self.process.stdout).readline()

    def stopped_by(self, signum: int) -> tuple[int, bytes, str]:
        """Send a signal, wait for the end with open standard input, and return the result of `end`."""
        self.process.send_signal(signum)
        self.process.wait(SECONDS)
        return self.end()

    def end(self) -> tuple[int, bytes, str]:
        """Close standard input, and return the exit status, the rest of the output, and standard error."""
        output, errors = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, output or b"", errors.decode()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(SECONDS)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()


class OnTerminal:
    """A command on a terminal.

    Args:
        arguments: Arguments of the command.
        base_url: URL of the emulator.
        stdin: A file to read in place of the terminal.
        stdout: A file to write to in place of the terminal.
        streams: How a shell changes the standard streams, for example `2>&-`.
        settings: Environment variables.
        size: Lines and columns of the terminal.

    Attributes:
        raw: All bytes that the terminal has received.
        screen: The text shown since the last call of `until`, without escape sequences.
    """

    def __init__(
        self,
        *arguments: str,
        base_url: str,
        stdin: Path | None = None,
        stdout: Path | None = None,
        streams: str = "",
        settings: Mapping[str, str] | None = None,
        size: tuple[int, int] = (30, 100),
    ) -> None:
        self.raw = b""
        self.screen = ""
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
        given = slave if stdin is None else os.open(stdin, os.O_RDONLY)
        taken = slave if stdout is None else os.open(stdout, os.O_WRONLY | os.O_CREAT)
        self.process = subprocess.Popen(  # noqa: S603 - our own
            ["/bin/sh", "-c", f'exec "$@" {streams}', "sh", *launch(*arguments, how="" if streams else "tty")],
            stdin=given,
            stdout=taken,
            stderr=slave,
            env={**environment(base_url), **(settings or {})},
            start_new_session=True,
        )
        for descriptor in {slave, given, taken}:
            os.close(descriptor)

    def press(self, keys: str) -> None:
        """Type keys."""
        os.write(self._master, keys.encode())

    def until(self, pattern: str) -> str:
        """Wait until the terminal shows a text, and return everything shown since the last call."""
        deadline = time.monotonic() + SECONDS
        while (found := re.search(pattern, self.screen)) is None:
            assert self._read(deadline), f"{pattern!r} never came; the terminal shows:\n{self.screen}"
        shown, self.screen = self.screen[: found.end()], self.screen[found.end() :]
        return shown

    def end(self) -> tuple[int, str]:
        """Return the exit status and the text shown since the last call."""
        deadline = time.monotonic() + SECONDS
        while self._read(deadline):
            pass
        return self.process.wait(SECONDS), self.screen

    def _read(self, deadline: float) -> bool:
        if not select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return False
        try:
            shown = os.read(self._master, 65_536)
        except OSError:  # Linux reports in this way that the other end is closed
            return False
        self.raw += shown
        self.screen += _ESCAPES.sub("", shown.decode(errors="replace"))
        return bool(shown)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(SECONDS)
        os.close(self._master)


def _open(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream
