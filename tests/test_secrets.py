"""The API key goes to its server, in one header, and nowhere else: no log, error, repr, event or warning holds it."""

import asyncio
import copy
import gc
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from callers import CALLERS, Caller
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

from kaizen_async import AuthenticationError, DecodeError, KaizenClient, KaizenError, RetryPolicy, StatusError

KEY = "sk-live-4eC39HqLyjWDarjtT1zdp7dc"
WITHHELD = "***"

everywhere = pytest.mark.parametrize("loop", LOOPS)
every_verb = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)


class Emitted(logging.Handler):
    """Keeps the text of all that is logged, by any logger, with tracebacks."""

    def __init__(self) -> None:
        super().__init__(logging.NOTSET)
        self.setFormatter(logging.Formatter("%(name)s %(message)s %(args)s"))
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.texts.append(self.format(record))


@pytest.fixture(autouse=True)
def emitted() -> Iterator[list[str]]:
    """Collect logs of every level and all warnings, and fail a test in whose the key shows."""
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
    """Return a text as a wordy JSON encoder would write it."""
    return "".join(f"\\u{ord(char):04X}" if index % 2 else char for index, char in enumerate(text)).encode()


def said_back(text: bytes) -> dict[str, Play]:
    """Return answers in which a server says a text back to whoever sent it."""
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
        "a status": lambda _: [response(record("bad", status=spelled, startTime=1))],
    }


@everywhere
@every_verb
@pytest.mark.parametrize("case", said_back(b""))
def test_a_key_that_a_server_says_back_is_withheld(case: str, verb: Verb, loop: str) -> None:
    """Whatever part of an answer holds the key, no error shows it, in no form; nor do events, stats and reprs."""
    events: list[Any] = []

    async def main() -> KaizenError:
        async with (
            ScriptedServer(said_back(KEY.encode())[case]) as server,
            client_for(server, api_key=KEY, max_response_bytes=100_000, on_event=events.append) as client,
        ):
            outcome = await verb(client, "bad")
            assert server.requests
            for shown in (outcome, client, client.instructor_executions, client.stats(), client._headers, events):
                assert KEY not in repr(shown)
            assert isinstance(outcome.error, KaizenError)
            return outcome.error

    error = run_on(loop, main())
    for one in (error, copy.copy(error), copy.deepcopy(error)):
        assert KEY not in traces_of(one)
    if isinstance(error, (StatusError, DecodeError)):
        assert KEY.encode() not in error.body
        assert escaped(KEY) not in error.body


@everywhere
def test_what_a_server_says_else_is_kept(loop: str) -> None:
    """Only the key is taken out of a message and a body."""

    async def main() -> None:
        answer = response({"message": f"key {KEY} has expired"}, 401)
        async with ScriptedServer(lambda _: [answer]) as server, client_for(server, api_key=KEY) as client:
            with pytest.raises(AuthenticationError, match=r"key \*\*\* has expired") as caught:
                await client.instructor_executions.get("a")
            assert caught.value.body == dump({"message": f"key {WITHHELD} has expired"})

    run_on(loop, main())


@everywhere
def test_a_record_that_holds_the_key_is_not_changed(loop: str) -> None:
    """A record is the server's word, and the caller's to keep; the log of an unknown status does not repeat it."""

    async def main() -> None:
        play = lambda request: [response(record(request.id, browserSessionId=KEY, status=KEY))]  # noqa: E731 - an answer
        async with ScriptedServer(play) as server, client_for(server, api_key=KEY) as client:
            execution = await client.instructor_executions.get("a")
            assert (execution.browser_session_id, execution.status) == (KEY, KEY)

    run_on(loop, main())


@everywhere
@pytest.mark.parametrize("caller", CALLERS.values(), ids=CALLERS)
def test_the_key_travels_in_one_header_only(caller: Caller, loop: str) -> None:
    """Every request carries the key as a bearer token, and nowhere else."""

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
    """The complaint about a client that was never closed names where it was made, and not with what."""

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
    """The key does not go over a network in the open, unless the caller says so by name."""
    with pytest.raises(ValueError, match="allow_insecure_http") as caught:
        KaizenClient(KEY, base_url=url)
    assert KEY not in traces_of(caught.value)
    KaizenClient(KEY, base_url=url, allow_insecure_http=True)
    logging.getLogger(__name__).debug("refused")


@pytest.mark.parametrize("key", [f"{KEY}\n", f" {KEY}", f"{KEY}\x00", f"{KEY}é", f"Bearer {KEY}"])
def test_a_key_that_cannot_travel_is_not_shown(key: str) -> None:
    """What is wrong with a key is said without it."""
    with pytest.raises(ValueError, match="api_key") as caught:
        KaizenClient(key)
    assert KEY not in traces_of(caught.value)
    logging.getLogger(__name__).debug("refused")
