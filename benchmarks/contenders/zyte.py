"""zyte-api, over aiohttp and tenacity.

`AsyncZyteAPI.session().get(query, endpoint=...)` is its one lookup; its base address is set so that the endpoint `get`
is ours. Its session opens a new connection for each request, as shipped. The answer is a dict.
"""

import contender
from zyte_api import AsyncZyteAPI


class Contender(contender.Contender):
    """The client's own timeouts and retries; its limit of connections set to the concurrency; no model."""

    title = "zyte-api (no model)"

    async def setup(self) -> None:
        """Make the client and its session."""
        client = AsyncZyteAPI(api_key="key", api_url=f"{self.base_url}instructor/executions/", n_conn=self.concurrency)
        self._session = client.session()

    async def look_up(self, execution_id: str) -> str:
        """Get through the session."""
        return str((await self._session.get({"id": execution_id}, endpoint="get"))["id"])

    async def close(self) -> None:
        """Close the session."""
        await self._session.close()
