"""zyte-api over aiohttp and tenacity.

`AsyncZyteAPI.session().get(query, endpoint=...)` is its only lookup. Its base address is set so that the endpoint `get`
is ours. By default, its session opens a new connection for each request. The result is a dict.
"""

import contender
from zyte_api import AsyncZyteAPI


class Contender(contender.Contender):
    """The client with its own timeouts and retries and `concurrency` connections, without a model."""

    title = "zyte-api (no model)"

    async def setup(self) -> None:
        """Create the client and its session."""
        client = AsyncZyteAPI(api_key="key", api_url=f"{self.base_url}instructor/executions/", n_conn=self.concurrency)
        self._session = client.session()

    async def look_up(self, execution_id: str) -> str:
        """Get through the session."""
        return str((await self._session.get({"id": execution_id}, endpoint="get"))["id"])

    async def close(self) -> None:
        """Close the session."""
        await self._session.close()
