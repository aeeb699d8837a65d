"""An address learns its limit of connections only from failures that a limit explains."""

import asyncio
import errno

import pytest
from scripted_server import LOOPS, RESET, Request, Script, ScriptedServer, client_for, closing, ok, run_on, settle

from kaizen_async import RetryPolicy
from kaizen_async._transport.capacity import Capacity, NoConnectionError

NO_FILES = OSError(errno.EMFILE, "Too many open files")
RESET_ERROR = ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
IDS = [f"e{number}" for number in range(60)]


async def opened(count: int) -> Capacity:
    """Return the capacity of an address with a number of open connections."""
    capacity = Capacity()
    for _ in range(count):
        assert not capacity.add()
    return capacity


def refuse(capacity: Capacity, error: Exception = RESET_ERROR, *, is_expected: bool = False) -> bool:
    """End one of the connections, and return whether a limit explains that."""
    capacity.remove()
    try:
        capacity.refused(error, is_expected=is_expected)
    except NoConnectionError:
        return True
    return False


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("most", [1, 5])
def test_lookups_wait_for_the_connections_that_a_server_accepts(most: int, loop: str) -> None:
    """If the server resets all connections above a limit, lookups wait for a connection, and none fails."""

    def play(request: Request) -> Script:
        return [0.005, ok(request)] if request.connection <= most else [RESET]

    async def main() -> None:
        async with ScriptedServer(play) as server:
            settings = {"concurrency": 20, "retry": RetryPolicy(max_attempts=1)}
            async with closing(client_for(server, **settings), server) as client:
                outcomes = await client.instructor_executions.get_many(IDS)
                assert [outcome.error for outcome in outcomes if not outcome.ok] == []
                stats = client.stats()
                assert stats.attempts == len(server.requests) == len(IDS) + stats.retries
                assert sum(outcome.attempts for outcome in outcomes) == stats.attempts

    run_on(loop, main())


async def test_many_resets_lose_no_lookup() -> None:
    """If the server resets a third of all requests, every lookup succeeds and every request is counted."""

    def play(request: Request) -> Script:
        return [RESET] if request.number % 3 == 0 else [ok(request)]

    async with ScriptedServer(play) as server:
        policy = RetryPolicy(max_attempts=12, initial_backoff=0.001)
        async with closing(client_for(server, concurrency=20, retry=policy), server) as client:
            outcomes = await client.instructor_executions.get_many(f"e{number}" for number in range(300))
            assert all(outcome.ok for outcome in outcomes)
            assert client.stats().attempts == len(server.requests)


async def test_the_deadline_ends_the_wait_for_a_connection() -> None:
    """The deadline ends the wait for a connection, and the unsent request does not count as an attempt."""
    async with ScriptedServer(lambda request: [0.3, ok(request)]) as server:
        async with closing(client_for(server), server) as client:
            first = asyncio.create_task(client.instructor_executions.get("a"))
            await server.until(lambda: bool(server.requests))
            (address,) = client._binding.engine.transport._pool._addresses.values()
            address.capacity.most = 1
            address.capacity._probe_at = asyncio.get_running_loop().time() + 60
            (outcome,) = await client.instructor_executions.get_many(["b"], deadline=0.02)
            assert "while it waited for a connection" in str(outcome.error)
            assert "no more connections can be opened" in str(outcome.error.__cause__)
            assert outcome.attempts == 0
            await first
            assert client.stats().attempts == len(server.requests) == 1


async def test_a_connection_beyond_the_limit_is_tried_from_time_to_time() -> None:
    """The client tries one more connection from time to time, less often after each failure.

    Success raises the limit.
    """
    capacity = await opened(3)
    assert refuse(capacity)
    assert capacity.most == 2
    with pytest.raises(NoConnectionError):
        capacity.add()
    capacity._probe_at = 0.0
    assert not capacity.add()
    assert refuse(capacity)
    assert capacity._probe_delay == 0.2
    capacity._probe_at = 0.0
    capacity.add()
    capacity.works()
    assert capacity.most == 4
    assert capacity.add()
    capacity.works()
    assert capacity.most == 4


@pytest.mark.parametrize("error", [RESET_ERROR, NO_FILES], ids=["reset", "no files"])
async def test_a_limit_is_given_up_when_failures_do_not_vanish(error: Exception) -> None:
    """The client drops a limit that does not prevent failures, unless a resource of this machine causes them."""
    capacity = await opened(5)
    assert refuse(capacity, error)
    waiter = asyncio.create_task(capacity.room())
    await settle()
    for _ in range(8):
        capacity.failed()  # no connection has worked since, so these count as one failure
        capacity.responses += 2
        capacity.failed()
    assert (capacity.most is None) == (error is RESET_ERROR)
    assert refuse(capacity, error, is_expected=True) == (error is NO_FILES)
    capacity.wake()
    assert await waiter
    capacity.responses += 100
    assert refuse(capacity, error)
    capacity.close()


async def test_the_last_connection_ends_all_waits() -> None:
    """When the last connection fails, all waits for a connection end. Without a limit there is no wait."""
    capacity = await opened(3)
    assert await capacity.room()
    assert refuse(capacity)
    waiters = [asyncio.create_task(capacity.room()) for _ in range(2)]
    await settle()
    capacity.remove(works=True)
    capacity.remove()
    assert await asyncio.gather(*waiters) == [True, False]
    assert not await capacity.room()
    assert not refuse_last(capacity)
    capacity.close()


def refuse_last(capacity: Capacity) -> bool:
    """Open a connection and refuse it while no other is open."""
    capacity.add()
    return refuse(capacity)


async def test_a_cancelled_wait_wakes_the_next() -> None:
    """A cancelled wait for a connection leaves the queue, or wakes the next wait."""
    capacity = await opened(2)
    assert refuse(capacity)
    gone, woken, third, cancelled, last = (asyncio.create_task(capacity.room()) for _ in range(5))
    await settle()
    gone.cancel()
    await settle()
    capacity.wake()
    woken.cancel()
    assert await third
    cancelled.cancel()
    capacity.wake()
    assert await last
    assert gone.cancelled()
    assert woken.cancelled()
    assert cancelled.cancelled()
    capacity.close()


@pytest.mark.parametrize(
    ("error", "advice"), [(RESET_ERROR, "set concurrency to this number"), (NO_FILES, "ulimit -n")]
)
async def test_one_warning_names_the_limit(error: Exception, advice: str, caplog: pytest.LogCaptureFixture) -> None:
    """One warning names the limit and how to raise it. There is none if the limit is gone or no longer reached."""
    capacity = await opened(3)
    assert refuse(capacity, error)
    capacity._warn()
    assert not caplog.text  # no connection has worked yet, so this may be an outage
    capacity.responses = 1
    capacity._warn()
    assert "only 2 connections can be open at once" in caplog.text
    assert advice in caplog.text
    caplog.clear()
    capacity.remove()
    capacity._warn()
    assert not caplog.text


async def test_a_waiter_is_woken_to_try_one_more() -> None:
    """A waiting lookup is woken to try one more connection, and the others are woken after it."""
    capacity = await opened(2)
    assert refuse(capacity)
    assert await asyncio.gather(capacity.room(), capacity.room()) == [True, True]
    capacity.close()
