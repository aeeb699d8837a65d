"""One rate limit for the workers of all machines, kept in Redis."""

import asyncio
from typing import Any, Final

from pyrate_limiter import Duration, Limiter, Rate, RedisStateStore, SingleBucketFactory, StateBucket
from redis.asyncio import Redis

from kaizen_async.events import Event, Gated

RATE_KEY: Final = "kaizen:rate"
PAUSE_KEY: Final = "kaizen:pause"


class SharedLimit:
    """Keeps what all workers send together below a rate, and holds them all while the server throttles one."""

    def __init__(self, redis: Redis, per_second: int) -> None:
        rate = Rate(per_second, Duration.SECOND, burst=max(1, per_second // 10))
        bucket = StateBucket([rate], store=RedisStateStore(redis, RATE_KEY))
        # To leak is to drop old entries, of which this bucket has none: without this, a thread would do nothing.
        self._limiter = Limiter(SingleBucketFactory(bucket, schedule_leak=False))
        self._redis = redis
        self._telling: set[asyncio.Task[Any]] = set()

    async def take_turn(self) -> None:
        """Wait until a request may be sent: the client's `limiter`."""
        await self._limiter.try_acquire_async()
        while (milliseconds := await self._redis.pttl(PAUSE_KEY)) > 0:
            await asyncio.sleep(milliseconds / 1000)
            await self._limiter.try_acquire_async()

    def notice(self, event: Event) -> None:
        """Let a pause that the server asked this worker for hold the others: the client's `on_event`."""
        if isinstance(event, Gated):
            task = asyncio.ensure_future(self._redis.set(PAUSE_KEY, "", px=max(1, round(event.pause * 1000))))
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)
