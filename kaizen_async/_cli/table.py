"""Results as rows of a table, each shown as soon as it is there, and how values are put for people."""

import os
import time
from datetime import datetime
from typing import IO, TypeAlias

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kaizen_async._cli.ids import Arguments, Ids
from kaizen_async._records.base import Record
from kaizen_async._records.facts import duration_of, has_ended, start_of, start_time_of, status_of, workflow_name_of
from kaizen_async.errors import KaizenError, printable
from kaizen_async.outcomes import Outcome

Execution: TypeAlias = Record
Found: TypeAlias = Outcome[Execution]

_MINUTE = 60
_HOUR = 60 * _MINUTE
_DAY = 24 * _HOUR
_UNITS = ((_DAY, "d", _HOUR, "h"), (_HOUR, "h", _MINUTE, "min"), (_MINUTE, "min", 1, "s"))

STYLES = {
    "Enqueued": "dim",
    "InProgress": "cyan",
    "Paused": "magenta",
    "Completed": "green",
    "Failed": "red",
}
"""Colours of the statuses that have one."""

WIDTHS = (10, 11, 11)
"""Columns of the terminal for status, start and duration."""
LEAST_WORKFLOW = 10
"""Columns that the name of a workflow needs; without them, a row shows id and status only."""
GAP = 2
NARROWEST = 20
"""Columns below which nothing readable fits. A terminal that says that it is narrower breaks the lines itself."""
USUAL = 80
"""Columns of a terminal that does not know its width."""
WIDEST = 500
"""Columns that are used at most: every row is padded to the width of the terminal."""
ROOM = "  "
"""What later ids may be longer than the first, when it is not known how long they are."""
LONGEST = 8e13
"""Seconds that are shown at most: two and a half million years."""
HEADER = ("ID", "WORKFLOW", "STATUS", "STARTED", "TOOK")


def console_on(stream: IO[str]) -> Console:
    """Return a console that is wide enough to show something: COLUMNS may say 0, and a terminal may not know."""
    console = Console(file=stream, highlight=False)
    if console.width < NARROWEST:
        columns = os.environ.get("COLUMNS", "")
        console.width = NARROWEST if columns.isdigit() and int(columns) else USUAL
    elif console.width > WIDEST:
        console.width = WIDEST
    return console


def plain(text: str) -> Text:
    """Return foreign text so that it neither styles nor moves anything on the terminal."""
    return Text(printable(text))


def status_text(record: Execution) -> Text:
    """Return the status of an execution in its colour."""
    status = status_of(record)
    text = plain(status)
    text.stylize(STYLES.get(status, ""))
    return text


def age_of(record: Execution) -> str:
    """Return how long an execution took, or has been running; nothing if it does not say."""
    seconds = duration_of(record)
    started = start_of(record)
    if seconds is None and started is not None and not has_ended(record):
        seconds = time.time() - started
    return "" if seconds is None else spell(min(max(0.0, seconds), LONGEST))


def moment_of(moment: datetime) -> str:
    """Return a point in time as people read it here: a time of today, a day of this year, or a date."""
    try:
        local = moment.astimezone()
    except (OverflowError, ValueError, OSError):  # in the years 1 and 9999, which another time zone may leave
        local = moment
    now = datetime.now(local.tzinfo)
    if local.date() == now.date():
        return f"{local:%H:%M:%S}"
    return f"{local:%m-%d %H:%M}" if local.year == now.year else f"{local.year:04}-{local:%m-%d}"


def spell(seconds: float) -> str:
    """Return a duration in its two leading units: `42 s`, `3 min 5 s`, `2 h 13 min`."""
    whole = round(seconds)
    for size, name, part_size, part_name in _UNITS:
        if whole >= size:
            return f"{whole // size} {name} {whole % size // part_size} {part_name}"
    return f"{whole} s"


def counted(number: int, name: str) -> str:
    """Return how many there are of something: `1 request`, `2,000 requests`."""
    return f"{number:,} {name}" if number == 1 else f"{number:,} {name}s"


def message_of(error: KaizenError) -> str:
    """Return what an error says, without the id that stands beside it."""
    return str(error).removeprefix(f"{printable(error.execution_id)}: ")


class Rows:
    """Shows one row for each outcome, under one header."""

    def __init__(self, console: Console, ids: Ids) -> None:
        self._console = console
        self._known = list(ids) if isinstance(ids, Arguments) else []
        self._id_width = 0

    def show(self, outcome: Found) -> None:
        """Show one outcome."""
        if not self._id_width:
            self._begin(outcome)
        if outcome.error is not None:
            self._print(plain(outcome.id), Text(message_of(outcome.error), style="red"))
        else:
            self._print(plain(outcome.id), *self._cells(outcome.unwrap()))

    def rendered(self, outcome: Found) -> str:
        """Return the lines for one outcome, without showing them."""
        with self._console.capture() as captured:
            self.show(outcome)
        return captured.get()

    def _begin(self, first: Found) -> None:
        longest = max(map(len, self._known or [first.id + ROOM]))
        self._id_width = min(max(len(HEADER[0]), longest), self._console.width // 2)
        self._is_wide = self._id_width + sum(WIDTHS) + len(HEADER) * GAP + LEAST_WORKFLOW <= self._console.width
        titles = HEADER if self._is_wide else (HEADER[0], HEADER[2])
        self._print(*(Text(title, style="bold") for title in titles))

    def _cells(self, record: Execution) -> tuple[Text, ...]:
        if not self._is_wide:
            return (status_text(record),)
        start_time = start_time_of(record)
        started = "" if start_time is None else moment_of(start_time)
        return plain(workflow_name_of(record)), status_text(record), Text(started), Text(age_of(record))

    def _print(self, execution_id: Text, *cells: Text) -> None:
        row = Table.grid(padding=(0, GAP, 0, 0))
        row.add_column(width=self._id_width, overflow="fold")
        workflow_width = self._console.width - self._id_width - sum(WIDTHS) - len(HEADER) * GAP
        for width in (None,) if len(cells) == 1 else (workflow_width, *WIDTHS):
            row.add_column(width=width, overflow="fold")
        row.add_row(execution_id, *cells)
        self._console.print(row)
