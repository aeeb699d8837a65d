"""Recorders and mocks that patch aiohttp get requests that they can store."""

import copy
import pickle
from typing import Any
from unittest import mock

import aiohttp
from scripted_server import ScriptedServer, client_for, ok


async def test_a_recorder_gets_plain_bytes_and_text() -> None:
    """It stores copies, in YAML for instance, which does not know our classes. The request itself is sent as usual."""
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
