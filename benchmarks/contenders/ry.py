"""ry: reqwest, a client written in Rust, for asyncio."""

import contender
import msgspec
import ry
from shapes import LeanExecution


class Contender(contender.Contender):
    """One client with its own pool; its records are decoded as those of the bare loop are."""

    title = "ry (reqwest, in Rust) + msgspec"

    async def setup(self) -> None:
        """Make a client."""
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
        """Do nothing: the client closes its connections when it is freed."""
