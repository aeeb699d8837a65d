"""A request by `session.post`, for sessions with tracing, middlewares, a proxy or classes of their own.

It also does the work on versions of aiohttp that our own connection was not tested with, and for everything that
patches aiohttp: mocks and tracers must get every request.
"""

import asyncio
import re
import types
from time import thread_time
from typing import Any, Final, cast

import aiohttp
from aiohttp import client as aiohttp_client
from aiohttp import payload
from aiohttp.abc import AbstractStreamWriter
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import BadHttpMessage
from yarl import URL

from kaizen_async._transport.connection import too_many_interim
from kaizen_async._transport.encodings import MOST_MEMBERS, UnpackError
from kaizen_async._transport.proxies import Proxy
from kaizen_async._transport.reading import MOST_INTERIM, Limits, TooLongHeadError, pause_for_others, read_body
from kaizen_async._transport.response import Answer
from kaizen_async._transport.trace import current_trace
from kaizen_async._transport.withhold import Secret

TESTED_VERSIONS: Final = frozenset({"3.14"})

_NO_TIMEOUT: Final = aiohttp.ClientTimeout(total=None, sock_connect=None)
_READ_SIZE: Final = 1024
"""Bytes read at once. aiohttp unpacks all of them in one go, and a kilobyte may be a hundred streams of nothing."""
_MOST_PER_PIECE: Final = 0.001
"""Seconds of processor time that one piece counts at most: it may be Python's garbage collector that took more."""
_ZSTD_FRAMES: Final = (b"\x28\xb5\x2f\xfd", b"\x2a\x4d\x18")
"""How frames of zstd begin, and those that are skipped. aiohttp makes a new decoder for each, which is expensive."""
_HUNGRY: Final = re.compile(rb"\ncontent-encoding\s*:\s*br\b", re.IGNORECASE)
"""In a head: that aiohttp may take 16 MiB to unpack the body."""
_INTERIM: Final = b"HTTP/1.1 1"
_PATCHED: Final = ("_request", "request", "post")
_PLAIN_CONNECTORS: Final = frozenset({aiohttp.TCPConnector, aiohttp.UnixConnector})
_HTTP_1_1: Final = aiohttp.HttpVersion11


def is_supported(version: str = aiohttp.__version__) -> bool:
    """Return whether our own connection was tested with a version of aiohttp."""
    return ".".join(version.split(".")[:2]) in TESTED_VERSIONS


def _genuine(name: str) -> object:
    """Return a method of ClientSession, or a unique object if somebody has replaced it already."""
    method = vars(aiohttp.ClientSession).get(name)
    is_own = isinstance(method, types.FunctionType) and method.__globals__ is cast("object", aiohttp_client.__dict__)
    return method if is_own else object()


_SESSION_CLASS: Final = aiohttp.ClientSession
_REQUEST, _GENERAL, _POST = (_genuine(name) for name in _PATCHED)


def is_patched(session: aiohttp.ClientSession) -> bool:
    """Return whether somebody has replaced how aiohttp, or this session, sends requests. Asked for every request."""
    if (
        _SESSION_CLASS._request is not _REQUEST  # noqa: SLF001 - what mocks and tracers replace
        or _SESSION_CLASS.post is not _POST
        or _SESSION_CLASS.request is not _GENERAL
        or aiohttp.ClientSession is not _SESSION_CLASS
    ):
        return True
    own = session.__dict__
    return "_request" in own or "post" in own or "request" in own


def is_plain(session: aiohttp.ClientSession) -> bool:
    """Return whether a session adds nothing to a request but headers, so that our own connection may send it.

    Settings that cannot be seen from outside are looked up by their private names. A session that does not have one of
    these is not plain.
    """
    state = vars(session)
    return (
        type(session) is _SESSION_CLASS
        and type(session.connector) in _PLAIN_CONNECTORS
        and not session.trace_configs
        and not state.get("_middlewares", True)
        and state.get("_default_proxy", True) is None
        and state.get("_request_class") is aiohttp.ClientRequest
        and state.get("_response_class") is aiohttp.ClientResponse
        and state.get("_default_auth", True) is None
        and state.get("_version") == _HTTP_1_1
        and not session.trust_env
        and not session.skip_auto_headers
        and session.auto_decompress
        and (isinstance(session.cookie_jar, aiohttp.DummyCookieJar) or not len(session.cookie_jar))
        and not state["_connector"].force_close
    )


class _Body(bytes):
    """The bytes of a request, for which aiohttp makes a payload that notes on which transport they go out."""

    guard: "Guard"

    def __deepcopy__(self, memo: dict[int, object]) -> bytes:
        """Return plain bytes, for recorders that store requests. The guard belongs to this request alone."""
        return bytes(self)

    def __reduce__(self) -> tuple[type[bytes], tuple[bytes]]:
        """Be pickled as plain bytes, for the same reason."""
        return bytes, (bytes(self),)


class _BodyPayload(payload.BytesPayload):
    def __init__(self, value: _Body, *args: Any, **kwargs: Any) -> None:
        super().__init__(bytes(value), *args, **kwargs)
        self._guard = value.guard

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        self._guard.watch(getattr(writer, "transport", None))
        await super().write_with_length(writer, content_length)


payload.PAYLOAD_REGISTRY.register(_BodyPayload, _Body, order=payload.Order.try_first)


class Guard(asyncio.BufferedProtocol):
    """Stands before aiohttp's protocol while it reads one response, and ends the attempt when that breaks its limits.

    aiohttp itself bounds neither interim responses nor bytes on the wire, and does not notice framing that breaks after
    the headers before the attempt times out.

    Args:
        limits: What a response may take.
        turn: Lets one body at a time be read whose unpacking may take much memory. None: aiohttp does not unpack.
    """

    def __init__(self, limits: Limits, turn: asyncio.Lock | None) -> None:
        self._limits = limits
        self._turn = turn
        self._held: asyncio.Lock | None = None
        self._holding: asyncio.Future[None] | None = None
        self._buffer = memoryview(bytearray(_READ_SIZE))
        self._received = 0
        self._interim = 0
        self._streams = 0
        self._head: bytes | None = b""
        self._parser_seconds = 0.0
        self._timeout: asyncio.Timeout | None = None
        self._handler: Any = None
        self.transport: asyncio.Transport | None = None
        self.failure: Exception | None = None

    def bound(self, timeout: asyncio.Timeout) -> None:
        """Take the timeout by which the attempt is ended."""
        self._timeout = timeout

    def watch(self, transport: asyncio.Transport | None) -> None:
        """Begin to read what comes on a transport."""
        self.transport = transport
        if transport is None or transport.is_closing():
            return
        handler = transport.get_protocol()
        if isinstance(handler, ResponseHandler):
            self._handler = handler
            vars(handler)["resume_reading"] = self._resume
            transport.set_protocol(self)

    def leave(self, *, close: bool) -> None:
        """Give the transport back to aiohttp's protocol, or close it at once if asked to, or if aiohttp closes it."""
        if self._holding is not None:
            self._holding.cancel()
        if self._held is not None:
            self._held.release()
            self._held = None
        transport, handler = self.transport, cast("ResponseHandler", self._handler)
        if self._handler is not None:
            vars(handler).pop("resume_reading", None)
        if transport is None:
            return
        if close or transport.is_closing():
            transport.abort()
        elif transport.get_protocol() is self:
            transport.set_protocol(handler)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - the event loop's hint
        """Return where to receive bytes."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Pass bytes on to aiohttp's protocol."""
        data = bytes(self._buffer[:nbytes])
        self._received += nbytes
        self._streams += sum(map(data.count, _ZSTD_FRAMES))
        self._interim += data.startswith(_INTERIM) + data.count(b"\r\n\r\n" + _INTERIM)
        if self._received > self._limits.wire:
            self._end(BadHttpMessage("the response has too many bytes"))
        elif self._streams > MOST_MEMBERS:
            self._end(UnpackError("it consists of too many parts"))
        elif self._turn is not None and self._is_hungry(data):
            self._hold(data, self._turn)
        elif self._interim >= MOST_INTERIM and self._received <= self._limits.head + _READ_SIZE:
            self._end(too_many_interim())
        elif self._has_too_long_head():
            self._end(TooLongHeadError())  # aiohttp would close the transport, and uvloop decrypt all that has come
        else:
            self._feed(data)

    def _has_too_long_head(self) -> bool:
        head = self._head or b""
        return len(head) > self._limits.head or head.count(b"\n") > self._limits.head_lines + 1

    def _feed(self, data: bytes) -> None:
        handler = self._handler
        began = thread_time()
        handler.data_received(data)
        self._parser_seconds += min(thread_time() - began, _MOST_PER_PIECE)
        if (error := handler.exception()) is not None:
            self._end(error)
        elif self._parser_seconds > self._limits.parser_seconds:
            self._end(BadHttpMessage("the response takes too long to parse"))
        elif len(data) == _READ_SIZE and self.transport is not None:
            pause_for_others(self.transport, handler)

    def _resume(self, resume_parser: bool = True) -> None:  # noqa: FBT001, FBT002 - as aiohttp calls it
        """Stand in for the handler's `resume_reading`, which aiohttp calls for each chunk that is taken out of a body.

        The handler would also resume what only `pause_for_others` has paused, and call its parser for each chunk.
        """
        handler: ResponseHandler = self._handler
        if handler._reading_paused:  # noqa: SLF001 - by aiohttp
            ResponseHandler.resume_reading(handler, resume_parser)

    def _is_hungry(self, data: bytes) -> bool:
        """Return whether a head says that its body is packed in a way that may take much memory to unpack."""
        while self._head is not None:
            head, self._head = self._head + data, b""
            fields, end, data = head.partition(b"\r\n\r\n")
            if _HUNGRY.search(fields):
                return True
            if not end:
                self._head = head
                break
            if not head.startswith(_INTERIM):
                self._head = None
        return False

    def _hold(self, data: bytes, turn: asyncio.Lock) -> None:
        """Read on once no other body of this kind is read."""
        transport, handler = self.transport, self._handler
        assert transport is not None  # noqa: S101 - it has just received
        transport.pause_reading()

        async def read_on() -> None:
            await turn.acquire()
            self._held = turn
            self._feed(data)
            pause_for_others(transport, handler)

        self._holding = asyncio.ensure_future(read_on())

    def eof_received(self) -> bool | None:
        """Pass the end of the stream on."""
        self._handler.eof_received()
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        """Pass the end of the connection on."""
        self._handler.connection_lost(exc)

    def pause_writing(self) -> None:
        """Pass on that the transport is full."""
        self._handler.pause_writing()

    def resume_writing(self) -> None:
        """Pass on that the transport has room again."""
        self._handler.resume_writing()

    def _end(self, failure: Exception) -> None:
        if self.failure is not None:
            return  # to set the timeout again with every read would put it off
        self.failure = failure
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(asyncio.get_running_loop().time())


def _route(session: aiohttp.ClientSession, url: URL, headers: dict[str, str], proxy: Proxy | None) -> dict[str, Any]:
    """Return the settings of a request that say how it travels, and with which key."""
    if proxy is not None:
        authorization = {} if proxy.authorization is None else {"Proxy-Authorization": proxy.authorization}
        if url.scheme == "http":
            return {"headers": {**headers, **authorization}, "proxy": proxy.url}
        return {"headers": headers, "proxy": proxy.url, "proxy_headers": authorization}
    key = headers.get("Authorization")
    if key is None or not session.trust_env:
        return {"headers": headers}
    # aiohttp refuses a header beside what ~/.netrc says. So the key is set later, in place of that.
    key = Secret(key)
    others = {name: value for name, value in headers.items() if name != "Authorization"}

    async def set_key(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        request.headers["Authorization"] = key
        return await handler(request)

    own = vars(session).get("_middlewares", ())
    return {"headers": others, "middlewares": (*own, set_key)}


def _plain(headers: dict[str, str]) -> dict[str, str]:
    return {name: str.__str__(value) for name, value in headers.items()}


async def post(
    session: aiohttp.ClientSession,
    url: URL,
    body: bytes,
    headers: dict[str, str],
    limits: Limits,
    proxy: Proxy | None,
    turn: asyncio.Lock,
) -> tuple[Answer, Guard]:
    """Send one request; return its response, and the guard that can still close its connection.

    Raises:
        Exception: What aiohttp, or code that the session runs, raises.
    """
    trace = current_trace.get()
    if trace is not None:
        headers = {**headers, **trace.headers}
    guard = Guard(limits, turn if session.auto_decompress else None)
    data = _Body(body)
    data.guard = guard
    is_complete = False
    try:
        async with asyncio.timeout(None) as timeout:
            guard.bound(timeout)
            async with session.post(
                url,
                data=data,
                allow_redirects=False,
                raise_for_status=False,
                timeout=_NO_TIMEOUT,
                max_line_size=limits.head,
                max_field_size=limits.head,
                max_headers=limits.head_lines,
                # A recorder stores only plain text. No variable here holds it, because error reports show variables.
                **_route(session, url, _plain(headers) if is_patched(session) else headers, proxy),
            ) as response:
                if trace is not None:
                    trace.note(response.status, response.connection and response.connection.transport)
                read, is_complete = await read_body(
                    response.status,
                    response.headers,
                    response.content,
                    limits,
                    is_packed=not session.auto_decompress,
                    turn=turn,
                )
    except TimeoutError:
        if guard.failure is not None:
            raise guard.failure from None
        raise
    finally:
        guard.leave(close=not is_complete)
    return read, guard
