"""Waits for a workload in virtual time, with the real `wait_many` and simulated requests.

A poll takes no time, so the result depends on the rule and not on the network.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Final
from unittest import mock

import msgspec
from rules import Age, Exponential, Fixed, Oracle, Rule
from workload import Execution, Workload
from yarl import URL

from kaizen_async import InstructorExecution, KaizenClient, PollPolicy, Workflow
from kaizen_async._transport.transport import Answer, Transport
from kaizen_async.clock import sleep
from kaizen_async.models import ExecutionStatus
from kaizen_async.testing import VirtualClock
from kaizen_async.testing import clock as virtual_time

IDLE_STEPS: Final = 5
"""Steps of the event loop after which the clock jumps: fewer than it takes for tests, since an answer takes none."""
_EPOCH: Final = datetime(2026, 1, 1, tzinfo=UTC)
_ANY_LENGTH: Final = 86_400.0


@dataclass(frozen=True)
class Method:
    """A rule with its setting: an interval, a share of the age, a bound, a target or a constant."""

    rule: str
    setting: float


@dataclass(frozen=True)
class Measured:
    """The polls of each execution, in order, and the seconds from its end until the end was noticed."""

    polls: list[int]
    lags: list[float]


def simulate(method: Method, workload: Workload) -> Measured:
    """Wait for a workload with a method."""
    network = Network(workload.executions(), VirtualClock(seed=workload.seed, epoch=_EPOCH))
    policy, rule = _POLICIES.get(method.rule), _RULES.get(method.rule)
    with mock.patch.object(Transport, "send", network.send), mock.patch.object(virtual_time, "IDLE_STEPS", IDLE_STEPS):
        if policy is not None:
            asyncio.run(_wait(network, policy(method.setting)))
        elif rule is not None:
            other = rule(lambda: network.asked, method.setting)
            with mock.patch("kaizen_async._binding.Cadence", return_value=other):
                asyncio.run(_wait(network, PollPolicy()))
    return network.measured()


class Network:
    """A simulated server that responds by the clock, and records each request with its time."""

    def __init__(self, executions: list[Execution], clock: VirtualClock) -> None:
        self.executions = {execution.id: execution for execution in executions}
        self.clock = clock
        self.asked = executions[0]
        self._polls = dict.fromkeys(self.executions, 0)
        self._noticed: dict[str, float] = {}
        self._running = {execution.id: _running(execution) for execution in executions}

    async def send(self, _url: URL, body: bytes, _is_held: Callable[[], bool]) -> Answer:
        """Respond to one request."""
        execution = self.asked = self.executions[msgspec.json.decode(body)["id"]]
        record = self._running[execution.id]
        self._polls[execution.id] += 1
        now = self.clock.time()
        if now >= execution.end:
            self._noticed.setdefault(execution.id, now)
            record = _ended(record, execution)
        return Answer(200, {}, msgspec.json.encode(record))

    async def started(self) -> AsyncIterator[str]:
        """Yield the id of each execution when it starts."""
        for execution in self.executions.values():
            await sleep(self.clock, execution.start - self.clock.time())
            yield execution.id

    def measured(self) -> Measured:
        """Return the polls and the lags of all executions."""
        lags = [self._noticed[execution.id] - execution.end for execution in self.executions.values()]
        return Measured(list(self._polls.values()), lags)


async def _wait(network: Network, policy: PollPolicy) -> None:
    async with KaizenClient("key", base_url="http://127.0.0.1", clock=network.clock) as kaizen:
        waits = kaizen.instructor_executions.wait_many(network.started(), deadline=None, poll=policy)
        async with waits as outcomes:
            ended = [outcome.unwrap().id async for outcome in outcomes]
    if sorted(ended) != sorted(network.executions):
        raise RuntimeError("not every execution was waited out, or one twice")


def _running(execution: Execution) -> InstructorExecution:
    return InstructorExecution(
        id=execution.id,
        workflow=Workflow(execution.workflow, execution.workflow),
        logins=(),
        authentications=(),
        context_authentications=(),
        start_time=_EPOCH + timedelta(seconds=execution.start),
        end_time=None,
        duration_ms=None,
        is_recording=False,
        browser_session_id=None,
        status=ExecutionStatus.IN_PROGRESS,
    )


def _ended(record: InstructorExecution, execution: Execution) -> InstructorExecution:
    return msgspec.structs.replace(
        record,
        end_time=_EPOCH + timedelta(seconds=execution.end),
        duration_ms=1000 * execution.duration,
        status=ExecutionStatus.COMPLETED,
    )


_POLICIES: Final[dict[str, Callable[[float], PollPolicy]]] = {
    "ours, share": lambda share: PollPolicy(lag_share=share, max_interval=_ANY_LENGTH),
    "ours, seconds": lambda seconds: PollPolicy(lag_seconds=seconds, max_interval=_ANY_LENGTH),
    "ours, as shipped": lambda share: PollPolicy(lag_share=share),
}
_RULES: Final[dict[str, Callable[[Callable[[], Execution], float], Rule]]] = {
    "fixed": Fixed,
    "age": Age,
    "google polling": lambda asked, maximum: Exponential(asked, 1.5, maximum, Random(1)),
    "google retry": lambda asked, maximum: Exponential(asked, 2.0, maximum, Random(1)),
    "oracle, share": lambda asked, constant: Oracle(asked, constant, by_share=True),
    "oracle, seconds": lambda asked, constant: Oracle(asked, constant, by_share=False),
}
