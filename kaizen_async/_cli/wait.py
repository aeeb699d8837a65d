"""`kaizen-async wait`: wait for executions to end."""

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Self

import click

from kaizen_async._cli.checkpoints import CheckpointFile, Saved, Saving, Taken, skip_taken
from kaizen_async._cli.ending import FAILED, OUT_OF_TIME, OutputError, Stop, run
from kaizen_async._cli.ids import Source, ids_of
from kaizen_async._cli.options import CommonOptions, common_options, deadline_of_wait, executions_of
from kaizen_async._cli.output import Output
from kaizen_async._cli.plan import Plan
from kaizen_async._cli.progress import (
    Progress,
    Tally,
    Trouble,
    by_status,
    counting,
    is_ended_badly,
    words_about_run,
)
from kaizen_async._cli.results import ResultFile
from kaizen_async._cli.table import Execution
from kaizen_async._records.facts import has_ended, status_of
from kaizen_async._waiting.streams import WaitStream
from kaizen_async.executions import Executions
from kaizen_async.outcomes import Change


@dataclass(frozen=True, kw_only=True)
class WaitPlan(Plan):
    """What a wait works with: also the checkpoint, and what it held."""

    file: CheckpointFile | None
    saved: Saved | None


@click.command()
@click.argument("ids", nargs=-1, metavar="ID... | -")
@common_options
@deadline_of_wait
@click.option(
    "--checkpoint",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Save what has not ended to FILE, and continue from it if it is there.",
)
def wait(ids: tuple[str, ...], options: CommonOptions, deadline: float | None, checkpoint: Path | None) -> None:
    """Wait for executions to end.

    The ids are arguments, or come from a file with --input, or from standard input with a dash or when something is
    piped in.

    Each end is written as it happens: as a row of a table on a terminal, elsewhere as one JSON object per line: the
    record as the server sent it, or {"id": ..., "error": {"type": ..., "message": ..., ...}}. The exit status is 1 if
    some executions ended as failed, or if some ids have no end.

    With a checkpoint, what has not ended is saved every few seconds, on Ctrl-C and when time runs out. Run the same
    command again to continue: all runs together write one line for each id. With --output, FILE keeps the results of
    earlier runs, and this holds after a crash, too; without it, a crash repeats the lines of the last seconds. Ids that
    were not read from standard input yet are not in the checkpoint: pipe the same input in again, and what is in the
    checkpoint is skipped. Without any ids the command continues with those in the checkpoint. It is removed when all
    have ended.
    """
    trouble = Trouble()
    client = options.client.create(trouble)
    file = None if checkpoint is None else CheckpointFile(checkpoint, options.subject)
    saved = None if file is None else file.load()
    given = ids_of(ids, options.input, optional=saved is not None)
    places = [os.path.realpath(path) for path in (checkpoint, options.output.file) if path is not None]
    if len(places) > len(set(places)):
        raise click.UsageError("--checkpoint and --output name the same file; give them two")
    plan = WaitPlan(
        client=client,
        ids=given,
        output=Output(options.output, given, keep=saved is not None),
        options=options,
        deadline=deadline,
        file=file,
        saved=saved,
        trouble=trouble,
    )
    run(lambda stop: Wait(stop, plan).work())


class Wait:
    """One run of the command."""

    def __init__(self, stop: Stop, plan: WaitPlan) -> None:
        self._stop = stop
        self._plan = plan
        self._tally = Tally()
        self._saved = plan.saved
        self._written: Counter[str] = Counter()  # results in the output file that are newer than the checkpoint
        self._to_do: list[str] = []  # the arguments that have no result yet
        self._taken = Taken()
        self._taken_before = 0
        self._skipped = 0
        self._resumed = 0 if plan.saved is None else plan.saved.total  # ids that an earlier run left
        self._unprinted: list[str] = []

    async def work(self) -> int:
        """Write the ends, and return the exit status."""
        plan, stop = self._plan, self._stop
        deadline = plan.deadline
        if plan.file is not None and deadline is not None:
            # What runs out of time is to be saved, which is not possible once the library has reported its end.
            asyncio.get_running_loop().call_later(deadline, stop.ask, OUT_OF_TIME, FAILED)
            deadline = None
        if self._saved is not None:
            self._taken = await skip_taken(plan.ids, self._saved, stop)
            self._taken_before = self._saved.taken.count
            self._skipped = self._taken_before if isinstance(plan.ids, Source) else 0
            self._saved = self._without_written(self._saved)
        try:
            if not await stop.unless_asked(plan.output.open()):
                return self._finish()
            async with plan.client as kaizen:
                await self._write_ends(executions_of(kaizen, plan.options.kind), deadline)
            plan.output.close()
        except OutputError as error:
            stop.ask(str(error), FAILED)
        return self._finish()

    def _without_written(self, saved: Saved) -> Saved:
        """Return what was saved without the ids whose result is in the output file already."""
        output = self._plan.output
        self._written = Counter(saved.ahead)
        if saved.written is not None and output.file is not None and output.shows_ids:
            self._written += ResultFile(output, output.file).ids_since(saved.written)
        newer = self._written.total()
        waiting = saved.without(self._written)
        self._tally.already = newer - self._written.total()
        return waiting

    async def _write_ends(self, executions: Executions[Execution], deadline: float | None) -> None:
        plan, stop = self._plan, self._stop
        shown = plan.options.shows_progress and not plan.ids.typed
        source = self._source()
        resumed = self._saved.ids() if shown and self._saved is not None else ()
        self._statuses = Statuses(executions, chain(resumed, self._to_do), wanted=shown)
        progress = Progress(self._line, wanted=shown, console=plan.output.console, trouble=plan.trouble.words)
        async with self._ends(executions, source, deadline) as ends:
            ends.add(*([] if self._saved is None else self._saved.unprinted))
            async with (
                Saving(plan.file, lambda: self._snapshot(ends)) as saving,
                self._statuses,
                counting(plan.ids, wanted=shown),
                progress,
            ):
                async for outcome in stop.each(ends):
                    self._unprinted = [outcome.id]
                    if stop.if_key_is_refused(outcome.error):
                        continue  # that ends the loop
                    failed = not outcome.ok or is_ended_badly(outcome.execution)
                    await plan.output.show(outcome, failed=failed)
                    self._unprinted = []
                    self._tally.count(outcome)
                saving.complete = not stop.reason and plan.ids.exhausted

    def _ends(
        self, executions: Executions[Execution], source: list[str] | AsyncIterator[str], deadline: float | None
    ) -> WaitStream[Execution]:
        checkpoint = None if self._saved is None else self._saved.waiting
        return executions.wait_many(source, deadline=deadline, checkpoint=checkpoint)

    def _source(self) -> list[str] | AsyncIterator[str]:
        """Return the ids as the library takes them; what it takes is noted."""
        ids = self._plan.ids
        if isinstance(ids, Source):
            return self._take(ids)
        self._to_do += filter(self._is_to_do, ids)
        return self._to_do

    async def _take(self, source: Source) -> AsyncIterator[str]:
        async for execution_id in source:
            if self._is_to_do(execution_id):
                self._statuses.add(execution_id)
                yield execution_id

    def _is_to_do(self, execution_id: str) -> bool:
        """Note that an id was taken; return whether it has no result in the output file yet."""
        self._taken.add(execution_id)
        if not self._written[execution_id]:
            return True
        self._written[execution_id] -= 1
        self._tally.skip()
        return False

    def _snapshot(self, ends: WaitStream[Execution]) -> Saved:
        self._plan.output.sync()
        return Saved(
            base_url=self._plan.options.subject,
            taken=self._taken,
            unprinted=self._unprinted,
            waiting=ends.left(),
            written=self._plan.output.written,
            ahead=[*self._written.elements()],
        )

    def _line(self, _: Progress) -> str:
        total, done = self._total, self._tally.done + self._tally.already
        counts = by_status(self._tally.statuses + self._statuses.counts)
        words = (f"{done:,}" if total is None else f"{done:,} / {total:,}", counts)
        failed = f"{self._tally.failed:,} failed" * bool(self._tally.failed)
        return " · ".join(filter(None, (*words, failed)))

    @property
    def _total(self) -> int | None:
        """How many ends there will be, once that is known."""
        total = self._plan.ids.total
        if total is None:
            return None
        return self._resumed + max(0, total - self._skipped)

    @property
    def _pending(self) -> int:
        """How many were taken and have no end yet."""
        taken = self._resumed + self._taken.count - self._taken_before
        return taken - self._tally.done - self._tally.already

    def _finish(self) -> int:
        has_saved = self._plan.saved is not None
        return self._plan.finish(self._stop, self._words(), failed=self._tally.has_failures, optional=has_saved)

    def _words(self) -> Iterator[str]:
        plan, stop, tally = self._plan, self._stop, self._tally
        yield ", ".join(tally.words("ended"))
        if self._pending:
            yield f"{self._pending:,} still waited for"
        yield from words_about_run(plan.ids, tally, plan.client, plan.output)
        if plan.file is not None and stop.reason:
            yield f"run the same command again to continue from {plan.file.shown}"
        elif plan.file is not None:
            yield f"nothing is left to do, so {plan.file.shown} is removed"


class Statuses:
    """Counts executions that have not ended by their latest status: a watch beside the wait, which shares its polls.

    Args:
        executions: What the wait uses, so that the scheduler sees that one poll serves both.
        ids: Those waited for from the beginning.
        wanted: Whether the counts are shown.
    """

    def __init__(self, executions: Executions[Execution], ids: Iterable[str], *, wanted: bool) -> None:
        self.counts: Counter[str] = Counter()
        self._executions = executions
        self._wanted = wanted
        self._task: asyncio.Task[None] | None = None
        self._latest: dict[str, str] = {}
        self._ids: asyncio.Queue[str] = asyncio.Queue()
        for execution_id in ids:
            self.add(execution_id)

    def add(self, execution_id: str) -> None:
        """Watch an id too, as soon as the wait for it has begun."""
        if self._wanted:
            self._ids.put_nowait(execution_id)

    async def __aenter__(self) -> Self:
        if self._wanted:
            self._task = asyncio.create_task(self._follow())
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _follow(self) -> None:
        async with self._executions.watch(self._endless_ids(), deadline=None) as changes:
            async for change in changes:
                self._note(change)

    async def _endless_ids(self) -> AsyncIterator[str]:
        while True:
            yield await self._ids.get()

    def _note(self, change: Change[Execution]) -> None:
        before = self._latest.pop(change.id, None)
        if before is not None:
            self.counts[before] -= 1
        if change.after is not None and not has_ended(change.after):
            status = self._latest[change.id] = status_of(change.after)
            self.counts[status] += 1
