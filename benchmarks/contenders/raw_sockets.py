"""The lower bound: asyncio transports, a hand-written request and minimal parsing to find the body."""

import asyncio
import ssl
from typing import cast
from urllib.parse import urlsplit

import contender
import msgspec
from shapes import LeanExecution

_BUFFER = memoryview(bytearray(65_536))
"""Where all connections receive. With a plain `asyncio.Protocol`, asyncio allocates 256 KiB for each read."""


class Connection(asyncio.BufferedProtocol):
    """A keep-alive connection for one lookup at a time."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._received = b""
        self._needed = 0
        self._answered: asyncio.Future[bytes]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport for requests."""
        self.transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - the event loop's hint
        """Return the receive buffer."""
        return _BUFFER

    def buffer_updated(self, nbytes: int) -> None:
        """Resolve the future when the body is complete."""
        data = bytes(_BUFFER[:nbytes])
        self._received = self._received + data if self._received else data
        if not self._needed:
            end = self._received.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self._received[:end].lower()
            length = head.index(b"content-length:") + 15
            self._needed = end + 4 + int(head[length:].partition(b"\r\n")[0])
            self._start = end + 4
        if len(self._received) >= self._needed:
            body = self._received[self._start : self._needed]
            self._received, self._needed = b"", 0
            self._answered.set_result(body)

    def send(self, request: bytes) -> asyncio.Future[bytes]:
        """Send a request, and return the future of the response's body."""
        self._answered = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self._answered


class Contender(contender.Contender):
    """Plain connections in a stack, without a client, timeouts or errors."""

    title = "raw asyncio sockets (the floor)"

    async def setup(self) -> None:
        """Open one connection for each lookup in flight."""
        address = urlsplit(self.base_url)
        self._head = (
            f"POST {address.path}instructor/executions/get HTTP/1.1\r\nHost: {address.netloc}\r\n"
            "Authorization: Bearer key\r\nContent-Type: application/json\r\nContent-Length: "
        ).encode()
        self._decode = msgspec.json.Decoder(LeanExecution).decode
        self._encode = msgspec.json.Encoder().encode
        loop = asyncio.get_running_loop()
        context = ssl.create_default_context() if address.scheme == "https" else None
        opened = [
            await loop.create_connection(Connection, str(address.hostname), address.port or 80, ssl=context)
            for _ in range(self.concurrency)
        ]
        self._idle = [connection for _, connection in opened]

    async def look_up(self, execution_id: str) -> str:
        """Take a connection, send a request, await the body and decode it."""
        connection = self._idle.pop()
        body = self._encode({"id": execution_id})
        answer = await connection.send(b"%b%d\r\n\r\n%b" % (self._head, len(body), body))
        self._idle.append(connection)
        return self._decode(answer).id

    async def close(self) -> None:
        """Close the connections."""
        for connection in self._idle:
            connection.transport.close()
