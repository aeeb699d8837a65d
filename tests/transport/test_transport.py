"""A single HTTP attempt: what the server receives, what the client reads, and how aiohttp's errors are translated."""

import asyncio
import base64
import functools
import gzip
import inspect
import itertools
import json
import pickle
import ssl
import traceback
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from unittest import mock

import aiohttp
import brotli
import pytest
from aiohttp import http_exceptions
from scripted_server import (
    CLOSE,
    LOOPS,
    SILENCE,
    Request,
    Script,
    ScriptedServer,
    client_for,
    ok,
    record,
    response,
    run_on,
    traces_of,
)
from yarl import URL

from kaizen_async import (
    ClientClosedError,
    DecodeError,
    KaizenError,
    StatusError,
    TransportError,
    __version__,
)
from kaizen_async._transport import session as session_post
from kaizen_async._transport import transport
from kaizen_async._transport.pool import Pool
from kaizen_async._transport.proxies import parse_proxy
from kaizen_async._transport.transport import Answer, Secret, Transport, request_headers, translate
from kaizen_async._transport.wire import request_body

KEY = "s3cr3t-key"


@asynccontextmanager
async def own_session(**settings: Any) -> AsyncIterator[Transport]:
    """Yield a transport that opens its own session and uses its own connections."""
    made = Transport(headers=request_headers(KEY), max_response_bytes=100_000, **settings)
    try:
        yield made
    finally:
        await made.close()


@asynccontextmanager
async def own_session_the_long_way(**settings: Any) -> AsyncIterator[Transport]:
    """Yield a transport that opens its own session on a version of aiohttp that its own connections do not support."""
    with mock.patch.object(transport, "is_supported", return_value=False):
        async with own_session(**settings) as made:
            yield made


@asynccontextmanager
async def given_session(**settings: Any) -> AsyncIterator[Transport]:
    """Yield a transport that uses a passed-in session."""
    async with aiohttp.ClientSession() as session, own_session(session=session, **settings) as made:
        yield made


WAYS = [own_session, own_session_the_long_way, given_session]
EVERY_WAY = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


async def send(sender: Transport, server: ScriptedServer, path: str = "get", execution_id: str = "a") -> Answer:
    """Send one request."""
    answer = await sender.send(URL(server.url) / path, request_body(execution_id), lambda: False)
    assert answer is not None
    return answer


async def refusal(sender: Transport, server: ScriptedServer) -> KaizenError:
    """Return the error that sending raises."""
    with pytest.raises(KaizenError) as caught:
        await send(sender, server)
    return caught.value


@EVERY_WAY
async def test_a_request_is_a_json_post_with_our_headers(way: Callable[..., Any]) -> None:
    """Every kind of transport sends the same JSON POST with the same headers."""
    async with ScriptedServer() as server, way() as sender:
        answer = await send(sender, server, "prefix/get it")
        assert answer.status == 200
        assert json.loads(answer.body)["id"] == "a"
        assert answer.headers["content-type"] == answer.headers["Content-Type"] == "application/json"
        (request,) = server.requests
        headers = dict(request.headers)
        assert headers.pop("host") == f"127.0.0.1:{server.port}"
        assert headers.pop("user-agent") == f"kaizen_async/{__version__} aiohttp/{aiohttp.__version__}"
        assert headers.pop("authorization") == f"Bearer {KEY}"
        assert headers.pop("accept") == headers.pop("content-type") == "application/json"
        assert headers.pop("content-length") == str(len(request_body("a")))
        assert "gzip" in headers.pop("accept-encoding")
        assert headers == {}
        assert request.target == "/prefix/get%20it"
        assert request.id == "a"


def test_without_a_key_no_authorization_is_sent() -> None:
    """Without a key, the headers have no Authorization."""
    assert "Authorization" not in request_headers(None)
    assert request_headers("k")["Authorization"] == "Bearer k"


def test_the_key_shows_in_no_repr() -> None:
    """The repr of the headers does not show the key."""
    assert KEY not in repr(request_headers(KEY))
    assert KEY not in f"{request_headers(KEY)}"
    assert Secret("x") == "x"


@EVERY_WAY
async def test_connections_are_kept_and_used_again(way: Callable[..., Any]) -> None:
    """The client reuses a connection after responses of every kind, including errors with a body."""
    replies = [
        ok,
        lambda _: response({"message": "no"}, 500),
        lambda _: response(b"", 204, {"Content-Length": "0"}),
        lambda _: b"HTTP/1.1 204 No Content\r\n\r\n",
        lambda _: b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n",
        lambda _: b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n{}\n\r\n0\r\n\r\n",
        lambda request: b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n" + ok(request),
        ok,
    ]
    numbers = itertools.count()

    def play(request: Request) -> Script:
        return [replies[next(numbers)](request)]

    async with ScriptedServer(play) as server, way() as sender:
        statuses = [(await send(sender, server)).status for _ in replies]
        assert statuses == [200, 500, 204, 204, 304, 200, 200, 200]
        assert server.connections == 1


@pytest.mark.parametrize("way", [own_session, own_session_the_long_way], ids=lambda way: way.__name__)
async def test_as_many_connections_are_opened_as_there_are_requests_at_once(way: Callable[..., Any]) -> None:
    """The number of connections has no limit below the client's own, although aiohttp's default is 100."""
    async with ScriptedServer(lambda _: [SILENCE]) as server, way() as sender:
        tasks = [asyncio.create_task(send(sender, server, execution_id=f"e{n}")) for n in range(110)]
        await server.until(lambda: len(server.requests) == 110)
        assert server.connections == 110
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await server.until(lambda: not server.open)


@EVERY_WAY
async def test_cookies_of_the_server_are_not_sent_back(way: Callable[..., Any]) -> None:
    """The client does not send cookies back to the server."""

    def play(request: Request) -> Script:
        return [response(record(request.id), headers={"Set-Cookie": "session=1"})]

    async with ScriptedServer(play) as server, way() as sender:
        for _ in range(2):
            await send(sender, server)
        assert "cookie" not in server.requests[1].headers


PACKINGS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress, "br": brotli.compress}


@EVERY_WAY
@pytest.mark.parametrize("packing", PACKINGS)
async def test_packed_responses_are_unpacked(way: Callable[..., Any], packing: str) -> None:
    """The client unpacks responses in every encoding that it announces."""

    def play(request: Request) -> Script:
        packed = PACKINGS[packing](json.dumps(record(request.id)).encode())
        return [response(packed, headers={"Content-Encoding": packing})]

    async with ScriptedServer(play) as server, way() as sender:
        assert json.loads((await send(sender, server)).body)["id"] == "a"
        assert packing in server.requests[0].headers["accept-encoding"]


@functools.cache
def bomb(packing: str) -> bytes:
    """Return a small body that unpacks to 20 MB."""
    return PACKINGS[packing](b"[" + b" " * 20_000_000)


@EVERY_WAY
@pytest.mark.parametrize("packing", PACKINGS)
async def test_a_response_that_unpacks_to_too_much_is_refused(way: Callable[..., Any], packing: str) -> None:
    """The client refuses a response that would unpack to 20 MB, without using the memory or the time."""

    def play(_: Request) -> Script:
        return [response(bomb(packing), headers={"Content-Encoding": packing})]

    async with ScriptedServer(play) as server, way() as sender:
        error = await refusal(sender, server)
        assert isinstance(error, DecodeError)
        assert error.reason == "the response is larger than max_response_bytes (100000)"
        assert error.path == "$"
        assert len(error.body) == 4096
        assert not error.retryable


@EVERY_WAY
async def test_the_largest_allowed_response_is_accepted(way: Callable[..., Any]) -> None:
    """A response of exactly max_response_bytes is accepted, and one more byte is refused."""
    sizes = iter([100_000, 100_001])

    def play(_: Request) -> Script:
        return [response(b"x" * next(sizes))]

    async with ScriptedServer(play) as server, way() as sender:
        assert len((await send(sender, server)).body) == 100_000
        assert isinstance(await refusal(sender, server), DecodeError)


@EVERY_WAY
async def test_of_an_endless_error_only_the_beginning_is_read(way: Callable[..., Any]) -> None:
    """The client reads only the beginning of an endless error body, because it needs only the status."""

    def play(_: Request) -> Script:
        return [b"HTTP/1.1 502 Bad Gateway\r\n\r\n" + b"x" * 300_000, SILENCE]

    async with ScriptedServer(play) as server, way() as sender:
        answer = await send(sender, server)
        assert answer.status == 502
        assert 65_536 < len(answer.body) < 300_000
        await server.until(lambda: not server.open)


@EVERY_WAY
async def test_a_body_that_comes_in_pieces_is_put_together(way: Callable[..., Any]) -> None:
    """A body that arrives in pieces is complete and in order."""
    whole = bytes(range(256)) * 100

    def play(_: Request) -> Script:
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(whole)}\r\n\r\n".encode()
        pieces = [whole[i : i + 5000] for i in range(0, len(whole), 5000)]
        return [head, *itertools.chain.from_iterable((0.002, piece) for piece in pieces)]

    async with ScriptedServer(play) as server, way() as sender:
        assert (await send(sender, server)).body == whole


@EVERY_WAY
@pytest.mark.parametrize("body", [b"", b"{}"])
async def test_bytes_after_a_response_make_it_invalid(way: Callable[..., Any], body: bytes) -> None:
    """Bytes after a response raise a TransportError, because the client cannot know which part is the response."""

    def play(_: Request) -> Script:
        return [response(body, headers={"Content-Length": str(len(body))}) + b"left over", SILENCE]

    async with ScriptedServer(play) as server, way() as sender:
        error = await refusal(sender, server)
        assert isinstance(error, TransportError)
        assert error.garbled
        await server.until(lambda: not server.open)


@EVERY_WAY
async def test_a_cancelled_request_closes_its_connection(way: Callable[..., Any]) -> None:
    """A cancelled request closes its connection, so that no later request reads the rest of its response."""
    scripts: list[Script] = [[SILENCE], [b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", SILENCE]]
    numbers = itertools.count()

    def play(request: Request) -> Script:
        number = next(numbers)
        return scripts[number] if number < len(scripts) else [ok(request)]

    async with ScriptedServer(play) as server, way() as sender:
        for number in range(len(scripts)):
            task = asyncio.create_task(send(sender, server))
            await server.until(lambda wanted=number + 1: len(server.requests) == wanted)
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await server.until(lambda: not server.open)
        assert (await send(sender, server)).status == 200


async def test_a_session_of_our_own_is_opened_by_the_first_request_and_closed_once() -> None:
    """The first request opens the session, and closing it twice is harmless."""
    async with ScriptedServer() as server:
        sender = Transport(headers=request_headers(None), max_response_bytes=1000)
        assert not sender.is_open
        await sender.close()
        await send(sender, server)
        assert sender.is_open
        assert server.open == 1
        await sender.close()
        assert not sender.is_open
        await sender.close()
        await server.until(lambda: not server.open)


async def test_a_session_that_was_passed_in_is_left_open() -> None:
    """The transport does not close a session that is passed in."""
    async with ScriptedServer() as server, aiohttp.ClientSession() as session:
        sender = Transport(headers=request_headers(None), max_response_bytes=1000, session=session)
        await send(sender, server)
        assert not sender.is_open
        await sender.close()
        assert not session.closed
        await send(sender, server)


async def test_a_session_that_was_passed_in_keeps_its_ways() -> None:
    """The headers, tracing and connector of a passed-in session apply. Its timeout and redirects do not."""
    seen = []

    async def on_request_start(*_: Any) -> None:
        seen.append("start")

    tracing = aiohttp.TraceConfig()
    tracing.on_request_start.append(on_request_start)

    def play(request: Request) -> Script:
        return [0.1, response(b"", 302, {"Location": "/elsewhere"}) if request.number == 1 else ok(request)]

    timeout = aiohttp.ClientTimeout(total=0.01)
    session = aiohttp.ClientSession(
        headers={"X-Team": "blue"}, timeout=timeout, trace_configs=[tracing], raise_for_status=True
    )
    async with ScriptedServer(play) as server, session, own_session(session=session) as sender:
        assert (await send(sender, server)).status == 302
        assert (await send(sender, server)).status == 200
        assert server.requests[0].headers["x-team"] == "blue"
        assert [request.target for request in server.requests] == ["/get", "/get"]
        assert seen == ["start", "start"]


async def test_a_closed_session_is_reported() -> None:
    """A closed passed-in session raises a ClientClosedError, not an error of the network."""
    session = aiohttp.ClientSession()
    await session.close()
    async with ScriptedServer() as server, own_session(session=session) as sender:
        error = await refusal(sender, server)
        assert isinstance(error, ClientClosedError)
        assert error.reason == "the aiohttp session is closed"
        assert isinstance(error.__cause__, RuntimeError)


async def test_an_error_in_the_callers_tracing_fails_one_lookup() -> None:
    """An error in the caller's tracing fails the lookup without a retry, as the cause of a TransportError."""

    async def buggy(*_: Any) -> None:
        raise RuntimeError("my bug")

    tracing = aiohttp.TraceConfig()
    tracing.on_request_start.append(buggy)
    session = aiohttp.ClientSession(trace_configs=[tracing])
    async with ScriptedServer() as server, session, own_session(session=session) as sender:
        with pytest.raises(TransportError, match="the session raised RuntimeError: my bug") as caught:
            await send(sender, server)
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert not caught.value.retryable


async def test_a_bug_of_the_library_is_raised_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug in the library raises its own error and not a TransportError."""
    monkeypatch.setattr(Pool, "open", mock.Mock(side_effect=ZeroDivisionError))
    async with ScriptedServer() as server, own_session() as sender:
        with pytest.raises(ZeroDivisionError):
            await send(sender, server)


async def test_a_held_request_is_not_sent() -> None:
    """A held request is not sent, and its new connection serves the next request."""
    async with ScriptedServer() as server, own_session() as sender:
        assert await sender.send(URL(server.url) / "get", request_body("a"), lambda: True) is None
        assert server.requests == []
        await send(sender, server)
        assert (len(server.requests), server.requests[0].connection) == (1, 1)


async def test_a_large_response_is_refused_with_its_beginning() -> None:
    """The error for a large response keeps the beginning of its body."""
    answer = response(b'{"head":' + b"x" * 300_000)
    async with ScriptedServer(lambda _: [answer]) as server, own_session() as sender:
        error = await refusal(sender, server)
        assert isinstance(error, DecodeError)
        assert error.body.startswith(b'{"head":xxx')


PROXIED = pytest.mark.parametrize("way", [own_session, own_session_the_long_way], ids=lambda way: way.__name__)


@PROXIED
async def test_a_proxy_gets_the_whole_request(way: Callable[..., Any]) -> None:
    """A proxy gets the whole URL, the key for the server, and its own credentials."""
    async with ScriptedServer() as proxy, ScriptedServer() as server:
        async with way(proxy=parse_proxy(f"http://me:pass%20word@127.0.0.1:{proxy.port}", "proxy")) as sender:
            await send(sender, server)
        (request,) = proxy.requests
        assert request.target == f"{server.url}/get"
        assert request.headers["authorization"] == f"Bearer {KEY}"
        assert request.headers["proxy-authorization"] == "Basic " + base64.b64encode(b"me:pass word").decode()
        assert not server.requests


@PROXIED
@pytest.mark.parametrize(("status", "retryable"), [(407, False), (401, False), (403, False), (502, True), (503, True)])
async def test_a_refusal_of_the_proxy_is_an_error_of_the_proxy(
    way: Callable[..., Any], status: int, retryable: bool
) -> None:
    """The proxy's refusal of CONNECT is reported as such, without a password. Its status decides whether to retry."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status} Go away, c2VjcmV0 s3cret-pass\r\nContent-Length: 0\r\n\r\n".encode())
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        async with way(proxy=parse_proxy(f"me:s3cret-pass@127.0.0.1:{port}", "proxy")) as sender:
            with pytest.raises(TransportError) as caught:
                await sender.send(URL("https://api.test/get"), request_body("a"), lambda: False)
    assert caught.value.reason.startswith(f"the proxy answered {status} Go away")
    assert ("password of the proxy" in caught.value.reason) == (status in {401, 407})
    assert caught.value.retryable is retryable
    assert not caught.value.garbled
    shown = traces_of(caught.value)
    assert KEY not in shown
    assert "s3cret-pass" not in shown


@EVERY_WAY
async def test_errors_of_the_network_show_no_key(way: Callable[..., Any]) -> None:
    """An error of the network shows no key in its text, traceback, causes or pickle."""

    def play(_: Request) -> Script:
        return [b"HTTP/1.1 200 OK\r\nContent-Length: nonsense\r\n\r\n", CLOSE]

    async with ScriptedServer(play) as server, way() as sender:
        error = await refusal(sender, server)
        assert isinstance(error, TransportError)
        assert error.garbled
        assert error.__cause__ is not None
        shown = [str(error), repr(error), "".join(traceback.format_exception(error)), repr(error.__cause__)]
        shown.append(repr(vars(error.__cause__)))
        assert not [text for text in shown if KEY in text]
        assert KEY.encode() not in pickle.dumps(error)


async def test_a_connection_lost_before_the_request() -> None:
    """A connection lost before the request has its own error, because nothing was sent."""
    async with ScriptedServer() as server, own_session() as sender:
        await send(sender, server)
        target = sender._pool.target(URL(server.url) / "get")
        connection = sender._pool.take(target, sender._pool.now())
        connection.transport.abort()
        await server.until(lambda: not server.open)
        assert await connection.exchange(b"", request_body("b"), sender._pool.now()) is None
        with pytest.raises(aiohttp.ClientConnectionResetError, match="before the request"):
            await connection.finish()
        sender._pool.discard(connection)
        assert len(server.requests) == 1


def test_own_connections_need_a_tested_version_of_aiohttp() -> None:
    """The client uses its own connections only on tested versions of aiohttp, and aiohttp's on others."""
    assert session_post.is_supported()
    assert session_post.is_supported("3.14.99")
    assert not session_post.is_supported("3.12.0")
    assert not session_post.is_supported("4.0.0")


def instance_of(cls: type[BaseException]) -> BaseException:
    """Return an exception of aiohttp's, created with the arguments that its constructor needs."""
    key = mock.Mock(host="h", port=1, ssl=None, is_ssl=False)
    info = aiohttp.RequestInfo(URL("http://h"), "POST", mock.MagicMock(), URL("http://h"))
    known = {
        "connection_key": key,
        "os_error": OSError(111, "refused"),
        "certificate_error": ssl.SSLCertVerificationError(1, "expired"),
        "request_info": info,
        "history": (),
        "expected": b"x",
        "got": b"y",
        "host": "h",
        "port": 1,
        "path": "/socket",
        "url": "http://h",
        "line": "x",
        "limit": "5",
        "actual_size": "6",
        "hdr": "X",
        "msg": "no",
    }
    constructor = next((vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base)), None)
    if not inspect.isfunction(constructor):
        return cls(5, "no")
    wanted = list(inspect.signature(constructor).parameters.values())[1:]
    required = (p.name for p in wanted if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD)
    return cls(*(known.get(name, "no") for name in required))


def exceptions_of(module: Any, base: type[BaseException]) -> list[type[BaseException]]:
    """Return the exception classes of a module."""
    found = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, base)]
    return sorted(set(found), key=lambda cls: cls.__name__)


FOREIGN = [
    *exceptions_of(aiohttp, aiohttp.ClientError),
    *exceptions_of(http_exceptions, http_exceptions.HttpProcessingError),
    *(OSError, ConnectionResetError, BrokenPipeError, TimeoutError, ssl.SSLError, ssl.SSLCertVerificationError),
]


@pytest.mark.parametrize("cls", FOREIGN, ids=lambda cls: cls.__name__)
def test_every_error_of_aiohttp_has_one_of_ours(cls: type[Exception]) -> None:
    """Every error of aiohttp, also of later versions, is translated to a TransportError."""
    error = translate(instance_of(cls))  # type: ignore[arg-type]
    assert type(error) is TransportError
    certain = issubclass(
        cls,
        (
            aiohttp.ClientConnectorCertificateError,
            aiohttp.ClientHttpProxyError,
            aiohttp.InvalidURL,
            ssl.SSLCertVerificationError,
        ),
    )
    assert error.retryable is not certain
    assert error.reason
    assert "\n" not in error.reason


@pytest.mark.parametrize(
    ("foreign", "disconnected"),
    [
        (aiohttp.ServerDisconnectedError(), True),
        (ConnectionResetError(104, "reset"), True),
        (BrokenPipeError(32, "pipe"), True),
        (aiohttp.ClientOSError(104, "reset"), True),
        (aiohttp.ClientOSError(None, "Can not write request body"), True),
        (OSError(113, "no route"), False),
        (instance_of(aiohttp.ClientConnectorError), False),
        (aiohttp.ClientPayloadError("cut"), False),
        (aiohttp.ClientConnectionError("?"), False),
    ],
)
def test_a_dropped_connection_is_marked(foreign: Exception, disconnected: bool) -> None:
    """The error of a dropped connection is marked, because its first retry does not wait."""
    error = translate(foreign)
    assert isinstance(error, TransportError)
    assert error.disconnected is disconnected
    assert not error.garbled


def test_an_empty_error_text_becomes_the_class_name() -> None:
    """An error without a text gets the name of its class as its text."""
    assert translate(aiohttp.ClientConnectionError()).reason == "the connection failed: ClientConnectionError"


def test_a_missing_codec_is_not_retried() -> None:
    """A response in an encoding whose package is missing is not retried, because the next one would have it too."""
    foreign = aiohttp.ClientPayloadError("400")
    foreign.__cause__ = http_exceptions.ContentEncodingError("Can not decode br. Please install `Brotli`")
    error = translate(foreign)
    assert error.reason == "the response does not unpack: Can not decode br. Please install `Brotli`"
    assert not error.retryable


@pytest.mark.parametrize("loop", LOOPS)
def test_an_early_response_is_used(loop: str) -> None:
    """The client uses an error that an overloaded server sends before the request, and does not connect again."""

    async def main() -> None:
        refusal = response({"message": "overloaded"}, 503)

        def play(request: Request) -> Script:
            return [] if request.number_on_connection == 1 else [refusal]

        server = ScriptedServer(play, accept=lambda _: [refusal])
        async with server, client_for(server) as client:
            with pytest.raises(StatusError, match="503 Service Unavailable: overloaded") as caught:
                await client.instructor_executions.get("a")
            assert (caught.value.attempts, server.connections) == (3, 1)

    run_on(loop, main())


@pytest.mark.parametrize("loop", LOOPS)
def test_a_flood_of_interim_responses_is_cut_short(loop: str) -> None:
    """Endless interim responses raise a TransportError after one more attempt."""

    async def main() -> None:
        flood = b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000
        async with ScriptedServer(lambda _: [flood, SILENCE]) as server, client_for(server) as client:
            with pytest.raises(TransportError, match="20 interim responses and no final one"):
                await client.instructor_executions.get("a")
            assert len(server.requests) == 2

    run_on(loop, main())


async def test_a_key_of_one_common_character_is_withheld_all_the_same() -> None:
    """A key that occurs in its own replacement is withheld once, without endless replacement."""
    answer = response(b'{"id": "*", "logins": "*"}')
    async with ScriptedServer(lambda _: [answer]) as server, client_for(server, api_key="*") as client:
        with pytest.raises(DecodeError):
            await client.instructor_executions.get("a")
