"""A taskiq broker for runs, for those who have none of their own."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final, cast

from redis import exceptions
from taskiq import AckableMessage, AsyncBroker
from taskiq_redis import RedisStreamBroker, RedisStreamClusterBroker, RedisStreamSentinelBroker

from kaizen_async.errors import printable
from kaizen_async.workers.store import DEFAULT_URL, close_sentinels, require_name, sentinels_of

log = logging.getLogger("kaizen_async.workers")

MOST_INVITATIONS: Final = 1000
"""Messages that the queue keeps. A lost invitation is sent again."""
_AGAIN: Final = 0.5
"""Seconds after which a worker listens again when Redis broke off."""


class _Steadfast:
    """Makes a broker listen again after Redis was away, where taskiq would end the worker process."""

    async def listen(self) -> AsyncGenerator[AckableMessage, None]:
        """Yield messages, for ever."""
        is_told = False
        while True:
            try:
                listening = cast("AsyncGenerator[AckableMessage, None]", super().listen())  # type: ignore[misc]
                async with aclosing(listening) as messages:
                    async for message in messages:
                        is_told = False
                        yield message
            except (exceptions.RedisError, OSError) as error:
                if not is_told:
                    log.warning("the queue of invitations is unreachable: %s; listening again", printable(str(error)))
                is_told = True
                await asyncio.sleep(_AGAIN)
                await self._declare_again()

    async def _declare_again(self) -> None:
        """Make the group again if it is gone with the data of a Redis that keeps none."""
        try:
            await self._declare_consumer_group()  # type: ignore[attr-defined]
        except (exceptions.RedisError, OSError):
            log.debug("the group of the queue cannot be made yet", exc_info=True)


class _StreamBroker(_Steadfast, RedisStreamBroker):
    """For one server."""


class _ClusterBroker(_Steadfast, RedisStreamClusterBroker):
    """For a cluster."""


class _SentinelBroker(_Steadfast, RedisStreamSentinelBroker):
    """For a primary that sentinels name."""

    async def shutdown(self) -> None:
        """Close the connections."""
        await super().shutdown()
        await close_sentinels(self.sentinel)


def create_broker(url: str = DEFAULT_URL, *, namespace: str = "kaizen") -> AsyncBroker:
    """Return a broker whose queue is in the Redis server that holds the runs.

    Args:
        url: See `kaizen_async.workers.connect`.
        namespace: As in `register`.

    Raises:
        TypeError, ValueError: An argument is invalid.
    """
    name = "{" + require_name("namespace", namespace) + "}:invitations"
    # From "0" on: what was sent before there was a group would be lost otherwise.
    settings: dict[str, Any] = {
        "queue_name": name,
        "consumer_group_name": "workers",
        "consumer_id": "0",
        "maxlen": MOST_INVITATIONS,
        "xread_block": 1000,
    }
    scheme, _, rest = url.partition("://")
    plain, _, kind = scheme.partition("+")
    if kind == "sentinel":
        found = sentinels_of(f"{plain}://{rest}")
        return _SentinelBroker(
            found.addresses, found.service, sentinel_kwargs=found.sentinel_settings, **settings, **found.settings
        )
    if kind == "cluster":
        return _ClusterBroker(f"{plain}://{rest}", **settings)
    return _StreamBroker(url, xread_count=10, unacknowledged_lock_timeout=10, **settings)


async def takes_unknown_tasks(broker: AsyncBroker) -> bool:
    """Return whether workers of a broker have taken all messages of its queue, if that can be known."""
    if not isinstance(broker, RedisStreamBroker):
        return False
    from redis.asyncio import Redis  # noqa: PLC0415

    try:
        async with Redis(connection_pool=broker.connection_pool) as redis:
            groups: Any = await redis.xinfo_groups(broker.queue_name)
            stream: Any = await redis.xinfo_stream(broker.queue_name)
    except (exceptions.RedisError, OSError):
        return False  # there is no queue yet, or Redis is away
    mine = [group for group in groups if group["name"] == broker.consumer_group_name.encode()]
    return any(group["consumers"] and group["last-delivered-id"] == stream["last-generated-id"] for group in mine)
