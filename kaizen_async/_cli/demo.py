"""`kaizen-async demo`: thousands of lookups against an emulator that misbehaves, and none is lost."""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from textwrap import indent
from typing import Final

import click
from rich.console import Console
from rich.syntax import Syntax
from rich.text import Text

from kaizen_async._cli.emulator import misbehave
from kaizen_async._cli.ending import FAILED, Stop, run
from kaizen_async._cli.options import Number
from kaizen_async._cli.progress import Progress
from kaizen_async._cli.table import STYLES, console_on
from kaizen_async.client import KaizenClient
from kaizen_async.models import InstructorExecution
from kaizen_async.outcomes import Outcome
from kaizen_async.testing.chance import fraction
from kaizen_async.testing.emulator import KaizenEmulator
from kaizen_async.testing.lives import Life

SNIPPET: Final = """\
import asyncio
from kaizen_async import KaizenClient

async def main(ids):
    async with KaizenClient() as kaizen:
        executions = kaizen.instructor_executions
        async with executions.stream(ids) as outcomes:
            async for outcome in outcomes:
                print(outcome.id, outcome.execution or outcome.error)

asyncio.run(main(["exec_1", "exec_2", "exec_3"]))"""
"""How to do the same from Python."""

_LIVES: Final = (
    (0.70, Life.ended(status="Completed")),
    (0.80, Life.ended(status="Failed")),
    (0.92, Life.running(status="InProgress")),
    (0.97, Life.running(status="Enqueued")),
    (1.00, Life.running(status="Paused")),
)
"""Lives, with the share of executions that have this life or one before it."""


@dataclass(kw_only=True)
class Account:
    """What became of the lookups.

    Attributes:
        wanted: How many there were to be.
        outcomes: How many outcomes each id has; one, if all is well.
        seconds: How long it took.
        attempts: Requests sent.
        retries: Requests that followed a failed one.
        met: How many requests met which fault.
        interrupted: Whether the user stopped the demo before all were looked up.
    """

    wanted: int
    outcomes: Counter[str] = field(default_factory=Counter[str])
    statuses: Counter[str] = field(default_factory=Counter[str])
    errors: Counter[str] = field(default_factory=Counter[str])
    slowest: Outcome[InstructorExecution] | None = None
    seconds: float = 0.0
    attempts: int = 0
    retries: int = 0
    met: Counter[str] = field(default_factory=Counter[str])
    interrupted: bool = False

    def add(self, outcome: Outcome[InstructorExecution]) -> None:
        """Count an outcome."""
        self.outcomes[outcome.id] += 1
        if outcome.execution is None:
            self.errors[type(outcome.error).__name__] += 1
        else:
            self.statuses[outcome.execution.status] += 1
        if self.slowest is None or outcome.elapsed > self.slowest.elapsed:
            self.slowest = outcome

    @property
    def done(self) -> int:
        """How many outcomes there were."""
        return self.statuses.total() + self.errors.total()

    @property
    def accounted(self) -> int:
        """How many ids have one outcome, not none and not two."""
        return sum(count == 1 for count in self.outcomes.values())


@click.command()
@click.option("--executions", type=click.IntRange(min=1), default=2000, show_default=True, help="How many to look up.")
@click.option(
    "--faults",
    type=Number(0, 1),
    default=0.05,
    show_default=True,
    metavar="SHARE",
    help="Share of the requests that meet a fault: 503, reset, 502 as HTML, truncated body, latency.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="What executions and faults are drawn from.")
def demo(executions: int, faults: float, seed: int) -> None:
    """Look thousands of executions up on a faulty emulator.

    Each of them is accounted for. Nothing leaves this machine. The same seed gives the same executions and faults.
    """
    run(lambda stop: _demonstrate(stop, executions, faults, seed))


async def _demonstrate(stop: Stop, executions: int, faults: float, seed: int) -> int:
    account = Account(wanted=executions)
    async with KaizenEmulator(seed=seed, default_life=lambda execution_id: life_of(execution_id, seed)) as emulator:
        account.met = misbehave(emulator, faults)
        async with KaizenClient("demo-key", base_url=emulator.base_url) as kaizen:
            await _look_up(stop, kaizen, account)
            stats = kaizen.stats()
            account.attempts, account.retries = stats.attempts, stats.retries
    account.interrupted = bool(stop.reason)
    show(account, console_on(sys.stdout))
    click.echo(f"{account.accounted:,} of {account.wanted:,} accounted for")
    if stop.reason:
        return stop.status
    return 0 if account.accounted == account.wanted else FAILED


async def _look_up(stop: Stop, kaizen: KaizenClient, account: Account) -> None:
    ids = (f"exec_{number}" for number in range(1, account.wanted + 1))
    began = time.monotonic()

    def line(_: Progress) -> str:
        return f"{account.done:,} / {account.wanted:,} · {kaizen.stats().retries:,} retries"

    async with kaizen.instructor_executions.stream(ids) as outcomes, Progress(line):
        async for outcome in stop.each(outcomes):
            account.add(outcome)
    account.seconds = time.monotonic() - began


def life_of(execution_id: str, seed: int) -> Life:
    """Return the life that an execution of the demo has."""
    drawn = fraction(seed, "life", execution_id)
    return next(life for share, life in _LIVES if drawn < share)


def show(account: Account, console: Console) -> None:
    """Print what became of the lookups, and how to make them from Python."""
    console.print(f"{account.done:,} executions looked up in {account.seconds:.1f} s", style="bold")
    console.print()
    for line in _figures(account):
        console.print(line)
    console.print("\nThe same from Python:\n", style="bold")
    code = indent(SNIPPET, "  ")
    coloured = Syntax(code, "python", theme="ansi_dark", background_color="default")
    console.print(coloured if console.is_terminal else code)
    console.print()


def _figures(account: Account) -> Iterator[Text]:
    yield _figure("found", f"{account.statuses.total():,}", style="bold")
    for status, count in account.statuses.most_common():
        yield _figure("", f"{count:,}", status, style=STYLES.get(status, ""))
    yield _figure("failed", f"{account.errors.total():,}", style="bold")
    for name, count in account.errors.most_common():
        yield _figure("", f"{count:,}", name, style="red")
    yield _figure("faults met", f"{account.met.total():,}", style="bold")
    for name, count in sorted(account.met.items()):
        yield _figure("", f"{count:,}", name)
    yield _figure("requests", f"{account.attempts:,}")
    yield _figure("retries", f"{account.retries:,}")
    yield _figure("throughput", f"{account.done / account.seconds:,.0f}", "lookups per second")
    if account.slowest is not None:
        yield _figure("slowest", f"{account.slowest.elapsed:.2f}", f"s, {account.slowest.attempts} attempts")
    missing = f"{account.wanted - account.accounted:,}"
    yield _figure("unfinished" if account.interrupted else "lost", missing, style="bold")


def _figure(name: str, number: str, what: str = "", style: str = "") -> Text:
    return Text.assemble("  ", (f"{name:<12}", "dim"), (f"{number:>7}", style), f"  {what}" * bool(what))
