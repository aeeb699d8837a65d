"""Which status the executions that are waited for are in: a watch beside the wait, which shares its polls."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Self

from kaizen_async._cli.kinds import Execution
from kaizen_async.executions import Executions
from kaizen_async.outcomes import Change


class Statuses:
    """Counts what has not ended by its latest status.

    Args:
        executions: What the wait uses, so that the scheduler sees that one poll does for both.
        ids: Those waited for from the beginning.
        on_change: Called whenever the counts have changed.
        wanted: Whether anybody looks.
    """

    def __init__(
        self,
        executions: Executions[Execution],
        ids: Iterable[str],
        on_change: Callable[[], None],
        *,
        wanted: bool,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._executions = executions
        self._on_change = on_change
        self._wanted = wanted
        self._task: asyncio.Task[None] | None = None
        self._latest: dict[str, str] = {}
        self._ids: asyncio.Queue[str] = asyncio.Queue()
        for execution_id in ids:
            self.add(execution_id)

    def add(self, execution_id: str) -> None:
        """Watch an id too, as soon as whoever is running has begun to wait for it."""
        if self._wanted:
            self._ids.put_nowait(execution_id)

    async def __aenter__(self) -> Self:
        if self._wanted:
            self._task = asyncio.create_task(self._follow())
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _follow(self) -> None:
        async with self._executions.watch(self._endless_ids(), deadline=None) as changes:
            async for change in changes:
                self._note(change)
                self._on_change()

    async def _endless_ids(self) -> AsyncIterator[str]:
        while True:
            yield await self._ids.get()

    def _note(self, change: Change[Execution]) -> None:
        before = self._latest.pop(change.id, None)
        if before is not None:
            self.counts[before] -= 1
        if change.after is not None and not change.after.is_finished:
            self._latest[change.id] = change.after.status
            self.counts[change.after.status] += 1
