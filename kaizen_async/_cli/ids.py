"""Where ids come from: arguments, a file, or standard input, which is read during the lookups and may be endless."""

import asyncio
import io
import os
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias, cast

import click

from kaizen_async._cli.ending import FAILED, MISUSE, OUT_OF_TIME, Stop, say
from kaizen_async._cli.formats import Counts, DetectingReader, Layout, LayoutError, NotAnIdError, checked_id
from kaizen_async._ids import require_id
from kaizen_async.errors import printable

PIECE: Final = 16_384
"""Bytes that are read at a time. Between two pieces of a file, the event loop does other work, so a piece is small."""

MOST_REPORTS: Final = 20
"""Invalid lines that are reported one by one; the others are counted."""

_HOW: Final = "name some (kaizen-async {0} exec_1 exec_2) or read them from a file (kaizen-async {0} --input ids.txt)"


class Arguments(list[str]):
    """Ids that stand on the command line."""

    typed: Final = False
    """Nothing is typed while the command runs."""
    exhausted: Final = True
    """There is nothing left to read."""
    counts: Final = Counts()
    """Invalid arguments are refused before anything is sent."""

    @property
    def total(self) -> int:
        """How many there are."""
        return len(self)


class Source:
    """Ids from a file or standard input, read when they are asked for: the stream may be endless.

    Args:
        stream: The file.
        name: What to call it in messages.
        layout: How the ids are laid out in it.

    Attributes:
        counts: What was read.
        problem: Why it could not be read to its end; empty if nothing is wrong.
        typed: Whether somebody types the ids while the command runs.
        total: How many ids there are; None as long as this is not known.
        exhausted: Whether it was read to its end.
        stream: The file.
        name: What it is called in messages.
    """

    def __init__(self, stream: io.BufferedReader, name: str, layout: Layout) -> None:
        self.counts = Counts()
        self.problem = ""
        self.typed = stream.isatty()
        self.total: int | None = None
        self.exhausted = False
        self.stream = stream
        self.name = name
        self._layout = layout
        self._ids = self._read_ids()

    def __aiter__(self) -> AsyncIterator[str]:
        return self._ids

    async def _read_ids(self) -> AsyncIterator[str]:
        reader = DetectingReader(self._layout, self.counts, self._report)
        try:
            async for piece in _pieces(self.stream):
                for execution_id in reader.feed(piece):
                    yield execution_id
            for execution_id in reader.end():
                yield execution_id
        except LayoutError as error:
            self.problem = f"the first line of {self.name} {error}"
            return
        except OSError as error:
            self.problem = f"cannot read {self.name}: {error.strerror}"
            return
        if self.counts.invalid > MOST_REPORTS:
            say(f"{self.counts.invalid - MOST_REPORTS:,} more lines of {self.name} are not ids")
        self.exhausted = True
        self.total = self.counts.ids

    def _report(self, line: int, why: str) -> None:
        if self.counts.invalid <= MOST_REPORTS:
            say(f"line {line:,} of {self.name} {why}")

    async def count_ahead(self) -> None:
        """Find out how many ids there are, if the stream is a regular file; it is read a second time for that."""
        place = _place_in_file(self.stream)
        if place is None:
            return
        counts = Counts()
        reader = DetectingReader(self._layout, counts, _ignore)
        with suppress(LayoutError, OSError):
            while piece := os.pread(self.stream.fileno(), PIECE, place):
                place += len(piece)
                for _ in reader.feed(piece):
                    pass
                await asyncio.sleep(0)  # a large input must not block the event loop
            for _ in reader.end():
                pass
            self.total = counts.ids


Ids: TypeAlias = Arguments | Source


async def _pieces(stream: io.BufferedReader) -> AsyncIterator[bytes]:
    """Yield what there is to read, waiting for it if need be, and letting the event loop run in between."""
    loop = asyncio.get_running_loop()
    while True:
        readable = asyncio.Event()
        try:
            loop.add_reader(stream, readable.set)
        except (PermissionError, ValueError):
            # A file, or a stand-in for one, can always be read; without a pause it would keep the loop from all else.
            await asyncio.sleep(0)
        else:
            try:
                await readable.wait()
            finally:
                loop.remove_reader(stream)
        piece = stream.read1(PIECE)
        if not piece:
            return
        yield piece


def _ignore(line: int, why: str) -> None:
    """Do nothing: the lines that are not ids are reported when they are read to be looked up."""


def _place_in_file(stream: io.BufferedReader) -> int | None:
    """Return the position in a regular file; None for anything else."""
    try:
        if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            return stream.tell()
    except (OSError, ValueError):
        pass
    return None


@dataclass(frozen=True)
class InputOptions:
    """What the command line says about the input.

    Attributes:
        file: A file to read ids from; a dash for standard input.
        layout: How the ids are laid out.
    """

    file: Path | None = None
    layout: Layout = field(default_factory=Layout)


def ids_of(arguments: tuple[str, ...], options: InputOptions, *, optional: bool = False) -> Ids:
    """Return the ids that a command was given.

    Args:
        arguments: Its arguments: ids, or a dash for standard input. Without any, standard input is read if it is not a
            terminal.
        options: What else was said about them.
        optional: Whether the command can do without.

    Raises:
        click.UsageError: There are none, one cannot be an id, or the file cannot be read.
    """
    if options.file is not None and str(options.file) != "-":
        if arguments:
            raise click.UsageError("give ids or --input, not both")
        return Source(_opened(options.file), printable(str(options.file)), options.layout)
    stdin = cast("io.BufferedReader", sys.stdin.buffer)
    if arguments == ("-",) or (not arguments and (options.file is not None or not stdin.isatty())):
        return Source(stdin, "standard input", options.layout)
    if "-" in arguments or options.file is not None:
        raise click.UsageError("give ids or a dash for standard input, not both")
    if not arguments and not optional:
        raise no_ids("no ids")
    return Arguments(_checked(argument) for argument in arguments)


def judge_input(stop: Stop, ids: Ids, *, optional: bool = False) -> None:
    """At the end of the work: refuse an input without ids, and note if it was not read to its end.

    Args:
        stop: Gets the reason, if the work has not ended early for another one.
        ids: The input.
        optional: Whether the command can do without ids.

    Raises:
        click.UsageError: There was no id.
    """
    if stop.reason or isinstance(ids, Arguments):
        return
    if ids.problem:
        stop.ask(ids.problem, MISUSE)
    elif not ids.exhausted:
        stop.ask(OUT_OF_TIME, FAILED)
    elif not (ids.counts.ids or ids.counts.invalid or optional):
        raise no_ids(f"no ids in {ids.name}")


def no_ids(what: str) -> click.UsageError:
    """Return the error for a command that was given nothing to do."""
    context = click.get_current_context()
    return click.UsageError(f"{what}: {_HOW.format(context.info_name)}", context)


def _opened(file: Path) -> io.BufferedReader:
    try:
        return click.get_current_context().with_resource(file.open("rb"))
    except OSError as error:
        raise click.UsageError(f"cannot read {printable(str(file))}: {error.strerror}") from None


def _checked(argument: str) -> str:
    try:
        execution_id = require_id(checked_id(_decoded(argument)))
    except NotAnIdError as error:
        hint = "; is a variable of your shell unset?" if not argument.strip() else ""
        raise click.UsageError(f"one of the ids {error}{hint}") from None
    if _is_file(execution_id):
        say(f"Hint: {execution_id} is a file here. To read ids from it: --input {execution_id}")
    return execution_id


def _decoded(argument: str) -> str:
    """Return an argument as UTF-8 text, also in the locale C, where Python has not decoded it."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeError:
        return argument


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # too long for a file's name
        return False
