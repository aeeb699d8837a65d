"""What users write, for the type checkers: mypy and pyright read it in strict mode, nothing ever runs it.

`assert_type` fails the check if an expression has any other type than the one beside it.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator
from datetime import datetime, timedelta
from typing import Any, assert_type

import aiohttp
import msgspec

import kaizen_async
from kaizen_async import (
    Authentication,
    AuthenticationStatus,
    Change,
    ClientStats,
    ContextAuthentication,
    ContextAuthenticationStatus,
    DeadlineExceededError,
    DecodeError,
    Executions,
    ExecutionStatus,
    Found,
    HedgePolicy,
    InstructorExecution,
    KaizenClient,
    KaizenError,
    Login,
    LoginSummary,
    LookupFailed,
    Outcome,
    PollPolicy,
    RateLimitError,
    RetryPolicy,
    Seen,
    StatusError,
    TransportError,
    WatchFailed,
    Workflow,
    WorkflowExecution,
)
from kaizen_async.events import Event, Gated, HedgeEnded, HedgeStarted, RetryScheduled
from kaizen_async.otel import Telemetry
from kaizen_async.testing import Fault, KaizenEmulator, Life


async def one(kaizen: KaizenClient) -> None:
    """Look one up."""
    executions = kaizen.instructor_executions
    assert_type(executions, Executions[InstructorExecution])
    execution = await executions.get("exec_1")
    assert_type(execution, InstructorExecution)
    assert_type(await executions.get("exec_1", deadline=5), InstructorExecution)
    assert_type(await executions.get("exec_1", deadline=None, retry=RetryPolicy(max_attempts=2)), InstructorExecution)
    assert_type(await executions.wait("exec_1", deadline=600, poll=PollPolicy(lag_seconds=5)), InstructorExecution)


async def another_kind(kaizen: KaizenClient) -> None:
    """Look a workflow execution up."""
    assert_type(kaizen.executions, Executions[WorkflowExecution])
    execution = await kaizen.executions.wait("run_1")
    assert_type(execution.workflow, Workflow | None)
    assert_type(execution.raw, bytes)
    assert_type(execution.extra["batch"], Any)
    assert_type(execution.to_dict()["batch"], Any)
    assert_type(execution.succeeded, bool | None)


def tell(event: Event) -> None:
    """Take events."""
    match event:
        case RetryScheduled(id=execution_id, delay=delay, error=error):
            assert_type((execution_id, delay, error), tuple[str, float, KaizenError])
        case Gated(pause=pause):
            assert_type(pause, float)
        case _:
            pass


async def turn() -> bool:
    """Wait for a turn to send."""
    return True


def hooked() -> list[KaizenClient]:
    """Give a client hooks."""
    return [KaizenClient(limiter=turn, on_event=tell), KaizenClient(on_event=Telemetry(aiohttp_instrumented=True))]


def fields(execution: InstructorExecution) -> None:
    """Read a record."""
    assert_type(execution.id, str)
    assert_type(execution.workflow, Workflow)
    assert_type(execution.workflow.name, str)
    assert_type(execution.logins, tuple[Login, ...])
    assert_type(execution.authentications, tuple[Authentication, ...])
    assert_type(execution.authentications[0].status, AuthenticationStatus | None)
    assert_type(execution.context_authentications, tuple[ContextAuthentication, ...])
    assert_type(execution.context_authentications[0].login_summary, LoginSummary)
    assert_type(execution.context_authentications[0].authentication_status, ContextAuthenticationStatus)
    assert_type(execution.start_time, datetime | None)
    assert_type(execution.end_time, datetime | None)
    assert_type(execution.duration_ms, float | None)
    assert_type(execution.duration, timedelta | None)
    assert_type(execution.is_finished, bool)
    assert_type(execution.is_recording, bool)
    assert_type(execution.browser_session_id, str | None)
    assert_type(execution.session_id, str | None)
    assert_type(execution.status, ExecutionStatus)
    assert_type(execution.status.is_known, bool)
    assert_type(execution.status == ExecutionStatus.FAILED, bool)
    assert_type(msgspec.json.encode(execution), bytes)


async def many(kaizen: KaizenClient, ids: list[str]) -> None:
    """Look many up."""
    outcomes = await kaizen.instructor_executions.get_many(ids, deadline=60)
    assert_type(outcomes, list[Outcome[InstructorExecution]])
    for outcome in outcomes:
        assert_type(outcome.id, str)
        assert_type(outcome.ok, bool)
        assert_type(outcome.execution, InstructorExecution | None)
        assert_type(outcome.error, KaizenError | None)
        assert_type(outcome.attempts, int)
        assert_type(outcome.elapsed, float)
        assert_type(outcome.request_id, str | None)
        assert_type(outcome.unwrap(), InstructorExecution)


def narrowed(outcome: Outcome[InstructorExecution], change: Change[InstructorExecution]) -> None:
    """Test an outcome once, and know what is there."""
    if outcome.error is None:
        assert_type(outcome.execution, InstructorExecution)
        assert_type(outcome, Found[InstructorExecution])
    else:
        assert_type(outcome.error, KaizenError)
        assert_type(outcome.execution, None)
    assert_type(outcome.execution.status if outcome.error is None else None, ExecutionStatus | None)
    if outcome.execution is not None:
        assert_type(outcome.error, None)
    match outcome:
        case Found(execution=execution):
            assert_type(execution, InstructorExecution)
        case LookupFailed(error=error):
            assert_type(error, KaizenError)
    if change.error is None:
        assert_type(change.before, InstructorExecution | None)
        assert_type(change.after, InstructorExecution)
    match change:
        case Seen(after=after):
            assert_type(after, InstructorExecution)
        case WatchFailed(error=error):
            assert_type(error, KaizenError)


def lines() -> Iterator[str]:
    """Yield ids."""
    yield "exec_1"


async def queue() -> AsyncIterator[str]:
    """Yield ids asynchronously."""
    yield "exec_1"


async def endless(kaizen: KaizenClient) -> None:
    """Take ids from anywhere."""
    executions = kaizen.instructor_executions
    for ids in (lines(), queue(), ["exec_1"], {"exec_1"}, ("exec_1",), {"exec_1": 1}, (line for line in lines())):
        async with executions.stream(ids, deadline=None) as outcomes:
            async for outcome in outcomes:
                assert_type(outcome, Outcome[InstructorExecution])
    async with executions.wait_many(queue(), deadline=3600) as ended:
        async for outcome in ended:
            assert_type(outcome, Outcome[InstructorExecution])
    async with executions.watch("exec_1") as changes:
        async for change in changes:
            assert_type(change, Change[InstructorExecution])
            assert_type(change.before, InstructorExecution | None)
            assert_type(change.after, InstructorExecution | None)


async def failures(kaizen: KaizenClient) -> None:
    """Tell errors apart."""
    try:
        await kaizen.instructor_executions.get("exec_1")
    except RateLimitError as error:
        assert_type(error.retry_after, float | None)
    except StatusError as error:
        assert_type(error.status, int)
        assert_type(error.body, bytes)
    except DecodeError as error:
        assert_type(error.path, str | None)
    except TransportError as error:
        assert_type(error.retryable, bool)
    except DeadlineExceededError as error:
        assert_type(error.attempts, int)
    except KaizenError as error:
        assert_type(error.execution_id, str)


class Brief(msgspec.Struct, frozen=True):
    """A record of the user's own."""

    id: str
    status: str


async def other_kinds(kaizen: KaizenClient) -> None:
    """Look something else up."""
    briefs = kaizen.lookups("executions/get", Brief, unwrap="execution")
    assert_type(briefs, Executions[Brief])
    assert_type(await briefs.get("exec_1"), Brief)
    assert_type(await briefs.get_many(["exec_1"]), list[Outcome[Brief]])


async def settings(session: aiohttp.ClientSession, context: ssl.SSLContext) -> None:
    """Set everything."""
    async with KaizenClient(
        "key",
        base_url="https://gateway.example/kaizen",
        concurrency=100,
        attempt_timeout=10,
        deadline=None,
        retry=RetryPolicy(
            max_attempts=3, initial_backoff=0.1, max_backoff=1, statuses=frozenset({503}), budgeted=False
        ),
        poll=PollPolicy(min_interval=2, max_interval=60),
        max_response_bytes=1_000_000,
        session=session,
        ssl_context=context,
        trust_env=True,
        allow_insecure_http=False,
    ) as kaizen:
        assert_type(kaizen, KaizenClient)
        assert_type(kaizen.stats(), ClientStats)
        assert_type(kaizen.stats().gate_pace, float | None)
        await kaizen.aclose(drain=5)


async def emulated() -> None:
    """Test against the emulator."""
    async with KaizenEmulator(api_key="key", default_life=Life.lasting(2)) as emulator:
        emulator.add("exec_1", Life.of(("Enqueued", 0), ("Completed", 3)))
        emulator.faults.next(Fault.status(503), times=2, id="exec_1")
        assert_type(emulator.base_url, str)
        assert_type(emulator.requests_for("exec_1"), int)


def main(kaizen: KaizenClient) -> None:
    """Run from synchronous code."""
    assert_type(asyncio.run(kaizen.instructor_executions.get("exec_1")), InstructorExecution)
    assert_type(kaizen_async.__version__, str)


async def hedged() -> None:
    """Cut the tail of latencies."""
    policy = HedgePolicy(quantile=0.9, max_share=0.1, min_delay=0.02, min_observations=200)
    assert_type(policy.quantile, float)
    assert_type(policy.min_observations, int)

    def on_event(event: Event) -> None:
        match event:
            case HedgeStarted(after=after):
                assert_type(after, float)
            case HedgeEnded(won=won, error=error):
                assert_type(won, bool)
                assert_type(error, KaizenError | None)
            case _:
                pass

    async with KaizenClient(hedge=policy, on_event=on_event) as kaizen:
        stats = kaizen.stats()
        assert_type(stats.hedges, int)
        assert_type(stats.hedges_won, int)
