"""What `get`, `wait` and `watch` work with, and how they end."""

from collections.abc import Iterable
from dataclasses import dataclass

from kaizen_async._cli.ending import Stop, finish
from kaizen_async._cli.ids import Ids, judge_input
from kaizen_async._cli.options import CommonOptions
from kaizen_async._cli.output import Output
from kaizen_async._cli.progress import Trouble
from kaizen_async.client import KaizenClient


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one run of a command works with. A deadline is in seconds, and bounds the whole command."""

    client: KaizenClient
    ids: Ids
    output: Output
    options: CommonOptions
    trouble: Trouble
    deadline: float | None

    def finish(self, stop: Stop, words: Iterable[str], *, failed: bool, optional: bool = False) -> int:
        """Judge the input, print the summary, and return the exit status.

        Args:
            stop: What may have asked to end early. It gets the reason if the input was not read to its end.
            words: The parts of the summary. They are made after the input was judged.
            failed: Whether some lookups or executions failed.
            optional: Whether the command can do without ids.

        Raises:
            click.UsageError: There was no id, and the command needs one.
        """
        judge_input(stop, self.ids, optional=optional)
        misuse = self.ids.counts.invalid > 0
        return finish(stop, words=words, failed=failed, misuse=misuse, quiet=self.options.quiet)
