"""Recorders and mocks that patch aiohttp get requests that they can store."""

import asyncio
import copy
import pickle
from typing import Any
from unittest import mock

import aiohttp
from aiohttp.streams import EmptyStreamReader
from scripted_server import ScriptedServer, client_for, ok

from kaizen_async._transport.reading import Limits, read_body


async def test_a_recorder_gets_plain_bytes_and_text() -> None:
    """A recorder gets plain bytes and text, which it can store, for example as YAML. The request is sent unchanged."""
    seen: list[dict[str, Any]] = []
    genuine = aiohttp.ClientSession._request

    async def record(session: aiohttp.ClientSession, *args: Any, **options: Any) -> Any:
        seen.append(options)
        return await genuine(session, *args, **options)

    async with ScriptedServer(lambda request: [ok(request)]) as server:
        async with client_for(server, api_key="sk-secret-of-the-user") as client:
            with mock.patch("aiohttp.ClientSession._request", record):
                assert (await client.instructor_executions.get("a")).id == "a"
        assert server.requests[0].headers["authorization"] == "Bearer sk-secret-of-the-user"
    (options,) = seen
    assert {type(value) for value in options["headers"].values()} == {str}
    for stored in (copy.deepcopy(options["data"]), pickle.loads(pickle.dumps(options["data"]))):  # noqa: S301 - ours
        assert type(stored) is bytes
        assert stored == b'{"id":"a"}'


async def test_the_content_of_a_mock_is_read_although_it_is_at_its_end() -> None:
    """As the content of pook is, which has nothing but `read`."""

    class Content(EmptyStreamReader):
        async def read(self, n: int = -1) -> bytes:
            return b'{"id":"a"}'[:n] if n >= 0 else b'{"id":"a"}'

    answer, is_complete = await read_body(
        200, {}, Content(), Limits(100, 100, 10), is_packed=False, turn=asyncio.Lock()
    )
    assert (answer.body, is_complete) == (b'{"id":"a"}', True)
