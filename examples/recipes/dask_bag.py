"""Lookups as a step of a Dask bag: `python dask_bag.py exec_1 exec_2`.

Each partition is one call, so each worker process has one client at a time. The processes share nothing: divide
the number of requests in flight among them, as `concurrency` does here.
"""

import asyncio
import sys
from collections.abc import Iterable

import dask.bag

from kaizen_async import KaizenClient


def statuses(ids: Iterable[str]) -> list[tuple[str, str]]:
    """Return the status of each execution of a partition, or why there is none."""
    return asyncio.run(look_up(list(ids)))


async def look_up(ids: list[str]) -> list[tuple[str, str]]:
    """Return the same, from within an event loop."""
    async with KaizenClient(concurrency=20) as kaizen:  # retries and pauses are the client's
        outcomes = await kaizen.instructor_executions.get_many(ids)
    return [(one.id, one.execution.status if one.execution else str(one.error)) for one in outcomes]


if __name__ == "__main__":
    bag = dask.bag.from_sequence(sys.argv[1:], npartitions=2)
    for execution_id, status in bag.map_partitions(statuses).compute(scheduler="processes"):
        print(execution_id, status)
