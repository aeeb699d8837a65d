"""openai over httpx2, with its default settings.

`AsyncOpenAI.post` is the method that its resources call. `cast_to` is a model based on `openai.BaseModel`, as in them.
"""

import contender
from openai import AsyncOpenAI, BaseModel
from shapes import pydantic_execution

Execution = pydantic_execution(BaseModel)


class Contender(contender.Contender):
    """The SDK with its own pool, timeouts and two retries."""

    title = "openai"
    slow = True

    async def setup(self) -> None:
        """Create the client."""
        self._client = self.make_client()

    def make_client(self) -> AsyncOpenAI:
        """Return the SDK's client."""
        return AsyncOpenAI(api_key="key", base_url=self.base_url)

    async def look_up(self, execution_id: str) -> str:
        """Post through the SDK."""
        found = await self._client.post("/instructor/executions/get", cast_to=Execution, body={"id": execution_id})
        return str(found.id)

    async def close(self) -> None:
        """Close the client."""
        await self._client.close()
