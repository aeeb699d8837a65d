"""Keeping a checkpoint file in step with a wait."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

import click

from kaizen_async._cli.checkpoints import CheckpointError, CheckpointFile, Saved

SAVE_EVERY: Final = 3.0
"""Seconds between two checkpoints."""
SHARE_OF_TIME: Final = 0.02
"""Share of the time that may go into checkpoints; with very many ids they come less often."""


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
            except CheckpointError as error:
                click.echo(f"{error.message}; trying again", err=True)
            took = time.monotonic() - began
