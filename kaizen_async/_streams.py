"""Base classes of the streams: the consumer's side of `stream`, `wait_many` and `watch`."""

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Coroutine
from contextvars import Context
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar, cast

from kaizen_async._ledger import Ledger

R = TypeVar("R")

PAUSE_EVERY: Final = 100
"""Results after which a consumer's task gives the event loop a turn. Otherwise a busy consumer would block it."""


class ResultStream(ABC, Generic[R]):
    """An asynchronous context manager and iterator over results that background tasks put in.

    Any number of tasks may iterate over it; each result goes to one of them. It ends when the background tasks have
    ended and all results are taken; a failure, if there was one, is raised then. Leaving the `async with` block ends
    the background tasks and every loop over the stream.
    """

    def __init__(self) -> None:
        self._ready: Any = deque()
        self._taken_out = 0
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] | None = None
        self._failure: BaseException | None = None
        self._ended = False
        self._left = False

    @abstractmethod
    def _start(self) -> None:
        """Start the first background tasks, by `_run`."""

    def _run(self, work: Coroutine[Any, Any, None], context: Context | None = None) -> None:
        """Start a background task of the entered stream. When it ends, the stream drops it and keeps its exception."""
        task = asyncio.create_task(work, context=context)
        cast("set[asyncio.Task[None]]", self._tasks).add(task)
        task.add_done_callback(self._on_done)

    def _on_done(self, task: "asyncio.Task[None]") -> None:
        cast("set[asyncio.Task[None]]", self._tasks).discard(task)
        if not self._left:
            self._fail(_failure_of(task))
        self._changed.set()

    def _is_over(self) -> bool:
        """Return whether nothing further will be put in."""
        return self._tasks is not None and not self._tasks

    def _has_result(self) -> bool:
        """Return whether there is a result to take. Results that are made on demand are made here."""
        return bool(self._ready)

    def _put(self, result: Any) -> None:
        self._ready.append(result)
        self._changed.set()

    def _take(self) -> Any:
        return self._ready.popleft()

    def _fail(self, failure: BaseException | None) -> None:
        """Keep what is raised at the end; the first failure counts."""
        self._failure = self._failure or failure

    async def __aenter__(self) -> Self:
        if self._tasks is not None:
            raise RuntimeError("a stream can be entered once; call the method again for another")
        self._tasks = set()
        self._start()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended = self._left = True
        self._changed.set()
        tasks = list(self._tasks or ())
        for task in tasks:
            task.cancel()
        await all_done(tasks)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> R:
        if self._tasks is None:
            raise RuntimeError("enter the stream first: `async with … as results: async for result in results: ...`")
        self._taken_out += 1
        if not self._taken_out % PAUSE_EVERY:
            await asyncio.sleep(0)  # see PAUSE_EVERY
        while self._left or not self._has_result():
            if self._left or self._is_over():
                self._ended = True
                raise self._pop_failure() or StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        result: R = self._take()
        return result

    def _pop_failure(self) -> BaseException | None:
        """Return the failure and forget it: once raised, it refers to the frames that refer to this stream."""
        if self._left:
            return None
        failure, self._failure = self._failure, None
        return failure


def _failure_of(task: "asyncio.Task[None]") -> BaseException | None:
    """Return the exception of a background task. A cancellation from outside the stream counts as one."""
    if not task.cancelled():
        return task.exception()
    return RuntimeError("a task of this stream was cancelled from outside; results are missing")


class AccountedStream(ResultStream[R]):
    """A stream with a ledger."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    @property
    def taken(self) -> int:
        """How many ids the stream has taken so far: from the source, from a checkpoint, and by `add`."""
        return self._ledger.taken

    @property
    def done(self) -> int:
        """How many ids are done: the consumer has their last result."""
        return self._ledger.done

    @property
    def total(self) -> int | None:
        """How many ids there are. None until that is known: for a generator, when it ends."""
        return self._ledger.total


async def all_done(tasks: Collection["asyncio.Task[None]"]) -> None:
    """Wait until cancelled tasks have ended, even if the caller is cancelled, too: no task may be left behind."""
    cancellation: list[asyncio.CancelledError] = []
    while pending := [task for task in tasks if not task.done()]:
        try:
            await asyncio.wait(pending)
        except asyncio.CancelledError as error:
            cancellation = [error]
    if cancellation:
        raise cancellation.pop()
