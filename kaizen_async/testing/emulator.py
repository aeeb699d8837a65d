"""The emulator: an HTTP server on this machine that follows the API's contract, plays lives, and fails on demand."""

import asyncio
import inspect
import json
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from ssl import SSLContext
from types import TracebackType
from typing import Annotated, Any, Final, NamedTuple, Self, TypeAlias, cast
from weakref import WeakSet

import msgspec
from aiohttp import web
from multidict import CIMultiDict

from kaizen_async._transport import response as received
from kaizen_async._transport.head import Head
from kaizen_async.testing.chance import fraction
from kaizen_async.testing.checks import (
    LATEST,
    MOST_ID_CHARACTERS,
    check_count,
    check_epoch,
    check_id,
    check_number,
    check_type,
)
from kaizen_async.testing.clock import VirtualClock
from kaizen_async.testing.fault_plan import FaultPlan
from kaizen_async.testing.faults import JSON_HEADERS, Answer, Exchange, Fault
from kaizen_async.testing.history import History, Request, masked
from kaizen_async.testing.hold import Hold
from kaizen_async.testing.hosts import HostCheck, is_host, reachable
from kaizen_async.testing.lives import Life
from kaizen_async.testing.loop_thread import LoopThread
from kaizen_async.testing.openapi import description
from kaizen_async.testing.rate_limit import TokenBucket
from kaizen_async.testing.recording import replies_in
from kaizen_async.testing.records import SERVED, Changes, Record, ServedKind, Snapshot, digest_of, encode
from kaizen_async.testing.served import Served, finder, record_of
from kaizen_async.testing.server import LoopbackServer

DefaultLife: TypeAlias = Life | Callable[[str], Life | Answer | None]

_LOOK_AGAIN: Final = 0.002
_MOST_IDS: Final = 1_000_000
"""Ids that the emulator keeps something about. No test asks for more, and a foreign program may not."""
_MOST_ERRORS: Final = 100
_MOST_BODY: Final = 65_536
_WRONG_SCRIPT: Final = 501


class ScriptError(AssertionError):
    """Raised when a block with an emulator ends whose script was wrong, or was not followed in strict mode."""


class KaizenEmulator:
    """A server that plays the Kaizen API on your own machine.

    `async with KaizenEmulator() as emulator:` serves in the running loop; `with KaizenEmulator() as emulator:` in a
    thread of its own, for code that blocks or runs loops of its own. Point the client at `emulator.base_url`. All but
    the coroutine methods may be called at any time and from any thread, whether it serves or not.

    `POST /instructor/executions/get` responds as the reference of the API says: 200 with a record, every documented
    field made up from the id and the seed; 401 if there is a key and the request lacks it; 404 for an id that does not
    exist. Other requests get 400, 404, 405, 413, 415, or 421 for a foreign host. `POST /executions/get` serves
    the same ids as workflow executions, as far as these are known; those never have an end time, unless you `add`
    one with `record=`. `GET /health` and `GET /openapi.json` need no key, and no count includes them.

    A script that is wrong (a function that raises, or returns something else than it should) does not look like an
    error of the server: it is collected in `errors`, and leaving the block raises a `ScriptError`.

    Args:
        api_key: The key that requests must carry as a bearer token; None lets everyone in.
        seed: What records and random faults are drawn from: the same seed, the same run.
        default_life: The life of ids that were not added, begun by the first request for them: one for all, or a
            function of the id, which returns None if the id is not to exist, or an `Answer` in place of a record.
        host: The address to listen on.
        port: The port to listen on; 0 takes a free one, which then stays the same over `stop` and `start`.
        path_prefix: What stands before the API's paths, as behind a gateway: `"/kaizen"`.
        clock: The `VirtualClock` of the client; or a function that returns seconds, to move time by hand. Time that
            goes back is ignored.
        epoch: The date and time of the records as the emulator is made, with a time zone. Defaults to that of the
            clock, or the present.
        tls: Whether to serve https, with a certificate made for this emulator. Give `emulator.ssl_context` to the
            client. Takes the extra `testing`.
        strict: Whether leaving the block also raises if a request was for an id or path that does not exist, or a
            scripted fault was never met.
        allowed_hosts: Host names that requests may use beside those that point here anyway; `["*"]` for all.

    Attributes:
        faults: What goes wrong, and when.
        errors: What was wrong with scripts so far; at most 100 are kept.
        max_in_flight: The most requests that were in progress at the same time.

    Raises:
        TypeError, ValueError: An argument cannot work; the message says which and why.
        ImportError: `tls` without the extra `testing`.
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
        clock: VirtualClock | Callable[[], float] = time.monotonic,
        epoch: datetime | None = None,
        tls: bool = False,
        strict: bool = False,
        allowed_hosts: Collection[str] = (),
    ) -> None:
        _check_settings(api_key, seed, default_life, host, port, path_prefix, clock, allowed_hosts)
        check_epoch(epoch)
        check_type("tls", tls, bool)
        check_type("strict", strict, bool)
        # `clock.time` of a VirtualClock is as good as the clock itself.
        owner = getattr(clock, "__self__", clock)
        self._virtual = owner if isinstance(owner, VirtualClock) else None
        self._read_clock: Callable[[], float] = clock.time if isinstance(clock, VirtualClock) else clock
        self._latest = -float("inf")
        if epoch is None and self._virtual is not None:
            epoch = self._virtual.epoch + timedelta(seconds=self._virtual.time())
        self._zero = (epoch or datetime.now(UTC)).astimezone(UTC) - timedelta(seconds=self._now())
        self.faults = FaultPlan(seed, self.now)
        self.errors: list[ScriptError] = []
        self.max_in_flight = 0
        self._authorization = None if api_key is None else f"Bearer {api_key}"
        self._seed = seed
        self._default_life = default_life
        self._settled_life = default_life
        self._prefix = path_prefix
        self._strict = strict
        self._hosts = HostCheck(host, allowed_hosts)
        self._executions: dict[str, _Execution] = {}
        self._served: dict[str, _OwnKind] = {}
        self._replayed: dict[str, dict[str, deque[Answer]]] = {}
        self._history = History()
        self._bucket: TokenBucket | None = None
        self._in_flight = 0
        self._lock = threading.Lock()
        self._masked: tuple[object, dict[str, str]] = (None, {})
        self._wired: dict[str, deque[Hold]] = {}
        self._played: WeakSet[web.StreamResponse] = WeakSet()
        self._server = LoopbackServer(self._handle, host, port, tls=tls)
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
            record: Fields in place of the made-up ones, and further ones, by their names in JSON.
            without: Names of fields to be left out.
            body: The whole body of the response, JSON or not.
        """
        check_id(execution_id)
        begun = Life.ended() if life is None else life
        check_type("life", begun, Life, "make one such as Life.lasting(60)")
        changes = Changes.checked(workflow, record, without, body)
        self._executions[execution_id] = self._born(execution_id, begun, changes)

    def add_many(self, execution_ids: Iterable[str], life: Life | None = None) -> None:
        """Let many executions begin the same life now."""
        if isinstance(execution_ids, str):
            raise TypeError("add_many takes many ids; add() takes a single one")
        for execution_id in execution_ids:
            self.add(execution_id, life)

    def accept_any(self, life: DefaultLife | None = None) -> None:
        """Let every id exist from its first request on: with this life, the life that a function returns, or ended."""
        _check_default_life(life)
        self._default_life = Life.ended() if life is None else life

    def remove(self, execution_id: str) -> None:
        """Forget an execution, so that its id is not found, unless there is a default life.

        Raises:
            KeyError: The emulator does not know the execution.
        """
        if self._executions.pop(execution_id, None) is None:
            raise KeyError(
                f"there is no execution {execution_id!r} to remove; those that exist: {_few(self._executions)}"
            )

    def finish(self, execution_id: str, status: str = "Completed") -> None:
        """End an execution now with a status, whatever its life was to be.

        Raises:
            KeyError: The emulator does not know the execution.
        """
        execution = self._executions.get(execution_id)
        if execution is None:
            raise KeyError(
                f"there is no execution {execution_id!r} to finish; those that exist: {_few(self._executions)}"
            )
        age = self._age(execution)
        execution.life = execution.life.finished_at(age, status)

    def executions(self) -> dict[str, str]:
        """Return the ids of all executions that exist, with their present statuses."""
        return {
            execution_id: execution.life.status_at(self._age(execution))
            for execution_id, execution in list(self._executions.items())
        }

    def serve(self, path: str, records: Served, *, unwrap: str | None = None) -> None:
        """Serve another kind of lookup, for `client.lookups(path, MyStruct)`.

        Args:
            path: Its path below the base URL, such as `"invoices/get"`.
            records: One record, which is found by its field `id`, or by any id if it has none; or records by id; or a
                `Life`, whose record has the fields id, status, startTime, endTime, durationMs and those that its steps
                set; or a function from an id to a record, Life or `Answer`, or None if the id does not exist.
            unwrap: The field of the response that holds the record, as for `client.lookups`.
        """
        check_type("path", path, str)
        if not path.strip("/"):
            raise ValueError('path must name a kind of lookup, such as "invoices/get"')
        self._served["/" + path.strip("/")] = _OwnKind(finder(records), unwrap)

    def replay(self, file: str | Path) -> None:
        """Replay a file that `Recorder` has written: each request for an id gets the next recorded response.

        The last response for an id is repeated. Ids that are not in the file get what they would get without it.

        Raises:
            OSError, ValueError: The file cannot be read, or is not a recording.
        """
        for path, execution_id, answer in replies_in(Path(file)):
            self._replayed.setdefault(path, {}).setdefault(execution_id, deque()).append(answer)

    def rate_limit(self, rate: float | None = 100.0, burst: int = 20, retry_after: float | None = 1.0) -> None:
        """Send a 429 to what exceeds a rate.

        Args:
            rate: Lookups per second that pass; None lifts the limit.
            burst: How many may pass at once after a rest.
            retry_after: The seconds of the header Retry-After; None sends none.
        """
        self._bucket = None if rate is None else TokenBucket(rate, burst, retry_after, self._now)

    def reset(self) -> None:
        """Forget everything but the settings: executions, kinds, faults, rate limit, requests, errors.

        For one emulator that serves several tests, or several examples of a property test.
        """
        with self._lock:
            self._executions.clear()
            self._served.clear()
            self._replayed.clear()
            self._wired.clear()
            self._history = History()
            self._bucket = None
            self._default_life = self._settled_life
            self.faults.reset()
            self.errors.clear()
            self.max_in_flight = self._in_flight

    @property
    def base_url(self) -> str:
        """Where clients on this machine find the API: `http://127.0.0.1:PORT/`."""
        return f"{self._origin()}{self._prefix}/"

    @property
    def ssl_context(self) -> SSLContext:
        """What a client needs to trust an emulator with `tls=True`."""
        return self._server.client_context()

    @property
    def open_connections(self) -> int:
        """How many connections are open now."""
        return len(self._server.connections)

    @property
    def requests(self) -> list[Request]:
        """The latest 10,000 requests, in the order in which they came."""
        return list(self._history.requests)

    @property
    def request_count(self) -> int:
        """Requests that came in."""
        return self._history.count

    @property
    def answers(self) -> Mapping[int, int]:
        """How often each status was sent. Requests that were hung, reset or cut off are not in it."""
        return self._history.statuses

    def requests_for(self, execution_id: str) -> int:
        """Return how many lookups of this id came in."""
        return self._history.by_id[execution_id]

    def assert_called(
        self, execution_id: str | None = None, *, times: int | None = None, path: str | None = None
    ) -> None:
        """Fail unless requests came in: for an id, to a path, `times` times; without `times`, at least one.

        Raises:
            AssertionError: They did not; the message lists the latest requests.
        """
        complaint = self._history.complaint(execution_id, path, times)
        if complaint is not None:
            raise AssertionError(complaint)

    async def wait_for_request(
        self, execution_id: str | None = None, *, times: int = 1, path: str | None = None, within: float = 5.0
    ) -> Request:
        """Wait until `times` requests have come in, for an id or to a path, and return the latest of them.

        Raises:
            TimeoutError: They have not within `within` real seconds; the message lists the latest requests.
        """
        check_count("times", times)
        deadline = time.monotonic() + within
        while self._history.matching(execution_id, path) < times:
            if time.monotonic() >= deadline:
                complaint = self._history.complaint(execution_id, path, times)
                raise TimeoutError(f"after {within} seconds: {complaint}")
            await asyncio.sleep(_LOOK_AGAIN)
        wanted = None if path is None else "/" + path.strip("/")
        return next(
            request
            for request in reversed(self.requests)
            if execution_id in {None, request.id} and wanted in {None, request.path}
        )

    def now(self) -> datetime:
        """Return the date and time by the emulator's clock."""
        return self._moment(self._now())

    async def start(self) -> None:
        """Begin to serve, on the same port as before; lives have continued."""
        await self._at_home(self._server.start)
        self._register()

    async def stop(self) -> None:
        """Close the port and all connections at once, without waiting. From then on connections are refused."""
        self._unregister()
        await self._at_home(partial(self._server.stop, keep_port=True))

    async def until_quiet(self, within: float = 5.0) -> None:
        """Wait until no connection is open, for a test that nothing was leaked.

        The last bytes of a client that has closed may still be on their way, so a look at `open_connections` right
        after may come too early.

        Raises:
            TimeoutError: Some still are after `within` real seconds.
        """
        deadline = time.monotonic() + within
        while self.open_connections:
            if time.monotonic() >= deadline:
                busy = f"{self.open_connections} connections are open, {self._in_flight} requests in progress"
                raise TimeoutError(f"after {within} seconds {busy}")
            await asyncio.sleep(_LOOK_AGAIN)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._unregister()
        await self._server.stop(keep_port=False)
        self._raise_errors(error)

    def __enter__(self) -> Self:
        thread = LoopThread()
        with ExitStack() as ending:
            ending.callback(thread.close)
            thread.run(self._server.start)
            ending.callback(thread.run, partial(self._server.stop, keep_port=False))
            self._thread, self._thread_ending = thread, ending.pop_all()
        self._register()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._unregister()
        self._thread = None
        self._thread_ending.close()
        self._raise_errors(error)

    def _raise_errors(self, error: BaseException | None) -> None:
        """Raise what was wrong with the script. It is what made a test fail, if that fails too; see `__context__`."""
        if self._strict:
            for unused in self.faults.unused():
                self._complain(f"a scripted fault was never met: {unused}")
        if self.errors and (error is None or isinstance(error, Exception)):
            first, *more = self.errors
            if more:
                first.add_note(f"and {len(more)} more, in emulator.errors: {more[0]}")
            raise first

    def _complain(self, text: str, cause: BaseException | None = None) -> ScriptError:
        complaint = ScriptError(text)
        complaint.__cause__ = cause
        if len(self.errors) < _MOST_ERRORS:
            self.errors.append(complaint)
        return complaint

    def _origin(self) -> str:
        if not self._server.port:
            raise RuntimeError("the emulator has no port yet; start it: `async with KaizenEmulator() as emulator:`")
        host = reachable(self._server.host)
        return f"{self._server.scheme}://{f'[{host}]' if ':' in host else host}:{self._server.port}"

    def _register(self) -> None:
        if self._virtual is not None:
            self._virtual.register(self._server.host, self._server.port, self)

    def _unregister(self) -> None:
        if self._virtual is not None:
            self._virtual.register(self._server.host, self._server.port, None)

    async def _at_home(self, operation: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run an operation in the loop that serves, whichever loop asks for it."""
        if self._thread is None:
            await operation()
        else:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(operation(), self._thread.loop))

    def _now(self) -> float:
        """Return the seconds of the clock. One that is moved by hand and goes back stands still until it catches up."""
        self._latest = max(self._latest, self._read_clock())
        return self._latest

    def _moment(self, at: float) -> datetime:
        return self._zero + timedelta(seconds=at)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Respond to a request that came over a connection."""
        if not self._hosts.accepts_all(request):
            return Answer.message(421, "this Host header names another server; see allowed_hosts").response()
        path = self._below_prefix(request.path)
        if request.method == "GET" and path is not None and path in _ABOUT:
            return Answer(200, json.dumps(_ABOUT[path](self)).encode()).response()
        seen = self._arrived(request.method, path or request.path, masked(request.headers.items()))
        try:
            reply = await self._answer_request(request, path, seen)
            seen.status = reply.status
            self._history.statuses[reply.status] += 1
            return reply.response() if isinstance(reply, Answer) else reply
        finally:
            self._left()

    def offer(self, path: str, headers: Mapping[str, str], body: bytes) -> received.Offer | None:
        """Return the record that a lookup of a client in this process gets at once.

        Returns:
            The response, and what sends the request. None if the request would get anything but its record, or if
            anything is scripted that depends on the number of requests.
        """
        below = self._below_prefix(path) or ""
        kind = SERVED.get(below)
        is_plain = not (self.faults or self._bucket or below in self._served or below in self._replayed)
        if kind is None or not is_plain or not self._is_welcome(headers):
            return None
        try:
            execution_id = _id_asked_for(body)
            known = self._known(kind, below, execution_id)
        except (_RefusedError, _WrongScriptError):
            return None
        if known is None or len(self._history.by_id) >= _MOST_IDS:
            return None
        return received.Offer(known.response, partial(self._take, below, headers, execution_id, body))

    def _is_welcome(self, headers: Mapping[str, str]) -> bool:
        """Return whether a request of this process has the key, and no connection is needed."""
        has_key = self._authorization is None or headers.get("Authorization") == self._authorization
        is_json = headers.get("Content-Type") == "application/json"
        return has_key and is_json and self._server.scheme == "http"

    def _take(self, path: str, headers: Mapping[str, str], execution_id: str, body: bytes) -> None:
        """Note a request that gets its record at once."""
        seen = Request("POST", path, self._masked_once(headers), self._now(), self._moment, len(body))
        seen.note(execution_id, body)
        seen.status = 200
        with self._lock:
            self._history.note(seen)
            self._history.statuses[200] += 1
            self._history.by_id[execution_id] += 1
            self.faults.note_request()
            self.max_in_flight = max(self.max_in_flight, self._in_flight + 1)

    async def deliver(
        self, path: str, headers: Mapping[str, str], body: bytes, hold: Hold, *, by_wire: bool
    ) -> received.Answer | None:
        """Return the response to a request of a client in this process; None if it needs a connection."""
        try:
            execution_id = _id_asked_for(body)
        except _RefusedError:
            execution_id = ""  # no fault is for it, and it gets a 400
        if (
            by_wire
            or self._server.scheme == "https"
            or self.faults.needs_connection(execution_id, self.requests_for(execution_id) + 1)
        ):
            self._wired.setdefault(execution_id, deque()).append(hold)
            return None
        seen, asked = self._delivered(path, headers, body)
        try:
            if isinstance(asked, Answer):
                return self._sent(seen, asked)
            reply = await self._answer_lookup(asked[0], execution_id, body, seen, hold, None)
        finally:
            self._left()
        assert isinstance(reply, Answer)  # noqa: S101 - what does not need a connection makes no stream
        return self._sent(seen, reply)

    def _delivered(
        self, path: str, headers: Mapping[str, str], body: bytes
    ) -> "tuple[Request, Answer | tuple[ServedKind | _OwnKind, str]]":
        """Note a request of this process; return its kind and id, or why it is refused."""
        below = self._below_prefix(path)
        seen = self._arrived("POST", below or path, self._masked_once(headers), len(body))
        try:
            kind = self._kind_asked_for(seen, below, headers.get("Content-Type", ""), headers.get("Authorization"))
            return seen, (kind, _id_asked_for(body))
        except _RefusedError as refused:
            return seen, refused.answer

    def _sent(self, seen: Request, answer: Answer) -> received.Answer:
        """Note the response to a request of this process, and return it as the client's transport does."""
        seen.status = answer.status
        self._history.statuses[answer.status] += 1
        headers = _JSON if answer.headers is JSON_HEADERS else CIMultiDict(answer.headers)
        return received.Answer(answer.status, headers, answer.body)

    def _below_prefix(self, path: str) -> str | None:
        """Return a path without the prefix; None for one that does not begin with it."""
        return path.removeprefix(self._prefix) if path.startswith(self._prefix) else None

    def _masked_once(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Return a client's headers without its key; a client sends the same ones again and again."""
        if self._masked[0] is not headers:
            host = self._origin().partition("//")[2]
            self._masked = headers, {"Host": host, **masked(headers.items())}
        return self._masked[1]

    def _arrived(self, method: str, path: str, headers: dict[str, str], length: int | None = None) -> Request:
        seen = Request(method, path, headers, self._now(), self._moment, length)
        with self._lock:
            self._history.note(seen)
            self._in_flight += 1
            self.max_in_flight = max(self.max_in_flight, self._in_flight)
        return seen

    def _left(self) -> None:
        with self._lock:
            self._in_flight -= 1

    async def _answer_request(
        self, request: web.BaseRequest, path: str | None, seen: Request
    ) -> Answer | web.StreamResponse:
        try:
            kind = self._kind_asked_for(seen, path, request.content_type, request.headers.get("Authorization"))
            body = await _body_of(request)
            execution_id = _id_asked_for(body)
        except _RefusedError as refused:
            return refused.answer
        return await self._answer_lookup(kind, execution_id, body, seen, self._hold_of(execution_id), request)

    def _hold_of(self, execution_id: str) -> Hold | None:
        """Return the hold of a client of this process whose request has come over a connection."""
        holds = self._wired.get(execution_id) or deque()
        while holds:
            hold = holds.popleft()
            if not hold.is_over:  # or else the request never got here
                return hold
        return None

    def _kind_asked_for(
        self, seen: Request, path: str | None, content_type: str, authorization: str | None
    ) -> "ServedKind | _OwnKind":
        kind = None if path is None else self._served.get(path) or SERVED.get(path)
        if kind is None and path not in self._replayed:
            if self._strict:
                self._complain(f"a request came in for {seen.path}, which is not served")
            raise _RefusedError(404, f"there is no {seen.path if path is None else self._prefix + path}")
        if seen.method != "POST":
            raise _RefusedError(405, f"{path} takes POST, not {seen.method}", {"Allow": "POST"})
        # Before anything is kept about the request: a stranger must not fill the memory.
        if self._authorization is not None and authorization != self._authorization:
            raise _RefusedError(401, "the API key is missing or wrong")
        if content_type != "application/json":
            raise _RefusedError(415, f"the body must be application/json, not {content_type}")
        return kind or _OwnKind(lambda _: None, None)

    async def _answer_lookup(
        self,
        kind: "ServedKind | _OwnKind",
        execution_id: str,
        body: bytes,
        seen: Request,
        hold: Hold | None,
        request: web.BaseRequest | None,
    ) -> Answer | web.StreamResponse:
        """Return what a lookup gets: the response of a fault, or the ordinary one."""
        try:
            number, due = self._count(seen, execution_id, body)
            default = self._begin_default_life(execution_id)
            ordinary = partial(self._ordinary_answer, kind, seen.path, execution_id, default)
            if due:
                draw = partial(self._draw, execution_id, number)
                let_go = _do_nothing if hold is None else hold.let_go
                sleep = partial(self._sleep, hold)
                exchange = Exchange(execution_id, number, ordinary, draw, sleep, let_go, request)
                for fault in due:
                    reply = await _checked_play(exchange, fault, self._played)
                    if reply is not None:
                        return reply
            return ordinary()
        except (_RefusedError, _WrongScriptError) as error:
            return self._answer_to(error, execution_id)

    def _count(self, seen: Request, execution_id: str, body: bytes) -> tuple[int, list[Fault]]:
        """Note what a request asks for; return how many there were for that id, and the faults that are due."""
        seen.note(execution_id, body)
        with self._lock:
            counts = self._history.by_id
            if len(counts) >= _MOST_IDS and execution_id not in counts:
                raise _RefusedError(507, f"this emulator keeps no more than {_MOST_IDS:,} ids; reset() forgets them")
            number = counts[execution_id] = counts[execution_id] + 1
            return number, self.faults.due(execution_id, number)

    def _answer_to(self, error: "_RefusedError | _WrongScriptError", execution_id: str) -> Answer:
        if isinstance(error, _RefusedError):
            return error.answer
        complaint = self._complain(f"{error} (asked for {execution_id!r})", error.__cause__)
        return Answer.message(_WRONG_SCRIPT, f"the script of the emulator is wrong: {complaint}")

    async def _sleep(self, hold: Hold | None, seconds: float) -> None:
        """Wait in the time that the client lives in."""
        if self._virtual is None:
            await asyncio.sleep(seconds)
        elif hold is None:
            await self._virtual.sleep(seconds)
        else:
            hold.let_go()
            try:
                await self._virtual.sleep(seconds)
            finally:
                hold.take_back()

    def _draw(self, execution_id: str, number: int, what: str) -> float:
        return fraction(self._seed, what, execution_id, number)

    def _begin_default_life(self, execution_id: str) -> Answer | None:
        """Let an execution begin its life if it does not exist; return the response that it gets instead, if any."""
        given = self._default_life
        if given is None or execution_id in self._executions:
            return None
        life = given if isinstance(given, Life) else _called("default_life", given, execution_id)
        if isinstance(life, Life):
            self._executions[execution_id] = self._born(execution_id, life, None)
        elif isinstance(life, Answer):
            return life
        elif life is not None:
            raise _WrongScriptError(
                f"default_life must return a Life such as Life.lasting(60), an Answer or None, not {life!r:.100}"
            )
        return None

    def _born(self, execution_id: str, life: Life, changes: Changes | None) -> "_Execution":
        return _Execution(life, self._now(), digest_of(f"{self._seed} {execution_id}"), changes)

    def _age(self, execution: "_Execution") -> float:
        # Rounded, so that a clock moved by exactly the seconds of a step does reach it.
        return round(self._now() - execution.born + execution.life.age, 6)

    def _ordinary_answer(
        self, kind: "ServedKind | _OwnKind", path: str, execution_id: str, default: Answer | None
    ) -> Answer:
        bucket = self._bucket
        if bucket is not None and not bucket.take():
            return Answer.message(429, headers=bucket.headers())
        recorded = self._replayed.get(path, {}).get(execution_id)
        if recorded:
            return recorded.popleft() if len(recorded) > 1 else recorded[0]
        if isinstance(kind, _OwnKind):
            answer = self._own_answer(kind, execution_id)
        elif default is not None:
            answer = default
        else:
            known = self._known(kind, path, execution_id)
            answer = None if known is None else Answer(200, known.response.answer.body)
        if answer is not None:
            return answer
        if self._strict:
            self._complain(f"a request came in for {execution_id!r}, which does not exist")
        return Answer.message(404, f"there is no execution {execution_id!r}")

    def _known(self, kind: ServedKind, path: str, execution_id: str) -> "_Known | None":
        """Return the present record of an execution, encoded; None if the execution does not exist."""
        execution = self._executions.get(execution_id)
        if execution is None:
            return None
        age, known = self._age(execution), execution.known
        if known is None or known.path != path or known.life is not execution.life or age >= known.until:
            life, start = execution.life, self._start_of(execution)
            snapshot = Snapshot.of(execution_id, life, digest=execution.digest, start=start, age=age)
            try:
                body = kind.encode(snapshot, execution.changes)
            except Exception as error:  # an OverflowError or a RecursionError, for example
                raise _WrongScriptError(f"a field that the life sets does not fit into JSON: {error}") from error
            response = received.Inside(received.Answer(200, _OK_HEAD, body))
            known = execution.known = _Known(path, life, life.changes_after(age), response)
        return known

    def _own_answer(self, kind: "_OwnKind", execution_id: str) -> Answer | None:
        found = _called("serve", kind.find, execution_id)
        if isinstance(found, Life):
            execution = kind.lives.get(execution_id)
            if execution is None or execution.life != found:
                execution = kind.lives[execution_id] = self._born(execution_id, found, None)
            found = record_of(execution_id, found, self._start_of(execution), self._age(execution))
        if found is None or isinstance(found, Answer):
            return found
        if not isinstance(found, Mapping):
            raise _WrongScriptError(f"what is served must be a record, a Life, an Answer or None, not {found!r:.100}")
        record: Record = {"id": execution_id, **found}
        try:
            return Answer(200, encode(record, kind.wrap))
        except Exception as error:  # an OverflowError or a RecursionError, for example
            raise _WrongScriptError(f"what is served does not fit into JSON: {error}") from error

    def _start_of(self, execution: "_Execution") -> datetime:
        return self._zero + timedelta(milliseconds=round((execution.born - execution.life.age) * 1000))


@dataclass(slots=True)
class _Execution:
    life: Life
    born: float
    digest: str
    changes: Changes | None
    known: "_Known | None" = None


class _Known(NamedTuple):
    """The record that was sent last: between two steps of its life, a record stays the same."""

    path: str
    life: Life
    until: float
    response: received.Inside


@dataclass(frozen=True, slots=True)
class _OwnKind:
    find: Callable[[str], Mapping[str, Any] | Life | Answer | None]
    wrap: str | None
    lives: dict[str, _Execution] = field(default_factory=dict[str, _Execution])


class _RefusedError(Exception):
    def __init__(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.answer = Answer.message(status, text, headers)


class _WrongScriptError(Exception):
    """A script is wrong; its text says how."""


class _Question(msgspec.Struct):
    id: Annotated[str, msgspec.Meta(min_length=1, max_length=MOST_ID_CHARACTERS)]


_JSON: Final = CIMultiDict(JSON_HEADERS)
_OK_HEAD: Final = Head(b"HTTP/1.1 200 OK\r\nContent-Type: application/json", 200, 0, "")
_decode_question: Final = msgspec.json.Decoder(_Question).decode

_ABOUT: Final[Mapping[str, Callable[[KaizenEmulator], Any]]] = {
    "/health": lambda _: {"status": "ok"},
    "/openapi.json": lambda emulator: description(emulator._prefix, emulator._served),  # noqa: SLF001 - one file
}
"""What the emulator says about itself."""


def _called(name: str, function: Callable[[str], Any], execution_id: str) -> Any:
    """Return what a function of a script returns for an id."""
    try:
        returned = function(execution_id)
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # what pytest.fail and sys.exit raise is no Exception
        raise _WrongScriptError(f"the function given to {name} raised {type(error).__name__}: {error}") from error
    if inspect.iscoroutine(returned):
        returned.close()
        raise _WrongScriptError(f"the function given to {name} must be a plain one, not `async def`")
    return returned


async def _checked_play(
    exchange: Exchange, fault: Fault, played_before: WeakSet[web.StreamResponse]
) -> Answer | web.StreamResponse | None:
    """Let a fault play, and refuse what is not a response, or was sent before."""
    task = asyncio.current_task()
    try:
        played: object = await exchange.meet(fault)
    except (KeyboardInterrupt, GeneratorExit, _WrongScriptError):
        raise
    except BaseException as error:  # what pytest.fail and sys.exit raise is no Exception
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise
        advice = "; make it `async def`" if not inspect.iscoroutinefunction(fault.play) else ""
        raise _WrongScriptError(f"the fault {fault.name} raised {type(error).__name__}: {error}{advice}") from error
    if played is None or isinstance(played, Answer):
        return played
    if isinstance(played, web.StreamResponse):
        if played in played_before:
            raise _WrongScriptError(f"the fault {fault.name} must return a new response for each request")
        played_before.add(played)
        return played
    raise _WrongScriptError(
        f"the fault {fault.name} must return an Answer, a response of aiohttp or None, not {played!r:.100}"
    )


def _do_nothing() -> None:
    """Do nothing: no client holds the clock."""


async def _body_of(request: web.BaseRequest) -> bytes:
    try:
        body = await request.read()
    except web.HTTPRequestEntityTooLarge:
        body = None
    if body is None or len(body) > _MOST_BODY:
        raise _RefusedError(413, f"a body that asks for one id has at most {_MOST_BODY} bytes")
    return body


def _id_asked_for(body: bytes) -> str:
    try:
        return _decode_question(body).id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _RefusedError(400, f'the body must be {{"id": "..."}}: {error}') from None


def _few(ids: Iterable[str]) -> str:
    shown = list(ids)
    return ", ".join(map(repr, shown[:5])) + ", …" * (len(shown) > 5) if shown else "none"  # noqa: PLR2004 - a line's worth


def _check_default_life(default_life: object) -> None:
    if not (default_life is None or isinstance(default_life, Life) or callable(default_life)):
        raise TypeError(f"default_life must be a Life or a function from id to Life, not {default_life!r}")


def _check_settings(
    api_key: object,
    seed: object,
    default_life: object,
    host: object,
    port: object,
    path_prefix: str,
    clock: object,
    allowed_hosts: object,
) -> None:
    if api_key is not None:
        check_type("api_key", api_key, str)
        if not re.fullmatch(r"[\x20-\x7e]+", str(api_key)):
            raise ValueError("api_key must not be empty and must be printable ASCII; None lets everyone in")
    check_type("seed", seed, int)
    _check_default_life(default_life)
    check_type("host", host, str, 'give an address such as "127.0.0.1"')
    if not is_host(str(host)):
        raise ValueError(f'host must be an address such as "127.0.0.1", without scheme and port, not {host!r}')
    check_type("port", port, int)
    check_number("port", port, 0, 65535, "0 takes a free one")
    check_type("path_prefix", path_prefix, str)
    if path_prefix and (not path_prefix.startswith("/") or path_prefix.endswith("/")):
        raise ValueError(
            f'path_prefix must begin with a slash and end without one, like "/kaizen", not {path_prefix!r}'
        )
    _check_clock(clock)
    if not isinstance(allowed_hosts, (list, tuple, set, frozenset)):
        raise TypeError(f'allowed_hosts takes a list of host names such as ["emulator"], not {allowed_hosts!r:.100}')
    for name in cast("Collection[object]", allowed_hosts):
        check_type("each of allowed_hosts", name, str)


def _check_clock(clock: object) -> None:
    if isinstance(clock, VirtualClock):
        return
    if not callable(clock) or isinstance(clock, type):
        raise TypeError(f"clock must be a VirtualClock() or a function that returns seconds, not {clock!r:.100}")
    try:
        read = clock()
    except Exception as error:
        raise TypeError(
            f"clock must return seconds when it is called without arguments; it raised {error!r}"
        ) from error
    if inspect.iscoroutine(read):
        read.close()
    if not isinstance(read, (int, float)) or isinstance(read, bool):
        raise TypeError(f"clock must return a number of seconds, not {read!r:.100}")
    if not abs(read) <= LATEST:
        raise ValueError(f"clock must return seconds from -{LATEST:g} to {LATEST:g}, not {read!r}")
