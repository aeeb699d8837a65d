"""The HTTP attempt itself: what the server sees, what is read, and what becomes of aiohttp's errors."""

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
    """Yield a transport that opens its session itself, and sends by the short way."""
    made = Transport(headers=request_headers(KEY), max_response_bytes=100_000, **settings)
    try:
        yield made
    finally:
        await made.close()


@asynccontextmanager
async def own_session_the_long_way(**settings: Any) -> AsyncIterator[Transport]:
    """Yield a transport that opens its session itself, on a version of aiohttp that the short way is not tested on."""
    with mock.patch.object(transport, "is_supported", return_value=False):
        async with own_session(**settings) as made:
            yield made


@asynccontextmanager
async def given_session(**settings: Any) -> AsyncIterator[Transport]:
    """Yield a transport that uses a session of the caller's."""
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
    """The same by every way; one Content-Length, and nothing that would give the key away elsewhere."""
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
    """A proxy may add one."""
    assert "Authorization" not in request_headers(None)
    assert request_headers("k")["Authorization"] == "Bearer k"


def test_the_key_shows_in_no_repr() -> None:
    """Neither of the header nor of whatever holds it."""
    assert KEY not in repr(request_headers(KEY))
    assert KEY not in f"{request_headers(KEY)}"
    assert Secret("x") == "x"


@EVERY_WAY
async def test_connections_are_kept_and_used_again(way: Callable[..., Any]) -> None:
    """After answers of every kind, errors with a body included: a retry must not cost a handshake."""
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
    """There is no pool limit below ours; aiohttp's own would be 100."""
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
    """Unless the caller's session keeps them, which for an IP address it does not."""

    def play(request: Request) -> Script:
        return [response(record(request.id), headers={"Set-Cookie": "session=1"})]

    async with ScriptedServer(play) as server, way() as sender:
        for _ in range(2):
            await send(sender, server)
        assert "cookie" not in server.requests[1].headers


PACKINGS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress, "br": brotli.compress}


@EVERY_WAY
@pytest.mark.parametrize("packing", PACKINGS)
async def test_packed_answers_are_unpacked(way: Callable[..., Any], packing: str) -> None:
    """With every codec that is announced."""

    def play(request: Request) -> Script:
        packed = PACKINGS[packing](json.dumps(record(request.id)).encode())
        return [response(packed, headers={"Content-Encoding": packing})]

    async with ScriptedServer(play) as server, way() as sender:
        assert json.loads((await send(sender, server)).body)["id"] == "a"
        assert packing in server.requests[0].headers["accept-encoding"]


@functools.cache
def bomb(packing: str) -> bytes:
    """Return what unpacks to 20 MB."""
    return PACKINGS[packing](b"[" + b" " * 20_000_000)


@EVERY_WAY
@pytest.mark.parametrize("packing", PACKINGS)
async def test_an_answer_that_unpacks_to_too_much_is_given_up_early(way: Callable[..., Any], packing: str) -> None:
    """A few bytes that unpack to 20 MB cost neither the memory nor the time."""

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
async def test_the_largest_answer_allowed_is_taken(way: Callable[..., Any]) -> None:
    """The limit itself is no excess; a byte more is."""
    sizes = iter([100_000, 100_001])

    def play(_: Request) -> Script:
        return [response(b"x" * next(sizes))]

    async with ScriptedServer(play) as server, way() as sender:
        assert len((await send(sender, server)).body) == 100_000
        assert isinstance(await refusal(sender, server), DecodeError)


@EVERY_WAY
async def test_of_an_endless_error_only_the_beginning_is_read(way: Callable[..., Any]) -> None:
    """The status is what counts."""

    def play(_: Request) -> Script:
        return [b"HTTP/1.1 502 Bad Gateway\r\n\r\n" + b"x" * 300_000, SILENCE]

    async with ScriptedServer(play) as server, way() as sender:
        answer = await send(sender, server)
        assert answer.status == 502
        assert 65_536 < len(answer.body) < 300_000
        await server.until(lambda: not server.open)


@EVERY_WAY
async def test_a_body_that_comes_in_pieces_is_put_together(way: Callable[..., Any]) -> None:
    """In order and whole."""
    whole = bytes(range(256)) * 100

    def play(_: Request) -> Script:
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(whole)}\r\n\r\n".encode()
        pieces = [whole[i : i + 5000] for i in range(0, len(whole), 5000)]
        return [head, *itertools.chain.from_iterable((0.002, piece) for piece in pieces)]

    async with ScriptedServer(play) as server, way() as sender:
        assert (await send(sender, server)).body == whole


@EVERY_WAY
@pytest.mark.parametrize("body", [b"", b"{}"])
async def test_bytes_after_an_answer_spoil_it(way: Callable[..., Any], body: bytes) -> None:
    """Nobody knows which part of what came was meant, also when the answer itself is empty."""

    def play(_: Request) -> Script:
        return [response(body, headers={"Content-Length": str(len(body))}) + b"left over", SILENCE]

    async with ScriptedServer(play) as server, way() as sender:
        error = await refusal(sender, server)
        assert isinstance(error, TransportError)
        assert error.garbled
        await server.until(lambda: not server.open)


@EVERY_WAY
async def test_a_cancelled_request_closes_its_connection(way: Callable[..., Any]) -> None:
    """Before the answer and in the midst of it: the next request must not read what is left of this one."""
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
    """Making a transport costs no socket; closing it twice does no harm."""
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
    """Who opened it closes it."""
    async with ScriptedServer() as server, aiohttp.ClientSession() as session:
        sender = Transport(headers=request_headers(None), max_response_bytes=1000, session=session)
        await send(sender, server)
        assert not sender.is_open
        await sender.close()
        assert not session.closed
        await send(sender, server)


async def test_a_session_that_was_passed_in_keeps_its_ways() -> None:
    """Its headers, tracing and connector apply; its timeout and its redirects do not."""
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


async def test_a_closed_session_that_was_passed_in_is_said_to_be_closed() -> None:
    """It is the caller's doing, and no fault of the network."""
    session = aiohttp.ClientSession()
    await session.close()
    async with ScriptedServer() as server, own_session(session=session) as sender:
        error = await refusal(sender, server)
        assert isinstance(error, ClientClosedError)
        assert error.reason == "the aiohttp session is closed"
        assert isinstance(error.__cause__, RuntimeError)


async def test_a_fault_of_the_callers_tracing_fails_one_look_up() -> None:
    """It comes as the cause, and no further attempt would mend it."""

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


async def test_a_fault_of_our_own_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes out as it is."""
    monkeypatch.setattr(Pool, "open", mock.Mock(side_effect=ZeroDivisionError))
    async with ScriptedServer() as server, own_session() as sender:
        with pytest.raises(ZeroDivisionError):
            await send(sender, server)


async def test_what_is_held_is_not_sent() -> None:
    """The connection made for it is kept for the next."""
    async with ScriptedServer() as server, own_session() as sender:
        assert await sender.send(URL(server.url) / "get", request_body("a"), lambda: True) is None
        assert server.requests == []
        await send(sender, server)
        assert (len(server.requests), server.requests[0].connection) == (1, 1)


async def test_a_large_answer_is_refused_with_its_beginning() -> None:
    """Not with the piece that was one too many."""
    answer = response(b'{"head":' + b"x" * 300_000)
    async with ScriptedServer(lambda _: [answer]) as server, own_session() as sender:
        error = await refusal(sender, server)
        assert isinstance(error, DecodeError)
        assert error.body.startswith(b'{"head":xxx')


PROXIED = pytest.mark.parametrize("way", [own_session, own_session_the_long_way], ids=lambda way: way.__name__)


@PROXIED
async def test_a_proxy_gets_the_whole_request(way: Callable[..., Any]) -> None:
    """With the whole URL, the key for the server, and its own name and password."""
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
async def test_a_proxy_that_refuses_is_told_from_a_server_that_does(
    way: Callable[..., Any], status: int, retryable: bool
) -> None:
    """Its response to CONNECT is not the API's; its status says whether trying again may help. No password shows."""

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
    """Neither in text, nor in a traceback with all its causes, nor in what is pickled."""

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


async def test_a_connection_lost_before_the_request_is_told_from_one_lost_under_it() -> None:
    """Nothing was written to it."""
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


def test_the_short_way_is_taken_only_on_versions_that_it_was_tested_on() -> None:
    """On others the way of aiohttp's own does the work."""
    assert session_post.is_supported()
    assert session_post.is_supported("3.14.99")
    assert not session_post.is_supported("3.12.0")
    assert not session_post.is_supported("4.0.0")


def instance_of(cls: type[BaseException]) -> BaseException:
    """Return an exception of aiohttp's, made of whatever its constructor asks for."""
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
    """Also one that a later version adds: none comes through as it is, and none is taken for an HTTP status."""
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
def test_a_dropped_connection_is_told_from_other_faults(foreign: Exception, disconnected: bool) -> None:
    """Its first retry does not wait."""
    error = translate(foreign)
    assert isinstance(error, TransportError)
    assert error.disconnected is disconnected
    assert not error.garbled


def test_a_text_without_words_is_replaced_by_the_name_of_the_error() -> None:
    """Some errors of the system come without a text."""
    assert translate(aiohttp.ClientConnectionError()).reason == "the connection failed: ClientConnectionError"


def test_what_a_missing_codec_would_read_is_not_tried_again() -> None:
    """The next answer would be packed the same way."""
    foreign = aiohttp.ClientPayloadError("400")
    foreign.__cause__ = http_exceptions.ContentEncodingError("Can not decode br. Please install `Brotli`")
    error = translate(foreign)
    assert error.reason == "the response does not unpack: Can not decode br. Please install `Brotli`"
    assert not error.retryable


@pytest.mark.parametrize("loop", LOOPS)
def test_a_server_that_answers_before_it_is_asked_is_heard(loop: str) -> None:
    """An overloaded one says so as soon as it is connected to, which is no reason to connect again and again."""

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
def test_a_flood_of_interim_answers_is_cut_short(loop: str) -> None:
    """It is no answer, and worth one more attempt only."""

    async def main() -> None:
        flood = b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000
        async with ScriptedServer(lambda _: [flood, SILENCE]) as server, client_for(server) as client:
            with pytest.raises(TransportError, match="20 interim responses and no final one"):
                await client.instructor_executions.get("a")
            assert len(server.requests) == 2

    run_on(loop, main())


async def test_a_key_of_one_common_character_is_withheld_all_the_same() -> None:
    """What stands in its place holds it again, and is not searched once more."""
    answer = response(b'{"id": "*", "logins": "*"}')
    async with ScriptedServer(lambda _: [answer]) as server, client_for(server, api_key="*") as client:
        with pytest.raises(DecodeError):
            await client.instructor_executions.get("a")
