"""Cancelling a call at any step cancels only that call. It leaks nothing and does not affect other calls."""

import asyncio
from typing import Any

import pytest
from callers import CALLERS, Caller
from scripted_server import (
    CLOSE,
    LOOPS,
    Play,
    Request,
    Script,
    ScriptedServer,
    client_for,
    closing,
    outcome_of_get,
    record,
    response,
    run_on,
    settle,
)

from kaizen_async import KaizenClient, RetryPolicy
from kaizen_async.testing import VirtualClock
from kaizen_async.testing import clock as virtual

pytestmark = pytest.mark.no_cover
"""Other tests cover the same code, and measuring coverage would take most of the time of this one."""

IDS = ["a", "b"]

MOST_STEPS = 300
"""More loop steps than any path takes."""


def answer(request: Request) -> Script:
    """Respond with a finished execution."""
    return [response(record(request.id, endTime="2026-11-07T05:31:57Z", durationMs=1000))]


def in_pieces(request: Request) -> Script:
    """Respond in three segments."""
    (whole,) = answer(request)
    return [whole[:20], 0.0, whole[20:150], 0.0, whole[150:]]


def retried(request: Request) -> Script:
    """For ids of the call, drop the first request, respond to the second with a 503, and to the third with a record."""
    faults: dict[int, Script] = {1: [CLOSE], 2: [response(b"", 503)]} if request.id in IDS else {}
    return faults.get(request.number_for_id) or answer(request)


def throttled(request: Request) -> Script:
    """Respond to the second request with a 429, so that some requests are in flight and some have not started."""
    return [response(b"", 429, {"Retry-After": "2"})] if request.number == 2 else answer(request)


PATHS: dict[str, Play] = {"success": in_pieces, "retry": retried, "gate": throttled}


@pytest.fixture(autouse=True)
def _quick_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let virtual time pass after few idle steps, so that most steps are worth cancelling at."""
    monkeypatch.setattr(virtual, "IDLE_STEPS", 4)


def new_client(server: ScriptedServer) -> KaizenClient:
    """Return a client with fewer slots than ids, whose waits take no real time."""
    return client_for(server, concurrency=1, clock=VirtualClock(), retry=RetryPolicy(initial_backoff=0.1))


async def cancel_after(steps: int, play: Play, caller: Caller, *, leading: bool) -> bool:
    """Cancel a call that leads or follows others, and return whether it had finished by then."""
    async with ScriptedServer(play) as server, closing(new_client(server), server) as client:
        others: list[asyncio.Task[Any]] = []

        def start_others() -> None:
            others.extend(asyncio.create_task(outcome_of_get(client, one)) for one in ("a", "z"))

        if not leading:
            start_others()
            await settle(1)
        task = asyncio.create_task(caller(client, IDS))
        if leading:
            await settle(1)
            start_others()
        await settle(steps)
        over = task.done()
        task.cancel()
        await asyncio.wait([task], timeout=5)
        assert over or task.cancelled(), task
        async with asyncio.timeout(5):
            assert all([(await other).ok for other in others])
            assert (await outcome_of_get(client, "later")).ok
            assert (await client.instructor_executions.wait("last")).id == "last"
        assert client.stats().waiting == 0
        assert len(asyncio.all_tasks()) == 1 + server.open
    return over


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("caller", CALLERS.values(), ids=CALLERS)
@pytest.mark.parametrize("leading", [True, False], ids=["leading", "following"])
@pytest.mark.parametrize("play", PATHS.values(), ids=PATHS)
def test_cancelling_at_any_step_cancels_that_call_only(play: Play, leading: bool, caller: Caller, loop: str) -> None:
    """A call cancelled after any number of steps frees its resources, and other calls get their records."""

    async def main() -> None:
        steps = 0
        while not await cancel_after(steps, play, caller, leading=leading):
            steps += 1
            assert steps < MOST_STEPS
        assert steps > 10

    run_on(loop, main(), debug=False)
