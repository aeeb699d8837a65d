"""The client sends its settings over the wire, and it opens and closes cleanly in one event loop or in several."""

import asyncio
import concurrent.futures
import gc
import math
import os
import subprocess
import sys
import textwrap
import traceback
import warnings
from typing import Any

import aiohttp
import msgspec
import pytest
import uvloop
from scripted_server import Request, Script, ScriptedServer, ok, response, settle
from scripted_transport import ScriptedTransport
from virtual_time import virtual_time
from yarl import URL

from kaizen_async import (
    AuthenticationError,
    ClientClosedError,
    InstructorExecution,
    KaizenClient,
    KaizenError,
    NotFoundError,
    RetryPolicy,
    TransportError,
)
from kaizen_async.testing import Fault, KaizenEmulator, Life

KEY = "s3cr3t-key"


async def test_key_and_url_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client without arguments takes the key and the URL from the environment."""
    async with ScriptedServer() as server:
        monkeypatch.setenv("KAIZEN_API_KEY", KEY)
        monkeypatch.setenv("KAIZEN_BASE_URL", f"{server.url}/gateway")
        async with KaizenClient() as client:
            await client.instructor_executions.get("a")
        (request,) = server.requests
        assert request.target == "/gateway/instructor/executions/get"
        assert request.headers["authorization"] == f"Bearer {KEY}"


async def test_arguments_override_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key and a URL that are passed in override the environment variables."""
    async with ScriptedServer() as server:
        monkeypatch.setenv("KAIZEN_API_KEY", "another")
        monkeypatch.setenv("KAIZEN_BASE_URL", "https://another.example")
        async with KaizenClient(KEY, base_url=server.url) as client:
            await client.instructor_executions.get("a")
        (request,) = server.requests
        assert request.target == "/instructor/executions/get"
        assert request.headers["authorization"] == f"Bearer {KEY}"


async def test_no_key_sends_no_authorization() -> None:
    """A client without a key sends no Authorization header, because a proxy may add it."""
    async with ScriptedServer() as server, KaizenClient(base_url=server.url) as client:
        await client.instructor_executions.get("a")
        assert "authorization" not in server.requests[0].headers


async def test_wrong_key_raises_authentication_error(emulator: KaizenEmulator) -> None:
    """A wrong key raises an AuthenticationError that names the setting to check and does not show the key."""
    with KaizenEmulator(api_key="right") as guarded:
        async with KaizenClient(KEY, base_url=guarded.base_url) as client:
            with pytest.raises(AuthenticationError, match="check api_key or KAIZEN_API_KEY") as caught:
                await client.instructor_executions.get("a")
        assert guarded.request_count == 1
    assert KEY not in "".join(traceback.format_exception(caught.value))
    assert KEY not in repr(vars(client))


def test_repr_shows_the_url_and_hides_the_key() -> None:
    """The repr of a client shows its URL and state, and it hides the key."""
    client = KaizenClient(KEY, base_url="https://gateway.example/kaizen")
    assert repr(client) == "<KaizenClient https://gateway.example/kaizen/ open>"
    asyncio.run(client.aclose())
    assert repr(client) == "<KaizenClient https://gateway.example/kaizen/ closed>"


async def test_concurrency_bounds_the_requests_in_flight(emulator: KaizenEmulator) -> None:
    """The server never sees more requests in flight than the client's concurrency."""
    ids = [f"e{n}" for n in range(60)]
    emulator.add_many(ids)
    emulator.faults.always(Fault.latency(0.01))
    async with KaizenClient(base_url=emulator.base_url, concurrency=7) as client:
        outcomes = await client.instructor_executions.get_many(ids)
    assert all(outcome.ok for outcome in outcomes)
    assert emulator.max_in_flight == 7


async def test_max_response_bytes_is_a_setting() -> None:
    """The client refuses a response that is larger than max_response_bytes."""
    async with ScriptedServer() as server, KaizenClient(base_url=server.url, max_response_bytes=100) as client:
        with pytest.raises(KaizenError, match=r"larger than max_response_bytes \(100\)"):
            await client.instructor_executions.get("a")


class Slim(msgspec.Struct):
    """A record with only two fields."""

    id: str
    status: str


async def test_lookups_declares_another_kind_of_record() -> None:
    """A path, a record type and an unwrap key are enough to look up another kind of record."""

    def play(request: Request) -> Script:
        return [response({"execution": {"id": request.id, "status": "Paused", "more": 1}})]

    async with ScriptedServer(play) as server, KaizenClient(base_url=f"{server.url}/x") as client:
        workflow_executions = client.lookups("executions/get", Slim, unwrap="execution")
        assert await workflow_executions.get("a") == Slim("a", "Paused")
        (outcome,) = await workflow_executions.get_many(["b"])
        assert outcome.execution == Slim("b", "Paused")
        assert {request.target for request in server.requests} == {"/x/executions/get"}


def test_instructor_executions_is_made_once() -> None:
    """A client returns the same object each time, because concurrent lookups share the requests that it holds."""
    client = KaizenClient()
    assert client.instructor_executions is client.instructor_executions


def client_connections(emulator: KaizenEmulator) -> int:
    """Return how many connections to an emulator are open after it has become quiet."""
    asyncio.run(emulator.until_quiet())
    return emulator.open_connections


def test_one_client_serves_one_event_loop_after_another(emulator: KaizenEmulator) -> None:
    """A client created outside any loop works in several loops in turn, and leaves no connection or warning behind."""
    emulator.add("a")
    client = KaizenClient(base_url=emulator.base_url)

    async def main() -> InstructorExecution:
        return await client.instructor_executions.get("a")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            assert asyncio.run(main(), debug=True).id == "a"
            assert client.stats().in_flight == 0
        asyncio.run(client.aclose())
        with pytest.raises(ClientClosedError):
            asyncio.run(main())
    assert client_connections(emulator) == 0


def test_client_moves_between_asyncio_and_uvloop(emulator: KaizenEmulator) -> None:
    """A client moves from an asyncio loop to a uvloop loop and back."""
    emulator.add("a")
    client = KaizenClient(base_url=emulator.base_url)

    async def main() -> str:
        return (await client.instructor_executions.get("a")).id

    for factory in (asyncio.new_event_loop, uvloop.new_event_loop, asyncio.new_event_loop):
        with asyncio.Runner(loop_factory=factory) as runner:
            assert runner.run(main()) == "a"


def test_stats_survive_the_end_of_a_loop(emulator: KaizenEmulator) -> None:
    """The totals of a client include the lookups of earlier event loops."""
    emulator.add("a")
    client = KaizenClient(base_url=emulator.base_url)

    async def main() -> None:
        await client.instructor_executions.get("a")

    for _ in range(3):
        asyncio.run(main())
    assert client.stats().succeeded == 3


def test_two_loops_at_once_are_refused(emulator: KaizenEmulator) -> None:
    """A client in use by one loop raises a RuntimeError in a second loop, and continues to work in the first."""
    emulator.add("a")
    client = KaizenClient(base_url=emulator.base_url)

    async def use() -> str:
        return (await client.instructor_executions.get("a")).id

    with asyncio.Runner() as first, asyncio.Runner() as second:
        assert first.run(use()) == "a"
        with pytest.raises(RuntimeError, match="create one client for each event loop"):
            second.run(use())
        assert first.run(use()) == "a"
        with pytest.raises(RuntimeError, match="in use by another event loop; close it there"):
            second.run(client.aclose())
        first.run(client.aclose())
    assert client_connections(emulator) == 0


async def test_stream_needs_a_running_loop() -> None:
    """Creating a stream outside a running event loop raises a RuntimeError."""
    client = KaizenClient()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        made = pool.submit(client.instructor_executions.stream, ["a"])
        with pytest.raises(RuntimeError, match="no running event loop"):
            made.result()


async def test_leaving_the_block_closes_it(emulator: KaizenEmulator) -> None:
    """Leaving the `async with` block closes the client and its connections, also after an error."""
    emulator.add("a")
    with pytest.raises(ZeroDivisionError):
        async with KaizenClient(base_url=emulator.base_url) as client:
            await client.instructor_executions.get("a")
            assert emulator.open_connections == 1
            raise ZeroDivisionError
    await emulator.until_quiet()
    with pytest.raises(ClientClosedError, match="create a new KaizenClient"):
        await client.instructor_executions.get("a")


async def test_closing_twice_or_unused_is_fine(emulator: KaizenEmulator) -> None:
    """A client can be closed unused, twice in a row, and twice at the same time."""
    unused = KaizenClient()
    await unused.aclose()
    await unused.aclose()
    emulator.add("a")
    client = KaizenClient(base_url=emulator.base_url)
    await client.instructor_executions.get("a")
    await asyncio.gather(client.aclose(), client.aclose())
    await client.aclose()
    await emulator.until_quiet()


async def test_closing_ends_requests_in_flight(emulator: KaizenEmulator) -> None:
    """Closing ends requests that wait for their headers and requests that have received part of their body."""
    emulator.add_many(["a", "b"])
    emulator.faults.always(Fault.hang(), id="a")
    emulator.faults.always(Fault.stalled_body(), id="b")
    client = KaizenClient(base_url=emulator.base_url)
    tasks = [asyncio.create_task(client.instructor_executions.get(i)) for i in "ab"]
    while emulator.request_count < 2:  # noqa: ASYNC110 - the emulator has no event to await
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.02)
    await client.aclose()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, ClientClosedError)
        assert result.attempts == 1
    await emulator.until_quiet()


async def test_a_session_passed_in_is_used_and_left_open(emulator: KaizenEmulator) -> None:
    """A client uses a session that is passed in, and does not close it."""
    emulator.add("a")
    async with aiohttp.ClientSession(headers={"X-Team": "blue"}) as session:
        async with KaizenClient(base_url=emulator.base_url, session=session) as client:
            assert (await client.instructor_executions.get("a")).id == "a"
        assert not session.closed


def test_a_session_passed_in_binds_the_client_to_its_loop(emulator: KaizenEmulator) -> None:
    """A client with a passed-in session refuses a second loop, and its error says what to do."""
    emulator.add("a")

    async def make() -> KaizenClient:
        async with aiohttp.ClientSession() as session:
            client = KaizenClient(base_url=emulator.base_url, session=session)
            await client.instructor_executions.get("a")
            return client

    client = asyncio.run(make())
    with pytest.raises(RuntimeError, match="leave session out, and the client opens one for each"):
        asyncio.run(use(client))


async def use(client: KaizenClient) -> str:
    """Look one execution up."""
    return (await client.instructor_executions.get("a")).id


async def forget(emulator: KaizenEmulator) -> None:
    """Use a client and drop it without closing it."""
    client = KaizenClient(base_url=emulator.base_url)
    await use(client)


async def test_a_forgotten_client_warns_and_is_closed(emulator: KaizenEmulator) -> None:
    """A client that is dropped unclosed closes itself and gives one ResourceWarning that says where it was created."""
    emulator.add("a")
    with pytest.warns(ResourceWarning) as caught:  # noqa: PT031 - dropping the client is what is tested
        await forget(emulator)
        gc.collect()
        await emulator.until_quiet()
        await settle()
    (warning,) = caught
    assert str(warning.message).startswith(f"KaizenClient created at {__file__}:")
    assert str(warning.message).endswith(
        "use it as `async with KaizenClient() as kaizen:` or call `await kaizen.aclose()`"
    )


def test_a_client_forgotten_beyond_its_loop_needs_no_warning(emulator: KaizenEmulator) -> None:
    """A client dropped after its loop has ended gives no warning, because `asyncio.run` has closed its connections."""
    emulator.add("a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        client = KaizenClient(base_url=emulator.base_url)
        asyncio.run(use(client))
        del client
        gc.collect()
    assert client_connections(emulator) == 0


def test_a_client_forgotten_between_two_runs_of_its_loop_warns(emulator: KaizenEmulator) -> None:
    """A client dropped between two runs of its loop warns, and the end of the loop closes its connections."""
    emulator.add("a")
    with asyncio.Runner() as runner:
        client = KaizenClient(base_url=emulator.base_url)
        runner.run(use(client))
        with pytest.warns(ResourceWarning, match=r"^KaizenClient created at .* was never closed"):  # noqa: PT031
            del client
            gc.collect()
    assert client_connections(emulator) == 0


async def test_a_client_that_sent_nothing_may_be_forgotten() -> None:
    """A client that sent nothing holds nothing, so dropping it gives no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        client = KaizenClient()
        assert client.stats().attempts == 0
        del client
        gc.collect()


def test_a_client_that_could_not_be_made_leaves_no_trace() -> None:
    """The finalizer of a client whose arguments were refused raises nothing and gives no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="concurrency"):
            KaizenClient(concurrency=0)
        with pytest.raises(TypeError):
            KaizenClient(no_such_setting=1)  # type: ignore[call-arg]
        gc.collect()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_uses_connections_of_its_own(emulator: KaizenEmulator) -> None:
    """A forked child opens its own connections, and the parent continues with its own."""
    emulator.add("a")
    script = """
        import asyncio, os, sys
        from kaizen_async import KaizenClient

        async def use():
            return (await client.instructor_executions.get("a")).id

        client = KaizenClient(base_url=sys.argv[1])
        with asyncio.Runner() as runner:
            assert runner.run(use()) == "a"
            child = os.fork()
            if child == 0:
                asyncio.set_event_loop(None)
                asyncio.events._set_running_loop(None)
                with asyncio.Runner() as own:
                    assert own.run(use()) == "a"
                    own.run(client.aclose())
                    del client
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            assert runner.run(use()) == "a"
            runner.run(client.aclose())
        print("done")
    """
    ran = subprocess.run(  # noqa: S603 - our own script
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script), emulator.base_url],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (ran.stdout, ran.stderr, ran.returncode) == ("done\n", "", 0)
    assert emulator.requests_for("a") == 3


def test_nothing_warns_in_a_whole_life_with_everything_switched_on(emulator: KaizenEmulator) -> None:
    """A program under `-W error`, `-X dev` and asyncio's debug mode prints no warning."""
    emulator.add_many([f"e{n}" for n in range(30)])
    emulator.faults.chance(Fault.status(503), 0.2)
    script = """
        import asyncio, sys
        from kaizen_async import KaizenClient, KaizenError, RetryPolicy

        async def main():
            async with KaizenClient(base_url=sys.argv[1], retry=RetryPolicy(initial_backoff=0.01)) as kaizen:
                executions = kaizen.instructor_executions
                ids = [f"e{n}" for n in range(30)]
                assert all(outcome.ok for outcome in await executions.get_many(ids))
                async with executions.stream(iter(ids)) as outcomes:
                    async for outcome in outcomes:
                        break
                try:
                    await executions.get("missing")
                except KaizenError as error:
                    print(type(error).__name__)

        asyncio.run(main(), debug=True)
    """
    ran = subprocess.run(  # noqa: S603 - our own script
        [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(script), emulator.base_url],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (ran.stdout, ran.stderr, ran.returncode) == ("NotFoundError\n", "", 0)


async def test_a_subclass_is_still_a_client(emulator: KaizenEmulator) -> None:
    """A subclass can set its own defaults and add its own lookups."""

    class Ours(KaizenClient):
        def __init__(self, **settings: Any) -> None:
            super().__init__(deadline=5, **settings)
            self.slim = self.lookups("instructor/executions/get", Slim)

    emulator.add("a", Life.ended(status="Failed"))
    async with Ours(base_url=emulator.base_url) as client:
        assert await client.slim.get("a") == Slim("a", "Failed")


@virtual_time
async def test_equal_policies_share_requests() -> None:
    """Two concurrent lookups of one id with equal retry policies share one request."""
    transport = ScriptedTransport()
    async with transport.client(retry=RetryPolicy(max_attempts=2)) as client:
        executions = client.instructor_executions
        await asyncio.gather(executions.get("a"), executions.get("a", retry=RetryPolicy(max_attempts=2)))
        assert transport.ids == ["a"]


async def test_a_path_prefix_of_the_url_is_kept() -> None:
    """A base URL with a path prefix keeps its prefix in front of the path of a lookup."""
    async with ScriptedServer(lambda request: [ok(request)]) as server:
        async with KaizenClient(base_url=f"{server.url}/a/b%20c/") as client:
            await client.instructor_executions.get("a")
        assert URL(server.url + server.requests[0].target).path == "/a/b c/instructor/executions/get"


async def test_not_found_is_not_retried_on_the_wire(emulator: KaizenEmulator) -> None:
    """A 404 response raises a NotFoundError after one request."""
    async with KaizenClient(base_url=emulator.base_url) as client:
        with pytest.raises(NotFoundError, match=r"^missing: the server answered 404 Not Found: there is no execution"):
            await client.instructor_executions.get("missing")
    assert emulator.requests_for("missing") == 1


async def test_a_client_is_freed_when_it_is_forgotten(emulator: KaizenEmulator) -> None:
    """A dropped client is freed at once, without the garbage collector, so its warning comes while the loop is open."""
    emulator.add("a")
    gc.disable()
    try:
        with pytest.warns(ResourceWarning, match="never closed"):
            await forget(emulator)
    finally:
        gc.enable()
    await emulator.until_quiet()


@pytest.mark.parametrize(
    ("drain", "error"), [("x", TypeError), (-1, ValueError), (math.nan, ValueError), (True, TypeError)]
)
async def test_invalid_drain_closes_nothing(emulator: KaizenEmulator, drain: Any, error: type) -> None:
    """An invalid drain raises an error, and the client continues to work."""
    emulator.add("a")
    async with KaizenClient(base_url=emulator.base_url) as client:
        with pytest.raises(error, match="drain must be"):
            await client.aclose(drain=drain)
        await use(client)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_a_session_that_cannot_work_is_refused() -> None:
    """The client refuses an object of another type, and a session whose own auth would conflict with the key."""
    with pytest.raises(TypeError, match=r"session must be an aiohttp\.ClientSession, not int"):
        KaizenClient(session=5)  # type: ignore[arg-type]
    async with aiohttp.ClientSession(auth=aiohttp.BasicAuth("user", "password")) as session:
        with pytest.raises(ValueError, match="session has auth of its own"):
            KaizenClient("key", session=session)
        KaizenClient(session=session)


def test_plain_http_through_a_proxy_of_the_environment_is_refused() -> None:
    """The client refuses plain HTTP with trust_env. The proxy may be another machine, even if the server is local."""
    with pytest.raises(ValueError, match="through a proxy"):
        KaizenClient("key", base_url="http://127.0.0.1:8080", trust_env=True)
    KaizenClient("key", base_url="http://127.0.0.1:8080", trust_env=True, allow_insecure_http=True)
    KaizenClient("key", base_url="https://127.0.0.1:8080", trust_env=True)


async def test_a_loop_that_was_forked_is_refused(emulator: KaizenEmulator) -> None:
    """A loop that continues after a fork is refused, because child and parent would use the same sockets."""
    emulator.add("a")
    async with KaizenClient(base_url=emulator.base_url) as client:
        await use(client)
        engine = client._binding.engine
        assert engine is not None
        engine.process_id -= 1
        with pytest.raises(RuntimeError, match="made before the process forked"):
            await use(client)
        engine.process_id += 1


async def test_failing_middleware_fails_one_lookup(emulator: KaizenEmulator) -> None:
    """An error in a session's middleware fails only the lookup in which it is raised."""
    emulator.add_many(["a", "b", "c"])

    async def middleware(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        if b'"b"' in request.body._value:
            raise ValueError("no b today")
        return await handler(request)

    async with (
        aiohttp.ClientSession(middlewares=[middleware]) as session,
        KaizenClient(base_url=emulator.base_url, session=session) as client,
    ):
        outcomes = await client.instructor_executions.get_many(["a", "b", "c"])
    assert [outcome.ok for outcome in outcomes] == [True, False, True]
    assert isinstance(outcomes[1].error, TransportError)
    assert str(outcomes[1].error) == "b: the session raised ValueError: no b today (after 1 attempt)"
