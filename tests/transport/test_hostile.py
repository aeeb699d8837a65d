"""Many hostile responses at once hardly delay the event loop, because they are refused early or read in small steps."""

import asyncio
import gzip
import importlib
import json
import random
import subprocess
import sys
import zlib
from collections.abc import Callable
from itertools import groupby, pairwise
from typing import Any

import brotli  # type: ignore[import-untyped]
import pytest
from aiohttp import compression_utils
from multidict import CIMultiDict
from scripted_server import (
    LOOPS,
    SILENCE,
    Request,
    Script,
    ScriptedServer,
    client_for,
    closing,
    dump,
    ok,
    record,
    response,
    run_on,
)

from kaizen_async import AttemptTimeoutError, InstructorExecution, Outcome, RetryPolicy, TransportError
from kaizen_async._transport import encodings, session, transport
from kaizen_async._transport.encodings import MOST_MEMBERS, PIECE, UnpackError
from kaizen_async._transport.head import is_plain_interim, parse_head
from kaizen_async._transport.statuses import status_error
from kaizen_async._transport.wire import Endpoint
from kaizen_async._waiting.memory import EndedRecords
from kaizen_async.testing.certificates import Certificates

everywhere = pytest.mark.parametrize("loop", LOOPS)

ONCE = RetryPolicy(max_attempts=1)
CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
EMPTY_ZSTD_FRAME = bytes.fromhex("28b52ffd2000010000")


def _raw_deflate(data: bytes) -> bytes:
    return zlib.compress(data, wbits=-zlib.MAX_WBITS)


def _zstd(data: bytes) -> bytes:
    name = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    packed: bytes = importlib.import_module(name).compress(data)
    return packed


needs_zstd = pytest.mark.skipif(not compression_utils.HAS_ZSTD, reason="no zstd codec")
every_packer = pytest.mark.parametrize(
    ("coding", "pack"),
    [
        ("gzip", gzip.compress),
        ("deflate", zlib.compress),
        ("deflate", _raw_deflate),
        ("br", brotli.compress),
        pytest.param("zstd", _zstd, marks=needs_zstd),
    ],
    ids=["gzip", "deflate", "deflate without header", "br", "zstd"],
)
noise = random.Random(1).randbytes(150_000)


@every_packer
@pytest.mark.parametrize("body", [b"", b"{}", noise, b" " * 1_000_000, noise[:70_000] + b"a" * 300_000], ids=len)
def test_a_body_is_unpacked_in_small_steps(coding: str, pack: Callable[[bytes], bytes], body: bytes) -> None:
    """Unpacking gives small pieces that form the body, and a truncated body raises an error."""
    packed = pack(body)
    pieces = list(encodings.unpack(coding, packed))
    assert b"".join(pieces) == body
    assert max(map(len, pieces)) < 2 * PIECE  # brotli's limit is approximate
    for end in {0, len(packed) // 2, len(packed) - 1}:
        with pytest.raises(UnpackError):
            list(encodings.unpack(coding, packed[:end]))


@pytest.mark.parametrize(
    ("coding", "part"),
    [("gzip", gzip.compress(b"")), pytest.param("zstd", EMPTY_ZSTD_FRAME, marks=needs_zstd)],
    ids=["gzip", "zstd"],
)
def test_a_body_of_many_empty_parts_is_refused(coding: str, part: bytes) -> None:
    """A body may have a few parts, as the standards require, but not many."""
    assert b"".join(encodings.unpack(coding, part * MOST_MEMBERS)) == b""
    with pytest.raises(UnpackError, match="too many parts"):
        list(encodings.unpack(coding, part * (MOST_MEMBERS + 1)))


def zstd_frame(window_log: int, body: bytes) -> bytes:
    """Return a frame that declares a window of 2**window_log bytes, with a body that is not compressed."""
    return b"\x28\xb5\x2f\xfd\0" + bytes([(window_log - 10) << 3]) + (len(body) << 3 | 1).to_bytes(3, "little") + body


@needs_zstd
def test_a_zstd_frame_may_declare_a_window_of_eight_mebibytes() -> None:
    """The unpacker allocates the window that a frame of a few bytes declares. RFC 9659 allows 8 MiB."""
    assert b"".join(encodings.unpack("zstd", zstd_frame(23, b"{}"))) == b"{}"
    for window_log in (24, 27, 31, 41):
        with pytest.raises(UnpackError):
            list(encodings.unpack("zstd", zstd_frame(window_log, b"{}")))


@pytest.mark.parametrize("window_log", [10, 25, 30])
def test_a_brotli_stream_with_a_large_window_is_refused(window_log: int) -> None:
    """The large windows of up to 1 GiB belong to no content coding. A stream declares one in its first 14 bits."""
    declared = (0x11 | window_log << 8).to_bytes(2, "little")
    with pytest.raises(UnpackError):
        list(encodings.unpack("br", declared + b"\x0b\x02\x80hello\x03"))


@everywhere
@needs_zstd
@pytest.mark.parametrize("is_supported", [True, False], ids=["own connection", "session.post"])
def test_a_response_with_a_huge_window_costs_one_attempt(
    loop: str, is_supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frame that declares a window of 2 GiB ends the attempt before that is allocated."""
    monkeypatch.setattr(transport, "is_supported", lambda: is_supported)

    async def main() -> None:
        packed = response(zstd_frame(31, dump(record("bad"))), headers={"Content-Encoding": "zstd"})
        outcome = await met([packed], retry=ONCE)
        assert isinstance(outcome.error, TransportError)

    run_on(loop, main())


def in_chunks(body: bytes, size: int) -> bytes:
    """Return a response in chunks of a size."""
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    return CHUNKED + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


async def met(script: Script, **settings: Any) -> Outcome[Any]:
    """Return the outcome of a lookup with a scripted response, after a second lookup that must succeed."""
    async with (
        ScriptedServer(lambda request: script if request.id == "bad" else [ok(request)]) as server,
        closing(client_for(server, **settings), server) as kaizen,
    ):
        async with asyncio.timeout(20):
            (outcome,) = await kaizen.instructor_executions.get_many(["bad"])
            assert await kaizen.instructor_executions.get("good")
        return outcome


@everywhere
def test_chunks_of_one_byte_are_read_up_to_a_number(loop: str) -> None:
    """A response in chunks of one byte is read, up to a number of chunks."""

    async def main() -> None:
        long = record("bad", workflow={"id": "wf_1", "name": "x" * 20_000})
        body = response(long).partition(b"\r\n\r\n")[2]
        assert (await met([in_chunks(body, 1)])).ok
        outcome = await met([CHUNKED + b"1\r\n \r\n" * 40_000, SILENCE], retry=ONCE)
        assert isinstance(outcome.error, TransportError)
        assert "more than 32768 chunks" in outcome.error.reason

    run_on(loop, main())


@pytest.fixture
def by_post(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send requests through `session.post`, as on versions of aiohttp that our own connection does not support."""
    monkeypatch.setattr(transport, "is_supported", lambda: False)


@everywhere
@pytest.mark.usefixtures("by_post")
def test_small_chunks_by_tls_are_read_in_many_steps(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop runs other tasks between two reads of a kilobyte, although aiohttp resumes reading for each chunk."""
    seen: list[str] = []
    feed = session.Guard.buffer_updated

    def noting(guard: session.Guard, size: int) -> None:
        seen.append("read")
        feed(guard, size)

    async def beat() -> None:
        while True:
            seen.append("turn")
            await asyncio.sleep(0)

    async def main() -> None:
        certificates = Certificates("127.0.0.1")
        body = response(record("bad", workflow={"id": "wf_1", "name": "x" * 20_000})).partition(b"\r\n\r\n")[2]
        async with (
            ScriptedServer(lambda _: [in_chunks(body, 1)], ssl_context=certificates.for_server()) as server,
            closing(client_for(server, retry=ONCE, ssl_context=certificates.for_client()), server) as kaizen,
        ):
            beating = asyncio.create_task(beat())
            assert await kaizen.instructor_executions.get("bad")
            beating.cancel()

    monkeypatch.setattr(session.Guard, "buffer_updated", noting)
    run_on(loop, main())
    assert seen.count("read") > 100
    assert max(len(list(steps)) for step, steps in groupby(seen) if step == "read") <= 2


@everywhere
@needs_zstd
@pytest.mark.usefixtures("by_post")
def test_empty_streams_are_refused_before_aiohttp_unpacks_them(loop: str) -> None:
    """The client refuses many empty zstd streams before aiohttp creates a decoder for each."""

    async def main() -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Encoding: zstd\r\nContent-Length: 9000\r\n\r\n"
        outcome = await met([head + EMPTY_ZSTD_FRAME * 1000, SILENCE], retry=ONCE)
        assert isinstance(outcome.error, TransportError)
        assert "too many parts" in outcome.error.reason

    run_on(loop, main())


@everywhere
@pytest.mark.usefixtures("by_post")
def test_a_response_that_keeps_the_parser_busy_is_given_up(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client gives up a response by the parser's CPU time of this thread, which a busy machine does not change."""
    spent = iter(range(10**9))
    monkeypatch.setattr(session, "thread_time", lambda: next(spent) / 20)

    async def main() -> None:
        script = CHUNKED + b"1\r\n \r\n" * 20_000
        async with (
            ScriptedServer(lambda _: [script, SILENCE]) as server,
            closing(client_for(server, retry=ONCE), server) as kaizen,
        ):
            (outcome,) = await kaizen.instructor_executions.get_many(["bad"])
        assert isinstance(outcome.error, TransportError)
        assert "too long to parse" in outcome.error.reason

    run_on(loop, main())


@everywhere
@pytest.mark.parametrize("is_supported", [True, False], ids=["own connection", "session.post"])
def test_large_records_are_decoded_in_different_steps(
    loop: str, is_supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once decoding has taken long in a step, the loop runs other tasks before the next large record is decoded."""
    seen: list[str] = []
    decode = Endpoint.decode

    def noting(endpoint: Endpoint[Any], body: bytes, execution_id: str) -> Any:
        seen.append("decode")
        return decode(endpoint, body, execution_id)

    async def beat() -> None:
        while True:
            seen.append("turn")
            await asyncio.sleep(0)

    def play(request: Request) -> list[bytes]:
        return [response(record(request.id, workflow={"id": "wf_1", "name": "x" * 20_000}))]

    async def main() -> None:
        async with ScriptedServer(play) as server, closing(client_for(server), server) as kaizen:
            beating = asyncio.create_task(beat())
            outcomes = await kaizen.instructor_executions.get_many([f"exec_{n}" for n in range(20)])
            beating.cancel()
        assert [outcome.error for outcome in outcomes] == [None] * 20

    monkeypatch.setattr(transport, "is_supported", lambda: is_supported)
    monkeypatch.setattr(transport, "_DECODING_SECONDS", 0.0)
    monkeypatch.setattr(Endpoint, "decode", noting)
    run_on(loop, main())
    assert seen.count("decode") == 20
    assert ("decode", "decode") not in pairwise(seen)


@everywhere
@pytest.mark.usefixtures("by_post")
def test_a_pause_of_the_garbage_collector_is_not_charged_to_a_response(
    loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pause of the garbage collector does not count as time of the parser."""
    spent = iter(range(10**9))
    monkeypatch.setattr(session, "thread_time", lambda: next(spent) * 1.0)

    async def main() -> None:
        long = record("bad", workflow={"id": "wf_1", "name": "x" * 20_000})
        assert (await met([response(long)], retry=ONCE)).ok

    run_on(loop, main())


HUNGRY = brotli.compress(b" " * 20_000_000, quality=2, lgwin=24)


def hungry(request: Request) -> list[bytes]:
    """Return a response of a hundred bytes that needs 16 MiB to unpack."""
    return [response(HUNGRY, headers={"Content-Encoding": "br"}) if request.id != "good" else ok(request)]


@everywhere
@pytest.mark.parametrize("is_supported", [True, False], ids=["own connection", "session.post"])
def test_one_hungry_body_is_unpacked_at_a_time(loop: str, is_supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bodies that need much memory are unpacked one at a time, because fifty at once would take 800 MiB."""
    steps: list[int] = []
    alive: list[int] = []
    count = now = 0
    make = brotli.Decompressor

    class Unpacker:
        def __init__(self) -> None:
            nonlocal count
            count += 1
            alive.append(count)
            steps.append(now)
            self._inner = make()

        def __del__(self) -> None:
            nonlocal count
            count -= 1

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

    async def beat() -> None:
        nonlocal now
        while True:
            now += 1
            await asyncio.sleep(0)

    async def main() -> None:
        async with ScriptedServer(hungry) as server, closing(client_for(server, retry=ONCE), server) as kaizen:
            beating = asyncio.create_task(beat())
            outcomes = await kaizen.instructor_executions.get_many([f"bad_{number}" for number in range(6)])
            beating.cancel()
            assert all("larger than max_response_bytes" in str(outcome.error) for outcome in outcomes)
            assert await kaizen.instructor_executions.get("good")

    monkeypatch.setattr(transport, "is_supported", lambda: is_supported)
    monkeypatch.setitem(encodings._NEW, "br", Unpacker)
    monkeypatch.setattr(brotli, "Decompressor", Unpacker)
    run_on(loop, main())
    assert len(steps) == 6 + is_supported  # our own connection tries one as it arrives
    assert len(set(steps[is_supported:])) == 6
    assert max(alive) == 1


@everywhere
@pytest.mark.usefixtures("by_post")
def test_the_turn_of_a_hungry_body_ends_with_its_attempt(loop: str) -> None:
    """A silent packed body does not block other packed bodies, in whatever form its headers arrive."""
    heads = [
        b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\nContent-Length: 9\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nCONTENT-ENCODING:BR\r\nContent-Length: 9\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1000 + b"\r\nContent-Encoding: br\r\nContent-Length: 9\r\n\r\n",
    ]

    def play(request: Request) -> Script:
        if request.id == "good":
            return [response(brotli.compress(dump(record("good"))), headers={"Content-Encoding": "br"})]
        return [heads[int(request.id)], SILENCE]

    async def main() -> None:
        async with (
            ScriptedServer(play) as server,
            closing(client_for(server, retry=ONCE, attempt_timeout=0.3), server) as kaizen,
        ):
            assert await kaizen.instructor_executions.get("good")
            outcomes = await kaizen.instructor_executions.get_many(["0", "1", "2"])
            assert [type(outcome.error) for outcome in outcomes] == [AttemptTimeoutError] * 3
            assert await kaizen.instructor_executions.get("good")

    run_on(loop, main())


SPACES = b" " * 1_000_000
TEXTS = [";" * 1_000_000, "a" * 1_000_000, " " * 1_000_000 + "x", "reset" + "a" * 1_000_000, "t=1," * 250_000]


@pytest.mark.parametrize("value", [SPACES + b"\0", SPACES + b"x" + SPACES + b"\0", b"a " * 500_000 + b"\0"])
def test_a_long_header_line_is_read_in_one_pass(value: bytes) -> None:
    """Parsing a long header line takes linear time. Quadratic time would be an hour."""
    line = b"X:" + value
    parse_head(b"HTTP/1.1 200 OK\r\n" + line, 256)
    is_plain_interim([b"HTTP/1.1 103 Early Hints", line])


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:6])
@pytest.mark.parametrize("name", ["RateLimit", "RateLimit-Reset", "Retry-After", "Retry-After-Ms", "Date"])
def test_a_long_header_that_names_a_time_is_read_in_one_pass(name: str, text: str) -> None:
    """Parsing a long header with a time takes linear time. Quadratic time would be an hour."""
    error = status_error(429, CIMultiDict({"Retry-After": "x", name: text}), b"", retried=(), now=0.0)
    assert error.retry_after is None


@everywhere
@pytest.mark.parametrize("is_supported", [True, False], ids=["own connection", "session.post"])
def test_an_interim_response_has_no_more_lines_than_a_final_one(
    loop: str, is_supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of header lines also applies to interim responses, because the client reads their lines repeatedly."""
    monkeypatch.setattr(transport, "is_supported", lambda: is_supported)

    async def main() -> None:
        for end in (b"", b"\r\n"):
            outcome = await met([b"HTTP/1.1 103 Early Hints\r\n" + b"a:\r\n" * 300 + end, SILENCE], retry=ONCE)
            assert isinstance(outcome.error, TransportError)
            assert "max_header_lines" in outcome.error.reason

    run_on(loop, main())


def test_a_record_with_much_json_is_not_remembered() -> None:
    """A record with much JSON in unknown fields is not kept, because its JSON would be kept too."""
    endpoint = Endpoint("get", InstructorExecution)
    small = endpoint.decode(json.dumps(record("a")).encode(), "a")
    large = endpoint.decode(json.dumps(record("b", zorp="x" * 400_000)).encode(), "b")
    ended = EndedRecords(10)
    ended.put(endpoint, "a", small)
    ended.put(endpoint, "b", large)
    assert ended.get(endpoint, "a") is small
    assert ended.get(endpoint, "b") is None


FOREIGN_BROTLI = {
    "none": "sys.modules['brotli'] = sys.modules['brotlicffi'] = None",
    "brotli 1.1": "sys.modules['brotlicffi'] = None; sys.modules['brotli'] = unlimited('process')",
    "brotli 1.0": "sys.modules['brotlicffi'] = None; sys.modules['brotli'] = unlimited('decompress')",
    "brotlicffi": "sys.modules['brotli'] = None; sys.modules['brotlicffi'] = unlimited('process')",
}
OFFER = """
import sys, types
def unlimited(name):
    module = types.ModuleType("brotli")
    module.error = ValueError
    module.Decompressor = type("Decompressor", (), {{name: lambda self, data: b"hello"}})
    return module
{foreign}
from kaizen_async._transport.encodings import OFFERED
print(OFFERED)
"""


@pytest.mark.parametrize("foreign", FOREIGN_BROTLI.values(), ids=FOREIGN_BROTLI)
def test_brotli_is_not_offered_where_it_cannot_be_unpacked_in_steps(foreign: str) -> None:
    """With such a module, every response in it would fail."""
    program = OFFER.format(foreign=foreign)
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)  # noqa: S603 - ours
    assert "gzip, deflate" in ran.stdout
    assert "br" not in ran.stdout
    assert "br" in encodings.OFFERED
