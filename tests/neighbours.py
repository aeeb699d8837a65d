"""Run one package that patches aiohttp, in a process of its own: `neighbours.py NAME DIRECTORY`.

The client sends its first request before the package patches anything. Prints, as JSON, the heads of the requests that
the server got before and after, and what the package saw.
"""

import asyncio
import importlib
import json
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import aiohttp

from kaizen_async import KaizenClient

SAMPLE = (Path(__file__).parent / "samples" / "documented.json").read_bytes()
RECORD: dict[str, Any] = json.loads(SAMPLE)
ID: str = RECORD["id"]

Get = Callable[[], Awaitable[object]]


async def vcrpy(get: Get, url: str) -> object:
    """Record a cassette, and play it back."""
    del url
    vcr = importlib.import_module("vcr")
    cassette = f"{sys.argv[2]}/cassette.yaml"
    with vcr.use_cassette(cassette, record_mode="once"):
        await get()
    with vcr.use_cassette(cassette, record_mode="none") as played:
        await get()
    return played.play_count


class PatchedResponse(aiohttp.ClientResponse):
    """Has a writer, which mocks made for aiohttp before 3.14 do not give it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("stream_writer", mock.Mock(output_size=0))
        super().__init__(*args, **kwargs)


async def pook(get: Get, url: str) -> object:
    """Respond by a mock."""
    library = importlib.import_module("pook")
    interceptor = importlib.import_module("pook.interceptors.aiohttp")
    response = partial(interceptor.HTTPResponse, stream_writer=mock.Mock(output_size=0))
    with mock.patch.object(interceptor, "HTTPResponse", response), library.use():
        mocked = library.post(url).reply(200).json(RECORD).mock
        await get()
        return mocked.calls


async def aioresponses(get: Get, url: str) -> object:
    """Respond by a mock."""
    core = importlib.import_module("aioresponses.core")
    with mock.patch.object(core, "ClientResponse", PatchedResponse), core.aioresponses() as mocked:
        mocked.post(url, payload=RECORD)
        await get()
        return len(mocked.requests)


async def patched_request(get: Get, url: str) -> object:
    """Replace `ClientSession._request`."""
    del url
    with mock.patch("aiohttp.ClientSession._request", side_effect=aiohttp.ClientConnectionError("mocked")) as replaced:
        await get()
        return replaced.call_count


async def patched_post(get: Get, url: str) -> object:
    """Replace `ClientSession.post`."""
    del url
    with mock.patch("aiohttp.ClientSession.post", side_effect=aiohttp.ClientConnectionError("mocked")) as replaced:
        await get()
        return replaced.call_count


async def ddtrace(get: Get, url: str) -> object:
    """Trace with Datadog."""
    del url
    library = importlib.import_module("ddtrace")
    library.patch(aiohttp=True)
    with importlib.import_module("ddtrace.trace").tracer.trace("work"):
        await get()
    return None


async def elasticapm(get: Get, url: str) -> object:
    """Trace with Elastic APM."""
    del url
    library = importlib.import_module("elasticapm")
    client = library.Client(service_name="test", disable_send=True, cloud_provider="none", central_config=False)
    library.instrument()
    client.begin_transaction("work")
    await get()
    client.end_transaction("work", "success")
    client.close()
    return None


async def sentry_sdk(get: Get, url: str) -> object:
    """Trace with Sentry."""
    del url
    library = importlib.import_module("sentry_sdk")
    integration = importlib.import_module("sentry_sdk.integrations.aiohttp").AioHttpIntegration()
    library.init("http://key@127.0.0.1:9/1", traces_sample_rate=1.0, integrations=[integration], transport=mock.Mock())
    with library.start_transaction(name="work"):
        await get()
    return None


async def opentelemetry(get: Get, url: str) -> object:
    """Trace with OpenTelemetry."""
    del url
    trace = importlib.import_module("opentelemetry.sdk.trace")
    instrumentation = importlib.import_module("opentelemetry.instrumentation.aiohttp_client")
    instrumentation.AioHttpClientInstrumentor().instrument(tracer_provider=trace.TracerProvider())
    await get()
    return None


async def main() -> None:
    """Send one request, let the package patch, and send what it asks for."""
    heads: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                heads.append(head)
                length = int(head.partition("content-length: ")[2].split()[0])
                await reader.readexactly(length)
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(SAMPLE), SAMPLE))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    base_url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with KaizenClient("secret-key-of-the-user", base_url=base_url, deadline=5) as kaizen:

        async def get() -> object:
            [outcome] = await kaizen.instructor_executions.get_many([ID])
            return outcome

        await get()
        before = len(heads)
        seen = await globals()[sys.argv[1]](get, f"{base_url}/instructor/executions/get")
    server.close()
    sys.stdout.write(json.dumps({"before": before, "after": heads[before:], "seen": seen}) + "\n")


if __name__ == "__main__":
    asyncio.run(main())
