"""A dashboard of executions: one client for the whole app, errors as HTTP answers, and changes as they happen.

`python demo.py` serves it against an emulator. For the real API: `KAIZEN_API_KEY=… uvicorn app:app`.
"""

import asyncio
import math
import os
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import msgspec
from fastapi import Depends, FastAPI, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent

from kaizen_async import (
    ClientClosedError,
    ClientStats,
    Executions,
    InstructorExecution,
    KaizenClient,
    KaizenError,
    NotFoundError,
    StatusError,
)

PAGE = Path(__file__).with_name("page.html")
LOOK_UP_SECONDS = float(os.environ.get("LOOK_UP_SECONDS", "5"))
MOST_IDS = 500


DRAIN_SECONDS = 2.0


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open one client, and close it with the app."""
    async with KaizenClient(deadline=LOOK_UP_SECONDS) as kaizen:
        app.state.kaizen = kaizen
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                close_on(signum, kaizen)
        yield


def close_on(signum: signal.Signals, kaizen: KaizenClient) -> None:
    """Close the client when the server is told to stop, so that the streams of open pages end.

    A server waits for its responses first, and only then ends the lifespan: pages that watch would keep it for ever.
    """
    loop = asyncio.get_running_loop()
    stop_server = signal.getsignal(signum)
    closing: list[asyncio.Task[None]] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(lambda: closing.append(loop.create_task(kaizen.aclose(drain=DRAIN_SECONDS))))
        if callable(stop_server):
            stop_server(number, frame)

    signal.signal(signum, on_signal)


app = FastAPI(title="Kaizen dashboard", lifespan=lifespan)


def kaizen_of(request: Request) -> KaizenClient:
    """Return the app's client."""
    kaizen: KaizenClient = request.app.state.kaizen
    return kaizen


def executions_of(kaizen: Annotated[KaizenClient, Depends(kaizen_of)]) -> Executions[InstructorExecution]:
    """Return what handlers look up with."""
    return kaizen.instructor_executions


Kaizen = Annotated[KaizenClient, Depends(kaizen_of)]
InstructorExecutions = Annotated[Executions[InstructorExecution], Depends(executions_of)]


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


@app.exception_handler(KaizenError)
async def on_kaizen_error(_: Request, error: KaizenError) -> JSONResponse:
    """Answer for a look-up that failed, in whichever handler."""
    wait = getattr(error, "retry_after", None) or error.next_attempt_in
    headers = {"Retry-After": str(math.ceil(wait))} if wait else None
    return JSONResponse({"detail": str(error)}, status_for(error), headers)


@app.get("/executions/{execution_id}")
async def read_execution(execution_id: str, executions: InstructorExecutions) -> Response:
    """Look one execution up."""
    execution = await executions.get(execution_id)
    return Response(msgspec.json.encode(execution), media_type="application/json")


@app.get("/changes", response_class=EventSourceResponse)
async def stream_changes(
    executions: InstructorExecutions, ids: Annotated[list[str], Query(alias="id", min_length=1, max_length=MOST_IDS)]
) -> AsyncIterator[ServerSentEvent]:
    """Send the first state of each execution, every change, and `done` when all have ended.

    Any number of viewers share the polls of an execution. A viewer who leaves ends this generator, and with it the
    watch.
    """
    async with executions.watch(ids, deadline=None) as changes:
        async for change in changes:
            if isinstance(change.error, ClientClosedError):
                return  # without `done`: the page comes back when the server does
            error = None if change.error is None else str(change.error)
            row = {"id": change.id, "execution": change.after, "error": error}
            yield ServerSentEvent(event="change", raw_data=msgspec.json.encode(row).decode())
    yield ServerSentEvent(event="done", data=len(ids))


@app.get("/stats")
async def read_stats(kaizen: Kaizen) -> dict[str, Any]:
    """Return what the client has done and is doing."""
    stats: ClientStats = kaizen.stats()
    fields: dict[str, Any] = msgspec.to_builtins(stats)
    return fields


@app.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """Serve the page: `/?id=exec_1&id=exec_2`."""
    return FileResponse(PAGE)
