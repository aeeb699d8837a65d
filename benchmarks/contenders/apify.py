"""apify-client, over impit (Rust).

`ApifyClientAsync.http_client.call` is the method that its resources call, with `json=` for the body. The result is the
dict of `response.json()`, as in its resources. The client encodes the body in a worker thread.
"""

import contender
from apify_client import ApifyClientAsync
from apify_client.http_clients import HttpResponse


class Contender(contender.Contender):
    """The client with its own pool, timeouts and four retries, without a model."""

    title = "apify-client (no model)"

    async def setup(self) -> None:
        """Create the client."""
        self._url = f"{self.base_url}instructor/executions/get"
        self._http = ApifyClientAsync("key", api_url=self.base_url).http_client

    async def look_up(self, execution_id: str) -> str:
        """Call through the client."""
        return str((await self._call(execution_id)).json()["id"])

    async def _call(self, execution_id: str) -> HttpResponse:
        return await self._http.call(method="POST", url=self._url, json={"id": execution_id})

    async def close(self) -> None:
        """Close the client."""
        await self._http.aclose()
