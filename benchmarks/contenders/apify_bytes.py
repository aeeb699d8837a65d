"""apify-client with a body that the caller encodes, which avoids the worker thread.

Otherwise the same as `apify.py`.
"""

from apify_client.http_clients import HttpResponse
from contenders import apify


class Contender(apify.Contender):
    """The client in its fastest use."""

    title = "apify-client, body as bytes"

    async def _call(self, execution_id: str) -> HttpResponse:
        body = b'{"id": "%b"}' % execution_id.encode()
        return await self._http.call(
            method="POST", url=self._url, data=body, headers={"Content-Type": "application/json"}
        )
