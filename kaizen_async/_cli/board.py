"""The live table of `watch`."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from types import TracebackType
from typing import Final, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kaizen_async._cli.progress import by_status, is_ended_badly
from kaizen_async._cli.table import Execution, age_of, message_of, plain, spell, status_text
from kaizen_async._records.facts import has_ended, status_of, workflow_name_of
from kaizen_async.errors import KaizenError
from kaizen_async.outcomes import Change

REFRESH: Final = 0.25
"""Seconds between two pictures."""
FRAME: Final = 6
"""Lines of the terminal that hold no row: the header, the counts, a line about trouble, and room to breathe."""
MOST_FAILURES: Final = 200
"""Failures that the last picture shows, though they do not all fit on the screen."""


@dataclass(slots=True)
class Line:
    """The state of one id.

    Attributes:
        number: Its place among the ids.
        record: The latest record.
        error: Why it is not watched any more.
        changed: When it was seen to change, in the clock's seconds; None if it is as it was first seen.
    """

    number: int
    record: Execution | None = None
    error: KaizenError | None = None
    changed: float | None = None


class Board:
    """Shows the latest state of everything that is watched, as far as it fits: failures, then what runs, then the rest.

    Args:
        console: The terminal.
        ids: Ids that are known from the beginning.
        trouble: Returns why nothing changes; empty if nothing is wrong.
        only_failed: Whether to show failures and nothing else.

    Attributes:
        is_live: Whether the terminal can renew what it shows. If not, only the last picture appears.
    """

    def __init__(
        self,
        console: Console,
        ids: Iterable[str],
        trouble: Callable[[], str] = lambda: "",
        *,
        only_failed: bool = False,
    ) -> None:
        self.is_live = not console.is_dumb_terminal
        self._console = console
        self._trouble = trouble
        self._only_failed = only_failed
        self._live = Live(console=console, auto_refresh=False)
        # Each is ordered by the last change.
        self._failed: dict[str, Line] = {}
        self._running = {execution_id: Line(number) for number, execution_id in enumerate(dict.fromkeys(ids))}
        self._ended: dict[str, Line] = {}
        self._statuses: Counter[str] = Counter()
        self._errors = 0

    async def __aenter__(self) -> Self:
        if self.is_live:
            self._live.start()
            self._task = asyncio.create_task(self._refresh())
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.is_live:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._live.update(Text())
            self._live.transient = True
            self._live.stop()
        self._console.print(self.picture(last=True))

    def show(self, change: Change[Execution]) -> None:
        """Take note of a change; it shows in the next picture."""
        groups = (self._running, self._failed, self._ended)
        line = next((group.pop(change.id) for group in groups if change.id in group), None) or Line(self._size)
        if line.record is not None:
            line.changed = time.monotonic()
            self._statuses[status_of(line.record)] -= 1
        if change.after is None:
            line.error = change.error
            self._errors += 1
        else:
            line.record = change.after
            self._statuses[status_of(change.after)] += 1
        self._group_of(line)[change.id] = line

    def _group_of(self, line: Line) -> dict[str, Line]:
        if line.error is not None or is_ended_badly(line.record):
            return self._failed
        return self._ended if line.record is not None and has_ended(line.record) else self._running

    @property
    def _size(self) -> int:
        return len(self._failed) + len(self._running) + len(self._ended)

    def picture(self, *, last: bool = False) -> Group:
        """Return the table and the counts, as of now.

        Args:
            last: Whether the picture stays, so that failures may take more room than the screen has.
        """
        width, height = self._console.size
        room = max(1, height - FRAME)
        failures = list(islice(reversed(self._failed.items()), max(room, MOST_FAILURES) if last else room))
        others = chain(reversed(self._running.items()), reversed(self._ended.items()))
        shown = sorted(failures, key=lambda item: item[1].number)
        if not self._only_failed:
            shown += sorted(islice(others, max(0, room - len(failures))), key=lambda item: item[1].number)
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        id_width = max((len(execution_id) for execution_id, _ in shown), default=0)
        table.add_column("ID", min_width=min(id_width, width // 2), overflow="fold")
        for title, widest in (("WORKFLOW", 30), ("STATUS", 45), ("AGE", 11), ("LAST CHANGE", 15)):
            table.add_column(title, no_wrap=True, max_width=widest)
        for execution_id, line in shown:
            table.add_row(plain(execution_id), *_cells(line))
        hidden = (len(self._failed) if self._only_failed else self._size) - len(shown)
        counts = by_status(self._statuses, self._errors) + f" · {hidden:,} not shown" * bool(hidden)
        trouble = "" if last else self._trouble()
        return Group(table, Text(counts, style="dim"), *([Text(trouble, style="yellow")] if trouble else []))

    async def _refresh(self) -> None:
        while True:
            self._live.update(self.picture(), refresh=True)
            await asyncio.sleep(REFRESH)


def _cells(line: Line) -> tuple[Text, ...]:
    record, error = line.record, line.error
    changed = Text("" if line.changed is None else f"{spell(time.monotonic() - line.changed)} ago")
    workflow = Text() if record is None else plain(workflow_name_of(record))
    age = Text() if record is None else Text(age_of(record))
    if error is not None:
        return workflow, Text(message_of(error), style="red"), age, changed
    return workflow, Text() if record is None else status_text(record), age, changed
