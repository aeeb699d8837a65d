"""One HTTP attempt: bytes out, bytes in. The only file that knows aiohttp.

aiohttp is used with most of its own policies off, because each of them would decide what `lookup.py` decides:

- No redirects: a redirected POST would carry its body, and every header but Authorization, to another host.
- No pool limit: its queue can lose a wake-up and counts against timeouts; the client's slots bound what is in flight.
- No timeouts: they are late by up to a second and miss some stalls; the caller bounds the whole attempt from outside.
- No cookies, no raise_for_status (it drops the body), no limit-less read (a few hundred bytes can unpack to 200 MB).
"""

import asyncio
import errno
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from functools import partial
from ssl import SSLCertVerificationError, SSLContext
from typing import Final, NamedTuple, TypeAlias

import aiohttp
from aiohttp.http_exceptions import ContentEncodingError, HttpProcessingError
from yarl import URL

from kaizen_async._transport.direct import DirectSender, is_supported
from kaizen_async._transport.withhold import Secret, Withholder
from kaizen_async.config import __version__
from kaizen_async.errors import ClientClosedError, DecodeError, KaizenError, TransportError, printable

USER_AGENT: Final = f"kaizen_async/{__version__} aiohttp/{aiohttp.__version__}"

ERROR_BODY_LIMIT: Final = 65_536
"""Bytes of an error's body that are read. A body read to its end leaves its connection usable for the next attempt."""

KEEPALIVE_SECONDS: Final = 15.0
"""How long an idle connection is kept: shorter than the 60 s after which common load balancers drop one silently."""

_CHUNK: Final = 65_536
_NO_TIMEOUT: Final = aiohttp.ClientTimeout(total=None, sock_connect=None)
_CODEC_ADVICE: Final = "Please install"
"""In the message of aiohttp about an answer packed in a way that this installation does not know."""
_DISCONNECTED_ERRNOS: Final = frozenset({errno.ECONNRESET, errno.EPIPE, errno.ECONNABORTED, None})


_holders: Final[set[object]] = set()
"""Keeps the garbage collector from an open session, about which aiohttp would complain beside our own warning."""


class Answer(NamedTuple):
    """What came back: status, headers (looked up without regard to case) and the unpacked body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def request_headers(api_key: str | None) -> dict[str, str]:
    """Return the headers of every request."""
    headers = {"Accept": "application/json", "Content-Type": "application/json", "User-Agent": USER_AGENT}
    if api_key is not None:
        headers["Authorization"] = Secret(f"Bearer {api_key}")
    return headers


def require_session(
    session: aiohttp.ClientSession | None,
    headers: Mapping[str, str],
    *,
    ssl_context: SSLContext | None = None,
    trust_env: bool = False,
) -> None:
    """Refuse what is no session, and a session whose own settings contradict the others.

    Raises:
        TypeError: That is no session, or no SSL context: False would switch verification off.
        ValueError: The session has auth, which excludes an API key, or settings are given that only it decides.
    """
    if ssl_context is not None and not isinstance(ssl_context, SSLContext):
        raise TypeError(f"ssl_context must be None or an ssl.SSLContext, not {type(ssl_context).__name__}")
    if session is None:
        return
    if not isinstance(session, aiohttp.ClientSession):
        raise TypeError(f"session must be an aiohttp.ClientSession, not {type(session).__name__}")
    if ssl_context is not None or trust_env:
        name = "trust_env" if ssl_context is None else "ssl_context"
        raise ValueError(f"session and {name} exclude each other; make the session with the setting that you want")
    if session.auth is not None and "Authorization" in headers:
        raise ValueError("session has auth of its own, which excludes an API key; take one of the two")


def may_leave_machine(session: aiohttp.ClientSession | None) -> bool:
    """Return whether a session may send a request for this machine through another one.

    It may through a proxy, or a connector or resolver of its own: that of a SOCKS proxy is a subclass of aiohttp's.
    """
    if session is None or session.closed:
        return False
    connector = session.connector
    resolver = getattr(connector, "_resolver", None)
    is_plain = type(connector) in {aiohttp.TCPConnector, aiohttp.UnixConnector}
    resolves_plainly = resolver is None or type(resolver).__module__ == "aiohttp.resolver"
    has_proxy = session.trust_env or getattr(session, "_default_proxy", None) is not None
    return has_proxy or not is_plain or not resolves_plainly


Deliver: TypeAlias = Callable[
    [URL, Mapping[str, str], bytes, Callable[[], Awaitable[Answer | None]]], Awaitable[Answer | None]
]
"""Delivers a request by URL, headers and body to a server in this process, or by its last argument over the wire."""


class Transport:
    """Sends requests through one aiohttp session, within one event loop.

    A virtual clock may deliver requests to an emulator in this process instead; see `Deliver`.

    A session passed in is used and left open. Otherwise one is opened by the first request; it is closed by `close`,
    or by the end of the event loop: an asynchronous generator holds it, and `asyncio.run` closes those.
    """

    def __init__(
        self,
        *,
        headers: dict[str, str],
        max_response_bytes: int,
        session: aiohttp.ClientSession | None = None,
        ssl_context: SSLContext | None = None,
        trust_env: bool = False,
        deliver: Deliver | None = None,
    ) -> None:
        self._headers = headers
        self._withholder = Withholder(headers.get("Authorization", "").removeprefix("Bearer "))
        self._max_response_bytes = max_response_bytes
        self._session = session
        self._owns_session = session is None
        self._ssl_context = ssl_context
        self._trust_env = trust_env
        self._is_direct = self._owns_session and not trust_env and is_supported()
        self._senders: dict[URL, DirectSender] = {}
        self._holder: AsyncGenerator[aiohttp.ClientSession, None] | None = None
        self._deliver = deliver if self._owns_session and not trust_env else None

    @property
    def is_open(self) -> bool:
        """Whether a session of our own is open."""
        return self._owns_session and self._session is not None and not self._session.closed

    async def send(self, url: URL, body: bytes, is_held: Callable[[], bool]) -> Answer | None:
        """Send one request and return its answer, whatever its status.

        Unbounded in time; the caller bounds it.

        Args:
            url: Where to.
            body: What to send.
            is_held: Whether it must not be sent any more, asked once there is a connection: making one takes time. Then
                nothing is sent, and None is returned. A session passed in is not asked: it connects and sends in one.

        Raises:
            TransportError: No usable answer came back.
            DecodeError: The answer is 2xx and larger than the limit.
            ClientClosedError: The session passed in is closed.
        """
        if self._deliver is None:
            return await self._send(url, body, is_held)
        answer: Answer | None = await self._deliver(url, self._headers, body, partial(self._send, url, body, is_held))
        if answer is not None and len(answer.body) > self._max_response_bytes and 200 <= answer.status < 300:  # noqa: PLR2004
            raise self._too_large(answer.body)
        return answer

    async def _send(self, url: URL, body: bytes, is_held: Callable[[], bool]) -> Answer | None:
        session = self._session or await self._open()
        try:
            if self._is_direct:
                return await self._send_directly(session, url, body, is_held)
            async with session.post(
                url,
                data=body,
                headers=self._headers,
                allow_redirects=False,
                raise_for_status=False,
                timeout=_NO_TIMEOUT,
            ) as response:
                return Answer(response.status, response.headers, await self._read(response.status, response.content))
        except KaizenError:
            raise
        except (aiohttp.ClientError, HttpProcessingError, OSError) as error:
            failure = self.failed(translate(error), error)
        except RuntimeError as error:
            if session.closed:
                raise ClientClosedError("the aiohttp session is closed") from error.with_traceback(None)
            failure = self._crash(error)
        except Exception as error:  # noqa: BLE001 - of middlewares and hooks of a session passed in; it costs one look-up
            failure = self._crash(error)
        raise failure

    def _crash(self, error: Exception) -> KaizenError:
        """Return the error for what none of our own sessions raises."""
        if self._owns_session:
            raise error
        reason = f"the session raised {type(error).__name__}: {_one_line(str(error))}"
        return self.failed(TransportError(reason, retryable=False), error)

    def failed(self, failure: KaizenError, cause: Exception) -> KaizenError:
        """Return an error that holds no key, with its cause if that holds none either."""
        said = _told(cause)
        if self._withholder.text(said) == said:
            failure.__cause__ = cause.with_traceback(None)
        return self.withhold(failure)

    def withhold(self, error: KaizenError) -> KaizenError:
        """Take the key out of an error that quotes a foreign text: servers and proxies say back what they were sent."""
        for name, said in vars(error).items():
            if name != "execution_id" and isinstance(said, str):
                setattr(error, name, self._withholder.text(said))
            elif isinstance(said, bytes):
                setattr(error, name, self._withholder.body(said))
        error.args = (error.reason,)
        return error

    async def _send_directly(
        self, session: aiohttp.ClientSession, url: URL, body: bytes, is_held: Callable[[], bool]
    ) -> Answer | None:
        sender = self._senders.get(url)
        if sender is None:
            sender = self._senders[url] = DirectSender(session, url, self._headers)
        connection = await sender.connect()
        answer = None
        try:
            if not is_held():
                status, headers, content = await sender.exchange(connection, body)
                answer = Answer(status, headers, await self._read(status, content))
            connection.release()
        finally:
            connection.close()
        return answer

    async def _read(self, status: int, content: aiohttp.StreamReader) -> bytes:
        succeeded = 200 <= status < 300  # noqa: PLR2004 - the class of successes
        limit = self._max_response_bytes if succeeded else ERROR_BODY_LIMIT
        chunks: list[bytes] = []
        size = 0
        while not content.at_eof():
            chunk = content.read_nowait(_CHUNK) if content.is_eof() else await content.read(_CHUNK)
            chunks.append(chunk)
            size += len(chunk)
            if size > limit:
                if succeeded:
                    raise self._too_large(chunks[0])
                break
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _too_large(self, body: bytes) -> KaizenError:
        reason = f"the answer is larger than max_response_bytes ({self._max_response_bytes})"
        return self.withhold(DecodeError(reason, path="$", body=body))

    def abandon(self, loop: asyncio.AbstractEventLoop) -> None:
        """Close what nobody closed, as far as a finalizer can: soon, if the loop runs; else let go of it."""
        if loop.is_running():
            loop.call_soon_threadsafe(lambda: loop.create_task(self.close()))
        else:
            _holders.discard(self._holder)

    async def _open(self) -> aiohttp.ClientSession:
        self._holder = self._hold_session()
        _holders.add(self._holder)
        return await anext(self._holder)

    async def _hold_session(self) -> AsyncGenerator[aiohttp.ClientSession, None]:
        connector = aiohttp.TCPConnector(
            limit=0,
            keepalive_timeout=KEEPALIVE_SECONDS,
            ssl=True if self._ssl_context is None else self._ssl_context,
        )
        session = aiohttp.ClientSession(
            connector=connector, cookie_jar=aiohttp.DummyCookieJar(), trust_env=self._trust_env
        )
        # An instrumentation of aiohttp gives every session its tracing, which only session.post calls.
        self._is_direct = self._is_direct and not session.trace_configs
        self._session = session
        try:
            yield session
        finally:
            self._session = None
            self._senders.clear()
            _holders.discard(self._holder)
            await session.close()

    async def close(self) -> None:
        """Close the session if it is our own. Safe to call twice."""
        if self._holder is not None:
            await self._holder.aclose()


def translate(error: Exception) -> KaizenError:
    """Return our error for one that aiohttp raised.

    The order matters: a certificate error is a connection error, and a ClientResponseError is not an answer with that
    status: aiohttp raises one with status 400 for whatever it cannot parse.
    """
    text = _one_line(str(error)) or type(error).__name__
    if isinstance(error, (aiohttp.ClientConnectorCertificateError, SSLCertVerificationError)):
        return TransportError(f"the server's certificate does not verify: {text}", retryable=False)
    if isinstance(error, aiohttp.InvalidURL):
        return TransportError(f"not a URL that can be requested: {text}", retryable=False)
    if isinstance(error, aiohttp.ClientConnectorError):
        return TransportError(f"could not connect: {text}")
    if isinstance(error, (aiohttp.ClientResponseError, HttpProcessingError)):
        return _no_answer(error)
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return TransportError("the server closed the connection without an answer", disconnected=True)
    if isinstance(error, aiohttp.ClientPayloadError):
        if isinstance(error.__cause__, ContentEncodingError):
            return _garbled("the answer does not unpack", error.__cause__.message)
        return TransportError("the answer was cut off")
    disconnected = isinstance(error, OSError) and error.errno in _DISCONNECTED_ERRNOS
    return TransportError(f"the connection failed: {text}", disconnected=disconnected)


def _no_answer(error: aiohttp.ClientResponseError | HttpProcessingError) -> TransportError:
    """Return the error for what is no answer of the server: the refusal of a proxy, or no HTTP."""
    if isinstance(error, aiohttp.ClientHttpProxyError):
        reason = f"the proxy answered {error.status} {_one_line(error.message)}"
        return TransportError(reason, retryable=error.status >= 500)  # noqa: PLR2004 - the class of server errors
    return _garbled("the answer is not valid HTTP", error.message)


def _garbled(reason: str, message: str) -> TransportError:
    """Return the error for an answer that cannot be read. What a codec would read that is not there, never can be."""
    return TransportError(f"{reason}: {_one_line(message)}", retryable=_CODEC_ADVICE not in message, garbled=True)


def _told(error: BaseException | None) -> str:
    """Return what an error and its causes say. aiohttp's quote what they could not parse, cut off somewhere."""
    said = ""
    while error is not None:
        said += f"{error} {error!r}"
        error = error.__cause__ or error.__context__
    return said


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))
