"""A server whose responses cost a client the most. The bench `hostile` starts it.

The first segment of the path names the kind of response. `mixed` uses another kind for each request.
"""

import argparse
import asyncio
import gzip
import importlib
import itertools
import json
import ssl
from collections.abc import Callable, Iterator
from typing import Any, Final

import brotli  # type: ignore[import-untyped]

PIECE: Final = 64 * 1024

RECORD: Final[dict[str, Any]] = {
    "id": "exec_00000001",
    "workflow": {"id": "wf_1", "name": "Invoices"},
    "logins": [],
    "authentications": [],
    "contextAuthentications": [],
    "startTime": "2026-11-07T05:31:56Z",
    "endTime": None,
    "durationMs": None,
    "isRecording": True,
    "browserSessionId": None,
    "status": "InProgress",
}
OK: Final = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
REJECTED: Final = b"HTTP/1.1 429 Too Many Requests\r\n"
CHUNKED: Final = OK + b"Transfer-Encoding: chunked\r\n\r\n"


def endless(piece: bytes) -> Callable[[], Iterator[bytes]]:
    """Return a response that repeats a piece forever."""
    block = piece * max(1, PIECE // len(piece))
    return lambda: itertools.repeat(block)


def after(head: bytes, piece: bytes) -> Callable[[], Iterator[bytes]]:
    """Return a response that repeats a piece forever after its head."""
    return lambda: itertools.chain([head], endless(piece)())


def whole(body: bytes, coding: str = "") -> Callable[[], Iterator[bytes]]:
    """Return a complete response."""
    encoding = f"Content-Encoding: {coding}\r\n" if coding else ""
    head = OK + f"{encoding}Content-Length: {len(body)}\r\n\r\n".encode()
    return lambda: iter([head + body])


def whole_head(head: bytes) -> Callable[[], Iterator[bytes]]:
    """Return a response without a body."""
    return lambda: iter([head])


def dripped(head: bytes, rest: bytes, size: int) -> Callable[[], Iterator[bytes]]:
    """Return a response that is sent in small pieces."""
    return lambda: itertools.chain([head], (rest[at : at + size] for at in range(0, len(rest), size)))


def record(**changes: Any) -> bytes:
    """Return a record as JSON."""
    return json.dumps({**RECORD, **changes}, separators=(",", ":")).encode()


def listed(part: str, field: str = "authentications", size: int = 500_000) -> bytes:
    """Return a record with a list of as many parts as its size allows."""
    return record(**{field: []}).replace(f'"{field}":[]'.encode(), f'"{field}":[{_many(part, size)}]'.encode())


def _many(part: str, size: int) -> str:
    count = size // (len(part) + 1)
    return ",".join(part.replace("N", str(number)) for number in range(count))


EMPTY_ZSTD_FRAME: Final = bytes.fromhex("28b52ffd2000010000")
EMPTY_GZIP_MEMBER: Final = gzip.compress(b"")

KINDS: Final[dict[str, Callable[[], Iterator[bytes]]]] = {
    "interim responses": endless(b"HTTP/1.1 100 Continue\r\n\r\n"),
    "early hints": endless(b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\n\r\n"),
    "chunk extensions": after(CHUNKED, b"1;" + b"x" * 4000 + b"\r\n \r\n"),
    "one-byte chunks": after(CHUNKED, b"1\r\n \r\n"),
    "an endless chunk size": after(CHUNKED, b"0"),
    "headers without end": after(OK, b"X-Filler: " + b"x" * 100 + b"\r\n"),
    "an endless body": after(OK + b"Connection: close\r\n\r\n", b" "),
    "trailers without end": after(CHUNKED + b"1\r\n{\r\n0\r\n", b"X-Trailer: x\r\n"),
    "empty zstd frames": after(OK + b"Content-Encoding: zstd\r\nConnection: close\r\n\r\n", EMPTY_ZSTD_FRAME),
    "empty gzip members": after(OK + b"Content-Encoding: gzip\r\nConnection: close\r\n\r\n", EMPTY_GZIP_MEMBER),
    "empty deflate blocks": after(
        OK + b"Content-Encoding: deflate\r\nConnection: close\r\n\r\n", b"\x00\x00\x00\xff\xff"
    ),
    "a list of {}": whole(listed("{}")),
    "a list of {}, gzip": whole(gzip.compress(listed("{}")), "gzip"),
    "lists of logins": whole(listed('{"id":"N","name":"N"}', "logins")),
    "unknown statuses": whole(listed('{"status":"Zorp N"}')),
    "one unknown status": whole(listed('{"status":"Zorp"}')),
    "an unknown field of numbers": whole(record(zorp=list(range(80_000)))),
    "escaped text": whole(record(workflow={"id": "wf_1", "name": "@"}).replace(b"@", b"\\u0041" * 80_000)),
    "half surrogates": whole(record(workflow={"id": "wf_1", "name": "@"}).replace(b"@", b"\\ud83d" * 80_000)),
    "deep nesting": whole(record(zorp=0).replace(b'"zorp":0', b'"zorp":' + b"[" * 500_000)),
    "a zip bomb": whole(gzip.compress(b" " * 100_000_000), "gzip"),
    "a brotli bomb": whole(brotli.compress(b" " * 100_000_000, quality=2, lgwin=24), "br"),
    "empty brotli blocks": after(OK + b"Content-Encoding: br\r\nConnection: close\r\n\r\n\x0c", b"\x06"),
    "a number of many digits": whole(record(zorp=0).replace(b'"zorp":0', b'"zorp":0.' + b"1" * 500_000)),
    "numbers of many digits": whole(record(zorp=[int("9" * 4000)] * 120)),
    "fields by the thousand": whole(record(**{f"f{number}": number for number in range(35_000)})),
    "a header of spaces": whole_head(OK + b"X: " + b" " * 32_000 + b"\0\r\n\r\n"),
    "a long time to wait": whole_head(
        REJECTED + b"RateLimit: reset" + b"a" * 32_000 + b"\r\nContent-Length: 0\r\n\r\n"
    ),
    "hints line by line": dripped(b"HTTP/1.1 103 Early Hints\r\n", b"a:\r\n" * 20_000, 4),
    "a body byte by byte": dripped(OK + b"Content-Length: 400000\r\n\r\n", b" " * 400_000, 1),
    "an error that quotes": whole(b'{"message": "' + b"&amp;%41" * 60_000 + b'"}'),
}


class Hostile(asyncio.Protocol):
    """A connection of the server."""

    def __init__(self) -> None:
        self._resume = asyncio.Event()
        self._resume.set()
        self._task: asyncio.Task[None] | None = None
        self._numbers = itertools.count()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        """Respond to a request as soon as its path is known."""
        if data.startswith(b"POST /") and self._task is None:
            name = data.split(b" ", 2)[1].split(b"/")[1].decode().replace("%20", " ")
            self._task = asyncio.create_task(self._respond(name))

    def pause_writing(self) -> None:
        """Pause until the client has read."""
        self._resume.clear()

    def resume_writing(self) -> None:
        """Continue to write."""
        self._resume.set()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the reason is not needed
        """Stop the response."""
        if self._task is not None:
            self._task.cancel()

    async def _respond(self, name: str) -> None:
        kinds = list(KINDS)
        name = kinds[next(_requests) % len(kinds)] if name == "mixed" else kinds[int(name)]
        for piece in KINDS[name]():
            await self._resume.wait()
            await asyncio.sleep(0)
            self._transport.write(piece)
        self._task = None


_requests = itertools.count()


async def serve(context: ssl.SSLContext | None) -> None:
    """Print the port, and serve until the process ends."""
    server = await asyncio.get_running_loop().create_server(Hostile, "127.0.0.1", 0, ssl=context, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tls", metavar="FILE", help="a certificate and its key")
    asked = parser.parse_args()
    context = None
    if asked.tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(asked.tls)
    with asyncio.Runner(loop_factory=importlib.import_module("uvloop").new_event_loop) as runner:
        runner.run(serve(context))


if __name__ == "__main__":
    main()
