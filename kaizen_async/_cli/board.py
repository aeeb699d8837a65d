"""The live table of `watch`."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from types import TracebackType
from typing import Final, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kaizen_async._cli.kinds import Execution, workflow_of
from kaizen_async._cli.rows import age_of, plain, status_text
from kaizen_async._cli.wording import by_status, message_of, spell
from kaizen_async.errors import KaizenError
from kaizen_async.outcomes import Change

REFRESH: Final = 0.25
"""Seconds between two pictures."""
FRAME: Final = 5
"""Lines of the terminal that hold no row: the header, its rule, the counts, and room to breathe."""


@dataclass(slots=True)
class Line:
    """What the board knows of one id."""

    number: int
    record: Execution | None = None
    error: KaizenError | None = None
    changed: float | None = None
    """When it was seen to change; None for what is as it was first seen."""


class Board:
    """Shows the latest state of everything that is watched, as far as it fits: what runs first, then what ended last.

    Args:
        console: The terminal.
        ids: Ids that are known from the beginning.
    """

    def __init__(self, console: Console, ids: Iterable[str]) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False)
        # Both are ordered by the last change.
        self._running = {execution_id: Line(number) for number, execution_id in enumerate(dict.fromkeys(ids))}
        self._over: dict[str, Line] = {}
        self._statuses: Counter[str] = Counter()
        self._errors = 0

    async def __aenter__(self) -> Self:
        self._live.start()
        self._task = asyncio.create_task(self._refresh())
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        self._live.update(self.picture())
        self._live.stop()

    async def show(self, change: Change[Execution]) -> None:
        """Take a change in; it shows in the next picture."""
        line = self._running.pop(change.id, None) or self._over.pop(change.id, None) or Line(self._size)
        if line.record is not None:
            line.changed = time.monotonic()
            self._statuses[line.record.status] -= 1
        if change.after is None:
            line.error = change.error
            self._errors += 1
        else:
            line.record = change.after
            self._statuses[change.after.status] += 1
        runs = change.after is not None and not change.after.is_finished
        (self._running if runs else self._over)[change.id] = line

    @property
    def _size(self) -> int:
        return len(self._running) + len(self._over)

    def picture(self) -> Group:
        """Return the table and the counts, as of now."""
        width, height = self._console.size
        first = chain(reversed(self._running.items()), reversed(self._over.items()))
        shown = sorted(islice(first, max(1, height - FRAME)), key=lambda item: item[1].number)
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        id_width = max((len(execution_id) for execution_id, _ in shown), default=0)
        table.add_column("ID", min_width=min(id_width, width // 2), overflow="fold")
        for title, widest in (("WORKFLOW", 30), ("STATUS", 45), ("AGE", 11), ("LAST CHANGE", 15)):
            table.add_column(title, no_wrap=True, max_width=widest)
        for execution_id, line in shown:
            table.add_row(plain(execution_id), *_cells(line))
        hidden = self._size - len(shown)
        counts = by_status(self._statuses, self._errors) + f" · {hidden:,} not shown" * bool(hidden)
        return Group(table, Text(counts, style="dim"))

    async def _refresh(self) -> None:
        while True:
            self._live.update(self.picture(), refresh=True)
            await asyncio.sleep(REFRESH)


def _cells(line: Line) -> tuple[Text, ...]:
    record, error = line.record, line.error
    changed = Text("" if line.changed is None else f"{spell(time.monotonic() - line.changed)} ago")
    workflow = Text() if record is None else plain(workflow_of(record))
    age = Text() if record is None else Text(age_of(record))
    if error is not None:
        return workflow, Text(message_of(error), style="red"), age, changed
    return workflow, Text() if record is None else status_text(record), age, changed
