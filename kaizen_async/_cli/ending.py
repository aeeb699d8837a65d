"""How a command ends: by itself, by Ctrl-C between two results, or because it cannot write; and its exit status.

Exit statuses, the same for `get`, `wait` and `watch`:
    0: Every id was found; for `wait` and `watch`, every execution has ended, and none as failed.
    1: Some lookups or executions failed, time ran out, or the output could not be written.
    2: Misuse: bad options, no ids, lines that are not ids, a bad URL, an API key that is malformed or refused.
    130: Ctrl-C. A second Ctrl-C ends the command at once. 129 and 143 stand for SIGHUP and SIGTERM.
    141: The reader of standard output has stopped reading, as `head` does.
"""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterable
from contextlib import contextmanager, suppress
from typing import Any, Final, NoReturn, TypeVar, cast

import click
from click.exceptions import Exit

from kaizen_async.errors import AuthenticationError, KaizenError

R = TypeVar("R")
Work = Callable[["Stop"], Coroutine[Any, Any, int]]

FAILED: Final = 1
MISUSE: Final = 2
OUT_OF_TIME: Final = "out of time"
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SIGNAL_STATUS: Final = 128
"""Added to a signal's number: the exit status that a shell gives to what the signal ended."""
SAME_SIGNAL: Final = 0.5
"""Seconds within which a second signal is the first one again: `timeout` signals a process and then its group."""


INTERRUPTED: Final = SIGNAL_STATUS + signal.SIGINT
BROKEN_PIPE: Final = SIGNAL_STATUS + signal.SIGPIPE
UNAUTHORIZED: Final = 401


class OutputClosedError(Exception):
    """Raised when the reader of standard output has stopped reading."""


class OutputError(Exception):
    """Raised when results cannot be written, for instance because the disk is full."""


def say(text: str) -> None:
    """Write a line for people to standard error. If that fails, the command continues."""
    with suppress(OSError, ValueError):
        click.echo(text, file=sys.stderr)


class Stop:
    """A request to end early.

    It takes effect between two results, so that no result is lost or cut in half. A second Ctrl-C, a moment later,
    ends the work at once.

    Attributes:
        reason: Why to end, in words; empty as long as nothing asked for it.
        status: The exit status that goes with the reason.
    """

    def __init__(self, task: "asyncio.Task[Any]") -> None:
        self.reason = ""
        self.status = 0
        self._task = task
        self._loop = task.get_loop()
        self._asked_at = 0.0
        self._asked = asyncio.Event()
        self._between_results = False

    @contextmanager
    def listening(self) -> Generator[None]:
        """Stop on Ctrl-C, on SIGTERM and when the terminal goes away.

        A signal that is ignored, as under `nohup`, stays ignored.
        """
        before = {signum: signal.getsignal(signum) for signum in SIGNALS}
        handled = [signum for signum in SIGNALS if before[signum] is not signal.SIG_IGN]
        for signum in handled:
            self._loop.add_signal_handler(signum, self._on_signal, signum)
        try:
            yield
        finally:
            for signum in handled:
                self._loop.remove_signal_handler(signum)
                signal.signal(signum, before[signum])

    def ask(self, reason: str, status: int) -> None:
        """Ask for the end. Only the first time counts."""
        if self.reason:
            return
        self.reason, self.status = reason, status
        self._asked_at = self._loop.time()
        self._asked.set()
        if self._between_results:
            self._task.cancel()

    def if_key_is_refused(self, error: KaizenError | None) -> bool:
        """Ask for the end if an error says that the server refuses the key, so that no lookup can succeed; return that.

        A 403 is another matter: it may concern a single execution.
        """
        if not isinstance(error, AuthenticationError) or error.status != UNAUTHORIZED:
            return False
        found = "look at how KAIZEN_API_KEY is set" if os.environ.get("KAIZEN_API_KEY") else "KAIZEN_API_KEY is not set"
        self.ask(f"the server refuses the API key (it responded with 401): {found}", MISUSE)
        return True

    async def asked(self) -> None:
        """Wait for the request to end."""
        await self._asked.wait()

    async def unless_asked(self, work: Awaitable[R]) -> R | None:
        """Return the result of some work; cancel the work and return None if the command must end first."""
        self._between_results = True
        try:
            return await work
        except asyncio.CancelledError:
            if not self._asked.is_set():
                raise
            self._task.uncancel()
            return None
        finally:
            self._between_results = False

    async def each(self, results: AsyncIterator[R]) -> AsyncIterator[R]:
        """Yield results, of an iterator whose waiting may be cancelled, until they or the command are to end."""
        while not self._asked.is_set():
            self._between_results = True
            try:
                result = await anext(results)
            except StopAsyncIteration:
                return
            except asyncio.CancelledError:
                if not self._asked.is_set():
                    raise
                self._task.uncancel()
                return
            finally:
                self._between_results = False
            yield result

    def _on_signal(self, signum: signal.Signals) -> None:
        if self.reason and self._loop.time() > self._asked_at + SAME_SIGNAL:
            self._task.cancel()
        self.ask("interrupted", SIGNAL_STATUS + signum)


def finish(stop: Stop, *, words: Iterable[str], failed: bool, misuse: bool, quiet: bool) -> int:
    """Print the summary, and return the exit status. Every command that takes ids ends here.

    Args:
        stop: What may have asked to end early.
        words: The parts of the summary.
        failed: Whether some lookups or executions failed.
        misuse: Whether some of the input was not ids.
        quiet: Whether to leave out the summary if nothing is wrong.
    """
    if stop.reason or failed or misuse or not quiet:
        say(f"{stop.reason}: " * bool(stop.reason) + " · ".join(filter(None, words)))
    if stop.status:
        return stop.status
    return MISUSE if misuse else FAILED if failed else 0


def run(work: Work) -> NoReturn:
    """Do the work of a command in an event loop of its own, and exit with the status that it returns."""
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            status = runner.run(_stoppable(work))
    except OutputClosedError:
        status = BROKEN_PIPE
    except KeyboardInterrupt:
        status = INTERRUPTED
    raise Exit(status)


async def _stoppable(work: Work) -> int:
    stop = Stop(cast("asyncio.Task[int]", asyncio.current_task()))
    with stop.listening():
        try:
            return await work(stop)
        except asyncio.CancelledError:
            if not stop.status:
                raise
            return stop.status


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return the maker of uvloop's loops, which are faster, where uvloop is installed."""
    try:
        from uvloop import new_event_loop  # noqa: PLC0415 - an extra
    except ImportError:
        return None
    return new_event_loop
