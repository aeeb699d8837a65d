"""kaizen_async, `get` in a gather."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from time import perf_counter

import contender
from contenders import ours_get_many


class Contender(ours_get_many.Contender):
    """Lookups as in a web app, with a task for each and `concurrency` tasks at a time."""

    title = "kaizen_async get, gathered"

    async def look_up(self, execution_id: str) -> str:
        """Get one."""
        return (await self.executions.get(execution_id)).id

    async def run(self, ids: Sequence[str]) -> list[float]:
        """Gather `concurrency` lookups, then the next ones."""

        async def one(execution_id: str) -> float:
            began = perf_counter()
            contender.check(await self.look_up(execution_id), execution_id)
            return perf_counter() - began

        seconds: list[float] = []
        for batch in contender.batches(ids, self.concurrency):
            seconds += await asyncio.gather(*(one(execution_id) for execution_id in batch))
        return seconds

    async def attempt(self, ids: Sequence[str], ends: Counter[str], *, in_flight: int | None) -> None:
        """Gather the lookups, all at once if requested. The client keeps `concurrency` requests in flight."""
        await contender.Contender.attempt(self, ids, ends, in_flight=in_flight)
