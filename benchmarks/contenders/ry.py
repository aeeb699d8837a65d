"""ry, an asyncio client on reqwest, which is written in Rust."""

import contender
import msgspec
import ry
from shapes import LeanExecution


class Contender(contender.Contender):
    """A client with its own pool. Records are decoded as in the bare loop."""

    title = "ry (reqwest, in Rust) + msgspec"

    async def setup(self) -> None:
        """Create the client."""
        self._url = f"{self.base_url}instructor/executions/get"
        self._client = ry.Client(headers={"Authorization": "Bearer key", "Content-Type": "application/json"})
        self._encode = msgspec.json.Encoder().encode
        self._decode = msgspec.json.Decoder(LeanExecution).decode

    async def look_up(self, execution_id: str) -> str:
        """Fetch one."""
        response = await self._client.post(self._url, body=self._encode({"id": execution_id}))
        if not response.ok:
            raise RuntimeError(f"status {response.status}")
        return self._decode(await response.bytes()).id

    async def close(self) -> None:
        """Do nothing, because the client closes its connections when it is freed."""
