"""Many look-ups: a bounded number of workers over the ids, however many these are. No task per id, no futures."""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sized
from itertools import islice
from typing import Any, Final, TypeAlias, TypeVar

from kaizen_async._streams import ResultStream
from kaizen_async.errors import ClientClosedError
from kaizen_async.outcomes import Outcome

T = TypeVar("T")

Ids: TypeAlias = Iterable[str] | AsyncIterable[str]
LookUp: TypeAlias = Callable[[str], Awaitable[Outcome[T]]]

READ_AHEAD: Final = 16
"""Outcomes that may wait for a slow consumer of a stream, beside the look-ups in flight. Some, so that the workers need
not stand still between two steps of a consumer who keeps up."""


def require_id(execution_id: object) -> str:
    """Return an id that can be asked for.

    Raises:
        TypeError: Not a string.
        ValueError: Empty, or no valid Unicode.
    """
    if not isinstance(execution_id, str):
        raise TypeError(f"an execution id must be a str, not {type(execution_id).__name__}: {execution_id!r:.80}")
    if not execution_id:
        raise ValueError("an execution id must not be empty; leave blank lines out of the ids")
    if not execution_id.isascii():
        try:
            execution_id.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"an execution id must be valid Unicode: {execution_id!r:.80}") from error
    return execution_id


def require_ids(ids: object) -> None:
    """Refuse what is no source of ids; above all a single string, whose characters would be taken for ids."""
    if isinstance(ids, (str, bytes)):
        raise TypeError(f"ids must be an iterable of ids, not one {type(ids).__name__}; pass [id], or use get(id)")
    if not isinstance(ids, (Iterable, AsyncIterable)):
        raise TypeError(f"ids must be an iterable or asynchronous iterable of ids, not {type(ids).__name__}")


class IdSource:
    """Hands the ids of a caller's iterable to many workers, one at a time.

    It ends with the iterable, with an error in it, or when nothing can be looked up any more. In the last case a
    collection (anything with a length) is still handed out to its end, so that each of its ids gets an outcome that
    says so; a generator, which may be endless, is not asked any further. That this is so because the client was closed
    is an error, lest whoever reads the outcomes take them for all there are.

    Args:
        ids: What the caller passed in.
        closed: Whether the client was closed.
        late: Whether the call's deadline passed.
        wait: Bounds a wait by the call's deadline and the client's closing; raises TimeoutError then.
    """

    def __init__(
        self,
        ids: Ids,
        *,
        closed: Callable[[], bool],
        late: Callable[[], bool],
        wait: Callable[[Awaitable[str | None]], Awaitable[str | None]],
    ) -> None:
        self.error: Exception | None = None
        self._exhausted = False
        self.is_collection = isinstance(ids, Sized) and isinstance(ids, Iterable)
        self._closed = closed
        self._late = late
        self._wait = wait
        self._lock = asyncio.Lock()
        self._ids = ids
        self._taken = 0
        self._iterator: Iterator[str] = iter(()) if isinstance(ids, AsyncIterable) else iter(ids)
        self._later: AsyncIterator[str] | None = aiter(ids) if isinstance(ids, AsyncIterable) else None

    async def take(self) -> str | None:
        """Return the next id, or None at the end. Never raises what the caller's iterable raises: see `error`."""
        if self._later is not None:
            async with self._lock:
                return await self._take_later(self._later)
        execution_id = self._take_now()
        self._taken += execution_id is not None
        return execution_id

    def _take_now(self) -> str | None:
        if self._exhausted or (not self.is_collection and self._is_cut_off()):
            return None
        try:
            return require_id(next(self._iterator))
        except StopIteration:
            self._exhausted = True
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the caller's, and gets there
            self._fail(error)
        return None

    async def _take_later(self, iterator: AsyncIterator[str]) -> str | None:
        if self._exhausted or self._is_cut_off():
            return None
        try:
            return await self._wait(self._pull(iterator))
        except TimeoutError:
            self._is_cut_off()
            self._exhausted = True
            return None

    async def _pull(self, iterator: AsyncIterator[str]) -> str | None:
        try:
            return require_id(await anext(iterator))
        except StopAsyncIteration:
            self._exhausted = True
        except Exception as error:  # noqa: BLE001 - as above; a TimeoutError among them is not ours
            self._fail(error)
        return None

    def _is_cut_off(self) -> bool:
        if self._closed():
            self._fail(ClientClosedError("the client was closed before all ids were taken"))
        return self._exhausted or self._late()

    def not_taken(self) -> list[str]:
        """Return what is left of a collection; nothing for any other source, since asking it would take it in."""
        if self.is_collection and isinstance(self._ids, Iterable):
            return list(islice(self._ids, self._taken, None))
        return []

    def _fail(self, error: Exception) -> None:
        self.error = error
        self._exhausted = True


async def collect_ids(source: IdSource) -> list[str]:
    """Return all ids of a source, or raise the error in it."""
    ids: list[str] = []
    while (execution_id := await source.take()) is not None:
        ids.append(execution_id)
    if source.error is not None:
        raise source.error
    return ids


async def look_up_all(ids: list[str], look_up: LookUp[T], workers: int) -> list[Outcome[T]]:
    """Return the outcomes of all ids, in their order. Equal ids share one look-up."""
    outcomes: dict[str, Outcome[T]] = {}
    todo = iter(dict.fromkeys(ids))

    async def work() -> None:
        for execution_id in todo:
            outcomes[execution_id] = await look_up(execution_id)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(workers, len(ids))):
                group.create_task(work())
    except BaseExceptionGroup as crash:
        # What a hook of the caller's session or record raised: out with it as from `get`, not in a group.
        raise crash.exceptions[0] from None
    return [outcomes[execution_id] for execution_id in ids]


class OutcomeStream(ResultStream[Outcome[T]]):
    """Outcomes as they come, in no order. Use it as `async with … as outcomes: async for outcome in outcomes`.

    Ids are taken from their source only as fast as outcomes are consumed, so memory stays bounded and a slow consumer
    slows the requests. Leaving the `async with` block stops all that is under way. An exception raised by the source,
    and the TypeError or ValueError of an invalid id, comes out of the loop after the outcomes already under way.
    """

    def __init__(self, source: IdSource, look_up: LookUp[T], workers: int) -> None:
        super().__init__()
        self._source = source
        self._look_up = look_up
        self._workers = workers
        self._room = asyncio.Semaphore(workers + READ_AHEAD)

    def _start(self) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(self._work()) for _ in range(self._workers)]

    def _take(self) -> Any:
        self._room.release()
        return super()._take()

    async def _work(self) -> None:
        while True:
            await self._room.acquire()
            execution_id = await self._source.take()
            if execution_id is None:
                self._fail(self._source.error)
                return
            self._put(await self._look_up(execution_id))
