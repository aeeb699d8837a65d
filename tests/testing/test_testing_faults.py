"""The effect of each fault on a client, on both event loops, and the choice of the requests that meet a fault."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest
import uvloop
from aiohttp import web

from kaizen_async.testing import Answer, Exchange, Fault, FaultPlan, KaizenEmulator, Life

PATH = "instructor/executions/get"
Sight = tuple[int, bytes]
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


async def ask(session: aiohttp.ClientSession, emulator: KaizenEmulator, execution_id: str = "exec_1") -> Sight:
    """Look an execution up, and return the status and the body."""
    async with session.post(emulator.base_url + PATH, json={"id": execution_id}) as response:
        return response.status, await response.read()


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Callable[[Awaitable[None]], None]:
    """Return a function that runs a coroutine on one of the event loops in debug mode."""

    def run_on_loop(main: Awaitable[None]) -> None:
        with asyncio.Runner(debug=True, loop_factory=LOOPS[request.param]) as runner:
            runner.run(main)

    return run_on_loop


async def sight_of(fault: Fault) -> aiohttp.ClientResponse | Sight | BaseException:
    """Return the response or error of a client that meets a fault once. The next lookup must succeed."""
    async with KaizenEmulator(default_life=Life.ended()) as emulator:
        emulator.faults.next(fault)
        async with aiohttp.ClientSession() as session:
            seen = (await asyncio.gather(ask(session, emulator), return_exceptions=True))[0]
            assert (await ask(session, emulator))[0] == 200
        await emulator.until_quiet()
        assert emulator.request_count == 2
        assert emulator.requests_for("exec_1") == 2
        return seen


@pytest.mark.parametrize(
    ("fault", "status", "content_type", "body"),
    [
        (Fault.status(503), 503, "application/json", b'{"message": "Service Unavailable"}'),
        (Fault.status(299), 299, "application/json", b'{"message": "Status 299"}'),
        (Fault.status(500, body=b""), 500, "application/octet-stream", b""),
        (Fault.status(418, body=b"tea", headers={"Content-Type": "text/tea"}), 418, "text/tea", b"tea"),
        (Fault.body(b"\xff"), 200, "application/json", b"\xff"),
    ],
    ids=lambda value: value.name if isinstance(value, Fault) else "",
)
async def test_any_status_and_body_can_be_served(fault: Fault, status: int, content_type: str, body: bytes) -> None:
    """The client receives exactly the status, type and body of the fault."""
    async with KaizenEmulator() as emulator, aiohttp.ClientSession() as session:
        emulator.faults.next(fault)
        async with session.post(emulator.base_url + PATH, json={"id": "exec_1"}) as response:
            assert (response.status, response.content_type, await response.read()) == (status, content_type, body)
        assert emulator.answers == {status: 1}


async def test_headers_of_a_status_are_sent() -> None:
    """The headers of a fault are sent, also with the default body."""
    async with KaizenEmulator() as emulator, aiohttp.ClientSession() as session:
        emulator.faults.next(Fault.status(503, headers={"Retry-After": "1"}))
        async with session.post(emulator.base_url + PATH, json={"id": "exec_1"}) as response:
            assert response.headers["Retry-After"] == "1"
            assert response.content_type == "application/json"


async def test_a_gateway_page_is_html() -> None:
    """The 502 fault of a gateway is an HTML page."""
    async with KaizenEmulator() as emulator, aiohttp.ClientSession() as session:
        emulator.faults.next(Fault.html_502())
        async with session.post(emulator.base_url + PATH, json={"id": "exec_1"}) as response:
            assert (response.status, response.content_type) == (502, "text/html")
            assert "<h1>502 Bad Gateway</h1>" in await response.text()


async def test_a_malformed_body_is_complete_http() -> None:
    """A malformed body is a complete HTTP response with truncated JSON."""
    seen = await sight_of(Fault.malformed_body())
    assert isinstance(seen, tuple)
    assert seen[0] == 200
    assert seen[1].startswith(b'{"id":"exec_1"')
    assert not seen[1].endswith(b"}")


@pytest.mark.parametrize(
    ("fault", "errors"),
    [
        (Fault.reset(), (aiohttp.ClientOSError,)),
        # On a connection that closes at once, uvloop fails to write the request before it sees the end.
        (Fault.disconnect(), (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError)),
        (Fault.truncated_body(), (aiohttp.ClientPayloadError,)),
        (Fault.reset_mid_body(), (aiohttp.ClientPayloadError,)),
        (Fault.raw(b"HTTP/1.1 200 OK\r\nContent-Le"), (aiohttp.ServerDisconnectedError,)),
        (Fault.raw(b"HTTP/1.1 200 OK\r\n", then="reset"), (aiohttp.ClientOSError,)),
        (Fault.raw(b"NOT HTTP\r\n\r\n"), (aiohttp.ClientResponseError,)),
    ],
    ids=lambda value: value.name if isinstance(value, Fault) else "",
)
def test_a_broken_connection_is_seen_as_such(
    run: Callable[[Awaitable[None]], None], fault: Fault, errors: tuple[type[Exception], ...]
) -> None:
    """The client raises the error of a real broken connection, and nothing stays open."""

    async def main() -> None:
        assert isinstance(await sight_of(fault), errors)

    run(main())


def test_reset_and_disconnect_differ_on_the_socket(run: Callable[[Awaitable[None]], None]) -> None:
    """A reset sends a real RST, and a disconnect ends the connection in order."""

    async def main() -> None:
        async with KaizenEmulator() as emulator:
            host, port = emulator.base_url.rstrip("/").removeprefix("http://").split(":")
            request = f"POST /{PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            request += 'Content-Length: 11\r\n\r\n{"id": "e"}'
            for fault, reset in ((Fault.reset(), True), (Fault.disconnect(), False)):
                emulator.faults.next(fault)
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(request.encode())
                error = writer.get_extra_info("socket").getsockopt
                if reset:
                    with pytest.raises(ConnectionResetError):
                        await reader.read()
                else:
                    assert await reader.read() == b""
                    assert error(socket.SOL_SOCKET, socket.SO_ERROR) == 0
                writer.close()
            await emulator.until_quiet()

    run(main())


@pytest.mark.parametrize(
    "fault",
    [
        Fault.hang(),
        Fault.stalled_body(),
        Fault.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", 0.0, b"5\r\nab", then="hang"),
    ],
    ids=lambda fault: fault.name,
)
def test_silence_lasts_until_the_client_goes(run: Callable[[Awaitable[None]], None], fault: Fault) -> None:
    """A silent request ends when the client gives up."""

    async def main() -> None:
        async with KaizenEmulator(default_life=Life.ended()) as emulator:
            emulator.faults.always(fault)
            timeout = aiohttp.ClientTimeout(sock_read=0.05)
            async with aiohttp.ClientSession(timeout=timeout) as session:
                with pytest.raises(aiohttp.SocketTimeoutError):
                    await ask(session, emulator)
                await emulator.until_quiet()
            assert [(request.id, request.status) for request in emulator.requests] == [("exec_1", None)]
            assert not emulator.answers

    run(main())


@pytest.mark.parametrize("fault", [Fault.hang(), Fault.stalled_body(), Fault.latency(99), Fault.trickle(9)])
def test_silence_ends_with_the_emulator(run: Callable[[Awaitable[None]], None], fault: Fault) -> None:
    """Stopping the emulator ends silent requests and leaves neither a task nor a connection."""

    async def main() -> None:
        before = asyncio.all_tasks()
        async with aiohttp.ClientSession() as session:
            async with KaizenEmulator(default_life=Life.ended()) as emulator:
                emulator.faults.always(fault)
                lookups = [asyncio.create_task(ask(session, emulator)) for _ in range(3)]
                while emulator.request_count < 3:  # noqa: ASYNC110 - the emulator has no event to await
                    await asyncio.sleep(0)
            assert emulator.open_connections == 0
            seen = await asyncio.gather(*lookups, return_exceptions=True)
            assert {type(each) for each in seen} <= {
                *(aiohttp.ServerDisconnectedError, aiohttp.ClientPayloadError, aiohttp.ClientOSError)
            }
        assert asyncio.all_tasks() == before

    run(main())


async def test_a_trickled_body_comes_whole_and_slowly() -> None:
    """A trickled body takes the given seconds per byte and is complete."""
    async with KaizenEmulator() as emulator, aiohttp.ClientSession() as session:
        emulator.add("exec_1", body=b"0123456789")
        emulator.faults.next(Fault.trickle(0.005))
        began = asyncio.get_running_loop().time()
        assert await ask(session, emulator) == (200, b"0123456789")
        assert asyncio.get_running_loop().time() - began >= 0.05
        assert emulator.answers == {200: 1}


async def test_latencies_add_up_before_the_response() -> None:
    """Two latencies add up, and the response is that of the later moment."""
    async with KaizenEmulator(default_life=Life.of(("Enqueued", 0), ("Completed", 0.05))) as emulator:
        emulator.faults.always(Fault.latency(0.03))
        emulator.faults.next(Fault.latency(0.03))
        async with aiohttp.ClientSession() as session:
            began = asyncio.get_running_loop().time()
            assert b"Completed" in (await ask(session, emulator))[1]
            assert asyncio.get_running_loop().time() - began >= 0.06


async def test_latency_comes_before_a_fault_with_a_response() -> None:
    """A latency comes before another fault, in whichever order they were added."""
    async with KaizenEmulator() as emulator, aiohttp.ClientSession() as session:
        emulator.faults.next(Fault.status(503))
        emulator.faults.always(Fault.latency(0.03))
        began = asyncio.get_running_loop().time()
        assert (await ask(session, emulator))[0] == 503
        assert asyncio.get_running_loop().time() - began >= 0.03


async def test_a_custom_fault_is_a_coroutine_function() -> None:
    """A custom fault gets the request, the id and the ordinary response, and may return a response or None."""
    seen = []

    async def shout(exchange: Exchange) -> web.StreamResponse | None:
        seen.append((exchange.id, exchange.request.method))
        ordinary = exchange.ordinary()
        return Answer(ordinary.status, ordinary.body.upper()).response() if exchange.id == "loud" else None

    async with KaizenEmulator() as emulator, aiohttp.ClientSession() as session:
        emulator.add("loud", body=b"hi")
        emulator.add("quiet", body=b"hi")
        emulator.faults.always(Fault("shout", shout))
        assert [await ask(session, emulator, name) for name in ("loud", "quiet")] == [(200, b"HI"), (200, b"hi")]
    assert seen == [("loud", "POST"), ("quiet", "POST")]


async def test_a_connection_that_is_lost_under_a_fault_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """A fault that writes to a closed connection raises nothing and logs nothing."""

    async def too_late(exchange: Exchange) -> web.StreamResponse:
        exchange.transport.abort()
        return await exchange.begin(exchange.ordinary())

    assert isinstance(await sight_of(Fault("too late", too_late)), aiohttp.ServerDisconnectedError)
    assert not [record for record in caplog.records if record.name != "asyncio"], "asyncio reports slow steps"


async def test_a_pause_in_raw_bytes_is_waited_out() -> None:
    """Pieces before and after a pause form one response."""
    pieces = (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nab", 0.02, b"cd")
    began = asyncio.get_running_loop().time()
    assert await sight_of(Fault.raw(*pieces)) == (200, b"abcd")
    assert asyncio.get_running_loop().time() - began >= 0.02


def names(plan: FaultPlan, execution_id: str, number: int = 1) -> list[str]:
    """Return the names of the faults that a request meets."""
    return [fault.name for fault in plan.due(execution_id, number)]


A, B, C = Fault.status(500), Fault.status(501), Fault.status(502)
SLOW = Fault.latency(1)


def test_next_faults_are_met_in_turn() -> None:
    """Each request takes one fault of the queue, first from the queue of its id."""
    plan = FaultPlan()
    plan.next(A, times=2)
    plan.next(B)
    plan.next(C, id="exec_1")
    met = [names(plan, execution_id) for execution_id in ("exec_1", "exec_2", "exec_1", "exec_2", "exec_1")]
    assert met == [["status(502)"], ["status(500)"], ["status(500)"], ["status(501)"], []]


def test_delays_come_first_then_next_then_chance_then_always() -> None:
    """Faults apply in a fixed order, whatever the order in which they were added."""
    plan = FaultPlan()
    plan.always(A)
    plan.chance(B, 1.0)
    plan.next(C)
    plan.always(SLOW)
    assert names(plan, "exec_1") == ["latency(1)", "status(502)", "status(501)", "status(500)"]
    assert names(plan, "exec_1") == ["latency(1)", "status(501)", "status(500)"]


def test_faults_of_an_id_are_met_by_no_other() -> None:
    """The argument `id` limits every kind of rule to that id."""
    plan = FaultPlan()
    plan.next(A, id="exec_1")
    plan.always(B, id="exec_1")
    plan.chance(C, 1.0, id="exec_1")
    assert names(plan, "exec_2") == []
    assert len(names(plan, "exec_1")) == 3


def test_clear_forgets_everything() -> None:
    """After `clear`, no request meets a fault."""
    plan = FaultPlan()
    for lay in (plan.next, plan.always):
        lay(A)
    plan.chance(A, 1.0)
    plan.clear()
    assert names(plan, "exec_1") == []


def test_chance_hits_its_share() -> None:
    """Each rule affects about its share of ten thousand requests, independently of other rules."""
    plan = FaultPlan(seed=1)
    plan.chance(A, 0.05)
    plan.chance(B, 0.05)
    met = [names(plan, f"exec_{number}") for number in range(10_000)]
    hits = [sum(name in each for each in met) for name in ("status(500)", "status(501)")]
    assert all(430 < hit < 570 for hit in hits)
    assert sum(len(each) == 2 for each in met) < 60


def test_chance_of_zero_never_hits() -> None:
    """A probability of 0 has no effect."""
    plan = FaultPlan()
    plan.chance(A, 0)
    assert not any(names(plan, f"exec_{number}") for number in range(1000))


async def test_random_faults_do_not_depend_on_the_order_of_arrival() -> None:
    """The same seed gives the same faults for the same requests, however they overlap."""
    ids = [f"exec_{number % 8}" for number in range(32)]

    async def hits(seed: int, order: list[str], at_once: int) -> dict[str, list[int]]:
        async with KaizenEmulator(seed=seed, default_life=Life.ended()) as emulator:
            emulator.faults.chance(Fault.status(503), 0.5)
            gate = asyncio.Semaphore(at_once)
            seen: dict[str, list[int]] = {}

            async def look_up(execution_id: str) -> None:
                async with gate:
                    seen.setdefault(execution_id, []).append((await ask(session, emulator, execution_id))[0])

            async with aiohttp.ClientSession() as session:
                await asyncio.gather(*(look_up(execution_id) for execution_id in order))
            return {execution_id: sorted(statuses) for execution_id, statuses in seen.items()}

    first = await hits(1, ids, at_once=1)
    assert first == await hits(1, sorted(ids, reverse=True), at_once=16)
    assert first != await hits(2, ids, at_once=1)


MISUSES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "status as text": (lambda: Fault.status("503"), TypeError, "status must be int"),
    "truth as status": (lambda: Fault.status(True), TypeError, "status must be int"),
    "status too low": (lambda: Fault.status(100), ValueError, "from 200 to 599, not 100; Fault.raw"),
    "text as body": (lambda: Fault.status(500, body="no"), TypeError, "body must be bytes"),
    "text as whole body": (lambda: Fault.body("{}"), TypeError, "encode it first"),
    "negative latency": (lambda: Fault.latency(-1), ValueError, "seconds must be from 0"),
    "slow for ever": (lambda: Fault.trickle(float("inf")), ValueError, "seconds_per_byte must be from 0"),
    "text in raw": (lambda: Fault.raw("HTTP/1.1"), TypeError, "a pause between pieces of bytes must be a number"),
    "unknown end": (lambda: Fault.raw(then="explode"), ValueError, '"close", "reset" or "hang"'),
    "no fault": (lambda: FaultPlan().next(503), TypeError, r"such as Fault.status\(503\)"),
    "class": (lambda: FaultPlan().always(Fault.hang), TypeError, "fault must be Fault"),
    "no request": (lambda: FaultPlan().next(A, times=0), ValueError, "times must be from 1"),
    "half a request": (lambda: FaultPlan().next(A, times=0.5), TypeError, "times must be int"),
    "per cent": (lambda: FaultPlan().chance(A, 5), ValueError, "5 % is 0.05"),
    "chance as text": (lambda: FaultPlan().chance(A, "0.05"), TypeError, "probability must be a number"),
    "empty id": (lambda: FaultPlan().next(A, id=""), ValueError, "an id must not be empty"),
    "long id": (lambda: FaultPlan().next(A, id="x" * 10_000), ValueError, "an id must have at most"),
    "no function": (lambda: Fault("mine", play=5), TypeError, "play must be a coroutine function"),
    "no clock": (lambda: FaultPlan().between(A, 0, 1), RuntimeError, "use emulator.faults"),
    "number as id": (lambda: FaultPlan().always(A, id=5), TypeError, "an id must be str"),
}


@pytest.mark.parametrize(("make", "error", "advice"), MISUSES.values(), ids=MISUSES)
def test_misuse_is_refused_with_advice(make: Callable[[], Any], error: type[Exception], advice: str) -> None:
    """Invalid arguments raise an error that says what to do."""
    with pytest.raises(error, match=advice):
        make()


def test_a_fault_shows_what_it_is() -> None:
    """The repr of a fault has its constructor and arguments."""
    assert repr(Fault.latency(0.5)) == "Fault(name='latency(0.5)', delays=True)"
    assert Fault.raw(b"HTTP/1.1 ", 0.5, then="reset").name == "raw(b'HTTP/1.1 ', 0.5, then='reset')"
