"""A lookup keeps little of a large response, reports it in a short printable message, and the client continues."""

import asyncio
import gzip
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import brotli
import pytest
from aiohttp import compression_utils
from scripted_server import (
    CLOSE,
    LOOPS,
    SILENCE,
    VERBS,
    Play,
    ScriptedServer,
    Verb,
    client_for,
    closing,
    dump,
    ok,
    outcome_of_get,
    record,
    response,
    run_on,
)

from kaizen_async import DecodeError, KaizenError, Outcome, StatusError, TransportError
from kaizen_async.errors import BODY_LIMIT, MESSAGE_LIMIT

everywhere = pytest.mark.parametrize("loop", LOOPS)
every_verb = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)

MEBIBYTE = 1 << 20
BOMB_SIZE = 64 * MEBIBYTE
MEMORY_LIMIT = 16 * MEBIBYTE
"""Peak memory of a lookup in bytes, with a response of at most 2 MiB: a quarter of the unpacked size of a bomb."""

MESSAGE_BOUND = 3 * MESSAGE_LIMIT
"""Characters of a whole message: the library's own words, and at most two pieces of foreign text."""


def _zstd(data: bytes) -> bytes:
    try:
        from compression import zstd
    except ImportError:
        from backports import zstd
    return zstd.compress(data)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, 9),
    "deflate": lambda data: zlib.compress(data, 9),
    "br": lambda data: brotli.compress(data, quality=5),
    "zstd": _zstd,
}


@cache
def bomb(encoding: str) -> bytes:
    """Return a few bytes that unpack to many."""
    return PACKERS[encoding](b" " * BOMB_SIZE)


every_encoding = pytest.mark.parametrize(
    "encoding",
    [
        "gzip",
        "deflate",
        "br",
        pytest.param("zstd", marks=pytest.mark.skipif(not compression_utils.HAS_ZSTD, reason="no zstd codec")),
    ],
)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Fail the test if its peak memory is too high."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEMORY_LIMIT


async def look_up(play: Play, verb: Verb = outcome_of_get, **settings: Any) -> tuple[Outcome[Any], ScriptedServer]:
    """Return the outcome of a scripted lookup and the server, after a second lookup that must succeed."""
    async with (
        ScriptedServer(lambda request: play(request) if request.id == "bad" else [ok(request)]) as server,
        closing(client_for(server, **settings), server) as client,
    ):
        async with asyncio.timeout(20):
            outcome = await verb(client, "bad")
            assert (await verb(client, "good")).ok
        return outcome, server


def assert_too_large(outcome: Outcome[Any], server: ScriptedServer) -> None:
    """Fail unless the outcome says that the response was too large, after one request."""
    assert type(outcome.error) is DecodeError
    assert "larger than max_response_bytes" in outcome.error.reason
    assert not outcome.error.retryable
    assert len(outcome.error.body) <= BODY_LIMIT
    assert server.asked["bad"] == 1


@everywhere
@every_encoding
@pytest.mark.usefixtures("little_memory")
def test_a_bomb_is_defused(encoding: str, loop: str) -> None:
    """The client stops unpacking a response of 64 MiB at the limit, in every encoding."""
    packed = bomb(encoding)
    assert len(packed) < BOMB_SIZE / 500
    tracemalloc.reset_peak()
    outcome, server = run_on(
        loop, look_up(lambda _: [response(packed, headers={"Content-Encoding": encoding})]), debug=False
    )
    assert_too_large(outcome, server)


@everywhere
@every_encoding
@pytest.mark.usefixtures("little_memory")
def test_a_bomb_in_an_error_is_defused(encoding: str, loop: str) -> None:
    """An error whose body unpacks to 64 MiB keeps its status and the beginning of the body."""
    packed = bomb(encoding)
    tracemalloc.reset_peak()
    outcome, _ = run_on(loop, look_up(lambda _: [response(packed, 400, {"Content-Encoding": encoding})]), debug=False)
    assert isinstance(outcome.error, StatusError)
    assert outcome.error.status == 400
    assert len(outcome.error.body) == BODY_LIMIT


HEADS = {
    "with a length": f"Content-Length: {BOMB_SIZE}\r\n\r\n".encode(),
    "with a wrong length": f"Content-Length: {10**15}\r\n\r\n".encode(),
    "without a length": b"Connection: close\r\n\r\n",
    "in chunks": b"Transfer-Encoding: chunked\r\n\r\n",
}


def flood(status: int, head: bytes, sent: list[int]) -> Play:
    """Return a play that sends 64 MiB and counts the bytes sent."""
    piece = b" " * 65_536
    framed = b"10000\r\n" + piece + b"\r\n" if b"chunked" in head else piece

    def play(_: object) -> Any:
        yield f"HTTP/1.1 {status} Whatever\r\n".encode() + head
        for _ in range(BOMB_SIZE // len(piece)):
            sent[0] += len(piece)
            yield framed
        yield CLOSE

    return play


@everywhere
@every_verb
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.usefixtures("little_memory")
def test_a_flood_is_cut_off(head: bytes, verb: Verb, loop: str) -> None:
    """The client stops reading a body above the limit, whether or not its length is announced."""
    sent = [0]
    outcome, server = run_on(loop, look_up(flood(200, head, sent), verb), debug=False)
    assert_too_large(outcome, server)
    assert sent[0] < BOMB_SIZE / 2


@everywhere
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.usefixtures("little_memory")
def test_a_flood_in_an_error_is_cut_off(head: bytes, loop: str) -> None:
    """The client reads a large body of an error only as far as is useful to keep the connection."""
    sent = [0]
    outcome, _ = run_on(loop, look_up(flood(404, head, sent)), debug=False)
    assert isinstance(outcome.error, StatusError)
    assert len(outcome.error.body) == BODY_LIMIT
    assert sent[0] < BOMB_SIZE / 2


@everywhere
@pytest.mark.usefixtures("little_memory")
def test_endless_headers_are_cut_off(loop: str) -> None:
    """Headers above the limits of the parser raise a TransportError."""
    line = b"X-Filler: " + b"x" * 4000 + b"\r\n"
    outcome, server = run_on(loop, look_up(lambda _: [b"HTTP/1.1 200 OK\r\n", *[line] * 10_000, SILENCE]), debug=False)
    assert isinstance(outcome.error, TransportError)
    assert server.asked["bad"] == 2


@everywhere
@pytest.mark.parametrize("encoding", ["identity", "gzip", "br"])
@pytest.mark.parametrize(("excess", "is_read"), [(0, True), (1, False)])
def test_the_limit_is_exact(excess: int, is_read: bool, encoding: str, loop: str) -> None:
    """The client accepts a response of exactly the allowed unpacked size and refuses one more byte."""
    body = dump(record("bad")) + b" " * 1000
    packed = PACKERS.get(encoding, bytes)(body)
    outcome, server = run_on(
        loop,
        look_up(
            lambda _: [response(packed, headers={"Content-Encoding": encoding})],
            max_response_bytes=len(body) - excess,
        ),
    )
    if is_read:
        assert outcome.ok
    else:
        assert_too_large(outcome, server)


UNICODE_BOMBS = {
    "a value": dump(record("bad")).replace(b"Invoices", b"\xff\xfe\xfd"),
    "the id": dump(record("bad")).replace(b'"bad"', b'"\xc3\x28"'),
    "a status": dump(record("bad")).replace(b'"status":"InProgress"}', b'"status":"\xc0\x80"}'),
}


@everywhere
@pytest.mark.parametrize("body", UNICODE_BOMBS.values(), ids=UNICODE_BOMBS)
def test_invalid_utf_8_is_a_misfit(body: bytes, loop: str) -> None:
    """Invalid UTF-8 raises a DecodeError that is not retried."""
    outcome, server = run_on(loop, look_up(lambda _: [response(body)]))
    assert type(outcome.error) is DecodeError
    assert not outcome.error.retryable
    assert server.asked["bad"] == 1


NESTED = {
    "arrays": b"[" * MEBIBYTE,
    "objects": b'{"a":' * (MEBIBYTE // 5),
    "arrays in an unknown field": b'{"id":"bad","zorp":' + b"[" * MEBIBYTE,
    "arrays in a list of records": b'{"id":"bad","logins":' + b"[" * MEBIBYTE,
    "complete arrays": b'{"id":"bad","zorp":' + b"[" * 400_000 + b"]" * 400_000 + b"}",
}


@everywhere
@pytest.mark.parametrize("status", [200, 400])
@pytest.mark.parametrize("body", NESTED.values(), ids=NESTED)
def test_deep_nesting_is_refused(body: bytes, status: int, loop: str) -> None:
    """Deep nesting raises a DecodeError. In an error response it leaves the status error without a message."""
    outcome, server = run_on(loop, look_up(lambda _: [response(body, status)]))
    assert type(outcome.error) is (DecodeError if status == 200 else StatusError)
    assert outcome.error.retryable is False
    assert server.asked["bad"] == 1


HOSTILE = "\x1b[31mfatal\x1b[0m\r\nINFO all is well \x00\u202e\ud800" + "x" * 100_000
"""Terminal colours, a forged log line, a NUL, a bidirectional mark, a lone surrogate, and a great length."""


EVIL = HOSTILE.replace("\ud800", "")

HOSTILE_ANSWERS: dict[str, list[bytes]] = {
    "a message": [response({"message": EVIL}, 400)],
    "an error": [response({"error": EVIL}, 500)],
    "a message with half a character": [response({"message": HOSTILE}, 400)],
    "a status line": [b"HTTP/1.1 200 " + b"\x1b[31m" * 8000 + b"\r\n\r\n"],
    "no HTTP": [b"\x1b[31mfatal\x00" * 200 + b"\r\n\r\n"],
    "a header": [response(b"", headers={"X-Evil": "\x1b[31m\x00" + "x" * 9000})],
    "another id": [response(record(EVIL))],
    "a field of another type": [response(record("bad", workflow=EVIL))],
    "a time": [response(record("bad", startTime=EVIL))],
    "no JSON": [response(EVIL.encode())],
    "a 401": [response({"message": EVIL}, 401)],
    "a 302": [response({"message": EVIL}, 302, {"Location": "http://evil.test/" + "x" * 5000})],
    "a 429": [response({"message": EVIL}, 429, {"Retry-After-Ms": "1"})],
    "a list in place of a message": [response({"message": [EVIL]}, 400)],
}


@everywhere
@pytest.mark.parametrize("answer", HOSTILE_ANSWERS.values(), ids=HOSTILE_ANSWERS)
def test_server_text_is_shortened_and_printable(
    answer: list[bytes], loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Messages, reprs and log records contain the server's text only shortened and without control characters."""
    caplog.set_level("DEBUG", logger="kaizen_async")
    outcome, _ = run_on(loop, look_up(lambda _: answer))
    error = outcome.error
    assert isinstance(error, KaizenError)
    logged = [entry.getMessage() for entry in caplog.records if entry.name == "kaizen_async"]
    assert logged
    for text in (str(error), error.reason, repr(error), *logged):
        assert text.isprintable()
        assert len(text) <= MESSAGE_BOUND
    if isinstance(error, (StatusError, DecodeError)):
        assert len(error.body) <= BODY_LIMIT
    if isinstance(error, DecodeError) and error.path is not None:
        assert len(error.path) <= MESSAGE_LIMIT
        assert error.path.isprintable()


@everywhere
def test_an_unknown_status_may_be_long(loop: str) -> None:
    """A record keeps an unknown status of any length and marks it as unknown."""
    outcome, _ = run_on(loop, look_up(lambda _: [response(record("bad", status=EVIL))]))
    assert outcome.execution.status == EVIL
    assert not outcome.execution.status.is_known


@everywhere
def test_an_id_cannot_forge_a_line_of_log(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    """The client sends an id with bidirectional marks unchanged and logs it without them."""
    caplog.set_level("DEBUG", logger="kaizen_async")
    evil = "exec_1\u202eINFO all is well\u2066 \U000e0001x"

    async def main() -> None:
        async with (
            ScriptedServer(lambda request: [response(b"", 500)] if request.number == 1 else [ok(request)]) as server,
            closing(client_for(server), server) as client,
        ):
            assert (await outcome_of_get(client, evil)).unwrap().id == evil
            assert server.asked[evil] == 2

    run_on(loop, main())
    logged = [entry.getMessage() for entry in caplog.records if entry.name == "kaizen_async"]
    assert len(logged) == 3
    assert all(text.isprintable() for text in logged)
