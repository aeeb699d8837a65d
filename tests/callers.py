"""All the ways to look executions up, as functions of one shape.

Each function takes a client and ids, and returns a record or an error for each id.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from kaizen_async import KaizenClient, KaizenError

Caller = Callable[[KaizenClient, list[str]], Awaitable[list[Any]]]


async def caught(verb: Callable[[Any], Awaitable[Any]], argument: Any) -> Any:
    """Return the result of a call or its KaizenError. A cancellation is raised."""
    try:
        return await verb(argument)
    except KaizenError as error:
        return error


async def call_get(client: KaizenClient, ids: list[str]) -> list[Any]:
    """Get each id in its own task."""
    return await asyncio.gather(*(caught(client.instructor_executions.get, one) for one in ids))


async def call_get_many(client: KaizenClient, ids: list[str]) -> list[Any]:
    """Get all ids with one call."""
    outcomes = await client.instructor_executions.get_many(ids)
    assert [outcome.id for outcome in outcomes] == ids
    return [outcome.error or outcome.execution for outcome in outcomes]


async def call_stream(client: KaizenClient, ids: list[str]) -> list[Any]:
    """Stream a collection of ids."""
    async with client.instructor_executions.stream(ids) as outcomes:
        return [outcome.error or outcome.execution async for outcome in outcomes]


async def call_wait(client: KaizenClient, ids: list[str]) -> list[Any]:
    """Wait for each id in its own task."""
    return await asyncio.gather(*(caught(client.instructor_executions.wait, one) for one in ids))


async def call_wait_many(client: KaizenClient, ids: list[str]) -> list[Any]:
    """Wait for a collection of ids."""
    async with client.instructor_executions.wait_many(ids) as outcomes:
        return [outcome.error or outcome.execution async for outcome in outcomes]


async def call_watch(client: KaizenClient, ids: list[str]) -> list[Any]:
    """Watch a collection of ids, and return the final record or the error of each."""
    async with client.instructor_executions.watch(ids) as changes:
        seen = [change async for change in changes]
    return [change.error or change.after for change in seen if change.error or change.after.is_finished]


CALLERS: dict[str, Caller] = {
    "get": call_get,
    "get_many": call_get_many,
    "stream": call_stream,
    "wait": call_wait,
    "wait_many": call_wait_many,
    "watch": call_watch,
}
