"""Reads a body through aiohttp's parser, within limits. For every response that is not of the common kind."""

import asyncio
from collections.abc import Mapping
from typing import Final, NamedTuple

import aiohttp
from aiohttp.base_protocol import BaseProtocol

from kaizen_async._transport.encodings import UnpackError, can_unpack, unpack
from kaizen_async._transport.response import Answer

ERROR_BODY_LIMIT: Final = 65_536
"""Bytes of an error's body that are read. A body read to its end leaves its connection usable for the next attempt."""

MOST_INTERIM: Final = 20
"""Interim responses (RFC 9110 section 15.2) before the final one. More of them say nothing and keep us busy."""

INTERIM_STATUSES: Final = frozenset(range(100, 200)) - {101}

_CHUNK: Final = 65_536
_PARSER_SECONDS: Final = 0.05
"""For one response, and again for each MiB that it may have. It takes a tenth of that for an ordinary one."""


def pause_for_others(transport: asyncio.Transport, handler: BaseProtocol) -> None:
    """Read on in the next step of the event loop. uvloop would read 32 times in one step, and on 50 connections."""

    def resume() -> None:
        is_paused = handler._reading_paused or handler._buffer_paused  # noqa: SLF001 - by aiohttp
        if not transport.is_closing() and not is_paused:
            transport.resume_reading()

    transport.pause_reading()
    asyncio.get_running_loop().call_soon(resume)


class Limits(NamedTuple):
    """What a response may take, in bytes and lines."""

    body: int
    head: int
    head_lines: int

    @property
    def wire(self) -> int:
        """Bytes on the wire of one response, its framing included: chunk sizes, extensions and empty blocks count."""
        return 2 * self.body + self.head + ERROR_BODY_LIMIT

    @property
    def parser_seconds(self) -> float:
        """Seconds of processor time that aiohttp's parser may take: some responses cost it far more than their size."""
        return _PARSER_SECONDS * (1 + self.body / 2**20)

    def of_status(self, status: int) -> int:
        """Return the bytes of body that are read after a status."""
        return self.body if is_success(status) else ERROR_BODY_LIMIT


class TooLargeError(Exception):
    """Raised when an unpacked body is larger than its limit. Holds the beginning of the body."""

    def __init__(self, beginning: bytes) -> None:
        super().__init__()
        self.beginning = beginning


class TooLongHeadError(Exception):
    """Raised when a head has more bytes or lines than its limits."""


def is_success(status: int) -> bool:
    """Return whether a status is of the class 2xx."""
    return 200 <= status < 300  # noqa: PLR2004 - the class of successes


async def read_body(
    status: int,
    headers: Mapping[str, str],
    content: aiohttp.StreamReader,
    limits: Limits,
    *,
    is_packed: bool,
    turn: asyncio.Lock,
) -> tuple[Answer, bool]:
    """Return a response and whether its body was read to the end; of a large error only the beginning is read.

    Args:
        status: The status of the response.
        headers: Its header fields.
        content: Its body.
        limits: What it may take.
        is_packed: Whether the body is still as its Content-Encoding says. aiohttp unpacks it by default.
        turn: See `unpack_body`.

    Raises:
        TooLargeError: The body of a success is larger than allowed.
        UnpackError: The body is damaged.
    """
    coding = headers.get("Content-Encoding", "").strip(" \t").lower()
    if is_packed and sum(name.lower() == "content-encoding" for name, _ in headers.items()) > 1:
        raise UnpackError("it has more than one Content-Encoding")
    if coding == "x-gzip":
        coding, is_packed = "gzip", True  # aiohttp does not know this old name, and leaves the body packed
    must_unpack = is_packed and can_unpack(coding)
    limit = limits.wire if must_unpack else limits.of_status(status)
    chunks: list[bytes] = []
    size = 0
    while not content.at_eof():
        if size:
            await asyncio.sleep(0)  # unpacking a large body takes long, so other tasks get turns in between
        chunk = content.read_nowait(_CHUNK) if content.is_eof() else await content.read(_CHUNK)
        chunks.append(chunk)
        size += len(chunk)
        if size > limit:
            if is_success(status):
                raise TooLargeError(chunks[0])
            return Answer(status, headers, b"".join(chunks)), False
    if not chunks and type(content) is not aiohttp.StreamReader:
        chunks.append(await content.read())  # the content of a mock such as pook's is at its end from the beginning
    body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
    if body and must_unpack:
        body = await unpack_body(status, coding, body, limits, turn)
    return Answer(status, headers, body), True


async def unpack_body(status: int, coding: str, packed: bytes, limits: Limits, turn: asyncio.Lock) -> bytes:
    """Return what a body unpacks to, giving others a turn between two pieces; of a large error only the beginning.

    Args:
        status: The status of the response.
        coding: How the body is packed.
        packed: The body.
        limits: What a response may take.
        turn: Lets one body at a time be unpacked: an unpacker may take 16 MiB, and 20 ms to get them.

    Raises:
        TooLargeError: The body of a success unpacks to more than is allowed.
        UnpackError: It is damaged.
    """
    limit = limits.of_status(status)
    pieces: list[bytes] = []
    size = 0
    async with turn:
        for piece in unpack(coding, packed):
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                if is_success(status):
                    raise TooLargeError(pieces[0])
                break
            await asyncio.sleep(0)  # other tasks get turns between the pieces of a large body
    return b"".join(pieces)
