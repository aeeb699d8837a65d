"""Where results go, and in which format: JSON lines, a JSON array, CSV or a table; to a terminal, a pipe or a file.

Every result is first a JSON object, its document: the record as the server sent it, or an id with an error. All formats
are made from it. A line is written at once and in one piece, so that a crash leaves only whole lines.
"""

import asyncio
import errno
import io
import os
import select
import shutil
import stat
import sys
import tempfile
from collections import defaultdict, deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, Final, Protocol, cast

import click
import msgspec

from kaizen_async._cli.ending import OutputClosedError, OutputError
from kaizen_async._cli.ids import Arguments, Ids
from kaizen_async._cli.output_formats import COLUMNS, FORMATS, JSON_TAIL, ONLY_IDS, TABLE, Fields, decoded
from kaizen_async._cli.table import Execution, Found, Rows, console_on, message_of
from kaizen_async._records.tolerance import clean
from kaizen_async.errors import DeadlineExceededError, KaizenError, printable
from kaizen_async.outcomes import Change

LOOK_AGAIN: Final = 0.1
"""Seconds between two looks at whether a named pipe has a reader."""


def document_of(record: Execution) -> bytes:
    """Return a record as JSON, with everything the server sent where the record keeps it."""
    raw: bytes | None = getattr(record, "raw", None)  # a wait keeps no JSON of records that are still running
    return msgspec.json.encode(record.to_dict()) if raw is None else msgspec.json.format(clean(raw), indent=-1)


def _document_for(record: Execution, execution_id: str) -> bytes:
    """Return a record as JSON, under the id that was asked for: a server may write it in another way."""
    document = document_of(record)
    if getattr(record, "id", execution_id) == execution_id:
        return document
    return msgspec.json.encode({**decoded(document), "id": execution_id})


def described(error: KaizenError) -> dict[str, Any]:
    """Return an error as it stands in a document."""
    cause = error.__cause__
    last = getattr(error, "last_execution", None)
    shown: dict[str, Any] = {
        "type": type(error).__name__,
        "message": message_of(error),
        "status": getattr(error, "status", getattr(cause, "status", None)),
        "attempts": error.attempts,
        # A deadline says nothing about the next try.
        "retryable": error.retryable or isinstance(error, DeadlineExceededError),
        "requestId": getattr(error, "request_id", getattr(cause, "request_id", None)),
    }
    if last is not None:
        shown["lastExecution"] = msgspec.Raw(document_of(last))
    return shown


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What the command line says about the output.

    Attributes:
        file: The file to write to; None for standard output.
        format: One of the `CHOICES`; None for a table on a terminal, CSV into a file named `*.csv`, else JSON lines.
        fields: The paths of the fields to write; empty for all.
        only_failed: Whether to leave out what succeeded.
        only_ids: Whether to write ids and nothing else.
        formulas: Whether CSV cells that look like formulas are written unchanged.
        resume: Whether to add to what is in the file.
    """

    file: Path | None = None
    format: str | None = None
    fields: tuple[str, ...] = ()
    only_failed: bool = False
    only_ids: bool = False
    formulas: bool = False
    resume: bool = False

    @property
    def resolved(self) -> str:
        """The format that is written."""
        if self.only_ids:
            return ONLY_IDS
        if self.format is not None:
            return self.format
        if self.file is not None:
            suffix = self.file.suffix.lower()
            return next((name for name, lines in FORMATS.items() if lines.suffix == suffix), "ndjson")
        return TABLE if sys.stdout.isatty() and not self.fields else "ndjson"


class Writer(Protocol):
    """Takes finished pieces of output."""

    async def write(self, piece: bytes) -> None:
        """Write a piece as a whole.

        Raises:
            OutputClosedError: The reader is gone.
            OutputError: It cannot be written.
        """
        ...

    def sync(self) -> None:
        """Make sure that what was written survives a power failure, where this is possible."""
        ...

    def close(self) -> None:
        """Write what belongs at the end."""
        ...


class StreamWriter:
    """Writes to a pipe, a terminal or a device, waiting for a slow reader without blocking the event loop.

    If `less` shows its first page only, requests in flight must not run into their timeouts. Nothing is buffered.
    """

    def __init__(self, stream: BinaryIO, name: str, *, array: bool) -> None:
        self._stream = stream
        self._name = name
        self._array = array
        self._any = False
        self._poll: select.poll | None = None
        # A stand-in in memory has no descriptor, and always has room.
        with suppress(io.UnsupportedOperation):
            descriptor = stream.fileno()
            self._poll = select.poll()
            self._poll.register(descriptor, select.POLLOUT)

    async def write(self, piece: bytes) -> None:
        """Write a piece, waiting for as long as the reader takes."""
        if self._array:
            piece = (b",\n" if self._any else b"[\n") + piece.removesuffix(b"\n")
        self._any = True
        rest = memoryview(piece)
        with _reporting_errors(self._name):
            while rest:
                if self._poll is None:
                    self._stream.write(rest)
                    return
                if not self._poll.poll(0):
                    await self._room()
                # POSIX: a pipe that has room at all takes this many bytes without blocking.
                rest = rest[os.write(self._stream.fileno(), rest[: select.PIPE_BUF]) :]

    async def _room(self) -> None:
        loop = asyncio.get_running_loop()
        writable = asyncio.Event()
        loop.add_writer(self._stream, writable.set)
        try:
            await writable.wait()
        finally:
            loop.remove_writer(self._stream)

    def sync(self) -> None:
        """Make sure that what was written survives a power failure, where this is possible."""
        with suppress(OSError):
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """End a JSON array."""
        if self._array:
            with _reporting_errors(self._name):
                self._stream.write(JSON_TAIL if self._any else b"[]\n")
                self._stream.flush()


class FileWriter:
    """Adds whole lines to a regular file. A JSON array in it is complete after every write.

    Args:
        file: An open file.
        name: What to call it in messages.
        array: Whether it holds a JSON array.
    """

    def __init__(self, file: BinaryIO, name: str, *, array: bool) -> None:
        self._file = file
        self._name = name
        self._tail = JSON_TAIL if array else b""
        self._end = os.fstat(file.fileno()).st_size
        if array and not self._end:
            self._put(b"[" + self._tail, 0)

    @property
    def written(self) -> int:
        """Where the next result begins, in bytes."""
        return self._end - len(self._tail)

    async def write(self, piece: bytes) -> None:
        """Write a piece; if there is no room for all of it, leave the file as it was."""
        start = self.written
        if self._tail:
            piece = (b"\n" if start == 1 else b",\n") + piece.removesuffix(b"\n") + self._tail
        self._put(piece, start)

    def _put(self, piece: bytes, start: int) -> None:
        descriptor = self._file.fileno()
        with _reporting_errors(self._name):
            written = 0
            try:
                while written < len(piece):
                    written += os.pwrite(descriptor, piece[written:], start + written)
            except OSError:
                with suppress(OSError):
                    os.pwrite(descriptor, self._tail, start)
                    os.ftruncate(descriptor, self._end)
                raise
        self._end = start + len(piece)

    def sync(self) -> None:
        """Make sure that what was written survives a power failure."""
        with _reporting_errors(self._name):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; only here some file systems say that they had no room."""
        try:
            self.sync()
        finally:
            self._file.close()


@contextmanager
def _reporting_errors(name: str) -> Generator[None]:
    try:
        yield
    except BrokenPipeError:
        raise OutputClosedError from None
    except OSError as error:
        raise OutputError(f"cannot write to {name}: {error.strerror}") from error


@contextmanager
def replacing(path: Path) -> Generator[BinaryIO]:
    """Write a new file in place of one, in one step: afterwards it is the old one or the new one.

    Raises:
        OSError: It cannot be written; it is the old one.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            with suppress(FileNotFoundError):
                shutil.copymode(path, name)
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        with suppress(FileNotFoundError):
            Path(name).unlink()
        raise


class Output:
    """Writes the results of a command, in its format and to its place.

    Args:
        options: What the command line says about the output.
        ids: The ids that the results are about.
        columns: The columns of CSV if no fields were named.
        keep: Whether to add to what is in the file.

    Attributes:
        console: The terminal that shows the results, if there is one.
        fields: The fields that are written.
        lines: The format of the lines.
        place: Where the results go, for the summary; empty for standard output.

    Raises:
        click.UsageError: The file cannot be written, or is what the command reads.
    """

    def __init__(
        self, options: OutputOptions, ids: Ids, columns: tuple[str, ...] = COLUMNS, *, keep: bool = False
    ) -> None:
        self._keep = keep
        self.options = options
        self.format = options.resolved
        self.fields = Fields(options.fields, columns, formulas=options.formulas)
        self.file = None if options.file is None or str(options.file) == "-" else options.file
        self.place = "" if self.file is None else f"results in {printable(str(self.file))}"
        self.console = console_on(sys.stdout) if self.format == TABLE and self.file is None else None
        self._rows = Rows(self.console or console_on(io.StringIO()), ids) if self.format == TABLE else None
        self.lines = FORMATS.get(self.format, FORMATS["ndjson"])  # a table is drawn by `_rows` instead
        self._writer: Writer  # from `open` on
        if self.file is not None:
            _check_writable(self.file, ids)
        elif _is_same_file(sys.stdout, ids):
            raise click.UsageError("standard output is the file that the ids come from; write to another file")

    async def open(self) -> bool:
        """Open what is written to, with what belongs at its beginning; return True.

        A named pipe opens once somebody reads from it.

        Raises:
            OutputError: It cannot be written.
        """
        array = self.lines.is_array
        is_new = True
        if self.file is None:
            self._writer = StreamWriter(sys.stdout.buffer, "standard output", array=array)
        else:
            name = printable(str(self.file))
            with _reporting_errors(name):
                context = click.get_current_context()
                if self.file.exists() and not self.file.is_file():
                    device = context.with_resource(await _open_device(self.file))
                    self._writer = StreamWriter(device, name, array=array)
                else:
                    mode = "r+b" if self._keep and self.file.exists() else "wb"
                    file = context.with_resource(cast("BinaryIO", self.file.open(mode, buffering=0)))
                    is_new = not os.fstat(file.fileno()).st_size
                    self._writer = FileWriter(file, name, array=array)
        head = self.lines.head(self.fields)
        if head and is_new:
            await self._writer.write(head)
        return True

    async def show(self, outcome: Found, *, failed: bool) -> None:
        """Write one outcome.

        Args:
            outcome: What became of an id.
            failed: Whether it counts as failed.

        Raises:
            OutputClosedError: The reader of standard output is gone.
            OutputError: It cannot be written.
        """
        if self._rows is not None and not self.options.only_ids:
            if failed or not self.options.only_failed:
                await self._show_row(self._rows, outcome)
        elif outcome.error is not None:
            document = msgspec.json.encode({"id": outcome.id, "error": described(outcome.error)})
            await self.write(outcome.id, document, failed=failed)
        else:
            await self.write(outcome.id, _document_for(outcome.unwrap(), outcome.id), failed=failed)

    async def show_change(self, change: Change[Execution], *, failed: bool) -> None:
        """Write one change."""
        document: dict[str, Any] = {"id": change.id}
        if change.error is not None:
            document["error"] = described(change.error)
        else:
            for name, record in (("before", change.before), ("after", change.after)):
                document[name] = None if record is None else msgspec.Raw(document_of(record))
        await self.write(change.id, msgspec.json.encode(document), failed=failed)

    async def write(self, execution_id: str, document: bytes, *, failed: bool) -> None:
        """Write one document in the format of the output."""
        if self.options.only_failed and not failed:
            return
        await self._writer.write(self.lines.line(execution_id, document, self.fields))

    async def _show_row(self, rows: Rows, outcome: Found) -> None:
        if self.console is not None:
            rows.show(outcome)
        else:
            await self._writer.write(rows.rendered(outcome).encode())

    @property
    def shows_ids(self) -> bool:
        """Whether each result in the output says which id it is about, for a program."""
        return self._rows is None and (self.format == ONLY_IDS or "id" in (self.options.fields or ("id",)))

    def sync(self) -> None:
        """Make sure that what was written survives a power failure, where this is possible."""
        self._writer.sync()

    @property
    def written(self) -> int | None:
        """Where the next result begins in the file, in bytes; None if the output is not a regular file."""
        return self._writer.written if isinstance(self._writer, FileWriter) else None

    def close(self) -> None:
        """Write what belongs at the end.

        Raises:
            OutputError: It cannot be written.
        """
        self._writer.close()


async def _open_device(path: Path) -> BinaryIO:
    """Open a device or a named pipe. To wait for the reader of a pipe in `open` would keep signals from being heard."""
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            await asyncio.sleep(LOOK_AGAIN)
        else:
            os.set_blocking(descriptor, True)
            return os.fdopen(descriptor, "wb", buffering=0)


def _check_writable(file: Path, ids: Ids) -> None:
    """Refuse a file that cannot be written, before hours of work; create it if it is missing.

    Raises:
        click.UsageError: It cannot be written, or is what the command reads.
    """
    shown = printable(str(file))
    try:
        if file.exists() and not file.is_file() and not file.is_dir():
            return  # a pipe or a device
        with file.open("ab") as opened:
            if _is_same_file(opened, ids):
                raise click.UsageError(f"{shown} is the file that the ids come from; write to another file")
    except OSError as error:
        raise click.UsageError(f"cannot write to {shown}: {error.strerror}") from None


def _is_same_file(output: IO[Any], ids: Ids) -> bool:
    if isinstance(ids, Arguments):
        return False
    try:
        written, read = os.fstat(output.fileno()), os.fstat(ids.stream.fileno())
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(written.st_mode) and os.path.samestat(written, read)


class InOrder:
    """Puts outcomes back into the order of the arguments; those of other ids pass as they come.

    Args:
        ids: The ids; None if not all of them get an outcome.
    """

    def __init__(self, ids: Ids | None) -> None:
        self._ordered = isinstance(ids, Arguments)
        self._due = deque(ids if isinstance(ids, Arguments) else ())
        self._held: defaultdict[str, deque[Found]] = defaultdict(deque)

    def released_by(self, outcome: Found) -> Iterator[Found]:
        """Yield the outcomes that need not wait for others any more, now that this one is there."""
        if not self._ordered:
            yield outcome
            return
        self._held[outcome.id].append(outcome)
        while self._due and self._held[self._due[0]]:
            yield self._held[self._due.popleft()].popleft()

    def rest(self) -> Iterator[Found]:
        """Yield the outcomes still held, those before them missing."""
        for execution_id in self._due:
            if self._held[execution_id]:
                yield self._held[execution_id].popleft()
