"""Ending background tasks."""

import asyncio
from typing import Any, Final

AGAIN: Final = 0.2
"""Seconds after which a task that still runs is cancelled again."""


async def end(*tasks: "asyncio.Task[Any] | None") -> None:
    """Cancel tasks and wait until they have ended.

    More than once if need be: a cancellation that meets redis-py while it connects may be lost.
    """
    given = {task for task in tasks if task is not None}
    running = {task for task in given if not task.done()}
    while running:
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=AGAIN)
    for task in given:
        if not task.cancelled():
            task.exception()  # else asyncio logs that nobody looked at it
