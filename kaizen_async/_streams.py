"""The consumer's side of everything that yields results as they come."""

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar

R = TypeVar("R")

PAUSE_EVERY: Final = 100
"""Results after which the consumer's task lets the event loop go on, lest one who never waits block it."""


class ResultStream(ABC, Generic[R]):
    """An asynchronous context manager and iterator over results that background tasks put in.

    It ends when the tasks have ended and all results are taken; then a failure, if there was one, is raised. Leaving
    the `async with` block ends the tasks.
    """

    def __init__(self) -> None:
        self._ready: Any = deque()
        self._taken = 0
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] | None = None
        self._failure: BaseException | None = None
        self._ended = False

    @abstractmethod
    def _start(self) -> list[asyncio.Task[None]]:
        """Start the background tasks."""

    def _is_over(self) -> bool:
        """Whether no further result will be put in."""
        return self._tasks is not None and all(task.done() for task in self._tasks)

    def _has_result(self) -> bool:
        """Whether there is a result to take; a place to make those that are made only when they are asked for."""
        return bool(self._ready)

    def _put(self, result: Any) -> None:
        self._ready.append(result)
        self._changed.set()

    def _take(self) -> Any:
        return self._ready.popleft()

    def _fail(self, failure: BaseException | None) -> None:
        """Note what to raise in the end; the first one counts."""
        self._failure = self._failure or failure

    async def __aenter__(self) -> Self:
        if self._tasks is not None:
            raise RuntimeError("a stream can be entered once; call the method again for another")
        self._tasks = self._start()
        for task in self._tasks:
            task.add_done_callback(self._on_task_done)
        return self

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self._fail(task.exception())
        self._changed.set()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended = True
        tasks = self._tasks or []
        for task in tasks:
            task.cancel()
        await all_done(tasks)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> R:
        if self._tasks is None:
            raise RuntimeError("enter the stream first: `async with … as results: async for result in results: ...`")
        self._taken += 1
        if not self._taken % PAUSE_EVERY:
            await asyncio.sleep(0)
        while not self._has_result():
            if self._is_over():
                self._ended = True
                raise self._pop_failure() or StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        result: R = self._take()
        return result

    def _pop_failure(self) -> BaseException | None:
        """Return the failure and forget it: raised, it refers to whoever refers to it."""
        failure, self._failure = self._failure, None
        return failure


async def all_done(tasks: Collection[asyncio.Task[None]]) -> None:
    """Wait until cancelled tasks have ended; a caller who is cancelled too waits as well, to leave nothing behind."""
    cancellation: list[asyncio.CancelledError] = []
    while pending := [task for task in tasks if not task.done()]:
        try:
            await asyncio.wait(pending)
        except asyncio.CancelledError as error:
            cancellation = [error]
    if cancellation:
        raise cancellation.pop()
