"""Reads a body through aiohttp's parser, within limits. For every response that is not of the common kind."""

import asyncio
from collections.abc import Mapping
from typing import Final, NamedTuple

import aiohttp

from kaizen_async._transport.encodings import unpack
from kaizen_async._transport.response import Answer

ERROR_BODY_LIMIT: Final = 65_536
"""Bytes of an error's body that are read. A body read to its end leaves its connection usable for the next attempt."""

MOST_INTERIM: Final = 20
"""Interim responses (RFC 9110 section 15.2) before the final one. More of them say nothing and keep us busy."""

INTERIM_STATUSES: Final = frozenset(range(100, 200)) - {101}

_CHUNK: Final = 65_536


class Limits(NamedTuple):
    """What a response may take, in bytes and lines."""

    body: int
    head: int
    head_lines: int

    @property
    def wire(self) -> int:
        """Bytes on the wire of one response, its framing included: chunk sizes, extensions and empty blocks count."""
        return 2 * self.body + self.head + ERROR_BODY_LIMIT

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
    status: int, headers: Mapping[str, str], content: aiohttp.StreamReader, limits: Limits
) -> tuple[Answer, bool]:
    """Return a response and whether its body was read to the end; of a large error only the beginning is read.

    Raises:
        TooLargeError: The body of a success is larger than allowed.
        UnpackError: The body is damaged.
    """
    limit = limits.of_status(status)
    chunks: list[bytes] = []
    size = 0
    while not content.at_eof():
        if size:
            await asyncio.sleep(0)  # unpacking a large body takes a while, and others want their turn in between
        chunk = content.read_nowait(_CHUNK) if content.is_eof() else await content.read(_CHUNK)
        chunks.append(chunk)
        size += len(chunk)
        if size > limit:
            if is_success(status):
                raise TooLargeError(chunks[0])
            return Answer(status, headers, b"".join(chunks)), False
    body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
    # aiohttp does not know this old name of gzip and leaves the body packed.
    if headers.get("Content-Encoding", "").lower() == "x-gzip":
        body = await unpack_body("gzip", body, limit)
    return Answer(status, headers, body), True


async def unpack_body(coding: str, packed: bytes, limit: int) -> bytes:
    """Return what a body unpacks to, giving others a turn between two pieces.

    Raises:
        TooLargeError: It unpacks to more than `limit` bytes.
        UnpackError: It is damaged.
    """
    pieces: list[bytes] = []
    size = 0
    for piece in unpack(coding, packed):
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            raise TooLargeError(pieces[0])
        await asyncio.sleep(0)
    return b"".join(pieces)
