"""What workers do, and the broker that brings it to them."""

import asyncio
import os
from contextlib import suppress
from typing import Any, Final

import msgspec
from limiter import SharedLimit
from redis.asyncio import Redis
from taskiq import Context, TaskiqDepends, TaskiqEvents, TaskiqState
from taskiq.exceptions import SendTaskError
from taskiq_redis import RedisStreamBroker

from kaizen_async import ClientClosedError, DeadlineExceededError, KaizenClient, Outcome, RateLimitError

REDIS_URL: Final = os.environ.get("REDIS_URL", "redis://localhost")
RATE: Final = int(os.environ.get("KAIZEN_RATE", "100"))
"""Requests per second that all workers together send."""
SHARD_SECONDS: Final = float(os.environ.get("KAIZEN_SHARD_SECONDS", "240"))
"""How long a worker works on a shard; one not acknowledged a quarter of that later is given to another worker."""

RECORD: Final = """
if redis.call('SADD', KEYS[1], ARGV[1]) == 1 then
    redis.call('XADD', KEYS[2], '*', 'outcome', ARGV[2])
end
"""

broker = RedisStreamBroker(
    REDIS_URL,
    queue_name="kaizen:shards",
    consumer_group_name="kaizen",
    consumer_id="0",  # by "$", what was sent before there was a group would be nobody's
    xread_count=1,  # what a worker has read ahead no other can do, and all of it has to wait if this one is killed
    idle_timeout=round(SHARD_SECONDS * 1250),  # milliseconds: longer than a worker that lives may take
    unacknowledged_batch_size=2,  # the same holds for what is taken over from one that was killed
    unacknowledged_lock_timeout=SHARD_SECONDS,  # of the lock for taking over; without one it might stay locked
)


@broker.on_event(TaskiqEvents.WORKER_STARTUP)
async def start(state: TaskiqState) -> None:
    """Make what all tasks of a worker process share."""
    state.redis = Redis.from_url(REDIS_URL)
    state.record = state.redis.register_script(RECORD)
    limit = SharedLimit(state.redis, RATE)
    # No deadline for each look-up: how long it queues depends on all other workers. Its shard has one.
    state.kaizen = KaizenClient(deadline=None, limiter=limit.take_turn, on_event=limit.notice)
    state.nudging = asyncio.create_task(nudge())


@broker.on_event(TaskiqEvents.WORKER_SHUTDOWN)
async def stop(state: TaskiqState) -> None:
    """Give requests under way a moment. What they leave undone is left to another worker."""
    state.nudging.cancel()
    await state.kaizen.aclose(drain=5)
    await state.redis.aclose()


@broker.task(ack_type="manual")  # any other acknowledges a shard that failed, too
async def look_up(
    run: str,
    shard: int,
    ids: list[str],
    *,
    wait: bool = False,
    context: Context = TaskiqDepends(),  # noqa: B008 - how taskiq passes it in
) -> None:
    """Record an outcome for each id of a shard, and acknowledge the shard once each has one."""
    redis, executions = context.state.redis, context.state.kaizen.instructor_executions
    keys = [f"kaizen:{run}:ids", f"kaizen:{run}:outcomes"]
    known = await redis.smismember(keys[0], ids)
    left = [id for id, is_known in zip(ids, known, strict=True) if not is_known]
    missing = len(left)
    verb = executions.wait_many if wait else executions.stream
    async with verb(left, deadline=SHARD_SECONDS) as outcomes:
        async for outcome in outcomes:
            if is_final(outcome):
                await context.state.record(keys, [outcome.id, as_json(outcome)])
                missing -= 1
    if not missing:
        await redis.sadd(f"kaizen:{run}:shards", shard)
        await context.ack()


def is_final(outcome: Outcome[Any]) -> bool:
    """Return whether an outcome tells of the execution, and not only that this worker could not look it up by now."""
    undone = isinstance(outcome.error, ClientClosedError | DeadlineExceededError | RateLimitError)
    return outcome.ok or (outcome.attempts > 0 and not undone)


def as_json(outcome: Outcome[Any]) -> bytes:
    """Return the record, or the error that stands in its place."""
    return msgspec.json.encode(outcome.execution if outcome.ok else {"id": outcome.id, "error": str(outcome.error)})


async def nudge() -> None:
    """Send `tidy` from time to time: only after something new do workers look for what others left unacknowledged."""
    while True:
        await asyncio.sleep(SHARD_SECONDS / 50)
        with suppress(SendTaskError):
            await tidy.kiq()


@broker.task
async def tidy(context: Context = TaskiqDepends()) -> None:  # noqa: B008 - how taskiq passes it in
    """Delete what is acknowledged: everything before the oldest that is not, which may be this task itself."""
    redis = context.state.redis
    pending = await redis.xpending(broker.queue_name, broker.consumer_group_name)
    await redis.xtrim(broker.queue_name, minid=pending["min"])
