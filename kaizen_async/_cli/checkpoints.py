"""The file behind `wait --checkpoint`: what is still waited for, so that another run can go on.

The rule: what the runs print together is one end for each id. So a checkpoint counts an end as done only when its line
is out, and is written in one step: it is either the old one or the new one, never half of one.

How much of the input earlier runs took in is kept as a count and a chained digest of the ids, however many these are.
So the same command with the same input can be run again: ids that were taken in are skipped, and other ids are told
from them. Ids that were not read from standard input when the run ended are not in the file; they come again with the
same input.
"""

import os
import tempfile
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import click
import msgspec

from kaizen_async._cli.ids import Arguments, Ids
from kaizen_async._cli.stopping import Stop
from kaizen_async._ledger import Checkpoint

_DIGEST_BYTES = 16


class Taken(msgspec.Struct):
    """Which ids were taken in over all runs, in constant space."""

    count: int = 0
    digest: str = ""

    def add(self, execution_id: str) -> None:
        """Note that an id was taken in."""
        self.count += 1
        self.digest = blake2b(f"{self.digest} {execution_id}".encode(), digest_size=_DIGEST_BYTES).hexdigest()


class Saved(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="kaizen-async wait"):
    """What a checkpoint file holds."""

    base_url: str
    taken: Taken
    unprinted: list[str]
    """Ids that have ended, but whose line was not out yet."""
    waiting: dict[str, Any]
    """What `wait_many` goes on from."""

    def ids(self) -> list[str]:
        """Return the ids that are waited for.

        Raises:
            ValueError: What `wait_many` should go on from is not its checkpoint.
        """
        return [
            str(entry.id) for entry in Checkpoint.load(self.waiting).ids for _ in range(entry.count)
        ] + self.unprinted


class CheckpointError(click.ClickException):
    """Raised when a checkpoint cannot be written."""


class CheckpointFile:
    """A checkpoint on disk.

    Args:
        path: Where it is. It need not exist.
        base_url: The server that the ids belong to.
    """

    def __init__(self, path: Path, base_url: str) -> None:
        self.path = path
        self.base_url = base_url

    def load(self) -> Saved | None:
        """Return what an earlier run saved, or None if there is nothing.

        Raises:
            click.UsageError: It cannot be read, is no checkpoint, or belongs to another server.
        """
        try:
            saved = msgspec.json.decode(self.path.read_bytes(), type=Saved)
            saved.ids()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise click.UsageError(f"cannot read the checkpoint {self.path}: {error.strerror}") from None
        except ValueError as error:
            raise self.unusable(error) from None
        if saved.base_url != self.base_url:
            raise click.UsageError(
                f"the checkpoint {self.path} is about {saved.base_url}, not {self.base_url}; "
                "give the same --base-url and --kind, or another --checkpoint"
            )
        return saved

    def unusable(self, why: ValueError) -> click.UsageError:
        """Return the error for a file whose content is something else."""
        return click.UsageError(
            f"{self.path} is no checkpoint of kaizen-async wait ({why}); move it away to begin anew"
        )

    def save(self, saved: Saved) -> None:
        """Replace what is on disk, in one step.

        Raises:
            CheckpointError: It cannot be written.
        """
        try:
            descriptor, name = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(msgspec.json.encode(saved))
                    file.flush()
                    os.fsync(file.fileno())
                Path(name).replace(self.path)
            except BaseException:
                with suppress(FileNotFoundError):
                    Path(name).unlink()
                raise
        except OSError as error:
            raise CheckpointError(f"cannot write the checkpoint {self.path}: {error.strerror}") from error

    def remove(self) -> None:
        """Remove it from disk."""
        self.path.unlink(missing_ok=True)


async def skip_taken(ids: Ids, saved: Saved, stop: Stop) -> Taken:
    """Skip the ids that earlier runs took in; without any ids, there is nothing to skip.

    Returns:
        What has been taken in, to be continued.

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
            "to go on with it, or name another --checkpoint for these"
        )
    return taken
