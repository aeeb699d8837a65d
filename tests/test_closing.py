"""Closing a client ends every call in flight with a result or a ClientClosedError, and never by cancelling its task."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
from callers import CALLERS, Caller, call_get, call_stream, caught
from scripted_server import (
    CLOSE,
    LOOPS,
    SILENCE,
    Play,
    Request,
    Script,
    ScriptedServer,
    assert_idle,
    client_for,
    ok,
    outcome_of_get,
    reach,
    record,
    response,
    run_on,
    settle,
)

from kaizen_async import (
    AttemptTimeoutError,
    AuthenticationError,
    ClientClosedError,
    DeadlineExceededError,
    KaizenClient,
    KaizenError,
    RetryPolicy,
)
from kaizen_async.testing import KaizenEmulator, Life

pytestmark = pytest.mark.no_cover
"""Other tests cover the same code, and measuring coverage would take most of the time of this one."""

everywhere = pytest.mark.parametrize("loop", LOOPS)

IDS = ["a", "b", "c", "d"]

Results = list[Any]

every_caller = pytest.mark.parametrize("caller", CALLERS.values(), ids=CALLERS)


class State(NamedTuple):
    """A state in which a call may wait, and a function that says whether the call has reached it."""

    play: Play
    reached: Callable[[KaizenClient, ScriptedServer], bool]
    settings: Mapping[str, Any] = {}
    accept: Callable[[int], Script] = lambda _: ()


def all_in_flight(client: KaizenClient, server: ScriptedServer) -> bool:
    """Return whether all ids have a request in flight that the server has received."""
    return client.stats().in_flight == len(server.asked) == len(IDS)


STATES = {
    "the headers": State(lambda _: [SILENCE], all_in_flight),
    "the body": State(lambda request: [ok(request)[:-5], SILENCE], all_in_flight),
    "a slot": State(
        lambda _: [SILENCE],
        lambda client, server: client.stats().in_flight == len(server.asked) == 1,
        {"concurrency": 1},
    ),
    "the gate": State(
        lambda _: [response(b"", 429, {"Retry-After": "30"})],
        lambda client, _: client.stats().gate_pace == 0 and client.stats().in_flight == 0,
    ),
    "the gate's pace": State(
        lambda request: [response(b"", 429, {"Retry-After-Ms": "1"})] if request.number_for_id == 1 else [SILENCE],
        lambda client, server: len(server.requests) > 4,
    ),
    "back-off": State(
        lambda _: [response(b"", 503)],
        lambda client, server: client.stats().retries >= len(IDS) and client.stats().in_flight == 0,
        {"retry": RetryPolicy(initial_backoff=10_000, max_backoff=10_000), "deadline": None},
    ),
    "a connection": State(lambda _: [], lambda client, server: server.connections == 4, {}, lambda _: [SILENCE]),
}
every_state = pytest.mark.parametrize("state", STATES.values(), ids=STATES)


async def reach_state(state: State, caller: Caller, client: KaizenClient, server: ScriptedServer) -> asyncio.Task[Any]:
    """Start a call and return its task once it is in a state."""
    task = asyncio.create_task(caller(client, IDS))
    await reach(lambda: state.reached(client, server))
    await settle()
    return task


@everywhere
@every_caller
@every_state
def test_closing_ends_every_wait(state: State, caller: Caller, loop: str) -> None:
    """Closing ends a waiting call at once, in any state, with a ClientClosedError for each id and no cancellation."""

    async def main() -> None:
        async with ScriptedServer(state.play, accept=state.accept) as server:
            client = client_for(server, **{"deadline": 3600, "attempt_timeout": 3600, **state.settings})
            task = await reach_state(state, caller, client, server)
            assert not task.done()
            async with asyncio.timeout(5):
                await client.aclose()
                results = await task
            assert [type(result) for result in results] == [ClientClosedError] * len(IDS)
            assert sorted(result.execution_id for result in results) == IDS
            assert not task.cancelling()
            assert_idle(client)
            sent = len(server.requests)
            await server.until(lambda: not server.open)
            assert len(server.requests) == sent

    run_on(loop, main())


@everywhere
def test_closing_ends_the_wait_of_a_lookup_whose_refusal_is_in_doubt(loop: str) -> None:
    """Closing ends a lookup that waits to see whether the server refuses the key for other ids too.

    The lookup raises the error of its own response.
    """

    async def main() -> None:
        def play(request: Request) -> Script:
            return [response(b"", 401)] if request.id == "a" else [SILENCE]

        async with ScriptedServer(play) as server:
            client = client_for(server, attempt_timeout=3600, deadline=3600)
            silent = asyncio.create_task(caught(client.instructor_executions.get, "b"))
            await reach(lambda: len(server.requests) == 1)
            refused = asyncio.create_task(caught(client.instructor_executions.get, "a"))
            await reach(lambda: client.stats().responses_4xx == 1)
            assert not refused.done()
            await client.aclose()
            assert isinstance(await refused, AuthenticationError)
            assert isinstance(await silent, ClientClosedError)
            assert_idle(client)

    run_on(loop, main())


@everywhere
@every_caller
@pytest.mark.parametrize("concurrency", [1, 2])
def test_closing_at_any_step_leaves_nothing(concurrency: int, caller: Caller, loop: str) -> None:
    """A close after any number of loop steps gives each id a record or a ClientClosedError and frees everything."""

    async def close_after(steps: int) -> bool:
        """Return whether the call had finished before the client was closed."""
        async with ScriptedServer(flaky) as server:
            client = client_for(server, concurrency=concurrency, retry=RetryPolicy(initial_backoff=0))
            task = asyncio.create_task(caller(client, IDS))
            await settle(steps)
            over = task.done()
            async with asyncio.timeout(5):
                await client.aclose()
                results = await task
            assert len(results) == len(IDS)
            assert {type(result).__name__ for result in results} <= {"InstructorExecution", "ClientClosedError"}
            if client._binding.engine is not None:
                assert_idle(client)
                assert not client._binding.engine.transport.is_open
            await server.until(lambda: not server.open)
        return over

    async def main() -> None:
        steps = 0
        while not await close_after(steps) and steps < 100:
            steps += 1
        assert steps > 10

    run_on(loop, main())


def flaky(request: Request) -> Script:
    """Drop the first request, refuse the third, and respond to the others with a finished execution."""
    if request.number == 1:
        return [CLOSE]
    return [response(b"", 503)] if request.number == 3 else finished(request)


def finished(request: Request) -> Script:
    """Respond with a finished execution."""
    return [response(record(request.id, endTime="2026-11-07T05:31:57Z", durationMs=1000))]


@everywhere
@every_caller
def test_a_drain_lets_requests_in_flight_finish(caller: Caller, loop: str) -> None:
    """Requests in flight at the start of a drain return their records. Unsent ids end with a ClientClosedError."""

    async def main() -> None:
        async with ScriptedServer(lambda request: [0.1, *finished(request)]) as server:
            client = client_for(server, concurrency=2)
            task = asyncio.create_task(caller(client, IDS))
            await reach(lambda: len(server.requests) == 2)
            async with asyncio.timeout(5):
                await client.aclose(drain=60)
                results = await task
            assert sorted(type(result).__name__ for result in results) == [
                *["ClientClosedError"] * 2,
                *["InstructorExecution"] * 2,
            ]
            assert len(server.requests) == 2
            assert_idle(client)
            await server.until(lambda: not server.open)

    run_on(loop, main())


@everywhere
@every_caller
def test_a_drain_that_is_over_cuts_off_what_is_left(caller: Caller, loop: str) -> None:
    """Requests that do not finish within the drain end with a ClientClosedError."""

    async def main() -> None:
        async with ScriptedServer(lambda _: [SILENCE]) as server:
            client = client_for(server)
            task = asyncio.create_task(caller(client, IDS))
            await reach(lambda: len(server.asked) == len(IDS))
            async with asyncio.timeout(5):
                await client.aclose(drain=0.1)
                results = await task
            assert [type(result) for result in results] == [ClientClosedError] * len(IDS)

    run_on(loop, main())


@everywhere
def test_a_failure_during_the_drain_is_not_retried(loop: str) -> None:
    """The client does not retry a request that fails during the drain."""

    async def main() -> None:
        async with ScriptedServer(lambda _: [0.05, response(b"", 503)]) as server:
            client = client_for(server)
            task = asyncio.create_task(outcome_of_get(client, "a"))
            await reach(lambda: server.asked["a"] == 1)
            async with asyncio.timeout(5):
                await client.aclose(drain=60)
                outcome = await task
            assert type(outcome.error) is ClientClosedError
            assert outcome.error.attempts == server.asked["a"] == 1
            assert outcome.error.__cause__ is not None

    run_on(loop, main())


@everywhere
def test_an_attempt_may_time_out_during_the_drain(loop: str) -> None:
    """The attempt timeout also applies during the drain."""

    async def main() -> None:
        async with ScriptedServer(lambda _: [SILENCE]) as server:
            client = client_for(server, attempt_timeout=0.2, retry=RetryPolicy(max_attempts=1))
            task = asyncio.create_task(outcome_of_get(client, "a"))
            await reach(lambda: server.asked["a"] == 1)
            async with asyncio.timeout(5):
                await client.aclose(drain=60)
                assert type((await task).error) is AttemptTimeoutError

    run_on(loop, main())


@everywhere
@every_caller
def test_a_closed_client_refuses_and_sends_nothing(caller: Caller, loop: str) -> None:
    """Every call on a closed client gives a ClientClosedError for each id and opens no connection."""

    async def main() -> None:
        async with ScriptedServer() as server:
            client = client_for(server)
            await client.aclose()
            results = await caller(client, IDS)
            assert [type(result) for result in results] == [ClientClosedError] * len(IDS)
            assert not server.connections

    run_on(loop, main())


@everywhere
def test_closing_twice_is_closing_once(loop: str) -> None:
    """A second close returns once the client is closed, and it can shorten a drain of the first close."""

    async def main() -> None:
        async with ScriptedServer(lambda _: [SILENCE]) as server:
            client = client_for(server)
            task = asyncio.create_task(outcome_of_get(client, "a"))
            await reach(lambda: server.asked["a"] == 1)
            draining = [asyncio.create_task(client.aclose(drain=3600)) for _ in range(3)]
            await settle()
            assert not task.done()
            assert not any(waiter.done() for waiter in draining)
            async with asyncio.timeout(5):
                await client.aclose()
                assert type((await task).error) is ClientClosedError
                await asyncio.gather(*draining)
                await client.aclose()
            assert_idle(client)
            assert not client._binding.engine.transport.is_open

    run_on(loop, main())


@everywhere
def test_a_cancelled_close_can_be_done_again(loop: str) -> None:
    """Cancelling a draining close cancels no request, and the next close closes the client."""

    async def main() -> None:
        async with ScriptedServer(lambda _: [SILENCE]) as server:
            client = client_for(server)
            task = asyncio.create_task(outcome_of_get(client, "a"))
            await reach(lambda: server.asked["a"] == 1)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await client.aclose(drain=3600)
            assert not task.done()
            async with asyncio.timeout(5):
                await client.aclose()
                assert type((await task).error) is ClientClosedError
            await server.until(lambda: not server.open)

    run_on(loop, main())


@everywhere
def test_the_task_of_a_signal_handler_can_close(loop: str) -> None:
    """A task created by a SIGTERM handler closes the client, and the program runs to its end."""

    async def main() -> None:
        async with ScriptedServer(lambda _: [SILENCE]) as server:
            client = client_for(server)
            closers: list[asyncio.Task[None]] = []
            running = asyncio.get_running_loop()
            running.add_signal_handler(
                signal.SIGTERM, lambda: closers.append(running.create_task(client.aclose(drain=0.05)))
            )
            task = asyncio.create_task(call_stream(client, IDS))
            await reach(lambda: len(server.asked) == len(IDS))
            os.kill(os.getpid(), signal.SIGTERM)
            async with asyncio.timeout(5):
                assert [type(result) for result in await task] == [ClientClosedError] * len(IDS)
                await asyncio.gather(*closers)
            running.remove_signal_handler(signal.SIGTERM)

    run_on(loop, main())


@everywhere
@pytest.mark.parametrize("ahead", [0.002, -0.002], ids=["before", "after"])
def test_a_deadline_and_a_close_in_the_same_step(ahead: float, loop: str) -> None:
    """A close in the loop step in which deadlines pass raises only errors of the library."""

    async def main() -> None:
        async with ScriptedServer(lambda _: [SILENCE]) as server:
            client = client_for(server, concurrency=2, deadline=0.2)
            running = asyncio.get_running_loop()
            ends_at = running.time() + 0.2
            task = asyncio.create_task(call_get(client, IDS))
            running.call_at(ends_at - 0.01, time.sleep, 0.03)  # so that all timers are due in the same step
            await asyncio.sleep(ends_at - ahead - running.time())
            await client.aclose()
            results = await task
            assert {type(result) for result in results} <= {ClientClosedError, DeadlineExceededError}
            assert_idle(client)

    run_on(loop, main())


async def silent_ids() -> AsyncIterator[str]:
    """Yield one id, then wait forever."""
    yield "a"
    await asyncio.Event().wait()


async def drain_stream(client: KaizenClient, ids: Any, **settings: Any) -> Results:
    """Return the outcomes of a stream and the error that ended it."""
    results: Results = []
    try:
        async with client.instructor_executions.stream(ids, **settings) as outcomes:
            async for outcome in outcomes:
                results.append(outcome)
    except KaizenError as error:
        results.append(error)
    return results


@everywhere
def test_a_source_of_ids_that_never_yields_does_not_hold_a_close_up(loop: str) -> None:
    """A call that waits for the next id of its source raises a ClientClosedError when the client is closed."""

    async def main() -> None:
        async with ScriptedServer() as server:
            client = client_for(server)
            executions = client.instructor_executions
            calls = [
                asyncio.create_task(drain_stream(client, silent_ids())),
                asyncio.create_task(caught(executions.get_many, silent_ids())),
            ]
            await reach(lambda: server.asked["a"] == 1)
            await settle()
            async with asyncio.timeout(5):
                await client.aclose()
                streamed, got = await asyncio.gather(*calls)
            assert type(streamed[-1]) is ClientClosedError
            assert type(got) is ClientClosedError
            assert not any(call.cancelling() for call in calls)

    run_on(loop, main())


@everywhere
def test_a_source_of_ids_that_never_yields_ends_with_the_deadline(loop: str) -> None:
    """A call that waits for the next id of its source ends at its deadline. The ids taken get their outcomes."""

    async def main() -> None:
        async with ScriptedServer() as server, client_for(server) as client:
            async with asyncio.timeout(5):
                (streamed,) = await drain_stream(client, silent_ids(), deadline=0.2)
                (got,) = await client.instructor_executions.get_many(silent_ids(), deadline=0.2)
            assert streamed.ok
            assert got.id == "a"
            assert type(got.error) is DeadlineExceededError
            await settle()
            assert_idle(client)

    run_on(loop, main())


@everywhere
def test_a_stream_of_an_endless_source_ends_with_the_client(loop: str) -> None:
    """A close gives each id taken from an endless source an outcome. Then the stream raises a ClientClosedError."""
    taken: list[str] = []

    def endless() -> Any:
        while True:
            taken.append(f"id{len(taken)}")
            yield taken[-1]

    async def main() -> None:
        async with ScriptedServer() as server:
            client = client_for(server)
            task = asyncio.create_task(drain_stream(client, endless()))
            await reach(lambda: len(server.requests) > 100)
            async with asyncio.timeout(5):
                await client.aclose()
                *outcomes, end = await task
            assert type(end) is ClientClosedError
            assert sorted(outcome.id for outcome in outcomes) == sorted(taken)

    run_on(loop, main())


@everywhere
def test_a_callers_own_session_stays_open(loop: str) -> None:
    """Closing the client leaves a passed-in session and its connections open."""

    async def main() -> None:
        async with ScriptedServer() as server, aiohttp.ClientSession() as session:
            client = client_for(server, session=session)
            assert (await outcome_of_get(client, "a")).ok
            await client.aclose()
            assert not session.closed
            other = client_for(server, session=session)
            assert (await outcome_of_get(other, "b")).ok
            assert server.connections == 1

    run_on(loop, main())


@everywhere
def test_a_client_can_be_used_from_one_loop_after_another(loop: str) -> None:
    """An unclosed client works again in the next event loop, and leaves no connection open in the previous loop."""
    with KaizenEmulator(default_life=Life.lasting(60)) as emulator:
        client = client_for(emulator.base_url)

        async def look_up() -> None:
            assert (await outcome_of_get(client, "a")).ok
            assert_idle(client)

        for _ in range(3):
            run_on(loop, look_up())
            assert not client._binding.engine.transport.is_open
        assert emulator.request_count == 3
        run_on(loop, client.aclose())


@everywhere
def test_a_second_loop_at_the_same_time_is_refused(loop: str) -> None:
    """A client in use by one loop refuses lookups and closing in the loop of another thread."""

    async def main() -> None:
        async with ScriptedServer(lambda request: [0.2, ok(request)]) as server, client_for(server) as client:
            task = asyncio.create_task(outcome_of_get(client, "a"))
            await reach(lambda: server.asked["a"] == 1)
            raised: list[str] = []
            thread = threading.Thread(target=use_elsewhere, args=(client, raised, LOOPS[loop]))
            thread.start()
            thread.join()
            assert (await task).ok
            assert len(raised) == 2
            assert all("another event loop" in text for text in raised)

    run_on(loop, main())


def use_elsewhere(client: KaizenClient, raised: list[str], new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """Record the errors that using and closing a client raise in another loop."""
    with asyncio.Runner(loop_factory=new_loop) as runner:
        for call in (client.instructor_executions.get("b"), client.aclose()):
            try:
                runner.run(call)
            except RuntimeError as error:
                raised.append(str(error))


FORK = """
    import asyncio, os, sys, warnings
    import uvloop
    from kaizen_async import KaizenClient
    warnings.simplefilter("error")

    new_loop = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}[sys.argv[2]]
    client = KaizenClient(base_url=sys.argv[1])

    def run(main):
        with asyncio.Runner(loop_factory=new_loop) as runner:
            return runner.run(main)

    async def look_up(execution_id):
        return (await client.instructor_executions.get(execution_id)).id

    def child():
        assert run(look_up("child")) == "child"
        assert run(look_up("child again")) == "child again"

    async def parent():
        assert await look_up("before") == "before"
        pid = os.fork()
        if not pid:
            try:
                child()
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = await asyncio.to_thread(os.waitpid, pid, 0)
        assert status == 0, status
        assert await look_up("after") == "after"
        await client.aclose()

    run(parent())
"""


@everywhere
def test_a_fork_leaves_the_parents_connections_alone(loop: str) -> None:
    """A forked child uses the client in its own loop, and the parent continues with its own connection."""
    script = textwrap.dedent(FORK)

    async def main() -> None:
        async with ScriptedServer() as server:
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-c", script, server.url, loop, stderr=subprocess.PIPE, cwd=Path(__file__).parent.parent
            )
            _, complaint = await asyncio.wait_for(child.communicate(), 20)
            assert child.returncode == 0, complaint.decode()
            assert not complaint
            seen = {request.id: request.connection for request in server.requests}
            assert list(seen) == ["before", "child", "child again", "after"]
            assert seen["before"] == seen["after"]
            assert len(set(seen.values())) == 3
            await server.until(lambda: not server.open)

    run_on(loop, main())


def test_forked_workers_draw_different_backoffs() -> None:
    """Children forked from one process draw different random numbers, although they inherit the client."""
    client = client_for("http://127.0.0.1:9")
    draws = set()
    for _ in range(3):
        reader, writer = os.pipe()
        if not os.fork():
            os.write(writer, repr(client._binding.random.uniform(0, 1)).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            draws.add(pipe.read())
        os.wait()
    assert len(draws) == 3


@everywhere
def test_a_server_that_goes_away_does_not_hold_a_close_up(loop: str) -> None:
    """A close returns even if the server has already closed all connections."""

    async def main() -> None:
        async with ScriptedServer(lambda request: [ok(request), CLOSE]) as server:
            client = client_for(server)
            await client.instructor_executions.get_many(IDS)
            await server.until(lambda: not server.open)
            async with asyncio.timeout(5):
                await client.aclose()

    run_on(loop, main())
