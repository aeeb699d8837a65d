"""kaizen_async, `get_many` with hedging."""

from contenders import ours_get_many

from kaizen_async import HedgePolicy, KaizenClient


class Contender(ours_get_many.Contender):
    """`get_many` with the default `HedgePolicy`: the quantile 0.95, and at most 5 % of the lookups."""

    title = "kaizen_async get_many, hedged"

    async def setup(self) -> None:
        """Create the client."""
        self._client = KaizenClient(
            api_key="key", base_url=self.base_url, concurrency=self.concurrency, hedge=HedgePolicy()
        )
        self.executions = self._client.instructor_executions
