"""How a command ends: by itself, by Ctrl-C between two results, or because nobody reads what it writes."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from contextlib import contextmanager
from typing import Any, Final, NoReturn, TypeVar, cast

from click.exceptions import Exit

R = TypeVar("R")
Work = Callable[["Stop"], Coroutine[Any, Any, int]]

FAILED: Final = 1
MISUSE: Final = 2
OUT_OF_TIME: Final = "out of time"
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SIGNAL_STATUS: Final = 128
"""Added to a signal's number: the exit status that a shell gives to what the signal ended."""
SAME_WISH: Final = 0.5
"""Seconds within which a second signal is the first one again: `timeout` signals a process and then its group."""


class OutputClosedError(Exception):
    """Raised when whoever read standard output has stopped reading."""


class Stop:
    """The wish to end early.

    It takes effect between two results, so that none is lost or cut in half. A second Ctrl-C, a moment later, ends the
    work wherever it stands.

    Attributes:
        reason: Why to end, in words; empty as long as nobody asked for it.
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

        A signal that whoever started us wants ignored, as `nohup` does, stays ignored.
        """
        signals = [signum for signum in SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]
        for signum in signals:
            self._loop.add_signal_handler(signum, self._on_signal, signum)
        try:
            yield
        finally:
            for signum in signals:
                self._loop.remove_signal_handler(signum)

    def ask(self, reason: str, status: int) -> None:
        """Ask for the end. Only the first time counts."""
        if self.reason:
            return
        self.reason, self.status = reason, status
        self._asked_at = self._loop.time()
        self._asked.set()
        if self._between_results:
            self._task.cancel()

    async def asked(self) -> None:
        """Wait until somebody asks for the end."""
        await self._asked.wait()

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
        if self.reason and self._loop.time() > self._asked_at + SAME_WISH:
            self._task.cancel()
        self.ask("interrupted", SIGNAL_STATUS + signum)


def run(work: Work) -> NoReturn:
    """Do the work of a command in an event loop of its own, and exit with the status that it returns."""
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            status = runner.run(_stoppable(work))
    except OutputClosedError:
        status = SIGNAL_STATUS + signal.SIGPIPE
    except KeyboardInterrupt:
        status = SIGNAL_STATUS + signal.SIGINT
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
