"""A real redis-server whose scripts see a test's virtual time."""

import asyncio
import random
from typing import Any

from redis import Redis

from kaizen_async.workers.store import Store, _text

CLOCK = """
local server, now = redis, tonumber(table.remove(ARGV))
local redis = setmetatable({call = function(name, ...)
    if name == 'TIME' then
        return {math.floor(now / 1000000), now % 1000000}
    end
    return server.call(name, ...)
end}, {__index = server})
"""
EPOCH = 1_700_000_000.0


class VirtualStore(Store):
    """A store in a virtual event loop. A call takes a little virtual time in each direction, drawn from the seed.

    Args:
        url: The URL of the server.
        namespace: The namespace of the keys.
        seed: The seed of the times.
        most: The longest time of one direction, in seconds.
    """

    def __init__(self, url: str, namespace: str, seed: int = 0, most: float = 0.001) -> None:
        super().__init__(url, namespace)
        self._random = random.Random(seed)
        self._most = most
        self._redis: Any = Redis.from_url(url)  # one that blocks: virtual time stands still while it works

    async def script(self, name: str, key: str, *args: Any) -> Any:
        """Run a script."""
        await self._travel()
        now = EPOCH + asyncio.get_running_loop().time()
        reply = self._redis.eval(CLOCK + _text(name), 1, key, *args, f"{now * 1e6:.0f}")
        await self._travel()
        return reply

    async def command(self, *words: Any) -> Any:
        """Send a command."""
        await self._travel()
        reply = self._redis.execute_command(*words)
        await self._travel()
        return reply

    async def _travel(self) -> None:
        await asyncio.sleep(self._random.uniform(0, self._most))

    async def aclose(self) -> None:
        """Close the connection."""
        self._redis.close()
        await super().aclose()
