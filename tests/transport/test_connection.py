"""Our own connection reads the same responses as aiohttp's parser, or hands them over to it."""

import itertools
import random

import fuzz_responses
import pytest
from aioresponses import aioresponses
from scripted_server import (
    LOOPS,
    SILENCE,
    Request,
    Script,
    ScriptedServer,
    client_for,
    closing,
    ok,
    record,
    response,
    run_on,
)

from kaizen_async._transport.connection import READ_SIZE, Address
from kaizen_async._transport.head import parse_head
from kaizen_async._transport.reading import Limits

CASES = 2000
MOST_CUTS = 120


@pytest.mark.parametrize("sample", fuzz_responses.SAMPLES.values(), ids=fuzz_responses.SAMPLES)
async def test_a_response_is_read_alike_wherever_it_is_cut(sample: bytes) -> None:
    """Both readers agree on a response as a whole and cut at any position of its beginning."""
    await fuzz_responses.check([sample])
    for position in range(1, min(len(sample), MOST_CUTS)):
        await fuzz_responses.check(fuzz_responses.cut(sample, [position]))


async def test_changed_responses_are_read_alike() -> None:
    """Both readers agree on a few thousand broken responses, the same in every run."""
    for pieces in itertools.islice(fuzz_responses.cases(random.Random(1)), CASES):
        await fuzz_responses.check(pieces)


async def test_reads_are_large_until_chunks_come_in_one() -> None:
    """After a long response the next is read at once, until one in chunks comes, whose number has to be bounded."""
    long = b"HTTP/1.1 200 OK\r\nContent-Length: 20000\r\n\r\n" + b" " * 20_000
    chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1000\r\n%4096b\r\n" % b"" + b"0\r\n\r\n"
    connection = fuzz_responses.connection_without_network(Address(), Limits(100_000, 2048, 32))
    sizes = []
    for arriving in (long, long, chunks, long, long):
        response = connection.exchange(b"", b"", 0.0)
        sizes.append(len(connection.get_buffer(-1)))
        fuzz_responses.receive(connection, arriving)
        assert await response
    assert sizes[1:3] == [READ_SIZE] * 2
    assert max(sizes[0], *sizes[3:]) < READ_SIZE


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    "later", [[response(record("another"))], [SILENCE]], ids=["the record of another id", "no response"]
)
def test_the_next_attempt_takes_a_new_connection(later: Script, loop: str) -> None:
    """After a kept connection was silent or out of step, the next attempt opens a new one."""

    def play(request: Request) -> Script:
        return [0.02, ok(request)] if request.number_on_connection == 1 else later

    async def main() -> None:
        async with (
            ScriptedServer(play) as server,
            closing(client_for(server, attempt_timeout=0.2), server) as client,
        ):
            await client.instructor_executions.get_many(["a", "b", "c"])
            assert (await client.instructor_executions.get("d")).id == "d"
            assert server.asked["d"] == 2

    run_on(loop, main())


async def test_a_mock_installed_later_gets_the_request(mocked: aioresponses) -> None:
    """A mock that is installed later gets the requests, and after its removal our own connection sends again."""
    async with ScriptedServer() as server, client_for(server) as client:
        url = f"{server.url}/instructor/executions/get"
        mocked.stop()
        await client.instructor_executions.get("a")
        mocked.start()
        mocked.post(url, payload=record("b"))
        assert (await client.instructor_executions.get("b")).id == "b"
        mocked.stop()
        await client.instructor_executions.get("c")
        assert list(server.asked) == ["a", "c"]
        mocked.start()


def test_an_equal_head_is_read_once_and_others_are_forgotten() -> None:
    """The parser caches equal heads, up to a limit, because a server may send a different head each time."""
    head = b"HTTP/1.1 200 OK\r\nX-Served: %d\r\nContent-Length: 2"
    first = parse_head(head % 0, 10)
    assert first is not None
    assert (first.status, first.length, first.coding, first["x-served"]) == (200, 2, "", "0")
    assert parse_head(head % 0, 10) is first
    assert parse_head(head % 0, 1) is None
    for number in range(1, 300):
        parse_head(head % number, 10)
    assert parse_head(head % 0, 10) is not first
