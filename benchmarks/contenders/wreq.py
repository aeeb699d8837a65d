"""wreq: a client written in Rust, for asyncio."""

import os
from pathlib import Path

import contender
import msgspec
import wreq
from shapes import LeanExecution


class Contender(contender.Contender):
    """One client with its own pool; its records are decoded as those of the bare loop are."""

    title = "wreq (in Rust) + msgspec"

    async def setup(self) -> None:
        """Make a client."""
        self._url = f"{self.base_url}instructor/executions/get"
        authority = os.environ.get("SSL_CERT_FILE")
        headers = {"Authorization": "Bearer key", "Content-Type": "application/json"}
        self._client = wreq.Client(headers=headers, tls_verify=True if authority is None else Path(authority))
        self._encode = msgspec.json.Encoder().encode
        self._decode = msgspec.json.Decoder(LeanExecution).decode

    async def look_up(self, execution_id: str) -> str:
        """Fetch one."""
        response = await self._client.post(self._url, body=self._encode({"id": execution_id}))
        if not response.status.is_success():
            raise RuntimeError(f"status {response.status}")
        return self._decode(bytes(await response.bytes())).id

    async def close(self) -> None:
        """Do nothing: the client closes its connections when it is freed."""
