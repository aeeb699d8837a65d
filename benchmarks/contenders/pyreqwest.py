"""pyreqwest: reqwest, a client written in Rust, for asyncio."""

import contender
import msgspec
from pyreqwest.client import ClientBuilder
from shapes import LeanExecution


class Contender(contender.Contender):
    """One client with its own pool; its records are decoded as those of the bare loop are."""

    title = "pyreqwest (reqwest, in Rust) + msgspec"

    async def setup(self) -> None:
        """Make a client."""
        self._url = f"{self.base_url}instructor/executions/get"
        headers = {"Authorization": "Bearer key", "Content-Type": "application/json"}
        self._client = ClientBuilder().default_headers(headers).build()
        self._encode = msgspec.json.Encoder().encode
        self._decode = msgspec.json.Decoder(LeanExecution).decode

    async def look_up(self, execution_id: str) -> str:
        """Fetch one."""
        request = self._client.post(self._url).body_bytes(self._encode({"id": execution_id})).build()
        response = await request.send()
        if response.status != 200:
            raise RuntimeError(f"status {response.status}")
        return self._decode(await response.bytes()).id

    async def close(self) -> None:
        """Close the client."""
        await self._client.close()
