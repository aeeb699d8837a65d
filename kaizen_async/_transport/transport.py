"""One HTTP attempt: bytes out, bytes in, by our own connection or by `session.post`.

aiohttp is used with most of its own policies off, because each of them would decide what `lookup.py` decides:

- No redirects: a redirected POST would carry its body, and every header but Authorization, to another host.
- No pool limit: its queue can lose a wake-up and counts against timeouts; the client's slots bound what is in flight.
- No timeouts: they are late by up to a second and miss some stalls; the caller bounds the whole attempt from outside.
- No cookies, no raise_for_status (it drops the body), no limit-less read (a few hundred bytes can unpack to 200 MB).
"""

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from functools import partial
from random import Random, SystemRandom
from ssl import SSLContext
from typing import Any, Final, Protocol, TypeAlias

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from kaizen_async._transport.capacity import Capacity, NoConnectionError
from kaizen_async._transport.connection import Connection, ExpiredError
from kaizen_async._transport.encodings import OFFERED, UnpackError
from kaizen_async._transport.failures import one_line, said_by, shortage, text_of, translate, without_frames
from kaizen_async._transport.head import Head
from kaizen_async._transport.pool import Pool
from kaizen_async._transport.proxies import Proxy
from kaizen_async._transport.reading import Limits, TooLargeError, TooLongHeadError, is_success
from kaizen_async._transport.request_id import RequestIds
from kaizen_async._transport.resolver import ThreadResolver
from kaizen_async._transport.response import Answer, Offer
from kaizen_async._transport.session import Guard, is_patched, is_plain, is_supported, post
from kaizen_async._transport.trace import current_trace, trace_of
from kaizen_async._transport.withhold import Secret, Withholder
from kaizen_async.config import ConnectionPolicy, __version__
from kaizen_async.errors import ClientClosedError, DecodeError, KaizenError, TransportError

USER_AGENT: Final = f"kaizen_async/{__version__} aiohttp/{aiohttp.__version__}"

_SHORTEST_SECRET: Final = 8
"""Characters from which on the value of a user's own header is withheld; a shorter one is no secret."""
_MOST_SECRETS: Final = 32
"""Secrets that are withheld at the same time: a server may say back a key that was in use before."""

_LONGEST_PATIENCE: Final = 1.0
"""Seconds without a byte after which a kept-alive connection, and those like it, look dead to a lookup that ends."""

LARGE_RESPONSE: Final = 8192
"""Bytes of body above which a response waits for its turn to be decoded, because decoding one may take milliseconds."""
_DECODING_SECONDS: Final = 0.005
"""Seconds within one step of the event loop in which large responses are decoded. Others wait for a later step."""

log = logging.getLogger("kaizen_async")

_holders: Final[set[object]] = set()
"""Keeps the garbage collector from an open session, about which aiohttp would complain beside our own warning."""


_OURS: Final = frozenset(
    {"accept-encoding", "connection", "content-encoding", "content-length", "content-type", "host", "transfer-encoding"}
)
"""Header fields that the client must set itself."""
_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE: Final = re.compile(r"[\x21-\x7e](?:[\t\x20-\x7e]*[\x21-\x7e])?")


def own_headers(headers: Mapping[str, str] | None, *, has_key: bool) -> dict[str, str]:
    """Return the headers that a user wants on every request, as secrets.

    Raises:
        TypeError: That is not a mapping of names to texts.
        ValueError: A name or value cannot travel in a header, or the client sets that header itself. No value is shown.
    """
    if headers is None:
        return {}
    if not isinstance(headers, Mapping):
        raise TypeError(f"headers must be a mapping of names to values, not {type(headers).__name__}")
    checked: dict[str, str] = {}
    for name, value in headers.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError("headers must have a str for every name and value")
        if not _HEADER_NAME.fullmatch(name):
            raise ValueError(f"headers: {name!r:.80} is not the name of a header field")
        if not _HEADER_VALUE.fullmatch(value):
            raise ValueError(
                f"headers: the value of {name!r:.80} is empty, begins or ends with white space, or holds a line break "
                "or a character outside ASCII"
            )
        if name.lower() in _OURS or (has_key and name.lower() == "authorization"):
            raise ValueError(f"headers: the client sets {name!r:.80} itself; leave it out")
        checked[name] = Secret(value)
    return checked


def request_headers(api_key: str | None, own: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the headers of every request. A user's own replace ours of the same name."""
    headers = {
        "Accept": "application/json",
        "Accept-Encoding": OFFERED,
        "Content-Type": "application/json",
        "User-Agent": USER_AGENT,
    }
    if api_key is not None:
        headers["Authorization"] = Secret(f"Bearer {api_key}")
    replaced = {name.lower() for name in own or ()}
    return {**{name: value for name, value in headers.items() if name.lower() not in replaced}, **(own or {})}


def require_session(
    session: aiohttp.ClientSession | None,
    *,
    has_auth: bool,
    ssl_context: SSLContext | None = None,
    trust_env: bool = False,
    proxy: object = None,
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
    if ssl_context is not None or trust_env or proxy is not None:
        name = "ssl_context" if ssl_context is not None else "trust_env" if trust_env else "proxy"
        raise ValueError(f"session and {name} exclude each other; make the session with the setting that you want")
    if session.auth is not None and has_auth:
        raise ValueError("session has auth of its own, which excludes an API key; take one of the two")


def may_leave_machine(session: aiohttp.ClientSession | None) -> bool:
    """Return whether a session may send a request for this machine through another one.

    It may through a proxy, or a connector, resolver or sockets of its own: the connector of a SOCKS proxy is a subclass
    of aiohttp's.
    """
    if session is None or session.closed:
        return False
    connector = session.connector
    resolver = getattr(connector, "_resolver", None)
    is_plain = type(connector) in {aiohttp.TCPConnector, aiohttp.UnixConnector}
    resolves_plainly = resolver is None or type(resolver).__module__ == "aiohttp.resolver"
    has_own_sockets = getattr(connector, "_socket_factory", None) is not None
    has_proxy = session.trust_env or getattr(session, "_default_proxy", None) is not None
    return has_proxy or has_own_sockets or not is_plain or not resolves_plainly


class Deliver(Protocol):
    """Delivers a request to a server in this process, or by `over_the_wire`; with `by_wire` always by that."""

    def __call__(
        self,
        url: URL,
        headers: Mapping[str, str],
        body: bytes,
        over_the_wire: Callable[[], Awaitable[Answer | None]],
        *,
        by_wire: bool,
    ) -> Awaitable[Answer | None]:
        """Return the response, or None if nothing was sent."""
        ...


OfferOf: TypeAlias = Callable[[URL, Mapping[str, str], bytes], Offer | None]
"""Returns the response that a server in this process would send at once; None if the request must be delivered."""

Begun: TypeAlias = tuple[Pool, Connection, asyncio.Future[Answer | None]]
"""A request that was sent at once, on an idle connection; and what receives the response."""


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
        proxy: Proxy | None = None,
        attempt_timeout: float = 30.0,
        connection_max_age: float = 300.0,
        connections: ConnectionPolicy = ConnectionPolicy(),  # noqa: B008 - frozen
        random: Random | None = None,
        request_ids: RequestIds | None = None,
        deliver: Deliver | None = None,
        offer: OfferOf | None = None,
    ) -> None:
        self._headers = dict(headers)
        self._withholders = [
            Withholder(str(value).removeprefix("Bearer "))
            for name, value in headers.items()
            if name == "Authorization" or (isinstance(value, Secret) and len(value) >= _SHORTEST_SECRET)
        ]
        if proxy is not None:
            self._withholders += [Withholder(str(secret)) for secret in proxy.secrets]
        self._limits = Limits(max_response_bytes, connections.max_header_bytes, connections.max_header_lines)
        self._session = session
        self._owns_session = session is None
        self._ssl_context = ssl_context
        self._proxy = proxy
        self._deliver = deliver
        self._offer = offer
        self._needs_wire = session is not None or proxy is not None
        self._silence = min(attempt_timeout / 2, _LONGEST_PATIENCE)
        self._max_age = connection_max_age
        self._idle_seconds = connections.idle_seconds
        self._random = random or SystemRandom()
        self._request_ids = request_ids or RequestIds()
        self._is_supported = is_supported()
        self._init: object = None
        self._opened: list[aiohttp.ClientSession] = []
        self._pool: Pool | None = None
        self._capacity: Capacity | None = None
        self._last: Guard | tuple[Pool, Connection] | None = None
        self._has_seen_shift = False
        self._large = asyncio.Lock()
        self._decoding_ends_at: float | None = None
        self._holder: AsyncGenerator[aiohttp.ClientSession, None] | None = None
        if not self._is_supported:
            log.debug("our own connection is not tested with aiohttp %s; session.post sends", aiohttp.__version__)

    @property
    def is_open(self) -> bool:
        """Whether a session of our own is open."""
        return self._owns_session and self._session is not None and not self._session.closed

    @property
    def is_inside(self) -> bool:
        """Whether requests may go to a server in this process, without a connection."""
        return self._offer is not None and not self._needs_wire

    @property
    def is_out_of_step(self) -> bool:
        """Whether a response was seen that belonged to another request."""
        return self._has_seen_shift or (self._pool is not None and self._pool.out_of_step)

    def send(self, url: URL, body: bytes, is_held: Callable[[], bool]) -> Coroutine[Any, Any, Answer | None]:
        """Send one request and return its response, whatever its status.

        Unbounded in time; the caller bounds it.

        Args:
            url: Where to.
            body: What to send.
            is_held: Whether it must not be sent any more, asked once there is a connection: making one takes time. Then
                nothing is sent, and None is returned. `session.post` is not asked: it connects and sends in one.

        Raises:
            TransportError: No usable response came back.
            DecodeError: The response is 2xx and larger than the limit.
            ClientClosedError: The session passed in is closed.
            NoConnectionError: There cannot be another connection now, but others work: wait for `room`.
        """
        if self._deliver is None:
            return self._send(url, body, is_held)
        return self._send_inside(self._deliver, url, body, is_held)

    async def _send_inside(
        self, deliver: Deliver, url: URL, body: bytes, is_held: Callable[[], bool], *, fresh: bool = False
    ) -> Answer | None:
        """Send one request to where the clock delivers it."""
        over_the_wire = partial(self._send, url, body, is_held, fresh=fresh)
        answer = await deliver(url, self._headers, body, over_the_wire, by_wire=self._needs_wire)
        if answer is not None and is_success(answer.status) and len(answer.body) > self._limits.body:
            raise self._too_large(answer.body)
        return answer

    def offer(self, url: URL, body: bytes) -> Offer | None:
        """Return the response that a server in this process would give at once; None if the request must be sent."""
        if self._offer is None or self._needs_wire:
            return None
        offer = self._offer(url, self._headers, body)
        return None if offer is None or len(offer.response.answer.body) > self._limits.body else offer

    async def send_fresh(self, url: URL, body: bytes, is_held: Callable[[], bool]) -> Answer | None:
        """Send one request on a new connection, on which no response can be left of another request."""
        if self._deliver is None:
            return await self._send(url, body, is_held, fresh=True)
        return await self._send_inside(self._deliver, url, body, is_held, fresh=True)

    async def _send(self, url: URL, body: bytes, is_held: Callable[[], bool], *, fresh: bool = False) -> Answer | None:
        session = await self._session_here()
        if self._pool is not None and self._is_direct(session):
            return await self._raise_own(self._exchange(session, self._pool, url, body, is_held, fresh=fresh))
        return await self._raise_own(self._post(session, url, body))

    async def _raise_own(self, response: Awaitable[Answer | None]) -> Answer | None:
        """Wait for a response; raise our own error for what aiohttp, our connection or a user's session raises."""
        try:
            return await response
        except (KaizenError, NoConnectionError, ExpiredError):
            raise
        except TooLargeError as error:
            raise self._too_large(error.beginning) from None
        except (aiohttp.ClientError, HttpProcessingError, OSError, UnpackError, TooLongHeadError) as error:
            failure = self.failed(translate(error, self._limits), error)
        except RuntimeError as error:
            if self._session is None or self._session.closed:
                raise ClientClosedError("the aiohttp session is closed") from without_frames(error)
            failure = self._crash(error)
        except Exception as error:  # noqa: BLE001 - of middlewares and hooks of a session passed in; it costs one lookup
            failure = self._crash(error)
        raise failure

    async def _exchange(
        self,
        session: aiohttp.ClientSession,
        pool: Pool,
        url: URL,
        body: bytes,
        is_held: Callable[[], bool],
        *,
        fresh: bool,
    ) -> Answer | None:
        """Send by a connection of our own."""
        if session.closed:
            raise RuntimeError("Session is closed")
        target = pool.target(url)
        connection = None if fresh else pool.take(target, pool.now())
        if connection is None:
            connection = await pool.open(target)
        if is_held():
            pool.put(connection, pool.now())
            return None
        trace = current_trace.get()
        head = target.head if trace is None else trace.put_into(target.head)
        response = connection.exchange(head, body, pool.now())
        try:
            return await self._receive(pool, connection, response)
        finally:
            if trace is not None:
                trace.note(connection.status, connection.transport)

    def begin(self, url: URL, body: bytes, now: float, headers: Mapping[str, str] | None = None) -> Begun | None:
        """Send a request on an idle connection of our own; return None, with nothing sent, if there is none.

        `receive` returns the response. If the future has all of it, that is not needed: the caller then gives the
        connection back to the pool.

        Args:
            url: Where to.
            body: What to send.
            now: The loop's time.
            headers: Headers to send beside the client's own.
        """
        pool, session = self._pool, self._session
        if pool is None or session is None or not self._owns_session:
            return None
        if aiohttp.ClientSession.__init__ is not self._init or is_patched(session) or session.trace_configs:
            return None
        target = pool.last_target
        if target is None or target.url is not url:
            target = pool.target(url)
        connection = pool.take(target, now)
        if connection is None:
            return None
        head = trace_of(headers).put_into(target.head) if headers else target.head
        return pool, connection, connection.exchange(head, body, now)

    async def receive(self, begun: Begun) -> Answer | None:
        """Return the response to a request that `begin` sent.

        Raises:
            ExpiredError: The attempt's time was over first.
            Exception: As `send`.
        """
        return await self._raise_own(self._receive(*begun))

    def complete(self, begun: Begun) -> None:
        """Take back the connection of a request that `begin` sent: all of its response was received."""
        pool, connection, _ = begun
        pool.complete(connection, pool.now())
        self._last = pool, connection

    async def _receive(self, pool: Pool, connection: Connection, response: asyncio.Future[Answer | None]) -> Answer:
        is_complete = True
        try:
            answer = await response
            if answer is None:
                answer, is_complete = await connection.finish()
            if len(answer.body) > LARGE_RESPONSE:
                await self.take_turn()
        except BaseException as error:
            pool.fail(connection, error)
            raise
        if is_complete:
            pool.complete(connection, pool.now())
        else:
            pool.discard(connection)
        self._last = pool, connection
        return answer

    async def _post(self, session: aiohttp.ClientSession, url: URL, body: bytes) -> Answer:
        """Send by `session.post`."""
        capacity = self._capacity
        if capacity is None:
            capacity = self._capacity = Capacity()
        is_expected = capacity.add()
        try:
            response, guard = await post(session, url, body, self._headers, self._limits, self._proxy, self._large)
            if len(response.body) > LARGE_RESPONSE:
                await self.take_turn()
        except BaseException as error:
            capacity.remove()
            if isinstance(error, aiohttp.ClientConnectorError) and shortage(error) is not None:
                capacity.refused(error, is_expected=is_expected)
            raise
        capacity.works()
        capacity.remove(works=True)
        self._last = guard
        return response

    async def take_turn(self) -> None:
        """Wait for a step of the event loop in which another large response may be decoded.

        The caller decodes it right after that. If decoding has taken long in this step, the loop runs other tasks
        before each of those that wait.
        """
        now = time.monotonic()  # uvloop's time stands still within a step
        has_taken_long = self._decoding_ends_at is not None and now >= self._decoding_ends_at
        if has_taken_long or self._large.locked():
            async with self._large:
                await asyncio.sleep(0)
        if self._decoding_ends_at is None:
            self._decoding_ends_at = time.monotonic() + _DECODING_SECONDS
            asyncio.get_running_loop().call_soon(self._end_step)

    def _end_step(self) -> None:
        self._decoding_ends_at = None

    async def room(self, url: URL) -> bool:
        """Wait, after a NoConnectionError, until trying again may succeed; return False if nothing works any more."""
        if self._pool is not None and await self._pool.room(url):
            return True
        return self._capacity is not None and await self._capacity.room()

    def reject(self) -> None:
        """Close the connection of the response that `send` returned last: it belongs to another request.

        To be called before anything else runs, because the connection may be used again.
        """
        self._has_seen_shift = True
        last, self._last = self._last, None
        if isinstance(last, Guard):
            last.leave(close=True)
        elif last is not None:
            pool, connection = last
            pool.expel(connection)

    def no_connection(self, error: NoConnectionError) -> KaizenError:
        """Return the error for a NoConnectionError after which `room` found nothing that works."""
        return self.failed(translate(error.failure, self._limits), error.failure)

    async def warm_up(self, url: URL, count: int) -> None:
        """Open connections until that many are open. `session.post` opens its own when it needs them.

        Raises:
            TransportError: None could be opened.
        """
        session = await self._session_here()
        if self._pool is None or not self._is_direct(session):
            log.debug("connections of this session cannot be opened in advance")
            return
        try:
            await self._pool.warm_up(url, count)
        except NoConnectionError as error:
            failure = self.no_connection(error)
        except (aiohttp.ClientError, OSError) as error:
            failure = self.failed(translate(error, self._limits), error)
        else:
            return
        raise failure

    def use_key(self, key: str) -> None:
        """Send a key with the requests from now on. The keys before it stay secrets."""
        self._headers["Authorization"] = Secret(f"Bearer {key}")
        self._withholders = [Withholder(key), *self._withholders[:_MOST_SECRETS]]
        if self._pool is not None:
            self._pool.forget_heads()

    def request_id(self, response: Answer) -> str | None:
        """Return what the server calls the request of a response; None if it does not say."""
        headers = response.headers
        if isinstance(headers, Head) and headers.searched_by is self._request_ids:
            return None
        request_id = self._request_ids.of(headers)
        if request_id is None or any(withholder.stands_in(request_id) for withholder in self._withholders):
            return None
        return request_id

    def _too_large(self, body: bytes) -> KaizenError:
        reason = f"the response is larger than max_response_bytes ({self._limits.body})"
        return self.withhold(DecodeError(reason, path="$", body=body))

    def _crash(self, error: Exception) -> KaizenError:
        """Return the error for what none of our own sessions raises."""
        if self._owns_session:
            raise error
        reason = f"the session raised {type(error).__name__}: {one_line(text_of(error))}"
        return self.failed(TransportError(reason, retryable=False), error)

    def failed(self, failure: KaizenError, cause: Exception) -> KaizenError:
        """Return an error that holds no key, with its cause if that holds none either."""
        said = said_by(cause)
        if self._withheld(said) == said:
            failure.__cause__ = without_frames(cause)
        return self.withhold(failure)

    def _withheld(self, said: str) -> str:
        for withholder in self._withholders:
            said = withholder.text(said)
        return said

    def withhold(self, error: KaizenError) -> KaizenError:
        """Take the key out of what an error quotes: servers and proxies say back what they were sent.

        Our own words are not searched. A short key may be part of them.
        """
        fields = vars(error)
        pieces = fields.pop("_pieces", ())
        if pieces:
            error.reason = "".join(self._withheld(piece) if at % 2 else piece for at, piece in enumerate(pieces))
        if error.request_id is not None:
            error.request_id = self._withheld(error.request_id)
        if "body" in fields:
            for withholder in self._withholders:
                fields["body"] = withholder.body(fields["body"])
        return error

    def abandon(self, loop: asyncio.AbstractEventLoop) -> None:
        """Close what nobody closed, as far as a finalizer can: soon, if the loop runs; else let go of it."""
        if loop.is_running():
            loop.call_soon_threadsafe(lambda: loop.create_task(self.close()))
        else:
            _holders.discard(self._holder)

    async def _session_here(self) -> aiohttp.ClientSession:
        """Return the session. Ours is made again if somebody has since patched how aiohttp makes them: tracers do."""
        session = self._session
        if session is None:
            self._holder = self._hold_session()
            _holders.add(self._holder)
            session = await anext(self._holder)
        elif self._owns_session and _session_init() is not self._init:
            session = self._make_session(session.connector)
        if self._pool is None and self._is_supported and self._is_direct(session):
            self._pool = self._make_pool(session)
        return session

    def _is_direct(self, session: aiohttp.ClientSession) -> bool:
        """Return whether our own connection sends what this session would, and nobody waits for it to call them."""
        if is_patched(session):
            return False
        if self._owns_session:
            return not session.trace_configs
        return is_plain(session)

    def _make_pool(self, session: aiohttp.ClientSession) -> Pool:
        return Pool(
            session,
            is_shared=not self._owns_session,
            headers=self._headers,
            limits=self._limits,
            idle_seconds=self._idle_seconds,
            max_age=self._max_age,
            silence=self._silence,
            random=self._random,
            proxy=self._proxy,
        )

    async def _hold_session(self) -> AsyncGenerator[aiohttp.ClientSession, None]:
        connector = aiohttp.TCPConnector(
            limit=0,
            resolver=ThreadResolver(),
            keepalive_timeout=self._idle_seconds,
            ssl=True if self._ssl_context is None else self._ssl_context,
        )
        session = self._make_session(connector)
        try:
            yield session
        finally:
            pool, self._pool, self._session = self._pool, None, None
            _holders.discard(self._holder)
            if pool is not None:
                pool.close()
            for opened in self._opened:
                await opened.close()
            self._opened.clear()

    def _make_session(self, connector: aiohttp.BaseConnector | None) -> aiohttp.ClientSession:
        self._init = _session_init()
        session = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
        self._opened.append(session)
        self._session = session
        return session

    async def close(self) -> None:
        """Close the session if it is our own. Safe to call twice."""
        if self._holder is not None:
            await self._holder.aclose()


def _session_init() -> Any:
    return aiohttp.ClientSession.__init__
