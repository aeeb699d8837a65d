"""Helpers that run the command `kaizen-async` in the test's process, or in its own with pipes or a terminal."""

import csv
import fcntl
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
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

_NEW_INTERPRETER = """
import os, sys
sys.argv[0] = "kaizen-async"
from _kaizen_async_command import main
if "ANNOUNCED" in os.environ:
    os.write(1, b"starts\\n")
main()
"""
_INTERPRETER_SETTINGS = {"LC_ALL", "PYTHONIOENCODING"}
"""Variables that the interpreter reads when it starts."""
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


@cache
def _forking_process() -> socket.socket:
    """Start the process that forks for each command; it ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    program = [sys.executable, str(Path(__file__).with_name("forking_command.py")), str(theirs.fileno())]
    with theirs:
        theirs.set_inheritable(True)
        os.posix_spawn(sys.executable, program, os.environ, setsid=True)
    return ours


class Forked:
    """A command in a process of its own, like `subprocess.Popen`, but without the start of a new interpreter.

    Args:
        arguments: Arguments of the command.
        variables: Its environment.
        streams: Descriptors of its standard streams.
        terminal: Whether its standard streams are a terminal, from which Ctrl-C is to reach it.
        uvloop: Whether uvloop is installed.
        most_bytes: The size that a file of the command may reach, which simulates a full disk.

    Attributes:
        pid: The process.
        returncode: The exit status, or the negative number of a signal; None while it runs.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        variables: Mapping[str, str],
        streams: Sequence[int],
        *,
        terminal: bool = False,
        uvloop: bool = True,
        most_bytes: int | None = None,
    ) -> None:
        self.returncode: int | None = None
        request: dict[str, Any] = {"arguments": arguments, "environment": variables, "terminal": terminal}
        request |= {"uvloop": uvloop, "most_bytes": most_bytes}
        reader, report = os.pipe()
        socket.send_fds(_forking_process(), [json.dumps(request).encode()], [*streams, report])
        os.close(report)
        self._report = os.fdopen(reader, "rb", buffering=0)
        self.pid = int(self._report.readline())

    def poll(self) -> int | None:
        """Return the exit status if the process has ended."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Wait for the end, and return the exit status."""
        if self.returncode is None:
            if not select.select([self._report], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("kaizen-async", timeout)
            with self._report:
                self.returncode = int(self._report.readline())
        return self.returncode

    def send_signal(self, signum: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, signum)


class Piped:
    """A command whose standard streams are pipes or files.

    Args:
        arguments: Arguments of the command.
        base_url: URL of the emulator.
        loop: The event loop: "asyncio" hides uvloop.
        settings: Environment variables.
        stdin: A descriptor to read from in place of a pipe.
        stdout: A descriptor to write to in place of a pipe.
        most_bytes: The size that a file of the command may reach, which simulates a full disk.
        new: Whether to start a new interpreter, which announces its start with a line on standard output.
    """

    def __init__(
        self,
        *arguments: str,
        base_url: str,
        loop: str = "uvloop",
        settings: Mapping[str, str] | None = None,
        stdin: int | None = None,
        stdout: int | None = None,
        most_bytes: int | None = None,
        new: bool = False,
    ) -> None:
        theirs_in, ours_in = (stdin, None) if stdin is not None else os.pipe()
        ours_out, theirs_out = (None, stdout) if stdout is not None else os.pipe()
        ours_err, theirs_err = os.pipe()
        # Without buffers, because `end` reads what `line` has left.
        self.stdin = None if ours_in is None else os.fdopen(ours_in, "wb", buffering=0)
        self.stdout = None if ours_out is None else os.fdopen(ours_out, "rb", buffering=0)
        self.stderr = os.fdopen(ours_err, "rb", buffering=0)
        variables = environment(base_url, **(settings or {}))
        self.process: Forked | subprocess.Popen[bytes]
        if new:
            program = [sys.executable, "-c", _NEW_INTERPRETER, *arguments]
            variables["ANNOUNCED"] = "1"
            self.process = subprocess.Popen(  # noqa: S603 - our own
                program, stdin=theirs_in, stdout=theirs_out, stderr=theirs_err, env=variables
            )
        else:
            streams = (theirs_in, theirs_out, theirs_err)
            self.process = Forked(arguments, variables, streams, uvloop=loop == "uvloop", most_bytes=most_bytes)
        for descriptor, given in ((theirs_in, stdin), (theirs_out, stdout), (theirs_err, None)):
            if given is None:
                os.close(descriptor)

    def feed(self, text: bytes) -> None:
        """Write to its standard input."""
        assert self.stdin is not None
        self.stdin.write(text)

    def line(self) -> bytes:
        """Return the next line of its standard output."""
        assert self.stdout is not None
        return self.stdout.readline()

    def stop_reading(self) -> None:
        """Close the reading end of its standard output."""
        assert self.stdout is not None
        self.stdout.close()
        self.stdout = None

    def stopped_by(self, signum: int) -> tuple[int, bytes, str]:
        """Send a signal, wait for the end with open standard input, and return the result of `end`."""
        self.process.send_signal(signum)
        self.process.wait(SECONDS)
        return self.end()

    def end(self) -> tuple[int, bytes, str]:
        """Close standard input, and return the exit status, the rest of the output, and standard error."""
        if self.stdin is not None:
            self.stdin.close()
        output, errors = b"", b""
        open_streams: list[IO[bytes]] = [self.stderr, *filter(None, [self.stdout])]
        while open_streams:
            readable = select.select(open_streams, [], [], SECONDS)[0]
            assert readable, f"the command does not end; standard error is {errors!r}"
            for stream in readable:
                piece = stream.read(65_536)
                if not piece:
                    open_streams.remove(stream)
                elif stream is self.stderr:
                    errors += piece
                else:
                    output += piece
        return self.process.wait(SECONDS), output, errors.decode()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(SECONDS)
        for stream in (self.stdin, self.stdout, self.stderr):
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
        settings = settings or {}
        variables = environment(base_url, **settings)
        self.process: Forked | subprocess.Popen[bytes]
        if streams or _INTERPRETER_SETTINGS & settings.keys():
            shell = ["/bin/sh", "-c", f'exec "$@" {streams}', "sh", sys.executable, "-c", _NEW_INTERPRETER, *arguments]
            self.process = subprocess.Popen(  # noqa: S603 - our own
                shell, stdin=given, stdout=taken, stderr=slave, env=variables, start_new_session=True
            )
        else:
            self.process = Forked(arguments, variables, (given, taken, slave), terminal=True)
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
