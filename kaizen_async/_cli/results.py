"""Where outcomes go: rows of a table on a terminal, lines of JSON elsewhere."""

import sys
from collections import Counter, defaultdict, deque
from collections.abc import Iterator

from rich.console import Console

from kaizen_async._cli.ids import Arguments, Ids
from kaizen_async._cli.json_lines import JsonLines
from kaizen_async._cli.kinds import Execution, as_json
from kaizen_async._cli.rows import Rows
from kaizen_async._cli.wording import described
from kaizen_async.outcomes import Outcome

Found = Outcome[Execution]


class Results:
    """Shows outcomes as they come.

    Attributes:
        console: The terminal that shows them, if there is one.
    """

    def __init__(self, ids: Ids) -> None:
        self.console = Console() if sys.stdout.isatty() else None
        self._rows = None if self.console is None else Rows(self.console, ids)
        self._lines = JsonLines(sys.stdout.buffer)

    async def show(self, outcome: Found) -> None:
        """Show one outcome.

        Raises:
            OutputClosedError: Nobody reads standard output any more.
        """
        if self._rows is not None:
            self._rows.show(outcome)
        elif outcome.error is not None:
            await self._lines.write({"id": outcome.id, "error": described(outcome.error)})
        else:
            await self._lines.write(as_json(outcome.execution))

    def sync(self) -> None:
        """Make sure that what was shown outlives a power failure, where that can be had."""
        self._lines.sync()


class InOrder:
    """Puts outcomes back into the order of the arguments; those of other ids pass as they come."""

    def __init__(self, ids: Ids) -> None:
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


class Tally:
    """How many were found, in which status, and how many failed."""

    def __init__(self) -> None:
        self.found = 0
        self.failed = 0
        self.statuses: Counter[str] = Counter()

    @property
    def done(self) -> int:
        """How many outcomes there were."""
        return self.found + self.failed

    def count(self, outcome: Found) -> None:
        """Count one outcome."""
        if outcome.execution is None:
            self.failed += 1
        else:
            self.found += 1
            self.statuses[outcome.execution.status] += 1
