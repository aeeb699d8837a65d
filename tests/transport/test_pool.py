"""Connections are opened early, kept for a while, and replaced. Names resolve to addresses."""

import asyncio
import logging
import math
import socket
import threading
from typing import Any
from unittest import mock

import pytest
from scripted_server import LOOPS, SILENCE, ScriptedServer, client_for, ok, run_on

from kaizen_async import ClientClosedError, ConnectionPolicy, DeadlineExceededError, TransportError
from kaizen_async._transport import resolver
from kaizen_async._transport.connection import Connection
from kaizen_async._transport.resolver import ThreadResolver, is_loopback, resolves_to_this_machine
from kaizen_async.clock import RunningTimeout, RunningTimer, Sweep, SystemClock

ADDRESS = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80))]


@pytest.mark.parametrize("loop", LOOPS)
def test_connections_are_open_before_they_are_needed(loop: str) -> None:
    """`warm_up` opens only missing connections, and a burst of lookups uses them."""

    async def scenario() -> None:
        async with ScriptedServer(lambda request: [ok(request)]) as server, client_for(server) as client:
            await client.warm_up(3)
            await client.warm_up(2)
            await server.until(lambda: server.connections == 3)
            outcomes = await client.instructor_executions.get_many(["a", "b", "c"])
            assert all(outcome.ok for outcome in outcomes)
            assert server.connections == 3

    run_on(loop, scenario())


async def test_a_server_that_is_down_cannot_be_warmed_up() -> None:
    """`warm_up` raises a TransportError if the server is down, and does not retry."""
    async with ScriptedServer(lambda request: [ok(request)]) as server:
        client = client_for(server)
    async with client:
        with pytest.raises(TransportError):
            await client.warm_up(2)


async def test_an_old_connection_is_replaced() -> None:
    """The client replaces a connection after connection_max_age, so that it follows changes of DNS."""
    async with ScriptedServer(lambda request: [ok(request)]) as server:
        async with client_for(server, connection_max_age=0.02) as client:
            await client.instructor_executions.get("a")
            await asyncio.sleep(0.03)
            await client.instructor_executions.get("b")
            assert server.connections == 2


async def test_idle_connections_are_closed() -> None:
    """The client closes each idle connection after idle_seconds, without further requests."""
    async with ScriptedServer(lambda request: [ok(request)]) as server:
        async with client_for(server, connections=ConnectionPolicy(idle_seconds=0.05)) as client:
            await client.warm_up(2)
            await asyncio.sleep(0.03)
            await client.instructor_executions.get("a")
            pool = client._binding.engine.transport._pool
            (address,) = pool._addresses.values()
            await server.until(lambda: not address.idle and not address.capacity.open)


async def test_a_name_resolves_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name resolves in a thread, and an error of the system's resolver is raised in the caller."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: ADDRESS)
    (found,) = await ThreadResolver().resolve("some.host", 80)
    assert (found["host"], found["port"], found["hostname"]) == ("127.0.0.1", 80, "some.host")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: (_ for _ in ()).throw(socket.gaierror(-2)))
    with pytest.raises(socket.gaierror):
        await ThreadResolver().resolve("some.host", 80)
    await ThreadResolver().close()


async def test_a_late_resolver_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resolver that returns after its caller was cancelled or its loop was closed raises nothing."""
    goes_on = threading.Event()
    threads: list[Any] = []

    def slow(*_args: Any, **_options: Any) -> Any:
        threads.append(threading.current_thread())
        goes_on.wait(10)
        return ADDRESS

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(ThreadResolver().resolve("some.host", 80), 0.01)

    def in_a_loop_that_ends() -> None:
        with pytest.raises(TimeoutError):
            asyncio.run(asyncio.wait_for(ThreadResolver().resolve("some.host", 80), 0.01))

    await asyncio.to_thread(in_a_loop_that_ends)
    goes_on.set()
    for thread in threads:
        await asyncio.to_thread(thread.join)


@pytest.mark.parametrize(
    ("addresses", "is_here"),
    [(["127.0.0.1", "127.9.9.9"], True), (["127.0.0.1", "192.0.2.1"], False), ([], False)],
)
def test_a_name_is_this_machine_if_all_its_addresses_are(
    addresses: list[str], *, is_here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name counts as local only if it resolves and all its addresses are local."""

    def found(*_args: Any, **_options: Any) -> Any:
        if not addresses:
            raise socket.gaierror(-2)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]

    monkeypatch.setattr(resolver.socket, "getaddrinfo", found)
    assert resolves_to_this_machine("some.host") is is_here


def test_loopback_addresses_have_many_spellings() -> None:
    """Loopback includes 127.0.0.0/8, ::1 with a scope, and IPv4 addresses mapped to IPv6."""
    assert all(map(is_loopback, ["127.0.0.1", "127.255.0.9", "::1", "::1%lo", "::ffff:127.0.0.1"]))
    assert not any(map(is_loopback, ["192.0.2.1", "::2", "::ffff:192.0.2.1", "localhost"]))


async def test_a_lookup_that_crashes_gives_back_its_slot_and_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lookup that crashes frees its slot and its connection, also in the fast first attempt."""
    async with ScriptedServer(lambda request: [ok(request)]) as server:
        async with client_for(server, concurrency=1) as client:
            await client.instructor_executions.get("a")
            with monkeypatch.context() as patch:
                patch.setattr(client._binding._received, "put", mock.Mock(side_effect=RuntimeError("a defect")))
                with pytest.raises(RuntimeError, match="a defect"):
                    await client.instructor_executions.get("b")
            stats = client.stats()
            assert (stats.in_flight, stats.in_progress, stats.failed) == (0, 0, 1)
            assert (await client.instructor_executions.get("c")).id == "c"
            assert server.connections == 2


async def test_a_request_in_the_moment_of_closing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A close ends a request whose first response bytes arrive in the same loop step."""
    half = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;x\r\n"
    received = Connection.buffer_updated

    def receive_and_cut(connection: Connection, size: int) -> None:
        received(connection, size)
        client._binding.engine._cut()

    async with ScriptedServer(lambda request: [ok(request)] if request.id == "a" else [half, SILENCE]) as server:
        async with client_for(server, attempt_timeout=25, deadline=None) as client:
            await client.instructor_executions.get("a")
            monkeypatch.setattr(Connection, "buffer_updated", receive_and_cut)
            lookup = asyncio.create_task(client.instructor_executions.get("b"))
            await asyncio.wait({lookup}, timeout=5)
            assert isinstance(lookup.exception(), DeadlineExceededError | ClientClosedError)


@pytest.mark.parametrize("seconds", [0.1, 0.0])
async def test_a_short_timeout_sets_its_own_timer(seconds: float) -> None:
    """A timeout that ends before the next sweep sets its own timer."""
    clock = SystemClock()
    sweep = Sweep(clock, clock.time, 400.0, lambda late: None)
    async with asyncio.timeout(5):
        with pytest.raises(TimeoutError), RunningTimeout(clock, seconds, math.inf, sweep):
            await asyncio.sleep(60)
    sweep.stop()


async def test_a_timer_that_is_due_has_nothing_left() -> None:
    """A timer that is due has no time left, also before its callback has run."""
    clock = SystemClock()
    called = asyncio.Event()
    timer = RunningTimer(clock, 0.01, math.inf, called.set)
    await called.wait()
    assert -0.001 < timer.left <= 0


async def test_a_logger_that_raises_leaves_slots_and_connections_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    """If a logging filter raises, the lookup fails with that error and frees its slot and connection once."""

    def refuse(record: logging.LogRecord) -> bool:
        raise RuntimeError("a filter of the user's")

    log = logging.getLogger("kaizen_async")
    caplog.set_level(logging.DEBUG, "kaizen_async")
    async with ScriptedServer(lambda request: [ok(request)]) as server:
        async with client_for(server, concurrency=2) as client:
            await client.instructor_executions.get("a")
            log.addFilter(refuse)
            try:
                for _ in range(2):
                    with pytest.raises(RuntimeError, match="of the user's"):
                        await client.instructor_executions.get("b")
            finally:
                log.removeFilter(refuse)
            (address,) = client._binding.engine.transport._pool._addresses.values()
            assert client._binding.engine._free_slots == 2
            assert address.capacity.open == len(address.idle)
            assert client.stats().failed == 2
