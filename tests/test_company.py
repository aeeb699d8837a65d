"""Companies add headers, rotate keys, read request ids for support, and reuse recent records."""

import asyncio
import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
from scripted_server import Request, Script, ScriptedServer, client_for, ok, record, response
from scripted_transport import ScriptedTransport
from scripted_transport import record as answer_with
from virtual_time import virtual_time

from kaizen_async import (
    AttemptTimeoutError,
    AuthenticationError,
    DeadlineExceededError,
    DecodeError,
    InstructorExecution,
    KaizenClient,
    KaizenError,
    NotFoundError,
    RetryPolicy,
    StatusError,
    TransportError,
)
from kaizen_async._lookup import received as remembering
from kaizen_async._lookup.received import Received
from kaizen_async._records.base import bytes_held
from kaizen_async._transport.request_id import RequestIds
from kaizen_async._transport.wire import Endpoint
from kaizen_async._waiting import memory
from kaizen_async._waiting.memory import EndedRecords
from kaizen_async.testing import KaizenEmulator, Life

ONCE = RetryPolicy(max_attempts=1)
SECRET = "cf-secret-0123456789"


def say(status: int = 200, **headers: str) -> Callable[[Request], Script]:
    """Return a play that always sends the same response."""

    def play(request: Request) -> Script:
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        return [response(record(request.id), status, fields)]

    return play


# Headers.


async def test_headers_go_with_every_request() -> None:
    """Every request carries the configured headers. They can replace the user agent, and no repr shows their values."""
    own = {"CF-Access-Client-Secret": SECRET, "X-Tenant": "t1", "user-agent": "mine/1"}
    async with ScriptedServer(lambda request: [ok(request)]) as server, client_for(server, headers=own) as client:
        await client.instructor_executions.get_many(["a", "b"])
        for request in server.requests:
            assert request.headers["cf-access-client-secret"] == SECRET
            assert request.headers["x-tenant"] == "t1"
            assert request.headers["user-agent"] == "mine/1"
            assert request.headers["authorization"] == "Bearer sk-test"
        assert SECRET not in repr(vars(client))


async def test_the_value_of_a_header_is_not_shown_in_an_error() -> None:
    """An error hides the value of a configured header that a gateway repeats."""

    def play(request: Request) -> Script:
        return [response({"message": f"bad {request.headers['x-token']} of {request.headers['x-tenant']}"}, 403)]

    own = {"X-Token": SECRET, "X-Tenant": "t1"}
    async with ScriptedServer(play) as server, client_for(server, headers=own) as client:
        with pytest.raises(AuthenticationError, match=r"bad \*+ of t1") as raised:
            await client.instructor_executions.get("a")
        assert SECRET not in str(raised.value)
        assert SECRET.encode() not in raised.value.body


@pytest.mark.parametrize("key", ["s", "server", "executions/get"])
async def test_only_the_servers_text_is_redacted(key: str) -> None:
    """The client removes a short key from the server's text, but not from the library's own text."""

    def play(request: Request) -> Script:
        if request.id == "refused":
            return [response({"message": f"<{key}>"}, 409)]
        return [response(record(request.id, startTime=f"<{key}>"))]

    async with ScriptedServer(play) as server, client_for(server, api_key=key) as client:
        refused, misfit = await client.instructor_executions.get_many(["refused", "misfit"])
    assert str(refused.error) == "refused: the server answered 409 Conflict: <***> (after 1 attempt)"
    assert isinstance(refused.error, StatusError)
    assert b"<***>" in refused.error.body
    assert isinstance(misfit.error, DecodeError)
    assert misfit.error.path == "$.startTime"
    assert 'it is "<***>". To read it all the same, declare the fields that you use: ' in str(misfit.error)
    assert "kaizen.lookups('instructor/executions/get', MyStruct)" in str(misfit.error)
    assert f"<{key}>" not in repr(vars(misfit.error))


@pytest.mark.parametrize(
    ("headers", "error"),
    [
        (5, TypeError),
        ({"X-A": 5}, TypeError),
        ({5: "x"}, TypeError),
        ({"X A": "x"}, ValueError),
        ({"X-A": f"{SECRET}\r\nX-B: x"}, ValueError),
        ({"X-A": ""}, ValueError),
        ({"X-A": " x"}, ValueError),
        ({"X-A": "ü"}, ValueError),
        ({"Host": "x"}, ValueError),
        ({"content-length": "5"}, ValueError),
        ({"authorization": "x"}, ValueError),
    ],
)
def test_headers_that_cannot_travel_are_refused(headers: Any, error: type[Exception]) -> None:
    """The client refuses invalid headers when it is created, and the error does not show their values."""
    with pytest.raises(error, match="headers") as refused:
        KaizenClient("sk-test", headers=headers)
    assert SECRET not in str(refused.value)


async def test_authorization_may_be_ones_own_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client without a key may set its own Authorization header, because some gateways need another scheme."""
    monkeypatch.delenv("KAIZEN_API_KEY", raising=False)
    own = {"Authorization": "Basic dTpw"}
    async with ScriptedServer(lambda request: [ok(request)]) as server:
        async with client_for(server, api_key=None, headers=own) as client:
            await client.instructor_executions.get("a")
        assert server.requests[0].headers["authorization"] == "Basic dTpw"


# Keys that change.


class Keys:
    """A function for `api_key` that counts its calls."""

    def __init__(self) -> None:
        self.asked = 0

    async def __call__(self) -> str:
        """Return a new key at each call."""
        self.asked += 1
        await asyncio.sleep(0)
        return f"sk-key-{self.asked}"


async def test_a_refused_key_is_requested_again() -> None:
    """All lookups share the key that the function returns. After a 401 each repeats its request once with a new key."""
    valid = "sk-key-1"

    def play(request: Request) -> Script:
        is_valid = request.headers["authorization"] == f"Bearer {valid}"
        return [ok(request)] if is_valid else [response({"message": request.headers["authorization"]}, 401)]

    keys = Keys()
    async with ScriptedServer(play) as server, client_for(server, api_key=keys, retry=ONCE) as client:
        executions = client.instructor_executions
        assert all(outcome.ok for outcome in await executions.get_many(["a", "b", "c"]))
        assert keys.asked == 1
        valid = "sk-key-2"
        outcomes = await executions.get_many(["d", "e", "f"])
        assert [outcome.attempts for outcome in outcomes] == [2, 2, 2]
        assert all(outcome.ok for outcome in outcomes)
        assert keys.asked == 2
        valid = "none"
        with pytest.raises(AuthenticationError) as refused:
            await executions.get("g")
        assert server.asked["g"] == 2
        assert keys.asked == 3
        assert "sk-key" not in f"{refused.value}{refused.value.body!r}{client!r}{vars(client)}"


async def test_a_key_may_come_from_a_plain_function() -> None:
    """`api_key` may be a plain function. Creating the client does not call it."""
    ask = mock.Mock(return_value="sk-plain")
    async with ScriptedServer(lambda request: [ok(request)]) as server, client_for(server, api_key=ask) as client:
        assert not ask.called
        await client.instructor_executions.get("a")
        assert server.requests[0].headers["authorization"] == "Bearer sk-plain"


@pytest.mark.parametrize(
    ("returned", "said", "retryable"),
    [(5, "must be a str", False), ("sk secret", "whitespace", False), (OSError("sk-x"), "raised OSError", True)],
)
async def test_a_key_function_that_fails_fails_the_attempt(returned: Any, said: str, *, retryable: bool) -> None:
    """If the key function raises or returns an invalid key, the client sends nothing.

    Only an error that it raises is retryable.
    """
    ask = mock.Mock(side_effect=[returned])
    async with ScriptedServer(lambda request: [ok(request)]) as server:
        async with client_for(server, api_key=ask, retry=ONCE) as client:
            with pytest.raises(TransportError, match=said) as failed:
                await client.instructor_executions.get("a")
        assert failed.value.retryable is retryable
        assert failed.value.attempts == 0
        assert "secret" not in str(failed.value)
        assert "sk-x" not in str(failed.value)
        assert not server.requests


@virtual_time
async def test_a_function_that_hangs_is_bounded() -> None:
    """The attempt timeout and the deadline bound a key function that hangs."""

    async def hang() -> str:
        await asyncio.sleep(1e6)
        raise AssertionError

    transport = ScriptedTransport()
    async with transport.client(api_key=hang, attempt_timeout=5, retry=ONCE) as client:
        with pytest.raises(AttemptTimeoutError, match="no API key came within 5 s"):
            await client.instructor_executions.get("a")
        with pytest.raises(DeadlineExceededError, match="waited for the API key"):
            await client.instructor_executions.get("a", deadline=2)
    assert not transport.sent


async def test_a_refresh_that_fails_fails_the_attempt() -> None:
    """If refreshing the key fails, the next attempt calls the key function again."""
    ask = mock.Mock(side_effect=["sk-old-key", OSError(), "sk-new-key"])

    def play(request: Request) -> Script:
        is_valid = request.headers["authorization"] == "Bearer sk-new-key"
        return [ok(request)] if is_valid else [response({}, 401)]

    async with ScriptedServer(play) as server, client_for(server, api_key=ask) as client:
        assert (await client.instructor_executions.get("a")).id == "a"
        assert ask.call_count == 3


# Request ids.


@pytest.mark.parametrize("name", ["X-Request-Id", "cf-ray", "x-amzn-requestid", "X-Correlation-ID"])
async def test_outcomes_and_errors_carry_the_request_id(name: str) -> None:
    """Outcomes and errors carry the request id from any of the known headers."""

    def play(request: Request) -> Script:
        fields = {name: f"req-{request.id}"}
        if request.id == "gone":
            return [response({}, 404, fields)]
        return [response(b"{" if request.id == "odd" else record(request.id), 200, fields)]

    async with ScriptedServer(play) as server, client_for(server, retry=ONCE) as client:
        found, gone, odd = await client.instructor_executions.get_many(["a", "gone", "odd"])
        assert found.request_id == "req-a"
        for failed, error in ((gone, NotFoundError), (odd, DecodeError)):
            assert isinstance(failed.error, error)
            assert failed.request_id == failed.error.request_id == f"req-{failed.id}"
            assert f"request id req-{failed.id}" in str(failed.error)


async def test_waits_carry_the_request_id() -> None:
    """The outcome of a wait carries the request id of its last poll."""
    end = {"endTime": "2026-11-07T05:31:56Z", "status": "Completed"}

    def play(request: Request) -> Script:
        status = 404 if request.id == "gone" else 200
        return [response(record(request.id, **end), status, {"X-Request-Id": f"r-{request.id}"})]

    async with ScriptedServer(play) as server, client_for(server) as client:
        async with client.instructor_executions.wait_many(["a", "gone"]) as outcomes:
            assert {outcome.request_id async for outcome in outcomes} == {"r-a", "r-gone"}


async def test_the_headers_of_request_ids_are_a_setting() -> None:
    """Only the configured headers give a request id. The client drops a value that contains the key."""
    async with ScriptedServer(say(X_Mine="m-1", X_Request_Id="r-1", X_Key="sk-test-0123456789")) as server:
        for names, expected in ((["X-Mine"], "m-1"), ([], None), (["X-Key"], None), (["X-None"], None)):
            key = "sk-test-0123456789"
            async with client_for(server, api_key=key, request_id_headers=names) as client:
                (outcome,) = await client.instructor_executions.get_many(["a"])
                assert outcome.request_id == expected


def test_names_of_headers_are_checked() -> None:
    """The client refuses a single string and invalid names as request_id_headers."""
    with pytest.raises(TypeError, match="several names"):
        RequestIds("x-request-id")
    for names in (["x y"], [5]):
        with pytest.raises(ValueError, match="names of header fields"):
            RequestIds(names)  # type: ignore[arg-type]


def test_a_request_id_is_safe_to_print() -> None:
    """A request id is printable and of limited length. The first header with a value counts."""
    ids = RequestIds()
    assert ids.of({"x-request-id": " a\x1b[2J ", "cf-ray": "b"}) == "a�[2J"
    assert ids.of({"x-request-id": " ", "cf-ray": "b"}) == "b"
    assert ids.of({}) is None
    assert len(ids.of({"x-request-id": "x" * 999}) or "") == 200


# Records of a moment ago.


@virtual_time
async def test_max_age_reuses_a_recent_record() -> None:
    """With max_age, `get` returns a record that is recent enough, or that has ended.

    Without max_age it always sends a request.
    """
    end = {"endTime": "2026-11-07T05:31:56Z", "status": "Completed"}
    transport = ScriptedTransport(
        lambda execution_id, _: answer_with(execution_id, **(end if execution_id == "e" else {}))
    )
    async with transport.client() as client:
        executions = client.instructor_executions
        first = await executions.get("a", max_age=5)
        assert await executions.get("a", max_age=5) is first
        await executions.get("a")
        assert len(transport.sent) == 2
        await asyncio.sleep(5.5)
        await executions.get("a", max_age=5)
        assert len(transport.sent) == 3
        ended = await executions.get("e")
        await asyncio.sleep(1000)
        assert await executions.get("e", max_age=0) is ended
        with pytest.raises(ValueError, match="max_age"):
            await executions.get("e", max_age=-1)


@pytest.mark.parametrize("size", [0, 2])
async def test_the_number_of_kept_records_is_a_setting(size: int) -> None:
    """The client keeps the latest finished records, up to the configured number."""
    async with KaizenEmulator(default_life=Life.ended(duration=5)) as emulator:
        async with KaizenClient(base_url=emulator.base_url, ended_records=size) as client:
            for execution_id in ("a", "b", "c", "c", "b", "a"):
                await client.instructor_executions.get(execution_id, max_age=60)
        assert emulator.request_count == {0: 6, 2: 4}[size]


@pytest.mark.parametrize("filler", [10, 20_000])
def test_a_remembered_record_is_the_one_that_was_received(filler: int) -> None:
    """The client remembers only the body of a large response, because the memory that its record takes is not known."""
    endpoint = Endpoint("get", InstructorExecution)
    fields = json.loads((Path(__file__).parent / "samples" / "documented.json").read_bytes())
    body = json.dumps({**fields, "status": "x" * filler}).encode()
    record = endpoint.decode(body, fields["id"])
    received = Received(5)
    received.put(endpoint, fields["id"], record, 7.0, body)
    assert received.get(endpoint, fields["id"]) == (record, 7.0)


async def test_a_record_that_cannot_end_only_grows_old() -> None:
    """For a record type that does not report an end, only the age of the record counts."""

    class Slim(msgspec.Struct):
        id: str

    async with KaizenEmulator(default_life=Life.ended(duration=5)) as emulator:
        async with KaizenClient(base_url=emulator.base_url) as client:
            slim = client.lookups("instructor/executions/get", Slim)
            first = await slim.get("a")
            assert await slim.get("a", max_age=60) is first
            assert await slim.get("a", max_age=0) is not first


@pytest.mark.parametrize(
    "field",
    [
        {"status": "\U0001f600" + "a" * 20_000},
        {"status": "\u00e9\u4e2d" * 5_000},
        {"logins": [{}] * 250, "authentications": [{}] * 250, "contextAuthentications": [{}] * 250},
        {"logins": [{"id": "a", "name": "b"}] * 250},
        {"authentications": [{"error": {"message": "x" * 50}}] * 200},
    ],
    ids=["one rare character", "wide characters", "empty objects", "small objects", "unknown objects"],
)
def test_a_record_weighs_no_more_than_is_estimated(field: dict[str, Any]) -> None:
    """The estimated size of a record is an upper bound, although the estimate does not visit its parts."""
    fields = {**json.loads((Path(__file__).parent / "samples" / "documented.json").read_bytes()), **field}
    body = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    record = Endpoint("get", InstructorExecution).decode(body, fields["id"])
    assert remembering._estimated_weight(body) >= bytes_held(record)


def test_kept_records_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory for kept records is bounded in bytes, because a hostile server may send very large records."""
    monkeypatch.setattr(remembering, "MOST_BYTES", 100_000)
    monkeypatch.setattr(memory, "MOST_ENDED", 100_000)
    received, ended = Received(1000), EndedRecords(1000)
    for number in range(200):
        record = bytes(5_000)
        received.put("kind", str(number), record, 0.0, record if number % 2 else bytes(1000))
        ended.put("kind", str(number), record)
    for remembered in received, ended:
        assert remembered.get("kind", "0") is None
        assert remembered.get("kind", "199") is not None
    assert len(received._newer) + len(received._older) < 40
    assert len(ended._records) == 19
    for _ in range(200):
        ended.put("kind", "199", bytes(5_000))
    assert len(ended._records) == 19


# A client as an object.


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_client_is_not_copied(make: Callable[[Any], Any]) -> None:
    """A copy would share the original's connections and close them."""
    with pytest.raises(TypeError, match="create one client in each process"):
        make(KaizenClient("sk-test"))


async def test_a_mock_set_on_executions_stays() -> None:
    """A mock that is set on the executions of a client stays in effect until it is removed."""
    client = KaizenClient("sk-test")
    client.instructor_executions.get = mock.AsyncMock(return_value=5)  # type: ignore[method-assign]
    assert await client.instructor_executions.get("a") == 5
    assert not hasattr(client.executions.get, "return_value")
    with mock.patch.object(client.executions, "get", mock.AsyncMock(return_value=6)):
        assert await client.executions.get("a") == 6
    assert not hasattr(client.executions.get, "return_value")
    specified = mock.create_autospec(KaizenClient, instance=True)
    assert isinstance(specified, KaizenClient)


def test_errors_are_kaizen_errors_through_json() -> None:
    """An error that travels as JSON keeps its text and its request id."""
    error = NotFoundError("gone", status=404)
    error.request_id = "r-1"
    again: KaizenError = NotFoundError(*json.loads(json.dumps(error.args)))
    assert (again.request_id, str(again)) == ("r-1", str(error))
