"""Options that several commands share, and the client that they describe."""

import inspect
import logging
import math
import re
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import update_wrapper
from typing import Any, Final

import click

from kaizen_async._cli.kinds import KINDS
from kaizen_async.client import KaizenClient
from kaizen_async.config import DEFAULT_BASE_URL, resolve_api_key, resolve_base_url
from kaizen_async.executions import Executions

Command = Callable[..., Any]

_DEFAULTS: Final = {name: field.default for name, field in inspect.signature(KaizenClient).parameters.items()}
_SPELLINGS: Final = {
    "base_url": "the base URL",
    "api_key": "KAIZEN_API_KEY",
    "allow_insecure_http=True": "--allow-insecure-http",
}
"""What settings are called here, by what the library calls them."""


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


@dataclass(frozen=True, kw_only=True)
class ClientOptions:
    """What the command line and the environment say about the client.

    Raises:
        click.UsageError: The base URL or the key cannot work.
    """

    base_url: str | None
    concurrency: int
    attempt_timeout: float
    allow_insecure_http: bool
    verbose: bool
    kind: str = KINDS[0]

    @property
    def resolved_base_url(self) -> str:
        """Where requests go."""
        try:
            return str(resolve_base_url(self.base_url, allow_insecure_http=self.allow_insecure_http))
        except ValueError as error:
            raise click.UsageError(_in_our_words(str(error))) from None

    @property
    def subject(self) -> str:
        """What is asked: the server, and of which kind, unless that goes without saying."""
        base_url = self.resolved_base_url
        return base_url if self.kind == KINDS[0] else f"{base_url}{self.kind}"

    def client(self) -> KaizenClient:
        """Return a client, not in use yet."""
        try:
            resolve_api_key(None)
        except ValueError:
            raise click.UsageError(
                "KAIZEN_API_KEY holds white space, a line break or a character outside ASCII; look at how it was set"
            ) from None
        return KaizenClient(
            base_url=self.resolved_base_url,
            concurrency=self.concurrency,
            attempt_timeout=self.attempt_timeout,
            allow_insecure_http=self.allow_insecure_http,
        )


def deadline_of_wait(command: Command) -> Command:
    """Give a command that waits the option `--deadline`."""
    return click.option(
        "--deadline",
        metavar="SECONDS",
        type=str,
        callback=seconds_or_none,
        default=inspect.signature(Executions[Any].wait_many).parameters["deadline"].default,
        show_default=True,
        help="Seconds for the whole command, or none for no limit.",
    )(command)


def client_options(command: Command) -> Command:
    """Give a command the options of the client; it takes them as one argument, `client_options`."""

    def with_client_options(
        *,
        base_url: str | None,
        concurrency: int,
        attempt_timeout: float,
        allow_insecure_http: bool,
        verbose: bool,
        kind: str,
        **others: Any,
    ) -> Any:
        options = ClientOptions(
            base_url=base_url,
            concurrency=concurrency,
            attempt_timeout=attempt_timeout,
            allow_insecure_http=allow_insecure_http,
            verbose=verbose,
            kind=kind,
        )
        if verbose:
            click.get_current_context().with_resource(_logs_on_stderr())
        return command(client_options=options, **others)

    wrapped: Command = update_wrapper(with_client_options, command)
    for option in reversed(_CLIENT_OPTIONS):
        wrapped = option(wrapped)
    return wrapped


_CLIENT_OPTIONS: Final[tuple[Callable[[Command], Command], ...]] = (
    click.option(
        "--kind",
        type=click.Choice(KINDS),
        default=KINDS[0],
        show_default=True,
        help="What the ids are of; executions means workflow executions, and is provisional.",
    ),
    click.option(
        "--base-url",
        metavar="URL",
        envvar="KAIZEN_BASE_URL",
        show_envvar=True,
        help=f"Where the API is.  [default: {DEFAULT_BASE_URL}]",
    ),
    click.option(
        "--concurrency",
        type=click.IntRange(min=1),
        default=_DEFAULTS["concurrency"],
        show_default=True,
        help="Requests under way at the same time, at most.",
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
    click.option("--allow-insecure-http", is_flag=True, help="Allow plain http to another machine."),
    click.option("-v", "--verbose", is_flag=True, help="Tell on standard error what is sent and retried, and why."),
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
