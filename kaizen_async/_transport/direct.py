"""One request over a pooled aiohttp connection, without the layers that a look-up has no use for.

`session.post` builds a request, a response, a writer, timers, cookies and redirects anew for each call. A look-up sends
the same head each time. So this file takes a connection from the session's connector, which opens, pools and secures it
as ever, writes the head made once and the body, and lets aiohttp's own parser read the answer. `transport.py` uses it
for sessions that it opened itself, and falls back to `session.post` for all others: a session passed in may carry
tracing, middlewares, a proxy or classes of its own.

What is used of aiohttp here is exported or public by name, but not all of it is documented. Therefore it runs only on
the versions that the tests run it on, `TESTED_VERSIONS`; on others, `session.post` does the work.
"""

import asyncio
from typing import Final, cast
from weakref import WeakSet

import aiohttp
from aiohttp.http_exceptions import BadHttpMessage
from aiohttp.streams import StreamReader
from multidict import CIMultiDictProxy
from yarl import URL

from kaizen_async._transport.withhold import SecretBytes

TESTED_VERSIONS: Final = frozenset({"3.14"})

_NO_TIMEOUT: Final = aiohttp.ClientTimeout(total=None, sock_connect=None)
_INTERIM_STATUSES: Final = frozenset(range(100, 200)) - {101}
_MOST_INTERIM: Final = 20
"""Interim answers (RFC 9110 section 15.2) before the one that counts. More of them say nothing, and keep us busy."""


def is_supported(version: str = aiohttp.__version__) -> bool:
    """Return whether this version of aiohttp is one that the direct way is tested on."""
    return ".".join(version.split(".")[:2]) in TESTED_VERSIONS


class DirectSender:
    """Sends the requests of one session to one URL.

    Args:
        session: A session without proxy, tracing or middlewares.
        url: Where to.
        headers: Sent with each request, beside Host, Accept-Encoding and Content-Length.
    """

    def __init__(self, session: aiohttp.ClientSession, url: URL, headers: dict[str, str]) -> None:
        # Never sent: it tells the connector where to connect to, and makes the headers that aiohttp would.
        self._request = aiohttp.ClientRequest(
            "POST", url, headers=headers, session=session, loop=asyncio.get_running_loop()
        )
        self._connector = cast("aiohttp.BaseConnector", session.connector)
        lines = [f"POST {url.raw_path_qs} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in self._request.headers.items() if name != "Content-Length"]
        self._head = SecretBytes("\r\n".join([*lines, "Content-Length: "]).encode())
        self._used: WeakSet[asyncio.BaseProtocol] = WeakSet()

    async def connect(self) -> aiohttp.connector.Connection:
        """Return a connection from the pool, or a new one. Release it when the answer is read, else close it.

        A pooled connection on which something came that nobody asked for is closed: it would be read as the answer to
        this request, and the answer to this one as the next. What comes on a new one is for this request: a server
        that is overloaded may answer before it has read anything.
        """
        while True:
            connection = await self._connector.connect(self._request, [], _NO_TIMEOUT)
            protocol = connection.protocol
            if protocol is None or not protocol.should_close or protocol not in self._used:
                return connection
            connection.close()

    async def exchange(
        self, connection: aiohttp.connector.Connection, body: bytes
    ) -> tuple[int, CIMultiDictProxy[str], StreamReader]:
        """Send one request; return status, headers and the body to be read."""
        protocol = connection.protocol
        if protocol is None or protocol.transport is None:
            raise aiohttp.ClientConnectionResetError("the connection was closed before the request was sent")
        self._used.add(protocol)
        protocol.set_response_params(read_until_eof=True)
        protocol.transport.write(b"%b%d\r\n\r\n%b" % (self._head, len(body), body))
        for _ in range(_MOST_INTERIM):
            message, content = await protocol.read()
            if message.code not in _INTERIM_STATUSES:
                return message.code, message.headers, content
        raise BadHttpMessage(f"{_MOST_INTERIM} interim answers and no final one")
