"""How far long work is, on standard error, for people who look at it."""

import asyncio
import sys
from types import TracebackType
from typing import Final, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

DELAY: Final = 0.5
"""Seconds that work may take without showing its progress."""


class ProgressBar:
    """A bar that appears when the work turns out to be long, and leaves nothing behind.

    Args:
        wanted: Whether to show anything, provided that standard error is a terminal.
        console: The terminal on which results appear, if there is one: they go above the bar.

    Attributes:
        enabled: Whether it may appear.
        shown: Whether it has appeared.
    """

    def __init__(self, *, wanted: bool = True, console: Console | None = None) -> None:
        self.enabled = wanted and sys.stderr.isatty()
        self.shown = False
        self._progress = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=console or Console(stderr=True),
            transient=True,
            disable=not self.enabled,
        )
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> Self:
        self._timer = asyncio.get_running_loop().call_later(DELAY, self._show)
        return self

    def _show(self) -> None:
        if self.enabled:
            self.shown = True
            self._progress.start()

    def update(self, done: int, total: int | None, text: str) -> None:
        """Show how many are done, of how many if that is known, and a text beside the bar."""
        self._progress.update(self._task, completed=done, total=total, description=text)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self.shown:
            self._progress.stop()
