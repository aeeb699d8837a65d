"""The gate against servers that throttle: in simulated time with servers of many kinds, and end to end with one.

A simulation shows what no unit test of the gate does: how long a job takes, how much is sent in vain, and that nobody
sends before the server's time, whatever the latency, the limit and the number of slots.
"""

import asyncio
import heapq
import math
from collections import deque
from collections.abc import Callable
from random import Random
from typing import NamedTuple

import pytest
from scripted_server import LOOPS, Request, Script, ScriptedServer, client_for, closing, ok, response, run_on

from kaizen_async import KaizenClient, RetryPolicy
from kaizen_async._lookup.throttle import Gate
from kaizen_async.testing import Fault, KaizenEmulator, Life

MAX_ATTEMPTS = RetryPolicy().max_attempts

Server = Callable[[float], float | None]
"""Given the time, takes a request (None) or refuses it (seconds to wait)."""


def token_bucket(rate: float, burst: int, retry_after: float = 1.0) -> Server:
    """Return a server that takes so many at once and so many a second."""
    tokens, filled = float(burst), 0.0

    def take(now: float) -> float | None:
        nonlocal tokens, filled
        tokens, filled = min(burst, tokens + (now - filled) * rate), now
        if tokens < 1:
            return retry_after
        tokens -= 1
        return None

    return take


def fixed_window(limit: int, seconds: float) -> Server:
    """Return a server that takes so many per window, and names the rest of it in whole seconds."""
    taken: dict[int, int] = {}

    def take(now: float) -> float | None:
        window = int(now / seconds)
        taken[window] = taken.get(window, 0) + 1
        return None if taken[window] <= limit else math.ceil((window + 1) * seconds - now)

    return take


def outage(begin: float, end: float) -> Server:
    """Return a server that refuses everything for a while."""
    return lambda now: 1.0 if begin <= now < end else None


class Result(NamedTuple):
    """How a job ended."""

    succeeded: int
    lost: int
    in_vain: int
    seconds: float


class Job:
    """Look-ups of one client with some slots, in simulated time, the way the engine makes them.

    Args:
        server: Takes or refuses requests.
        arrivals: When each look-up begins.
        slots: Requests under way or waiting for the gate, at most.
        latency: Seconds from a request to its answer.
        jitter: Up to how much longer that is at times, as a factor.
        seed: Of all that is random.
        max_attempts: Refusals after which a look-up is lost.
    """

    def __init__(
        self,
        server: Server,
        arrivals: list[float],
        *,
        slots: int = 50,
        latency: float = 0.005,
        jitter: float = 0.0,
        seed: int = 0,
        max_attempts: int = MAX_ATTEMPTS,
    ) -> None:
        self.now = 0.0
        self.gate = Gate(lambda: self.now, Random(seed))
        self._server = server
        self._latency = latency
        self._jitter = jitter
        self._max_attempts = max_attempts
        self._random = Random(seed)
        self._free = slots
        self._waiting: deque[int] = deque()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0
        self._refusals = [0] * len(arrivals)
        self._sent = self._succeeded = self._lost = 0
        self._not_before = 0.0
        for number, moment in enumerate(arrivals):
            self._at(moment, lambda number=number: self._arrive(number))

    def run(self) -> Result:
        """Let time pass until all look-ups have ended."""
        while self._events:
            self.now, _, happen = heapq.heappop(self._events)
            happen()
        return Result(self._succeeded, self._lost, self._sent - self._succeeded, self.now)

    def _at(self, moment: float, happen: Callable[[], None]) -> None:
        self._serial += 1
        heapq.heappush(self._events, (moment, self._serial, happen))

    def _arrive(self, number: int) -> None:
        self._waiting.append(number)
        self._begin()

    def _begin(self) -> None:
        while self._free and self._waiting:
            self._free -= 1
            self._pass_gate(self._waiting.popleft())

    def _pass_gate(self, number: int) -> None:
        gate = self.gate
        if not gate.engaged:
            self._send(number)
        elif left := gate.seconds_left():
            self._at(self.now + left + 1e-9, lambda: self._pass_gate(number))
        else:
            epoch = gate.epoch
            self._at(
                self.now + gate.reserve(),
                lambda: self._send(number) if gate.epoch == epoch else self._pass_gate(number),
            )

    def _send(self, number: int) -> None:
        assert self.now >= self._not_before, "sent before the server's time had passed"
        self._sent += 1
        latency = self._latency * (1 + self._random.random() * self._jitter)
        refusal, epoch = self._server(self.now + latency / 2), self.gate.epoch
        self._at(self.now + latency, lambda: self._answered(number, refusal, epoch))

    def _answered(self, number: int, refusal: float | None, epoch: int) -> None:
        if refusal is None:
            self.gate.accepted()
            self._succeeded += 1
        else:
            self._not_before = max(self._not_before, self.now + refusal)
            self.gate.throttled(429, refusal, epoch)
            self._refusals[number] += 1
            if self._refusals[number] < self._max_attempts:
                self._waiting.appendleft(number)
            else:
                self._lost += 1
        self._free += 1
        self._at(self.now, self._begin)


def at_once(count: int, moment: float = 0.0) -> list[float]:
    """Return the arrivals of a storm."""
    return [moment] * count


SEEDS = range(5)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_storm_takes_half_as_long_again_as_the_server_needs(seed: int) -> None:
    """100 a second and 20 at once is 4.8 s for 500 look-ups: they take 7.2 s, and 31 of the requests are in vain."""
    result = Job(token_bucket(100, 20), at_once(500), seed=seed).run()
    assert result.succeeded == 500
    assert result.seconds < 1.55 * 4.8
    assert result.in_vain <= 35


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("server", "count", "floor", "factor", "in_vain", "settings"),
    [
        (lambda: token_bucket(100, 20), 500, 4.8, 1.6, 40, {"jitter": 3}),
        (lambda: token_bucket(100, 20), 500, 4.8, 2.0, 70, {"latency": 0.1, "jitter": 0.5}),
        (lambda: token_bucket(100, 20, 0.0), 500, 4.8, 1.2, 40, {}),
        (lambda: token_bucket(100, 20, 5.0), 500, 14.8, 1.2, 40, {}),
        (lambda: token_bucket(100, 1), 500, 5.0, 2.1, 60, {}),
        (lambda: token_bucket(50, 20), 500, 9.6, 1.3, 40, {}),
        (lambda: token_bucket(5, 5), 100, 19.0, 1.2, 60, {}),
        (lambda: token_bucket(5, 5), 100, 19.0, 1.6, 70, {"latency": 0.1, "jitter": 1}),
        (lambda: token_bucket(1000, 100), 20_000, 19.9, 1.3, 60, {}),
        (lambda: token_bucket(1000, 100), 20_000, 19.9, 1.4, 450, {"slots": 500, "latency": 0.02, "jitter": 1}),
        (lambda: token_bucket(100, 20), 20_000, 200.0, 1.1, 60, {}),
        (lambda: fixed_window(100, 1), 500, 4.0, 1.8, 60, {}),
        (lambda: fixed_window(1000, 10), 3000, 20.0, 1.7, 80, {}),
        (lambda: fixed_window(60, 60), 200, 180.0, 1.2, 60, {}),
    ],
    ids=[
        "jitter",
        "latency",
        "Retry-After 0",
        "Retry-After 5",
        "no burst",
        "50/s",
        "5/s",
        "5/s, latency",
        "1000/s",
        "1000/s, 500 slots",
        "a long job",
        "window of 1 s",
        "window of 10 s",
        "window of 60 s",
    ],
)
def test_no_kind_of_limit_loses_a_look_up(
    server: Callable[[], Server],
    count: int,
    floor: float,
    factor: float,
    in_vain: int,
    settings: dict[str, float],
    seed: int,
) -> None:
    """Whatever the limit, all look-ups succeed, in a time not far above what it allows."""
    result = Job(server(), at_once(count), seed=seed, **settings).run()  # type: ignore[arg-type]
    assert result.succeeded == count
    assert result.seconds < factor * floor
    assert result.in_vain <= in_vain


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "before",
    [[number / 2 for number in range(1200)], [number / 30 for number in range(900)]],
    ids=["ten idle minutes", "half a minute at 30/s"],
)
def test_a_storm_after_a_calm_is_like_any_other(before: list[float], seed: int) -> None:
    """What was asked for before a storm is not taken for all that the server would have given."""
    begin = before[-1] + 1
    result = Job(token_bucket(100, 20), before + at_once(500, begin), seed=seed).run()
    assert result.succeeded == len(before) + 500
    assert result.seconds - begin < 1.9 * 4.8


@pytest.mark.parametrize("seed", SEEDS)
def test_a_job_a_little_too_fast_settles_at_the_limit(seed: int) -> None:
    """A job that goes from 99 to 120 a second at a limit of 100 loses nothing and hardly any time."""
    arrivals = [number / 99 for number in range(3000)]
    arrivals += [arrivals[-1] + number / 120 for number in range(1, 3600)]
    result = Job(token_bucket(100, 20), arrivals, seed=seed).run()
    assert result.lost == 0
    assert result.seconds < 1.15 * len(arrivals) / 100
    assert result.in_vain <= 20


@pytest.mark.parametrize("seed", SEEDS)
def test_an_outage_is_over_when_it_is_over(seed: int) -> None:
    """For 30 s everything is refused: one request a second finds out, and soon after the end all is as before."""
    arrivals = [number / 50 for number in range(2500)]
    result = Job(outage(1, 31), arrivals, seed=seed, max_attempts=99).run()
    assert result.succeeded == len(arrivals)
    assert result.in_vain <= 40
    assert result.seconds < arrivals[-1] + 1


def in_line(rate: float, burst: int) -> Callable[[Request], Script]:
    """Return a play that throttles like a token bucket, in the loop's time."""
    server = token_bucket(rate, burst, 1.0)

    def play(request: Request) -> Script:
        refused = server(asyncio.get_running_loop().time())
        return [ok(request)] if refused is None else [response(b"", 429, {"Retry-After": "1"})]

    return play


@pytest.mark.no_cover
@pytest.mark.parametrize("loop", LOOPS)
def test_a_storm_on_a_real_server_ends_well(loop: str) -> None:
    """300 look-ups at once against 100 a second: all succeed, few requests are in vain, the gate's work shows."""

    async def main() -> None:
        async with (
            ScriptedServer(in_line(100, 20)) as server,
            closing(client_for(server, retry=RetryPolicy()), server) as client,
        ):
            outcomes = await client.instructor_executions.get_many([f"id{number}" for number in range(300)])
            assert all(outcome.ok for outcome in outcomes), [outcome.error for outcome in outcomes if outcome.error]
            stats = client.stats()
            assert len(server.requests) == stats.attempts == 300 + stats.throttled
            assert stats.throttled <= 60
            assert 1 <= stats.pauses <= 6
            assert stats.retry_tokens == 450

    run_on(loop, main(), debug=False)


@pytest.mark.parametrize("loop", LOOPS)
def test_nobody_sends_during_a_pause(loop: str) -> None:
    """After a 429 the next request of any look-up, old or new, comes no sooner than the server asked for."""
    times: list[float] = []

    def play(request: Request) -> Script:
        times.append(asyncio.get_running_loop().time())
        return [response(b"", 429, {"Retry-After-Ms": "300"})] if request.number <= 3 else [ok(request)]

    async def main() -> None:
        async with ScriptedServer(play) as server, closing(client_for(server, concurrency=3), server) as client:
            get = client.instructor_executions.get
            old = [asyncio.create_task(get(name)) for name in "abcdef"]
            await server.until(lambda: len(times) == 3)
            new = [asyncio.create_task(get(name)) for name in "ghi"]
            await asyncio.gather(*old, *new)
            assert times[3] - max(times[:3]) >= 0.3

    run_on(loop, main(), debug=False)


@pytest.mark.parametrize("loop", LOOPS)
def test_an_outage_is_not_answered_with_a_storm(loop: str) -> None:
    """Of 1,000 look-ups in a full outage all fail with the server's own error, for at most a tenth more requests."""
    policy = RetryPolicy(initial_backoff=0.01)

    async def main() -> None:
        async with (
            ScriptedServer(lambda _: [response(b"", 503)]) as server,
            closing(client_for(server, retry=policy), server) as client,
        ):
            outcomes = await client.instructor_executions.get_many([f"id{number}" for number in range(1000)])
            assert {type(outcome.error).__name__ for outcome in outcomes} == {"StatusError"}
            assert 1000 < len(server.requests) <= 1100
            refused = [outcome for outcome in outcomes if "retry budget" in str(outcome.error)]
            assert len(refused) > 900
            assert client.stats().retry_tokens < 5

    run_on(loop, main(), debug=False)


def test_single_failures_are_not_lost_to_the_budget() -> None:
    """Of 3,000 look-ups of which every fiftieth attempt fails, none is lost."""

    async def main(emulator: KaizenEmulator) -> None:
        policy = RetryPolicy(initial_backoff=0.001)
        async with KaizenClient(base_url=emulator.base_url, retry=policy) as client:
            outcomes = await client.instructor_executions.get_many([f"id{number}" for number in range(3000)])
            assert all(outcome.ok for outcome in outcomes)
            assert client.stats().retries >= 30

    with KaizenEmulator(default_life=Life.lasting(60), seed=7) as emulator:
        emulator.faults.chance(Fault.status(500), 0.02)
        asyncio.run(main(emulator))
