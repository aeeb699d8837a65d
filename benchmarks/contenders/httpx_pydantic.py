"""httpx and pydantic, used by hand: another common pair, without retries."""

import contender
import httpx
from pydantic import BaseModel
from shapes import pydantic_execution

Execution = pydantic_execution(BaseModel)


class Contender(contender.Contender):
    """A pool as large as the concurrency, and the response as a validated model."""

    title = "httpx + pydantic, by hand"
    slow = True

    async def setup(self) -> None:
        """Create the client."""
        self._client = httpx.AsyncClient(
            base_url=self.base_url,
            headers={"Authorization": "Bearer key"},
            limits=httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency),
        )

    async def look_up(self, execution_id: str) -> str:
        """Post a request and validate the response."""
        response = await self._client.post("instructor/executions/get", json={"id": execution_id})
        response.raise_for_status()
        return str(Execution.model_validate_json(response.content).id)

    async def close(self) -> None:
        """Close the client."""
        await self._client.aclose()
