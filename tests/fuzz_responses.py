"""A fuzzer that gives the same bytes to our own connection and to aiohttp's parser, which must read the same response.

To run it by hand for ten minutes: `python tests/fuzz_responses.py 600`. It prints the number of inputs, and the input
that the two read differently if there is one. The tests run a few thousand inputs.
"""

import argparse
import asyncio
import gzip
import random
import sys
import time
from collections.abc import Awaitable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import brotli
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection as BorrowedConnection

from kaizen_async._transport.connection import READ_SIZE, Address, Connection
from kaizen_async._transport.reading import INTERIM_STATUSES, MOST_INTERIM, Limits, TooLongHeadError, read_body

LIMITS = Limits(3000, 2048, 32)
BODY = b'{"id":"a","text":"' + b"0123456789" * 8 + b'"}'
STEPS = 5
"""Steps of the event loop after each piece, so that both readers finish what they can."""
MOST_SECONDS = 5.0


def _response(*lines: bytes, status: bytes = b"HTTP/1.1 200 OK", body: bytes = b"") -> bytes:
    return b"\r\n".join((status, *lines, b"", body))


def _sized(body: bytes, *lines: bytes, status: bytes = b"HTTP/1.1 200 OK") -> bytes:
    return _response(b"Content-Length: %d" % len(body), *lines, status=status, body=body)


def _chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + end


_PACKED = gzip.compress(BODY, mtime=0)
_CHUNKED = b"Transfer-Encoding: chunked"

SAMPLES: dict[str, bytes] = {
    "plain": _sized(BODY, b"Date: Mon, 01 Jan 2026 00:00:00 GMT", b"Server: nginx", b"Connection: keep-alive"),
    "empty": _sized(b""),
    "error": _sized(b'{"message":"no"}', b"Retry-After: 3", status=b"HTTP/1.1 429 Too Many Requests"),
    "chunked": _response(_CHUNKED, body=_chunked(BODY[:20], BODY[20:])),
    "chunk extension": _response(_CHUNKED, body=b"3;a=b\r\nabc\r\n0\r\n\r\n"),
    "trailer": _response(_CHUNKED, body=_chunked(BODY, end=b"0\r\nX-A: b\r\n\r\n")),
    "gzip": _sized(_PACKED, b"Content-Encoding: gzip"),
    "chunked before a tab": _response(b"Transfer-Encoding: chunked\t", body=_chunked(BODY[:20], BODY[20:])),
    "chunked after a tab": _response(b"Transfer-Encoding:\tchunked", body=_chunked(BODY[:20], BODY[20:])),
    "length before a tab": _response(b"Content-Length: 5\t", body=b"abcde"),
    "gzip before a tab": _sized(_PACKED, b"Content-Encoding: gzip\t"),
    "gzip after a vertical tab": _sized(_PACKED, b"Content-Encoding:\x0b gzip"),
    "gzip in chunks": _response(_CHUNKED, b"Content-Encoding: gzip", body=_chunked(_PACKED[:9], _PACKED[9:])),
    "damaged gzip": _sized(_PACKED[:30] + b"!" + _PACKED[31:], b"Content-Encoding: gzip"),
    "half gzip": _sized(_PACKED[:30], b"Content-Encoding: gzip"),
    "brotli, then gzip": _sized(brotli.compress(BODY), b"Content-Encoding: br", b"Content-Encoding: gzip"),
    "brotli, then gzip, and a bare LF": _sized(
        brotli.compress(BODY), b"Content-Encoding: br", b"Content-Encoding: gzip"
    ).replace(b"\r\n\r\n", b"\r\n\n"),
    "brotli": _sized(brotli.compress(BODY), b"Content-Encoding: br"),
    "gzip bomb": _sized(gzip.compress(b" " * 100_000, mtime=0), b"Content-Encoding: gzip"),
    "interim": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + _sized(BODY),
    "no content": _response(status=b"HTTP/1.1 204 No Content"),
    "not modified": _response(b"Content-Length: 5", status=b"HTTP/1.1 304 Not Modified"),
    "to the end": _response(b"Connection: close", body=BODY),
    "close": _sized(BODY, b"Connection: close"),
    "HTTP/1.0": _sized(BODY, status=b"HTTP/1.0 200 OK"),
    "switch": _response(b"Upgrade: websocket", status=b"HTTP/1.1 101 Switching Protocols"),
    "two lengths": _sized(BODY, b"Content-Length: 5"),
    "equal lengths": _response(b"Content-Length: 5", b"Content-Length: 5", body=b"abcde"),
    "length and chunks": _response(b"Content-Length: 5", _CHUNKED, body=_chunked(BODY)),
    "chunks twice": _response(_CHUNKED, _CHUNKED, body=_chunked(BODY)),
    "gzip, chunked": _response(b"Transfer-Encoding: gzip, chunked", body=_chunked(_PACKED)),
    "chunked, identity": _response(b"Transfer-Encoding: chunked, identity", body=_chunked(BODY)),
    "length with a sign": _response(b"Content-Length: +5", body=b"abcde"),
    "length with a minus": _response(b"Content-Length: -5", body=b"abcde"),
    "length with a comma": _response(b"Content-Length: 5, 5", body=b"abcde"),
    "length in hex": _response(b"Content-Length: 0x5", body=b"abcde"),
    "length in Arabic digits": _response("Content-Length: \u0665".encode(), body=b"abcde"),
    "length of twenty digits": _response(b"Content-Length: 00000000000000000005", body=b"abcde"),
    "no length value": _response(b"Content-Length:", body=b"abcde"),
    "space before the colon": _response(b"Content-Length : 5", body=b"abcde"),
    "space before the name": _response(b"A: b", b" Content-Length: 5", body=b"abcde"),
    "folded": _response(b"X-A: b", b"\tc", b"Content-Length: 5", body=b"abcde"),
    "no colon": _response(b"X-A", b"Content-Length: 5", body=b"abcde"),
    "no name": _response(b": x", b"Content-Length: 5", body=b"abcde"),
    "NUL in a value": _response(b"X-A: \x00", b"Content-Length: 5", body=b"abcde"),
    "bare LF": b"HTTP/1.1 200 OK\nContent-Length: 5\n\nabcde",
    "bare LF in a head": b"HTTP/1.1 200 OK\r\nX-A: b\nContent-Length: 5\r\n\r\nabcde",
    "bare CR in a head": b"HTTP/1.1 200 OK\r\nX-A: b\rContent-Length: 5\r\n\r\nabcde",
    "lower case": b"HTTP/1.1 200 ok\r\ncontent-length: 5\r\n\r\nabcde",
    "no reason": _response(b"Content-Length: 5", status=b"HTTP/1.1 200", body=b"abcde"),
    "two digits": _response(b"Content-Length: 5", status=b"HTTP/1.1 20 OK", body=b"abcde"),
    "four digits": _response(b"Content-Length: 5", status=b"HTTP/1.1 2000 OK", body=b"abcde"),
    "HTTP/2.0": _response(b"Content-Length: 5", status=b"HTTP/2.0 200 OK", body=b"abcde"),
    "not HTTP": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "more than the length": _response(b"Content-Length: 5", body=b"abcdefgh"),
    "two responses": _sized(BODY) * 2,
    "chunk without a size": _response(_CHUNKED, body=b"\r\nabc\r\n0\r\n\r\n"),
    "chunk size with a sign": _response(_CHUNKED, body=b"+3\r\nabc\r\n0\r\n\r\n"),
    "chunk size with 0x": _response(_CHUNKED, body=b"0x3\r\nabc\r\n0\r\n\r\n"),
    "chunk size with a space": _response(_CHUNKED, body=b"3 \r\nabc\r\n0\r\n\r\n"),
    "chunk size with an underscore": _response(_CHUNKED, body=b"1_0\r\n0123456789abcdef\r\n0\r\n\r\n"),
    "chunk size of many zeros": _response(_CHUNKED, body=b"0000000000003\r\nabc\r\n0\r\n\r\n"),
    "chunk size too large": _response(_CHUNKED, body=b"fffffffffffffffff\r\nabc\r\n0\r\n\r\n"),
    "chunk longer than its size": _response(_CHUNKED, body=b"3\r\nabcd\r\n0\r\n\r\n"),
    "chunk with bare LF": _response(_CHUNKED, body=b"3\nabc\n0\n\n"),
    "chunk cut off": _response(_CHUNKED, body=b"5\r\nabc"),
    "too large": _sized(b" " * 3001),
    "large error": _sized(b" " * 3001, status=b"HTTP/1.1 500 Oops"),
    "many fields": _response(*(b"X-%d: y" % number for number in range(40)), b"Content-Length: 0"),
    "long field": _sized(BODY, b"X-A: " + b"y" * 3000),
}

TOKENS = [b"\r\n", b"\n", b"\r", b"\x00", b":", b" ", b"\t", b";", b",", b"0", b"5", b"f", b"-", b"\xff", b"\r\n\r\n"]
TOKENS += [b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Content-Encoding: gzip\r\n", b"0\r\n\r\n"]
TOKENS += [b"Connection: close\r\n", b"HTTP/1.1 ", b"HTTP/1.1 100 Continue\r\n\r\n", b"Trailer: X\r\n", b"keep-alive"]


class Read(NamedTuple):
    """The response that a reader has read."""

    status: int
    body: bytes


class _Transport(asyncio.Transport):
    """A transport that discards everything written to it and never closes itself."""

    def __init__(self) -> None:
        super().__init__()
        self._protocol: Any = None

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def get_protocol(self) -> Any:
        return self._protocol

    def write(self, data: Any) -> None:
        pass

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class _Borrowed:
    """A replacement for the connection that aiohttp's connector returns."""

    def __init__(self, protocol: ResponseHandler) -> None:
        self.protocol = protocol

    def close(self) -> None:
        pass


class _Handler(ResponseHandler):
    """A handler that records whether it received any data."""

    has_read = False

    def data_received(self, data: bytes, **settings: Any) -> None:
        self.has_read = True
        super().data_received(data, **settings)


def _handler() -> _Handler:
    handler = _Handler(asyncio.get_running_loop())
    handler.connection_made(_Transport())
    return handler


async def _by_aiohttp(handler: ResponseHandler) -> Read:
    for _ in range(MOST_INTERIM):
        message, content = await handler.read()
        if message.code not in INTERIM_STATUSES:
            break
    else:
        raise ValueError("too many interim responses")
    answer, _ = await read_body(message.code, message.headers, content, LIMITS, is_packed=False, turn=asyncio.Lock())
    return Read(answer.status, answer.body)


async def _by_us(connection: Connection) -> Read:
    answer = await connection.exchange(b"", b"", 0.0)
    if answer is None:
        answer, _ = await connection.finish()
    return Read(answer.status, answer.body)


async def _outcome(reading: "Awaitable[Read]") -> Read | str:
    try:
        return await reading
    except TooLongHeadError:
        return "too long"
    except Exception:  # noqa: BLE001 - the two may fail with different errors
        return "error"


async def _steps(task: "asyncio.Task[Read | str]") -> bool:
    for _ in range(STEPS):
        if task.done():
            break
        await asyncio.sleep(0)
    return task.done()


async def read_by_aiohttp(pieces: Sequence[bytes]) -> Read | str:
    """Return the response that aiohttp's parser reads from bytes that arrive in pieces and then end."""
    handler = _handler()
    handler.set_response_params(
        read_until_eof=True, max_line_size=LIMITS.head, max_field_size=LIMITS.head, max_headers=LIMITS.head_lines
    )
    task = asyncio.create_task(_outcome(_by_aiohttp(handler)))
    await asyncio.sleep(0)
    for piece in pieces:
        handler.data_received(piece)
        if await _steps(task):
            break
        if handler.exception() is not None:
            # aiohttp does not report broken framing to the reader of a body, which would wait for its timeout.
            task.cancel()
            await asyncio.wait([task])
            return "error"
    handler.connection_lost(None)
    if not await _steps(task):
        # aiohttp does not report the end of a connection after a broken piece either. Ours must report it.
        task.cancel()
        await asyncio.wait([task])
        return "error"
    return task.result()


def connection_without_network(address: Address, limits: Limits = LIMITS) -> Connection:
    """Return a connection of ours that gets its bytes by `receive`."""
    buffer = memoryview(bytearray(READ_SIZE))
    borrowed = cast("BorrowedConnection", _Borrowed(_handler()))
    return Connection(borrowed, buffer, limits, lambda _: None, address=address, opened_at=0.0, expires_at=1e9)


def receive(connection: Connection, data: bytes) -> None:
    """Give bytes to a connection as an event loop does."""
    while data:
        room = connection.get_buffer(-1)
        size = min(len(room), len(data))
        room[:size] = data[:size]
        connection.buffer_updated(size)
        data = data[size:]


async def read_by_us(pieces: Sequence[bytes]) -> tuple[Read | str, bool]:
    """Return the response that our own connection reads from the pieces, and whether aiohttp's parser helped."""
    address = Address()
    address.sends_long = sum(map(len, pieces)) % 2 == 1
    connection = connection_without_network(address)
    task = asyncio.create_task(_outcome(_by_us(connection)))
    await asyncio.sleep(0)
    for piece in pieces:
        receive(connection, piece)
        if await _steps(task):
            break
    connection.connection_lost(None)
    return await asyncio.wait_for(task, MOST_SECONDS), cast("_Handler", connection.handler).has_read


def cut(data: bytes, positions: Sequence[int]) -> list[bytes]:
    """Return bytes in pieces that end at these positions."""
    ends = [*sorted(positions), len(data)]
    return [data[start:end] for start, end in zip([0, *ends], ends, strict=False) if start < end]


def mutated(data: bytes, random_: random.Random) -> bytes:
    """Return bytes with one to three small changes."""
    for _ in range(random_.randint(1, 3)):
        start = random_.randrange(len(data) + 1)
        end = min(len(data), start + random_.choice((0, 0, 1, 1, 2, 8)))
        new = random_.choice((random_.choice(TOKENS), random_.choice(TOKENS), random_.randbytes(1), b""))
        data = data[:start] + new + data[end:]
    return data


def cases(random_: random.Random) -> Iterator[list[bytes]]:
    """Yield inputs endlessly: samples, most of them changed, and cut at random."""
    samples = list(SAMPLES.values())
    while True:
        data = random_.choice(samples)
        if random_.random() < 0.9:
            data = mutated(data, random_)
        count = random_.choice((0, 0, 1, 1, 2, 5))
        yield cut(data, [random_.randrange(len(data) + 1) for _ in range(count)])


async def check(pieces: Sequence[bytes]) -> None:
    """Fail if the two read different responses, or if only our connection reads one.

    Our connection may refuse a response that aiohttp's parser reads in two cases: if the head is too long as a whole,
    which aiohttp does not check, and if there is an error after a response that it hands over to aiohttp's parser,
    because that parser then gets fewer pieces.
    """
    theirs, (ours, is_handed_over) = await read_by_aiohttp(pieces), await read_by_us(pieces)
    is_same = ours == theirs or not (isinstance(ours, Read) or isinstance(theirs, Read))
    is_stricter = ours == "too long" or (is_handed_over and ours == "error")
    assert is_same or is_stricter, f"{list(pieces)!r}: ours {ours!r}, aiohttp's {theirs!r}"


async def fuzz(seconds: float, seed: int) -> int:
    """Check inputs for a while, and return their number."""
    until = time.monotonic() + seconds
    tried = 0
    for pieces in cases(random.Random(seed)):
        await check(pieces)
        tried += 1
        if time.monotonic() >= until:
            break
    return tried


def main() -> None:
    """Fuzz for a while, and print the number of inputs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    tried = asyncio.run(fuzz(arguments.seconds, arguments.seed))
    sys.stdout.write(f"{tried:,} inputs in {arguments.seconds:.0f} s from seed {arguments.seed}: no difference\n")


if __name__ == "__main__":
    main()
