"""The behaviour that all result streams share, in virtual time."""

import asyncio
import gc
import weakref
from typing import Any

import pytest
from virtual_time import virtual_time

from kaizen_async import KaizenError
from kaizen_async._streams import PAUSE_EVERY, ResultStream, all_done


class Numbers(ResultStream[int]):
    """A stream that yields numbers, one second apart, and may fail at the end."""

    def __init__(self, count: int, *, pause: float = 1.0, error: BaseException | None = None) -> None:
        super().__init__()
        self.count = count
        self.pause = pause
        self.error = error
        self.ended = False

    def _start(self) -> None:
        self._run(self._count())

    async def _count(self) -> None:
        try:
            for number in range(self.count):
                self._put(number)
                if self.pause:
                    await asyncio.sleep(self.pause)
            if self.error is not None:
                raise self.error
        finally:
            self.ended = True


@virtual_time
async def test_results_come_as_they_are_put_in() -> None:
    """A stream yields each result when it arrives, and ends when its tasks have ended."""
    loop = asyncio.get_running_loop()
    async with Numbers(3) as numbers:
        assert [(number, loop.time()) async for number in numbers] == [(0, 0), (1, 1), (2, 2)]
        assert loop.time() == 3
        assert [number async for number in numbers] == []


@virtual_time
async def test_a_stream_is_entered_once_and_before_it_is_read() -> None:
    """A stream raises an error if it is read before it is entered, or entered twice."""
    stream = Numbers(1)
    with pytest.raises(RuntimeError, match="enter the stream first"):
        await anext(stream)
    async with stream as numbers:
        assert numbers is stream
        with pytest.raises(RuntimeError, match="entered once"):
            await stream.__aenter__()
    await Numbers(1).__aexit__(None, None, None)


@virtual_time
async def test_a_failure_comes_after_the_results_and_once() -> None:
    """A stream yields its results, then raises the first failure, once."""
    async with Numbers(2, error=ZeroDivisionError("first")) as numbers:
        assert await anext(numbers) == 0
        assert await anext(numbers) == 1
        with pytest.raises(ZeroDivisionError, match="first"):
            await anext(numbers)
        assert [number async for number in numbers] == []
    async with Numbers(0, error=ZeroDivisionError("second")) as numbers:
        numbers._fail(KeyError("first"))
        with pytest.raises(KeyError, match="first"):
            await anext(numbers)


@virtual_time
async def test_a_failure_that_was_raised_goes_when_its_last_reference_goes() -> None:
    """A stream keeps no reference to an error that it has raised, and neither do the frames in its traceback."""
    gc.disable()
    try:
        async with Numbers(0) as numbers:
            numbers._fail(KaizenError("of a source"))
            reference = None
            try:
                await anext(numbers)
            except KaizenError as error:
                reference = weakref.ref(error)
            assert reference is not None
            assert reference() is None
    finally:
        gc.enable()


@virtual_time
async def test_leaving_ends_the_tasks() -> None:
    """Leaving a stream cancels its tasks and waits for their cleanup."""
    async with Numbers(100) as numbers:
        async for number in numbers:
            if number == 2:
                break
    assert numbers.ended
    assert asyncio.all_tasks() == {asyncio.current_task()}


@virtual_time
async def test_a_fast_consumer_does_not_block_the_loop() -> None:
    """A stream with many ready results lets the event loop run after every PAUSE_EVERY results."""
    turns = 0

    def turn() -> None:
        nonlocal turns
        turns += 1
        asyncio.get_running_loop().call_soon(turn)

    async with Numbers(10 * PAUSE_EVERY, pause=0) as numbers:
        assert await anext(numbers) == 0
        turn()
        seen = [number async for number in numbers]
        assert seen == list(range(1, 10 * PAUSE_EVERY))
        assert 10 <= turns <= 20


@virtual_time
async def test_a_cancelled_consumer_loses_no_result() -> None:
    """A consumer that is cancelled while it waits, or in the pause between results, loses no result."""
    async with Numbers(3 * PAUSE_EVERY, pause=0) as numbers:
        seen: list[int] = []

        async def consume() -> None:
            async for number in numbers:
                seen.append(number)

        while len(seen) < 3 * PAUSE_EVERY:
            before = len(seen)
            task = asyncio.create_task(consume())
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled() or len(seen) > before
        assert seen == list(range(3 * PAUSE_EVERY))


@virtual_time
async def test_waiting_for_tasks_outlasts_cancellation() -> None:
    """A cancelled `all_done` waits until all tasks have ended, and then raises the cancellation."""

    async def reluctant() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(3)

    async def stop(task: "asyncio.Task[Any]") -> None:
        await asyncio.sleep(0)
        task.cancel()
        await all_done([task])

    task = asyncio.create_task(reluctant())
    stopping = asyncio.create_task(stop(task))
    for _ in range(2):
        await asyncio.sleep(1)
        stopping.cancel()
    await asyncio.wait([stopping])
    assert task.cancelled()
    assert stopping.cancelled()
    assert asyncio.get_running_loop().time() == 3
    await all_done([])
