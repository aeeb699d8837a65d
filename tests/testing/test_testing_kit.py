"""The emulator as a test double: history, strict mode, custom kinds, TLS, recordings, script files, virtual time."""

import asyncio
import json
import math
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import Mock

import aiohttp
import openapi_spec_validator
import pytest
from aiohttp import web
from freezegun import freeze_time
from jsonschema import Draft202012Validator

from kaizen_async import KaizenClient, KaizenError, NotFoundError, PollPolicy, Record, RetryPolicy, StatusError
from kaizen_async._kinds import KINDS, Kind
from kaizen_async.testing import Answer, Fault, KaizenEmulator, Life, Recorder, ScriptError, VirtualClock
from kaizen_async.testing import emulator as emulator_module
from kaizen_async.testing.faults import Exchange
from kaizen_async.testing.hold import Hold
from kaizen_async.testing.hosts import HostCheck, reachable
from kaizen_async.testing.records import Snapshot, served
from kaizen_async.testing.script_file import read_script

ONCE = RetryPolicy(max_attempts=1)


class Invoice(Record, frozen=True):
    """A record type of a user."""

    id: str
    total: int


class Due(Record, frozen=True):
    """Another record type of a user."""

    id: str
    due: datetime


@pytest.fixture
def clock() -> VirtualClock:
    """Return a virtual clock with a fixed epoch."""
    return VirtualClock(epoch=datetime(2026, 1, 1, 10, tzinfo=UTC))


def client_of(emulator: KaizenEmulator, clock: VirtualClock | None = None, **settings: Any) -> KaizenClient:
    """Return a client of an emulator."""
    return KaizenClient("secret-key", base_url=emulator.base_url, clock=clock, **settings)


async def status_of(kaizen: KaizenClient, execution_id: str, **options: Any) -> str | int:
    """Return the status of an execution, or the HTTP status of the error."""
    try:
        return (await kaizen.instructor_executions.get(execution_id, retry=ONCE, **options)).status.value
    except StatusError as error:
        return error.status


async def status_of_retried(kaizen: KaizenClient, execution_id: str) -> str:
    """Return the status of an execution after as many attempts as it needs."""
    return (await kaizen.instructor_executions.get(execution_id, retry=RetryPolicy(max_attempts=9))).status.value


# History.


async def test_requests_are_remembered_without_keys() -> None:
    """The history has path, kind, id, headers, body, time and status, without keys. An unmet expectation shows it."""
    async with KaizenEmulator(api_key="secret-key") as emulator, client_of(emulator) as kaizen:
        emulator.add("exec_1")
        await kaizen.instructor_executions.get("exec_1")
        (request,) = emulator.requests
        assert (request.path, request.kind) == ("/instructor/executions/get", "instructor_executions")
        assert (request.id, request.status, json.loads(request.body)) == ("exec_1", 200, {"id": "exec_1"})
        assert request.headers["Authorization"] == "Bearer ***"
        assert abs(request.time - datetime.now(UTC)) < timedelta(minutes=1)
        assert "secret-key" not in repr(request) + repr(request.headers)
        emulator.assert_called("exec_1", times=1)
        emulator.assert_called(path="instructor/executions/get")
        with pytest.raises(
            AssertionError, match=r"expected at least one requests for 'exec_2', saw 0.*'exec_1' -> 200"
        ):
            emulator.assert_called("exec_2")
        with pytest.raises(AssertionError, match="expected 3 requests to /executions/get, saw 0"):
            emulator.assert_called(path="/executions/get", times=3)


async def test_a_request_can_be_waited_for() -> None:
    """`wait_for_request` returns the request, or raises an error after some seconds that lists the requests."""
    async with KaizenEmulator(default_life=Life.ended()) as emulator, client_of(emulator) as kaizen:
        lookup = asyncio.create_task(kaizen.instructor_executions.get("exec_1"))
        request = await emulator.wait_for_request("exec_1", path="instructor/executions/get")
        assert request.id == "exec_1"
        await lookup
        with pytest.raises(TimeoutError, match=r"after 0\.01 seconds: expected 2 requests for 'exec_1', saw 1"):
            await emulator.wait_for_request("exec_1", times=2, within=0.01)


async def test_executions_can_be_listed_finished_and_removed(clock: VirtualClock) -> None:
    """Executions can be listed, finished and removed at any time."""
    async with KaizenEmulator(clock=clock) as emulator, client_of(emulator, clock) as kaizen:
        emulator.add_many(["exec_1", "exec_2"], Life.running())
        assert emulator.executions() == {"exec_1": "InProgress", "exec_2": "InProgress"}
        await clock.advance(5)
        emulator.finish("exec_1", "Failed")
        found = await kaizen.instructor_executions.get("exec_1")
        assert (found.status, found.duration) == ("Failed", timedelta(seconds=5))
        emulator.remove("exec_2")
        assert await status_of(kaizen, "exec_2") == 404
        with pytest.raises(KeyError, match="no execution 'exec_2' to remove; those that exist: 'exec_1'"):
            emulator.remove("exec_2")
        with pytest.raises(KeyError, match="no execution 'exec_3' to finish"):
            emulator.finish("exec_3")


async def test_fields_change_along_a_life(clock: VirtualClock) -> None:
    """A step of a life sets fields, and a later step sets them again."""
    life = Life.of(("InProgress", 0), ("InProgress", 5, {"browserSessionId": "b"}), ("Completed", 9)).with_fields(
        {"browserSessionId": "a"}
    )
    async with KaizenEmulator(clock=clock) as emulator, client_of(emulator, clock) as kaizen:
        emulator.accept_any(lambda execution_id: life if execution_id == "exec_1" else None)
        seen = []
        for _ in range(2):
            seen.append((await kaizen.instructor_executions.get("exec_1")).browser_session_id)
            await clock.advance(6)
        assert seen == ["a", "b"]
        assert await status_of(kaizen, "exec_2") == 404
        emulator.accept_any()
        assert await status_of(kaizen, "exec_2") == "Completed"


async def test_reset_forgets_all_but_the_settings() -> None:
    """`reset` clears everything but the settings, for the examples of a property test."""
    async with KaizenEmulator() as emulator, client_of(emulator) as kaizen:
        emulator.accept_any()
        emulator.faults.always(Fault.status(418))
        assert await status_of(kaizen, "exec_1") == 418
        emulator.reset()
        assert emulator.requests == []
        assert await status_of(kaizen, "exec_1") == 404
        assert emulator.request_count == 1


# Errors in scripts.


async def awaited(_: str) -> None:
    """Return None, as a coroutine."""


def failing(_: object) -> Any:
    """Raise an error."""
    raise ZeroDivisionError("oops")


def refusing(_: object) -> Any:
    """Raise an error of pytest, which does not inherit from Exception."""
    pytest.fail("nobody should ask")


async def cancelling(_: Exchange) -> Any:
    """Raise what looks like a cancellation."""
    raise asyncio.CancelledError


async def disconnecting(_: Exchange) -> Any:
    """Raise what looks like the end of the connection."""
    raise ConnectionResetError("oops")


async def misanswering(_: Exchange) -> Any:
    """Return an answer that cannot be sent."""
    return Answer(200, "{}")  # type: ignore[arg-type]


def circular() -> dict[str, Any]:
    """Return a record that is a part of itself."""
    record: dict[str, Any] = {}
    record["record"] = record
    return record


async def returning_text(_: Exchange) -> Any:
    """Return a value that is not a response."""
    return "text"


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        (lambda emulator: emulator.accept_any(failing), "given to default_life raised ZeroDivisionError: oops"),
        (lambda emulator: emulator.accept_any(refusing), "given to default_life raised Failed: nobody should ask"),
        (lambda emulator: emulator.faults.next(Fault("mine", cancelling)), "fault mine raised CancelledError"),
        (lambda emulator: emulator.faults.next(Fault("mine", disconnecting)), "mine raised ConnectionResetError: oops"),
        (
            lambda emulator: emulator.faults.next(Fault("mine", misanswering)),
            "mine raised TypeError: body must be bytes",
        ),
        (lambda emulator: emulator.accept_any(awaited), "default_life must be a plain one, not `async def`"),
        (lambda emulator: emulator.accept_any(lambda _: "text"), "default_life must return a Life"),
        (
            lambda emulator: emulator.faults.next(Fault("mine", failing)),
            "fault mine raised ZeroDivisionError.*async def",
        ),
        (lambda emulator: emulator.faults.next(Fault("mine", returning_text)), "fault mine must return an Answer"),
        (
            lambda emulator: emulator.serve("instructor/executions/get", lambda _: 5),
            "must be a record, a Life, an Answer or None",
        ),
        (
            lambda emulator: emulator.serve("instructor/executions/get", {"a": {1, 2}.__iter__()}),
            "does not fit into JSON",
        ),
        (
            lambda emulator: emulator.add("exec_1", Life.of(("Completed", 0, {"logins": object()}))),
            "field that the life sets does not fit into JSON",
        ),
        (
            lambda emulator: emulator.serve("instructor/executions/get", lambda _: circular()),
            "what is served does not fit into JSON",
        ),
    ],
    ids=[
        "raises",
        "pytest.fail",
        "cancels",
        "disconnects",
        "body",
        "async",
        "text",
        "fault raises",
        "fault returns text",
        "kind returns 5",
        "not JSON",
        "field",
        "circular",
    ],
)
@pytest.mark.parametrize("virtual", [False, True], ids=["socket", "virtual"])
async def test_an_error_in_a_script_is_raised(
    script: Callable[[KaizenEmulator], None], complaint: str, virtual: bool
) -> None:
    """An error in a script is raised at the end of the block, and the client does not retry."""
    clock = VirtualClock() if virtual else None
    emulator = KaizenEmulator(clock=clock) if clock else KaizenEmulator()
    with pytest.raises(ScriptError, match=complaint):
        async with emulator, client_of(emulator, clock) as kaizen:
            script(emulator)
            with suppress(StatusError):
                await kaizen.instructor_executions.get("exec_1")
            assert emulator.request_count == 1
    assert emulator.errors


async def test_a_custom_fault_makes_a_response_for_each_request() -> None:
    """A response of aiohttp can be sent once. To return it again is an error in the script."""
    response = web.Response(status=409)

    async def play(_: Exchange) -> web.Response:
        return response

    with pytest.raises(ScriptError, match="mine must return a new response for each request"):
        async with KaizenEmulator(default_life=Life.ended()) as emulator, client_of(emulator) as kaizen:
            emulator.faults.next(Fault("mine", play), times=2)
            assert [await status_of(kaizen, "exec_1") for _ in range(2)] == [409, 501]


@pytest.mark.parametrize("virtual", [False, True], ids=["socket", "virtual"])
async def test_a_default_life_may_be_a_response(virtual: bool) -> None:
    """A function for ids that were not added may return a response in place of a life."""
    clock = VirtualClock() if virtual else None
    emulator = KaizenEmulator(clock=clock) if clock else KaizenEmulator()
    async with emulator, client_of(emulator, clock) as kaizen:
        emulator.accept_any(lambda execution_id: Answer.message(410) if execution_id == "gone" else Life.ended())
        assert [await status_of(kaizen, execution_id) for execution_id in ("gone", "exec_1", "gone")] == [
            410,
            "Completed",
            410,
        ]
        emulator.serve("instructor/executions/get", lambda _: Answer.message(409))
        assert await status_of(kaizen, "exec_1") == 409


async def test_a_custom_fault_may_return_plain_data() -> None:
    """A custom fault may return its response as plain data."""

    async def play(_: Exchange) -> Answer:
        return Answer.message(409, "mine")

    async with KaizenEmulator(default_life=Life.ended()) as emulator, client_of(emulator) as kaizen:
        emulator.faults.next(Fault("mine", play))
        assert await status_of(kaizen, "exec_1") == 409


async def test_strict_mode_reports_unexpected_and_missing_requests() -> None:
    """Strict mode reports unknown ids and paths, and faults that no request met."""
    emulator = KaizenEmulator(strict=True)
    with pytest.raises(ScriptError, match="a request came in for 'exec_9', which does not exist") as caught:
        async with emulator, client_of(emulator) as kaizen:
            emulator.faults.next(Fault.status(503), times=2, id="exec_1")
            emulator.faults.nth(Fault.status(503), 3)
            emulator.faults.chance(Fault.status(503), 0.0)
            await status_of(kaizen, "exec_9")
            async with aiohttp.ClientSession() as session, session.get(emulator.base_url + "other") as response:
                assert response.status == 404
    texts = [str(error) for error in emulator.errors]
    assert texts[1] == "a request came in for /other, which is not served"
    assert sum("was never met" in text for text in texts) == 2
    assert "and 3 more" in str(caught.value.__notes__)


# Custom kinds.


async def test_custom_kinds_are_served(clock: VirtualClock) -> None:
    """A custom kind can be one record, records by id, a life, or a function."""
    async with KaizenEmulator(clock=clock) as emulator, client_of(emulator, clock) as kaizen:
        invoices = kaizen.lookups("invoices/get", Invoice)
        emulator.serve("invoices/get", {"inv_1": {"total": 1}})
        assert (await invoices.get("inv_1")).total == 1
        with pytest.raises(NotFoundError):
            await invoices.get("inv_2")
        emulator.serve("invoices/get", {"id": "inv_3", "total": 3})
        assert (await invoices.get("inv_3")).total == 3
        with pytest.raises(NotFoundError):
            await invoices.get("inv_4")
        emulator.serve("invoices/get", {"total": 5})
        assert (await invoices.get("any")).total == 5
        emulator.serve("wrapped/get", lambda _: {"total": 6}, unwrap="invoice")
        assert (await kaizen.lookups("wrapped/get", Invoice, unwrap="invoice").get("any")).total == 6
        emulator.serve("instructor/executions/get", Life.lasting(60))
        ended = await kaizen.instructor_executions.wait("exec_1")
        assert ended.duration == timedelta(seconds=60)
        with pytest.raises(TypeError, match="serve\\(\\) takes a record"):
            emulator.serve("invoices/get", 5)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="path must name a kind"):
            emulator.serve("/", {})


# Faults in sequences.


async def test_faults_come_by_number_and_by_time(clock: VirtualClock) -> None:
    """A fault can apply to the n-th request or to a period of time."""
    async with KaizenEmulator(clock=clock, default_life=Life.ended()) as emulator, client_of(emulator, clock) as kaizen:
        emulator.faults.nth(Fault.status(418), 3)
        emulator.faults.nth(Fault.status(409), 2, id="b")
        emulator.faults.between(
            Fault.status(410), datetime(2026, 1, 1, 10, 0, 10, tzinfo=UTC), datetime(2026, 1, 1, 10, 0, 20, tzinfo=UTC)
        )
        emulator.faults.between(Fault.status(411), 30, 40)
        seen = [await status_of(kaizen, execution_id) for execution_id in "aaab"]
        seen.append(await status_of(kaizen, "b"))
        assert seen == ["Completed", "Completed", 418, "Completed", 409]
        seen = []
        for _ in range(4):
            await clock.advance(10)
            seen.append(await status_of(kaizen, "c"))
        assert seen == [410, "Completed", 411, "Completed"]
        with pytest.raises(ValueError, match="start must be before end"):
            emulator.faults.between(Fault.reset(), 5, 5)
        with pytest.raises(ValueError, match="start must carry a time zone"):
            emulator.faults.between(Fault.reset(), datetime(2026, 1, 1), 5)  # noqa: DTZ001 - the point of it


async def test_latencies_are_spread_as_those_of_servers(clock: VirtualClock) -> None:
    """Log-normal latencies have the given median and spread in virtual time."""
    async with KaizenEmulator(clock=clock, default_life=Life.ended()) as emulator, client_of(emulator, clock) as kaizen:
        emulator.faults.always(Fault.lognormal_latency(2.0, 0.5))
        took = []
        for number in range(200):
            before = clock.time()
            await kaizen.instructor_executions.get(f"e{number}")
            took.append(clock.time() - before)
    logs = [math.log(each / 2.0) for each in took]
    assert abs(sum(logs) / len(logs)) < 0.15
    assert 0.4 < math.sqrt(sum(each * each for each in logs) / len(logs)) < 0.6


async def test_chaos_is_the_same_for_the_same_seed() -> None:
    """The same seed gives the same chaos. Its share of requests fails, and retries find every id."""

    async def run(seed: int) -> list[tuple[str, int | None]]:
        clock = VirtualClock()
        emulator = KaizenEmulator(default_life=Life.ended(), clock=clock)
        async with emulator, client_of(emulator, clock) as kaizen:
            emulator.faults.chaos(0.3, seed=seed or None)
            for number in range(30):
                with suppress(KaizenError):
                    await kaizen.instructor_executions.get(f"e{number}", retry=ONCE)
            return [(request.id, request.status) for request in emulator.requests]

    first, again, other = await run(0), await run(0), await run(2)
    assert first == again != other
    assert 2 <= sum(status != 200 for _, status in first) <= 18


# TLS and allowed hosts.


async def test_tls_is_served_with_a_certificate_that_only_its_context_trusts() -> None:
    """Only the emulator's ssl_context trusts its certificate. TLS uses a real connection, also with a virtual clock."""
    clock = VirtualClock()
    async with KaizenEmulator(tls=True, default_life=Life.ended(), clock=clock) as emulator:
        assert emulator.base_url.startswith("https://127.0.0.1:")
        async with client_of(emulator, clock, ssl_context=emulator.ssl_context) as kaizen:
            assert await status_of(kaizen, "exec_1") == "Completed"
        assert len(emulator.ssl_context.get_ca_certs()) == 1
    async with KaizenEmulator() as emulator:
        with pytest.raises(RuntimeError, match="make it with tls=True"):
            _ = emulator.ssl_context


@pytest.mark.parametrize(
    ("bound_to", "allowed", "header", "accepted"),
    [
        ("127.0.0.1", [], "127.0.0.1:80", True),
        ("127.0.0.1", [], "LOCALHOST", True),
        ("127.0.0.1", [], "127.0.0.9", True),
        ("127.0.0.1", [], "evil.example:80", False),
        ("127.0.0.1", [], "10.0.0.1", False),
        ("127.0.0.1", [], None, False),
        ("127.0.0.1", [], "localhost.:80", True),
        ("127.0.0.1", [], "evil.example.", False),
        ("127.0.0.1", [], "localhost:evil.example", False),
        ("127.0.0.1", [], "127.0.0.1:80@evil.example", False),
        ("127.0.0.1", [], "[::1]evil.example", False),
        ("127.0.0.1", ["Evil.example"], "evil.example:80", True),
        ("127.0.0.1", ["*"], "anything.example", True),
        ("::1", [], "[::1]:80", True),
        ("0.0.0.0", [], "10.0.0.1:80", True),  # noqa: S104 - nothing is bound
        ("0.0.0.0", [], "emulator:80", True),  # noqa: S104 - the same
        ("0.0.0.0", [], "evil.example", False),  # noqa: S104 - the same
    ],
)
def test_host_headers_that_name_other_servers_are_refused(
    bound_to: str, allowed: list[str], header: str | None, accepted: bool
) -> None:
    """A Host header of another server is refused, which protects against DNS rebinding."""
    assert HostCheck(bound_to, allowed).accepts(header) is accepted


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("http://evil.example", 421),
        ("http://localhost@evil.example", 421),
        ("http://[::2]", 421),
        ("http://127.0.0.1:1", 404),
        ("http://[::1]", 404),
        ("", 404),
    ],
)
async def test_the_host_in_the_target_of_a_request_counts_too(target: str, status: int) -> None:
    """A host in the request target takes precedence over the Host header."""
    async with KaizenEmulator() as emulator:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(emulator.base_url.split(":")[2].strip("/")))
        writer.write(f"POST {target}/nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n".encode())
        assert (await reader.readline()).split()[1] == str(status).encode()
        writer.close()


async def test_the_description_needs_no_key() -> None:
    """Health and OpenAPI need no key and are not counted. A foreign Host header is refused first."""
    async with KaizenEmulator(api_key="secret-key") as emulator, aiohttp.ClientSession() as session:
        emulator.serve("invoices/get", {"inv_1": {"total": 1}})
        async with session.get(emulator.base_url + "health") as response:
            assert await response.json() == {"status": "ok"}
        async with session.get(emulator.base_url + "openapi.json") as response:
            described = await response.json()
        assert {f"/{kind.path}" for kind in KINDS.values()} | {"/invoices/get", "/health"} == set(described["paths"])
        url = emulator.base_url + "instructor/executions/get"
        async with session.post(url, json={"id": "a"}, headers={"Host": "evil.example"}) as response:
            assert response.status == 421
        assert emulator.request_count == 0
        async with session.post(url, json={"id": "a" * 600}) as response:
            assert response.status == 401
        assert emulator.requests[0].id == ""


LIVES = {
    "enqueued": Life.running(status="Enqueued"),
    "running": Life.running(),
    "ended": Life.ended(),
    "failed": Life.ended(status="Failed"),
}


@pytest.mark.parametrize("path", ["/instructor/executions/get", "/executions/get", "/invoices/get"])
async def test_responses_match_their_description(path: str) -> None:
    """The OpenAPI description is valid, and all records and errors match it."""
    async with KaizenEmulator() as emulator, aiohttp.ClientSession() as session:
        emulator.serve("invoices/get", lambda execution_id: LIVES.get(execution_id.rstrip("0123456789")))
        for number in range(8):
            for name, life in LIVES.items():
                emulator.add(f"{name}{number}", life)
        async with session.get(emulator.base_url + "openapi.json") as response:
            described = await response.json()
        openapi_spec_validator.validate(described)
        assert described["servers"] == [{"url": "/"}]
        responses = described["paths"][path]["post"]["responses"]
        for execution_id in ["nobody", "", *emulator.executions()]:
            async with session.post(emulator.base_url + path[1:], json={"id": execution_id}) as response:
                schema = responses[str(response.status)]["content"]["application/json"]["schema"]
                Draft202012Validator(schema).validate(await response.json())


# Recordings.


async def test_responses_are_recorded_and_replayed(tmp_path: Path) -> None:
    """A recording has no keys and is replayed in order. The last response for an id repeats."""
    file = tmp_path / "bug.jsonl"
    async with KaizenEmulator(api_key="secret-key") as real:
        real.add("exec_1", Life.running())
        real.faults.next(
            Fault.status(
                503,
                headers={"Retry-After": "0", "X-RateLimit-For": "secret-key", "X-Request-Id": "r_1"},
                body=b"key secret-key \xff",
            ),
            id="exec_2",
        )
        real.faults.next(Fault.html_502(), id="exec_3")
        real.faults.next(Fault.reset(), id="exec_4")
        async with (
            Recorder(real.base_url, file) as recorder,
            KaizenClient("secret-key", base_url=recorder.base_url) as kaizen,
        ):
            assert await status_of(kaizen, "exec_1") == "InProgress"
            real.finish("exec_1", "Failed")
            assert await status_of(kaizen, "exec_1") == "Failed"
            assert [await status_of(kaizen, i) for i in ("exec_2", "exec_3", "exec_4")] == [503, 502, 502]
            async with aiohttp.ClientSession() as session:
                async with session.post(recorder.base_url + "instructor/executions/get", data=b"\xff") as response:
                    assert response.status == 401
    text = file.read_text()
    assert "secret-key" not in text
    assert len(text.splitlines()) == 6
    async with KaizenEmulator() as emulator, client_of(emulator) as kaizen:
        emulator.replay(file)
        seen = [await status_of(kaizen, "exec_1") for _ in range(3)]
        assert seen == ["InProgress", "Failed", "Failed"]
        with pytest.raises(StatusError) as caught:
            await kaizen.instructor_executions.get("exec_2", retry=ONCE)
        assert (caught.value.status, caught.value.request_id) == (503, "r_1")
        assert await status_of(kaizen, "exec_4") == 502
        assert await status_of(kaizen, "exec_5") == 404


@pytest.mark.parametrize(
    "changes",
    [
        {"status": -1},
        {"status": 101},
        {"headers": {"Retry-After": "1\r\nSet-Cookie: a=b"}},
        {"headers": {"Retry-After\nX": "1"}},
        {"base64": "a"},
        {"id": None},
        {"json": "@"},
    ],
    ids=str,
)
def test_a_line_that_no_recorder_wrote_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    """A recording is input: each mistake in it is a ValueError that names the line."""
    file = tmp_path / "bug.jsonl"
    line = json.dumps({"path": "/a", "id": "a", "seconds": 0, "status": 200, "headers": {}, **changes})
    file.write_text(line.replace('"@"', "[" * 100_000))
    with pytest.raises(ValueError, match=r"bug\.jsonl, line 1 is not a recorded response"):
        KaizenEmulator().replay(file)


async def test_a_recording_cannot_break_the_framing_of_responses(tmp_path: Path) -> None:
    """Headers about the connection are not replayed."""
    file = tmp_path / "bug.jsonl"
    headers = {"Content-Length": "x", "Transfer-Encoding": "chunked", "Connection": "upgrade", "X-Request-Id": "r_1"}
    line = {"path": "/instructor/executions/get", "id": "a", "seconds": 0, "status": 503, "headers": headers}
    file.write_text(json.dumps({**line, "text": "busy"}))
    async with KaizenEmulator() as emulator, KaizenClient(base_url=emulator.base_url, retry=ONCE) as kaizen:
        emulator.replay(file)
        with pytest.raises(StatusError) as caught:
            await kaizen.instructor_executions.get("a")
    assert (caught.value.status, caught.value.request_id) == (503, "r_1")


async def test_headers_of_a_gateway_are_passed_on_and_not_recorded(tmp_path: Path) -> None:
    """The recorder passes on the client's own headers, and no response in the file quotes a secret of them."""
    file = tmp_path / "bug.jsonl"
    secrets = {"X-Gateway-Token": "gateway-token", "Cookie": "theme=dark; session=session-secret"}

    async def quote(exchange: Exchange) -> Answer:
        sent = exchange.request.headers
        return Answer.message(403, f"tenant {sent['X-Tenant']}: {sent['X-Gateway-Token']}, {sent['Cookie']}")

    async with KaizenEmulator() as real:
        real.faults.next(Fault("quote", quote))
        async with (
            Recorder(real.base_url, file) as recorder,
            KaizenClient("secret-key", base_url=recorder.base_url, headers={"X-Tenant": "7", **secrets}) as kaizen,
        ):
            assert await status_of(kaizen, "exec_1") == 403
    assert "tenant 7: ***, theme=dark; session=***" in file.read_text()


async def test_a_replay_serves_paths_that_are_not_known(tmp_path: Path) -> None:
    """A replay serves the paths of custom kinds."""
    file = tmp_path / "invoices.jsonl"
    line = {
        "path": "/invoices/get",
        "id": "inv_1",
        "seconds": 0,
        "status": 200,
        "headers": {},
        "json": {"id": "inv_1", "total": 7},
    }
    file.write_text(json.dumps(line) + "\n")
    async with KaizenEmulator() as emulator, client_of(emulator) as kaizen:
        emulator.replay(file)
        invoices = kaizen.lookups("invoices/get", Invoice)
        assert (await invoices.get("inv_1")).total == 7
        with pytest.raises(NotFoundError):
            await invoices.get("inv_2")


# Scripts in files.

SCRIPT = """
api_key: secret-key
default: {lasting: 60, record: {browserSessionId: mine}}
executions:
  exec_1: {ended: Failed}
  exec_2: {running: Paused, record: {browserSessionId: s_1}}
  exec_3: {steps: [[Enqueued, 0], [Completed, 60, {browserSessionId: b}]], ends: false}
kinds:
  invoices/get: {inv_1: {total: 12}}
rate_limit: {rate: 1000, burst: 100}
faults:
  - {status: 418, times: 1, id: exec_5}
  - {latency: 0.2, chance: 1, id: exec_6}
  - {fault: html_502, nth: 1, id: exec_7}
  - {status: 409, id: exec_8}
"""


async def test_a_script_in_a_file_is_played(tmp_path: Path, clock: VirtualClock) -> None:
    """The emulator plays a script from a YAML file."""
    file = tmp_path / "lives.yaml"
    file.write_text(SCRIPT)
    script = read_script(file)
    async with KaizenEmulator(api_key=script.api_key, clock=clock) as emulator, client_of(emulator, clock) as kaizen:
        script.apply(emulator)
        ids = ["exec_1", "exec_2", "exec_3", "exec_4", "exec_5", "exec_7", "exec_8"]
        seen = [await status_of(kaizen, execution_id) for execution_id in ids]
        assert seen == ["Failed", "Paused", "Enqueued", "Enqueued", 418, 502, 409]
        assert (await kaizen.instructor_executions.get("exec_4")).browser_session_id == "mine"
        assert (await kaizen.lookups("invoices/get", Invoice).get("inv_1")).total == 12
        before = clock.time()
        await status_of(kaizen, "exec_6")
        assert clock.time() - before == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"executions": {"a": {"ended": "x", "running": "y"}}}', "one of ended, lasting, running and steps"),
        ('{"faults": [{"status": 503, "latency": 1}]}', "exactly one of status, latency and fault"),
        ('{"faults": [{"fault": "nonsense"}]}', "a fault is one of reset, disconnect"),
        ('{"nonsense": 1}', "is not a script for the emulator"),
        ("[" * 100_000, "is not a script for the emulator"),
    ],
    ids=["two lives", "two faults", "unknown fault", "unknown field", "nested"],
)
def test_an_invalid_script_file_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    """An invalid script file is refused with the reason."""
    file = tmp_path / "lives.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=complaint):
        read_script(file).apply(KaizenEmulator())


def test_yaml_that_stands_for_billions_of_values_is_refused(tmp_path: Path) -> None:
    """Aliases of aliases, and a part that contains itself, are refused before anything walks through them."""
    file = tmp_path / "lives.yaml"
    levels = "".join(f"  a{level}: &a{level} [{','.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 12))
    for text in (f"executions:\n  a0: &a0 [x]\n{levels}", "executions: &all {a: *all}"):
        file.write_text(text)
        with pytest.raises(ValueError, match="aliases stand for more than"):
            read_script(file)
    file.write_text("default: &life {lasting: 60}\nexecutions: {a: *life, b: *life}")
    assert read_script(file).executions["b"].lasting == 60


def test_a_script_is_read_up_to_a_size_and_refused_in_one_printable_line(tmp_path: Path) -> None:
    """A device that never ends is not read to its end, and what a file contains cannot control a terminal."""
    with pytest.raises(ValueError, match="too large for a script"):
        read_script(Path("/dev/zero"))
    file = tmp_path / "lives.json"
    file.write_text('{"\\u001b]52;c;QUJD\\u0007\\n": 1}')
    with pytest.raises(ValueError, match="unknown field") as caught:
        read_script(file)
    assert str(caught.value).isprintable()


# Virtual time.


async def test_deadlines_timeouts_and_latencies_pass_in_virtual_time(clock: VirtualClock) -> None:
    """Deadlines, timeouts, latencies and hanging servers take exact virtual time and no real time."""
    async with KaizenEmulator(clock=clock, default_life=Life.ended()) as emulator:
        emulator.faults.always(Fault.latency(9), id="slow")
        emulator.faults.next(Fault.hang(), id="hangs")
        emulator.faults.next(Fault.stalled_body(), id="stalls")
        async with client_of(emulator, clock, attempt_timeout=30) as kaizen:
            took = []
            for execution_id, deadline in (("slow", 5), ("slow", 20), ("hangs", 100), ("stalls", 100)):
                before = clock.time()
                with suppress(KaizenError):
                    await kaizen.instructor_executions.get(execution_id, deadline=deadline)
                took.append(round(clock.time() - before))
    assert took[:2] == [5, 9]
    assert 30 <= took[2] <= 32
    assert 30 <= took[3] <= 32


def test_two_event_loops_live_in_one_virtual_time() -> None:
    """Two event loops in different threads share one virtual time, and no timer is lost."""
    clock = VirtualClock()
    ended: list[tuple[str, float]] = []

    async def wait(name: str, seconds: float, others: threading.Barrier) -> None:
        clock.hold()
        others.wait(5)
        clock.release()
        for _ in range(3):
            await clock.sleep(seconds)
        ended.append((name, clock.time()))

    barrier = threading.Barrier(2)
    thread = threading.Thread(target=lambda: asyncio.run(wait("thread", 1000, barrier)))
    thread.start()
    asyncio.run(asyncio.wait_for(wait("here", 400, barrier), 20))
    thread.join(20)
    assert ended == [("here", 1200), ("thread", 3000)]


class ClosingLoop(asyncio.SelectorEventLoop):
    """A loop that closes at the moment at which another loop calls into it."""

    def call_soon_threadsafe(self, *args: Any, **options: Any) -> Any:
        """Close the loop, then call."""
        self.close()
        return super().call_soon_threadsafe(*args, **options)


@pytest.mark.parametrize("left", ["a timer", "a hold", "an advance"])
def test_a_closing_loop_does_not_stop_the_clock(left: str) -> None:
    """When a loop closes, its timers and holds are dropped, and the other loop's time continues."""
    clock = VirtualClock()
    there = ClosingLoop()

    async def leave() -> None:
        if left == "a timer":
            clock.call_at(5, there.stop)
        elif left == "a hold":
            clock.hold()
        else:
            clock.hold()
            waiting.append(asyncio.ensure_future(clock.advance(0)))
            await asyncio.sleep(0.02)
            clock.release()

    async def go_on() -> None:
        if left == "a hold":
            asyncio.get_running_loop().call_later(0.05, there.close)
        await clock.sleep(10)

    waiting: list[asyncio.Task[None]] = []
    with closing(there):
        there.run_until_complete(leave())
        asyncio.run(asyncio.wait_for(go_on(), 5))
        assert clock.time() == 10
        assert there.is_closed()
    for task in waiting:
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        task.get_coro().close()  # type: ignore[union-attr]


def test_a_loop_that_refuses_calls_is_reported() -> None:
    """An error of a loop that is not closed is raised."""
    clock = VirtualClock()
    with closing(asyncio.new_event_loop()) as there:

        async def hold() -> None:
            clock.hold()

        there.run_until_complete(hold())
        there.call_soon_threadsafe = Mock(side_effect=RuntimeError("refused"))  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="refused"):
            clock.let_go(there)


async def test_a_hold_ends_once(clock: VirtualClock) -> None:
    """A hold ends only once, however often it is released, also after its loop has closed."""
    stranger = asyncio.new_event_loop()
    clock.take_back(stranger)
    clock.let_go(stranger)
    stranger.close()
    hold = Hold(clock)
    clock.hold()
    hold.let_go()
    hold.let_go()
    await clock.sleep(5)
    hold.end()
    hold.let_go()
    clock.let_go(asyncio.get_running_loop())
    clock.let_go(asyncio.get_running_loop())
    await clock.sleep(5)
    assert clock.time() == 10


async def test_time_continues_beside_a_stopped_loop(clock: VirtualClock) -> None:
    """Virtual time continues in a running loop beside another loop that does not run."""
    with closing(asyncio.new_event_loop()) as there:

        def register() -> None:
            clock.call_at(1e9, there.stop)

        there.call_soon(register)
        clock.hold()
        await asyncio.to_thread(there.run_until_complete, asyncio.sleep(0.02))
        clock.release()
        slept = 0
        until = time.monotonic() + 0.1
        while time.monotonic() < until:
            await clock.sleep(1)
            slept += 1
        assert clock.time() == slept > 10


async def test_a_cancelled_advance_leaves_nothing(clock: VirtualClock) -> None:
    """A cancelled `advance` leaves nothing behind, and time continues."""
    clock.hold()
    advancing = asyncio.create_task(clock.advance(0))
    await asyncio.sleep(0.02)
    advancing.cancel()
    clock.release()
    await clock.sleep(5)
    assert advancing.cancelled()
    assert clock.time() == 5


async def test_an_extra_release_is_refused() -> None:
    """A `release` without a `hold` raises an error and does not freeze time."""
    clock = VirtualClock()
    with pytest.raises(RuntimeError, match="release\\(\\) without a hold\\(\\)"):
        clock.release()
    await clock.sleep(5)
    assert clock.time() == 5
    with pytest.raises(RuntimeError, match="release\\(\\) without a hold\\(\\)"):
        await asyncio.to_thread(clock.release)
    await asyncio.to_thread(clock.hold)
    sleeper = asyncio.create_task(clock.sleep(5))
    await asyncio.sleep(0.02)
    assert clock.time() == 5
    await asyncio.to_thread(clock.release)
    await sleeper
    assert clock.time() == 10


async def test_advancing_runs_all_due_timers(clock: VirtualClock) -> None:
    """`advance` runs each timer at its own time, and all of them have run when it returns."""
    policy = PollPolicy(max_interval=60)
    async with KaizenEmulator(clock=clock) as emulator, client_of(emulator, clock) as kaizen:
        emulator.add("exec_1", Life.lasting(300))
        waiting = asyncio.create_task(kaizen.instructor_executions.wait("exec_1", poll=policy))
        await clock.advance(200)
        assert clock.time() == 200
        assert not waiting.done()
        await clock.advance(200)
        assert waiting.done()
        assert (await waiting).status == "Completed"
        emulator.add("exec_2", Life.running())
        waiting = asyncio.create_task(kaizen.instructor_executions.wait("exec_2", poll=policy))
        await clock.advance(60)
        emulator.finish("exec_2", "Failed")
        assert (await waiting).status == "Failed"


@pytest.mark.parametrize("timers", [1, 2])
async def test_a_timer_that_fails_is_reported_by_the_loop(clock: VirtualClock, timers: int) -> None:
    """The event loop reports what a timer raises, and time continues."""
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    for number in range(timers):
        clock.call_at(5, [].pop if number == 0 else asyncio.Event().set)
    await clock.sleep(10)
    assert [type(context["exception"]) for context in reported] == [IndexError]
    assert clock.time() == 10


async def test_a_timer_can_cancel_one_that_is_due_at_the_same_time(clock: VirtualClock) -> None:
    """A timer that is cancelled in the moment in which it is due does not fire."""
    fired: list[str] = []

    def cancel_second() -> None:
        second.cancel()

    clock.call_at(5, cancel_second)
    second = clock.call_at(5, partial(fired.append, "second"))
    await clock.sleep(10)
    assert fired == []


def test_a_timer_may_end_the_loop() -> None:
    """An interruption in a timer reaches the code that runs the event loop, and the clock serves the next loop."""
    clock = VirtualClock()

    async def interrupt() -> None:
        clock.call_at(5, sys.exit)
        await clock.sleep(10)

    with pytest.raises(SystemExit):
        asyncio.run(interrupt())
    asyncio.run(clock.sleep(10))
    assert clock.time() == 15


async def test_a_clock_that_goes_back_stands_still() -> None:
    """If a custom clock goes back, the emulator's time stands still until the clock catches up."""
    now = [time.time()]
    start = now[0] - 100
    async with KaizenEmulator(clock=lambda: now[0]) as emulator, client_of(emulator) as kaizen:
        emulator.add("exec_1", Life.of(("Enqueued", 0), ("InProgress", 5), ("Completed", 9)))
        seen = []
        for at in (106, 90, 108, 110):
            now[0] = start + at
            seen.append(await status_of(kaizen, "exec_1"))
    assert seen == ["InProgress", "InProgress", "InProgress", "Completed"]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"seed": "x"}, "seed must be int"),
        ({"clock": 5}, r"must be a VirtualClock\(\) or a function"),
        ({"clock": VirtualClock}, "or a function"),
        ({"clock": asyncio.sleep}, "without arguments; it raised TypeError"),
        ({"clock": lambda: math.nan}, "must return seconds from"),
        ({"clock": lambda: "x"}, "must return a number of seconds"),
        ({"clock": lambda: awaited("")}, "clock must return a number"),
        ({"host": ""}, "host must be an address"),
        ({"host": "127.0.0.1:80"}, "not .127.0.0.1:80"),
        ({"host": "[::1]"}, "without scheme and port"),
        ({"epoch": "today"}, "epoch must be a datetime"),
        ({"epoch": datetime(1, 1, 1, tzinfo=UTC)}, "epoch must be in one of the years"),
        ({"tls": "yes"}, "tls must be bool"),
        ({"strict": 1}, "strict must be bool"),
        ({"api_key": "a\nb"}, "printable ASCII"),
        ({"allowed_hosts": [5]}, "each of allowed_hosts must be str"),
        ({"port": 70_000}, "port must be from 0 to 65535"),
        ({"api_key": ""}, "api_key must not be empty and"),
        ({"allowed_hosts": "name"}, "allowed_hosts takes a list"),
        ({"default_life": 5}, "default_life must be a Life or a function"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_invalid_settings_are_refused(settings: dict[str, Any], complaint: str) -> None:
    """Invalid settings raise an error that says what is expected."""
    with pytest.raises((TypeError, ValueError), match=complaint):
        KaizenEmulator(**settings)


@pytest.mark.parametrize("clock", [VirtualClock, time.monotonic, 5], ids=str)
def test_a_client_refuses_what_is_not_a_clock(clock: Any) -> None:
    """A class, a function or a number is no clock for a client, and the error says what is."""
    with pytest.raises(TypeError, match=r"clock must be a clock such as VirtualClock\(\)"):
        KaizenClient("key", clock=clock)


async def test_an_address_that_is_not_free_is_named() -> None:
    """The error names the address on which the emulator cannot listen."""
    async with KaizenEmulator() as emulator:
        port = int(emulator.base_url.split(":")[-1].strip("/"))
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use"):
            KaizenEmulator(port=port).__enter__()


@pytest.mark.parametrize("faults", ["reset, latency", "reset, reset, latency, hang", "hang, disconnect, latency"])
@pytest.mark.parametrize("has_session", [False, True])
async def test_latency_passes_on_connections_too(clock: VirtualClock, faults: str, has_session: bool) -> None:
    """Latencies pass in virtual time over real connections too, also for retries and passed-in sessions."""
    made = {"latency": Fault.latency(3), "hang": Fault.hang(), "reset": Fault.reset(), "disconnect": Fault.disconnect()}
    with KaizenEmulator(clock=clock) as emulator:
        emulator.add("a")
        async with aiohttp.ClientSession() as session:
            client = client_of(emulator, clock, session=session if has_session else None, deadline=None)
            async with client as kaizen, asyncio.timeout(20):
                emulator.faults.next(Fault("over a connection", lambda exchange: exchange.sleep(0)))
                assert await status_of_retried(kaizen, "a") == "Completed"
                for name in faults.split(", "):
                    emulator.faults.next(made[name])
                assert await status_of_retried(kaizen, "a") == "Completed"
    assert clock.time() >= 3


async def test_a_cancelled_request_does_not_affect_the_next_hold(clock: VirtualClock) -> None:
    """After a cancelled request, the next request for the same id gets its own hold."""
    async with KaizenEmulator(clock=clock) as emulator, client_of(emulator, clock) as kaizen:
        emulator.add("a")
        emulator.faults.always(Fault("late", lambda exchange: exchange.sleep(3)))
        cancelled = asyncio.create_task(status_of(kaizen, "a"))
        while not emulator._wired:  # noqa: ASYNC110 - there is no event to await
            await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.wait([cancelled])
        async with asyncio.timeout(4):
            assert await status_of(kaizen, "a") == "Completed"


async def test_a_client_in_virtual_time_can_use_any_server(clock: VirtualClock) -> None:
    """A client with a virtual clock uses real connections to servers with another clock."""
    async with KaizenEmulator(default_life=Life.ended()) as other, client_of(other, clock) as kaizen:
        assert await status_of(kaizen, "exec_1") == "Completed"
    async with KaizenEmulator(default_life=Life.ended(), clock=clock) as emulator, client_of(emulator) as kaizen:
        emulator.faults.always(Fault.latency(3600))
        assert await status_of(kaizen, "exec_1") == "Completed"
    assert clock.time() == 3600


@pytest.mark.parametrize("fault", [None, Fault.latency(1)])
async def test_a_request_in_the_same_process_is_refused_as_any_other(clock: VirtualClock, fault: Fault | None) -> None:
    """A request in the same process is refused for its key as over a connection."""
    async with KaizenEmulator(clock=clock, api_key="other"), KaizenEmulator(clock=clock, api_key="other") as emulator:
        if fault is not None:
            emulator.faults.always(fault)
        async with client_of(emulator, clock) as kaizen:
            assert await status_of(kaizen, "exec_1") == 401


@pytest.mark.parametrize("fault", [None, Fault.latency(1), Fault.reset()], ids=["plain", "latency", "reset"])
async def test_an_id_that_is_too_long_is_refused_in_the_same_process_too(
    clock: VirtualClock, fault: Fault | None
) -> None:
    """An id that the emulator refuses gets a 400 in virtual time, as over a connection."""
    async with KaizenEmulator(clock=clock) as emulator, client_of(emulator, clock) as kaizen:
        if fault is not None:
            emulator.faults.next(fault)
        assert await status_of(kaizen, "x" * 600) == 400


async def test_two_waits_share_polls_in_the_same_process(clock: VirtualClock) -> None:
    """Two waits for one execution get its end from the same polls in virtual time."""
    async with KaizenEmulator(clock=clock) as emulator, client_of(emulator, clock) as kaizen:
        emulator.add("exec_1", Life.lasting(60))
        wait = kaizen.instructor_executions.wait
        first, second = await asyncio.gather(wait("exec_1"), wait("exec_1"))
        assert first.status == second.status == "Completed"
        assert emulator.request_count == kaizen.stats().polls == kaizen.stats().lookups


class Even(Random):
    """A random source that does not depend on earlier draws, because connections also draw numbers."""

    def random(self) -> float:
        """Return the mean."""
        return 0.5


async def seen_of_waits(session: aiohttp.ClientSession | None) -> list[Any]:
    """Return everything observable of waits with faults, over connections if there is a session."""
    clock = VirtualClock(epoch=datetime(2026, 1, 1, tzinfo=UTC))
    clock.random = Even()
    async with KaizenEmulator(clock=clock) as emulator:
        emulator.add("exec_1", Life.lasting(300))
        emulator.add("exec_2", record={"id": "another"})
        emulator.add("exec_3", body=b"{")
        emulator.faults.between(Fault.status(503), 100, 130)
        emulator.faults.chance(Fault.lognormal_latency(0.2), 0.3, id="exec_1")
        outcomes = []
        async with client_of(emulator, clock, session=session) as kaizen:
            for execution_id in ("exec_1", "exec_2", "exec_3", "exec_4", "exec_1"):
                try:
                    outcomes.append(await kaizen.instructor_executions.wait(execution_id, deadline=310))
                except KaizenError as error:
                    outcomes.append((type(error), str(error)))
                emulator.faults.clear()  # requests in the same process get their record at once from here on
                emulator.add("exec_4", Life.lasting(200, status="Failed"), workflow="Another")
            await asyncio.sleep(0)  # lets the last poll be counted
            stats = kaizen.stats()
        requests = [
            (each.at, each.id, each.status, each.path, each.kind, each.body, {**each.headers, "Host": None})
            for each in emulator.requests
        ]
        return [outcomes, requests, stats.attempts, stats.polls, stats.succeeded, stats.failed, dict(emulator.answers)]


async def test_requests_in_the_same_process_are_those_of_connections() -> None:
    """Requests in the same process have the same times, bytes, responses and totals as over connections."""
    inside = await seen_of_waits(None)
    async with aiohttp.ClientSession() as session:
        by_wire = await seen_of_waits(session)
    assert len(inside[1]) > 100
    assert inside == by_wire


@pytest.mark.parametrize("refusals", [1, 9, 20])
async def test_waits_in_the_same_process_survive_a_refusal(clock: VirtualClock, refusals: int) -> None:
    """Waits in the same process survive a short refusal, whether or not the probed execution is known."""
    async with KaizenEmulator(clock=clock) as emulator, client_of(emulator, clock) as kaizen:
        ids = [f"exec_{number}" for number in range(50)]
        emulator.add_many(ids, Life.lasting(60))
        emulator.faults.next(Fault.status(403), times=refusals)
        async with asyncio.timeout(20):
            waits = [kaizen.instructor_executions.wait(execution_id, deadline=600) for execution_id in ids]
            ended = await asyncio.gather(*waits)
    assert {execution.status.value for execution in ended} == {"Completed"}
    assert clock.time() < 80


async def test_the_memory_of_an_emulator_is_bounded(clock: VirtualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulator keeps a bounded number of ids and of script errors."""
    monkeypatch.setattr(emulator_module, "_MOST_IDS", 1)
    monkeypatch.setattr(emulator_module, "_MOST_ERRORS", 1)
    emulator = KaizenEmulator(clock=clock, strict=True)
    with pytest.raises(ScriptError, match="exec_1"):
        async with emulator, client_of(emulator, clock) as kaizen:
            seen = [await status_of(kaizen, i) for i in ("exec_1", "exec_1", "exec_2")]
    assert seen == [404, 404, 507]
    assert len(emulator.errors) == 1


async def test_a_wrong_script_under_a_fault_is_named(clock: VirtualClock) -> None:
    """A script error is reported with its reason, also if a fault calls the script or needs a connection."""

    def broken(_execution_id: str) -> Any:
        raise LookupError("of mine")

    async def looks(exchange: Exchange) -> Answer:
        return Answer(200, str(exchange.request).encode())

    for fault, text in (
        (Fault.trickle(0), "of mine"),
        (Fault("looks", looks, needs_connection=False), "did not come over a connection"),
    ):
        emulator = KaizenEmulator(clock=clock)
        emulator.serve("instructor/executions/get", broken)
        emulator.faults.always(fault)
        with pytest.raises(ScriptError, match=text):
            async with emulator, client_of(emulator, clock) as kaizen:
                await status_of(kaizen, "exec_1")


def test_a_wildcard_host_is_reached_over_loopback() -> None:
    """An emulator on all addresses is reached over loopback of the same IP version."""
    assert reachable("0.0.0.0") == "127.0.0.1"  # noqa: S104 - nothing is bound
    assert reachable("::") == "::1"
    assert reachable("10.0.0.1") == "10.0.0.1"


def test_tls_without_trustme_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without trustme, TLS raises an ImportError that names the extra."""
    monkeypatch.setitem(sys.modules, "trustme", None)
    with pytest.raises(ImportError, match=r"pip install kaizen-async\[testing\]"):
        KaizenEmulator(tls=True)


def test_a_new_kind_is_served_with_shared_and_required_fields() -> None:
    """A new kind gets the fields that its Struct shares with other kinds, and a number where a number is required."""
    kind = served(Kind("invoices", "invoices/get", Invoice))
    snapshot = Snapshot.of("inv_1", Life.ended(), digest="0" * 64, start=datetime(2026, 1, 1, tzinfo=UTC), age=5)
    assert json.loads(kind.encode(snapshot, None)) == {"id": "inv_1", "total": 0}


async def test_frozen_time_is_the_emulators_time() -> None:
    """Under freezegun, the emulator accepts fake dates in scripts and records."""
    with freeze_time("2026-01-01T10:00:00Z", real_asyncio=True):
        now = datetime.now(UTC)
        assert type(now).__name__ == "FakeDatetime"
        clock = VirtualClock(epoch=now)
        async with KaizenEmulator(clock=clock) as emulator, client_of(emulator, clock) as kaizen:
            emulator.add("a", Life.lasting(60), record={"createdAt": now, "day": now.date()})
            emulator.serve("invoices/get", {"inv_1": {"due": now}})
            emulator.faults.between(Fault.status(503), now + timedelta(seconds=30), now + timedelta(seconds=40))
            execution = await kaizen.instructor_executions.wait("a")
            assert (await kaizen.lookups("invoices/get", Due).get("inv_1")).due == now
    assert execution.end_time == datetime(2026, 1, 1, 10, 1, tzinfo=UTC)
    assert emulator.answers[503] > 0
