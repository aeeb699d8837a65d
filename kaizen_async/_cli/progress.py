"""How far long work is, on standard error: a line that renews itself on a terminal, else a line every ten seconds."""

import asyncio
import sys
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Final, Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from kaizen_async._cli.ending import say
from kaizen_async._cli.ids import Arguments, Ids, Source
from kaizen_async._cli.output import Output
from kaizen_async._cli.table import Execution, Found, console_on, counted, spell
from kaizen_async._records.facts import has_ended, status_of
from kaizen_async.client import KaizenClient
from kaizen_async.errors import AuthenticationError, KaizenError, StatusError, printable
from kaizen_async.events import AttemptEnded, Event, Gated, OutageBegan, OutageEnded
from kaizen_async.models import ExecutionStatus
from kaizen_async.outcomes import Change

REFRESH: Final = 0.25
"""Seconds between two pictures on a terminal."""
DELAY: Final = 0.5
"""Seconds that work may take without showing its progress."""
PLAIN_EVERY: Final = 10.0
"""Seconds between two lines where standard error is not a terminal."""
RATE_OVER: Final = 40
"""Pictures over which the rate is taken: ten seconds."""
TROUBLE_AFTER: Final = 2.0
"""Seconds after which it is reported that requests only fail."""
_MOST_KINDS: Final = 8
"""Kinds of failures and statuses that a line names."""


class Tally:
    """Counts what became of the ids.

    Attributes:
        found: Records; for waits, executions that have ended.
        failures: Failed lookups by kind of error.
        statuses: Records by status.
        running: Ids of executions that are watched and have not ended.
        already: Ids that were not looked up, because an earlier run has a result for them.
    """

    def __init__(self) -> None:
        self.found = 0
        self.failures: Counter[str] = Counter()
        self.statuses: Counter[str] = Counter()
        self.running: set[str] = set()
        self.already = 0
        self._began = time.monotonic()

    @property
    def failed(self) -> int:
        """How many lookups failed."""
        return self.failures.total()

    @property
    def has_failures(self) -> bool:
        """Whether a lookup failed, or an execution that was waited for ended as failed."""
        return self.failed > 0 or self.statuses[ExecutionStatus.FAILED] > 0

    @property
    def done(self) -> int:
        """How many ids are done with."""
        return self.found + self.failed

    @property
    def seconds(self) -> float:
        """How long the work has taken so far."""
        return time.monotonic() - self._began

    def count(self, outcome: Found) -> None:
        """Count one outcome."""
        if outcome.error is not None:
            self.failures[_kind_of(outcome.error)] += 1
        else:
            self.found += 1
            self.statuses[status_of(outcome.unwrap())] += 1

    def count_change(self, change: Change[Execution]) -> None:
        """Count one change of an execution that is watched."""
        self.running.discard(change.id)
        if change.error is not None:
            self.failures[_kind_of(change.error)] += 1
        elif has_ended(change.after):
            self.found += 1
            self.statuses[status_of(change.after)] += 1
        else:
            self.running.add(change.id)

    def skip(self) -> None:
        """Count an id that an earlier run has a result for."""
        self.already += 1

    def words(self, what: str) -> Iterator[str]:
        """Yield what became of the ids: how many were found (or ended), and the failures by kind."""
        statuses = by_status(self.statuses) if what != "found" else ""
        yield f"{self.found:,} {what}" + f" ({statuses})" * bool(statuses)
        yield f"{self.failed:,} failed" + f" ({by_status(self.failures)})" * bool(self.failures)
        if self.already:
            yield f"{self.already:,} already there"


def is_ended_badly(record: Execution | None) -> bool:
    """Whether an execution has ended as failed."""
    return record is not None and has_ended(record) and status_of(record) == ExecutionStatus.FAILED


def _kind_of(error: KaizenError) -> str:
    kind = type(error).__name__
    return f"{kind} {error.status}" if type(error) is StatusError else kind


def by_status(counts: Mapping[str, int], errors: int = 0) -> str:
    """Return how many there are of each kind."""
    present = [(name, count) for name, count in sorted(counts.items()) if count > 0]
    words = [f"{printable(name)} {count:,}" for name, count in present[:_MOST_KINDS]]
    if len(present) > _MOST_KINDS:
        words.append(f"others {sum(count for _, count in present[_MOST_KINDS:]):,}")
    return " · ".join(words + [f"errors {errors:,}"] * bool(errors))


class Trouble:
    """Notices that requests have only failed for some time, or that the server holds the client back.

    It is the client's `on_event`. A single failed request, and a failure that concerns one id, is no trouble.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._error: KaizenError | None = None
        self._is_outage = False
        self._paused_until = 0.0

    def __call__(self, event: Event) -> None:
        """Take note of a request that is over, of a pause, and of an outage."""
        if isinstance(event, Gated):
            self._paused_until = time.monotonic() + event.pause
        elif isinstance(event, OutageBegan):
            self._since, self._error, self._is_outage = time.monotonic() - event.age, event.error, True
        elif isinstance(event, OutageEnded):
            self._since, self._is_outage = None, False
        elif isinstance(event, AttemptEnded):
            error = event.error
            if error is not None and (error.retryable or isinstance(error, AuthenticationError)):
                self._since = self._since or time.monotonic() - event.elapsed
                self._error = error
            elif event.status is not None and not self._is_outage:
                self._since = None

    def words(self) -> str:
        """Return what is wrong; empty as long as nothing is, or not for long."""
        now = time.monotonic()
        if now < self._paused_until:
            return f"paused by the server for {spell(max(1.0, self._paused_until - now))}"
        if self._since is None or self._error is None or not (self._is_outage or now - self._since >= TROUBLE_AFTER):
            return ""
        what = "refused the API key" if isinstance(self._error, AuthenticationError) else "been failing"
        return f"the server has {what} for {spell(now - self._since)}: {self._error.reason}"


class Progress:
    """Shows a line about the work from time to time, and leaves nothing behind on a terminal.

    Args:
        line: Returns what there is to say.
        wanted: Whether to show anything.
        console: The terminal that shows the results, if there is one: the line stays below them.
        trouble: Returns why there is no progress; shown in the line, or at once where standard error is no terminal.

    Attributes:
        rate: Ids per second, lately.
    """

    def __init__(
        self,
        line: Callable[["Progress"], str],
        *,
        wanted: bool = True,
        console: Console | None = None,
        done: Callable[[], int] = lambda: 0,
        trouble: Callable[[], str] = lambda: "",
    ) -> None:
        self._line = line
        self._done = done
        self._trouble = trouble
        self._console = console or console_on(sys.stderr)
        self._is_live = sys.stderr.isatty() and not self._console.is_dumb_terminal
        self._wanted = wanted
        self._seen: deque[tuple[float, int]] = deque(maxlen=RATE_OVER)
        self._task: asyncio.Task[None] | None = None

    @property
    def rate(self) -> float:
        """Ids per second over the last ten seconds."""
        (began, first), (now, last) = self._seen[0], self._seen[-1]
        return (last - first) / (now - began) if now > began else 0.0

    async def __aenter__(self) -> Self:
        if self._wanted:
            self._task = asyncio.create_task(self._show_live() if self._is_live else self._show_plain())
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _show_live(self) -> None:
        self._note()
        await asyncio.sleep(DELAY)
        with Live(console=self._console, auto_refresh=False, transient=True) as live:
            while True:
                self._note()
                words = " · ".join(filter(None, (self._line(self), self._trouble())))
                live.update(Text(words, style="dim", no_wrap=True, overflow="ellipsis"), refresh=True)
                await asyncio.sleep(REFRESH)

    async def _show_plain(self) -> None:
        shown = ""
        next_at = time.monotonic() + PLAIN_EVERY
        while True:
            self._note()
            await asyncio.sleep(REFRESH)
            trouble = self._trouble()
            if bool(trouble) != bool(shown) or time.monotonic() >= next_at:
                say(" · ".join(filter(None, (self._line(self), trouble))))
                next_at = time.monotonic() + PLAIN_EVERY
            shown = trouble

    def _note(self) -> None:
        self._seen.append((time.monotonic(), self._done()))


@asynccontextmanager
async def counting(ids: Ids, *, wanted: bool) -> AsyncGenerator[None]:
    """Count the ids of a file while the work in the block takes them, if the count is wanted, for a progress line."""
    if not wanted or isinstance(ids, Arguments):
        yield
        return
    task = asyncio.create_task(ids.count_ahead())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def line_of_lookups(progress: Progress, tally: Tally, total: int | None) -> str:
    """Return the line of `get`: `12,400 / 100,000 · 9,800/s · 0:00:09 left · 87 failed`."""
    done, rate = tally.done + tally.already, progress.rate
    words = [f"{done:,}" if total is None else f"{done:,} / {total:,}", f"{rate:,.0f}/s"]
    if total is not None and rate > 0:
        words.append(f"{clock_time((total - done) / rate)} left")
    if tally.failed:
        words.append(f"{tally.failed:,} failed")
    return " · ".join(words)


def clock_time(seconds: float) -> str:
    """Return a duration as `0:00:09`."""
    whole = round(max(0.0, seconds))
    return f"{whole // 3600:,}:{whole // 60 % 60:02}:{whole % 60:02}"


def words_about_rest(ids: Ids, tally: Tally) -> Iterator[str]:
    """Yield how many ids have no result, once it is known how many there are."""
    if (isinstance(ids, Arguments) or ids.exhausted) and ids.total and ids.total > tally.done + tally.already:
        yield f"{ids.total - tally.done - tally.already:,} not looked up"


def words_about_run(ids: Ids, tally: Tally, kaizen: KaizenClient, output: Output) -> Iterator[str]:
    """Yield what every command says at its end: of its input, of its work and of its output."""
    yield from _words_about_input(ids)
    yield from _words_about_work(tally, kaizen)
    yield from _words_about_output(output)


def _words_about_input(ids: Ids) -> Iterator[str]:
    if isinstance(ids, Source) and not ids.exhausted:
        yield f"not all of {ids.name} was read"
    counts = ids.counts
    names = {"comment": counts.comments, "blank line": counts.blank}
    skipped = [counted(count, name) for name, count in names.items() if count]
    if skipped:
        yield f"{' and '.join(skipped)} skipped"
    if counts.invalid:
        yield f"{counted(counts.invalid, 'line')} without a valid id"


def _words_about_work(tally: Tally, kaizen: KaizenClient) -> Iterator[str]:
    requests = kaizen.stats().attempts
    yield f"{tally.seconds:.1f} s" if tally.seconds < 10 else spell(tally.seconds)  # noqa: PLR2004 - two digits
    yield counted(requests, "request")


def _words_about_output(output: Output) -> Iterator[str]:
    yield output.place
    if output.fields.unused:
        yield f"no result has a field {' or '.join(map(printable, output.fields.unused))}"
