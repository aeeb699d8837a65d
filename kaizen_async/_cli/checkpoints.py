"""The file behind `wait --checkpoint`: what is still waited for, so that another run can continue.

The rule: all runs together print one line for each id. So an id counts as done only when its line is written, and the
file is replaced in one step: it is the old one or the new one, never a part of one. After a crash, the output file may
hold results that are newer than the checkpoint. The checkpoint says where they begin, so they are found and count, too.

How much of the input earlier runs have read is kept as a count and a chained digest of the ids, whatever their number.
So the same command with the same input can be run again: ids that were read before are skipped, and other ids are
refused. Ids that were not read from standard input when the run ended are not in the file; they come again with the
same input.

The file is input: somebody may have edited or replaced it. It is checked before it is used.
"""

import asyncio
import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Annotated, Final, Self

import click
import msgspec

from kaizen_async._cli.ending import OutputError, Stop, say
from kaizen_async._cli.ids import Arguments, Ids
from kaizen_async._cli.output import replacing
from kaizen_async._ids import require_id
from kaizen_async._ledger import MOST_IDS, Checkpoint, Unfinished
from kaizen_async._waiting.cadence import require_learned
from kaizen_async.errors import printable

LARGEST: Final = 1 << 30
"""Bytes above which a file is not read."""
SAVE_EVERY: Final = 3.0
"""Seconds between two checkpoints."""
SHARE_OF_TIME: Final = 0.02
"""Share of the time that may go into checkpoints; with very many ids they come less often."""

_DIGEST_BYTES: Final = 16
_Id = Annotated[str, msgspec.Meta(min_length=1, max_length=65_536)]


class Taken(msgspec.Struct):
    """Which ids were read over all runs, in constant space."""

    count: Annotated[int, msgspec.Meta(ge=0, le=10**12)] = 0
    digest: Annotated[str, msgspec.Meta(max_length=64)] = ""

    def add(self, execution_id: str) -> None:
        """Note that an id was read."""
        self.count += 1
        self.digest = blake2b(f"{self.digest} {execution_id}".encode(), digest_size=_DIGEST_BYTES).hexdigest()


class Saved(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="kaizen-async wait"):
    """What a checkpoint file holds."""

    base_url: Annotated[str, msgspec.Meta(max_length=65_536)]
    taken: Taken
    unprinted: Annotated[list[_Id], msgspec.Meta(max_length=MOST_IDS)]
    """Ids that have ended, but whose line is not written yet."""
    waiting: Checkpoint
    """The checkpoint of `wait_many`."""
    written: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """How much of the output file had been written, in bytes; None if the output is not a file."""
    ahead: list[_Id] = msgspec.field(default_factory=list[_Id])
    """Ids whose result an earlier run wrote before it was killed, and that this run has not read from the input yet."""

    def without(self, done: Counter[str]) -> "Saved":
        """Return it without ids whose result was written after it was saved, and subtract these from `done`."""
        if not done:
            return self
        unprinted = [execution_id for execution_id in self.unprinted if not _subtract(done, execution_id, 1)]
        entries: list[Unfinished] = []
        for entry in self.waiting.ids:
            left = entry.count - _subtract(done, str(entry.id), entry.count)
            if left:
                entries.append(msgspec.structs.replace(entry, count=left))
        waiting = msgspec.structs.replace(self.waiting, ids=entries)
        return msgspec.structs.replace(self, unprinted=unprinted, waiting=waiting)

    def require_valid(self) -> None:
        """Refuse what cannot be continued.

        Raises:
            ValueError: The checkpoint of `wait_many` is of another version or too large, or an id is invalid.
        """
        for execution_id in self.unprinted:
            require_id(execution_id)
        Checkpoint.load(self.waiting)
        if self.waiting.learned is not None:
            require_learned(self.waiting.learned)

    @property
    def total(self) -> int:
        """How many results are waited for."""
        return len(self.unprinted) + self.waiting.total

    def ids(self) -> Iterator[str]:
        """Return the ids that are waited for."""
        return chain(self.unprinted, (str(entry.id) for entry in self.waiting.ids))


def _subtract(done: Counter[str], execution_id: str, most: int) -> int:
    """Subtract the count of an id, at most a number of times; return how often."""
    count = min(done[execution_id], most)
    done[execution_id] -= count
    return count


def _open_at_once(path: str, flags: int) -> int:
    """Open a file. Of a named pipe that nobody writes to, do not wait for the writer."""
    return os.open(path, flags | os.O_NONBLOCK)


class CheckpointError(click.ClickException):
    """Raised when a checkpoint cannot be written."""


class CheckpointFile:
    """A checkpoint on disk.

    Args:
        path: Where it is. It need not exist. A symbolic link stays one.
        base_url: The server that the ids belong to.
    """

    def __init__(self, path: Path, base_url: str) -> None:
        self.shown = printable(str(path))
        self.base_url = base_url
        self.path = path
        self._path = path

    def load(self) -> Saved | None:
        """Return what an earlier run saved, or None if there is nothing.

        Raises:
            click.UsageError: It cannot be read or written, is not a checkpoint, or belongs to another server.
        """
        try:
            self._path = self.path.resolve()
            saved = self._read()
            saved.require_valid()
        except FileNotFoundError:
            return None
        except (OSError, RuntimeError) as error:  # RuntimeError: symbolic links in a circle
            if isinstance(error, RecursionError):
                raise self.unusable("it is nested too deeply") from None
            why = error.strerror if isinstance(error, OSError) else "its symbolic links form a circle"
            raise click.UsageError(f"cannot read the checkpoint {self.shown}: {why}") from None
        except ValueError as error:
            raise self.unusable(str(error)) from None
        if saved.base_url != self.base_url:
            raise click.UsageError(
                f"the checkpoint {self.shown} is about {printable(saved.base_url)}, not {self.base_url}; "
                "give the same --base-url and --kind, or another --checkpoint"
            )
        return saved

    def _read(self) -> Saved:
        with open(self._path, "rb", opener=_open_at_once) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise ValueError("it is not a regular file")
            if found.st_size > LARGEST:
                raise ValueError("it is too large")
            if not found.st_mode & 0o222:
                raise click.UsageError(f"cannot write the checkpoint {self.shown}: it is read-only")
            return msgspec.json.decode(file.read(), type=Saved)

    def unusable(self, why: str) -> click.UsageError:
        """Return the error for a file with some other content."""
        return click.UsageError(
            f"{self.shown} is not a checkpoint of kaizen-async wait ({printable(why)}); move it away to start again"
        )

    def save(self, saved: Saved) -> None:
        """Replace what is on disk, in one step.

        Raises:
            CheckpointError: It cannot be written.
        """
        try:
            with replacing(self._path) as file:
                file.write(msgspec.json.encode(saved))
        except OSError as error:
            raise CheckpointError(f"cannot write the checkpoint {self.shown}: {error.strerror}") from error

    def remove(self) -> None:
        """Remove it from disk."""
        self._path.unlink(missing_ok=True)


class Saving:
    """Saves at the beginning, now and then, and at the end; removes the file if nothing is left to do.

    Args:
        file: The file; None if none is wanted.
        snapshot: Returns what is to be saved.

    Attributes:
        complete: To be set when all is done: then there is nothing to save.
    """

    def __init__(self, file: CheckpointFile | None, snapshot: Callable[[], Saved]) -> None:
        self.complete = False
        self._file = file
        self._snapshot = snapshot
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        if self._file is not None:
            try:
                self._file.save(self._snapshot())
            except CheckpointError as error:
                raise click.UsageError(error.message) from None
            self._task = asyncio.create_task(self._now_and_then(self._file))
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is None or self._task is None:
            return
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        if self.complete:
            self._file.remove()
        else:
            self._file.save(self._snapshot())

    async def _now_and_then(self, file: CheckpointFile) -> None:
        took = 0.0
        while True:
            await asyncio.sleep(max(SAVE_EVERY, took / SHARE_OF_TIME))
            began = time.monotonic()
            try:
                file.save(self._snapshot())
            except (CheckpointError, OutputError) as error:
                say(f"{error}; trying again")
            took = time.monotonic() - began


async def skip_taken(ids: Ids, saved: Saved, stop: Stop) -> Taken:
    """Skip the ids that earlier runs have read; without any ids, there is nothing to skip.

    Returns:
        What has been read, to be continued.

    Raises:
        click.UsageError: These are other ids.
    """
    taken = Taken()
    if isinstance(ids, Arguments):
        for execution_id in ids[: saved.taken.count]:
            taken.add(execution_id)
        del ids[: saved.taken.count]
    elif saved.taken.count:
        async for execution_id in stop.each(aiter(ids)):
            taken.add(execution_id)
            if taken.count == saved.taken.count:
                break
    if stop.reason or not taken.count:
        return saved.taken
    if taken != saved.taken:
        raise click.UsageError(
            f"the checkpoint begins with {saved.taken.count:,} other ids; give the same ids again, or none, "
            "to continue, or name another --checkpoint for these"
        )
    return taken
