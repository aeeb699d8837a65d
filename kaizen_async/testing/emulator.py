"""The emulator: an HTTP server on loopback that answers by the contract, plays lives, and misbehaves on demand."""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from types import TracebackType
from typing import Annotated, Any, Final, Self, TypeAlias

import msgspec
from aiohttp import web

from kaizen_async.testing.checks import check_id, check_type
from kaizen_async.testing.fault_plan import FaultPlan
from kaizen_async.testing.faults import Answer, Exchange
from kaizen_async.testing.lives import Life
from kaizen_async.testing.loop_thread import LoopThread
from kaizen_async.testing.rate_limit import TokenBucket
from kaizen_async.testing.records import KINDS, Changes, Kind, Snapshot
from kaizen_async.testing.server import LoopbackServer

DefaultLife: TypeAlias = Life | Callable[[str], Life | None]

_REMEMBERED: Final = 1000
_LOOK_AGAIN: Final = 0.002


class KaizenEmulator:
    """A server that plays the Kaizen API on your own machine.

    `async with KaizenEmulator() as emulator:` serves in the running loop; `with KaizenEmulator() as emulator:` in a
    thread of its own, for code that blocks or runs loops of its own. Point the client at `emulator.base_url`. All but
    the coroutine methods may be called at any time and from any thread, whether it serves or not.

    `POST /instructor/executions/get` answers as the reference of the API says: 200 with a record, every documented
    field made up from the id and the seed; 401 if there is a key and the request lacks it; 404 for an id that does not
    exist. What is no such request gets 400, 404, 405, 413 or 415. `POST /executions/get` answers about the same ids as
    workflow executions, as far as these are known; those never tell an end time, unless you `add` one with `record=`.

    Args:
        api_key: The key that requests must carry as a bearer token; None lets everyone in.
        seed: What records and random faults are drawn from: the same seed, the same run.
        default_life: The life of ids that were not added, begun by the first request for them: one for all, or a
            function of the id, which returns None if there is to be no such execution.
        host: The address to listen on.
        port: The port to listen on; 0 takes a free one, which then stays the same over `stop` and `start`.
        path_prefix: What stands before the API's paths, as behind a gateway: `"/kaizen"`.
        clock: The seconds by which lives and the rate limit go. Hand in your own to move time by hand.
        epoch: The date and time of the records as the emulator is made, by default the present; `clock` moves it on.

    Attributes:
        faults: What goes wrong, and when.
        request_count: Requests that came in.
        answers: How often each status was answered. Requests that were hung, reset or cut off are not in it.
        last_requests: The ids of the last thousand requests that are over, each with the status of its answer if it
            got one.
        max_in_flight: The most requests that were being answered at the same time.
    """

    def __init__(
        self,
        *,
        api_key: str | None = None,
        seed: int = 0,
        default_life: DefaultLife | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        path_prefix: str = "",
        clock: Callable[[], float] = time.monotonic,
        epoch: datetime | None = None,
    ) -> None:
        _check_settings(api_key, default_life, path_prefix, epoch)
        self.faults = FaultPlan(seed)
        self.request_count = 0
        self.answers: Counter[int] = Counter()
        self.last_requests: deque[tuple[str, int | None]] = deque(maxlen=_REMEMBERED)
        self.max_in_flight = 0
        self._authorization = None if api_key is None else f"Bearer {api_key}"
        self._seed = seed
        self._default_life = default_life
        self._prefix = path_prefix
        self._clock = clock
        self._zero = (epoch or datetime.now(UTC)).astimezone(UTC) - timedelta(seconds=clock())
        self._executions: dict[str, _Execution] = {}
        self._requests: dict[str, int] = {}
        self._bucket: TokenBucket | None = None
        self._in_flight = 0
        self._server = LoopbackServer(self._handle, host, port)
        self._thread: LoopThread | None = None
        self._thread_ending = ExitStack()

    def add(
        self,
        execution_id: str,
        life: Life | None = None,
        *,
        workflow: str | Mapping[str, Any] | None = None,
        record: Mapping[str, Any] | None = None,
        without: Iterable[str] = (),
        body: bytes | None = None,
    ) -> None:
        """Let an execution begin its life now, in place of the one that had this id.

        Args:
            execution_id: Its id.
            life: Its life; without one it has ended already.
            workflow: The name of its workflow, or the whole object.
            record: Fields to be answered instead of the made-up ones, and further ones, by their names in JSON.
            without: Names of fields to be left out.
            body: The whole body to be answered, JSON or not.
        """
        check_id(execution_id)
        changes = Changes.checked(workflow, record, without, body)
        self._executions[execution_id] = self._born(Life.ended() if life is None else life, changes)

    def add_many(self, execution_ids: Iterable[str], life: Life | None = None) -> None:
        """Let many executions begin the same life now."""
        if isinstance(execution_ids, str):
            raise TypeError("add_many takes many ids; add() takes a single one")
        for execution_id in execution_ids:
            self.add(execution_id, life)

    def rate_limit(self, rate: float | None = 100.0, burst: int = 20, retry_after: float | None = 1.0) -> None:
        """Answer 429 to what exceeds a rate.

        Args:
            rate: Look-ups per second that pass; None lifts the limit.
            burst: How many may pass at once after a rest.
            retry_after: The seconds of the header Retry-After; None sends none.
        """
        self._bucket = None if rate is None else TokenBucket(rate, burst, retry_after, self._clock)

    @property
    def base_url(self) -> str:
        """Where the API is, for the client: `http://127.0.0.1:PORT/`."""
        if not self._server.port:
            raise RuntimeError("the emulator has no port yet; start it: `async with KaizenEmulator() as emulator:`")
        host = self._server.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self._server.port}{self._prefix}/"

    @property
    def open_connections(self) -> int:
        """How many connections are open now."""
        return len(self._server.connections)

    def requests_for(self, execution_id: str) -> int:
        """Return how many look-ups of this id came in."""
        return self._requests.get(execution_id, 0)

    async def start(self) -> None:
        """Begin to serve, on the same port as before; everything lived on meanwhile."""
        await self._at_home(self._server.start)

    async def stop(self) -> None:
        """Close the port and all connections at once, waiting for nothing; connecting is refused from then on."""
        await self._at_home(partial(self._server.stop, keep_port=True))

    async def until_quiet(self, within: float = 5.0) -> None:
        """Wait until no connection is open, for a test that nothing was leaked.

        The last bytes of a client that has closed may still be on their way, so a look at `open_connections` right
        after may come too early.

        Raises:
            TimeoutError: After so many seconds some still are.
        """
        deadline = time.monotonic() + within
        while self.open_connections:
            if time.monotonic() >= deadline:
                busy = f"{self.open_connections} connections are open, {self._in_flight} requests being answered"
                raise TimeoutError(f"after {within} seconds {busy}")
            await asyncio.sleep(_LOOK_AGAIN)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._server.stop(keep_port=False)

    def __enter__(self) -> Self:
        thread = LoopThread()
        with ExitStack() as ending:
            ending.callback(thread.close)
            thread.run(self._server.start)
            ending.callback(thread.run, partial(self._server.stop, keep_port=False))
            self._thread, self._thread_ending = thread, ending.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread = None
        self._thread_ending.close()

    async def _at_home(self, operation: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run an operation in the loop that serves, whichever loop asks for it."""
        if self._thread is None:
            await operation()
        else:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(operation(), self._thread.loop))

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        exchange = Exchange(request)
        status = None
        self.request_count += 1
        self._in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self._in_flight)
        try:
            response = await self._respond(exchange)
            status = response.status
            self.answers[status] += 1
            return response
        finally:
            self._in_flight -= 1
            self.last_requests.append((exchange.id, status))

    async def _respond(self, exchange: Exchange) -> web.StreamResponse:
        try:
            kind = self._kind_asked_for(exchange.request)
            exchange.id = await _id_asked_for(exchange.request)
        except _RefusedError as refused:
            return refused.answer.response()
        number = self._requests[exchange.id] = self.requests_for(exchange.id) + 1
        self._begin_default_life(exchange.id)
        exchange.ordinary = partial(self._ordinary_answer, exchange, kind)
        for fault in self.faults.due(exchange.id, number):
            response = await exchange.meet(fault)
            if response is not None:
                return response
        return exchange.ordinary().response()

    def _kind_asked_for(self, request: web.BaseRequest) -> Kind:
        path = request.path
        kind = KINDS.get(path.removeprefix(self._prefix)) if path.startswith(self._prefix) else None
        if kind is None:
            raise _RefusedError(404, f"there is no {path}")
        if request.method != "POST":
            raise _RefusedError(405, f"{path} takes POST, not {request.method}", {"Allow": "POST"})
        if request.content_type != "application/json":
            raise _RefusedError(415, f"the body must be application/json, not {request.content_type}")
        return kind

    def _begin_default_life(self, execution_id: str) -> None:
        if self._default_life is None or execution_id in self._executions:
            return
        given = self._default_life
        life = given if isinstance(given, Life) else given(execution_id)
        if life is not None:
            self._executions[execution_id] = self._born(life, None)

    def _born(self, life: Life, changes: Changes | None) -> "_Execution":
        check_type("life", life, Life, "make one such as Life.lasting(60)")
        return _Execution(life, self._clock(), changes)

    def _ordinary_answer(self, exchange: Exchange, kind: Kind) -> Answer:
        sent = exchange.request.headers.get("Authorization")
        if self._authorization is not None and sent != self._authorization:
            return Answer.message(401, "the API key is missing or wrong")
        bucket = self._bucket
        if bucket is not None and not bucket.take():
            return Answer.message(429, headers=bucket.headers())
        execution = self._executions.get(exchange.id)
        if execution is None:
            return Answer.message(404, f"there is no execution {exchange.id!r}")
        life, born = execution.life, execution.born
        start = self._zero + timedelta(milliseconds=round((born - life.age) * 1000))
        # Rounded, so that a clock moved by exactly the seconds of a step does reach it.
        age = round(self._clock() - born + life.age, 6)
        snapshot = Snapshot.of(exchange.id, life, seed=self._seed, start=start, age=age)
        return Answer(200, kind.encode(snapshot, execution.changes))


@dataclass(frozen=True, slots=True)
class _Execution:
    life: Life
    born: float
    changes: Changes | None


class _RefusedError(Exception):
    def __init__(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.answer = Answer.message(status, text, headers)


class _Question(msgspec.Struct):
    id: Annotated[str, msgspec.Meta(min_length=1)]


_decode_question: Final = msgspec.json.Decoder(_Question).decode


async def _id_asked_for(request: web.BaseRequest) -> str:
    try:
        return _decode_question(await request.read()).id
    except web.HTTPRequestEntityTooLarge:
        raise _RefusedError(413, "a body that asks for one id need not be so large") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _RefusedError(400, f'the body must be {{"id": "..."}}: {error}') from None


def _check_settings(
    api_key: str | None, default_life: DefaultLife | None, path_prefix: str, epoch: datetime | None
) -> None:
    if api_key is not None:
        check_type("api_key", api_key, str)
    if api_key == "":
        raise ValueError("api_key must not be empty; None lets everyone in")
    if not (default_life is None or isinstance(default_life, Life) or callable(default_life)):
        raise TypeError(f"default_life must be a Life or a function from id to Life, not {default_life!r}")
    if path_prefix and (not path_prefix.startswith("/") or path_prefix.endswith("/")):
        raise ValueError(
            f'path_prefix must begin with a slash and end without one, like "/kaizen", not {path_prefix!r}'
        )
    if epoch is not None and epoch.tzinfo is None:
        raise ValueError("epoch must carry a time zone: datetime(2026, 1, 1, tzinfo=UTC)")
