"""apify-client with the body encoded by the caller, which spares it the hop to a thread; else as `apify.py`."""

from apify_client.http_clients import HttpResponse
from contenders import apify


class Contender(apify.Contender):
    """The client as a caller in the know would use it."""

    title = "apify-client, body as bytes"

    async def _call(self, execution_id: str) -> HttpResponse:
        body = b'{"id": "%b"}' % execution_id.encode()
        return await self._http.call(
            method="POST", url=self._url, data=body, headers={"Content-Type": "application/json"}
        )
