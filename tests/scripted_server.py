"""A loopback server that sends scripted bytes, and helpers for tests of a live client.

    def play(request: Request) -> Script:
        return [RESET] if request.number == 1 else [0.05, ok(request)]

    async with ScriptedServer(play) as server, closing(client_for(server), server) as client: ...

A script is a list of bytes to send, seconds to wait, and endings. The server counts requests and open connections, so
that a test can see leaks from the outside.
"""

import asyncio
import gc
import json
import pickle
import socket
import ssl
import struct
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from enum import Enum
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import uvloop

from kaizen_async import KaizenClient, KaizenError, Outcome, RetryPolicy

T = TypeVar("T")

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Ending(Enum):
    """The state of a connection after a script. Without an ending, it stays open for the next request."""

    CLOSE = "FIN"
    RESET = "RST"
    HALF_CLOSE = "FIN, but the server continues to read"
    SILENCE = "the connection stays open and nothing comes"


CLOSE, RESET, HALF_CLOSE, SILENCE = Ending.CLOSE, Ending.RESET, Ending.HALF_CLOSE, Ending.SILENCE


class Request(NamedTuple):
    """A request, with its position among all requests, among those for its id, and on its connection."""

    id: str
    number: int
    number_for_id: int
    number_on_connection: int
    connection: int
    target: str
    headers: Mapping[str, str]


Script = Sequence[bytes | float | Ending]
Play = Callable[[Request], Script]


def record(execution_id: str = "exec_1", **changes: Any) -> dict[str, Any]:
    """Return the JSON of a record that fits the contract."""
    return {
        "id": execution_id,
        "workflow": {"id": "wf_1", "name": "Invoices"},
        "logins": [{"id": "login_1", "name": "Portal"}],
        "authentications": [{"status": "InProgress", "browserSessionId": "bs_1", "liveViewUrl": "https://live.test/1"}],
        "contextAuthentications": [],
        "startTime": "2026-11-07T05:31:56Z",
        "endTime": None,
        "durationMs": None,
        "isRecording": True,
        "browserSessionId": None,
        "status": "InProgress",
        **changes,
    }


def dump(answer: object) -> bytes:
    """Return a value as JSON bytes. Bytes are returned unchanged."""
    return answer if isinstance(answer, bytes) else json.dumps(answer, separators=(",", ":")).encode()


def response(answer: object, status: int = 200, headers: Mapping[str, str] | None = None) -> bytes:
    """Return a whole HTTP response."""
    body = dump(answer)
    fields = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
    lines = [f"HTTP/1.1 {status} Whatever", *(f"{name}: {text}" for name, text in fields.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def ok(request: Request) -> bytes:
    """Return a response with the requested record."""
    return response(record(request.id))


class ScriptedServer:
    """Plays a script for each request.

    Args:
        play: Returns the script for a request.
        accept: Returns the script for the n-th connection, before anything is read from it.
        ssl_context: Serves TLS.

    Attributes:
        requests: All requests, in order.
        asked: Number of requests for each id.
        connections: Number of accepted connections.
        open: Number of open connections.
    """

    def __init__(
        self,
        play: Play = lambda request: [ok(request)],
        *,
        accept: Callable[[int], Script] = lambda _: (),
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self.play = play
        self.requests: list[Request] = []
        self.asked: Counter[str] = Counter()
        self.connections = 0
        self.open = 0
        self._accept = accept
        self._ssl_context = ssl_context
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    @property
    def url(self) -> str:
        """The base URL for a client."""
        return f"http{'s' * (self._ssl_context is not None)}://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(
            self._connected, "127.0.0.1", 0, ssl=self._ssl_context, backlog=1024, limit=1 << 20
        )
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition on the received requests is met."""
        async with asyncio.timeout(10):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.open += 1
        try:
            if await self._act(self._accept(self.connections), reader, writer):
                await self._answer_all(self.connections, reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client went away, or the test is over
        finally:
            self.open -= 1
            self._changed.set()
            self._tasks.discard(task)
            writer.close()

    async def _answer_all(self, connection: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        on_connection = 0
        while True:
            target, headers, execution_id = await _read_request(reader)
            on_connection += 1
            self.asked[execution_id] += 1
            request = Request(
                execution_id,
                len(self.requests) + 1,
                self.asked[execution_id],
                on_connection,
                connection,
                target,
                headers,
            )
            self.requests.append(request)
            self._changed.set()
            if not await self._act(self.play(request), reader, writer):
                return

    async def _act(self, script: Script, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Play a script, and return whether the connection stays in use."""
        for step in script:
            if writer.transport.is_closing():
                raise ConnectionResetError
            match step:
                case bytes():
                    writer.write(step)
                    await writer.drain()
                case Ending():
                    await _end(step, reader, writer)
                    return False
                case _:
                    await asyncio.sleep(step)
        return True


async def _read_request(reader: asyncio.StreamReader) -> tuple[str, dict[str, str], str]:
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = {name.lower(): text.strip() for name, _, text in (line.partition(":") for line in lines[1:]) if name}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return lines[0].split()[1], headers, str(json.loads(body)["id"])


async def _end(ending: Ending, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    match ending:
        case Ending.RESET:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            writer.transport.abort()
        case Ending.HALF_CLOSE:
            writer.write_eof()
            await reader.read()
        case Ending.SILENCE:
            await reader.read()
        case Ending.CLOSE:
            await writer.drain()


def run_on(loop: str, main: Coroutine[Any, Any, T], *, debug: bool = True) -> T:
    """Run a coroutine on one of the LOOPS, and fail if it leaves a task behind or the loop reports an error."""
    with asyncio.Runner(loop_factory=LOOPS[loop], debug=debug and loop == "asyncio") as runner:
        return runner.run(_watched(main))


async def _watched(main: Coroutine[Any, Any, T]) -> T:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    returned = await main
    await settle()
    gc.collect(
        1
    )  # the test's objects are young, and a full collection of pytest's objects would take longer than the test
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, f"tasks left behind: {left}"
    complaints = [context for context in complaints if "incoming connection" not in context["message"]]  # the server's
    assert not complaints, f"the loop complained: {complaints}"
    return returned


async def settle(steps: int = 10) -> None:
    """Let the loop run some steps, so that all tasks that are ready have run."""
    for _ in range(steps):
        await asyncio.sleep(0)


def client_for(server: ScriptedServer | str, **settings: Any) -> KaizenClient:
    """Return a client that makes three attempts with hardly any back-off."""
    url = server if isinstance(server, str) else server.url
    defaults: dict[str, Any] = {"api_key": "sk-test", "retry": RetryPolicy(max_attempts=3, initial_backoff=0.01)}
    return KaizenClient(base_url=url, **{**defaults, **settings})


def assert_idle(client: KaizenClient) -> None:
    """Fail if an idle client has a slot occupied, a request in flight or a wait."""
    engine = client._binding.engine
    assert engine is not None
    assert client.stats().in_flight == 0
    assert engine._free_slots == engine.concurrency
    assert not engine._queues
    assert not engine._sending
    assert not engine._waiting
    session = getattr(engine.transport, "_session", None)
    if session is not None and not session.closed:
        pool = getattr(engine.transport, "_pool", None)
        addresses = () if pool is None else pool._addresses.values()
        idle = sum(len(address.idle) for address in addresses)
        assert len(session.connector._acquired) == idle, "a connection is held for a finished request"
        assert sum(address.capacity.open for address in addresses) == idle


@asynccontextmanager
async def closing(client: KaizenClient, *servers: ScriptedServer) -> AsyncIterator[KaizenClient]:
    """Close a client at the end, and fail if it was not idle or a connection to a server stays open."""
    async with client:
        yield client
        await settle()
        assert_idle(client)
    for server in servers:
        await server.until(lambda server=server: not server.open)


Verb = Callable[[KaizenClient, str], Awaitable[Outcome[Any]]]


async def outcome_of_get(client: KaizenClient, execution_id: str) -> Outcome[Any]:
    """Return the result of `get` as an outcome."""
    try:
        found = await client.instructor_executions.get(execution_id)
    except Exception as error:  # noqa: BLE001 - the test that checks the error fails if it is foreign
        return Outcome(execution_id, None, error, getattr(error, "attempts", -1), 0.0)
    return Outcome(execution_id, found, None, -1, 0.0)


async def outcome_of_get_many(client: KaizenClient, execution_id: str) -> Outcome[Any]:
    """Return the only outcome of `get_many`."""
    (outcome,) = await client.instructor_executions.get_many([execution_id])
    return outcome


VERBS: dict[str, Verb] = {"get": outcome_of_get, "get_many": outcome_of_get_many}


def traces_of(error: BaseException) -> str:
    """Return everything that an error and its causes show when they are printed, logged, pickled or inspected."""
    shown = ["".join(traceback.format_exception(error))]
    link: BaseException | None = error
    while link is not None:
        shown += [repr(link), str(link), repr(link.args)]
        if isinstance(link, KaizenError):
            shown += [repr(vars(link)), pickle.dumps(link).decode("latin-1")]
        link = link.__cause__ or link.__context__
    return "\n".join(shown)


async def reach(condition: Callable[[], bool]) -> None:
    """Wait until a condition is met."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - a client has no event for its inner state
            await asyncio.sleep(0.001)
