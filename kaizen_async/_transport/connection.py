"""One HTTP/1.1 connection: writes a request, and reads the response to it.

aiohttp opens the connection. Then this protocol takes the place of aiohttp's on the transport. It reads only common
responses: a final status, a plain body of known length or in chunks, optionally compressed. Everything else goes to
aiohttp's parser, from the first byte of the response on, and is read from there.

Because all bytes pass through here, a connection also knows what aiohttp's pool does not see: bytes that nobody asked
for, silence, and framing that broke.
"""

import asyncio
from collections.abc import Callable
from typing import Final

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection as BorrowedConnection
from aiohttp.http_exceptions import BadHttpMessage

from kaizen_async._transport.capacity import Capacity
from kaizen_async._transport.encodings import HUNGRY, UnpackError, can_unpack, unpack_small
from kaizen_async._transport.head import CHUNKED, Head, is_plain_interim, parse_head
from kaizen_async._transport.reading import (
    ERROR_BODY_LIMIT,
    INTERIM_STATUSES,
    MOST_INTERIM,
    Limits,
    TooLongHeadError,
    pause_for_others,
    read_body,
    unpack_body,
)
from kaizen_async._transport.response import Answer

READ_SIZE: Final = 65_536
_SMALL_READ_SIZE: Final = 8192
"""Bytes read at once of a response that is expensive per byte, so that many of them together do not stall the loop."""
_MOST_CHUNKS_REREAD: Final = 4096
"""Chunks of a response that aiohttp's parser reads again, if it turns out late that the response is not common."""
_MOST_CHUNKS: Final = 32_768
"""Chunks of one response. Chunks of one byte take six on the wire, and a step of Python each."""
_HEAD_READ_SIZE: Final = 4096
_TINY_CHUNK: Final = 16
_TINY_READ_SIZE: Final = 1024
"""Bytes read at once of a response whose chunks are smaller than `_TINY_CHUNK` on average."""
_LONGEST_CHUNK_SIZE: Final = 8
_HEX_DIGITS: Final = frozenset(b"0123456789abcdefABCDEF")
_INTERIM_START: Final = b"HTTP/1.1 1"
_NO_HEAD: Final = Head(b"", 0, 0, "")

# What a connection waits for.
_NOTHING: Final = 0
_HEAD: Final = 1
_BODY: Final = 2
_CHUNKS: Final = 3
_PARSER: Final = 4


class ExpiredError(Exception):
    """Raised if the time for a response was over before it came."""


class Address:
    """The connections to one address by one route. Of the idle ones, the one used last is at the end.

    Attributes:
        idle: The idle connections.
        capacity: How many there can be.
        turn: Lets one body at a time be unpacked in steps.
        is_wary: Whether each body that may take much memory to unpack is unpacked in its turn: one has.
        sends_long: Whether responses come in large reads: some were long, and none came in chunks.
        sends_chunks: Whether a large read had the beginning of a response in chunks. Their number has to be bounded.
    """

    __slots__ = ("capacity", "idle", "is_wary", "sends_chunks", "sends_long", "turn")

    def __init__(self) -> None:
        self.idle: list[Connection] = []
        self.capacity = Capacity()
        self.turn = asyncio.Lock()
        self.is_wary = self.sends_long = self.sends_chunks = False


class Connection(asyncio.BufferedProtocol):
    """Stands in the place of aiohttp's protocol on a transport.

    Args:
        borrowed: The connection as aiohttp's connector gave it out. It is given back when this one is closed.
        buffer: Where bytes are received. All connections of one event loop share it.
        limits: What a response may take.
        on_end: Called when the connection is lost or spoiled while it is idle.
        address: Where it leads to.

    Attributes:
        opened_at: The loop's time at which it was opened.
        expires_at: The loop's time from which on it is not used for another request.
        is_expected: Whether it was opened within the number of connections that the address is known to allow.
        idle_since: The loop's time at which its last response was complete.
        sent_at: The loop's time at which the last request was sent.
        served: Responses read so far.
        silent: Whether no byte came since the last request.
        spoiled: Whether it must not be used again: it was lost, or something is left of a response.
        out_of_step: Whether bytes came that belong to no request.
    """

    __slots__ = (
        "_body_size",
        "_borrowed",
        "_buffer",
        "_chunk_count",
        "_content",
        "_early",
        "_failure",
        "_has_early",
        "_head",
        "_head_buffer",
        "_interim",
        "_limits",
        "_loop",
        "_missing",
        "_next_chunk",
        "_on_end",
        "_open_head",
        "_packed",
        "_parser_bytes",
        "_parts",
        "_raw",
        "_small_body",
        "_stage",
        "_start",
        "_status",
        "_waiter",
        "address",
        "expires_at",
        "handler",
        "idle_since",
        "is_expected",
        "lost",
        "opened_at",
        "out_of_step",
        "sent_at",
        "served",
        "silent",
        "spoiled",
        "transport",
    )

    def __init__(
        self,
        borrowed: BorrowedConnection,
        buffer: memoryview,
        limits: Limits,
        on_end: "Callable[[Connection], None]",
        *,
        address: Address,
        opened_at: float,
        expires_at: float,
    ) -> None:
        handler = borrowed.protocol
        transport = None if handler is None else handler.transport
        if handler is None or transport is None:
            raise aiohttp.ClientConnectionResetError("the connection was closed before the request was sent")
        self._borrowed: BorrowedConnection | None = borrowed
        self._buffer = buffer
        self._head_buffer = buffer[:_HEAD_READ_SIZE]  # more may already be chunks
        self._limits = limits
        self._small_body = min(limits.body, ERROR_BODY_LIMIT)  # allowed after every status
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._stage = _NOTHING
        self._waiter: asyncio.Future[Answer | None] | None = None
        self._parts: list[bytes] = []
        self._raw = bytearray()
        self._early = self._open_head = b""
        self._has_early = handler.should_close  # bytes came before this protocol was in place
        self._missing = self._start = self._status = self._next_chunk = 0
        self._body_size = self._chunk_count = self._interim = self._parser_bytes = 0
        self._head = _NO_HEAD
        self._packed = b""
        self._content: aiohttp.StreamReader | None = None
        self._failure: Exception | None = None
        self.address = address
        self.handler: ResponseHandler = handler
        self.transport: asyncio.Transport = transport
        self.lost = self.is_expected = False
        self.silent = True
        self.out_of_step = False
        self.spoiled = self._has_early
        self.served = 0
        self.opened_at = self.idle_since = self.sent_at = opened_at
        self.expires_at = expires_at
        self.transport.set_protocol(self)

    # What the pool does with it.

    def lend_again(self, borrowed: BorrowedConnection) -> None:
        """Take the transport over again, after aiohttp's pool has kept the connection."""
        self._borrowed = borrowed
        self.spoiled = self.spoiled or self.handler.should_close
        self.transport.set_protocol(self)

    def give_back(self) -> None:
        """Give the connection back to aiohttp's pool, for the next user of the session."""
        borrowed, self._borrowed = self._borrowed, None
        if borrowed is not None:
            self.transport.set_protocol(self.handler)
            borrowed.release()

    def abort(self) -> None:
        """Close at once, without waiting for a peer that may have stopped reading."""
        borrowed, self._borrowed = self._borrowed, None
        if borrowed is not None:
            self._stage = _NOTHING
            self.lost = self.spoiled = True
            self.transport.abort()
            self.handler.abort()
            borrowed.close()

    # Request and response.

    def exchange(self, head: bytes, body: bytes, now: float) -> "asyncio.Future[Answer | None]":
        """Send a request; return a future of the response, or of None if `finish` has to read it, or raises why not.

        Args:
            head: Its head, up to the length of its body.
            body: Its body.
            now: The loop's time.
        """
        waiter = self._waiter = asyncio.Future(loop=self._loop)
        if self.lost:
            self._fail(aiohttp.ClientConnectionResetError("the connection was closed before the request"))
            return waiter
        self._stage = _HEAD
        self._status = 0
        self.silent = True
        self.sent_at = now
        self._interim = self._chunk_count = 0
        # No variable holds the request, because error reports show the variables of frames, and it has the key in it.
        self.transport.write(b"%b%d\r\n\r\n%b" % (head, len(body), body))
        if self._has_early:
            # An overloaded server may respond before it has read anything.
            self._raw, self._early, self._has_early = bytearray(self._early), b"", False
            self.spoiled = False
            self._hand_over()
        return waiter

    def expire(self) -> None:
        """End the wait for the response that `exchange` returned a future of."""
        self._fail(ExpiredError())

    @property
    def status(self) -> int | None:
        """The status of the response, as soon as its head was read."""
        return self._status or None

    async def finish(self) -> tuple[Answer, bool]:
        """Read the response that `exchange` gave None for; return it and whether it was read to its end.

        Raises:
            TooLargeError, TooLongHeadError, UnpackError, aiohttp's errors: No usable response came.
            ExpiredError: `expire` was called before one came.
        """
        if self._failure is not None:
            raise self._failure
        if self._stage == _NOTHING and self._packed:
            packed, self._packed = self._packed, b""
            head = self._head
            body = await unpack_body(head.status, head.coding, packed, self._limits, self.address.turn)
            return Answer(head.status, head, body), True
        handler = self.handler
        for _ in range(MOST_INTERIM):
            message, content = await handler.read()
            if message.code not in INTERIM_STATUSES:
                break
        else:
            raise too_many_interim()
        self._status = message.code
        self._content = content
        failure = handler.exception()
        if failure is not None and not content.is_eof():
            raise failure
        response, is_complete = await read_body(
            message.code, message.headers, content, self._limits, is_packed=True, turn=self.address.turn
        )
        self._content = None
        if is_complete and not handler.should_close:
            self._stage = _NOTHING
            self.served += 1
        else:
            self.spoiled = True
        return response, is_complete

    # What the event loop calls.

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - the event loop's hint
        """Return where to receive bytes."""
        if self._stage == _HEAD:
            return self._buffer if self.address.sends_long else self._head_buffer
        if self._stage == _BODY:
            return self._buffer
        has_tiny_chunks = self._chunk_count * _TINY_CHUNK > self._body_size
        return self._buffer[: _TINY_READ_SIZE if has_tiny_chunks else _SMALL_READ_SIZE]

    def buffer_updated(self, nbytes: int) -> None:
        """Read what was received."""
        self.silent = False
        stage = self._stage
        if stage == _HEAD:
            data = bytes(self._buffer[:nbytes])
            if self._raw:
                data = bytes(self._raw) + data
                self._raw = bytearray()
            self._read_head(data)
        elif stage == _BODY:
            self._parts.append(bytes(self._buffer[:nbytes]))
            self._missing -= nbytes
            if self._missing == 0:
                raw = b"".join(self._parts)
                self._parts = []
                self._complete(raw[self._start :])
            elif self._missing < 0:
                self.out_of_step = True
                self._hand_over()
        elif stage == _CHUNKS:
            is_full = nbytes == len(self.get_buffer(0))
            self._raw += self._buffer[:nbytes]
            self._read_chunks()
            if is_full:
                pause_for_others(self.transport, self.handler)
        elif stage == _PARSER:
            self._feed(bytes(self._buffer[:nbytes]))
            if nbytes == _SMALL_READ_SIZE:
                pause_for_others(self.transport, self.handler)
        else:
            self._receive_unasked(bytes(self._buffer[:nbytes]))

    def eof_received(self) -> None:
        """Let the transport close: a peer that has stopped sending is of no use."""

    def connection_lost(self, exc: Exception | None) -> None:
        """End the exchange, as aiohttp's parser would."""
        self.lost = self.spoiled = True
        handler = self.handler
        if self._stage in {_HEAD, _BODY, _CHUNKS}:
            if self._parts or self._raw:
                self._hand_over()
            else:
                self._fail(_disconnection(exc))
        handler.connection_lost(exc)
        content = self._content
        if content is not None and not content.is_eof():
            self._break_off(content, content.exception() or handler.exception() or aiohttp.ClientPayloadError())
        self._on_end(self)

    # The common response.

    def _read_head(self, data: bytes) -> None:
        end = data.find(b"\r\n\r\n")
        if end > self._limits.head:
            self._fail(TooLongHeadError())
            return
        head = parse_head(data[:end], self._limits.head_lines) if end > 0 else None
        if head is None or (head.coding and not can_unpack(head.coding)):
            self._read_uncommon_head(data, end)
            return
        self._head = head
        self._status = head.status
        start = end + 4
        if head.length == CHUNKED:
            if len(data) > _HEAD_READ_SIZE:
                self.address.sends_long, self.address.sends_chunks = False, True
            self._stage = _CHUNKS
            self._raw = bytearray(data)
            self._next_chunk = start
            self._chunk_count = self._body_size = 0
            self._read_chunks()
            return
        missing = start + head.length - len(data)
        if missing < 0 or (head.length > self._small_body and head.length > self._body_limit()):
            self.out_of_step = missing < 0
            self._raw = bytearray(data)
            self._hand_over()
        elif missing == 0:
            self._complete(data[start:])
        else:
            self._stage = _BODY
            self.address.sends_long = not self.address.sends_chunks
            self._parts = [data]
            self._missing = missing
            self._start = start

    def _read_uncommon_head(self, data: bytes, end: int) -> None:
        """Drop an interim response in front of the final one, and leave everything else to aiohttp's parser."""
        lines = data[:end].split(b"\r\n") if end >= 0 else data.split(b"\r\n")[:-1]
        is_interim = data.startswith(_INTERIM_START)
        if is_interim and len(lines) > self._limits.head_lines + 1:
            self._fail(TooLongHeadError())
        elif not is_interim or not is_plain_interim(lines):
            self._raw = bytearray(data)
            self._hand_over()
        elif end < 0:
            self._raw = bytearray(data)
            if len(data) > self._limits.head:
                self._fail(TooLongHeadError())
        elif self._interim + 1 >= MOST_INTERIM:
            self._fail(too_many_interim())
        else:
            self._interim += 1
            if len(data) > end + 4:
                self._read_head(data[end + 4 :])

    def _read_chunks(self) -> None:
        """Read the chunks that are complete. Extensions, trailers and mistakes are left to aiohttp's parser."""
        raw, position = self._raw, self._next_chunk
        while True:
            end = raw.find(b"\r\n", position, position + _LONGEST_CHUNK_SIZE + 2)
            digits = raw[position : position + _LONGEST_CHUNK_SIZE + 1].rstrip(b"\r") if end < 0 else raw[position:end]
            if len(digits) > _LONGEST_CHUNK_SIZE or not _HEX_DIGITS.issuperset(digits) or not (digits or end < 0):
                self._hand_over()
                return
            if end < 0:
                break
            size = int(digits, 16)
            after = end + 2 + size
            closing = raw[after : after + 2]
            if not b"\r\n".startswith(closing):
                self._hand_over()
                return
            if len(closing) < 2:  # noqa: PLR2004 - CR and LF
                break
            if size == 0:
                self._finish_chunks(after + 2)
                return
            self._parts.append(bytes(raw[end + 2 : after]))
            self._body_size += size
            self._chunk_count += 1
            position = after + 2
        self._next_chunk = position
        if self._chunk_count > _MOST_CHUNKS:
            self._fail(BadHttpMessage(f"the response comes in more than {_MOST_CHUNKS} chunks"))
        elif self._body_size > self._body_limit() or len(raw) > self._limits.wire:
            self._hand_over()

    def _finish_chunks(self, end: int) -> None:
        if end != len(self._raw) or self._body_size > self._body_limit():
            self._hand_over()
            return
        body = b"".join(self._parts)
        self._parts = []
        self._complete(body)

    def _body_limit(self) -> int:
        return self._limits.wire if self._head.coding else self._limits.of_status(self._head.status)

    def _complete(self, body: bytes) -> None:
        """Unpack a complete body, and wake up the lookup that waits for it."""
        head = self._head
        if head.coding:
            is_hungry = head.coding in HUNGRY
            try:
                unpacked = None if is_hungry and self.address.is_wary else unpack_small(head.coding, body)
            except UnpackError:
                self.address.is_wary = self.address.is_wary or is_hungry
                self._raw = self._raw or bytearray(head.head + b"\r\n\r\n" + body)
                self._hand_over()
                return
            if unpacked is None or len(unpacked) > self._limits.of_status(head.status):
                self.address.is_wary = self.address.is_wary or is_hungry
                self._packed = body
                self._end(None)
                return
            body = unpacked
        self._end(Answer(head.status, head, body))

    def _end(self, response: Answer | None) -> None:
        """Give out the result of an exchange that was read completely."""
        self._stage = _NOTHING
        self.served += 1
        if self._raw:
            self._raw = bytearray()
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(response)

    # The uncommon response.

    def _hand_over(self) -> None:
        """Let aiohttp's parser read the response from its first byte."""
        # In the pieces that came, because aiohttp's parser gives out a head only if the piece with its end is sound.
        pieces = [bytes(self._raw)] if self._raw else self._parts
        self._raw = bytearray()
        self._parts = []
        if self._chunk_count > _MOST_CHUNKS_REREAD:
            self._fail(BadHttpMessage("the chunks of the response do not fit together"))
            return
        self._stage = _PARSER
        self._parser_bytes = 0
        self._open_head = b""
        self._content = None
        self.handler.set_response_params(
            read_until_eof=True,
            auto_decompress=False,  # it takes whole reads at once, and 113 empty streams fit into a kilobyte
            max_line_size=self._limits.head,
            max_field_size=self._limits.head,
            max_headers=self._limits.head_lines,
        )
        for piece in pieces:
            self._feed(piece)
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _feed(self, data: bytes) -> None:
        self._parser_bytes += len(data)
        handler = self.handler
        if data:
            handler.data_received(data)
        error = handler.exception()
        if error is None and self._exceeds_limits(data):
            error = TooLongHeadError() if self._open_head else BadHttpMessage("the response has too many bytes")
            handler.set_exception(error)
        content = self._content
        if error is not None and content is not None and not content.is_eof():
            self._break_off(content, error)  # else a mistake after the head would be noticed by its silence only

    def _break_off(self, content: aiohttp.StreamReader, error: BaseException) -> None:
        """End the reading of a body, one step later: the end of a chunk may just have woken a reader.

        That reader would not look at an error that was set before it runs, and would wait for more.
        """
        self._loop.call_soon(content.set_exception, error)

    def _exceeds_limits(self, data: bytes) -> bool:
        """Return whether aiohttp's parser got more than a response may have."""
        limit = self._limits.head
        if self._parser_bytes == len(data) or self._open_head:
            head = self._open_head + data
            end = head.find(b"\r\n\r\n", max(0, len(self._open_head) - 3))
            self._open_head = b"" if 0 <= end <= limit else head
            if end > limit or (end < 0 and len(head) > limit):
                return True
        return self._parser_bytes > self._limits.wire

    def _fail(self, error: Exception) -> None:
        """End an exchange whose response is of no use."""
        self._stage = _NOTHING
        self.spoiled = True
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            self._failure = error
            waiter.set_result(None)

    def _receive_unasked(self, data: bytes) -> None:
        """Note what nobody asked for: whatever comes next on this connection may belong to another request."""
        if not self.served:
            self._early += data[: READ_SIZE - len(self._early)]
            self._has_early = True
            return
        # With a 408, servers say that they close an idle connection.
        self.out_of_step = not data.startswith(b"HTTP/1.1 408 ")
        self.spoiled = True
        self._on_end(self)


def too_many_interim() -> BadHttpMessage:
    """Return the error for a server that never comes to its final response."""
    return BadHttpMessage(f"{MOST_INTERIM} interim responses and no final one")


def _disconnection(exc: Exception | None) -> Exception:
    """Return the error that aiohttp raises for a connection that ended before a response."""
    if exc is None:
        return aiohttp.ServerDisconnectedError()
    return aiohttp.ClientOSError(*exc.args) if isinstance(exc, OSError) else exc
