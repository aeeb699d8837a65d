"""The command and its subcommands, and how they meet standard streams that are closed, full or of another encoding."""

import codecs
import io
import os
import sys
from contextlib import suppress
from typing import IO, Any, Final, cast

import click
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

from kaizen_async._cli.demo import demo
from kaizen_async._cli.emulator import emulator
from kaizen_async._cli.ending import BROKEN_PIPE, FAILED, INTERRUPTED, say
from kaizen_async._cli.get import get
from kaizen_async._cli.run import run
from kaizen_async._cli.wait import wait
from kaizen_async._cli.watch import watch
from kaizen_async.config import __version__

SHELLS: Final[dict[str, type[ShellComplete]]] = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}
_PLAIN: Final = {"·": "-", "…": "...", "—": "-", "●": "*"}
"""How characters are written where the terminal's encoding does not have them; others become a question mark."""


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="The API key is taken from the variable KAIZEN_API_KEY and from nowhere else, because other users of this "
    "machine can see options. Exit status: 0 all found, or ended well; 1 some failed, or time ran out; 2 misuse; 130 "
    "Ctrl-C. With the extra `speed` (pip install 'kaizen-async[speed]') the commands run on uvloop.",
)
@click.version_option(__version__, package_name="kaizen-async", prog_name="kaizen-async")
def cli() -> None:
    """Look Kaizen executions up, wait for them to end, and watch them change."""


@click.command()
@click.argument("shell", type=click.Choice(list(SHELLS)))
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    For example, in ~/.bashrc: eval "$(kaizen-async completion bash)"
    """
    click.echo(SHELLS[shell](cli, {}, "kaizen-async", "_KAIZEN_ASYNC_COMPLETE").source())


for command in (get, wait, watch, run, emulator, demo, completion):
    cli.add_command(command)


def main() -> None:
    """Run the command in a process of its own."""
    prepare_streams()
    status: Any = FAILED
    try:
        status = _run()
        sys.stdout.flush()
    except OSError as error:
        status = status or FAILED
        say(f"Error: cannot write to standard output: {error.strerror}")
    # Otherwise the interpreter tries at its end to write what is still buffered, and prints a traceback if it cannot.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(status)


def _run() -> Any:
    """Run the command that the arguments name, and return its exit status."""
    stdout = sys.stdout
    try:
        return cli(prog_name="kaizen-async", standalone_mode=False)
    except click.ClickException as error:
        error.show(sys.stderr)  # left to itself, click writes UTF-8 to an ASCII terminal
        return error.exit_code
    except click.Abort:  # Ctrl-C outside the event loop of a command
        return INTERRUPTED
    except SystemExit as ending:  # how click ends shell completion
        # If the reader of standard output is gone, click replaces the stream before it exits; rich does not.
        reader_is_gone = sys.stdout is not stdout or isinstance(ending.__context__, BrokenPipeError)
        return BROKEN_PIPE if reader_is_gone else ending.code


def prepare_streams() -> None:
    """Make the standard streams safe to use.

    A closed descriptor would be given to the next socket or file, which then would get what is meant for standard
    output. So it is opened the wrong way round, and its use fails with the error that a closed one gives.
    """
    for descriptor, flags in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, flags)  # gets the lowest free descriptor, which is this one
    codecs.register_error("kaizen-async", _replace)
    # typeshed does not know that a stream is None if its descriptor was closed when the interpreter started.
    stdin: IO[str] | None = sys.stdin
    if stdin is None:
        sys.stdin = os.fdopen(0, "r", closefd=False)
    stdout: IO[str] | None = sys.stdout
    if stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    cast("io.TextIOWrapper", sys.stdout).reconfigure(errors="kaizen-async")
    encoding = getattr(sys.stderr, "encoding", "utf-8")
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(_Forgiving(2, "w", closefd=False)), encoding, "kaizen-async", line_buffering=True
    )


class _Forgiving(io.FileIO):
    """A standard error that is full or closed does not end the work."""

    def write(self, data: Any) -> int:
        """Write what can be written."""
        with suppress(OSError):
            return super().write(data)
        return len(data)


def _replace(error: UnicodeError) -> tuple[str, int]:
    """Return what stands for characters that an encoding does not have; a handler for `codecs`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_PLAIN.get(char, "?") for char in text), error.end
