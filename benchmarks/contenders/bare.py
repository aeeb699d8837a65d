"""The usual hand-written loop: aiohttp, msgspec, a semaphore and a gather, without retries or deadlines."""

import asyncio
from collections.abc import Sequence
from time import perf_counter

import aiohttp
import contender
import msgspec
from shapes import LeanExecution


class Contender(contender.Contender):
    """One task for each id, all waiting for a semaphore. The records are returned in a list."""

    title = "bare aiohttp + msgspec, semaphore"

    async def setup(self) -> None:
        """Open a session and a semaphore that bounds the lookups in flight."""
        self._url = f"{self.base_url}instructor/executions/get"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            headers={"Authorization": "Bearer key", "Content-Type": "application/json"},
        )
        self._semaphore = asyncio.Semaphore(self.concurrency)
        self._encode = msgspec.json.Encoder().encode
        self._decode = msgspec.json.Decoder(LeanExecution).decode

    async def look_up(self, execution_id: str) -> str:
        """Fetch one."""
        return (await self._fetch(execution_id)).id

    async def _fetch(self, execution_id: str) -> LeanExecution:
        async with self._session.post(self._url, data=self._encode({"id": execution_id})) as response:
            response.raise_for_status()
            return self._decode(await response.read())

    async def run(self, ids: Sequence[str]) -> list[float]:
        """Gather a task for each id."""

        async def one(execution_id: str) -> tuple[LeanExecution, float]:
            async with self._semaphore:
                began = perf_counter()
                return await self._fetch(execution_id), perf_counter() - began

        found = await asyncio.gather(*(one(execution_id) for execution_id in ids))
        for execution_id, (record, _) in zip(ids, found, strict=True):
            contender.check(record.id, execution_id)
        return [seconds for _, seconds in found]

    async def close(self) -> None:
        """Close the session."""
        await self._session.close()
