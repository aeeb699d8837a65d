"""A dashboard of executions: one client for the whole app, errors as HTTP responses, and changes as they happen.

`python demo.py` serves it against an emulator. For the real API: `KAIZEN_API_KEY=… uvicorn app:app`. It has no login:
put authentication in front of it, see README.md.
"""

import asyncio
import base64
import hashlib
import logging
import math
import os
import re
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import msgspec
from fastapi import Body, Depends, FastAPI, HTTPException, Query, Request
from fastapi import Path as UrlPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import StringConstraints
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kaizen_async import (
    AuthenticationError,
    Change,
    ClientClosedError,
    ClientStats,
    DeadlineExceededError,
    Executions,
    InstructorExecution,
    KaizenClient,
    KaizenError,
    NotFoundError,
    PollPolicy,
    StatusError,
)
from kaizen_async.events import AttemptEnded, Event

log = logging.getLogger("dashboard")


def setting(name: str, default: float) -> float:
    """Return a number from the environment."""
    return float(os.environ.get(name, default))


PAGE = Path(__file__).with_name("page.html").read_text()
LOOK_UP_SECONDS = setting("LOOK_UP_SECONDS", 5)
WATCH_SECONDS = setting("WATCH_SECONDS", 3600)
"""Seconds after which a page has to be asked again whether anybody looks at it."""
POLLS_PER_SECOND = setting("POLLS_PER_SECOND", 100)
"""Requests per second that all open pages together may cause."""
MOST_IDS = 5000
"""Executions on one page."""
MOST_STREAMS = int(setting("MOST_STREAMS", 250))
"""Open pages."""
MOST_WATCHED = int(setting("MOST_WATCHED", 20_000))
"""Executions on all open pages together."""
HOSTS = os.environ.get("ALLOWED_HOSTS", "127.0.0.1,localhost").split(",")
"""Names under which the app may be reached. Others may be another site's, pointed here to read our responses."""
DRAIN_SECONDS = 2.0
TROUBLE_SECONDS = 2.0
"""Seconds for which requests must have failed before pages show it."""
NEWS_SECONDS = 1.0
"""Seconds between two looks at whether the API can be reached."""

ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$"
"""What an id may look like. Visitors choose the ids, so do not look just anything up."""
MOST_BYTES = 1 << 20
"""Size above which a request is refused: 5,000 ids of the longest kind fit."""


class Upstream:
    """Knows whether the API can be reached: the client's `on_event`.

    A failure that concerns one execution says nothing about the others, and a single failed request is no trouble.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._reason = ""

    def __call__(self, event: Event) -> None:
        """Take note of a request that is over."""
        if not isinstance(event, AttemptEnded):
            return
        error = event.error
        if error is not None and (error.retryable or isinstance(error, AuthenticationError)):
            self._since = self._since or time.time() - event.elapsed
            self._reason = words_for(error)
        elif event.status is not None:
            self._since = None

    def state(self) -> dict[str, Any]:
        """Return since when (in milliseconds since the epoch) and why the API cannot be reached, if it cannot."""
        if self._since is None or time.time() - self._since < TROUBLE_SECONDS:
            return {"since": None, "reason": None}
        return {"since": round(self._since * 1000), "reason": self._reason}


class Places:
    """Bounds what all open pages together may watch, no matter who opens them."""

    def __init__(self) -> None:
        self._streams = 0
        self._ids = 0

    def take(self, ids: int) -> None:
        """Take a place.

        Raises:
            HTTPException: There is none.
        """
        if self._streams >= MOST_STREAMS or self._ids + ids > MOST_WATCHED:
            raise HTTPException(503, "Too many pages are open. Try again later.", {"Retry-After": "30"})
        self._streams += 1
        self._ids += ids

    def give_back(self, ids: int) -> None:
        """Give a place back."""
        self._streams -= 1
        self._ids -= ids


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open one client, and close it with the app."""
    app.state.upstream, app.state.places = Upstream(), Places()
    poll = PollPolicy(max_rate=POLLS_PER_SECOND)
    async with KaizenClient(deadline=LOOK_UP_SECONDS, poll=poll, on_event=app.state.upstream) as kaizen:
        app.state.kaizen = kaizen
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                close_on(signum, kaizen)
        yield


def close_on(signum: signal.Signals, kaizen: KaizenClient) -> None:
    """Close the client when the server receives a signal to stop, so that the streams of open pages end.

    A server waits for its responses first, and ends the lifespan after that: pages that watch would keep it for ever.
    """
    loop = asyncio.get_running_loop()
    stop_server = signal.getsignal(signum)
    closing: list[asyncio.Task[None]] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(lambda: closing.append(loop.create_task(kaizen.aclose(drain=DRAIN_SECONDS))))
        if callable(stop_server):
            stop_server(number, frame)

    signal.signal(signum, on_signal)


def hashes_of(tag: str) -> str:
    """Return the sources of a Content-Security-Policy that allow the page's own inline blocks and nothing else."""
    blocks = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", PAGE, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {hashes_of('script')}; style-src {hashes_of('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class SafeHeaders:
    """Adds the headers to every response, and refuses large requests and those that another site's page sends.

    Another page cannot read our responses. But its requests would take places, under the login of who looks at it.

    It is plain ASGI: a `BaseHTTPMiddleware` would keep streams from noticing that a page was left.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        inner: ASGIApp = self._app
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            length = headers.get("content-length", "")
            is_foreign = headers.get("sec-fetch-site", "none") not in {"same-origin", "none"}
            if is_foreign and scope["path"] != "/":
                inner = JSONResponse({"detail": "Only the dashboard's own page may ask for this."}, 403)
            elif scope["method"] == "POST" and (not length.isdecimal() or int(length) > MOST_BYTES):
                inner = JSONResponse({"detail": f"A request may have {MOST_BYTES:,} bytes."}, 413)
        await inner(scope, receive, send_with_headers)


app = FastAPI(title="Kaizen dashboard", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
app.add_middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)
app.add_middleware(SafeHeaders)


def kaizen_of(request: Request) -> KaizenClient:
    """Return the app's client."""
    kaizen: KaizenClient = request.app.state.kaizen
    return kaizen


def executions_of(kaizen: Annotated[KaizenClient, Depends(kaizen_of)]) -> Executions[InstructorExecution]:
    """Return what handlers look up with."""
    return kaizen.instructor_executions


def upstream_of(request: Request) -> Upstream:
    """Return what knows whether the API can be reached."""
    upstream: Upstream = request.app.state.upstream
    return upstream


Kaizen = Annotated[KaizenClient, Depends(kaizen_of)]
InstructorExecutions = Annotated[Executions[InstructorExecution], Depends(executions_of)]
Known = Annotated[Upstream, Depends(upstream_of)]


def status_for(error: KaizenError) -> int:
    """Return the status that tells our own callers what an error means for them.

    That the API refuses our key (401, 403) is our fault and not theirs, hence 502.
    """
    match error:
        case NotFoundError():
            return 404
        case TimeoutError():  # both DeadlineExceededError and AttemptTimeoutError are one
            return 504
        case ClientClosedError() | StatusError(status=429 | 503):
            return 503
        case _:
            return 502


def words_for(error: KaizenError) -> str:
    """Return what an error means for people. Its own text may name inner hosts; that is for the log."""
    match error:
        case NotFoundError():
            return "No execution has this id."
        case AuthenticationError():
            return "The Kaizen API refuses the key of this dashboard."
        case TimeoutError():
            return "The Kaizen API did not respond in time."
        case ClientClosedError():
            return "The dashboard is shutting down."
        case StatusError(status=429):
            return "The Kaizen API is asked too often. Try again later."
        case StatusError(status=status):
            return f"The Kaizen API responded with an error ({status})."
        case _:
            return "The Kaizen API cannot be reached, or its response cannot be read."


@app.exception_handler(KaizenError)
async def on_kaizen_error(_: Request, error: KaizenError) -> JSONResponse:
    """Respond for a lookup that failed, in whichever handler."""
    log.warning("%s", error)
    wait = getattr(error, "retry_after", None) or error.next_attempt_in
    headers = {"Retry-After": str(math.ceil(wait))} if wait else None
    return JSONResponse({"detail": f"{error.execution_id}: {words_for(error)}"}, status_for(error), headers)


@app.exception_handler(RequestValidationError)
async def on_bad_request(_: Request, error: RequestValidationError) -> JSONResponse:
    """Say what is wrong with a request, but do not repeat it: it may be a megabyte, or not even be text."""
    return JSONResponse({"detail": [{"loc": one["loc"], "msg": one["msg"]} for one in error.errors()]}, 422)


@app.get("/executions/{execution_id}")
async def read_execution(
    execution_id: Annotated[str, UrlPath(pattern=ID_PATTERN)], executions: InstructorExecutions
) -> Response:
    """Look one execution up."""
    execution = await executions.get(execution_id)
    return Response(msgspec.json.encode(execution), media_type="application/json")


Ids = list[Annotated[str, StringConstraints(pattern=ID_PATTERN)]]
Bounds = {"min_length": 1, "max_length": MOST_IDS}


def watched(request: Request, ids: Ids) -> Iterator[list[str]]:
    """Take a place for a page, and yield its ids; when the response is over, give the place back."""
    places: Places = request.app.state.places
    distinct = list(dict.fromkeys(ids))
    places.take(len(distinct))
    try:
        yield distinct
    finally:
        places.give_back(len(distinct))


def watched_by_query(request: Request, ids: Annotated[Ids, Query(alias="id", **Bounds)]) -> Iterator[list[str]]:
    """Yield the ids of `?id=exec_1&id=exec_2`."""
    yield from watched(request, ids)


def watched_by_body(request: Request, ids: Annotated[Ids, Body(embed=True, **Bounds)]) -> Iterator[list[str]]:
    """Yield the ids of `{"ids": ["exec_1", "exec_2"]}`: an address cannot hold thousands."""
    yield from watched(request, ids)


@app.get("/changes", response_class=EventSourceResponse)
async def stream_few(
    executions: InstructorExecutions, upstream: Known, ids: Annotated[list[str], Depends(watched_by_query)]
) -> AsyncIterator[ServerSentEvent]:
    """Send the events of a few executions, for an EventSource."""
    async for event in events_of(executions, upstream, ids):
        yield event


@app.post("/changes", response_class=EventSourceResponse)
async def stream_many(
    executions: InstructorExecutions, upstream: Known, ids: Annotated[list[str], Depends(watched_by_body)]
) -> AsyncIterator[ServerSentEvent]:
    """Send the events of many executions, for the page."""
    async for event in events_of(executions, upstream, ids):
        yield event


async def events_of(
    executions: Executions[InstructorExecution], upstream: Upstream, ids: list[str]
) -> AsyncIterator[ServerSentEvent]:
    """Yield the first state of each execution, every change, news about the API, and `done` when all have ended.

    Any number of viewers share the polls of an execution. A viewer who leaves ends this generator, and with it the
    watch. After `WATCH_SECONDS` it yields `expired`: nobody may be looking any more.
    """
    shown: dict[str, Any] = {}
    async with executions.watch(ids, deadline=WATCH_SECONDS) as changes:
        async for change in with_pauses(changes, NEWS_SECONDS):
            if (state := upstream.state()) != shown:
                shown = state
                yield ServerSentEvent(event="upstream", data=state)
            if change is None:
                continue
            if isinstance(change.error, ClientClosedError):
                return  # without `done`: the page comes back when the server does
            if isinstance(change.error, DeadlineExceededError):
                yield ServerSentEvent(event="expired", data=WATCH_SECONDS)
                return
            if change.error is not None:
                log.warning("%s", change.error)
            error = None if change.error is None else words_for(change.error)
            row = {"id": change.id, "execution": change.after, "error": error}
            yield ServerSentEvent(event="change", raw_data=msgspec.json.encode(row).decode())
    yield ServerSentEvent(event="done", data=len(ids))


async def with_pauses(
    changes: AsyncIterator[Change[InstructorExecution]], seconds: float
) -> AsyncIterator[Change[InstructorExecution] | None]:
    """Yield changes, and None after each pause of `seconds` without one."""
    upcoming = asyncio.ensure_future(anext(changes))
    try:
        while True:
            await asyncio.wait({upcoming}, timeout=seconds)
            if not upcoming.done():
                yield None
                continue
            try:
                change = upcoming.result()
            except StopAsyncIteration:
                return
            upcoming = asyncio.ensure_future(anext(changes))
            yield change
    finally:
        upcoming.cancel()
        await asyncio.wait({upcoming})


@app.get("/stats")
async def read_stats(kaizen: Kaizen) -> dict[str, Any]:
    """Return what the client has done and is doing."""
    stats: ClientStats = kaizen.stats()
    fields: dict[str, Any] = msgspec.to_builtins(stats)
    return fields


@app.get("/", include_in_schema=False)
async def page() -> HTMLResponse:
    """Serve the page: `/?id=exec_1&id=exec_2`, or `/#exec_1,exec_2` for thousands."""
    return HTMLResponse(PAGE)
