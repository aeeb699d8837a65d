"""The emulator from the view of a client, over real sockets with plain aiohttp."""

import asyncio
import contextlib
import gc
import io
import json
import socket
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
import msgspec
import pytest

from kaizen_async.models import InstructorExecution
from kaizen_async.testing import Fault, KaizenEmulator, Life
from kaizen_async.testing.records import SERVED, ServedKind, Snapshot

NEW_YEAR = datetime(2026, 1, 1, tzinfo=UTC)
PATH = "instructor/executions/get"
REQUEST = (
    f"POST /{PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 16\r\n\r\n"
    '{"id": "exec_1"}'
).encode()
BLOCKING_LOOK_UP = """
import sys
from urllib.request import Request, urlopen

urlopen(Request(sys.argv[1], b'{"id": "exec_1"}', {"Content-Type": "application/json"})).close()
"""


class Clock:
    """A clock that a test moves by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """Return the current second."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    """Return a clock that stands still."""
    return Clock()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """Yield a plain aiohttp session."""
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
async def emulator(clock: Clock) -> AsyncIterator[KaizenEmulator]:
    """Yield an emulator whose time stands still at New Year unless a test moves it."""
    async with KaizenEmulator(clock=clock, epoch=NEW_YEAR) as emulator:
        yield emulator


async def ask(
    session: aiohttp.ClientSession, emulator: KaizenEmulator, execution_id: str = "exec_1", **headers: str
) -> tuple[int, Any]:
    """Look an execution up, and return the status and the JSON of the response."""
    async with session.post(emulator.base_url + PATH, json={"id": execution_id}, headers=headers) as response:
        return response.status, await response.json()


async def arrived(emulator: KaizenEmulator, requests: int) -> None:
    """Wait until a number of requests have arrived."""
    while emulator.request_count < requests:  # noqa: ASYNC110 - the emulator has no event to await
        await asyncio.sleep(0)


def address_of(emulator: KaizenEmulator) -> tuple[str, int]:
    """Return the address of an emulator for a socket."""
    return "127.0.0.1", int(emulator.base_url.rstrip("/").rpartition(":")[2])


async def test_a_response_has_exactly_the_documented_fields(
    session: aiohttp.ClientSession, emulator: KaizenEmulator
) -> None:
    """A response decodes strictly as the library's own model and encodes to the same JSON."""
    emulator.add("exec_1", Life.ended(duration=90.5))
    status, record = await ask(session, emulator)
    decoded = msgspec.json.decode(json.dumps(record), type=InstructorExecution)
    assert status == 200
    assert json.loads(msgspec.json.encode(decoded)) == record
    assert set(record) == {field.encode_name for field in msgspec.structs.fields(InstructorExecution)} - {"sessionId"}
    assert record["id"] == "exec_1"
    assert record["workflow"]["name"]
    assert record["logins"][0]["name"] == record["contextAuthentications"][0]["loginSummary"]["name"]
    assert (record["startTime"], record["endTime"]) == ("2025-12-31T23:58:29.500000Z", "2026-01-01T00:00:00Z")
    assert (record["durationMs"], record["isRecording"], record["status"]) == (90_500, False, "Completed")


async def test_a_life_is_lived_by_the_clock(
    session: aiohttp.ClientSession, emulator: KaizenEmulator, clock: Clock
) -> None:
    """Status, end, recording, browser session and authentication change at the scripted seconds."""
    emulator.add("exec_1", Life.of(("Enqueued", 0), ("InProgress", 2.1), ("Zorp", 5.2)))
    seen = []
    for seconds in (0, 2.1, 3.1):
        clock.now += seconds
        record = (await ask(session, emulator))[1]
        assert record["startTime"] == "2026-01-01T00:00:00Z"
        authentication = record["authentications"][0]
        seen.append((record["status"], record["endTime"], record["durationMs"], record["isRecording"]))
        seen.append((record["browserSessionId"] is None, authentication["status"], "liveViewUrl" in authentication))
    assert seen == [
        *(("Enqueued", None, None, True), (True, "Enqueued", False)),
        *(("InProgress", None, None, True), (False, "InProgress", True)),
        *(("Zorp", "2026-01-01T00:00:05.200000Z", 5200, False), (False, "Finished", False)),
    ]


async def test_authentications_can_be_scripted(
    session: aiohttp.ClientSession, emulator: KaizenEmulator, clock: Clock
) -> None:
    """Each scripted authentication has its own life beside that of the execution."""
    tracks = [(("Enqueued", 0), ("Finished", 3)), (("InProgress", 0), ("Failed", 1))]
    emulator.add("exec_1", Life.of(("InProgress", 0), ends=False, authentications=tracks))
    before = (await ask(session, emulator))[1]["authentications"]
    clock.now += 1
    after = (await ask(session, emulator))[1]["authentications"]
    assert [entry["status"] for entry in before] == ["Enqueued", "InProgress"]
    assert [entry["status"] for entry in after] == ["Enqueued", "Failed"]
    assert before[1]["browserSessionId"] == after[1]["browserSessionId"]


async def test_records_depend_on_the_seed_and_the_id_alone(session: aiohttp.ClientSession) -> None:
    """The same seed and id give the same record in another emulator, and others give other records."""
    ids = [f"exec_{number}" for number in range(20)]
    runs = []
    for seed in (1, 1, 2):
        async with KaizenEmulator(seed=seed, epoch=NEW_YEAR, clock=Clock()) as emulator:
            emulator.add_many(ids, Life.running())
            runs.append([(await ask(session, emulator, each))[1] for each in ids])
    assert runs[0] == runs[1] != runs[2]
    assert len({record["workflow"]["id"] for record in runs[0]}) > 1
    assert {len(record["logins"]) for record in runs[0]} == {1, 2}
    assert len({record["browserSessionId"] for record in runs[0]}) == 20


async def test_an_unknown_id_is_not_found(session: aiohttp.ClientSession, emulator: KaizenEmulator) -> None:
    """Without a default life, an unknown id gets a 404 with a JSON body."""
    assert await ask(session, emulator, "exec_9") == (404, {"message": "there is no execution 'exec_9'"})


async def test_a_default_life_begins_with_the_first_request(session: aiohttp.ClientSession, clock: Clock) -> None:
    """The life of an id that was not added starts with the first request for it, even if that request met a fault."""
    async with KaizenEmulator(clock=clock, epoch=NEW_YEAR, default_life=Life.lasting(60)) as emulator:
        clock.now += 3600
        emulator.faults.next(Fault.status(503))
        assert (await ask(session, emulator))[0] == 503
        clock.now += 60
        record = (await ask(session, emulator))[1]
        assert (record["startTime"], record["status"]) == ("2026-01-01T01:00:00Z", "Completed")
        assert (await ask(session, emulator, "exec_2"))[1]["status"] == "Enqueued"


async def test_a_default_life_may_vary_by_id(session: aiohttp.ClientSession) -> None:
    """A function as default life is called once for each id, and None means that the execution does not exist."""
    lives = {"exec_1": Life.running(status="Paused"), "exec_2": Life.ended(status="Failed")}
    asked = []

    def life_of(execution_id: str) -> Life | None:
        asked.append(execution_id)
        return lives.get(execution_id)

    async with KaizenEmulator(default_life=life_of) as emulator:
        for execution_id, status in (("exec_1", "Paused"), ("exec_2", "Failed"), ("exec_1", "Paused")):
            assert (await ask(session, emulator, execution_id))[1]["status"] == status
        assert (await ask(session, emulator, "exec_3"))[0] == 404
    assert asked == ["exec_1", "exec_2", "exec_3"]


async def test_adding_an_id_again_begins_a_new_life(
    session: aiohttp.ClientSession, emulator: KaizenEmulator, clock: Clock
) -> None:
    """A second `add` of an id starts a new life from its own moment."""
    emulator.add("exec_1", Life.lasting(5))
    clock.now += 5
    emulator.add("exec_1", Life.lasting(5))
    assert (await ask(session, emulator))[1]["status"] == "Enqueued"


async def test_an_execution_added_without_a_life_has_ended(
    session: aiohttp.ClientSession, emulator: KaizenEmulator
) -> None:
    """An execution that is added without a life has already ended."""
    emulator.add("exec_1")
    assert (await ask(session, emulator))[1]["endTime"] == "2026-01-01T00:00:00Z"


async def test_any_field_can_be_set_or_left_out(session: aiohttp.ClientSession, emulator: KaizenEmulator) -> None:
    """`add` can replace generated fields, add further fields and leave fields out."""
    record = {"durationMs": 12.5, "endTime": NEW_YEAR, "sessionId": "s", "status": 5}
    emulator.add("exec_1", workflow="Night run", record=record, without=["logins"])
    record["status"] = 6
    answer = (await ask(session, emulator))[1]
    assert (answer["durationMs"], answer["endTime"], answer["sessionId"]) == (12.5, "2026-01-01T00:00:00Z", "s")
    assert answer["status"] == 5
    assert answer["workflow"]["name"] == "Night run"
    assert "logins" not in answer
    assert answer["isRecording"] is False


async def test_a_workflow_may_be_given_whole(session: aiohttp.ClientSession, emulator: KaizenEmulator) -> None:
    """A workflow name becomes a workflow with its own id, and a workflow object is served unchanged."""
    emulator.add("exec_1", workflow={"id": "wf_1"})
    emulator.add("exec_2", workflow="Night run")
    emulator.add("exec_3", workflow="Night run")
    records = [(await ask(session, emulator, f"exec_{number}"))[1] for number in (1, 2, 3)]
    assert records[0]["workflow"] == {"id": "wf_1"}
    assert records[1]["workflow"] == records[2]["workflow"]


async def test_a_whole_body_is_served_as_it_is(session: aiohttp.ClientSession, emulator: KaizenEmulator) -> None:
    """A given body is served unchanged, even if it is not JSON."""
    emulator.add("exec_1", body=b"\xff[")
    async with session.post(emulator.base_url + PATH, json={"id": "exec_1"}) as response:
        assert (response.status, response.content_type, await response.read()) == (200, "application/json", b"\xff[")


async def test_a_key_is_checked_when_there_is_one(session: aiohttp.ClientSession) -> None:
    """A request without the right key gets a 401, even for an id that does not exist."""
    async with KaizenEmulator(api_key="right", default_life=Life.ended()) as emulator:
        assert (await ask(session, emulator))[0] == 401
        assert (await ask(session, emulator, Authorization="Bearer wrong"))[0] == 401
        assert (await ask(session, emulator, Authorization="Bearer right"))[0] == 200
        assert emulator.answers == {401: 2, 200: 1}


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"{}", b'{"id": 5}', b'{"id": ""}', b'{"id": "\xff"}', b'{"x": ' + b"[" * 60_000],
    ids=["empty", "cut", "array", "no id", "number", "empty id", "no utf-8", "deep"],
)
async def test_an_invalid_body_is_a_bad_request(
    session: aiohttp.ClientSession, emulator: KaizenEmulator, body: bytes
) -> None:
    """A body that is not an object with a text `id` gets a 400 that shows the right form."""
    headers = {"Content-Type": "application/json"}
    async with session.post(emulator.base_url + PATH, data=body, headers=headers) as response:
        assert response.status == 400
        assert '{"id": "..."}' in (await response.json())["message"]
    assert (emulator.requests[0].id, emulator.requests[0].status) == ("", 400)


async def test_a_body_of_another_type_is_refused(session: aiohttp.ClientSession, emulator: KaizenEmulator) -> None:
    """A body that is not sent as JSON gets a 415."""
    async with session.post(emulator.base_url + PATH, data=b'{"id": "exec_1"}') as response:
        assert response.status == 415
        assert "application/octet-stream" in (await response.json())["message"]


async def test_a_body_that_is_far_too_large_is_refused(
    session: aiohttp.ClientSession, emulator: KaizenEmulator
) -> None:
    """A body over a mebibyte gets a 413."""
    body, headers = io.BytesIO(b'{"id": "' + b"x" * 2**20), {"Content-Type": "application/json"}
    async with session.post(emulator.base_url + PATH, data=body, headers=headers) as response:
        assert response.status == 413


async def test_other_paths_and_methods_are_refused(session: aiohttp.ClientSession) -> None:
    """The emulator serves only POST requests to the API's paths below its prefix."""
    async with KaizenEmulator(path_prefix="/kaizen", default_life=Life.ended()) as emulator:
        assert emulator.base_url.endswith("/kaizen/")
        assert (await ask(session, emulator))[0] == 200
        async with session.get(emulator.base_url + PATH) as response:
            assert (response.status, response.headers["Allow"]) == (405, "POST")
        for path in (f"/{PATH}", "/kaizen", "/kaizen/instructor/executions", f"/kaizen/kaizen/{PATH}"):
            async with session.post(emulator.base_url.replace("/kaizen/", path), json={"id": "exec_1"}) as response:
                assert (response.status, await response.json()) == (404, {"message": f"there is no {path}"})


async def test_a_kind_may_wrap_its_record(
    session: aiohttp.ClientSession, emulator: KaizenEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line in the table of kinds adds a second kind with a wrapper."""

    def build(snapshot: Snapshot) -> dict[str, Any]:
        return {"id": snapshot.id, "attempts": 1}

    monkeypatch.setitem(SERVED, "/executions/get", ServedKind(build, wrap="execution"))
    emulator.add("exec_1", record={"attempts": 2})
    async with session.post(f"{emulator.base_url}executions/get", json={"id": "exec_1"}) as response:
        assert await response.json() == {"execution": {"id": "exec_1", "attempts": 2}}


async def test_a_rate_limit_allows_a_burst_and_then_its_rate(
    session: aiohttp.ClientSession, emulator: KaizenEmulator, clock: Clock
) -> None:
    """Requests above the bucket get a 429 with Retry-After until the clock has refilled it."""
    emulator.add("exec_1")
    emulator.rate_limit(rate=10, burst=2, retry_after=1.5)

    async def statuses(requests: int) -> list[int]:
        return [(await ask(session, emulator))[0] for _ in range(requests)]

    assert await statuses(3) == [200, 200, 429]
    clock.now += 0.125
    assert await statuses(2) == [200, 429]
    clock.now += 3600
    assert await statuses(3) == [200, 200, 429]
    async with session.post(emulator.base_url + PATH, json={"id": "exec_1"}) as response:
        assert response.headers["Retry-After"] == "1.5"
    emulator.rate_limit(rate=10, burst=1, retry_after=None)
    assert await statuses(1) == [200]
    async with session.post(emulator.base_url + PATH, json={"id": "exec_1"}) as response:
        assert (response.status, response.headers.get("Retry-After")) == (429, None)
    emulator.rate_limit(None)
    assert await statuses(3) == [200, 200, 200]


async def test_requests_are_counted(session: aiohttp.ClientSession, emulator: KaizenEmulator) -> None:
    """The emulator counts all requests by id and by status, also those without a response, and keeps the last ones."""
    emulator.add("exec_1")
    emulator.faults.next(Fault.disconnect(), id="exec_2")
    await ask(session, emulator, "exec_1")
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await ask(session, emulator, "exec_2")
    await ask(session, emulator, "exec_2")
    async with session.get(emulator.base_url):
        pass
    assert emulator.request_count == 4
    assert [emulator.requests_for(f"exec_{number}") for number in (1, 2, 3)] == [1, 2, 0]
    assert emulator.answers == {200: 1, 404: 2}
    assert [(request.id, request.status) for request in emulator.requests] == [
        ("exec_1", 200),
        ("exec_2", None),
        ("exec_2", 404),
        ("", 404),
    ]


async def test_requests_in_flight_and_connections_are_counted(
    session: aiohttp.ClientSession, emulator: KaizenEmulator
) -> None:
    """`max_in_flight` keeps the peak, and `open_connections` falls as clients close their connections."""
    emulator.faults.always(Fault.hang())
    lookups = [asyncio.create_task(ask(session, emulator)) for _ in range(7)]
    await arrived(emulator, 7)
    assert (emulator.max_in_flight, emulator.open_connections) == (7, 7)
    with pytest.raises(TimeoutError, match=r"after 0\.0 seconds 7 connections are open, 7 requests in progress"):
        await emulator.until_quiet(within=0.0)
    for lookup in lookups:
        lookup.cancel()
    await asyncio.wait(lookups)
    await emulator.until_quiet()
    emulator.faults.clear()
    await ask(session, emulator)
    assert (emulator.max_in_flight, emulator.open_connections) == (7, 1)


async def test_an_execution_costs_little_memory() -> None:
    """An execution and its counters take less than 350 bytes."""
    emulator = KaizenEmulator(default_life=Life.ended())
    ids = [f"exec_{number:05}" for number in range(10_000)]
    tracemalloc.start()
    try:
        for execution_id in ids:
            emulator._history.by_id[execution_id] = 1
            emulator._begin_default_life(execution_id)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held / len(ids) < 350


async def test_a_restart_keeps_the_port_and_the_lives(
    session: aiohttp.ClientSession, emulator: KaizenEmulator, clock: Clock
) -> None:
    """A stopped emulator refuses connections. After a restart it uses the same port, and lives have continued."""
    emulator.add("exec_1", Life.lasting(10))
    url = emulator.base_url
    assert (await ask(session, emulator))[1]["status"] == "Enqueued"
    await emulator.stop()
    await emulator.stop()
    assert emulator.open_connections == 0
    with pytest.raises(aiohttp.ClientConnectorError):
        await ask(session, emulator)
    clock.now += 10
    await emulator.start()
    assert emulator.base_url == url
    assert (await ask(session, emulator))[1]["status"] == "Completed"
    assert emulator.requests_for("exec_1") == 2


async def test_the_port_is_held_while_stopped() -> None:
    """No other process can take the port between `stop` and `start`. After the block it is free."""
    async with KaizenEmulator() as emulator:
        address = address_of(emulator)
        await emulator.stop()
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(address)
    with socket.socket() as other:
        other.bind(address)


async def test_a_dropped_emulator_frees_its_port() -> None:
    """A stopped emulator that is dropped leaves no socket and no warning behind."""
    emulator = KaizenEmulator()
    await emulator.start()
    address = address_of(emulator)
    await emulator.stop()
    del emulator
    gc.collect()
    with socket.socket() as other:
        other.bind(address)


async def test_stop_ends_every_request_at_once(session: aiohttp.ClientSession, emulator: KaizenEmulator) -> None:
    """`stop` closes the connections of hanging, stalled, slow and waiting requests and leaves no task."""
    emulator.add("exec_1")
    before = asyncio.all_tasks()
    for fault in (Fault.hang(), Fault.stalled_body(), Fault.trickle(9), Fault.latency(99)):
        emulator.faults.next(fault)
    lookups = [asyncio.create_task(ask(session, emulator)) for _ in range(4)]
    await arrived(emulator, 4)
    await emulator.stop()
    assert emulator.open_connections == 0
    results = await asyncio.gather(*lookups, return_exceptions=True)
    assert {type(result) for result in results} <= {aiohttp.ServerDisconnectedError, aiohttp.ClientPayloadError}
    assert asyncio.all_tasks() == before
    assert emulator.answers.total() == 0


async def test_stop_closes_connections_that_are_just_being_made(emulator: KaizenEmulator) -> None:
    """`stop` also closes a connection that the loop has accepted but not yet handed over."""
    address = address_of(emulator)
    for turns in range(6):
        with socket.create_connection(address) as client:
            for _ in range(turns):
                await asyncio.sleep(0)
            await emulator.stop()
            client.settimeout(5)
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b""
        await emulator.start()


async def test_a_client_that_sends_half_a_request_and_goes_is_forgotten(emulator: KaizenEmulator) -> None:
    """A request whose body never arrives leaves nothing behind and logs no error."""
    _, writer = await asyncio.open_connection(*address_of(emulator))
    writer.write(REQUEST[:-1])
    await arrived(emulator, 1)
    writer.close()
    await writer.wait_closed()
    await emulator.until_quiet()
    assert [(request.id, request.status) for request in emulator.requests] == [("", None)]


async def test_starting_twice_is_refused(emulator: KaizenEmulator) -> None:
    """A running emulator refuses a second start."""
    with pytest.raises(RuntimeError, match="running already"):
        await emulator.start()


async def test_a_port_that_is_taken_is_reported() -> None:
    """Both ways of starting raise the system's error for a taken port and leave nothing running."""
    threads = threading.active_count()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        emulator = KaizenEmulator(port=port)
        with pytest.raises(OSError, match="in use"):
            await emulator.start()
        with pytest.raises(OSError, match="in use"), emulator:
            pass
    assert threading.active_count() == threads
    async with emulator:
        assert emulator.base_url == f"http://127.0.0.1:{port}/"


async def test_stopping_what_never_served_does_nothing() -> None:
    """Stopping an emulator that never started does nothing."""
    emulator = KaizenEmulator()
    await emulator.stop()
    await emulator.__aexit__(None, None, None)
    assert emulator.open_connections == 0


async def test_a_stop_that_is_cancelled_is_carried_through(
    session: aiohttp.ClientSession, emulator: KaizenEmulator
) -> None:
    """A cancelled `stop` still closes the port and the connections."""
    emulator.faults.always(Fault.hang())
    lookup = asyncio.create_task(ask(session, emulator))
    await arrived(emulator, 1)
    stopping = asyncio.create_task(emulator.stop())
    await asyncio.sleep(0)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await lookup
    with pytest.raises(aiohttp.ClientConnectorError):
        await ask(session, emulator)


async def test_it_serves_ipv6_too(session: aiohttp.ClientSession) -> None:
    """The emulator listens on an IPv6 address and writes it in brackets."""
    async with KaizenEmulator(host="::1", default_life=Life.ended()) as emulator:
        assert emulator.base_url.startswith("http://[::1]:")
        assert (await ask(session, emulator))[0] == 200


def test_without_a_port_there_is_no_url() -> None:
    """Before the first start, only an emulator with a given port has a URL."""
    assert KaizenEmulator(port=8765).base_url == "http://127.0.0.1:8765/"
    with pytest.raises(RuntimeError, match="start it"):
        _ = KaizenEmulator().base_url


def test_stopping_from_another_loop_is_refused() -> None:
    """An emulator refuses to be stopped from another event loop."""

    async def main() -> None:
        async with KaizenEmulator() as emulator:
            with pytest.raises(RuntimeError, match="another event loop"):
                await asyncio.to_thread(asyncio.run, emulator.stop())

    asyncio.run(main())


def test_in_a_thread_of_its_own_it_serves_any_loop() -> None:
    """In a `with` block, the emulator serves several loops in turn and blocking code, and each can restart it."""

    async def look_up(emulator: KaizenEmulator) -> int:
        async with aiohttp.ClientSession() as session:
            return (await ask(session, emulator))[0]

    async def restart_and_look_up(emulator: KaizenEmulator) -> int:
        await emulator.stop()
        await emulator.start()
        return await look_up(emulator)

    threads = threading.active_count()
    with KaizenEmulator() as emulator:
        assert asyncio.run(look_up(emulator)) == 404
        emulator.add("exec_1")
        assert asyncio.run(look_up(emulator)) == 200
        emulator.faults.next(Fault.status(418))
        assert asyncio.run(restart_and_look_up(emulator)) == 418
        asyncio.run(emulator.until_quiet())
        subprocess.run([sys.executable, "-c", BLOCKING_LOOK_UP, emulator.base_url + PATH], check=True)  # noqa: S603 - ours
        asyncio.run(emulator.stop())
    assert threading.active_count() == threads
    assert emulator.answers == {404: 1, 200: 2, 418: 1}


def test_a_thread_is_ended_even_if_the_test_in_it_fails() -> None:
    """An error in the block is raised unchanged and ends the emulator's thread, even with hanging requests."""

    def fail() -> None:
        with KaizenEmulator() as emulator, socket.create_connection(address_of(emulator)) as client:
            emulator.faults.always(Fault.hang())
            client.sendall(REQUEST)
            asyncio.run(arrived(emulator, 1))
            raise LookupError

    threads = threading.active_count()
    with pytest.raises(LookupError):
        fail()
    assert threading.active_count() == threads


MISUSES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "empty key": (lambda: KaizenEmulator(api_key=""), ValueError, "api_key must not be empty"),
    "key in bytes": (lambda: KaizenEmulator(api_key=b"k"), TypeError, "api_key must be str"),
    "no life": (lambda: KaizenEmulator(default_life="Completed"), TypeError, "a Life or a function"),
    "prefix": (lambda: KaizenEmulator(path_prefix="kaizen/"), ValueError, 'like "/kaizen"'),
    "naive epoch": (lambda: KaizenEmulator(epoch=NEW_YEAR.replace(tzinfo=None)), ValueError, "time zone"),
    "unknown setting": (lambda: KaizenEmulator(prot=1), TypeError, "prot"),
    "empty id": (lambda: KaizenEmulator().add(""), ValueError, "must not be empty"),
    "number as id": (lambda: KaizenEmulator().add(5), TypeError, "an id must be str"),
    "status as life": (lambda: KaizenEmulator().add("e", "Completed"), TypeError, "make one such as"),
    "text as body": (lambda: KaizenEmulator().add("e", body="{}"), TypeError, "encode it first"),
    "name as list": (lambda: KaizenEmulator().add("e", without="logins"), TypeError, r"without=\['logins'\]"),
    "no json": (lambda: KaizenEmulator().add("e", record={"x": object()}), TypeError, "does not fit into JSON"),
    "one id as many": (lambda: KaizenEmulator().add_many("exec_1"), TypeError, "takes many ids"),
    "no rate": (lambda: KaizenEmulator().rate_limit(0), ValueError, r"rate_limit\(None\) lifts"),
    "no burst": (lambda: KaizenEmulator().rate_limit(5, burst=0), ValueError, "nothing would ever pass"),
    "half a burst": (lambda: KaizenEmulator().rate_limit(5, burst=1.5), TypeError, "burst must be int"),
    "negative wait": (lambda: KaizenEmulator().rate_limit(5, retry_after=-1), ValueError, "retry_after must be"),
}


@pytest.mark.parametrize(("make", "error", "advice"), MISUSES.values(), ids=MISUSES)
def test_misuse_is_refused_with_advice(make: Callable[[], Any], error: type[Exception], advice: str) -> None:
    """Invalid arguments raise an error that says what to do."""
    with pytest.raises(error, match=advice):
        make()


async def test_without_an_epoch_records_begin_now(session: aiohttp.ClientSession) -> None:
    """By default the records have the present time."""
    before = datetime.now(UTC)
    async with KaizenEmulator(default_life=Life.running()) as emulator:
        started = datetime.fromisoformat((await ask(session, emulator))[1]["startTime"])
    assert before - timedelta(seconds=1) < started < datetime.now(UTC) + timedelta(seconds=1)
