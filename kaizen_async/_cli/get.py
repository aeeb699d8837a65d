"""`kaizen-async get`: look executions up."""

from collections.abc import AsyncIterator, Iterator

import click

from kaizen_async._cli.ending import FAILED, OutputError, Stop, run
from kaizen_async._cli.ids import Ids, ids_of
from kaizen_async._cli.options import CommonOptions, common_options, executions_of, resume_option, seconds
from kaizen_async._cli.output import InOrder, Output
from kaizen_async._cli.plan import Plan
from kaizen_async._cli.progress import (
    Progress,
    Tally,
    Trouble,
    counting,
    line_of_lookups,
    words_about_rest,
    words_about_run,
)
from kaizen_async._cli.results import ResultFile, ids_to_do, require_resumable


@click.command()
@click.argument("ids", nargs=-1, metavar="ID... | -")
@common_options
@resume_option
@click.option(
    "--deadline", metavar="SECONDS", callback=seconds, help="Seconds for the whole command.  [default: no limit]"
)
def get(ids: tuple[str, ...], options: CommonOptions, deadline: float | None) -> None:
    """Look executions up.

    The ids are arguments, or come from a file with --input, or from standard input with a dash or when something is
    piped in. Standard input is read as fast as lookups are made: an endless pipe is fine.

    On a terminal the results are a table, elsewhere one JSON object per line: the record as the server sent it, or
    {"id": ..., "error": {"type": ..., "message": ..., ...}}. Results for arguments come in the order of the arguments,
    other results as soon as they are there.

    With --output FILE --resume, ids that have a record in FILE are skipped, and failed ones are looked up again; so the
    same command can be repeated until FILE has a line for each id. Without any ids it repeats the failed ones.
    """
    if options.output.resume:
        require_resumable(options.output)
    given = ids_of(ids, options.input, optional=options.output.resume)
    output, trouble = Output(options.output, given, keep=options.output.resume), Trouble()
    client = options.client.create(trouble)
    plan = Plan(client=client, ids=given, output=output, options=options, trouble=trouble, deadline=deadline)
    run(lambda stop: Get(stop, plan).work())


class Get:
    """One run of the command."""

    def __init__(self, stop: Stop, plan: Plan) -> None:
        self._stop = stop
        self._plan = plan
        self._tally = Tally()
        output = plan.output
        self._results = ResultFile(output, output.file) if output.options.resume and output.file else None

    async def work(self) -> int:
        """Look the ids up, write the results, and return the exit status."""
        try:
            if self._results is not None:
                await self._stop.unless_asked(self._results.load())
            if self._stop.reason:
                return self._finish()
            if not await self._stop.unless_asked(self._plan.output.open()):
                return self._finish()
            await self._look_up()
            self._plan.output.close()
            if self._results is not None:
                await self._results.settle()
        except OutputError as error:
            self._stop.ask(str(error), FAILED)
        return self._finish()

    async def _look_up(self) -> None:
        in_order = InOrder(self._plan.ids if self._results is None else None)
        shown = self._plan.options.shows_progress and not self._plan.ids.typed
        progress = Progress(
            lambda progress: line_of_lookups(progress, self._tally, self._total),
            wanted=shown,
            console=self._plan.output.console,
            done=lambda: self._tally.done,
            trouble=self._plan.trouble.words,
        )
        async with self._plan.client as kaizen:
            executions = executions_of(kaizen, self._plan.options.kind)
            stream = executions.stream(self._ids_to_do(), deadline=self._plan.deadline)
            async with stream as outcomes, progress, counting(self._plan.ids, wanted=shown):
                async for outcome in self._stop.each(outcomes):
                    if self._stop.if_key_is_refused(outcome.error):
                        continue  # that ends the loop
                    self._tally.count(outcome)
                    for released in in_order.released_by(outcome):
                        await self._plan.output.show(released, failed=not released.ok)
                for released in in_order.rest():
                    await self._plan.output.show(released, failed=not released.ok)

    def _ids_to_do(self) -> Ids | AsyncIterator[str]:
        return self._plan.ids if self._results is None else ids_to_do(self._plan.ids, self._results, self._tally.skip)

    @property
    def _total(self) -> int | None:
        """How many ids there are; those that are taken from the file of results are not counted before."""
        total = self._plan.ids.total
        return total if total or self._results is None else None

    def _finish(self) -> int:
        return self._plan.finish(
            self._stop, self._words(), failed=self._tally.failed > 0, optional=self._results is not None
        )

    def _words(self) -> Iterator[str]:
        yield ", ".join(self._tally.words("found"))
        yield from words_about_rest(self._plan.ids, self._tally)
        yield from words_about_run(self._plan.ids, self._tally, self._plan.client, self._plan.output)
        if self._results is not None and (self._stop.reason or self._tally.failed):
            yield "run the same command again to continue"
