"""Where ids come from: arguments, or standard input, one a line."""

import asyncio
import io
import sys
from collections.abc import AsyncIterator
from typing import Final, TypeAlias, cast

import click

from kaizen_async._ids import require_id

CHUNK: Final = 65_536
LONGEST_LINE: Final = 65_536

_HOW: Final = "name some (kaizen-async {0} exec_1 exec_2) or pipe them in, one a line (kaizen-async {0} - < ids.txt)"


class Arguments(list[str]):
    """Ids that stand on the command line."""

    problem: Final = ""
    """What is wrong with an argument is said before anything is sent."""
    typed: Final = False
    """Nothing is typed while the command runs."""

    @property
    def total(self) -> int:
        """How many there are."""
        return len(self)


class Lines:
    """Ids from a stream, one a line, read when they are asked for: the stream may be endless.

    White space around an id and blank lines are ignored.

    Attributes:
        problem: Why the stream was not read to its end, if there is something wrong with it.
        typed: Whether somebody types the ids while the command runs.
    """

    def __init__(self, stream: io.BufferedReader) -> None:
        self.problem = ""
        self.typed = stream.isatty()
        self._stream = stream
        self._ids = self._read_ids()
        self._line_number = 0
        self._count = 0
        self._exhausted = False

    @property
    def total(self) -> int | None:
        """How many there are, once that is known."""
        return self._count if self._exhausted else None

    def __aiter__(self) -> AsyncIterator[str]:
        return self._ids

    async def _read_ids(self) -> AsyncIterator[str]:
        rest = b""
        while not self._exhausted:
            chunk = await self._read()
            *lines, rest = (rest + (chunk or b"\n")).split(b"\n")
            if len(rest) > LONGEST_LINE:
                lines.append(rest)
            for line in lines:
                execution_id = self._parse(line)
                if self.problem:
                    return
                if execution_id:
                    self._count += 1
                    yield execution_id
            self._exhausted = not chunk

    def _parse(self, line: bytes) -> str:
        self._line_number += 1
        if len(line) > LONGEST_LINE:
            self._refuse(f"is longer than {LONGEST_LINE:,} bytes")
            return ""
        try:
            # A byte order mark is no white space; editors of some systems begin files with one.
            return line.decode().strip().removeprefix("\ufeff").strip()
        except UnicodeDecodeError:
            self._refuse("is not UTF-8 text")
            return ""

    def _refuse(self, what: str) -> None:
        self.problem = f"line {self._line_number:,} of standard input {what}: nothing from there on is read"
        click.echo(self.problem, err=True)

    async def _read(self) -> bytes:
        """Return what there is to read, waiting for it if need be; nothing at the end."""
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        try:
            loop.add_reader(self._stream, readable.set)
        except (PermissionError, ValueError):
            # A file, or what stands for one: it cannot be waited for and need not be.
            return self._stream.read1(CHUNK)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(self._stream)
        return self._stream.read1(CHUNK)


Ids: TypeAlias = Arguments | Lines


def ids_of(arguments: tuple[str, ...], *, optional: bool = False) -> Ids:
    """Return the ids that a command was given.

    Args:
        arguments: Its arguments: ids, or a dash for standard input. Without any, standard input is read if it is not a
            terminal.
        optional: Whether the command can do without.

    Raises:
        click.UsageError: There are none, or one cannot be an id.
    """
    stdin = cast("io.BufferedReader", sys.stdin.buffer)
    if arguments == ("-",) or (not arguments and not stdin.isatty()):
        return Lines(stdin)
    if "-" in arguments:
        raise click.UsageError("give ids or a dash for standard input, not both")
    if not arguments and not optional:
        raise no_ids("no ids")
    return Arguments(_checked(argument) for argument in arguments)


def require_some(ids: Ids) -> None:
    """Refuse standard input that turned out to hold nothing.

    Raises:
        click.UsageError: There was no id.
    """
    if ids.total == 0:
        raise no_ids("no ids in standard input")


def no_ids(what: str) -> click.UsageError:
    """Return the error for a command that was given nothing to do."""
    context = click.get_current_context()
    return click.UsageError(f"{what}: {_HOW.format(context.info_name)}", context)


def _checked(argument: str) -> str:
    execution_id = argument.strip()
    if not execution_id:
        raise click.UsageError("one of the ids is empty; is a variable of your shell unset?")
    try:
        return require_id(execution_id)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
