"""`kaizen-async watch`: watch executions change."""

from collections.abc import Iterator
from contextlib import AsyncExitStack

import click

from kaizen_async._cli.board import Board
from kaizen_async._cli.ending import FAILED, OutputError, Stop, run
from kaizen_async._cli.ids import Arguments, ids_of
from kaizen_async._cli.options import CommonOptions, common_options, deadline_of_wait, executions_of
from kaizen_async._cli.output import Output
from kaizen_async._cli.output_formats import CHANGE_COLUMNS, TABLE
from kaizen_async._cli.plan import Plan
from kaizen_async._cli.progress import (
    Progress,
    Tally,
    Trouble,
    by_status,
    is_ended_badly,
    words_about_run,
)
from kaizen_async._cli.table import Execution
from kaizen_async.outcomes import Change


@click.command()
@click.argument("ids", nargs=-1, metavar="ID... | -")
@common_options
@deadline_of_wait
def watch(ids: tuple[str, ...], options: CommonOptions, deadline: float | None) -> None:
    """Watch executions change until all have ended.

    The ids are arguments, or come from a file with --input, or from standard input with a dash or when something is
    piped in.

    On a terminal this is a live table. Elsewhere it is one JSON object per line for the first state of each execution
    and for each change that is seen: {"id": ..., "before": record or null, "after": record}, and for an id that cannot
    be watched any further {"id": ..., "error": {"type": ..., "message": ..., ...}}.
    """
    trouble = Trouble()
    given = ids_of(ids, options.input)
    output = Output(options.output, given, CHANGE_COLUMNS)
    if output.format == TABLE and output.console is None:
        raise click.UsageError("the live table of watch needs a terminal; write ndjson, json or csv to a file")
    client = options.client.create(trouble)
    plan = Plan(client=client, ids=given, output=output, options=options, trouble=trouble, deadline=deadline)
    run(lambda stop: Watch(stop, plan).work())


class Watch:
    """One run of the command."""

    def __init__(self, stop: Stop, plan: Plan) -> None:
        self._stop = stop
        self._plan = plan
        self._tally = Tally()

    async def work(self) -> int:
        """Show the changes, and return the exit status."""
        try:
            if not await self._stop.unless_asked(self._plan.output.open()):
                return self._finish()
            async with AsyncExitStack() as stack:
                kaizen = await stack.enter_async_context(self._plan.client)
                executions = executions_of(kaizen, self._plan.options.kind)
                changes = await stack.enter_async_context(
                    executions.watch(self._plan.ids, deadline=self._plan.deadline)
                )
                board = await self._board(stack)
                async for change in self._stop.each(changes):
                    if self._stop.if_key_is_refused(change.error):
                        continue  # that ends the loop
                    self._tally.count_change(change)
                    await self._show(change, board)
            self._plan.output.close()
        except OutputError as error:
            self._stop.ask(str(error), FAILED)
        return self._finish()

    async def _board(self, stack: AsyncExitStack) -> Board | None:
        """Return the live table, if there is one; else lines about the work go to standard error."""
        console, board = self._plan.output.console, None
        if console is not None:
            ids = self._plan.ids if isinstance(self._plan.ids, Arguments) else ()
            only_failed = self._plan.options.output.only_failed
            board = Board(console, ids, self._plan.trouble.words, only_failed=only_failed)
            await stack.enter_async_context(board)
        if board is None or not board.is_live:
            wanted = self._plan.options.shows_progress and not self._plan.ids.typed
            await stack.enter_async_context(Progress(self._line, wanted=wanted, trouble=self._plan.trouble.words))
        return board

    async def _show(self, change: Change[Execution], board: Board | None) -> None:
        if board is not None:
            board.show(change)
        else:
            failed = change.error is not None or is_ended_badly(change.after)
            await self._plan.output.show_change(change, failed=failed)

    def _line(self, _: Progress) -> str:
        words = [f"{self._tally.found:,} ended", by_status(self._tally.statuses)]
        words += [f"{len(self._tally.running):,} running", f"{self._tally.failed:,} failed"]
        return " · ".join(filter(None, words))

    def _finish(self) -> int:
        return self._plan.finish(self._stop, self._words(), failed=self._tally.has_failures)

    def _words(self) -> Iterator[str]:
        yield ", ".join(self._tally.words("ended"))
        if self._tally.running:
            yield f"{len(self._tally.running):,} still running"
        yield from words_about_run(self._plan.ids, self._tally, self._plan.client, self._plan.output)
