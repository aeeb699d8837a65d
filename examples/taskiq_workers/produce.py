"""Send ids to the workers, and print the outcomes as they come.

Ids are read from files or standard input, one a line, as they are sent. The same command again goes on with the same
run: what has an outcome is not looked up again.
"""

import argparse
import asyncio
import fileinput
from collections.abc import AsyncIterator, Iterable, Iterator
from itertools import islice
from typing import Any

from redis.asyncio import Redis
from tasks import REDIS_URL, broker, look_up


def shards(ids: Iterable[str], size: int) -> Iterator[list[str]]:
    """Yield the ids in lists, reading one list ahead at most."""
    remaining = iter(ids)
    while shard := list(islice(remaining, size)):
        yield shard


async def produce(run: str, ids: Iterable[str], *, size: int, wait: bool) -> None:
    """Send all ids, then print their outcomes."""
    await broker.startup()
    count = 0
    for shard in shards(ids, size):
        count += 1
        await look_up.kiq(run, count, shard, wait=wait)
    async for outcome in outcomes(run, count):
        print(outcome)
    await broker.shutdown()


async def outcomes(run: str, count: int) -> AsyncIterator[str]:
    """Yield what is recorded for a run, until that many of its shards are done and all is yielded."""
    last = "0-0"
    async with Redis.from_url(REDIS_URL, decode_responses=True) as redis:
        while True:
            is_done = await redis.scard(f"kaizen:{run}:shards") >= count
            entries: Any = await redis.xrange(f"kaizen:{run}:outcomes", min=f"({last}", count=1000)
            for last, fields in entries:  # noqa: B007 - where the next look goes on
                yield fields["outcome"]
            if is_done and not entries:
                return
            if not entries:
                await asyncio.sleep(0.2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="a name for the run: its outcomes are kept by it")
    parser.add_argument("files", nargs="*", metavar="FILE", help="files of ids (default: standard input)")
    parser.add_argument("--size", type=int, default=500, metavar="N", help="ids in a shard (default: 500)")
    parser.add_argument("--wait", action="store_true", help="wait for each execution to end")
    asked = parser.parse_args()
    with fileinput.input(asked.files) as lines:
        ids = filter(None, map(str.strip, lines))
        asyncio.run(produce(asked.run, ids, size=asked.size, wait=asked.wait))
