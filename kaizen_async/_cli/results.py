"""The file of results: which ids have one in it, so that another run can continue where one ended.

An id is done if the file has a line with its record. Ids whose lookup failed are looked up again, and their new line
replaces the old one. A last line without an end, which a killed process or a full disk leaves, is removed.
An id takes about 120 bytes of memory, whatever its length: a digest, and the place of its line.
"""

import asyncio
import csv
import math
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

import click
import msgspec

from kaizen_async._cli.ids import Arguments, Ids
from kaizen_async._cli.output import Output, OutputOptions, replacing
from kaizen_async._cli.output_formats import FORMATS, JSON_TAIL
from kaizen_async.errors import printable

LONGEST_LINE: Final = 1 << 24
"""Bytes of a line above which the file is not one of ours."""
AT_ONCE: Final = 500
"""Lines that are read before the event loop does other work."""

_DIGEST_BYTES: Final = 15
_FOUND: Final = 1
"""The line of the id has a record."""
_TAKEN: Final = 2
"""The id was handed out in this run."""
_FLAGS: Final = 2
"""Bits of a state that are flags; the others are the place of the line, plus one."""


def require_resumable(options: OutputOptions) -> None:
    """Refuse outputs that do not show which ids are done.

    Raises:
        click.UsageError: They do not.
    """
    if options.file is None or str(options.file) == "-":
        raise click.UsageError("--resume needs --output FILE, the file with the results so far")
    if options.file.exists() and not options.file.is_file():
        raise click.UsageError(f"{printable(str(options.file))} is not a regular file; --resume needs one")
    chosen = FORMATS.get(options.resolved)
    if options.only_failed or chosen is None or not chosen.resumable:
        raise click.UsageError(
            "--resume needs all results in the file, as JSON or CSV: leave out --only-failed, --only-ids and --format"
        )
    if options.fields and "id" not in options.fields:
        raise click.UsageError("--resume needs the field id among --fields")
    if options.fields and chosen.failure_fields and not set(chosen.failure_fields) & set(options.fields):
        raise click.UsageError("--resume with CSV needs error.retryable among --fields, to know what failed")


class Line(NamedTuple):
    """A line of the file.

    Attributes:
        place: Where it begins.
        text: Its bytes, with the line break.
        execution_id: The id that it is about; None for the header of CSV and the brackets of JSON.
        found: Whether it has a record.
    """

    place: int
    text: bytes
    execution_id: str | None
    found: bool


class ResultFile:
    """Knows which ids have a result in a file.

    Args:
        output: What writes the results.
        file: Where it writes them.
    """

    def __init__(self, output: Output, file: Path) -> None:
        self._path = file.resolve()  # a symbolic link stays one: its target is rewritten
        self._shown = printable(str(file))
        self._name = output.format
        self._format = output.lines
        self._fields = output.fields
        self._states: dict[bytes, int] = {}
        self._has_two = False

    def take(self, execution_id: str) -> bool:
        """Return whether an id is to be looked up: it has no record yet, and was not taken before."""
        digest = _digest_of(execution_id)
        state = self._states.get(digest, 0)
        if state & (_FOUND | _TAKEN):
            return False
        self._has_two = self._has_two or state != 0
        self._states[digest] = state | _TAKEN
        return True

    async def load(self) -> None:
        """Read the file; repair it if a run was cut off, so that it has one whole line for each id.

        Raises:
            click.UsageError: The file is not one of ours, or cannot be read or rewritten.
        """
        end = 0
        try:
            with self._path.open("rb") as file:
                async for line in self._lines(file):
                    end = line.place + len(line.text)
                    if line.execution_id is not None:
                        self._note(line)
                size = os.fstat(file.fileno()).st_size
                is_open_array = self._format.is_array and size > 0 and not _ends_array(file, size)
            if self._has_two or is_open_array:
                await self._rewrite()
            elif end < size:
                os.truncate(self._path, end)
        except OSError as error:
            raise click.UsageError(f"cannot resume from {self._shown}: {error.strerror}") from None
        self._has_two = False

    def _note(self, line: Line) -> None:
        """Remember the line that counts: the first with a record, else the last."""
        digest = _digest_of(line.execution_id or "")
        state = self._states.get(digest, 0)
        self._has_two = self._has_two or state != 0
        if not state & _FOUND:
            self._states[digest] = (line.place + 1) << _FLAGS | (_FOUND if line.found else 0)

    async def failed_ids(self) -> AsyncIterator[str]:
        """Yield the ids in the file whose lookup failed."""
        end = self._path.stat().st_size - len(JSON_TAIL) * self._format.is_array  # where new results begin
        with self._path.open("rb") as file:
            async for line in self._lines(file, end):
                if line.execution_id is not None and not line.found:
                    yield line.execution_id

    async def settle(self) -> None:
        """After a run: remove the lines of failed lookups that were repeated.

        Raises:
            click.UsageError: The file cannot be rewritten; it is as it was.
        """
        if self._has_two:
            self._states.clear()
            self._has_two = False
            await self.load()

    def ids_since(self, place: int) -> Counter[str]:
        """Return the ids whose results were written after a place in the file; remove a result that was cut off.

        Raises:
            click.UsageError: What is there is not results, or cannot be read or written.
        """
        try:
            with self._path.open("r+b") as file:
                if os.fstat(file.fileno()).st_size < place:  # another file than the one that was written
                    return Counter()
                file.seek(place)
                rest = file.read()
                *lines, last = rest.split(b"\n")
                if self._format.is_array:
                    lines = [line.removesuffix(b",") for line in lines if line not in (b"", b",", b"]")]
                    lines += [last] * _is_json(last)
                    lead = b"\n" if place == 1 else b",\n"
                    whole = (lead + b",\n".join(lines)) * bool(lines) + JSON_TAIL
                else:
                    whole = b"".join(line + b"\n" for line in lines)
                ids = Counter(self._format.read(line, 2, self._fields)[0] or "" for line in lines)
                if whole != rest:
                    file.seek(place)
                    file.truncate()
                    file.write(whole)
                return ids
        except OSError as error:
            raise click.UsageError(f"cannot resume from {self._shown}: {error.strerror}") from None
        except (ValueError, KeyError, RecursionError, csv.Error):
            raise click.UsageError(
                f"{self._shown} is not the file of results that belongs to the checkpoint, or is in another --format; "
                "name another --output"
            ) from None

    async def _rewrite(self) -> None:
        """Write the file again with the lines that count, in one step: it is the old one or the new one."""
        with replacing(self._path) as new, self._path.open("rb") as old:
            lead = b"[\n"
            async for line in self._lines(old):
                if line.execution_id is None:
                    new.write(b"" if self._format.is_array else line.text)
                elif self._states[_digest_of(line.execution_id)] >> _FLAGS == line.place + 1:
                    new.write(lead + line.text.rstrip(b",\r\n") if self._format.is_array else line.text)
                    lead = b",\n"
            if self._format.is_array:
                new.write(JSON_TAIL if lead == b",\n" else b"[\n]\n")

    async def _lines(self, file: BinaryIO, end: float = math.inf) -> AsyncIterator[Line]:
        place = number = 0
        text = b""
        while place < end and (text := file.readline(LONGEST_LINE)).endswith(b"\n"):
            number += 1
            try:
                execution_id, found = self._format.read(text, number, self._fields)
            except (ValueError, KeyError, RecursionError, csv.Error):
                raise click.UsageError(
                    f"line {number:,} of {self._shown} is not a result of this command as {self._name}; "
                    "name another --output, or the --format and --fields of the file"
                ) from None
            yield Line(place, text, execution_id, found)
            place += len(text)
            if not number % AT_ONCE:
                await asyncio.sleep(0)  # reading a large file must not block the event loop
        if len(text) == LONGEST_LINE:
            raise click.UsageError(f"{self._shown} has lines that are too long to be results of this command")


async def ids_to_do(ids: Ids, results: ResultFile, on_skip: Callable[[], None]) -> AsyncIterator[str]:
    """Yield the ids that have no record in the file; without any ids, those in the file whose lookup failed."""
    async for execution_id in _each(ids) if isinstance(ids, Arguments) else ids:
        if results.take(execution_id):
            yield execution_id
        else:
            on_skip()
    if ids.total == 0 and not ids.counts.invalid:
        async for execution_id in results.failed_ids():
            if results.take(execution_id):
                yield execution_id


async def _each(ids: Arguments) -> AsyncIterator[str]:
    for execution_id in ids:
        yield execution_id


def _digest_of(execution_id: str) -> bytes:
    return blake2b(execution_id.encode(errors="surrogatepass"), digest_size=_DIGEST_BYTES).digest()


def _is_json(line: bytes) -> bool:
    try:
        msgspec.json.decode(line)
    except ValueError:
        return False
    return True


def _ends_array(file: BinaryIO, size: int) -> bool:
    file.seek(max(0, size - 3))
    return file.read() == JSON_TAIL
