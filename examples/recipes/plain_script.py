"""A plain script: `python plain_script.py exec_1 exec_2`."""

import asyncio
import sys

from kaizen_async import KaizenClient


async def main(ids: list[str]) -> None:
    """Print the status of each execution, or why there is none."""
    async with KaizenClient() as kaizen, kaizen.instructor_executions.stream(ids) as outcomes:
        async for outcome in outcomes:
            print(outcome.id, outcome.execution.status if outcome.execution else outcome.error)


asyncio.run(main(sys.argv[1:]))
