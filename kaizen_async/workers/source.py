"""Ids from wherever they come, without blocking the event loop: a slow source delays no outcome."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from itertools import islice
from typing import Any, Final, TypeAlias

AnyIds: TypeAlias = Iterable[str | bytes] | AsyncIterable[str | bytes]

READ_AHEAD: Final = 10_000
"""Ids that a thread reads ahead of their being stored."""
SLOW_SECONDS: Final = 0.5
"""Time after which what a slow source has given is passed on."""
_LOOK_AGAIN: Final = 0.02
_END: Final = object()


async def in_chunks(ids: AnyIds, size: int) -> AsyncIterator[list[Any]]:
    """Yield the ids in lists of at most that size: shorter ones when the source takes its time."""
    if isinstance(ids, AsyncIterable):
        async for chunk in _of_async(ids, size):
            yield chunk
    elif isinstance(ids, (list, tuple)):
        rest = iter(ids)
        while chunk := list(islice(rest, size)):
            yield chunk
            await asyncio.sleep(0)  # a large collection must not block the event loop
    else:
        async for chunk in _of_thread(ids, size):
            yield chunk


async def _of_async(ids: AsyncIterable[Any], size: int) -> AsyncIterator[list[Any]]:
    iterator = aiter(ids)
    chunk: list[Any] = []
    following: asyncio.Task[Any] | None = None
    try:
        while True:
            following = following or asyncio.ensure_future(_next(iterator))
            await asyncio.wait({following}, timeout=SLOW_SECONDS if chunk else None)
            if following.done():
                execution_id, following = following.result(), None
                if execution_id is _END:
                    break
                chunk.append(execution_id)
            if chunk and (following is not None or len(chunk) >= size):
                yield chunk
                chunk = []
    finally:
        if following is not None:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
    if chunk:
        yield chunk


async def _next(iterator: AsyncIterator[Any]) -> Any:
    return await anext(iterator, _END)


async def _of_thread(ids: Iterable[Any], size: int) -> AsyncIterator[list[Any]]:
    reader = _Reader(ids)
    reader.start()
    chunk: list[Any] = []
    loop = asyncio.get_running_loop()
    begun = loop.time()
    try:
        while True:
            chunk += reader.take(size - len(chunk))
            is_over = reader.is_over
            if chunk and (len(chunk) == size or is_over or loop.time() - begun > SLOW_SECONDS):
                yield chunk
                chunk, begun = [], loop.time()
            elif is_over:
                break
            else:
                await asyncio.sleep(_LOOK_AGAIN)
    finally:
        reader.stop()
    if reader.error is not None:
        raise reader.error


class _Reader(threading.Thread):
    """Reads an iterable that may block."""

    def __init__(self, ids: Iterable[Any]) -> None:
        # A daemon, because a read of a terminal or a pipe cannot be interrupted.
        super().__init__(name="kaizen-async ids", daemon=True)
        self.error: BaseException | None = None
        self._ids = ids
        self._queue: queue.Queue[Any] = queue.Queue(READ_AHEAD)
        self._stopped = False
        self._has_ended = False

    @property
    def is_over(self) -> bool:
        """Whether all was taken."""
        return self._has_ended and self._queue.empty()

    def take(self, most: int) -> list[Any]:
        """Return what has been read, at most so many."""
        taken: list[Any] = []
        while len(taken) < most and not self._queue.empty():
            taken.append(self._queue.get_nowait())
        return taken

    def stop(self) -> None:
        """Read no more."""
        self._stopped = True
        self.take(READ_AHEAD)

    def run(self) -> None:
        """Read until the end."""
        try:
            for execution_id in self._ids:
                self._queue.put(execution_id)
                if self._stopped:
                    break
        except BaseException as error:  # noqa: BLE001 - it is raised where the ids are used
            self.error = error
        self._has_ended = True
