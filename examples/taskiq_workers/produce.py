"""Send ids to the workers and use the outcomes as they come: `python produce.py RUN < ids.txt`.

The same command again resumes the run, after a crash of whatever you like.
"""

import asyncio
import sys

from tasks import REDIS_URL, broker

from kaizen_async.workers import Run


async def main(name: str) -> None:
    """Print what became of each id of standard input."""
    await broker.startup()
    ids = filter(None, map(str.strip, sys.stdin))
    async with Run(name, broker=broker, url=REDIS_URL) as run, run.process(ids) as outcomes:
        async for outcome in outcomes:
            print(outcome.number, outcome.id, outcome.execution.status if outcome.execution else outcome.error)
    await broker.shutdown()


asyncio.run(main(sys.argv[1]))
