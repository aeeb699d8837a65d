"""`kaizen-async watch`: watch executions change."""

import sys
from contextlib import AsyncExitStack

import click
from rich.console import Console

from kaizen_async._cli.board import Board
from kaizen_async._cli.ids import Arguments, Ids, ids_of, require_some
from kaizen_async._cli.json_lines import JsonLines
from kaizen_async._cli.key import require_accepted_key
from kaizen_async._cli.kinds import Execution, as_json, executions_of
from kaizen_async._cli.options import ClientOptions, client_options, deadline_of_wait
from kaizen_async._cli.stopping import FAILED, MISUSE, OUT_OF_TIME, Stop, run
from kaizen_async._cli.wording import described
from kaizen_async.client import KaizenClient
from kaizen_async.outcomes import Change


@click.command()
@click.argument("ids", nargs=-1, metavar="ID... | -")
@client_options
@deadline_of_wait
def watch(ids: tuple[str, ...], client_options: ClientOptions, deadline: float | None) -> None:
    """Watch executions change until all have ended.

    The ids are arguments, or lines of standard input with a dash or when something is piped in.

    On a terminal this is a live table. Elsewhere it is a line of JSON for the first state of each execution and for
    each change that is seen: {"id": ..., "before": record or null, "after": record}, and for an id that cannot be
    watched any further {"id": ..., "error": {"type": ..., "message": ...}}.
    """
    client, given = client_options.client(), ids_of(ids)
    run(lambda stop: _watch(stop, client, client_options.kind, given, deadline))


class ChangeLines:
    """Changes as lines of JSON."""

    def __init__(self) -> None:
        self._lines = JsonLines(sys.stdout.buffer)

    async def show(self, change: Change[Execution]) -> None:
        """Write one change."""
        if change.error is not None:
            await self._lines.write({"id": change.id, "error": described(change.error)})
        else:
            await self._lines.write({"id": change.id, "before": as_json(change.before), "after": as_json(change.after)})


class Watched:
    """How many are watched, have ended, and cannot be watched any further."""

    def __init__(self) -> None:
        self.running: set[str] = set()
        self.ended = 0
        self.failed = 0

    def count(self, change: Change[Execution]) -> None:
        """Count one change."""
        self.running.discard(change.id)
        if change.after is None:
            self.failed += 1
        elif change.after.is_finished:
            self.ended += 1
        else:
            self.running.add(change.id)

    def words(self) -> str:
        """Return the counts in words."""
        return f"{self.ended:,} ended, {self.failed:,} failed, {len(self.running):,} still running"


def _board(ids: Ids) -> Board:
    return Board(Console(), ids if isinstance(ids, Arguments) else ())


async def _watch(stop: Stop, client: KaizenClient, kind: str, ids: Ids, deadline: float | None) -> int:
    watched = Watched()
    async with AsyncExitStack() as stack:
        kaizen = await stack.enter_async_context(client)
        changes = await stack.enter_async_context(executions_of(kaizen, kind).watch(ids, deadline=deadline))
        display = await stack.enter_async_context(_board(ids)) if sys.stdout.isatty() else ChangeLines()
        async for change in stop.each(changes):
            require_accepted_key(change.error)
            watched.count(change)
            await display.show(change)
    return _finish(stop, ids, watched)


def _finish(stop: Stop, ids: Ids, watched: Watched) -> int:
    """Say how it ended, if that is not plain to see; return the exit status."""
    if not stop.reason:
        require_some(ids)
        if ids.total is None and not ids.problem:
            stop.ask(OUT_OF_TIME, FAILED)
    if stop.reason or watched.failed:
        unread = "; not all of standard input was read" * (ids.total is None)
        click.echo(f"{stop.reason}: " * bool(stop.reason) + watched.words() + unread, err=True)
    return stop.status or (MISUSE if ids.problem else FAILED if watched.failed else 0)
