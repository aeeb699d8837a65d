"""hedge-python on aiohttp with its defaults: the quantile 0.9, and at most 10 % of 100 requests per second."""

from contenders import bare_workers
from hedge import HedgeConfig
from hedge.transport._base import HedgeScheduler
from shapes import LeanExecution


class Contender(bare_workers.Contender):
    """The bare loop, with the scheduler of hedge-python around `session.post`.

    Its `HedgedAiohttpSession` sends a POST only once, because it cannot know that this POST only reads. Therefore the
    contender calls the scheduler as that session does for a GET.
    """

    title = "hedge-python on aiohttp, as shipped"
    config = HedgeConfig()

    async def setup(self) -> None:
        """Open a session and create the scheduler."""
        await super().setup()
        self._scheduler = HedgeScheduler(self.config)
        self._sketch = self._scheduler.sketch_for("server")

    async def _fetch(self, execution_id: str) -> LeanExecution:
        async def send() -> object:
            return await self._session.post(self._url, data=self._encode({"id": execution_id}))

        response = await self._scheduler.execute_with_hedge(
            key="server",
            primary_func=send,
            hedge_func=send,
            record_latency=lambda _, seconds: self._sketch.add(seconds),
            can_hedge=True,
        )
        async with response:
            response.raise_for_status()
            return self._decode(await response.read())

    async def close(self) -> None:
        """Close the scheduler and the session."""
        await self._scheduler.close()
        await super().close()
