"""Options that `get`, `wait` and `watch` share, and the client that they describe."""

import asyncio
import inspect
import logging
import math
import re
import ssl
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import update_wrapper
from itertools import chain
from pathlib import Path
from typing import Any, Final

import click

from kaizen_async import _kinds
from kaizen_async._cli import formats, output_formats
from kaizen_async._cli.formats import Layout
from kaizen_async._cli.ids import InputOptions
from kaizen_async._cli.output import OutputOptions
from kaizen_async._cli.table import Execution
from kaizen_async.client import KaizenClient
from kaizen_async.config import (
    DEFAULT_BASE_URL,
    MOST_CONCURRENCY,
    HedgePolicy,
    RetryPolicy,
    resolve_api_key,
    resolve_base_url,
)
from kaizen_async.errors import printable
from kaizen_async.events import Hook
from kaizen_async.executions import Executions

Command = Callable[..., Any]

_DEFAULTS: Final = {name: field.default for name, field in inspect.signature(KaizenClient).parameters.items()}
_SPELLINGS: Final = {
    "base_url": "the base URL",
    "api_key": "KAIZEN_API_KEY",
    "headers": "--header",
    "allow_insecure_http=True": "--allow-insecure-http",
}
"""What settings are called here, by what the library calls them."""


class Number(click.FloatRange):
    """The type of an option that is a number in a range, which `nan` is not."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number.

        Raises:
            click.BadParameter: It is not a number, or outside the range.
        """
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


def seconds(ctx: click.Context, param: click.Parameter, value: float | str | None) -> float | None:
    """Return a number of seconds above 0; click's callback for an option."""
    del ctx, param
    return None if value is None else _seconds(value, "")


def seconds_or_none(ctx: click.Context, param: click.Parameter, value: float | str) -> float | None:
    """Return a number of seconds above 0, or None for `none`; click's callback for an option."""
    del ctx, param
    return None if str(value).lower() == "none" else _seconds(value, ", or none for no limit")


def _seconds(value: float | str, choice: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise click.BadParameter(f"{str(value)!r} is not a number of seconds above 0{choice}")
    return number


KINDS: Final = tuple(_kinds.KINDS)
"""The choices of `--kind`, which follow the paths of the API; the first is the default."""


def executions_of(kaizen: KaizenClient, kind: str) -> Executions[Execution]:
    """Return what looks up executions of a kind."""
    chosen = _kinds.KINDS[kind]
    return kaizen.lookups(chosen.path, chosen.record, unwrap=chosen.unwrap)


class Pace:
    """Lets requests through one by one, evenly spaced in time.

    Args:
        rate: Requests per second.
    """

    def __init__(self, rate: float) -> None:
        self._interval = 1 / rate
        self._next_at = 0.0

    async def __call__(self) -> None:
        """Wait for the next moment to send."""
        now = asyncio.get_running_loop().time()
        moment = max(now, self._next_at)
        self._next_at = moment + self._interval
        await asyncio.sleep(moment - now)


@dataclass(frozen=True, kw_only=True)
class ClientOptions:
    """What the command line and the environment say about the client."""

    base_url: str | None
    allow_insecure_http: bool
    concurrency: int
    attempt_timeout: float
    retries: int
    rate: float | None
    max_response_bytes: int
    proxy: str | None
    ca_file: Path | None
    headers: dict[str, str]
    hedge: bool

    @property
    def resolved_base_url(self) -> str:
        """Where requests go.

        Raises:
            click.UsageError: The base URL cannot work.
        """
        given = self.base_url.strip() if self.base_url else None
        try:
            return str(resolve_base_url(given, allow_insecure_http=self.allow_insecure_http))
        except ValueError as error:
            raise click.UsageError(_in_our_words(str(error))) from None

    def create(self, on_event: Hook) -> KaizenClient:
        """Return a client, not in use yet.

        Args:
            on_event: The client calls it with every event.

        Raises:
            click.UsageError: A setting cannot work.
        """
        try:
            resolve_api_key(None)
        except ValueError:
            raise click.UsageError(
                "KAIZEN_API_KEY contains whitespace, a line break or a character outside ASCII; look at how it was set"
            ) from None
        base_url = self.resolved_base_url
        try:
            return KaizenClient(
                base_url=base_url,
                allow_insecure_http=self.allow_insecure_http,
                concurrency=self.concurrency,
                attempt_timeout=self.attempt_timeout,
                retry=RetryPolicy(max_attempts=1 + self.retries),
                limiter=None if self.rate is None else Pace(self.rate),
                max_response_bytes=self.max_response_bytes,
                on_event=on_event,
                proxy=self.proxy,
                headers=self.headers or None,
                hedge=HedgePolicy() if self.hedge else None,
                ssl_context=None if self.ca_file is None else _trusting(self.ca_file),
            )
        except ValueError as error:
            raise click.UsageError(_in_our_words(str(error))) from None


def _trusting(ca_file: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        why = "it holds no certificate in PEM format" if isinstance(error, ssl.SSLError) else error.strerror
        raise click.UsageError(f"cannot use --ca-file {printable(str(ca_file))}: {why}") from None


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """What the command line says, for `get`, `wait` and `watch`."""

    client: ClientOptions
    input: InputOptions
    output: OutputOptions
    kind: str
    verbose: bool
    quiet: bool

    @property
    def shows_progress(self) -> bool:
        """Whether to show how far the work is; log lines would be torn by it."""
        return not (self.quiet or self.verbose)

    @property
    def subject(self) -> str:
        """What is asked: the server, and the kind of executions if it is not the usual one."""
        base_url = self.client.resolved_base_url
        return base_url if self.kind == KINDS[0] else f"{base_url}{self.kind}"


def common_options(command: Command) -> Command:
    """Give a command the options that `get`, `wait` and `watch` share, as one argument `options`."""

    def with_common_options(**given: Any) -> Any:
        if given["null"] and given["input_format"] not in (None, "nul"):
            raise click.UsageError("-0 and --input-format contradict each other")
        if given["fields"] and (given["only_ids"] or given["output_format"] == output_formats.TABLE):
            other = "--only-ids" if given["only_ids"] else "--format table"
            raise click.UsageError(f"{other} has no use for --fields; leave one of them out")
        options = CommonOptions(
            client=ClientOptions(**{name: given.pop(name) for name in ClientOptions.__dataclass_fields__}),
            input=InputOptions(
                file=given.pop("input_file"),
                layout=Layout(
                    format="nul" if given.pop("null") else given["input_format"],
                    field=given.pop("field"),
                    column=given.pop("column"),
                ),
            ),
            output=OutputOptions(
                file=given.pop("output_file"),
                format=given.pop("output_format"),
                fields=given.pop("fields"),
                only_failed=given.pop("only_failed"),
                only_ids=given.pop("only_ids"),
                formulas=given.pop("formulas"),
                resume=given.pop("resume", False),
            ),
            kind=given.pop("kind"),
            verbose=given.pop("verbose"),
            quiet=given.pop("quiet"),
        )
        del given["input_format"]
        if options.verbose:
            click.get_current_context().with_resource(_logs_on_stderr())
        return command(options=options, **given)

    wrapped: Command = update_wrapper(with_common_options, command)
    for option in reversed(_COMMON_OPTIONS):
        wrapped = option(wrapped)
    return wrapped


def _paths(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    """Return the paths in a list separated by commas; click's callback for `--fields`."""
    del ctx, param
    paths = tuple(path.strip() for path in value.split(",")) if value else ()
    if not all(name for path in paths for name in path.split(".")):
        raise click.BadParameter("give names separated by commas, such as id,status,workflow.name")
    return tuple(dict.fromkeys(paths))


def _headers(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Return headers from `NAME: VALUE`, or from the lines of `@FILE`; click's callback. No message shows a value."""
    del ctx, param
    headers: dict[str, str] = {}
    for line in chain.from_iterable(map(_lines_of_header, values)):
        name, colon, value = line.partition(":")
        if not colon or not name.strip():
            raise click.BadParameter("give a header as NAME: VALUE, or a file of such lines as @FILE")
        if name.strip().lower() in map(str.lower, headers):
            raise click.BadParameter(f"{printable(name.strip())} is given twice")
        headers[name.strip()] = value.strip()
    return headers


def _lines_of_header(value: str) -> list[str]:
    if not value.startswith("@"):
        return [value]
    try:
        return [line for line in Path(value[1:]).read_text("utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise click.BadParameter(f"cannot read {printable(value[1:])}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise click.BadParameter(f"{printable(value[1:])} is not UTF-8 text") from None


_FILE: Final = click.Path(dir_okay=False, path_type=Path)

_COMMON_OPTIONS: Final[tuple[Callable[[Command], Command], ...]] = (
    click.option(
        "--kind",
        type=click.Choice(KINDS),
        default=KINDS[0],
        show_default=True,
        help="Kind of the executions; executions means workflow executions, and is provisional.",
    ),
    click.option("-i", "--input", "input_file", type=_FILE, metavar="FILE", help="Read the ids from FILE."),
    click.option(
        "--input-format",
        type=click.Choice(formats.FORMATS),
        help="Format of the input; json also means NDJSON.  [default: detected from the first bytes]",
    ),
    click.option("-0", "--null", is_flag=True, help="The ids are separated by NUL: --input-format nul."),
    click.option(
        "--field",
        default="id",
        show_default=True,
        metavar="NAME",
        help="Field of JSON objects that holds the id: a or a.b.",
    ),
    click.option("--column", metavar="NAME", help="Column of CSV or TSV that holds the ids.  [default: id]"),
    click.option("-o", "--output", "output_file", type=_FILE, metavar="FILE", help="Write the results to FILE."),
    click.option(
        "-f",
        "--format",
        "output_format",
        type=click.Choice(output_formats.CHOICES),
        help="Format of the results.  [default: table on a terminal, csv for FILE.csv, else ndjson]",
    ),
    click.option(
        "--fields",
        default="",
        metavar="A,B.C",
        callback=_paths,
        help="Fields to write, by their names in the API: id,status,workflow.name.  [default: all]",
    ),
    click.option("--only-failed", is_flag=True, help="Write only what failed."),
    click.option("--only-ids", is_flag=True, help="Write ids, one per line, and nothing else."),
    click.option(
        "--formulas",
        is_flag=True,
        help="Write CSV cells that begin with = + - or @ unchanged, though a spreadsheet would run them as formulas.",
    ),
    click.option(
        "--base-url",
        metavar="URL",
        envvar="KAIZEN_BASE_URL",
        show_envvar=True,
        help=f"Where the API is.  [default: {DEFAULT_BASE_URL}]",
    ),
    click.option("--allow-insecure-http", is_flag=True, help="Allow plain http to another machine."),
    click.option(
        "--concurrency",
        type=click.IntRange(1, MOST_CONCURRENCY),
        default=_DEFAULTS["concurrency"],
        show_default=True,
        help="Most requests in flight at the same time.",
    ),
    click.option(
        "--rate",
        type=Number(min=0.001, max=1e6),
        metavar="RATE",
        help="Most requests per second.  [default: no limit]",
    ),
    click.option(
        "--attempt-timeout",
        metavar="SECONDS",
        type=str,
        callback=seconds,
        default=_DEFAULTS["attempt_timeout"],
        show_default=True,
        help="Seconds for one request.",
    ),
    click.option(
        "--retries",
        type=click.IntRange(0, 1000),
        default=RetryPolicy().max_attempts - 1,
        show_default=True,
        help="How often a failed request is repeated.",
    ),
    click.option(
        "--max-response-bytes",
        type=click.IntRange(min=1),
        default=_DEFAULTS["max_response_bytes"],
        show_default=True,
        help="Size above which a response is refused.",
    ),
    click.option(
        "--proxy",
        metavar="URL",
        envvar="KAIZEN_PROXY",
        show_envvar=True,
        help="Send requests through this HTTP proxy. A password belongs into the variable: others can see options.",
    ),
    click.option("--ca-file", type=_FILE, metavar="FILE", help="Trust the certificate authorities in FILE (PEM) only."),
    click.option(
        "-H",
        "--header",
        "headers",
        multiple=True,
        metavar="NAME: VALUE",
        callback=_headers,
        help="Send this header with every request; may be repeated. Others can see options, so a secret belongs into a "
        "file with one header a line: --header @FILE.",
    ),
    click.option(
        "--hedge",
        is_flag=True,
        help="Send a request that takes longer than most a second time, for at most 5 % of the lookups.",
    ),
    click.option("-q", "--quiet", is_flag=True, help="No progress, and no summary unless something failed."),
    click.option("-v", "--verbose", is_flag=True, help="Report on standard error what is sent and retried, and why."),
)

resume_option = click.option(
    "--resume",
    is_flag=True,
    help="Continue with what is in the --output FILE: skip ids with a record in it, and repeat the failed ones.",
)

deadline_of_wait = click.option(
    "--deadline",
    metavar="SECONDS",
    type=str,
    callback=seconds_or_none,
    default=inspect.signature(Executions[Any].wait_many).parameters["deadline"].default,
    show_default=True,
    help="Seconds for the whole command, or none for no limit.",
)


@contextmanager
def _logs_on_stderr() -> Generator[None]:
    log = logging.getLogger("kaizen_async")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    level_before = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level_before)


def _in_our_words(message: str) -> str:
    """Return a message of the library in the words of the command line."""
    pattern = "|".join(map(re.escape, sorted(_SPELLINGS, key=len, reverse=True)))
    return re.sub(pattern, lambda found: _SPELLINGS[found[0]], message)
