"""`kaizen-async get`: look executions up."""

import click

from kaizen_async._cli.ids import Ids, ids_of, require_some
from kaizen_async._cli.key import require_accepted_key
from kaizen_async._cli.kinds import KINDS, executions_of
from kaizen_async._cli.options import ClientOptions, client_options, seconds
from kaizen_async._cli.progress import ProgressBar
from kaizen_async._cli.results import InOrder, Results, Tally
from kaizen_async._cli.stopping import FAILED, MISUSE, OUT_OF_TIME, Stop, run
from kaizen_async.client import KaizenClient


@click.command()
@click.argument("ids", nargs=-1, metavar="ID... | -")
@client_options
@click.option(
    "--deadline", metavar="SECONDS", callback=seconds, help="Seconds for the whole command.  [default: no limit]"
)
def get(ids: tuple[str, ...], client_options: ClientOptions, deadline: float | None) -> None:
    """Look executions up.

    The ids are arguments, or lines of standard input with a dash or when something is piped in. Standard input is read
    as fast as look-ups are made: an endless pipe is fine.

    On a terminal the results are a table, elsewhere one line of JSON for each id: the record as the API names its
    fields, or {"id": ..., "error": {"type": ..., "message": ...}}. Results for arguments come in the order of these,
    results for lines as soon as they are there.
    """
    client, given = client_options.client(), ids_of(ids)
    kind, quiet = client_options.kind, client_options.verbose
    run(lambda stop: _look_up(stop, client, given, deadline, kind=kind, quiet=quiet))


async def _look_up(
    stop: Stop, client: KaizenClient, ids: Ids, deadline: float | None, *, kind: str = KINDS[0], quiet: bool
) -> int:
    results, in_order, tally = Results(ids), InOrder(ids), Tally()
    async with client as kaizen, executions_of(kaizen, kind).stream(ids, deadline=deadline) as outcomes:
        with ProgressBar(wanted=not (quiet or ids.typed), console=results.console) as bar:
            async for outcome in stop.each(outcomes):
                require_accepted_key(outcome.error)
                tally.count(outcome)
                bar.update(tally.done, ids.total, f"{tally.failed:,} failed" if tally.failed else "")
                for released in in_order.released_by(outcome):
                    await results.show(released)
            for released in in_order.rest():
                await results.show(released)
    return _finish(stop, ids, tally, worth_a_word=bar.shown)


def _finish(stop: Stop, ids: Ids, tally: Tally, *, worth_a_word: bool) -> int:
    """Say what became of the ids, if that is not plain to see; return the exit status."""
    if not stop.reason:
        require_some(ids)
        if ids.total is None and not ids.problem:
            stop.ask(OUT_OF_TIME, FAILED)
    reasons = [reason for reason in (stop.reason, ids.problem) if reason]
    if reasons or tally.failed or worth_a_word:
        click.echo(": ".join([*reasons, _counts(stop, ids, tally)]), err=True)
    return stop.status or (MISUSE if ids.problem else FAILED if tally.failed else 0)


def _counts(stop: Stop, ids: Ids, tally: Tally) -> str:
    parts = [f"{tally.found:,} found", f"{tally.failed:,} failed"]
    if stop.reason and ids.total is None:
        parts.append("not all of standard input was read")
    elif ids.total is not None and ids.total > tally.done:
        parts.append(f"{ids.total - tally.done:,} not looked up")
    return ", ".join(parts)
