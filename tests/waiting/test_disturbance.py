"""Waits survive short disturbances, stray 404s, frozen processes and silence. The tests run in virtual time."""

import asyncio
import itertools
import logging
import time
from collections import Counter
from random import Random
from typing import Any

import msgspec
import pytest
from scripted_lives import (
    EVERY_SECOND,
    EVERY_TEN,
    assert_idle,
    at_once,
    ended,
    ending,
    every,
    later,
    never_ending,
    now,
    outcomes_of,
    polls_of,
    running,
)
from scripted_transport import NEVER, Reply, ScriptedTransport, status
from virtual_time import run, virtual_time

from kaizen_async import (
    AuthenticationError,
    DeadlineExceededError,
    DecodeError,
    KaizenError,
    NotFoundError,
    PollPolicy,
    RetryPolicy,
    StatusError,
)
from kaizen_async._transport.transport import Answer
from kaizen_async.clock import SystemClock
from kaizen_async.events import Event, PollsFailing, PollsRecovered

pytestmark = pytest.mark.no_cover
"""Other tests cover the same code, and measuring coverage would take most of the time of this one."""

ONE_ATTEMPT = RetryPolicy(max_attempts=1)
HTML = b"<html><body>One moment, please</body></html>"

KINDS: dict[str, tuple[Answer, type[KaizenError]]] = {
    **{str(code): (status(code), StatusError) for code in (302, 308, 400, 405, 409, 410, 421, 422, 423, 451, 501)},
    **{str(code): (status(code), AuthenticationError) for code in (401, 403)},
    "407": (status(407), StatusError),
    "403 of a firewall": (Answer(403, {}, HTML), AuthenticationError),
    "404 of a deployment": (Answer(404, {}, HTML), NotFoundError),
    "404 of a router": (Answer(404, {}, b"default backend - 404"), NotFoundError),
    "a page": (Answer(200, {}, HTML), DecodeError),
    "an error with status 200": (Answer(200, {}, b'{"error": "try later"}'), DecodeError),
    "nothing": (Answer(204, {}, b" "), DecodeError),
}
any_kind = pytest.mark.parametrize(("answer", "error"), KINDS.values(), ids=KINDS)


@any_kind
def test_a_short_disturbance_ends_no_wait(answer: Answer, error: type[KaizenError]) -> None:
    """Foreign responses during a few seconds, for example from a gateway, do not end a wait."""

    @virtual_time
    async def play() -> None:
        transport = at_once(lambda i, _: answer if 3 <= now() < 23 else ending(60)(i, 0))
        async with transport.client(poll=EVERY_SECOND) as client:
            outcomes = await outcomes_of(client, [f"e{number}" for number in range(50)])
            assert [outcome.ok for outcome in outcomes] == [True] * 50
            assert sum(3 <= at < 23 for at in transport.times) < 120
            await assert_idle(client, transport)

    play()


@any_kind
def test_a_disturbance_that_lasts_ends_all_waits(answer: Answer, error: type[KaizenError]) -> None:
    """A lasting disturbance ends all waits after the policy's patience, with few requests. `get` fails at once.

    A response that cannot be read is requested once more within each poll.
    """

    async def play() -> None:
        transport = at_once(lambda i, _: answer if now() >= 20 else running(i))
        async with transport.client(poll=EVERY_TEN, concurrency=50) as client:
            names = [f"e{number}" for number in range(5000 if answer.status == 401 else 300)]
            single = asyncio.create_task(client.instructor_executions.wait("e7"))
            await asyncio.sleep(0)
            outcomes = await outcomes_of(client, names)
            assert Counter(outcome.id for outcome in outcomes) == Counter(names)
            assert {type(outcome.error) for outcome in outcomes} == {error}
            assert 50 <= now() <= (110 if answer.status in {200, 204} else 70)
            twice = 2 if error is DecodeError and answer.body != KINDS["an error with status 200"][0].body else 1
            assert sum(at >= 20 for at in transport.times) <= 100 * twice
            with pytest.raises(error):
                await single
            before = len(transport.sent)
            with pytest.raises(error):
                await client.instructor_executions.get("e1")
            assert len(transport.sent) <= before + 2
            await assert_idle(client, transport)

    run(play(), debug=False)


@virtual_time
async def test_a_refused_call_accounts_for_ids_that_were_not_polled() -> None:
    """All ids of a refused collection get the error. A generator raises it, so that the call never looks complete."""
    transport = at_once(lambda *_: status(401))
    async with transport.client(poll=EVERY_SECOND, concurrency=5) as client:
        outcomes = await outcomes_of(client, [f"e{number}" for number in range(3000)])
        assert [type(outcome.error) for outcome in outcomes] == [AuthenticationError] * 3000
        assert len(transport.sent) < 100
        endless = (f"e{number}" for number in itertools.count())
        seen = []
        with pytest.raises(AuthenticationError):
            async with client.instructor_executions.wait_many(endless) as stream:
                async for outcome in stream:
                    seen.append(outcome)
        assert {type(outcome.error) for outcome in seen} == {AuthenticationError}
        async with client.instructor_executions.wait_many(["a", "c", "d"], poll=every(1)) as stream:
            for _ in range(3):
                assert isinstance((await anext(stream)).error, AuthenticationError)
            stream.add("b")
            late = await anext(stream)
            assert isinstance(late.error, AuthenticationError)
            assert (late.id, late.attempts, late.error.execution_id) == ("b", 0, "b")


@pytest.mark.parametrize("share", [0.03, 0.2])
def test_random_refusals_end_no_wait(share: float) -> None:
    """If a firewall refuses some requests at random, each affected wait polls again and the others continue."""

    async def play() -> None:
        chance = Random(5)

        def answer(execution_id: str, _: int) -> Reply:
            return Answer(403, {}, HTML) if chance.random() < share else ending(120)(execution_id, 0)

        transport = at_once(answer)
        async with transport.client(poll=EVERY_TEN, concurrency=50) as client:
            outcomes = await outcomes_of(client, [f"e{number}" for number in range(400)])
            assert all(outcome.ok for outcome in outcomes)
            assert now() < 200

    run(play(), debug=False)


@pytest.mark.parametrize("code", [400, 403, 422])
def test_an_id_that_is_refused_alone_ends_alone(code: int) -> None:
    """An id that the server refuses while it accepts others ends alone, sooner than the policy's next poll."""

    @virtual_time
    async def play() -> None:
        transport = at_once(lambda i, _: status(code) if i == "bad" else ending(400)(i, 0))
        async with transport.client(poll=every(100)) as client:
            async with client.instructor_executions.wait_many(["good", "bad"]) as outcomes:
                first = await anext(outcomes)
                assert (first.id, type(first.error)) == ("bad", type(KINDS[str(code)][1]("", status=code)))
                assert 30 <= now() < 100
                assert (await anext(outcomes)).ok

    play()


@pytest.mark.parametrize("bad_ones_first", [True, False])
def test_many_ids_that_are_refused_end_without_the_others(bad_ones_first: bool) -> None:
    """The client polls an id that succeeded before, before it concludes that the server refuses the whole client."""

    @virtual_time
    async def play() -> None:
        transport = at_once(lambda i, _: status(422) if i.startswith("bad") else ending(400)(i, 0))
        names = [*(f"bad{number}" for number in range(20)), *(f"good{number}" for number in range(5))]
        async with transport.client(poll=every(100)) as client:
            outcomes = await outcomes_of(client, names if bad_ones_first else names[::-1])
            assert [outcome.id[:3] for outcome in outcomes if not outcome.ok] == ["bad"] * 20
            assert len(outcomes) == 25
            assert len(polls_of(transport, "good0")) < 20
            await assert_idle(client, transport)

    play()


@virtual_time
async def test_without_patience_a_refusal_ends_the_wait_at_once() -> None:
    """With a refusal_patience of 0, the first refusal ends the wait."""
    transport = at_once(lambda i, _: status(403) if i == "bad" else ending(5)(i, 0))
    async with transport.client(poll=msgspec.structs.replace(EVERY_SECOND, refusal_patience=0)) as client:
        outcomes = await outcomes_of(client, ["good", "bad"])
        assert polls_of(transport, "bad") == [0]
        assert [outcome.ok for outcome in outcomes] == [False, True]


@pytest.mark.parametrize("seen", [False, True])
def test_a_probe_keeps_to_the_rate_of_its_policy(seen: bool) -> None:
    """A probe obeys the `max_rate` of its policy."""

    @virtual_time
    async def play() -> None:
        begins = 25 if seen else 0
        transport = at_once(lambda i, _: status(403) if begins <= now() < 60 else ending(65)(i, 0))
        policy = msgspec.structs.replace(EVERY_SECOND, max_rate=0.2, refusal_patience=120)
        async with transport.client(poll=policy) as client:
            outcomes = await outcomes_of(client, ["a", "b", "c"])
            assert all(outcome.ok for outcome in outcomes)
            assert min(later - sooner for sooner, later in itertools.pairwise(transport.times)) >= 4.9
            await assert_idle(client, transport)

    play()


@virtual_time
async def test_a_probe_skips_cancelled_waits() -> None:
    """A probe skips waits that were cancelled while they were queued."""
    transport = at_once(lambda i, _: status(403) if now() < 6 else ending(8)(i, 0))
    async with transport.client(poll=EVERY_SECOND) as client:
        waits = {i: asyncio.create_task(client.instructor_executions.wait(i)) for i in "abcd"}
        await asyncio.sleep(2)
        probed = transport.ids[-1]
        for execution_id, wait in waits.items():
            if execution_id != probed:
                wait.cancel()
        await asyncio.sleep(0)
        assert (await client.instructor_executions.wait("e")).is_finished
        assert (await waits[probed]).is_finished
        await assert_idle(client, transport)


@virtual_time
async def test_an_outage_during_a_disturbance_says_nothing_about_it() -> None:
    """A probe without a response is repeated later, and then every wait continues."""
    script = {5: status(401), 6: status(401), 7: status(401), 8: status(401), 9: status(503), 10: status(503)}
    transport = at_once(lambda i, _: script.get(min(int(now()), 10)) if 5 <= now() < 100 else ending(110)(i, 0))
    async with transport.client(poll=EVERY_SECOND, retry=ONE_ATTEMPT) as client:
        outcomes = await outcomes_of(client, ["a", "b", "c", "d"])
        assert all(outcome.ok for outcome in outcomes)


@pytest.mark.parametrize(("share", "count"), [(0.005, 20), (0.1, 10)])
def test_a_stray_404_ends_no_wait(share: float, count: int) -> None:
    """A single 404, as from a replica that lags, does not end the wait for an execution that was seen before."""

    async def play() -> None:
        chance = Random(7)

        def answer(execution_id: str, number: int) -> Reply:
            return status(404) if number > 1 and chance.random() < share else ending(1800)(execution_id, 0)

        transport = at_once(answer)
        async with transport.client() as client:
            outcomes = await outcomes_of(client, [f"e{number}" for number in range(count)], deadline=None)
            assert all(outcome.ok for outcome in outcomes)

    run(play(), debug=False)


@virtual_time
async def test_an_execution_that_is_gone_ends_its_wait() -> None:
    """A repeated 404 ends the wait, also for an execution that only another process has seen."""
    transport = at_once(lambda i, number: running(i) if number == 1 and now() < 5 else status(404))
    async with transport.client(poll=EVERY_TEN) as client:
        with pytest.raises(NotFoundError) as caught:
            await client.instructor_executions.wait("a")
        assert transport.times == [0, 10, 11, 13, 17]
        assert caught.value.attempts == 5
        with pytest.raises(NotFoundError):
            await client.instructor_executions.wait("never there")
        assert polls_of(transport, "never there") == [17]
        async with client.instructor_executions.wait_many(["b"]) as outcomes:
            await asyncio.sleep(0.5)
            state = outcomes.checkpoint()
        state["ids"][0][4] = True
        (outcome,) = await outcomes_of(client, (), checkpoint=state)
        assert outcome.attempts == 4


@pytest.mark.parametrize("verb", ["wait", "wait_many"])
def test_a_process_that_was_frozen_polls_once_more(verb: str) -> None:
    """After a freeze beyond the deadline, the client polls once more, and only then gives up a running execution."""

    @virtual_time
    async def play() -> None:
        transport = at_once(ending({"ends": 100, "runs": 10_000}))
        async with transport.client(poll=EVERY_TEN) as client:
            loop: Any = asyncio.get_running_loop()

            async def wait(execution_id: str) -> Any:
                if verb == "wait":
                    return await client.instructor_executions.wait(execution_id, deadline=60)
                (outcome,) = await outcomes_of(client, [execution_id], deadline=60)
                return outcome.unwrap()

            tasks = [asyncio.create_task(wait(execution_id)) for execution_id in ("ends", "runs")]
            await asyncio.sleep(55)
            loop._jumping.now += 3600
            assert (await tasks[0]).is_finished
            with pytest.raises(DeadlineExceededError):
                await tasks[1]
            assert 3655 < now() <= 3655 + 10
            await assert_idle(client, transport)

    play()


@virtual_time
async def test_a_frozen_process_polls_many_once_more() -> None:
    """After a freeze, the client polls all ids of a call once more, also ids that are still in its source."""
    transport = at_once(ending(100))
    async with transport.client(poll=EVERY_TEN, concurrency=100) as client:
        loop: Any = asyncio.get_running_loop()
        names = [f"e{number}" for number in range(1000)]
        task = asyncio.create_task(outcomes_of(client, later(names, 0.001), deadline=60))
        await asyncio.sleep(55)
        loop._jumping.now += 1000
        outcomes = await task
        assert Counter(outcome.id for outcome in outcomes) == Counter(names)
        assert all(outcome.ok for outcome in outcomes)


@pytest.mark.parametrize("steps", [(0,), (5e7, -1e6, -5e7, 1e6)], ids=["frozen", "steps"])
def test_waits_follow_the_clock_of_the_loop(steps: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits follow the loop's clock, even if the process's other clocks jump or are frozen."""
    step = itertools.cycle(steps)
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.0 + next(step))

    @virtual_time
    async def play() -> None:
        transport = at_once(ending({"ends": 600, "runs": 10_000}))
        async with transport.client(poll=EVERY_TEN, clock=SystemClock()) as client:
            ends, runs = await outcomes_of(client, ["ends", "runs"], deadline=900)
            assert ends.ok
            assert isinstance(runs.error, DeadlineExceededError)
            assert 900 <= now() <= 901
            assert 60 <= len(polls_of(transport, "ends")) <= 62
            assert ends.elapsed == pytest.approx(600, abs=1)

    play()


@virtual_time
async def test_silence_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    """After a minute of failing polls, the client reports it once for all waits, and reports the recovery once."""
    events: list[Event] = []
    transport = at_once(lambda i, _: status(503) if 10 <= now() < 200 else ending(400)(i, 0))
    async with transport.client(poll=EVERY_TEN, retry=ONE_ATTEMPT, on_event=events.append) as client:
        with caplog.at_level(logging.WARNING, "kaizen_async"):
            task = asyncio.create_task(outcomes_of(client, [f"e{number}" for number in range(100)]))
            await asyncio.sleep(60)
            assert client.stats().polls_failing_for == 50
            assert client.stats().polls_failing_because == "the server answered 503 Service Unavailable"
            assert not any("have failed" in message for message in caplog.messages)
            assert all(outcome.ok for outcome in await task)
        assert client.stats().polls_failing_for == 0
        assert client.stats().polls_failing_because is None
    (failing,) = (event for event in events if isinstance(event, PollsFailing))
    (recovered,) = (event for event in events if isinstance(event, PollsRecovered))
    assert 60 <= failing.elapsed <= 80
    assert 190 <= recovered.elapsed <= 210
    assert [message.partition(":")[2] for message in caplog.messages if "have failed" in message] == [
        (
            f" its polls have failed for {failing.elapsed:.3g} s, and the wait continues: "
            "the server answered 503 Service Unavailable"
        )
    ]
    assert sum("polls are answered again" in message for message in caplog.messages) == 1


@virtual_time
async def test_an_id_that_fails_alone_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    """The client reports an id that fails alone once, although the other polls succeed."""
    transport = at_once(lambda i, _: status(500) if i == "fails" else running(i))
    async with transport.client(poll=EVERY_TEN, retry=ONE_ATTEMPT) as client:
        with caplog.at_level(logging.WARNING, "kaizen_async"):
            await outcomes_of(client, ["fails", "runs"], deadline=400)
    assert [message.partition(": ")[0] for message in caplog.messages if "have failed" in message] == ["fails"]


@virtual_time
async def test_an_open_stream_is_never_dropped() -> None:
    """An open stream without pending ids stays usable while many other policies are used. A close ends it."""
    transport = at_once(ending(5000))
    client = transport.client(ended_records=0)
    async with client.instructor_executions.wait_many(poll=EVERY_SECOND) as outcomes:
        for number in range(250):
            with pytest.raises(DeadlineExceededError):
                await client.instructor_executions.wait("x", deadline=1, poll=every(1 + number / 1000))
        outcomes.add("a", "b")
        await asyncio.sleep(1)
        assert client.stats().waiting == 2
        closing = asyncio.create_task(client.aclose())
        assert [type(outcome.error).__name__ async for outcome in outcomes] == ["ClientClosedError"] * 2
        await closing


@virtual_time
async def test_a_record_that_is_too_large_is_not_kept() -> None:
    """The client yields a record that is too large, but does not keep it in memory."""
    big = [{"id": "x" * 150, "name": "y" * 150}] * 250

    def answer(execution_id: str, number: int) -> Reply:
        logins = big if execution_id.startswith("big") else []
        if now() >= 20:
            return ended(execution_id, logins=logins)
        return running(execution_id, f"s{min(number, 2)}", logins=logins)

    transport = at_once(answer)
    async with transport.client(poll=EVERY_SECOND) as client:
        async with client.instructor_executions.watch(["big", "small"]) as changes:
            seen = [(change.id, change.before is None) async for change in changes]
        assert [is_first for i, is_first in seen if i == "big"] == [True, True, True]
        assert [is_first for i, is_first in seen if i == "small"] == [True, False, False]
        requests = len(transport.sent)
        assert (await client.instructor_executions.wait("small")).id == "small"
        assert len(transport.sent) == requests
        assert len((await client.instructor_executions.wait("big")).logins) == 250
        assert len(transport.sent) == requests + 1
        with pytest.raises(DeadlineExceededError) as caught:
            transport._play = lambda i, _: running(i, logins=big)
            await client.instructor_executions.wait("big2", deadline=5)
        assert caught.value.last_execution is None


@virtual_time
async def test_a_cancelled_poll_does_not_affect_a_later_wait() -> None:
    """A new wait for an id works while the poll of a cancelled wait is still ending."""

    class Reluctant(ScriptedTransport):
        async def send(self, *args: Any) -> Answer:
            try:
                return await super().send(*args)
            except asyncio.CancelledError:
                await asyncio.sleep(1)
                raise ZeroDivisionError from None

    transport = Reluctant(lambda i, number: (NEVER, running(i)) if number == 1 else ending(5)(i, 0))
    async with transport.client(poll=PollPolicy(max_interval=1)) as client:
        first = asyncio.create_task(client.instructor_executions.wait("a"))
        await asyncio.sleep(0.5)
        first.cancel()
        await asyncio.sleep(0)
        assert (await client.instructor_executions.wait("a")).is_finished
        await asyncio.wait([first])
        assert never_ending("a", 1)
        await assert_idle(client, transport)


@pytest.mark.parametrize(
    ("code", "invalid", "order", "within"),
    [
        (400, 0.9, "mixed", 40),
        (422, 0.9, "invalid first", 61),
        (400, 1.0, "mixed", 31),
        (403, 0.5, "mixed", 45),
    ],
)
@virtual_time
async def test_ids_that_the_server_refuses_end_alone_and_soon(
    code: int, invalid: float, order: str, within: float
) -> None:
    """Each valid id gets its record and each invalid id its error, for any number and order of invalid ids."""
    random = Random(code)
    names = [f"e{number}" for number in range(200)]
    refused = {name for name in names if random.random() < invalid}
    if order == "invalid first":
        names.sort(key=lambda name: name not in refused)

    def play(execution_id: str, _: int) -> Reply:
        return status(code) if execution_id in refused else ending(20)(execution_id, 0)

    transport = ScriptedTransport(play, latency=0.05)
    async with transport.client(poll=PollPolicy()) as client:
        outcomes = await outcomes_of(client, names)
        assert sorted(outcome.id for outcome in outcomes) == sorted(names)
        assert {outcome.id for outcome in outcomes if not outcome.ok} == refused
        assert all(getattr(outcome.error, "status", code) == code for outcome in outcomes)
        assert now() <= within
        await assert_idle(client, transport)


@virtual_time
async def test_single_waits_for_invalid_ids_end_together() -> None:
    """When the patience ends, the client polls each refused id once more, and all waits end together."""
    transport = at_once(lambda *_: status(422))
    async with transport.client(poll=PollPolicy(refusal_patience=10)) as client:
        waits = (client.instructor_executions.wait(f"e{number}") for number in range(30))
        errors = await asyncio.gather(*waits, return_exceptions=True)
        assert {type(error) for error in errors} == {StatusError}
        assert 9 <= now() <= 11
        await assert_idle(client, transport)
