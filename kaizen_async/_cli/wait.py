"""`kaizen-async wait`: wait for executions to end."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from kaizen_async._cli.checkpoints import CheckpointFile, Saved, Taken, skip_taken
from kaizen_async._cli.ids import Arguments, Ids, Lines, ids_of, require_some
from kaizen_async._cli.key import require_accepted_key
from kaizen_async._cli.kinds import Execution, executions_of
from kaizen_async._cli.options import ClientOptions, client_options, deadline_of_wait
from kaizen_async._cli.progress import ProgressBar
from kaizen_async._cli.results import Results, Tally
from kaizen_async._cli.saving import Saving
from kaizen_async._cli.statuses import Statuses
from kaizen_async._cli.stopping import FAILED, MISUSE, OUT_OF_TIME, Stop, run
from kaizen_async._cli.wording import by_status
from kaizen_async._waiting.streams import WaitStream
from kaizen_async.client import KaizenClient
from kaizen_async.executions import Executions
from kaizen_async.models import ExecutionStatus


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a wait is to do."""

    client: KaizenClient
    kind: str
    base_url: str
    ids: Ids
    deadline: float | None
    file: CheckpointFile | None
    saved: Saved | None
    quiet: bool


@click.command()
@click.argument("ids", nargs=-1, metavar="ID... | -")
@client_options
@deadline_of_wait
@click.option(
    "--checkpoint",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A file to go on from, if it is there, and to save to what has not ended.",
)
def wait(ids: tuple[str, ...], client_options: ClientOptions, deadline: float | None, checkpoint: Path | None) -> None:
    """Wait for executions to end.

    The ids are arguments, or lines of standard input with a dash or when something is piped in.

    Each end is shown as it happens: as a row of a table on a terminal, elsewhere as a line of JSON: the record as the
    API names its fields, or {"id": ..., "error": {"type": ..., "message": ...}}. Exit status 1 says that
    some executions ended as failed, or that some ids have no end to show.

    With a checkpoint, what has not ended is saved every few seconds, on Ctrl-C and when time runs out. Run the same
    command again to go on: all runs together print one end for each id (after a crash, those of the last seconds
    again). Ids that were not read from standard input yet are not in the file: pipe the same input in again, and what
    is in the file is skipped. Without any ids the command goes on with just those in the file. It is removed when all
    have ended.
    """
    base_url = client_options.subject
    file = None if checkpoint is None else CheckpointFile(checkpoint, base_url)
    saved = None if file is None else file.load()
    plan = Plan(
        client=client_options.client(),
        kind=client_options.kind,
        base_url=base_url,
        ids=ids_of(ids, optional=saved is not None),
        deadline=deadline,
        file=file,
        saved=saved,
        quiet=client_options.verbose,
    )
    run(lambda stop: Wait(stop, plan).work())


class Wait:
    """One run of the command."""

    def __init__(self, stop: Stop, plan: Plan) -> None:
        self._stop = stop
        self._plan = plan
        self._results = Results(plan.ids)
        self._bar = ProgressBar(wanted=not (plan.quiet or plan.ids.typed), console=self._results.console)
        self._tally = Tally()
        self._taken = Taken()
        self._taken_before = 0
        self._skipped = 0
        self._resumed = [] if plan.saved is None else plan.saved.ids()
        self._unprinted: list[str] = []

    async def work(self) -> int:
        """Print the ends, and return the exit status."""
        plan, stop = self._plan, self._stop
        deadline = plan.deadline
        if plan.file is not None and deadline is not None:
            # What runs out of time is to be saved, which it is not once the library has told its end.
            asyncio.get_running_loop().call_later(deadline, stop.ask, OUT_OF_TIME, FAILED)
            deadline = None
        if plan.saved is not None:
            self._taken = await skip_taken(plan.ids, plan.saved, stop)
            self._taken_before = plan.saved.taken.count
            self._skipped = self._taken_before if isinstance(plan.ids, Lines) else 0
        async with plan.client as kaizen:
            await self._print_ends(executions_of(kaizen, plan.kind), deadline)
        return self._finish()

    async def _print_ends(self, executions: Executions[Execution], deadline: float | None) -> None:
        plan, stop = self._plan, self._stop
        watched = [*self._resumed, *(plan.ids if isinstance(plan.ids, Arguments) else ())]
        self._statuses = Statuses(executions, watched, self._show_progress, wanted=self._bar.enabled)
        async with self._ends(executions, deadline) as ends:
            ends.add(*([] if plan.saved is None else plan.saved.unprinted))
            async with Saving(plan.file, lambda: self._snapshot(ends)) as saving, self._statuses:
                with self._bar:
                    async for outcome in stop.each(ends):
                        self._unprinted = [outcome.id]
                        require_accepted_key(outcome.error)
                        await self._results.show(outcome)
                        self._unprinted = []
                        self._tally.count(outcome)
                        self._show_progress()
                saving.complete = not stop.reason and not plan.ids.problem

    def _ends(self, executions: Executions[Execution], deadline: float | None) -> WaitStream[Execution]:
        saved, file = self._plan.saved, self._plan.file
        if saved is None or file is None:
            return executions.wait_many(self._source(), deadline=deadline)
        try:
            return executions.wait_many(self._source(), deadline=deadline, checkpoint=saved.waiting)
        except ValueError as error:
            raise file.unusable(error) from None

    def _source(self) -> list[str] | AsyncIterator[str]:
        """Return the ids as the library takes them in; what it takes is noted."""
        ids = self._plan.ids
        if isinstance(ids, Lines):
            return self._take(ids)
        for execution_id in ids:
            self._taken.add(execution_id)
        return ids

    async def _take(self, lines: Lines) -> AsyncIterator[str]:
        async for execution_id in lines:
            self._taken.add(execution_id)
            self._statuses.add(execution_id)
            yield execution_id

    def _snapshot(self, ends: WaitStream[Execution]) -> Saved:
        self._results.sync()
        return Saved(
            base_url=self._plan.base_url,
            taken=self._taken,
            unprinted=self._unprinted,
            waiting=ends.checkpoint(),
        )

    def _show_progress(self) -> None:
        counts = self._tally.statuses + self._statuses.counts
        self._bar.update(self._tally.done, self._total, by_status(counts, self._tally.failed))

    @property
    def _total(self) -> int | None:
        """How many ends there will be, once that is known."""
        total = self._plan.ids.total
        if total is None:
            return None
        return len(self._resumed) + max(0, total - self._skipped)

    @property
    def _pending(self) -> int:
        """How many were taken in and have no end yet."""
        return len(self._resumed) + self._taken.count - self._taken_before - self._tally.done

    def _finish(self) -> int:
        """Say how it went, if that is not plain to see; return the exit status."""
        plan, stop, tally = self._plan, self._stop, self._tally
        if not stop.reason and plan.saved is None:
            require_some(plan.ids)
        if not stop.reason and not plan.ids.problem and plan.ids.total is None:
            stop.ask(OUT_OF_TIME, FAILED)
        if stop.reason or tally.failed or plan.file is not None or self._bar.shown:
            click.echo("; ".join(self._words()), err=True)
        some_failed = tally.failed or tally.statuses[ExecutionStatus.FAILED]
        return stop.status or (MISUSE if plan.ids.problem else FAILED if some_failed else 0)

    def _words(self) -> Iterator[str]:
        plan, stop, tally = self._plan, self._stop, self._tally
        ended = f"{tally.found:,} ended"
        statuses = by_status(tally.statuses, tally.failed)
        yield f"{stop.reason}: " * bool(stop.reason) + ended + f" ({statuses})" * bool(statuses)
        if self._pending:
            yield f"{self._pending:,} still waited for"
        if stop.reason and plan.ids.total is None:
            yield "not all of standard input was read"
        if plan.file is not None and (stop.reason or plan.ids.problem):
            yield f"run the same command again to go on from {plan.file.path}"
        elif plan.file is not None:
            yield f"nothing is left to do, so {plan.file.path} is removed"
