"""kaizen_async, `stream`."""

from collections.abc import Iterable, Sequence

import contender
from contenders import ours_get_many


class Contender(ours_get_many.Contender):
    """An iterable of ids in and outcomes out as they complete, without keeping them."""

    title = "kaizen_async stream"
    lazy = True

    async def run(self, ids: Sequence[str]) -> list[float]:
        """Read the outcomes as they complete."""
        seconds = []
        async with self.executions.stream(ids) as outcomes:
            async for outcome in outcomes:
                contender.check(outcome.unwrap().id, outcome.id)
                seconds.append(outcome.elapsed)
        return seconds

    async def keep(self, ids: Iterable[str]) -> object:
        """Read all outcomes and keep none."""
        async with self.executions.stream(ids) as outcomes:
            async for outcome in outcomes:
                outcome.unwrap()
        return None
