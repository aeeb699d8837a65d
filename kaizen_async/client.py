"""The client: what a user sets, and where the methods are."""

import math
import sys
from collections.abc import Iterable, Mapping
from ssl import SSLContext
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

import aiohttp

from kaizen_async._binding import Binding
from kaizen_async._kinds import EXECUTIONS, INSTRUCTOR_EXECUTIONS
from kaizen_async._lookup.engine import Limiter, require_limiter
from kaizen_async._transport.key import KeyFunction
from kaizen_async._transport.proxies import Proxy, environment_proxy, parse_proxy
from kaizen_async._transport.request_id import REQUEST_ID_HEADERS, RequestIds
from kaizen_async._transport.transport import may_leave_machine, own_headers, request_headers, require_session
from kaizen_async._transport.wire import Endpoint
from kaizen_async.clock import Clock, SystemClock, require_clock
from kaizen_async.config import (
    ConnectionPolicy,
    HedgePolicy,
    PollPolicy,
    RetryPolicy,
    Settings,
    require_count,
    require_duration,
    resolve_api_key,
    resolve_base_url,
    untraced,
)
from kaizen_async.events import Hook, hooks_of
from kaizen_async.executions import Executions
from kaizen_async.models import InstructorExecution, WorkflowExecution
from kaizen_async.stats import ClientStats

T = TypeVar("T")


class KaizenClient:
    """An asynchronous client for Kaizen executions.

        async with KaizenClient() as kaizen:
            execution = await kaizen.instructor_executions.get("exec_1")

    You may create it before an event loop runs, and use it in one loop after another. Without `async with`, call
    `aclose()` when you are done.

    Args:
        api_key: The client sends it as a bearer token. Unset: the client reads KAIZEN_API_KEY from the environment, and
            sends no key if that is missing too. For keys that change, pass a function or an `async def` function. The
            client calls it before the first request, and again after a 401; then it repeats the refused request once.
            The function may take up to `attempt_timeout`. If it raises, the attempt fails.
        base_url: URL of the API, with its path prefix if there is one. Unset: KAIZEN_BASE_URL, else the public API.
        concurrency: The most HTTP requests in flight at the same time, up to 100,000.
        attempt_timeout: Seconds for one HTTP request, from connecting to the last byte.
        deadline: Seconds for one lookup, from its start to its result. None: no limit, but a server that is down or
            rejects everything for five minutes ends it.
        retry: When and how often the client repeats a failed attempt.
        poll: How often waits poll an execution.
        hedge: When the client sends a slow request a second time, on another connection. None: never.
        max_response_bytes: Size of a decompressed response in bytes. The client refuses a larger one.
        connection_max_age: Age of a connection in seconds. The client sends no further request on an older one, so a
            busy client follows changes of DNS.
        connections: How long the client keeps idle connections, and how large the headers of a response may be.
        ended_records: How many records of ended executions the client remembers, so that a wait needs no request for
            them; and how many of any execution, for `get(…, max_age=…)`. 0: none.
        keep_raw: Whether a record keeps the JSON that it was decoded from, for `raw`, `extra` and `to_dict()`. False
            saves that memory, about as much as the records themselves take.
        session: An aiohttp session of yours. The client uses it with its proxy, TLS, tracing and connector settings,
            but not with its timeouts and redirects, and does not close it. Excludes `ssl_context`, `proxy` and
            `trust_env`.
        ssl_context: Replaces the default TLS settings, for instance to trust a company's own certificate authority.
        proxy: URL of an HTTP proxy, `http://user:password@host:port` or `https://…`.
        trust_env: Whether the client takes the proxy from the environment: HTTPS_PROXY or HTTP_PROXY, else ALL_PROXY,
            unless NO_PROXY names the server. The client reads the environment once, when you create it. `proxy` wins.
        allow_insecure_http: Allow a plain http base_url to another machine, or to this one through a proxy or a
            connector of the session's own.
        headers: Further headers for every request, for a gateway or a tenant. They may be secrets: errors and logs do
            not show their values.
        request_id_headers: Response headers in which the server names the request, for `outcome.request_id` and
            `error.request_id`. The first one that the response has counts.
        limiter: An async function that the client awaits before every request, for a rate that you share with others:
            `AsyncLimiter(100, 1).acquire` of aiolimiter, or one over Redis for the workers of all machines. The lookup
            holds its slot while it waits, and its deadline includes that time. The client ignores what the function
            returns. If it raises, the client sends nothing, and the lookup fails with a TransportError that has this
            cause. If it has the methods `take_now() -> bool` and `put_back()`, the client asks the first one before it
            waits, and calls the second one if it could not send the request after all.
        on_event: A function that the client calls with every event, or several functions: see `kaizen_async.events`.
            Functions whose attribute `every_lookup` is False spare the client the events of lookups whose first
            request brings the record.
        clock: Replaces real time for deadlines, timeouts, waits and back-off: see `kaizen_async.testing.VirtualClock`.

    Raises:
        TypeError, ValueError: A setting cannot work. The message says which one and why.
    """

    @untraced
    def __init__(
        self,
        api_key: str | KeyFunction | None = None,
        *,
        base_url: str | None = None,
        concurrency: int = 50,
        attempt_timeout: float = 30.0,
        deadline: float | None = 60.0,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - frozen
        poll: PollPolicy = PollPolicy(),  # noqa: B008 - frozen
        hedge: HedgePolicy | None = None,
        max_response_bytes: int = 512 * 1024,
        connection_max_age: float = 300.0,
        connections: ConnectionPolicy = ConnectionPolicy(),  # noqa: B008 - frozen
        ended_records: int = 1000,
        keep_raw: bool = True,
        session: aiohttp.ClientSession | None = None,
        ssl_context: SSLContext | None = None,
        proxy: str | None = None,
        trust_env: bool = False,
        allow_insecure_http: bool = False,
        headers: Mapping[str, str] | None = None,
        request_id_headers: Iterable[str] = REQUEST_ID_HEADERS,
        limiter: Limiter | None = None,
        on_event: Hook | Iterable[Hook] | None = None,
        clock: Clock | None = None,
    ) -> None:
        key_function: KeyFunction | None = None
        key = None
        if api_key is None or isinstance(api_key, str) or not callable(api_key):
            key = resolve_api_key(api_key)
        else:
            key_function = api_key
        has_key = key is not None or key_function is not None
        sent = request_headers(key, own_headers(headers, has_key=has_key))
        has_auth = has_key or any(name.lower() == "authorization" for name in sent)
        require_session(
            session,
            has_auth=has_auth,
            ssl_context=ssl_context,
            trust_env=trust_env,
            proxy=proxy,
        )
        settings = Settings(
            base_url=resolve_base_url(
                base_url,
                allow_insecure_http=allow_insecure_http,
                may_leave_machine=trust_env or proxy is not None or may_leave_machine(session),
            ),
            concurrency=concurrency,
            attempt_timeout=attempt_timeout,
            deadline=deadline,
            retry=retry,
            poll=poll,
            max_response_bytes=max_response_bytes,
            ended_records=ended_records,
            keep_raw=keep_raw,
            connections=connections,
            connection_max_age=connection_max_age,
            hedge=hedge,
        )
        route: Proxy | None = None
        if proxy is not None:
            route = parse_proxy(proxy, "proxy")
        elif trust_env:
            route = environment_proxy(settings.base_url)
        require_limiter(limiter)
        require_clock(clock)
        hooks = hooks_of(on_event)
        frame = sys._getframe(2)  # noqa: SLF001 - the cheap way to say in a warning where a client was made
        self._binding = Binding(
            settings,
            headers=sent,
            key_function=key_function,
            session=session,
            ssl_context=ssl_context,
            proxy=route,
            request_ids=RequestIds(request_id_headers),
            limiter=limiter,
            hooks=hooks,
            clock=clock or SystemClock(),
            created_at=f"{frame.f_code.co_filename}:{frame.f_lineno}",
        )
        self._kinds: dict[tuple[str, type, str | None], Executions[Any]] = {}
        for hook in hooks:
            # An exporter reads metrics of states, such as the number of waiting executions, whenever it collects them.
            watch_client = getattr(hook, "watch_client", None)
            if watch_client is not None:
                watch_client(self)

    @property
    def instructor_executions(self) -> Executions[InstructorExecution]:
        """Instructor executions: `POST /instructor/executions/get`."""
        kind = INSTRUCTOR_EXECUTIONS
        return self.lookups(kind.path, kind.record, unwrap=kind.unwrap)

    @property
    def executions(self) -> Executions[WorkflowExecution]:
        """Workflow executions: `POST /executions/get`. Provisional: see `WorkflowExecution`."""
        kind = EXECUTIONS
        return self.lookups(kind.path, kind.record, unwrap=kind.unwrap)

    def lookups(self, path: str, record: type[T], *, unwrap: str | None = None) -> Executions[T]:
        """Return the methods for another path of the API, or for a record type of your own.

        Equal arguments return the same object. Use it only for paths that read and change nothing, because the client
        repeats lookups and lets equal ones share a request.

        Args:
            path: Path below the base URL. The client sends `{"id": …}` there by POST.
            record: A msgspec Struct with a field `id`. One with few fields decodes faster. A field
                `raw: msgspec.Raw = msgspec.Raw()` gets the record's whole JSON. To wait, it takes a field `end_time`
                that is None until the execution has ended, or a property `is_finished`.
            unwrap: The field of the response that holds the record. None: the response is the record.

        Raises:
            TypeError, ValueError: The path leads away from `base_url`, or the record has no field `id`.
        """
        key = (path, record, unwrap)
        known: Executions[T] | None = self._kinds.get(key)
        if known is None:
            endpoint = Endpoint(path, record, unwrap, keep_raw=self._binding.settings.keep_raw)
            endpoint.url_below(self._binding.settings.base_url)
            known = self._kinds[key] = Executions(self._binding, endpoint)
        return known

    def stats(self) -> ClientStats:
        """Return a snapshot of what the client has done and is doing. It is cheap, and no history is kept."""
        return self._binding.stats()

    async def warm_up(self, connections: int) -> None:
        """Open connections to the server before they are needed, so that a burst of lookups does not wait for them.

        The client closes idle connections after `ConnectionPolicy.idle_seconds`. With a session of yours that does
        more than send, for instance tracing, this method does nothing: such a session opens connections on demand.

        Args:
            connections: How many connections to open. The client opens no more than `concurrency`.

        Raises:
            TypeError, ValueError: `connections` is not a positive whole number.
            TransportError: No connection could be opened. Not retried.
            DeadlineExceededError: The connections were not open within the client's `deadline`.
            ClientClosedError: The client is closed.
        """
        require_count("connections", connections)
        settings = self._binding.settings
        await self._binding.engine_here().warm_up(
            settings.base_url, min(connections, settings.concurrency), settings.deadline
        )

    async def aclose(self, *, drain: float = 0.0) -> None:
        """Close the client: refuse new calls, end all waits, and end requests in flight after `drain` seconds.

        Every caller that waits for a result gets the result or a ClientClosedError. No task is cancelled. A second
        call is safe.

        Args:
            drain: Seconds that requests in flight have to finish. math.inf: as long as they take.

        Raises:
            TypeError, ValueError: `drain` is not a number of seconds. The client stays open.
            RuntimeError: The client is in use in another event loop.
        """
        if drain != math.inf:
            require_duration("drain", drain, zero_allowed=True)
        await self._binding.close(drain)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        if not hasattr(self, "_binding"):
            return "<KaizenClient not constructed: an argument was refused>"
        return f"<KaizenClient {self._binding.settings.base_url} {'closed' if self._binding.closed else 'open'}>"

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled."""
        self._binding.__reduce__()
