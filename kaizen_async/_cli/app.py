"""The command and its subcommands."""

import click

from kaizen_async._cli.demo import demo
from kaizen_async._cli.emulator import emulator
from kaizen_async._cli.get import get
from kaizen_async._cli.run import run
from kaizen_async._cli.wait import wait
from kaizen_async._cli.watch import watch
from kaizen_async.config import __version__


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="The API key is taken from the variable KAIZEN_API_KEY and nowhere else, since options show in lists of "
    "processes. Exit status: 0 all found or ended, 1 some failed or time ran out, 2 misuse, 130 Ctrl-C. "
    "With the extra `speed` (pip install 'kaizen-async[speed]') the commands run on uvloop.",
)
@click.version_option(__version__, package_name="kaizen-async", prog_name="kaizen-async")
def cli() -> None:
    """Look Kaizen executions up, wait for them to end, and watch them change."""


for command in (get, wait, watch, run, emulator, demo):
    cli.add_command(command)
