"""Callers pass ids in any collection or source, and may change it during the call. The tests run in virtual time."""

import array
import asyncio
import itertools
import json
from collections import ChainMap, Counter, OrderedDict, UserDict, UserList, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

import pytest
from scripted_lives import at_once, ended, ending, every, later, now, outcomes_of
from scripted_server import LOOPS, ScriptedServer, client_for, ok, reach, run_on
from scripted_transport import NEVER, ScriptedTransport, record
from virtual_time import VirtualLoop, virtual_time

from kaizen_async import ClientClosedError, DeadlineExceededError, KaizenClient, RetryPolicy

VERBS = ("stream", "wait_many", "watch")
any_verb = pytest.mark.parametrize("verb", VERBS)

NAMES = [f"e{number}" for number in range(300)]


class Shelf:
    """A collection of the caller, with only a length and an iterator."""

    def __init__(self, ids: Iterable[str]) -> None:
        self.ids = dict.fromkeys(ids)

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def clear(self) -> None:
        """Remove all ids."""
        self.ids.clear()


class Bar:
    """A progress bar with a length, which reads its source only once.

    Each `iter` continues where the last one stopped.
    """

    def __init__(self, ids: Iterable[str], total: int | None) -> None:
        self.source = iter(ids)
        self.total = total
        self.read = 0

    def __len__(self) -> int:
        if self.total is None:
            raise TypeError("length unknown")
        return self.total

    def __contains__(self, execution_id: object) -> bool:
        return False

    def __iter__(self) -> Iterator[str]:
        for execution_id in self.source:
            self.read += 1
            yield execution_id


COLLECTIONS: dict[str, Callable[[list[str]], Any]] = {
    "list": list,
    "set": set,
    "dict": dict.fromkeys,
    "deque": deque,
    "UserList": UserList,
    "OrderedDict": OrderedDict.fromkeys,
    "Counter": Counter,
    "UserDict": lambda ids: UserDict(dict.fromkeys(ids)),
    "ChainMap": lambda ids: ChainMap(dict.fromkeys(ids)),
    "a type of one's own": Shelf,
}
VIEWS: dict[str, Callable[[dict[str, str]], Any]] = {"keys": dict.keys, "values": dict.values}


async def results_of(
    client: KaizenClient, verb: str, ids: Any, each: Callable[[], object], **options: Any
) -> Counter[Any]:
    """Count the results of a streaming method for each id, and call a function between them."""
    seen: Counter[Any] = Counter()
    async with getattr(client.instructor_executions, verb)(ids, **options) as results:
        each()
        async for result in results:
            seen[result.id] += 1
            each()
    return seen


@any_verb
@pytest.mark.parametrize("collection", COLLECTIONS.values(), ids=COLLECTIONS)
def test_a_collection_is_copied_at_the_call(verb: str, collection: Callable[[list[str]], Any]) -> None:
    """A method uses the ids that a collection holds at the call, regardless of later changes."""

    @virtual_time
    async def play() -> None:
        transport = ScriptedTransport(lambda i, _: ended(i))
        async with transport.client(concurrency=5) as client:
            ids = collection(NAMES)
            assert await results_of(client, verb, ids, ids.clear) == Counter(NAMES)

    play()


@any_verb
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_dict_view_is_copied_at_the_call(verb: str, view: Callable[[dict[str, str]], Any]) -> None:
    """A method uses the ids that a dict view holds at the call, although the view follows its dict."""

    @virtual_time
    async def play() -> None:
        transport = ScriptedTransport(lambda i, _: ended(i))
        async with transport.client(concurrency=5) as client:
            mapping = dict(zip(NAMES, NAMES, strict=True))

            def change() -> None:
                mapping.popitem()
                mapping[f"new {len(mapping)}"] = "new"

            assert await results_of(client, verb, view(mapping), change) == Counter(NAMES)

    play()


@virtual_time
async def test_an_array_is_a_collection() -> None:
    """An array of numbers gives an outcome for each number, and the client sends nothing."""
    transport = ScriptedTransport()
    async with transport.client() as client:
        outcomes = await client.instructor_executions.get_many(array.array("i", [1, 2]))  # type: ignore[arg-type]
        assert [outcome.id for outcome in outcomes] == [1, 2]


@virtual_time
async def test_a_source_with_a_length_is_never_read_twice() -> None:
    """Checkpoints and deadlines do not read a source with a length again, and a stream does not read it far ahead."""
    transport = ScriptedTransport(lambda i, _: ended(i), latency=1)
    async with transport.client(concurrency=2) as client:
        for verb in ("stream", "wait_many"):
            bar = Bar(NAMES, len(NAMES))
            seen: Counter[str] = Counter()
            async with getattr(client.instructor_executions, verb)(bar, deadline=20) as outcomes:
                async for outcome in outcomes:
                    seen[outcome.id] += 1
                    if now() < 10:
                        assert bar.read < 40
                    state = json.loads(json.dumps(outcomes.checkpoint()))
                    assert seen.total() + len(state["ids"]) == state["taken"] == outcomes.taken
                    assert outcomes.done == seen.total()
                    assert outcomes.total == 300
            assert seen == Counter(NAMES)
            await asyncio.sleep(100)


@any_verb
def test_a_source_with_a_false_length_may_be_endless(verb: str) -> None:
    """A stream does not read far ahead in a source whose length is unknown, and reads nothing after its deadline."""

    @virtual_time
    async def play() -> None:
        transport = ScriptedTransport(lambda i, _: ended(i), latency=1)
        async with transport.client(concurrency=2) as client:
            bar = Bar((f"e{number}" for number in itertools.count()), None)
            seen = await results_of(client, verb, bar, lambda: None, deadline=10)
            assert 10 <= seen.total() <= bar.read <= 30

    play()


@virtual_time
async def test_a_deadline_ends_a_source_at_its_length() -> None:
    """After its deadline, a stream takes ids of an endless source only up to the length that it reports."""
    for total in (30, 3):
        transport = ScriptedTransport(lambda i, _: ended(i), latency=1)
        async with transport.client(concurrency=2) as client:
            bar = Bar((f"e{number}" for number in itertools.count()), total)
            seen = await results_of(client, "stream", bar, lambda: None, deadline=5)
            assert seen.total() == max(total, seen.total())
            assert seen.total() <= 30


def raising(error: BaseException) -> Iterator[str]:
    """Yield two ids, then raise an error."""
    yield "a"
    yield "b"
    raise error


class Raising:
    """An iterator that yields two ids and then raises. A generator would replace some errors."""

    def __init__(self, error: BaseException) -> None:
        self.ids = ["b", "a"]
        self.error = error

    def __iter__(self) -> "Raising":
        return self

    def __next__(self) -> str:
        if not self.ids:
            raise self.error
        return self.ids.pop()

    def __aiter__(self) -> "Raising":
        return self

    async def __anext__(self) -> str:
        return next(self)


class AsyncRaising(Raising):
    """The asynchronous iterator alone."""

    __iter__ = None  # type: ignore[assignment]


class SyncRaising(Raising):
    """The synchronous iterator alone."""

    __aiter__ = None  # type: ignore[assignment]


ERRORS: dict[str, tuple[BaseException, type[BaseException]]] = {
    "an error": (KeyError("mine"), KeyError),
    "a timeout": (TimeoutError("mine"), TimeoutError),
    "an exit": (SystemExit(3), SystemExit),
    "an interrupt": (KeyboardInterrupt("mine"), KeyboardInterrupt),
    "a cancellation": (asyncio.CancelledError("mine"), RuntimeError),
    "the end of a generator": (GeneratorExit("mine"), RuntimeError),
}


@any_verb
@pytest.mark.parametrize("source", [SyncRaising, AsyncRaising])
@pytest.mark.parametrize(("error", "raised"), ERRORS.values(), ids=ERRORS)
def test_an_error_of_the_source_reaches_the_consumer(
    verb: str, source: type[Raising], error: BaseException, raised: type[BaseException]
) -> None:
    """The consumer gets the results of earlier ids, then the source's error. The source never looks finished."""

    @virtual_time
    async def play() -> None:
        transport = ScriptedTransport(lambda i, _: ended(i))
        async with transport.client() as client:
            seen: list[str] = []
            with pytest.raises(raised) as caught:
                async with getattr(client.instructor_executions, verb)(source(error)) as results:
                    async for result in results:
                        seen.append(result.id)
            assert error in {caught.value, caught.value.__cause__}
            assert seen == ["a", "b"]
            with pytest.raises(raised):
                await client.instructor_executions.get_many(source(error))

    play()


@any_verb
def test_a_stop_of_the_other_kind_is_an_error(verb: str) -> None:
    """A synchronous source that raises StopAsyncIteration causes a RuntimeError, not the end of the stream."""

    @virtual_time
    async def play() -> None:
        transport = ScriptedTransport(lambda i, _: ended(i))
        async with transport.client() as client:
            with pytest.raises(RuntimeError, match="the source of the ids raised StopAsyncIteration"):
                await results_of(client, verb, SyncRaising(StopAsyncIteration()), lambda: None)

    play()


@any_verb
def test_a_reader_that_is_cancelled_is_an_error(verb: str) -> None:
    """A source that awaits a cancelled task of the caller causes a RuntimeError, not the end of the stream."""

    async def fed() -> AsyncIterator[str]:
        reader = asyncio.create_task(asyncio.sleep(100))
        yield "a"
        asyncio.get_running_loop().call_later(1, reader.cancel)
        await reader

    @virtual_time
    async def play() -> None:
        transport = ScriptedTransport(lambda i, _: ended(i))
        async with transport.client() as client:
            with pytest.raises(RuntimeError, match="the source of the ids raised CancelledError"):
                await results_of(client, verb, fed(), lambda: None)

    play()


@any_verb
def test_a_source_that_will_not_be_cancelled_does_not_hold_the_caller(verb: str) -> None:
    """Leaving the block ends the stream, even if its source ignores cancellations."""

    async def stubborn() -> AsyncIterator[str]:
        yield "a"
        while True:
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                yield "b"

    @virtual_time
    async def play() -> None:
        transport = ScriptedTransport(lambda i, _: ended(i))
        async with transport.client(concurrency=2) as client:
            async with getattr(client.instructor_executions, verb)(stubborn()) as results:
                assert (await anext(results)).id == "a"
            assert now() < 1

    play()


@any_verb
def test_every_consumer_ends_when_the_block_is_left(verb: str) -> None:
    """Leaving the block ends all tasks that iterate over the stream, even with results outstanding."""

    @virtual_time
    async def play() -> None:
        transport = ScriptedTransport(lambda i, _: (NEVER, ended(i)) if i == "never" else ended(i))
        async with transport.client() as client:

            async def consume(results: Any) -> int:
                return len([result async for result in results])

            async with getattr(client.instructor_executions, verb)(["never", "a"]) as results:
                consumers = [asyncio.create_task(consume(results)) for _ in range(3)]
                await asyncio.sleep(1)
            counts = await asyncio.gather(*consumers)
            assert sum(counts) == 1
            assert [result async for result in results] == []

    play()


class Crashing(ScriptedTransport):
    """A transport that raises an unexpected error for one id."""

    async def send(self, url: Any, body: bytes, *args: Any) -> Any:
        """Raise the error for that id."""
        if b"crash" in body:
            raise ZeroDivisionError
        return await super().send(url, body, *args)


@pytest.mark.parametrize("steps", range(30))
def test_a_crash_is_always_raised(steps: int) -> None:
    """A stream raises an unexpected error at any step at which it is read, even with an endless source."""

    async def play() -> None:
        transport = Crashing()
        async with transport.client(concurrency=1) as client:
            with pytest.raises(ZeroDivisionError):
                async with client.instructor_executions.stream(["crash"]) as outcomes:
                    for _ in range(steps):
                        await asyncio.sleep(0)
                    await anext(outcomes)
            endless = itertools.chain(["a", "crash"], (f"e{number}" for number in itertools.count()))
            with pytest.raises(ZeroDivisionError):
                async with client.instructor_executions.stream(endless) as outcomes:
                    async for _ in outcomes:
                        pass

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(play())


@virtual_time
async def test_a_task_cancelled_from_outside_is_an_error() -> None:
    """If other code cancels the tasks of a stream, the stream raises a RuntimeError instead of ending early."""
    transport = ScriptedTransport(latency=5)
    async with transport.client(concurrency=2) as client:
        async with client.instructor_executions.stream(["a", "b"]) as outcomes:
            await asyncio.sleep(1)
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            with pytest.raises(RuntimeError, match="was cancelled from outside; results are missing"):
                await anext(outcomes)


def blocking(loop: asyncio.AbstractEventLoop, seconds: float, count: int) -> Iterator[str]:
    """Yield ids, and block the event loop before each of them."""
    import time

    for number in range(count):
        time.sleep(seconds)
        yield f"e{number}"


@pytest.mark.parametrize("loop", LOOPS)
def test_a_source_that_blocks_costs_only_its_time(loop: Any) -> None:
    """A source that blocks the loop delays neither the first outcome to the last id nor any attempt to its timeout."""

    async def play() -> None:
        async with ScriptedServer(lambda request: [ok(request)]) as server:
            async with client_for(server, attempt_timeout=0.3, retry=RetryPolicy(max_attempts=1)) as client:
                running = asyncio.get_running_loop()
                read = 0

                def source() -> Iterator[str]:
                    nonlocal read
                    for execution_id in blocking(running, 0.02, 40):
                        read += 1
                        yield execution_id

                async with client.instructor_executions.stream(source()) as outcomes:
                    assert (await anext(outcomes)).ok
                    assert read < 30
                    assert all([outcome.ok async for outcome in outcomes])

    run_on(loop, play())


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_that_is_blocked_does_not_time_an_attempt_out(loop: Any) -> None:
    """After a blocked loop, the client reads the response before it checks the attempt timeout."""

    async def play() -> None:
        import time

        async with ScriptedServer(lambda request: [ok(request)]) as server:
            async with client_for(server, attempt_timeout=0.1, retry=RetryPolicy(max_attempts=1)) as client:
                get = asyncio.create_task(client.instructor_executions.get("a"))
                await reach(lambda: client.stats().in_flight == 1)
                time.sleep(0.3)  # noqa: ASYNC251 - the test blocks the loop on purpose
                assert (await get).id == "a"

    run_on(loop, play())


@virtual_time
async def test_a_stream_resumes_from_its_checkpoint() -> None:
    """A stream with a checkpoint looks up exactly the ids whose outcomes were not yielded, also in another process."""
    ids = ["a", "b", "a", "c", "", *NAMES, "z"]
    transport = ScriptedTransport(lambda i, _: (NEVER if i == "z" else 0.1, record(i)))
    seen: Counter[str] = Counter()
    async with transport.client(concurrency=7) as client:
        stream = client.instructor_executions.stream(ids)
        async with stream as outcomes:
            for _ in range(100):
                seen[(await anext(outcomes)).id] += 1
        state = json.loads(json.dumps(stream.checkpoint()))
        assert state["taken"] == len(ids)
    again = ScriptedTransport()
    async with again.client(concurrency=7) as client:
        async with client.instructor_executions.stream(["new"], checkpoint=state) as outcomes:
            assert (outcomes.taken, outcomes.done, outcomes.total) == (0, 0, len(ids) - 100 + 1)
            async for outcome in outcomes:
                seen[outcome.id] += 1
            assert outcomes.taken == outcomes.done == outcomes.total
    assert seen == Counter([*ids, "new"])
    assert len(again.sent) <= len(ids) - 99


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpoint_counts_the_ids_taken(asynchronous: bool) -> None:
    """A checkpoint counts the ids taken from a generator, so that a later call can take the rest."""

    @virtual_time
    async def play() -> None:
        seen: Counter[str] = Counter()
        state: Any = None
        calls = 0
        while True:
            calls += 1
            rest = itertools.islice(NAMES, state and state["taken"], None)
            transport = ScriptedTransport()
            async with transport.client(concurrency=3) as client:
                source = later(rest) if asynchronous else rest
                async with client.instructor_executions.stream(source, checkpoint=state) as outcomes:
                    async for outcome in outcomes:
                        seen[outcome.id] += 1
                        state = outcomes.checkpoint()
                        if outcomes.done == 70:
                            break
            if not state["ids"] and state["taken"] == len(NAMES):
                break
        assert calls == 5
        assert seen == Counter(NAMES)

    play()


@virtual_time
async def test_wait_many_accepts_a_checkpoint_of_stream() -> None:
    """`wait_many` resumes from a checkpoint of `stream`."""
    transport = at_once(ending(0))
    async with transport.client(poll=every(1)) as client:
        stream = client.instructor_executions.stream(["a", "b", "b"])
        async with stream:
            pass
        outcomes = await outcomes_of(client, (), checkpoint=stream.checkpoint())
        assert Counter(outcome.id for outcome in outcomes) == Counter("abb")


@virtual_time
async def test_a_resumed_stream_accounts_for_its_ids_when_it_is_cut_off() -> None:
    """A resumed stream gives each id of its checkpoint an outcome, also at its deadline or on a closed client."""
    transport = ScriptedTransport(latency=NEVER)
    state = {"version": 2, "taken": 0, "taken_at": 0, "ids": [["a", 3], ["b", 1]]}
    client = transport.client(concurrency=1)
    seen = await results_of(client, "stream", (), lambda: None, checkpoint=state, deadline=5)
    assert seen == Counter("aaab")
    await client.aclose()
    async with client.instructor_executions.stream(checkpoint=state) as outcomes:
        errors = [type(outcome.error) async for outcome in outcomes]
    assert errors == [ClientClosedError] * 4
    assert DeadlineExceededError not in errors


@pytest.mark.parametrize("method", ["get_many", "stream"])
def test_a_source_that_swallows_a_cancellation_does_not_keep_the_call(method: str) -> None:
    """A cancelled call ends as cancelled, even if its source ignores the cancellation and yields another id."""

    async def stubborn() -> AsyncIterator[str]:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            await asyncio.sleep(1)
            yield "late"

    @virtual_time
    async def play() -> None:
        transport = ScriptedTransport()
        async with transport.client() as client:
            executions = client.instructor_executions

            async def call() -> object:
                if method == "get_many":
                    return await executions.get_many(stubborn())
                async with executions.stream(stubborn()) as outcomes:
                    return [outcome async for outcome in outcomes]

            task = asyncio.create_task(call())
            await asyncio.sleep(1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert transport.sent == []

    play()
