"""Lookups and waits by workers on any number of machines. It needs the extra `workers`.

    broker = create_broker("redis://localhost")     # or your own taskiq broker
    register(broker)                                # the task; `taskiq worker MODULE:broker` runs it

    async with Run("invoices-2026-11", broker=broker) as run:
        await run.produce(ids)
        async with run.follow() as outcomes:
            async for outcome in outcomes: ...

Redis holds what is to be done, who does it, and what is done; taskiq brings workers to it. Every id ends with exactly
one outcome, whatever happens to workers, producers, readers and Redis in between.
"""

from kaizen_async.workers.broker import create_broker
from kaizen_async.workers.errors import (
    NoWorkersError,
    OtherInputError,
    RedisUnusableError,
    RunCancelledError,
    RunError,
    UnknownRunError,
)
from kaizen_async.workers.follower import Follower
from kaizen_async.workers.limit import SharedLimit
from kaizen_async.workers.run import Run, RunStatus
from kaizen_async.workers.session import Limits
from kaizen_async.workers.shards import RecordedError, RunOutcome
from kaizen_async.workers.store import Store, connect
from kaizen_async.workers.worker import register

__all__ = [
    "Follower",
    "Limits",
    "NoWorkersError",
    "OtherInputError",
    "RecordedError",
    "RedisUnusableError",
    "Run",
    "RunCancelledError",
    "RunError",
    "RunOutcome",
    "RunStatus",
    "SharedLimit",
    "Store",
    "UnknownRunError",
    "connect",
    "create_broker",
    "register",
]
