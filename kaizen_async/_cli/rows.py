"""Results as rows of a table on a terminal, each shown as soon as it is there."""

import time
from datetime import datetime

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kaizen_async._cli.ids import Arguments, Ids
from kaizen_async._cli.kinds import Execution, workflow_of
from kaizen_async._cli.wording import message_of, spell
from kaizen_async.errors import printable
from kaizen_async.outcomes import Outcome

STYLES = {
    "Enqueued": "dim",
    "InProgress": "cyan",
    "Paused": "magenta",
    "Completed": "green",
    "Failed": "red",
}
"""Colours of the statuses that have one."""

STATUS_WIDTH = 10
STARTED_WIDTH = 11
AGE_WIDTH = 11
GAP = 2
ROOM = "  "
"""What later ids may be longer than the first, when it is not known how long they are."""
HEADER = ("ID", "WORKFLOW", "STATUS", "STARTED", "TOOK")


def plain(text: str) -> Text:
    """Return foreign text so that it neither styles nor moves anything on the terminal."""
    return Text(printable(text))


def status_text(record: Execution) -> Text:
    """Return the status of an execution in its colour."""
    text = plain(record.status)
    text.stylize(STYLES.get(record.status, ""))
    return text


def age_of(record: Execution) -> str:
    """Return how long an execution took, or has been running; nothing if it does not tell."""
    if record.duration is not None:
        return spell(max(0.0, record.duration.total_seconds()))
    if record.start_time is None or record.is_finished:
        return ""
    return spell(max(0.0, time.time() - record.start_time.timestamp()))


class Rows:
    """Shows one row for each outcome, under one header."""

    def __init__(self, console: Console, ids: Ids) -> None:
        self._console = console
        self._known = list(ids) if isinstance(ids, Arguments) else []
        self._id_width = 0

    def show(self, outcome: Outcome[Execution]) -> None:
        """Show one outcome."""
        if not self._id_width:
            self._begin(outcome)
        if outcome.error is not None:
            self._print(plain(outcome.id), Text(message_of(outcome.error), style="red"))
        else:
            self._print(plain(outcome.id), *_cells(outcome.unwrap()))

    def _begin(self, first: Outcome[Execution]) -> None:
        longest = max(map(len, self._known or [first.id + ROOM]))
        self._id_width = min(max(len(HEADER[0]), longest), self._console.width // 2)
        self._print(*(Text(title, style="bold") for title in HEADER))

    def _print(self, execution_id: Text, *cells: Text) -> None:
        row = Table.grid(padding=(0, GAP, 0, 0))
        row.add_column(width=self._id_width, overflow="fold")
        widths = (None,) if len(cells) == 1 else (self._workflow_width, STATUS_WIDTH, STARTED_WIDTH, AGE_WIDTH)
        for width in widths:
            row.add_column(width=width, overflow="fold")
        row.add_row(execution_id, *cells)
        self._console.print(row)

    @property
    def _workflow_width(self) -> int:
        taken = self._id_width + STATUS_WIDTH + STARTED_WIDTH + AGE_WIDTH + 5 * GAP
        return max(10, self._console.width - taken)


def _cells(record: Execution) -> tuple[Text, ...]:
    shown = "" if record.start_time is None else _short(record.start_time)
    return plain(workflow_of(record)), status_text(record), Text(shown), Text(age_of(record))


def _short(moment: datetime) -> str:
    local = moment.astimezone()
    today = local.date() == datetime.now().astimezone().date()
    return local.strftime("%H:%M:%S" if today else "%m-%d %H:%M")
