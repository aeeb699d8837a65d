"""`kaizen-async run`: lookups and waits by workers on any number of machines."""

import asyncio
import io
import os
import re
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NoReturn

import click
import msgspec

from kaizen_async._cli import ending
from kaizen_async._cli.ending import FAILED, MISUSE, OutputError, Stop, say
from kaizen_async._cli.options import KINDS
from kaizen_async._cli.output import StreamWriter
from kaizen_async._cli.output_formats import safe
from kaizen_async._cli.progress import Progress
from kaizen_async._cli.table import counted, spell
from kaizen_async.errors import printable

if TYPE_CHECKING:
    from kaizen_async.workers import Follower, Run, RunStatus

OWN_BROKER: Final = "kaizen_async.workers.app:broker"
STATUS_SECONDS: Final = 2.0
"""Time for a last look at a run after Ctrl-C: Redis may be away."""
REPORT_SECONDS: Final = 0.5
"""Time between two looks at how far the run is."""
RATE_SECONDS: Final = 5.0
"""Time over which the rate is taken."""
_TASKIQ: Final = """
from signal import SIG_DFL, SIGINT, signal
signal(SIGINT, SIG_DFL)
import multiprocessing, sys
if sys.platform == "linux":
    multiprocessing.set_start_method("fork")
from taskiq.__main__ import main
main()
"""
"""The command `taskiq`, but Ctrl-C ends it without a traceback also while it is imported.

Python 3.14 would start its workers in a way in which taskiq 0.13 does not set their logging up.
"""
_LONGEST: Final = 1000
"""Characters of an error that are shown."""
_CONTROL: Final = re.compile(rb"[\x00-\x1f]")
"""What no line of JSON has within a text. What is in Redis may not be ours."""
_BOM: Final = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Place:
    """Where runs are kept."""

    redis: str
    namespace: str
    broker: str


@click.group()
@click.option(
    "--redis",
    metavar="URL",
    envvar="REDIS_URL",
    show_envvar=True,
    default="redis://localhost",
    show_default=True,
    help="The Redis server. A password in an option shows in lists of processes; better set the variable.",
)
@click.option("--namespace", envvar="KAIZEN_NAMESPACE", show_envvar=True, default="kaizen", show_default=True)
@click.option(
    "--broker",
    metavar="MODULE:NAME",
    default=OWN_BROKER,
    show_default=True,
    help="The taskiq broker on which the workers' task is registered.",
)
@click.pass_context
def run(context: click.Context, redis: str, namespace: str, broker: str) -> None:
    """Have workers on any number of machines look executions up, or wait for them to end.

    Start workers with `kaizen-async run worker`, on as many machines as you like, and a run with `kaizen-async run
    start NAME ids.txt`. The same command again resumes the run. It needs the extra `workers` and a Redis server.
    """
    try:
        import_module("kaizen_async.workers")
    except ModuleNotFoundError as error:
        raise _Refused(f"it needs an extra ({error}): pip install 'kaizen-async[workers]'") from None
    os.environ["REDIS_URL"], os.environ["KAIZEN_NAMESPACE"] = redis, namespace  # for the broker of the package
    context.obj = Place(redis, namespace, broker)


class _Refused(click.ClickException):
    """Raised when a command cannot do what it is asked; the text is one line."""

    exit_code = MISUSE


_name = click.argument("name")


@run.command()
@_name
@click.argument("files", nargs=-1, metavar="[FILE]...", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--wait", is_flag=True, help="Wait for each execution to end.")
@click.option("--kind", type=click.Choice(KINDS), default=KINDS[0], show_default=True, help="What the ids are of.")
@click.option("--size", type=click.IntRange(1, 100_000), default=1000, show_default=True, help="Ids a worker takes.")
@click.option("--detach", is_flag=True, help="Do not print outcomes: end when all ids are sent.")
@click.pass_obj
def start(place: Place, /, name: str, files: tuple[Path, ...], *, detach: bool, **options: Any) -> None:
    """Send ids, from files or standard input, one a line, and print outcomes as they come.

    An outcome is a line of JSON with the number of the id in the input, the id, and the execution or an error. A line
    that cannot be an id gets an outcome that says so. The same command again resumes the run.
    """

    async def work(stop: Stop, run: "Run") -> int:
        lines = _lines(files)
        if detach:
            status = await stop.unless_asked(run.produce(lines, **options))
            if status is None:
                return await _interrupted(stop, run, "the same command again sends the rest")
            say(_described(status))
            return 0
        async with run.process(lines, **options) as outcomes:
            return await _print(stop, run, outcomes)

    _run(place, name, work, needs_broker=True)


@run.command()
@_name
@click.pass_obj
def follow(place: Place, name: str) -> None:
    """Print the outcomes of a run from where its last reader stopped."""

    async def work(stop: Stop, run: "Run") -> int:
        async with run.follow() as outcomes:
            return await _print(stop, run, outcomes)

    _run(place, name, work, needs_broker=True)


@run.command()
@_name
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON.")
@click.pass_obj
def status(place: Place, name: str, *, as_json: bool) -> None:
    """Say where a run is."""

    async def work(stop: Stop, run: "Run") -> int:
        status = await stop.unless_asked(run.status())
        if status is not None:
            click.echo(msgspec.json.encode(status) if as_json else _described(status))
        return stop.status

    _run(place, name, work)


@run.command()
@_name
@click.pass_obj
def retry(place: Place, name: str) -> None:
    """Have those ids looked up again whose outcome is an error; `follow` prints the new outcomes."""

    async def work(stop: Stop, run: "Run") -> int:
        ids = await stop.unless_asked(run.retry_failed())
        if ids is not None:
            say(f"{counted(ids, 'id')} to look up again")
        return stop.status

    _run(place, name, work, needs_broker=True)


@run.command()
@_name
@click.pass_obj
def cancel(place: Place, name: str) -> None:
    """Stop a run. What is recorded can still be read."""

    async def work(stop: Stop, run: "Run") -> int:
        status = await stop.unless_asked(run.cancel())
        if status is not None:
            say(_described(status))
        return stop.status

    _run(place, name, work)


@run.command()
@_name
@click.pass_obj
def purge(place: Place, name: str) -> None:
    """Delete all that Redis has of a run."""

    async def work(stop: Stop, run: "Run") -> int:
        await stop.unless_asked(run.purge())
        return stop.status

    _run(place, name, work)


@run.command()
@click.option("--processes", type=click.IntRange(min=1), default=1, show_default=True, help="Worker processes.")
@click.pass_obj
def worker(place: Place, processes: int) -> None:
    """Start workers on this machine, by taskiq. SIGTERM hands their work over to others.

    KAIZEN_RATE limits the requests per second of all workers together.
    """
    asyncio.run(_require_usable(place))
    arguments = ["--workers", str(processes), "--max-async-tasks", "100"]
    arguments += ["--wait-tasks-timeout", "10", "--shutdown-timeout", "10"]
    # In place of this process: taskiq is to get the signals. A folder in which others may write can be the present one.
    isolation = ["-P"] if place.broker == OWN_BROKER else []
    os.execv(sys.executable, [sys.executable, *isolation, "-c", _TASKIQ, "worker", place.broker, *arguments])  # noqa: S606


async def _require_usable(place: Place) -> None:
    from kaizen_async.workers import RunError, Store  # noqa: PLC0415 - an extra

    try:
        store = Store(place.redis, place.namespace)
        try:
            await store.require_usable()
        finally:
            await store.aclose()
        _imported(place.broker)
    except (RunError, ValueError) as error:
        raise _Refused(printable(str(error), _LONGEST)) from None


def _run(place: Place, name: str, work: Callable[[Stop, "Run"], Any], *, needs_broker: bool = False) -> NoReturn:
    """Do the work of a command with a run, and turn what it raises into one line and an exit status."""
    from kaizen_async.workers import Run, RunError  # noqa: PLC0415 - an extra

    async def opened(stack: AsyncExitStack) -> Run:
        run = Run(name, url=place.redis, namespace=place.namespace, on_trouble=_say)
        await stack.enter_async_context(run)
        if needs_broker:
            run.broker = await stack.enter_async_context(_started(place.broker))
        return run

    async def with_run(stop: Stop) -> int:
        try:
            async with AsyncExitStack() as stack:
                run = await stop.unless_asked(opened(stack))
                status: int = stop.status if run is None else await work(stop, run)
                return status
        except (RunError, ValueError) as error:
            raise _Refused(printable(str(error), _LONGEST)) from None

    ending.run(with_run)


class _started:  # noqa: N801 - used as a function
    """Import a broker and have it started for a while."""

    def __init__(self, path: str) -> None:
        self._path = path

    async def __aenter__(self) -> Any:
        self._broker = _imported(self._path)
        await self._broker.startup()
        return self._broker

    async def __aexit__(self, *_: object) -> None:
        await self._broker.shutdown()


def _imported(path: str) -> Any:
    """Return the broker at a path, on which the workers' task is registered."""
    from kaizen_async.workers.worker import TASK_NAME  # noqa: PLC0415 - an extra

    module, _, attribute = path.partition(":")
    if path != OWN_BROKER:
        sys.path.insert(0, str(Path.cwd()))
    try:
        broker: Any = getattr(import_module(module), attribute)
        is_known = broker.find_task(TASK_NAME) is not None
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"there is no usable taskiq broker {path}: {error}") from None
    if not is_known:
        raise ValueError(f"the broker {path} does not know the task; call kaizen_async.workers.register(broker)")
    return broker


def _lines(files: tuple[Path, ...]) -> Iterator[bytes]:
    """Yield the lines of files, or of standard input; blank ones are left out."""
    for path in files or (None,):
        with _standard_input() if path is None else path.open("rb") as stream:
            for number, line in enumerate(stream):
                execution_id = (line.removeprefix(_BOM) if not number else line).strip()
                if execution_id:
                    yield execution_id


def _standard_input() -> BinaryIO:
    """Return standard input, with a lock of its own.

    A thread waits for its lines. If that held the lock of `sys.stdin`, the interpreter would crash at its end.
    """
    try:
        return open(sys.stdin.fileno(), "rb", closefd=False)
    except io.UnsupportedOperation:  # a stand-in in memory
        return sys.stdin.buffer


async def _lines_of(follower: "Follower") -> AsyncIterator[bytes]:
    while (line := await follower.next_line()) is not None:
        yield line


async def _print(stop: Stop, run: "Run", follower: "Follower") -> int:
    output = StreamWriter(sys.stdout.buffer, "standard output", array=False)
    report = _Report()
    reporting = asyncio.create_task(report.follow(run))
    try:
        async with Progress(lambda _: report.line):
            async for line in stop.each(_lines_of(follower)):
                await output.write(safe(_CONTROL.sub(b" ", line)) + b"\n")
    except OutputError as error:
        stop.ask(str(error), FAILED)
    finally:
        reporting.cancel()
        await asyncio.gather(reporting, return_exceptions=True)
    status = None if stop.reason else await stop.unless_asked(run.status())
    if status is None:
        return await _interrupted(stop, run, "workers continue; the same command again resumes")
    say(_described(status))
    return FAILED if status.failed else 0


async def _interrupted(stop: Stop, run: "Run", advice: str) -> int:
    """Say why the command ends early and where the run is, if Redis tells in time; return the exit status."""
    from kaizen_async.workers import RunError  # noqa: PLC0415 - an extra

    where = "Redis does not tell where the run is"
    with suppress(TimeoutError, RunError):
        async with asyncio.timeout(STATUS_SECONDS):
            where = _described(await run.status())
    say(f"{stop.reason}: {where}")
    say(advice)
    return stop.status


class _Report:
    """How far the run is, and how fast it goes.

    Attributes:
        line: The latest report; empty before the first one.
    """

    def __init__(self) -> None:
        self.line = ""

    async def follow(self, run: "Run") -> None:
        """Renew the report again and again."""
        before: RunStatus | None = None
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            status = await run.status()
            if before is not None:
                seconds = max(status.age - before.age, 1e-3)
                status = msgspec.structs.replace(status, rate=max(0.0, (status.done - before.done) / seconds))
            self.line = _described(status)
            if before is None or status.age - before.age > RATE_SECONDS:
                before = status


def _described(status: "RunStatus") -> str:
    total = f"{status.total:,}" if status.total is not None else f"{status.ids:,} or more"
    parts = [f"{status.done:,} of {total} done", f"{status.failed:,} failed"]
    if status.invalid:
        parts.append(f"{status.invalid:,} of these not ids")
    if status.set_aside:
        parts.append(f"{counted(status.set_aside, 'shard')} set aside")
    if status.state == "running":
        parts.append(_pace(status))
    return f"{status.name} {status.state}: {', '.join(parts)}"


def _pace(status: "RunStatus") -> str:
    parts = [f"{status.rate:,.0f}/s", counted(status.workers, "worker")]
    if status.seconds_left is not None:
        parts.append(f"{spell(status.seconds_left)} left")
    return ", ".join(parts)


def _say(trouble: str) -> None:
    click.echo(trouble or "back again", err=True)
