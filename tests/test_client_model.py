"""Each id ends exactly once under calls, cancellations, faults and closes in any order.

Hypothesis plays both a user and a server. It starts calls of every kind, lets the server fail in all ways, cancels
calls, lets time pass, closes the client and continues with a new one. At the end, every call that was not cancelled has
one result for each id, and nothing of the client is left.
"""

import asyncio
from collections import Counter
from collections.abc import Coroutine
from typing import Any, NamedTuple, TypeVar

import pytest
from callers import CALLERS
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule
from scripted_server import (
    CLOSE,
    RESET,
    SILENCE,
    Request,
    Script,
    ScriptedServer,
    assert_idle,
    client_for,
    record,
    response,
    settle,
)

from kaizen_async import ClientClosedError, InstructorExecution, KaizenClient, KaizenError, RetryPolicy
from kaizen_async.testing import VirtualClock, hold

T = TypeVar("T")

CONCURRENCY = 3


def answer(request: Request, **changes: Any) -> bytes:
    """Return a response with a finished execution, so that waits end too."""
    return response(record(request.id, endTime="2026-11-07T05:31:57Z", durationMs=1000, **changes))


FAULTS = {
    "refusal": lambda _: [response(b"", 503)],
    "rejection": lambda _: [response({"message": "no"}, 400)],
    "unknown": lambda _: [response(b"", 404)],
    "throttling": lambda _: [response(b"", 429, {"Retry-After": "3"})],
    "throttling without a time": lambda _: [response(b"", 429)],
    "outage with a time": lambda _: [response(b"", 503, {"Retry-After": "2"})],
    "end": lambda _: [CLOSE],
    "reset": lambda _: [RESET],
    "silence": lambda _: [SILENCE],
    "half an answer": lambda request: [answer(request)[:-9], CLOSE],
    "garbage": lambda _: [b"garbage\r\n\r\n", CLOSE],
    "no JSON": lambda _: [response(b"<html>")],
    "a misfit": lambda request: [answer(request, workflow=None)],
    "another id": lambda _: [response(record("another"))],
    "two answers": lambda request: [answer(request) + answer(request)],
    "pieces": lambda request: [answer(request)[:30], 0.0, answer(request)[30:]],
}
"""Faults that the server may apply once to a request for an id. The last two cause at most a retry."""


class Call(NamedTuple):
    """A call in flight."""

    ids: tuple[str, ...]
    task: asyncio.Task[list[Any]]


class ClientModel(RuleBasedStateMachine):
    """The rules of the game. `calls` are the calls that no rule has ended yet."""

    calls = Bundle("calls")

    @initialize()
    def begin(self) -> None:
        """Start a server and a client. Silence of the server takes real time, so its bound is short."""
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(hold, "WIRE_PATIENCE", 0.1)
        self.runner = asyncio.Runner(debug=False)
        self.planned: dict[str, list[str]] = {}
        self.tainted: set[str] = set()
        self.cancelled: set[asyncio.Task[Any]] = set()
        self.started: list[Call] = []
        self.server = ScriptedServer(self.play)
        self.run(self.server.__aenter__())
        self.clients: list[KaizenClient] = []
        self.open_client()

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the event loop of the game."""
        return self.runner.run(main)

    def play(self, request: Request) -> Script:
        """Play the next fault that is planned for an id, or respond with its record."""
        planned = self.planned.get(request.id)
        return FAULTS[planned.pop(0)](request) if planned else [answer(request)]

    def open_client(self) -> None:
        """Continue with a new client."""
        policy = RetryPolicy(max_attempts=3, initial_backoff=0.5)
        settings = {"concurrency": CONCURRENCY, "attempt_timeout": 0.25, "clock": VirtualClock(), "retry": policy}
        self.client = client_for(self.server, **settings)
        self.clients.append(self.client)
        self.closed = False

    @rule(target=calls, caller=st.sampled_from(sorted(CALLERS)), ids=st.lists(st.sampled_from("abcdefgh"), max_size=6))
    def start(self, caller: str, ids: list[str]) -> Any:
        """Start a call. Its ids may repeat, except in a watch, which reports each id once."""
        if caller == "watch":
            ids = list(dict.fromkeys(ids))

        async def begin() -> asyncio.Task[list[Any]]:
            return asyncio.create_task(CALLERS[caller](self.client, ids), name=f"{caller} of {ids}")

        call = Call(tuple(ids), self.run(begin()))
        self.started.append(call)
        return call

    @rule(call=consumes(calls))
    def cancel(self, call: Call) -> None:
        """Cancel a call if it has not ended."""

        async def cancel() -> bool:
            return call.task.cancel()

        if self.run(cancel()):
            self.cancelled.add(call.task)

    @rule(name=st.sampled_from("abcdefgh"), faults=st.lists(st.sampled_from(sorted(FAULTS)), min_size=1, max_size=4))
    def plan(self, name: str, faults: list[str]) -> None:
        """Plan a sequence of faults for the requests for an id."""
        self.planned.setdefault(name, []).extend(faults)
        self.tainted.add(name)

    @rule(steps=st.integers(1, 40))
    def step(self, steps: int) -> None:
        """Let the event loop run some steps."""
        self.run(settle(steps))

    @rule(call=consumes(calls))
    def wait(self, call: Call) -> None:
        """Wait for the end of a call."""
        self.run(self.ended(call))

    @rule(target=calls, drain=st.sampled_from([0.0, 0.01, 0.05]), again=st.booleans())
    def close(self, drain: float, again: bool) -> Any:
        """Close the client, once or twice at once, and continue with a new one.

        Calls of the old one end by themselves.
        """

        async def close() -> None:
            async with asyncio.timeout(5), asyncio.TaskGroup() as group:
                for _ in range(1 + again):
                    group.create_task(self.client.aclose(drain=drain))

        self.run(close())
        self.closed = True
        self.open_client()
        return multiple()

    @invariant()
    def no_more_requests_than_slots(self) -> None:
        """Check that no client has more requests in flight than its concurrency."""
        for client in self.clients:
            assert client.stats().in_flight <= CONCURRENCY

    async def ended(self, call: Call) -> None:
        """Wait for a call and check its results."""
        await asyncio.wait([call.task], timeout=20)
        assert call.task.done(), f"{call.task.get_name()} hangs"
        if call.task in self.cancelled:
            assert call.task.cancelled()
            return
        results = call.task.result()
        assert len(results) == len(call.ids)
        ended = Counter(
            result.id if isinstance(result, InstructorExecution) else result.execution_id for result in results
        )
        assert ended == Counter(call.ids)
        for result in results:
            assert isinstance(result, (InstructorExecution, KaizenError))
            if isinstance(result, KaizenError) and not isinstance(result, ClientClosedError):
                assert result.execution_id in self.tainted
            if isinstance(result, ClientClosedError):
                assert len(self.clients) > 1

    async def all_ended(self) -> None:
        """Wait for all calls, close the last client, and check that nothing is left."""
        for call in self.started:
            await self.ended(call)
        await self.client.aclose()
        await settle()
        for client in self.clients:
            if client._binding.engine is not None:
                assert_idle(client)
                assert client.stats().waiting == 0
        await self.server.until(lambda: not self.server.open)
        await self.server.__aexit__(None, None, None)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, left

    def teardown(self) -> None:
        """End the game."""
        with self.runner:
            self.run(self.all_ended())
        self.patch.undo()


TestClientModel = pytest.mark.timeout(180)(ClientModel.TestCase)
TestClientModel.settings = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
