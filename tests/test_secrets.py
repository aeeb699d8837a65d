"""The client sends the API key to its server in one header. No log, error, repr, event or warning shows the key."""

import asyncio
import base64
import copy
import gc
import html
import io
import logging
import socket
import ssl
import sys
import traceback
import unicodedata
import urllib.parse
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import aiohttp
import pytest
import rich.console
import rich.traceback
from aiohttp.resolver import ThreadedResolver
from callers import CALLERS, Caller
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider
from scripted_server import (
    CLOSE,
    LOOPS,
    SILENCE,
    VERBS,
    Play,
    Request,
    Script,
    ScriptedServer,
    Verb,
    client_for,
    dump,
    record,
    response,
    run_on,
    traces_of,
)
from sentry_sdk.serializer import serialize
from sentry_sdk.utils import event_from_exception

from kaizen_async import (
    AuthenticationError,
    DecodeError,
    InstructorExecution,
    KaizenClient,
    KaizenError,
    RetryPolicy,
    StatusError,
)
from kaizen_async.otel import Telemetry

KEY = "sk-live-4eC39HqLyjWDarjtT1zdp7dc"
WITHHELD = "***"

everywhere = pytest.mark.parametrize("loop", LOOPS)
every_verb = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)


class Emitted(logging.Handler):
    """A handler that keeps the text of all log records of all loggers, with tracebacks."""

    def __init__(self) -> None:
        super().__init__(logging.NOTSET)
        self.setFormatter(logging.Formatter("%(name)s %(message)s %(args)s"))
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the text of a log record."""
        self.texts.append(self.format(record))


@pytest.fixture(autouse=True)
def emitted() -> Iterator[list[str]]:
    """Collect all log records and warnings, and fail the test if one of them contains the key."""
    handler = Emitted()
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.DEBUG)
    root.addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield handler.texts
        gc.collect(1)
    root.removeHandler(handler)
    root.setLevel(level)
    handler.texts += [str(warning.message) for warning in caught]
    assert handler.texts
    assert not [text for text in handler.texts if KEY in text]


def escaped(text: str) -> bytes:
    """Return a text with JSON escapes, as some JSON encoders write it."""
    return "".join(f"\\u{ord(char):04X}" if index % 2 else char for index, char in enumerate(text)).encode()


def said_back(text: bytes) -> dict[str, Play]:
    """Return responses in which a server repeats a text that it received."""
    spelled = text.decode()
    return {
        "401": lambda _: [response({"message": f"invalid key {spelled}"}, 401)],
        "403 in plain text": lambda _: [response(b"key " + text + b" may not", 403)],
        "400 with all headers": lambda request: [response({"error": f"bad: {dict(request.headers)}"}, 400)],
        "500": lambda _: [response(b"<html>" + text * 200 + b"</html>", 500)],
        "302": lambda _: [response(b"", 302, {"Location": f"http://127.0.0.1:9/?key={spelled}"})],
        "429": lambda _: [response({"error": spelled}, 429, {"Retry-After-Ms": "1"})],
        "the end of a long message": lambda _: [response({"message": "x" * 190 + spelled}, 400)],
        "another id": lambda _: [response(record(spelled))],
        "a misfit": lambda _: [response(record("bad", startTime=spelled))],
        "a body that is no JSON": lambda _: [response(b"<html>" + text + b"</html>")],
        "an error object": lambda _: [response({"error": spelled})],
        "half a record": lambda _: [response(dump(record("bad", browserSessionId=spelled))[:-9])],
        "a status line": lambda _: [b"HTTP/1.1 " + text + b" OK\r\n\r\n", CLOSE],
        "a bad header": lambda _: [b"HTTP/1.1 200 OK\r\nX-\x00Echo: " + text + b"\r\n\r\n", CLOSE],
        "no HTTP": lambda _: [text + b"\r\n\r\n", CLOSE],
        "half of the headers": lambda _: [b"HTTP/1.1 200 OK\r\nX-Echo: " + text + b"\r\nX-", CLOSE],
        "a bad chunk": lambda _: [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + text + b"\r\n"],
        "too much": lambda _: [response(b" " + text * 5000)],
        "an escaped message": lambda _: [response(b'{"message": "invalid key %b"}' % escaped(spelled), 401)],
        "an escaped id": lambda _: [response(dump(record("@")).replace(b"@", escaped(spelled)))],
        "an escaped misfit": lambda _: [response(dump(record("bad", startTime="@")).replace(b"@", escaped(spelled)))],
        "HTML": lambda _: [response(f"<p>{html.escape(spelled)}</p>".encode(), 403)],
        "base64": lambda _: [response({"message": base64.b64encode(b"Bearer " + text).decode()}, 400)],
        "a URL": lambda _: [response({"error": urllib.parse.quote(spelled, safe="")}, 400)],
        "capitals": lambda _: [response({"message": spelled.upper()}, 401)],
        "a status": lambda _: [response(record("bad", status=spelled, startTime=1))],
    }


@everywhere
@every_verb
@pytest.mark.parametrize("case", said_back(b""))
def test_a_key_that_a_server_repeats_is_withheld(case: str, verb: Verb, loop: str) -> None:
    """No error, event, repr or stats shows a key that the server repeats, in any place and any encoding."""
    events: list[Any] = []

    async def main() -> KaizenError:
        async with (
            ScriptedServer(said_back(KEY.encode())[case]) as server,
            client_for(server, api_key=KEY, max_response_bytes=100_000, on_event=events.append) as client,
        ):
            outcome = await verb(client, "bad")
            assert server.requests
            for shown in (
                outcome,
                client,
                client.instructor_executions,
                client.stats(),
                client._binding._headers,
                events,
            ):
                assert KEY not in repr(shown)
            assert isinstance(outcome.error, KaizenError)
            return outcome.error

    error = run_on(loop, main())
    for one in (error, copy.copy(error), copy.deepcopy(error)):
        assert KEY not in traces_of(one)
    if isinstance(error, (StatusError, DecodeError)):
        assert KEY.encode() not in error.body
        assert escaped(KEY) not in error.body


NAMED = {
    "as it is": KEY,
    "in a URL": "".join(f"%{ord(char):02x}" for char in KEY),
    "in HTML": "".join(f"&#{ord(char)};" for char in KEY),
    "in JSON": "".join(f"\\u{ord(char):04x}" for char in KEY),
    "base64": base64.b64encode(f"Bearer {KEY}".encode()).decode(),
    "base64 for URLs": base64.urlsafe_b64encode(KEY.encode()).decode(),
    "hexadecimal": KEY.encode().hex(),
}


@everywhere
@pytest.mark.parametrize("spelled", NAMED.values(), ids=NAMED)
def test_a_key_in_place_of_a_request_id_is_withheld(spelled: str, loop: str) -> None:
    """The client drops a request id that contains the key, and keeps the id of any other request."""
    events: list[Any] = []

    def play(request: Request) -> Script:
        return [response(record(request.id), 200, {"X-Request-Id": spelled if request.id == "bad" else "7f3c-4eC3"})]

    async def main() -> None:
        async with ScriptedServer(play) as server, client_for(server, api_key=KEY, on_event=events.append) as client:
            bad, good = await client.instructor_executions.get_many(["bad", "good"])
            assert (bad.request_id, good.request_id) == (None, "7f3c-4eC3")
            assert spelled not in repr(events)

    run_on(loop, main())


@everywhere
def test_a_key_in_place_of_a_status_is_not_logged(
    loop: str, emitted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client logs an unknown status, but not one that contains the key."""
    # The library logs a bounded number of unknown statuses in a process, and each of them once.
    monkeypatch.setattr("kaizen_async.models._unknown_members", {})
    letters, status = "sk-live-abcdefgh", "Zorping"

    def play(request: Request) -> Script:
        return [response(record(request.id, status=letters if request.id == "bad" else status))]

    async def main() -> None:
        async with ScriptedServer(play) as server, client_for(server, api_key=letters) as client:
            assert all(outcome.ok for outcome in await client.instructor_executions.get_many(["bad", "good"]))

    run_on(loop, main())
    assert not [text for text in emitted if letters in text]
    assert [text for text in emitted if f"unknown ExecutionStatus: {status}" in text]


@everywhere
def test_the_rest_of_a_message_is_kept(loop: str) -> None:
    """The client removes only the key from an error message and its body, and keeps the rest."""

    async def main() -> None:
        answer = response({"message": f"key {KEY} has expired"}, 401)
        async with ScriptedServer(lambda _: [answer]) as server, client_for(server, api_key=KEY) as client:
            with pytest.raises(AuthenticationError, match=r"key \*\*\* has expired") as caught:
                await client.instructor_executions.get("a")
            assert caught.value.body == dump({"message": f"key {WITHHELD} has expired"})

    run_on(loop, main())


@everywhere
def test_a_record_that_holds_the_key_is_not_changed(loop: str) -> None:
    """A record keeps all values that the server sent, even the key. The log of an unknown status omits the key."""

    async def main() -> None:
        play = lambda request: [response(record(request.id, browserSessionId=KEY, status=KEY))]  # noqa: E731 - short
        async with ScriptedServer(play) as server, client_for(server, api_key=KEY) as client:
            execution = await client.instructor_executions.get("a")
            assert (execution.browser_session_id, execution.status) == (KEY, KEY)

    run_on(loop, main())


@everywhere
@pytest.mark.parametrize("caller", CALLERS.values(), ids=CALLERS)
def test_the_key_travels_in_one_header_only(caller: Caller, loop: str) -> None:
    """Every request carries the key as a bearer token in one header and nowhere else."""

    def play(request: Request) -> Script:
        ended = record(request.id, endTime="2026-11-07T05:31:57Z", durationMs=1)
        return [response(b"", 503)] if request.number == 1 else [response(ended)]

    async def main() -> None:
        async with ScriptedServer(play) as server, client_for(server, api_key=KEY) as client:
            await caller(client, ["a", "b"])
            assert len(server.requests) >= 3
            for request in server.requests:
                assert request.headers["authorization"] == f"Bearer {KEY}"
                others = {**request.headers, "authorization": ""}
                assert KEY not in repr((request.target, request.id, others))

    run_on(loop, main())


@everywhere
def test_a_failing_client_keeps_its_key_when_it_is_abandoned(loop: str) -> None:
    """The warning about an unclosed client says where it was created and does not show the key."""

    async def main() -> None:
        async with ScriptedServer(lambda _: [SILENCE]) as server:
            client: KaizenClient | None = client_for(
                server, api_key=KEY, attempt_timeout=0.05, retry=RetryPolicy(max_attempts=1)
            )
            assert client is not None
            with pytest.raises(KaizenError):
                await client.instructor_executions.get("a")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                del client
                gc.collect()
                await asyncio.sleep(0.05)
            (complaint,) = [str(warning.message) for warning in caught]
            assert "never closed" in complaint
            assert KEY not in complaint

    run_on(loop, main())


@pytest.mark.parametrize("url", ["http://api.example.com", "http://10.0.0.1:8080", "http://localhost.example.com"])
def test_plain_http_to_another_machine_is_refused(url: str) -> None:
    """The client refuses plain HTTP to another machine unless allow_insecure_http is set."""
    with pytest.raises(ValueError, match="allow_insecure_http") as caught:
        KaizenClient(KEY, base_url=url)
    assert KEY not in traces_of(caught.value)
    KaizenClient(KEY, base_url=url, allow_insecure_http=True)
    logging.getLogger(__name__).debug("refused")


@pytest.mark.parametrize("key", [f"{KEY}\n", f" {KEY}", f"{KEY}\x00", f"{KEY}é", f"Bearer {KEY}"])
def test_a_key_that_cannot_travel_is_not_shown(key: str) -> None:
    """The error for an invalid key describes the problem without showing the key."""
    with pytest.raises(ValueError, match="api_key") as caught:
        KaizenClient(key)
    assert KEY not in traces_of(caught.value)
    logging.getLogger(__name__).debug("refused")


@everywhere
def test_a_key_in_a_proxys_response_is_withheld(loop: str) -> None:
    """The error for a proxy's refusal does not show a key that the proxy repeats."""

    async def main() -> None:
        answer = f"HTTP/1.1 407 {KEY} is not allowed: {KEY}\r\nContent-Length: 0\r\n\r\n".encode()

        async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            writer.close()

        proxy = await asyncio.start_server(refuse, "127.0.0.1", 0)
        port = proxy.sockets[0].getsockname()[1]
        async with (
            proxy,
            aiohttp.ClientSession(proxy=f"http://127.0.0.1:{port}") as session,
            KaizenClient(KEY, base_url="https://api.example", session=session) as client,
        ):
            with pytest.raises(KaizenError, match=r"the proxy answered 407 \*\*\* is not allowed") as caught:
                await client.instructor_executions.get("a")
            assert KEY not in traces_of(caught.value)

    run_on(loop, main())
    logging.getLogger(__name__).debug("refused")


@everywhere
def test_a_key_in_a_middlewares_error_is_withheld(loop: str) -> None:
    """A session's middleware sees the headers, and an error that it raises with the key is shown without the key."""

    async def refuse(request: aiohttp.ClientRequest, _: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        raise RuntimeError(f"bad header: {request.headers['Authorization']}")

    async def main() -> None:
        async with (
            aiohttp.ClientSession(middlewares=[refuse]) as session,
            KaizenClient(KEY, base_url="http://127.0.0.1:9", session=session) as client,
        ):
            with pytest.raises(KaizenError, match=r"RuntimeError: bad header: Bearer \*\*\*") as caught:
                await client.instructor_executions.get("a")
            assert KEY not in traces_of(caught.value)

    run_on(loop, main())
    logging.getLogger(__name__).debug("refused")


def with_a_note(key: str) -> Exception:
    """Return an error that quotes the key in a note."""
    error = RuntimeError("no")
    error.add_note(f"sent {key}")
    return error


def with_a_group(key: str) -> Exception:
    """Return an error that quotes the key in the cause of an error of a group."""
    inner = ValueError("no")
    inner.__cause__ = KeyError(key)
    return ExceptionGroup("several", [ValueError("no"), inner])


def with_a_circle(key: str) -> Exception:
    """Return an error whose chain of contexts is a circle."""
    error, other = RuntimeError("no"), ValueError(key)
    error.__context__, other.__context__ = other, error
    return error


def without_a_text(key: str) -> Exception:
    """Return an error whose `__str__` raises."""

    class WordlessError(Exception):
        def __str__(self) -> str:
            raise ValueError(key)

    return WordlessError()


@everywhere
@pytest.mark.parametrize("make", [with_a_note, with_a_group, with_a_circle, without_a_text])
def test_an_error_of_any_shape_that_quotes_the_key_is_withheld(make: Callable[[str], Exception], loop: str) -> None:
    """A traceback hides the key in notes, exception groups and chained errors too."""

    async def refuse(request: aiohttp.ClientRequest, _: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        raise make(str.__str__(request.headers["Authorization"]))

    async def main() -> None:
        async with (
            aiohttp.ClientSession(middlewares=[refuse]) as session,
            KaizenClient(KEY, base_url="http://127.0.0.1:9", session=session) as client,
        ):
            with pytest.raises(KaizenError, match="the session raised") as caught:
                await client.instructor_executions.get("a")
            assert KEY not in "".join(traceback.format_exception(caught.value))

    run_on(loop, main())
    logging.getLogger(__name__).debug("refused")


@everywhere
def test_a_key_in_a_limiters_error_is_withheld(loop: str) -> None:
    """The error text of a limiter that fails is shown without the key."""

    async def limiter() -> None:
        raise OSError(f"no connection for {KEY}")

    async def main() -> None:
        async with KaizenClient(KEY, limiter=limiter, retry=RetryPolicy(max_attempts=1)) as client:
            with pytest.raises(KaizenError, match=r"OSError: no connection for \*\*\*") as caught:
                await client.instructor_executions.get("a")
            assert KEY not in traces_of(caught.value)

    run_on(loop, main())
    logging.getLogger(__name__).debug("refused")


ESCAPES = [
    " //evil.example/x",
    "\t//evil.example",
    "\x00//evil.example",
    "\x1f\n//user:pw@api.example/v1/x",
    "../../x",
    "..",
    "a/../../x",
    "%2e%2e/x",
    "%2E./x",
    "..%2fx",
    "..%5c..%5cx",
    "..\\x",
    "%252e%252e%252fx",
    "..;/x",
    " /x",
    "\t/v2/x",
    "\uff0e\uff0e/x",
    "\u2025/x",
    "\u2024\u2024\uff0fx",
    ".. /x",
    "..%00/x",
    "..%2e/x",
    "%c0%ae%c0%ae/x",
    "//[]@x",
]


@pytest.mark.parametrize("path", ESCAPES)
def test_a_path_stays_below_the_base_url(path: str) -> None:
    """`lookups` refuses a path that leads to another host or out of the prefix."""
    with pytest.raises(ValueError, match="path must"):
        KaizenClient(KEY, base_url="https://api.example/v1/").lookups(path, InstructorExecution)
    logging.getLogger(__name__).debug("refused")


PIECES = ["\t", "\x00", " ", "/", "\\", "..", ".", "\uff0e", "%2e", "%2F", "@", ":", "evil", "?", "#", "[]"]


@given(st.lists(st.sampled_from(PIECES)))
def test_any_path_stays_below_the_base_url_or_is_refused(parts: list[str]) -> None:
    """For any accepted path, the request goes to the origin and the prefix of the base URL."""
    client = KaizenClient(KEY, base_url="https://api.example/v1/")
    try:
        methods = client.lookups("".join(parts), InstructorExecution)
    except ValueError:
        return
    finally:
        logging.getLogger(__name__).debug("asked")
    url = methods._endpoint.url_below(client._binding.settings.base_url)
    assert str(url.origin()) == "https://api.example"
    assert url.raw_path.startswith("/v1/")
    assert ".." not in unicodedata.normalize("NFKC", url.path).replace("\\", "/").split("/")
    assert url.user is None


@pytest.mark.parametrize("context", [False, True, 0, 1, "x", ssl, ssl.CERT_NONE], ids=repr)
def test_verification_cannot_be_switched_off(context: Any) -> None:
    """The client refuses an ssl_context of another type, because aiohttp reads False as "do not verify"."""
    with pytest.raises(TypeError, match=r"ssl_context must be None or an ssl\.SSLContext"):
        KaizenClient(KEY, ssl_context=context)
    logging.getLogger(__name__).debug("refused")


class Resolver(ThreadedResolver):
    """A resolver of the caller, which may return any address."""


class Connector(aiohttp.TCPConnector):
    """A connector of the caller, for example that of a SOCKS proxy."""


def socket_of(address: aiohttp.AddrInfoType) -> socket.socket:
    """Return a socket, as the caller may have connected it."""
    return socket.socket(*address[:3])


ROUTES: dict[str, Callable[[], aiohttp.ClientSession]] = {
    "a proxy": lambda: aiohttp.ClientSession(proxy="http://proxy.example:3128"),
    "the proxy of the environment": lambda: aiohttp.ClientSession(trust_env=True),
    "a connector of its own": lambda: aiohttp.ClientSession(connector=Connector()),
    "sockets of its own": lambda: aiohttp.ClientSession(connector=aiohttp.TCPConnector(socket_factory=socket_of)),
    "a resolver of its own": lambda: aiohttp.ClientSession(connector=aiohttp.TCPConnector(resolver=Resolver())),
}


@everywhere
@pytest.mark.parametrize("make_session", ROUTES.values(), ids=ROUTES)
def test_plain_http_through_a_session_that_leaves_the_machine_is_refused(
    make_session: Callable[[], aiohttp.ClientSession], loop: str
) -> None:
    """The client refuses plain HTTP through a session that may leave the machine, even if the base URL is local."""

    async def main() -> None:
        async with make_session() as session:
            with pytest.raises(ValueError, match="allow_insecure_http"):
                KaizenClient(KEY, base_url="http://localhost:8080", session=session)
            KaizenClient(KEY, base_url="http://localhost:8080", session=session, allow_insecure_http=True)
            KaizenClient(KEY, base_url="https://api.example", session=session)

    run_on(loop, main())
    logging.getLogger(__name__).debug("refused")


@everywhere
@pytest.mark.parametrize("setting", [{"ssl_context": ssl.create_default_context()}, {"trust_env": True}])
def test_a_session_excludes_the_settings_it_overrides(setting: dict[str, Any], loop: str) -> None:
    """The client refuses a setting that a passed-in session would override."""

    async def main() -> None:
        async with aiohttp.ClientSession() as session:
            with pytest.raises(ValueError, match=f"session and {next(iter(setting))} exclude each other"):
                KaizenClient(KEY, session=session, **setting)

    run_on(loop, main())
    logging.getLogger(__name__).debug("refused")


ENVIRONMENT = "env-secret-7fQ2"
REFUSED: dict[str, dict[str, Any]] = {
    "a key with a line break": {"api_key": f"{KEY}\n"},
    "a key that is no text": {"api_key": KEY.encode()},
    "a base URL with a password": {"base_url": f"https://me:{KEY}@api.example"},
    "a base URL that is no text": {"base_url": [KEY]},
    "a base URL that is no URL": {"base_url": f"//{KEY}"},
    "a concurrency of 0": {"concurrency": 0},
    "a limiter that is no function": {"limiter": 5},
    "a session that is none": {"session": KEY},
    "an unknown setting": {"password": KEY},
}


@pytest.mark.parametrize("refused", REFUSED.values(), ids=REFUSED)
def test_a_refused_argument_leaves_no_secret_in_a_traceback(
    refused: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sentry and rich print the local variables of every frame.

    The library's frames hold neither the key nor the environment.
    """
    monkeypatch.setenv("ANOTHER_SECRET", ENVIRONMENT)
    half_constructed = KaizenClient.__new__(KaizenClient)
    try:
        half_constructed.__init__(**{"api_key": KEY, **refused})  # type: ignore[misc]
    except (TypeError, ValueError) as error:
        caught = error
    shown = shown_by_tools(caught)
    assert KEY not in shown
    assert ENVIRONMENT not in shown
    assert repr(half_constructed) == "<KaizenClient not constructed: an argument was refused>"
    logging.getLogger(__name__).debug("refused")


def shown_by_tools(error: BaseException) -> str:
    """Return the library's frames with their local variables, as Sentry sends and rich prints them."""
    package = str(Path(sys.modules["kaizen_async"].__file__ or "").parent)
    options = {"include_local_variables": True, "include_source_context": False, "max_value_length": 10**6}
    event, _ = event_from_exception(error, client_options=options)
    frames = [
        frame
        for value in event["exception"]["values"]
        for frame in value.get("stacktrace", {}).get("frames", [])
        if str(frame.get("abs_path", "")).startswith(package)
    ]
    assert frames
    link: BaseException | None = error
    printed = io.StringIO()
    console = rich.console.Console(file=printed, width=10_000)
    while link is not None:
        ours = link.__traceback__
        while ours is not None and not ours.tb_frame.f_code.co_filename.startswith(package):
            ours = ours.tb_next
        trace = rich.traceback.Traceback.from_exception(
            type(link), link, ours, show_locals=True, locals_max_string=10**6, locals_max_length=10**6
        )
        console.print(trace)
        link = link.__cause__ or link.__context__
    return repr(serialize(frames)) + printed.getvalue()


@asynccontextmanager
async def failing(loop_session: bool) -> AsyncIterator[KaizenClient]:
    """Yield a client whose server always fails. The client has its own session or one that is passed in."""
    async with ScriptedServer(lambda _: [response({"message": "no"}, 500)]) as server:
        session = aiohttp.ClientSession() if loop_session else None
        async with client_for(server, api_key=KEY, session=session) as client:
            yield client
        if session is not None:
            await session.close()


@everywhere
@pytest.mark.parametrize("passed_in", [False, True], ids=["own session", "session passed in"])
def test_no_frame_of_a_lookup_holds_the_key(passed_in: bool, loop: str) -> None:
    """Neither the frames of a failed call nor the attributes of the objects behind a client show the key."""

    async def main() -> None:
        async with failing(passed_in) as client:
            with pytest.raises(KaizenError) as caught:
                await client.instructor_executions.get("a")
            assert KEY not in shown_by_tools(caught.value)
            for inner in objects_behind(client):
                assert KEY not in repr(getattr(inner, "__dict__", inner)), type(inner)

    run_on(loop, main())


@everywhere
@pytest.mark.parametrize("is_patched", [False, True], ids=["own connection", "patched aiohttp"])
def test_no_frame_of_a_request_in_flight_holds_the_key(
    is_patched: bool, loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancelled request leaves no key in any frame.

    The deepest frames differ with telemetry and with a patched `session.post`.
    """
    send = aiohttp.ClientSession._request

    def traced(*args: Any, **kwargs: Any) -> Any:
        return send(*args, **kwargs)

    if is_patched:
        monkeypatch.setattr(aiohttp.ClientSession, "_request", traced)

    async def main() -> None:
        telemetry = Telemetry(TracerProvider())
        async with (
            ScriptedServer(lambda _: [SILENCE]) as server,
            client_for(server, api_key=KEY, on_event=telemetry) as client,
        ):
            lookup = asyncio.ensure_future(client.instructor_executions.get("a"))
            await server.until(lambda: bool(server.requests))
            lookup.cancel()
            with pytest.raises(asyncio.CancelledError) as caught:
                await lookup
            assert KEY not in variables_of(caught.value)

    run_on(loop, main())
    logging.getLogger(__name__).debug("cancelled")


@everywhere
def test_no_frame_of_a_request_that_cannot_be_written_holds_the_key(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed write leaves no key in the frames that handle the whole request."""

    async def main() -> None:
        async with ScriptedServer() as server, client_for(server, api_key=KEY) as client:
            await client.instructor_executions.get("a")
            (connection,) = next(iter(client._binding.engine.transport._pool._addresses.values())).idle
            transport = Mock(wraps=connection.transport)
            transport.write.side_effect = ZeroDivisionError
            connection.transport = transport
            with pytest.raises(ZeroDivisionError) as caught:
                await client.instructor_executions.get("b")
            assert KEY not in variables_of(caught.value)

    run_on(loop, main())


def variables_of(error: BaseException) -> str:
    """Return the local variables of the library's frames in a traceback, whether or not they are the deepest."""
    package = str(Path(sys.modules["kaizen_async"].__file__ or "").parent)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = [frame.f_locals for frame in frames if frame.f_code.co_filename.startswith(package)]
    assert ours
    return repr(ours)


def objects_behind(client: KaizenClient) -> list[object]:
    """Return every object of the library and of aiohttp that a client refers to, directly or through others."""
    found: dict[int, object] = {}
    todo: list[object] = [client]
    while todo:
        thing = todo.pop()
        if id(thing) in found or isinstance(thing, type):
            continue
        found[id(thing)] = thing
        module = type(thing).__module__
        if module.startswith(("kaizen_async", "aiohttp", "builtins", "multidict")) and not callable(thing):
            todo += gc.get_referents(thing)
            todo += [getattr(thing, name, None) for name in getattr(type(thing), "__slots__", ()) if name[:2] != "__"]
    return [
        thing
        for thing in found.values()
        if type(thing).__module__.startswith(("kaizen_async", "aiohttp", "multidict"))
        and not isinstance(thing, str | bytes)
    ]
