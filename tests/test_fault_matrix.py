"""Each row is a fault between client and server: its error, the number of requests, and the state afterwards.

Each row runs against a real loopback server, on both event loops, through `get` and `get_many`. After any fault, the
call ends in time, the same client continues to work, and no task, slot or connection stays behind.
"""

import asyncio
import gzip
import logging
import socket
import ssl
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any, NamedTuple

import aiohttp
import pytest
import trustme
from aiohttp.abc import AbstractResolver, ResolveResult
from scripted_server import (
    CLOSE,
    HALF_CLOSE,
    LOOPS,
    RESET,
    SILENCE,
    VERBS,
    Play,
    Request,
    Script,
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
    traces_of,
)

from kaizen_async import (
    AttemptTimeoutError,
    AuthenticationError,
    ClientClosedError,
    DeadlineExceededError,
    DecodeError,
    KaizenClient,
    KaizenError,
    NotFoundError,
    Outcome,
    RateLimitError,
    RetryPolicy,
    StatusError,
    TransportError,
)
from kaizen_async._transport import encodings

pytestmark = pytest.mark.no_cover
"""Other tests cover the same code, and measuring coverage would take most of the time of this one."""

KEY = "sk-matrix-7f3a"
"""The key that no output of any row may contain."""

BOUND = 10.0
"""Seconds within which every row must end: far more than any row needs."""

BODY = dump(record("bad"))
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
GZIP = {"Content-Encoding": "gzip"}
SHORTLY = 0.03
"""Seconds of pause after which the next bytes arrive in a separate segment."""


class Row(NamedTuple):
    """A fault and its expected result.

    `error` is the exact class; None stands for a record. `requests` is the number of requests that the server must see.
    A row with `recovers` is retried, so that a temporary fault causes no error.
    """

    name: str
    play: Play
    error: type[KaizenError] | None
    requests: int
    recovers: bool = False
    settings: Mapping[str, Any] = {}
    check: Callable[[Any], bool] = lambda _: True


def always(*script: bytes | float | Any) -> Play:
    """Return a play that is the same for every request."""
    return lambda _: script


def plain(body: bytes, headers: str = "") -> bytes:
    """Return a 200 response with its length and these headers."""
    return HEAD + f"Content-Length: {len(body)}\r\n{headers}".encode() + b"\r\n" + body


def retried(name: str, play: Play, error: type[KaizenError] = TransportError, **more: Any) -> Row:
    """Return a row that uses up all three attempts."""
    return Row(name, play, error, 3, recovers=True, **more)


def retried_once(name: str, play: Play, error: type[KaizenError] = TransportError, **more: Any) -> Row:
    """Return a row whose second response fails like the first and ends the lookup."""
    return Row(name, play, error, 2, recovers=True, **more)


def final(name: str, play: Play, error: type[KaizenError] | None, **more: Any) -> Row:
    """Return a row that no further attempt would fix."""
    return Row(name, play, error, 1, **more)


def timed_out(name: str, play: Play) -> Row:
    """Return a row whose attempts all end with their timeout."""
    return retried(name, play, AttemptTimeoutError, settings={"attempt_timeout": 0.6})


def status(code: int, error: type[KaizenError], **headers: str) -> Row:
    """Return a row with a status that is not retried."""
    answer = response({"message": "no"}, code, {name.replace("_", "-"): text for name, text in headers.items()})
    return final(f"{code}", always(answer), error, check=lambda e: e.status == code and e.retryable is False)


def retried_status(code: int) -> Row:
    """Return a row with a status that means "not now"."""
    answer = response(b"<html>later</html>", code)
    return retried(f"{code}", always(answer), StatusError, check=lambda e: e.status == code)


def throttled(code: int, error: type[KaizenError], name: str, value: str) -> Row:
    """Return a row with a throttling response that names a short time."""
    answer = response({"message": "slow down"}, code, {name: value})
    return retried(f"{code} {name}: {value}", always(answer), error, check=lambda e: e.status == code)


def stale(ending: Any) -> Play:
    """Return a play that responds to the first request of a connection and breaks the connection at the second."""
    return lambda request: [ok(request)] if request.number_on_connection == 1 else [ending]


def is_final(error: Any) -> bool:
    """Return whether an error is not retryable."""
    return error.retryable is False


def names_the_limit(error: Any) -> bool:
    """Return whether an error names the setting that the headers exceed."""
    return "max_header_bytes" in error.reason


def names_the_field(path: str) -> Callable[[Any], bool]:
    """Return a check that an error names the path of a field."""
    return lambda error: error.path == path and is_final(error)


def trickle(data: bytes) -> Script:
    """Return a script that sends a byte every 20 ms."""
    return [step for position in range(len(data)) for step in (data[position : position + 1], 0.02)]


def changed(**changes: Any) -> Play:
    """Return a play that responds with a changed record."""
    return lambda request: [response(record(request.id, **changes))]


def without_end(request: Request) -> Script:
    """Respond with a record without its end time, which is required."""
    return [response({name: value for name, value in record(request.id).items() if name != "endTime"})]


def with_headers(count: int, size: int) -> bytes:
    """Return a response with a number of additional headers of a given size."""
    return response(record("bad"), headers={f"X-{n}": "x" * size for n in range(count)})


DEFLATED = zlib.compress(BODY)
GZIPPED = gzip.compress(BODY)
BAD_CRC = GZIPPED[:-8] + b"\0\0\0\0" + GZIPPED[-4:]
MANY_DIGITS = BODY.replace(b'"durationMs":null', b'"durationMs":' + b"9" * 100_000)
SPACES = b" " * 70_000
UNKNOWN_LENGTH = HEAD + b"Connection: close\r\n\r\n"

ROWS = [
    # Before the response.
    retried("FIN after the request", always(CLOSE)),
    retried("RST after the request", always(RESET)),
    retried("half-closed after the request", always(HALF_CLOSE)),
    # In the headers.
    retried("FIN inside the headers", always(b"HTTP/1.1 200 OK\r\nContent-Ty", CLOSE)),
    retried("RST inside the headers", always(b"HTTP/1.1 200 OK\r\nContent-Ty", SHORTLY, RESET)),
    retried_once("no HTTP at all", always(b"SSH-2.0-OpenSSH_9.6\r\n", CLOSE)),
    retried_once("bad status line", always(b"HTTP/1.1 abc OK\r\n\r\n", CLOSE)),
    final("header of 30,000 bytes", always(with_headers(1, 30_000)), None),
    retried_once("header of 40,000 bytes", always(with_headers(1, 40_000)), check=names_the_limit),
    retried_once("headers of 40,000 bytes", always(with_headers(100, 400)), check=names_the_limit),
    retried_once("headers without an end", always(HEAD + b"X: y\r\n" * 6000, SILENCE), check=names_the_limit),
    final("200 headers", always(with_headers(200, 1)), None),
    retried_once("300 headers", always(with_headers(300, 1)), check=names_the_limit),
    retried_once("two lengths", always(plain(BODY, "Content-Length: 3\r\n"))),
    # In the body.
    retried("FIN in the body", always(plain(BODY)[:-9], CLOSE)),
    retried("RST in the body", always(plain(BODY)[:-9], SHORTLY, RESET)),
    retried("half-closed in the body", always(plain(BODY)[:-9], HALF_CLOSE)),
    retried("FIN in a chunk", always(CHUNKED + b"80\r\n" + BODY[:16], CLOSE)),
    retried("FIN before the last chunk", always(CHUNKED + f"{len(BODY):x}\r\n".encode() + BODY + b"\r\n", CLOSE)),
    retried_once("bad chunk size with the headers", always(CHUNKED + b"ZZ\r\n")),
    retried_once("gzip garbage", always(plain(b"\x1f\x8bgarbage" * 9, "Content-Encoding: gzip\r\n"))),
    retried_once("gzip with a wrong checksum", always(plain(BAD_CRC, "Content-Encoding: gzip\r\n"))),
    retried_once("gzip cut off, its length right", always(plain(GZIPPED[:90], "Content-Encoding: gzip\r\n"))),
    retried_once("deflate cut off, its length right", always(plain(DEFLATED[:90], "Content-Encoding: deflate\r\n"))),
    retried_once("no length, closed early", always(UNKNOWN_LENGTH + BODY[:90], CLOSE), DecodeError),
    final("no length, closed at the end", always(UNKNOWN_LENGTH + BODY, CLOSE), None),
    retried_once("bytes after the body, with it", always(plain(BODY) + b"x")),
    final("bytes after the body, later", always(plain(BODY), SHORTLY, b"x"), None),
    final("an unknown Content-Encoding", always(plain(BODY, "Content-Encoding: zebra\r\n")), None),
    retried_once("two kinds of length", always(HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n")),
    retried_once("a negative length", always(HEAD + b"Content-Length: -5\r\n\r\n{}")),
    retried_once("a NUL in a header", always(plain(BODY, "X-A: b\0c\r\n"))),
    retried_once("HTTP/2", always(b"\0\0\x12\x04\0\0\0\0\0" * 4, CLOSE)),
    final("HTTP/1.0", always(plain(BODY).replace(b"1.1", b"1.0", 1), CLOSE), None),
    final("100 Continue", always(b"HTTP/1.1 100 Continue\r\n\r\n", SHORTLY, plain(BODY)), None),
    final("103 Early Hints", always(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + plain(BODY)), None),
    final("a 408 when idle", always(plain(BODY), SHORTLY, response(b"", 408, {"Connection": "close"}), CLOSE), None),
    # A status.
    final("101", always(b"HTTP/1.1 101 Up\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\nabc", SILENCE), StatusError),
    retried_once("205", always(b"HTTP/1.1 205 Reset\r\nContent-Length: 0\r\n\r\n"), DecodeError),
    *(status(code, StatusError) for code in (300, 301, 302, 303, 307, 308)),
    final("304", always(b"HTTP/1.1 304 Not Modified\r\n\r\n"), StatusError),
    *(status(code, StatusError) for code in (400, 402, 405, 406, 409, 410, 413, 415, 422, 451, 501, 505, 599, 999)),
    status(401, AuthenticationError),
    status(403, AuthenticationError),
    status(404, NotFoundError),
    *(retried_status(code) for code in (408, 425, 500, 502, 503, 504)),
    throttled(429, RateLimitError, "Retry-After", "0"),
    throttled(429, RateLimitError, "Retry-After-Ms", "20"),
    throttled(503, StatusError, "Retry-After-Ms", "20"),
    retried("503, Retry-After: nan", always(response(b"", 503, {"Retry-After": "nan"})), StatusError),
    retried("503, Retry-After: -5", always(response(b"", 503, {"Retry-After": "-5"})), StatusError),
    retried("503, Retry-After of 31 digits", always(response(b"", 503, {"Retry-After": "9" * 31})), StatusError),
    # A 200 without a record.
    retried_once("200 with HTML", always(plain(b"<html>hello</html>")), DecodeError),
    final("200 with a byte order mark", always(plain(b"\xef\xbb\xbf" + BODY)), None),
    retried_once("200 with UTF-16", always(plain(BODY.decode().encode("utf-16"))), DecodeError),
    retried_once("200 without a body", always(plain(b"")), DecodeError),
    retried_once("204", always(b"HTTP/1.1 204 No Content\r\n\r\n"), DecodeError),
    retried_once("200 with half a record", always(plain(BODY[:90])), DecodeError),
    final("200 with null", always(response(None)), DecodeError, check=is_final),
    final("200 with a list", always(response([record("bad")])), DecodeError, check=is_final),
    final("200 with an error object", always(response({"error": "no such thing"})), DecodeError, check=is_final),
    final("200 without a field", without_end, DecodeError, check=names_the_field("$.endTime")),
    final("200 with a field of another type", changed(workflow=[]), DecodeError, check=names_the_field("$.workflow")),
    final("200 with a status unknown so far", changed(status="Zorp"), None),
    final("200 with a field unknown so far", changed(zorp={"a": [1]}), None),
    final("200 with invalid UTF-8", always(plain(BODY.replace(b"Invoices", b"\xff\xfe"))), DecodeError, check=is_final),
    final("200 nested 100,000 deep", always(plain(b"[" * 100_000)), DecodeError, check=is_final),
    final("200 nested in an unknown field", always(plain(b'{"x":' + b"[" * 100_000)), DecodeError, check=is_final),
    final("200 with 100,000 digits", always(plain(MANY_DIGITS)), DecodeError, check=is_final),
    final("200 above the size", always(plain(SPACES + BODY)), DecodeError, settings={"max_response_bytes": 65_536}),
]  # fmt: skip

SLOW_ROWS = [
    timed_out("silence after the request", always(SILENCE)),
    timed_out("headers that never end", always(b"HTTP/1.1 200 OK\r\nContent-Ty", SILENCE)),
    timed_out("headers byte by byte", always(*trickle(plain(BODY)))),
    timed_out("endless 100 Continue", always(*[b"HTTP/1.1 100 Continue\r\n\r\n", 0.1] * 100)),
    timed_out("a body that stalls", always(plain(BODY)[:-9], SILENCE)),
    timed_out("a body byte by byte", always(HEAD + b"Content-Length: 400\r\n\r\n", *trickle(BODY))),
]
"""Rows that end only by a timeout."""


LATE_FAULTS = {
    "bad chunk size": (CHUNKED, b"ZZ\r\n"),
    "chunk longer than it says": (CHUNKED + b"5\r\n", b"{}garbage"),
    "chunk without its end": (CHUNKED + b"2\r\n{}", b"XX2\r\n{}\r\n"),
    "bad trailer": (CHUNKED + b"2\r\n{}\r\n0\r\n", b"no colon\x00\r\n\r\n"),
    "deflate cut off, its length right": (plain(DEFLATED[:90], "Content-Encoding: deflate\r\n")[:-40], DEFLATED[50:90]),
}
"""Framing that breaks in a segment after the headers. Some HTTP parsers then stop without an error."""

everywhere = pytest.mark.parametrize("loop", LOOPS)
every_verb = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)


@pytest.fixture(autouse=True)
def _no_key_in_logs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail a row that writes the key to any log at any level."""
    caplog.set_level(logging.DEBUG)
    yield
    assert KEY not in caplog.text


def faulty(play: Play) -> Play:
    """Return a play that is faulty for the id `bad` and responds to all other ids with their records."""
    return lambda request: play(request) if request.id == "bad" else [ok(request)]


def once(play: Play) -> Play:
    """Return a play for the first request. All later requests get a record."""
    return lambda request: play(request) if request.number == 1 else [ok(request)]


async def bounded(verb: Verb, client: KaizenClient, execution_id: str = "bad") -> Outcome[Any]:
    """Return the outcome of a lookup that must end in time and must not show the key."""
    async with asyncio.timeout(BOUND):
        outcome = await verb(client, execution_id)
    if outcome.error is not None:
        assert isinstance(outcome.error, KaizenError), repr(outcome.error)
        assert outcome.error.execution_id == execution_id
        assert KEY not in traces_of(outcome.error)
    assert KEY not in repr(client)
    assert KEY not in repr(client.stats())
    return outcome


async def meet(row: Row, verb: Verb, session: aiohttp.ClientSession | None = None) -> None:
    """Run a client against a fault, and check afterwards that it still works."""
    async with (
        ScriptedServer(faulty(row.play)) as server,
        closing(client_for(server, api_key=KEY, session=session, **row.settings), server) as client,
    ):
        outcome = await bounded(verb, client)
        assert type(outcome.error) is (row.error or type(None)), outcome.error
        assert server.asked["bad"] == row.requests
        assert outcome.error is None or outcome.error.attempts == row.requests
        assert outcome.error is None or row.check(outcome.error)
        assert (await bounded(verb, client, "good")).ok
        if session is not None:
            await session.close()


async def meet_with_session(row: Row, limits: aiohttp.ClientTimeout | None = None) -> None:
    """Run a client with a passed-in session against a fault."""
    async with aiohttp.ClientSession(timeout=limits or aiohttp.ClientTimeout()) as session:
        await meet(row, outcome_of_get, session)


async def meet_once(row: Row, verb: Verb) -> None:
    """Run a client against a fault that affects only the first request."""
    async with (
        ScriptedServer(once(row.play)) as server,
        closing(client_for(server, api_key=KEY, **row.settings), server) as client,
    ):
        outcome = await bounded(verb, client)
        assert outcome.ok, outcome.error
        assert server.asked["bad"] == client.stats().attempts == 2
        assert client.stats().retries == 1


@everywhere
@every_verb
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_fault_gives_its_error(row: Row, verb: Verb, loop: str) -> None:
    """A fault gives its error after the expected number of requests, and the client continues to work."""
    run_on(loop, meet(row, verb))


@everywhere
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_session_of_the_caller_makes_no_difference(row: Row, loop: str) -> None:
    """A fault gives the same error through a passed-in session, whose requests go through all of aiohttp."""
    run_on(loop, meet_with_session(row))


@everywhere
@every_verb
def test_slow_faults_end_with_the_attempt(verb: Verb, loop: str) -> None:
    """A missing or slow response ends with the attempt timeout.

    If the fault is temporary, the next attempt succeeds.
    """

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            for row in SLOW_ROWS:
                group.create_task(meet(row, verb), name=row.name)
                group.create_task(meet_once(row, verb), name=row.name)

    run_on(loop, main())


@everywhere
def test_slow_faults_in_a_session_of_the_caller(loop: str) -> None:
    """A missing response ends with the attempt timeout, whatever timeouts the caller's session has."""

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            for row in SLOW_ROWS:
                group.create_task(meet_with_session(row, aiohttp.ClientTimeout(total=0.01)), name=row.name)

    run_on(loop, main())


@everywhere
@pytest.mark.parametrize("row", [row for row in ROWS if row.recovers], ids=lambda row: row.name)
def test_a_temporary_fault_costs_one_request(row: Row, loop: str) -> None:
    """After a temporary fault, the second request returns the record."""
    run_on(loop, meet_once(row, outcome_of_get))


@everywhere
@every_verb
def test_framing_that_goes_wrong_late_ends_in_time(verb: Verb, loop: str) -> None:
    """Framing that breaks after the headers raises a TransportError, by the parser or by the timeout."""

    async def break_late(first: bytes, later: bytes) -> None:
        async with (
            ScriptedServer(faulty(always(first, SHORTLY, later, SILENCE))) as server,
            closing(client_for(server, api_key=KEY, attempt_timeout=0.3), server) as client,
        ):
            outcome = await bounded(verb, client)
            assert isinstance(outcome.error, TransportError)
            assert 2 <= outcome.error.attempts == server.asked["bad"] <= 3
            assert (await bounded(verb, client, "good")).ok

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            for name, (first, later) in LATE_FAULTS.items():
                group.create_task(break_late(first, later), name=name)

    run_on(loop, main())


@everywhere
@every_verb
@pytest.mark.parametrize("ending", [CLOSE, RESET], ids=["FIN", "RST"])
def test_a_connection_closed_on_accept_is_retried(ending: Any, verb: Verb, loop: str) -> None:
    """The client retries if the server closes a connection before any request, until a connection stays open."""

    async def main() -> None:
        async with (
            ScriptedServer(accept=lambda number: [ending] if number <= 4 else []) as server,
            closing(client_for(server, api_key=KEY), server) as client,
        ):
            outcome = await bounded(verb, client)
            assert type(outcome.error) is TransportError
            assert outcome.error.attempts == server.connections == 3
            outcome = await bounded(verb, client)
            assert outcome.ok, outcome.error
            assert server.connections == 5

    run_on(loop, main())


@everywhere
@every_verb
@pytest.mark.parametrize("ending", [CLOSE, RESET], ids=["FIN", "RST"])
def test_a_stale_connection_is_replaced_at_once(ending: Any, verb: Verb, loop: str) -> None:
    """If the server closes a kept-alive connection, the client retries on a new one without back-off."""

    async def main() -> None:
        policy = RetryPolicy(max_attempts=2, initial_backoff=600, max_backoff=600)
        async with (
            ScriptedServer(stale(ending)) as server,
            closing(client_for(server, api_key=KEY, retry=policy), server) as client,
        ):
            assert (await bounded(verb, client, "first")).ok
            assert (await bounded(verb, client, "second")).ok
            assert [server.asked["first"], server.asked["second"], server.connections] == [1, 2, 2]

    run_on(loop, main())


@everywhere
@every_verb
def test_a_server_that_closes_after_each_response(verb: Verb, loop: str) -> None:
    """Every lookup succeeds even if the server closes each connection after one response without a notice."""

    async def main() -> None:
        async with (
            ScriptedServer(lambda request: [ok(request), CLOSE]) as server,
            closing(client_for(server, api_key=KEY), server) as client,
        ):
            for number in range(20):
                assert (await bounded(verb, client, str(number))).ok

    run_on(loop, main())


@everywhere
@every_verb
def test_an_unexpected_response_is_discarded(verb: Verb, loop: str) -> None:
    """A second response to one request, left in a pooled connection, is not used for the next request."""

    def play(request: Request) -> Script:
        return [ok(request), SHORTLY, response(record("ghost"))] if request.number == 1 else [ok(request)]

    async def main() -> None:
        async with ScriptedServer(play) as server, closing(client_for(server, api_key=KEY), server) as client:
            for name in "abcde":
                assert (await bounded(verb, client, name)).unwrap().id == name
                await asyncio.sleep(2 * SHORTLY)

    run_on(loop, main())


@everywhere
@every_verb
def test_the_record_of_another_id_is_never_returned(verb: Verb, loop: str) -> None:
    """A record with another id raises a DecodeError, after one more attempt."""

    async def main() -> None:
        async with (
            ScriptedServer(faulty(always(response(record("other"))))) as server,
            closing(client_for(server, api_key=KEY), server) as client,
        ):
            outcome = await bounded(verb, client)
            assert isinstance(outcome.error, DecodeError)
            assert outcome.error.path == "$.id"
            assert server.asked["bad"] == 2
            assert (await bounded(verb, client, "good")).ok

    run_on(loop, main())


@everywhere
@pytest.mark.parametrize("name", ["br", "zstd"])
def test_a_missing_codec_is_not_tried_again(name: str, loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A response whose encoding needs a missing package fails at once, and the error names the package."""
    monkeypatch.delitem(encodings._NEW, name, raising=False)
    packed = plain(b"\x0b\x02\x80{}\x03", f"Content-Encoding: {name}\r\n")

    async def main() -> None:
        async with (
            ScriptedServer(faulty(always(packed))) as server,
            closing(client_for(server, api_key=KEY), server) as client,
        ):
            outcome = await bounded(outcome_of_get, client)
            assert isinstance(outcome.error, TransportError)
            assert "Please install" in outcome.error.reason
            assert server.asked["bad"] == 1
            assert (await bounded(outcome_of_get, client, "good")).ok

    run_on(loop, main())


@everywhere
@every_verb
def test_a_refused_connection_is_retried(verb: Verb, loop: str) -> None:
    """A refused connection raises a TransportError after all attempts."""

    async def main() -> None:
        async with ScriptedServer() as server:
            url = server.url
        async with closing(client_for(url, api_key=KEY)) as client:
            outcome = await bounded(verb, client)
            assert type(outcome.error) is TransportError
            assert outcome.error.attempts == 3
            assert isinstance(outcome.error.__cause__, aiohttp.ClientConnectorError)

    run_on(loop, main())


@everywhere
@every_verb
def test_a_slow_connect_ends_with_the_attempt(verb: Verb, loop: str) -> None:
    """If the server's backlog is full and connecting never succeeds, the lookup raises an AttemptTimeoutError."""

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
            fillers = [_connecting(listener.getsockname()) for _ in range(4)]
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            async with closing(client_for(url, api_key=KEY, attempt_timeout=0.3)) as client:
                outcome = await bounded(verb, client)
                assert type(outcome.error) is AttemptTimeoutError
                assert outcome.error.attempts == 3
            for filler in fillers:
                filler.close()

    run_on(loop, main())


def _connecting(address: tuple[str, int]) -> socket.socket:
    filler = socket.socket()
    filler.setblocking(False)
    filler.connect_ex(address)
    return filler


class Resolver(AbstractResolver):
    """A resolver that returns loopback after some failures, or slowly.

    Attributes:
        asked: Number of its calls.
    """

    def __init__(self, port: int, *, failures: int = 0, seconds: float = 0.0) -> None:
        self.asked = 0
        self._port = port
        self._failures = failures
        self._seconds = seconds

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return loopback for every name."""
        self.asked += 1
        await asyncio.sleep(self._seconds)
        if self.asked <= self._failures:
            raise OSError(socket.EAI_NONAME, "Name or service not known")
        return [
            ResolveResult(hostname=host, host="127.0.0.1", port=self._port, family=socket.AF_INET, proto=0, flags=0)
        ]

    async def close(self) -> None:
        """Do nothing."""


@asynccontextmanager
async def client_by_name(server: ScriptedServer, resolver: Resolver, **settings: Any) -> AsyncIterator[KaizenClient]:
    """Return a client that resolves the server's name."""
    connector = aiohttp.TCPConnector(resolver=resolver, use_dns_cache=False)
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        client_for("http://kaizen.test", api_key=KEY, session=session, allow_insecure_http=True, **settings) as client,
    ):
        yield client
    await server.until(lambda: not server.open)


@everywhere
@every_verb
def test_a_name_that_does_not_resolve_is_retried(verb: Verb, loop: str) -> None:
    """A DNS failure raises a TransportError after all attempts. A temporary one costs one attempt and no request."""

    async def main() -> None:
        async with ScriptedServer() as server:
            resolver = Resolver(server.port, failures=4)
            async with client_by_name(server, resolver) as client:
                outcome = await bounded(verb, client)
                assert type(outcome.error) is TransportError
                assert outcome.error.attempts == resolver.asked == 3
                assert (await bounded(verb, client)).ok
                assert resolver.asked == 5
                assert server.asked["bad"] == 1

    run_on(loop, main())


@everywhere
@every_verb
def test_a_name_that_resolves_slowly_ends_with_the_attempt(verb: Verb, loop: str) -> None:
    """The attempt timeout includes DNS."""

    async def main() -> None:
        async with ScriptedServer() as server:
            resolver = Resolver(server.port, seconds=60)
            async with client_by_name(server, resolver, attempt_timeout=0.2) as client:
                outcome = await bounded(verb, client)
                assert type(outcome.error) is AttemptTimeoutError
                assert not server.connections

    run_on(loop, main())


AUTHORITY = trustme.CA()
STRANGER = trustme.CA()


def serving(certificate: trustme.LeafCert) -> ssl.SSLContext:
    """Return the TLS settings of a server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    """Return the TLS settings of a client."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


CERTIFICATES = {
    "of an unknown authority": STRANGER.issue_cert("127.0.0.1"),
    "of another host": AUTHORITY.issue_cert("kaizen.test"),
    "expired": AUTHORITY.issue_cert(
        "127.0.0.1",
        not_before=datetime.now(UTC) - timedelta(days=9),
        not_after=datetime.now(UTC) - timedelta(days=1),
    ),
}


@everywhere
@every_verb
@pytest.mark.parametrize("certificate", CERTIFICATES.values(), ids=CERTIFICATES)
def test_a_certificate_that_does_not_verify_is_final(certificate: trustme.LeafCert, verb: Verb, loop: str) -> None:
    """An invalid certificate raises a TransportError at once, and the client sends nothing to the server."""

    async def main() -> None:
        async with (
            ScriptedServer(ssl_context=serving(certificate)) as server,
            closing(client_for(server, api_key=KEY, ssl_context=trusting(AUTHORITY)), server) as client,
        ):
            outcome = await bounded(verb, client)
            assert type(outcome.error) is TransportError
            assert outcome.error.reason.startswith("the server's certificate does not verify")
            assert not outcome.error.retryable
            assert outcome.error.attempts == 1
            assert not server.requests

    run_on(loop, main())


@everywhere
@every_verb
def test_a_valid_certificate_works(verb: Verb, loop: str) -> None:
    """A lookup over TLS succeeds with an authority that the caller trusts."""

    async def main() -> None:
        async with (
            ScriptedServer(ssl_context=serving(AUTHORITY.issue_cert("127.0.0.1"))) as server,
            closing(client_for(server, api_key=KEY, ssl_context=trusting(AUTHORITY)), server) as client,
        ):
            assert (await bounded(verb, client)).ok

    run_on(loop, main())


@everywhere
@every_verb
@pytest.mark.parametrize(
    ("script", "error"),
    [
        ([CLOSE], TransportError),
        ([RESET], TransportError),
        ([b"HTTP/1.1 400 Bad Request\r\n\r\n", CLOSE], TransportError),
        ([SILENCE], AttemptTimeoutError),
    ],
    ids=["FIN", "RST", "plain HTTP", "silence"],
)
def test_a_handshake_that_fails_is_retried(script: Script, error: type[KaizenError], verb: Verb, loop: str) -> None:
    """The client retries a failed TLS handshake like any other failed connection."""

    async def main() -> None:
        async with ScriptedServer(accept=lambda _: script) as server:
            url = server.url.replace("http:", "https:")
            async with closing(client_for(url, api_key=KEY, attempt_timeout=0.3), server) as client:
                outcome = await bounded(verb, client)
                assert type(outcome.error) is error
                assert outcome.error.attempts == server.connections == 3

    run_on(loop, main())


@everywhere
@every_verb
def test_waiting_for_a_slot_ends_with_the_deadline(verb: Verb, loop: str) -> None:
    """A lookup that gets no slot before its deadline raises a DeadlineExceededError and sends nothing."""

    async def main() -> None:
        async with (
            ScriptedServer(faulty(always(SILENCE))) as server,
            client_for(server, api_key=KEY, concurrency=1, deadline=0.3) as client,
        ):
            blocking = asyncio.create_task(client.instructor_executions.get("bad", deadline=0.8))
            await server.until(lambda: server.asked["bad"] == 1)
            outcome = await bounded(verb, client, "good")
            assert type(outcome.error) is DeadlineExceededError
            assert outcome.error.attempts == 0
            assert not server.asked["good"]
            with pytest.raises(DeadlineExceededError):
                await blocking
            assert (await bounded(verb, client, "good")).ok

    run_on(loop, main())


@everywhere
@every_verb
@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(code: int, verb: Verb, loop: str) -> None:
    """A redirect to another server is an error, and the client does not connect to that server."""

    async def main() -> None:
        async with ScriptedServer() as elsewhere:
            answer = response(b"", code, {"Location": f"{elsewhere.url}/instructor/executions/get"})
            async with (
                ScriptedServer(always(answer)) as server,
                closing(client_for(server, api_key=KEY), server) as client,
            ):
                outcome = await bounded(verb, client)
                assert type(outcome.error) is StatusError
                assert outcome.error.status == code
                assert not outcome.error.retryable
                assert elsewhere.connections == 0

    run_on(loop, main())


@everywhere
@every_verb
def test_a_pause_longer_than_the_deadline_ends_at_once(verb: Verb, loop: str) -> None:
    """The client does not wait for a Retry-After beyond the deadline, neither in this lookup nor in the next one."""

    async def main() -> None:
        answer = response(b"", 429, {"Retry-After": "3600"})
        async with (
            ScriptedServer(always(answer)) as server,
            closing(client_for(server, api_key=KEY, deadline=60), server) as client,
        ):
            first = await bounded(verb, client)
            assert type(first.error) is RateLimitError
            assert first.error.retry_after == 3600
            second = await bounded(verb, client, "good")
            assert type(second.error) is RateLimitError
            assert second.error.attempts == 0
            assert second.error.retry_after is not None
            assert 3500 < second.error.retry_after <= 3960
            assert len(server.requests) == 1
            assert client.stats().gate_pace == 0

    run_on(loop, main())


@everywhere
@pytest.mark.parametrize("ahead", [-86_400, 0, 86_400], ids=["a day behind", "right", "a day ahead"])
def test_a_retry_after_date_counts_from_the_date_header(ahead: int, loop: str) -> None:
    """A Retry-After date gives the right number of seconds even if the server's clock is wrong by a day."""

    async def main() -> None:
        now = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=ahead)
        dates = {
            "Date": format_datetime(now, usegmt=True),
            "Retry-After": format_datetime(now + timedelta(seconds=120), usegmt=True),
        }
        async with (
            ScriptedServer(always(response(b"", 503, dates))) as server,
            closing(client_for(server, api_key=KEY), server) as client,
        ):
            outcome = await bounded(outcome_of_get, client)
            assert isinstance(outcome.error, StatusError)
            assert outcome.error.retry_after == 120
            assert 100 < client.stats().gate_seconds_left <= 132

    run_on(loop, main())


@everywhere
@every_verb
def test_a_closed_session_of_the_caller_is_reported(verb: Verb, loop: str) -> None:
    """A lookup through a session that its owner has closed raises a ClientClosedError."""

    async def main() -> None:
        async with ScriptedServer() as server:
            async with aiohttp.ClientSession() as session:
                client = client_for(server, api_key=KEY, session=session)
                assert (await bounded(verb, client)).ok
            outcome = await bounded(verb, client)
            assert type(outcome.error) is ClientClosedError
            assert server.asked["bad"] == 1
            await client.aclose()

    run_on(loop, main())
