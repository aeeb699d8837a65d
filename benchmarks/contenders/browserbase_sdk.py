"""browserbase over httpx, with its default settings.

`AsyncBrowserbase.post` is the method that its resources call. `cast_to` is a model based on `browserbase.BaseModel`, as
in its resources.
"""

import contender
from browserbase import AsyncBrowserbase, BaseModel
from shapes import pydantic_execution

Execution = pydantic_execution(BaseModel)


class Contender(contender.Contender):
    """The SDK with its own pool (100 connections, 20 kept alive), timeouts and two retries."""

    title = "browserbase"
    slow = True

    async def setup(self) -> None:
        """Create the client."""
        self._client = AsyncBrowserbase(api_key="key", base_url=self.base_url)

    async def look_up(self, execution_id: str) -> str:
        """Post through the SDK."""
        found = await self._client.post("/instructor/executions/get", cast_to=Execution, body={"id": execution_id})
        return str(found.id)

    async def close(self) -> None:
        """Close the client."""
        await self._client.close()
