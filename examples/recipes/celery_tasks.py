"""A Celery task that looks an execution up. Celery calls it synchronously, so each call runs an event loop of its own.

    celery -A celery_tasks worker --pool prefork
    python celery_tasks.py exec_1 exec_2

One client of the module serves all calls of a process, one loop after another. At the same time it would not: with
Celery's pool of threads, make a client in each call.
"""

import asyncio
import os
import sys

from celery import Celery  # type: ignore[import-untyped]

from kaizen_async import KaizenClient

redis_url = os.environ.get("REDIS_URL", "redis://localhost")
app = Celery("celery_tasks", broker=redis_url, backend=redis_url)
kaizen = KaizenClient()


@app.task  # type: ignore[untyped-decorator]
def status_of(execution_id: str) -> str:
    """Return the status of an execution."""
    return asyncio.run(look_up(execution_id))


async def look_up(execution_id: str) -> str:
    """Return the status of an execution, from within an event loop."""
    return (await kaizen.instructor_executions.get(execution_id)).status


if __name__ == "__main__":
    for result in [status_of.delay(execution_id) for execution_id in sys.argv[1:]]:
        print(result.get(timeout=60))
