"""Outages and pauses through the whole client, in virtual time: ends, errors and log lines."""

import asyncio
import re
from collections.abc import Callable
from itertools import count

import pytest
from scripted_transport import Reply, ScriptedTransport, failing, health_of, record, status
from virtual_time import virtual_time

from kaizen_async import RateLimitError
from kaizen_async._lookup.health import LONGEST_PAUSE

IDS = [f"e{number}" for number in range(300)]


def now() -> float:
    """Return virtual seconds."""
    return asyncio.get_running_loop().time()


def bad_for_good() -> dict[str, Callable[[], Reply]]:
    """Return replies of servers that never recover."""
    number = count()
    return {
        "fails": lambda: status(502),
        "rejects": lambda: status(429),
        "rejects and names a time": lambda: status(429, retry_after="7"),
        "refuses the key": lambda: status(401),
        "fails and rejects in turn": lambda: status(502 if next(number) % 2 else 429),
    }


@pytest.mark.parametrize("kind", bad_for_good())
def test_every_lookup_without_a_deadline_ends(kind: str) -> None:
    """If a server never recovers, all lookups without a deadline end together with its error, most of them unsent."""
    reply = bad_for_good()[kind]

    @virtual_time
    async def scenario() -> None:
        transport = ScriptedTransport(lambda *_: reply())
        async with transport.client(deadline=None) as client:
            outcomes = await client.instructor_executions.get_many(IDS)
        assert now() < LONGEST_PAUSE + 15
        assert len(transport.sent) < LONGEST_PAUSE
        assert all("answered" in str(outcome.error) for outcome in outcomes)
        assert sum(outcome.attempts == 0 for outcome in outcomes) >= len(IDS) / 2

    scenario()


@virtual_time
async def test_without_a_deadline_a_lookup_waits_as_long_as_the_server_asks() -> None:
    """Without a deadline, lookups wait once for any Retry-After, and end if the server then rejects them again."""
    transport = ScriptedTransport(lambda i, _: record(i) if now() >= 3600 else status(429, retry_after="3600"))
    async with transport.client(deadline=None) as client:
        outcomes = await client.instructor_executions.get_many(IDS)
    assert all(outcome.ok for outcome in outcomes)
    transport = ScriptedTransport(lambda *_: status(429, retry_after="3600"))
    async with transport.client(deadline=None) as client:
        began = now()
        outcomes = await client.instructor_executions.get_many(IDS)
    assert not any(outcome.ok for outcome in outcomes)
    assert 3600 <= now() - began < 3602


@pytest.mark.parametrize("retry_after", [None, "7"])
def test_a_server_that_rejects_for_good_ends_a_batch_at_the_deadline(retry_after: str | None) -> None:
    """If the server always rejects, the whole batch ends together at the deadline, whatever time the server names."""
    rejection = status(429) if retry_after is None else status(429, retry_after=retry_after)

    @virtual_time
    async def scenario() -> None:
        transport = ScriptedTransport(lambda *_: rejection)
        async with transport.client(deadline=20) as client:
            outcomes = await client.instructor_executions.get_many([f"e{number}" for number in range(1000)])
        assert now() < 21
        assert len(transport.sent) < 130
        assert all(isinstance(outcome.error, RateLimitError) for outcome in outcomes)
        assert sum(outcome.attempts == 0 for outcome in outcomes) > 800

    scenario()


@virtual_time
async def test_a_server_that_fails_and_rejects_in_turn_ends_a_batch_at_the_deadline() -> None:
    """A rejection does not restart the time of an outage, so a batch ends at its deadline."""
    number = count()
    transport = ScriptedTransport(lambda *_: status(502 if next(number) % 2 else 429))
    async with transport.client(deadline=20) as client:
        outcomes = await client.instructor_executions.get_many(IDS)
    assert not any(outcome.ok for outcome in outcomes)
    assert now() < 22


@virtual_time
async def test_a_lookup_without_a_deadline_outlives_the_clients() -> None:
    """A lookup without a deadline outlives the client's in an outage, and ends after five minutes at the latest."""
    back_at = 250.0
    transport = ScriptedTransport(lambda i, _: record(i) if now() >= back_at else status(502))
    async with transport.client(deadline=10) as client:
        others = [asyncio.create_task(failing(client, execution_id)) for execution_id in IDS[:60]]
        endless = asyncio.create_task(client.instructor_executions.get("endless", deadline=None))
        await asyncio.gather(*others)
        assert now() == pytest.approx(10, abs=0.5)
        assert (await endless).id == "endless"
        back_at = 1e9
        began = now()
        others = [asyncio.create_task(failing(client, execution_id)) for execution_id in IDS[:60]]
        error = await failing(client, "endless", deadline=None)
        assert LONGEST_PAUSE <= now() - began < LONGEST_PAUSE + 15
        assert str(error).startswith("endless: the server answered 502 Bad Gateway (")
        await asyncio.gather(*others)


@virtual_time
async def test_the_log_has_one_line_for_the_pause_and_one_for_what_it_cost(caplog: pytest.LogCaptureFixture) -> None:
    """Two log lines name the cause, the times, and the failed requests and lookups of a pause."""
    transport = ScriptedTransport(lambda i, _: record(i) if now() >= 5 else status(502))
    async with transport.client(concurrency=20) as client:
        impatient = asyncio.create_task(failing(client, "impatient", deadline=2))
        outcomes = await client.instructor_executions.get_many(IDS)
        await impatient
    assert all(outcome.ok for outcome in outcomes)
    paused, resumed = [entry.getMessage() for entry in caplog.records if entry.name == "kaizen_async"]
    assert re.fullmatch(
        r"The server has been failing for [\d.]+ s \(502\)\. Paused; probing every 0\.[\d]+ to 0\.8 s\.", paused
    )
    found = re.fullmatch(
        r"The server works again after ([\d.]+) s\. The outage cost (\d+) failed requests and 1 lookups\.", resumed
    )
    assert found is not None
    assert float(found[1]) == pytest.approx(5, abs=1)
    assert int(found[2]) == sum(moment < 5 for moment in transport.times)


@virtual_time
async def test_the_log_says_what_a_pause_for_rejections_cost(caplog: pytest.LogCaptureFixture) -> None:
    """The log reports the cost of a pause for rejections, even if no lookup was lost."""
    transport = ScriptedTransport(lambda i, _: record(i) if now() >= 3 else status(429, retry_after="3"))
    async with transport.client(concurrency=20) as client:
        await client.instructor_executions.get_many(IDS[:40])
    paused, resumed = [entry.getMessage() for entry in caplog.records if entry.name == "kaizen_async"]
    assert re.fullmatch(
        r"The server has rejected every request of late \(429\)\. Paused; probing in 3[\d.]* s\.", paused
    )
    assert re.fullmatch(
        r"The server accepts requests again after a pause of 3[\d.]* s\. It cost 20 rejected requests and 0 lookups\.",
        resumed,
    )


@virtual_time
async def test_a_refused_key_is_logged_as_such(caplog: pytest.LogCaptureFixture) -> None:
    """The log reports a refused key as a refusal, not as an outage."""
    transport = ScriptedTransport(lambda *_: status(401))
    async with transport.client() as client:
        outcomes = await client.instructor_executions.get_many(IDS)
        assert health_of(client).state().condition == "refused"
    assert not any(outcome.ok for outcome in outcomes)
    (line,) = [entry.getMessage() for entry in caplog.records if entry.name == "kaizen_async"]
    assert re.match(r"The server has been refusing every request for [\d.]+ s \(401\)\. Paused; probing every ", line)


@virtual_time
async def test_a_get_in_an_old_outage_probes_or_fails_at_once() -> None:
    """A `get` in a long outage probes or fails at once, so that the handlers of a web app do not pile up."""
    transport = ScriptedTransport(lambda i, _: record(i) if now() < 0.5 else status(504))
    async with transport.client(deadline=5) as client:
        await client.instructor_executions.get_many([f"b{number}" for number in range(1000)])
        await asyncio.sleep(30)
        sent, began = len(transport.sent), now()
        errors = await asyncio.gather(*(failing(client, f"late{number}") for number in range(200)))
        assert now() - began < 0.5
        assert len(transport.sent) - sent <= 2
        assert all("504" in str(error) and "has been failing for 3" in str(error) for error in errors)
