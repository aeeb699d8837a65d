"""The connections of one event loop: idle ones in a stack per address, and how many there can be.

aiohttp's connector opens the connections. Those of a client's own session stay here until they are closed. Those of a
session that was passed in go back to its connector after each response, because the session may have other users.
"""

import asyncio
import socket
from random import Random
from typing import Any, Final, cast

import aiohttp
from aiohttp.client_proto import ResponseHandler
from yarl import URL

from kaizen_async._transport.connection import READ_SIZE, Address, Connection, ExpiredError
from kaizen_async._transport.proxies import Proxy
from kaizen_async._transport.reading import Limits
from kaizen_async._transport.withhold import SecretBytes

_NO_TIMEOUT: Final = aiohttp.ClientTimeout(total=None, sock_connect=None)
_UNACKNOWLEDGED_SECONDS: Final = 5.0
"""Seconds after which the kernel gives up a connection whose peer does not acknowledge what was sent (Linux)."""
_AGE_SPREAD: Final = 0.1
"""Share by which connections expire earlier than they must, so that those of one burst do not expire together."""
_PERMANENT: Final = (aiohttp.ClientConnectorCertificateError, aiohttp.ClientHttpProxyError, aiohttp.InvalidURL)
"""Failures of connecting that say nothing about the number of connections."""


class Target:
    """Where requests to one URL go, and the head that they all begin with."""

    __slots__ = ("address", "head", "request", "signature", "url")

    def __init__(
        self, url: URL, request: aiohttp.ClientRequest, head: SecretBytes, address: Address, signature: object
    ) -> None:
        self.url = url
        self.request = request
        self.head = head
        self.address = address
        self.signature = signature


class Pool:
    """Opens, keeps and closes connections.

    Args:
        session: Its connector opens the connections.
        is_shared: Whether the session has other users, so that idle connections belong to its connector.
        headers: Sent with every request.
        limits: What a response may take.
        idle_seconds: How long an idle connection is kept.
        max_age: Seconds after which a connection is not used again.
        silence: Seconds without a byte after which a kept-alive connection looks dead to a request that is given up.
        random: Spreads the ages at which connections expire.
        proxy: What requests go through.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        is_shared: bool,
        headers: dict[str, str],
        limits: Limits,
        idle_seconds: float,
        max_age: float,
        silence: float,
        random: Random,
        proxy: Proxy | None = None,
    ) -> None:
        self._proxy = proxy
        self._session = session
        self._connector = cast("aiohttp.BaseConnector", session.connector)
        self.is_shared = is_shared
        self._headers = headers
        self._limits = limits
        self._idle_seconds = idle_seconds
        self._max_age = max_age
        self._silence = silence
        self._random = random
        self._loop = asyncio.get_running_loop()
        self.now = self._loop.time
        self._buffer = memoryview(bytearray(READ_SIZE))
        self._targets: dict[URL, Target] = {}
        self.last_target: Target | None = None
        """What `target` returned last."""
        self._addresses: dict[object, Address] = {}
        self._known: dict[ResponseHandler, Connection] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self.out_of_step = False
        """Whether a response was seen that belonged to another request."""

    def target(self, url: URL) -> Target:
        """Return where requests to a URL go."""
        target = self._targets.get(url)
        if target is None or (self.is_shared and target.signature != tuple(self._session.headers.items())):
            target = self._targets[url] = self._make_target(url)
        self.last_target = target
        return target

    def forget_heads(self) -> None:
        """Make the heads of requests again, because the headers have changed."""
        self._targets.clear()
        self.last_target = None

    def _make_target(self, url: URL) -> Target:
        # Never sent: it tells the connector where to connect to, and makes the headers that aiohttp would.
        headers = self._session.headers.copy()
        headers.update(self._headers)
        route: dict[str, Any] = {}
        path = url.raw_path_qs
        if self._proxy is not None:
            secret = self._proxy.authorization
            route = {"proxy": self._proxy.url, "proxy_headers": {"Proxy-Authorization": secret} if secret else {}}
            if url.scheme == "http":
                # Such a proxy reads the request itself. Of https it only passes bytes on, after aiohttp's CONNECT.
                path = str(url)
                headers.update(route["proxy_headers"])
        request = aiohttp.ClientRequest("POST", url, headers=headers, session=self._session, loop=self._loop, **route)
        lines = [f"POST {path} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in request.headers.items() if name != "Content-Length"]
        head = SecretBytes("\r\n".join([*lines, "Content-Length: "]).encode())
        address = self._addresses.setdefault(request.connection_key, Address())
        return Target(url, request, head, address, tuple(self._session.headers.items()))

    def take(self, target: Target, now: float) -> Connection | None:
        """Return an idle connection, the one used last, or None."""
        idle = target.address.idle
        while idle:
            connection = idle.pop()
            # It is usable otherwise, since `_ended` removes idle connections that were lost or got bytes.
            if now < connection.expires_at and now - connection.idle_since <= self._idle_seconds:
                return connection
            self._close(connection)
        return None

    async def open(self, target: Target) -> Connection:
        """Return a new connection, or one out of the connector's own pool.

        Raises:
            NoConnectionError: The address allows no more, and others are open.
            aiohttp.ClientError, OSError: It cannot be opened, and there is no other.
        """
        capacity = target.address.capacity
        is_expected = capacity.add()
        try:
            connection = await self._connect(target)
        except BaseException as error:
            capacity.remove()
            if isinstance(error, Exception) and not isinstance(error, _PERMANENT):
                capacity.refused(error, is_expected=is_expected)
            raise
        connection.is_expected = is_expected
        return connection

    async def _connect(self, target: Target) -> Connection:
        while True:
            borrowed = await self._connector.connect(target.request, [], _NO_TIMEOUT)
            handler = borrowed.protocol
            now = self.now()
            connection = None if handler is None else self._known.get(handler)
            if connection is None:
                expires_at = now + self._max_age * (1 - _AGE_SPREAD * self._random.random())
                connection = Connection(
                    borrowed,
                    self._buffer,
                    self._limits,
                    self._ended,
                    address=target.address,
                    opened_at=now,
                    expires_at=expires_at,
                )
                _notice_dead_peers(connection.transport)
                # aiohttp's pool keeps some of them, and does not report when it closes one.
                self._known = {known: ours for known, ours in self._known.items() if known.is_connected()}
                self._known[connection.handler] = connection
                return connection
            connection.lend_again(borrowed)
            if not connection.spoiled and now < connection.expires_at:
                return connection
            # On one of aiohttp's idle connections something came that nobody asked for.
            self.out_of_step = self.out_of_step or connection.handler.should_close
            connection.abort()

    def complete(self, connection: Connection, now: float) -> None:
        """Take back a connection whose response was read to its end."""
        address = connection.address
        address.capacity.responses += 1
        if connection.served == 1:
            address.capacity.works()
        self.put(connection, now)

    def put(self, connection: Connection, now: float) -> None:
        """Take back a connection; close it if it cannot be used again."""
        address = connection.address
        if connection.spoiled or now >= connection.expires_at:
            self._close(connection, works=True)
        elif self.is_shared:
            connection.give_back()
            address.capacity.remove(works=True)
        else:
            connection.idle_since = now
            address.idle.append(connection)
            if self._sweeper is None:
                self._sweeper = self._loop.call_later(self._idle_seconds, self._sweep)
            if address.capacity.waiters:
                address.capacity.wake()

    def discard(self, connection: Connection) -> None:
        """Close a connection that was taken, at once."""
        self._close(connection)

    def fail(self, connection: Connection, error: BaseException) -> None:
        """Close a connection whose response did not come, and learn from that about the others.

        Raises:
            NoConnectionError: It was new and ended at once, while others work.
        """
        self._close(connection)
        if not connection.silent:
            return
        if not isinstance(error, asyncio.CancelledError | ExpiredError):
            capacity = connection.address.capacity
            if connection.served:
                capacity.failed()
            else:
                capacity.refused(cast("Exception", error), is_expected=connection.is_expected, was_sent=True)
        elif connection.served and self.now() - connection.sent_at >= self._silence:
            self._distrust(connection)

    def expel(self, connection: Connection) -> None:
        """Close a connection that `put` took back, because its response belonged to another request."""
        self.out_of_step = True
        if self.is_shared:
            connection.transport.abort()
        elif connection in connection.address.idle:
            connection.address.idle.remove(connection)
            self._close(connection)

    def _distrust(self, connection: Connection) -> None:
        """Close the idle connections that may be as dead as one that stayed silent.

        Those are the ones of its age or older, and those that carried no response since it was last asked.
        """
        idle = connection.address.idle
        for other in list(idle):
            if other.opened_at <= connection.opened_at or other.idle_since <= connection.sent_at:
                idle.remove(other)
                self._close(other)

    async def room(self, url: URL) -> bool:
        """Wait until trying again may find a connection; return False if none is left that works."""
        address = self.target(url).address
        return bool(address.idle) or await address.capacity.room()

    async def warm_up(self, url: URL, count: int) -> None:
        """Open connections until that many are open."""
        target = self.target(url)
        missing = count - target.address.capacity.open
        opened = await asyncio.gather(*(self.open(target) for _ in range(missing)), return_exceptions=True)
        for result in opened:
            if isinstance(result, Connection):
                self.put(result, self.now())
        if opened and not target.address.capacity.open:
            raise next(result for result in opened if isinstance(result, BaseException))

    def close(self) -> None:
        """Close all connections, at once."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        for address in self._addresses.values():
            address.idle.clear()
            address.capacity.close()
        for connection in list(self._known.values()):
            connection.abort()

    def _close(self, connection: Connection, *, works: bool = False) -> None:
        self.out_of_step = self.out_of_step or connection.out_of_step
        connection.abort()
        connection.address.capacity.remove(works=works)

    def _ended(self, connection: Connection) -> None:
        """Close an idle connection that was lost, or got bytes that nobody asked for."""
        self.out_of_step = self.out_of_step or connection.out_of_step
        if connection in connection.address.idle:
            connection.address.idle.remove(connection)
            self._close(connection)

    def _sweep(self) -> None:
        """Close the connections that were idle for too long."""
        self._sweeper = None
        now = self.now()
        next_at = None
        for address in self._addresses.values():
            while address.idle and address.idle[0].idle_since + self._idle_seconds <= now:
                self._close(address.idle.pop(0))
            if address.idle:
                expires_at = address.idle[0].idle_since + self._idle_seconds
                next_at = expires_at if next_at is None else min(next_at, expires_at)
        if next_at is not None:
            self._sweeper = self._loop.call_at(next_at, self._sweep)


def _notice_dead_peers(transport: asyncio.Transport) -> None:
    """Have the kernel end a connection whose peer does not acknowledge data, as after the reset of a NAT or a VPN."""
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    sock = transport.get_extra_info("socket")
    if option is None or sock is None or sock.family not in {socket.AF_INET, socket.AF_INET6}:
        return
    sock.setsockopt(socket.IPPROTO_TCP, option, int(_UNACKNOWLEDGED_SECONDS * 1000))
