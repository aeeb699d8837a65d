"""kaizen_async, `get_many`."""

from collections import Counter
from collections.abc import Iterable, Sequence

import contender

from kaizen_async import KaizenClient


class Contender(contender.Contender):
    """A list of ids in and a list of outcomes out, with the default retries, gate and deadlines."""

    title = "kaizen_async get_many"

    async def setup(self) -> None:
        """Create the client."""
        self._client = KaizenClient(api_key="key", base_url=self.base_url, concurrency=self.concurrency)
        self.executions = self._client.instructor_executions

    async def look_up(self, execution_id: str) -> str:
        """Look up a list of one."""
        [outcome] = await self.executions.get_many([execution_id])
        return outcome.unwrap().id

    async def run(self, ids: Sequence[str]) -> list[float]:
        """Look up the list."""
        outcomes = await self.executions.get_many(ids)
        for execution_id, outcome in zip(ids, outcomes, strict=True):
            contender.check(outcome.unwrap().id, execution_id)
        return [outcome.elapsed for outcome in outcomes]

    async def keep(self, ids: Iterable[str]) -> object:
        """Keep the outcomes."""
        return await self.executions.get_many(ids)

    async def attempt(self, ids: Sequence[str], ends: Counter[str], *, in_flight: int | None) -> None:
        """Look up the list. The client keeps `concurrency` requests in flight, regardless of `in_flight`."""
        del in_flight
        for outcome in await self.executions.get_many(ids):
            ends["ok" if outcome.ok else type(outcome.error).__name__] += 1

    async def close(self) -> None:
        """Close the client."""
        await self._client.aclose()
