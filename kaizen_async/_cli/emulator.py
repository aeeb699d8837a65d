"""`kaizen-async emulator`: the Kaizen API on your own machine, with executions and faults made up from a seed."""

from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import click

from kaizen_async._cli.ending import Stop, run
from kaizen_async._cli.options import Number
from kaizen_async._cli.table import counted
from kaizen_async.errors import printable
from kaizen_async.testing.chance import fraction
from kaizen_async.testing.emulator import KaizenEmulator
from kaizen_async.testing.faults import Exchange, Fault, Reply
from kaizen_async.testing.hosts import is_loopback
from kaizen_async.testing.lives import Life
from kaizen_async.testing.script_file import read_script

KEY = "emulator-key"
EXAMPLES = 3


@click.command()
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; 0.0.0.0 for all, so that other machines and containers reach it.",
)
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="Host name that requests may use beside those that point here anyway; may be repeated.",
)
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Script of executions, kinds and faults, as YAML or JSON.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one.")
@click.option(
    "--executions",
    type=click.IntRange(min=1),
    help="Only exec_1 to exec_N exist; unset: any id does.",
    metavar="N",
)
@click.option(
    "--duration",
    type=Number(min=0, max=1e8),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long executions take, half to one and a half times that, from the first request for them.",
)
@click.option(
    "--fail-rate",
    type=Number(0, 1),
    default=0.1,
    show_default=True,
    metavar="SHARE",
    help="Share of the executions that end as Failed.",
)
@click.option(
    "--faults",
    type=Number(0, 1),
    default=0.0,
    show_default=True,
    metavar="SHARE",
    help="Share of the requests that meet a fault: 503, reset, 502 as HTML, truncated body, latency.",
)
@click.option(
    "--rate-limit",
    type=Number(min=0, min_open=True),
    metavar="RATE",
    help="Respond with 429 to all requests beyond this rate per second.",
)
@click.option("--api-key-required", is_flag=True, help=f"Respond with 401 to requests without the key {KEY!r}.")
@click.option("--api-key", metavar="KEY", help="Respond with 401 to requests without this key.")
@click.option("--seed", type=int, default=0, show_default=True, help="What executions and faults are drawn from.")
def emulator(
    *,
    host: str,
    allowed_hosts: tuple[str, ...],
    config: Path | None,
    port: int,
    executions: int | None,
    duration: float,
    fail_rate: float,
    faults: float,
    rate_limit: float | None,
    api_key_required: bool,
    api_key: str | None,
    seed: int,
) -> None:
    """Serve the Kaizen API on this machine until Ctrl-C.

    Executions are made up: each begins its life with the first request for it. With --config they are those of a file.
    GET /health says whether it serves, GET /openapi.json what.
    """
    life = lives(seed=seed, duration=duration, fail_rate=fail_rate)
    examples = " ".join(f"exec_{number}" for number in range(1, min(executions or EXAMPLES, EXAMPLES) + 1))
    known = None if executions is None else {f"exec_{number}" for number in range(1, executions + 1)}

    def life_of(execution_id: str) -> Life | None:
        return life(execution_id) if known is None or execution_id in known else None

    try:
        script = None if config is None else read_script(config)
        key = api_key or (script and script.api_key) or (KEY if api_key_required else None)
        server = KaizenEmulator(
            api_key=key,
            seed=seed,
            default_life=life_of if script is None else None,
            host=host,
            port=port,
            allowed_hosts=allowed_hosts,
        )
        if script is not None:
            script.apply(server)
            examples = " ".join(list(script.executions)[:EXAMPLES]) or "exec_1"
    except (TypeError, ValueError, ImportError, OSError) as error:
        raise click.UsageError(printable(str(error))) from None
    misbehave(server, faults)
    if rate_limit is not None:
        server.rate_limit(rate_limit)
    if not is_loopback(host):
        guard = "" if key else " and that without a key: --api-key sets one"
        click.echo(f"Note: other machines can reach this emulator at {host}{guard}.", err=True)
    run(lambda stop: _serve(stop, server, f"KAIZEN_API_KEY={key} " if key else "", examples))


async def _serve(stop: Stop, server: KaizenEmulator, environment: str, examples: str) -> int:
    async with AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(server)
        except OSError as error:
            raise click.UsageError(f"{error.strerror}; --port 0 takes a free port") from error
        click.echo(f"The Kaizen API is at {server.base_url} until Ctrl-C. In another terminal:\n")
        click.echo(f"  {environment}KAIZEN_BASE_URL={server.base_url} kaizen-async watch {examples}\n")
        await stop.asked()
    responses = ", ".join(f"{status}: {count:,}" for status, count in sorted(server.answers.items()))
    click.echo(counted(server.request_count, "request") + f", responses {responses}" * bool(responses))
    return 0


FAULTS: Final = {
    "status 503": Fault.status(503),
    "connection reset": Fault.reset(),
    "502 as HTML": Fault.html_502(),
    "body cut short": Fault.truncated_body(),
    "0.2 s late": Fault.latency(0.2),
}
"""What goes wrong with requests, each as often as the others."""


def lives(*, seed: int, duration: float, fail_rate: float) -> Callable[[str], Life]:
    """Return a function that gives each id a life of half to one and a half times a duration."""

    def life(execution_id: str) -> Life:
        length = duration * (0.5 + fraction(seed, "duration", execution_id))
        failed = fraction(seed, "failed", execution_id) < fail_rate
        return Life.lasting(length, status="Failed" if failed else "Completed")

    return life


def misbehave(emulator: KaizenEmulator, share: float) -> Counter[str]:
    """Let a share of the requests meet a fault; return the counts of those that have, as they grow."""
    met: Counter[str] = Counter()
    for number, (name, fault) in enumerate(FAULTS.items()):
        # The first that hits decides, so that those behind it are asked about fewer requests; a delay decides nothing.
        asked = len(FAULTS) if fault.delays else len(FAULTS) - share * number
        emulator.faults.chance(_counted(name, fault, met), share / asked)
    return met


def _counted(name: str, fault: Fault, met: Counter[str]) -> Fault:
    async def play(exchange: Exchange) -> Reply:
        met[name] += 1
        return await fault.play(exchange)

    return Fault(name, play, fault.delays, fault.needs_connection)
