"""Workers and their sessions with a scripted store, without a Redis server."""

import asyncio
import logging
import signal
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import msgspec
import pytest

pytest.importorskip("redis", reason="without redis: pip install -e '.[workers]'")
pytest.importorskip("taskiq_redis", reason="without taskiq-redis: pip install -e '.[workers]'")

from scripted_store import Replies, held
from taskiq import InMemoryBroker

from kaizen_async import ClientClosedError, Outcome
from kaizen_async._ledger import Checkpoint, Unfinished
from kaizen_async.workers import Limits, RunCancelledError, RunError, UnknownRunError
from kaizen_async.workers.follower import OTHER_READER, Follower
from kaizen_async.workers.lookups import LookupSession
from kaizen_async.workers.options import Options
from kaizen_async.workers.recorder import Recorder
from kaizen_async.workers.session import Claim
from kaizen_async.workers.shards import pack, unpack
from kaizen_async.workers.tasks import end
from kaizen_async.workers.waits import WaitSession
from kaizen_async.workers.worker import Worker


def worker_of(store: Any) -> Worker:
    """Return a worker that has not started, with a scripted store."""
    worker = Worker(
        InMemoryBroker(),
        url="redis://localhost",
        namespace="x",
        per_second=None,
        client=Client,
        limits=Any,  # type: ignore[arg-type]
    )
    worker._store = store
    return worker


class Client:
    """A client that accepts settings and looks nothing up."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.is_closed = False

    async def aclose(self) -> None:
        """Close it."""
        self.is_closed = True


@pytest.mark.parametrize(
    ("run", "stored", "text"),
    [("a{b}", b"{}", "no valid run"), ("r", b'{"kind":"other"}', "cannot be worked on"), ("gone", None, "")],
)
async def test_an_invalid_invitation_is_logged(
    run: str, stored: bytes | None, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The worker ignores an invalid invitation and logs the reason."""
    caplog.set_level(logging.WARNING)
    worker = worker_of(Replies(lambda *_: [stored, b"id"]))
    await worker.work(run)
    assert text in caplog.text
    assert bool(text) == bool(caplog.records)


async def test_durations_of_a_kind_are_shared_once() -> None:
    """All runs of a worker share the durations of one kind once."""
    worker = worker_of(Replies(lambda *_: []))
    worker._kaizen.instructor_executions = None  # type: ignore[misc,assignment]
    worker._share_durations(Options(wait=True))
    worker._share_durations(Options(wait=True))
    assert len(worker._sharing) == 1
    await end(*worker._sharing)


async def test_a_heartbeat_that_fails_is_logged_and_repeated(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A failed heartbeat is logged and repeated."""
    monkeypatch.setattr("kaizen_async.workers.worker.BEAT_SECONDS", 0)
    beats = count()

    def reply(*_words: Any) -> Any:
        if next(beats) < 2:
            raise RunError("refused")
        raise asyncio.CancelledError

    worker = worker_of(Replies(reply))
    with pytest.raises(asyncio.CancelledError):
        await worker._beat()
    assert caplog.text.count("the heartbeat failed") == 2


async def test_outcomes_are_recorded_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outcomes are recorded at once when their size or number is reached, and later ones form the next batch."""
    monkeypatch.setattr("kaizen_async.workers.recorder.BATCH_BYTES", 10)
    monkeypatch.setattr("kaizen_async.workers.recorder.BATCH_SECONDS", 0.01)
    monkeypatch.setattr("kaizen_async.workers.recorder.MOST_UNRECORDED", 2)
    store: Any = Replies(lambda *_: [1])
    shard = held()
    recorder = Recorder(store, "r", "id", lambda _: None)
    recorder.put_line(shard, 0, b"x" * 20, failed=False)
    for place in range(1, 4):
        recorder.put_line(shard, place, b"x", failed=True)
    recorder.put_line(shard, 3, b"once more", failed=True)
    room = recorder.room()
    assert room is not None
    await room
    monkeypatch.setattr("kaizen_async.workers.recorder.BATCH_OUTCOMES", 1)
    recorder.put_line(shard, 4, b"x", failed=False)
    await recorder.flush()
    shard.lost = True
    recorder.put_line(shard, 5, b"x", failed=False)
    assert recorder.room() is None
    await recorder.aclose()
    assert sum(words[7] for words in store.called) == 5
    assert len(store.called) >= 2


async def test_a_full_batch_follows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that fills up while another one is being recorded follows at once."""
    monkeypatch.setattr("kaizen_async.workers.recorder.BATCH_OUTCOMES", 2)
    monkeypatch.setattr("kaizen_async.workers.recorder.BATCH_SECONDS", 1000)
    responding = asyncio.Event()

    async def reply() -> list[int]:
        await responding.wait()
        return [1]

    store: Any = Replies(lambda *_: reply())
    recorder = Recorder(store, "r", "id", lambda _: None)
    shard = held(4)
    for place in (0, 1):
        recorder.put_line(shard, place, b"x", failed=False)
    async with asyncio.timeout(5):
        while not store.called:  # noqa: ASYNC110 - another task changes it
            await asyncio.sleep(0.001)
        for place in (2, 3):
            recorder.put_line(shard, place, b"x", failed=False)
        responding.set()
        while len(store.called) < 2 or shard.unrecorded:  # noqa: ASYNC110 - another task changes it
            await asyncio.sleep(0.001)
        await recorder.flush()
    await recorder.aclose()


async def test_an_error_of_recording_is_raised() -> None:
    """An error of recording is raised, and nothing waits forever."""

    def refuse(*_words: Any) -> Any:
        raise RunError("refused a command")

    store: Any = Replies(refuse)
    recorder = Recorder(store, "r", "id", lambda _: None)
    recorder.put_line(held(), 0, b"x", failed=False)
    with pytest.raises(RunError, match="refused"):
        await recorder.flush()
    with pytest.raises(RunError, match="refused"):
        recorder.put_line(held(), 1, b"x", failed=False)
    await recorder.aclose()


def session_of(kind: type[LookupSession] | type[WaitSession], executions: Any, reply: Callable[..., Any]) -> Any:
    """Return a session with scripted lookups and a scripted store."""

    class Kaizen:
        instructor_executions = executions

    return kind(Replies(reply), "me", "r", "id", Options(), Kaizen(), Limits())  # type: ignore[arg-type]


class Closed:
    """The executions of a closed client."""

    @asynccontextmanager
    async def stream(self, _ids: object) -> AsyncIterator[Any]:
        """Raise a ClientClosedError."""
        raise ClientClosedError("closed")
        yield


async def test_a_session_whose_client_is_closed_ends() -> None:
    """A session with a closed client ends, and skips the ids of a shard that another worker has taken."""
    session = session_of(LookupSession, Closed(), lambda *_: [b"running"])
    lost, mine = held(2), held(2)
    lost.lost = True
    session._ready.extend([(lost, 0), (mine, 1)])
    assert list(session._hand_out()) == ["exec_1"]
    await session._look_up()
    assert session._is_over
    assert await session._claim(1) == []
    await session._claim_ahead()
    assert session._store.called == []


async def test_waits_that_cannot_be_resumed_begin_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Waits whose saved state is invalid start again. Waits are saved regularly, except with unrecorded outcomes."""
    monkeypatch.setattr("kaizen_async.workers.waits.SAVE_SECONDS", 0)

    class Stream:
        def checkpoint(self) -> dict[str, Any]:
            return {"learned": 1, "waits": 2}

    class Executions:
        def wait_many(self, ids: list[str], **settings: Any) -> Any:
            if settings.get("checkpoint") is not None:
                raise ValueError("of another version")
            return list(ids)

    session = session_of(WaitSession, Executions(), lambda name, *_: [1] if name == "record" else 1)
    shard = held(2)
    with caplog.at_level(logging.WARNING):
        for saved in (b"junk", pack(b"{}"), pack(b"[]"), pack(b"1")):
            assert session._stream(Claim(shard, 0, saved, 0)) == ["exec_0", "exec_1"]
    assert caplog.text.count("are not usable") == 4
    session._recorder.put_line(shard, 0, b"x", failed=False)
    saving = asyncio.create_task(session._save(shard, Stream()))
    while not any(words[0] == "release" for words in session._store.called):  # noqa: ASYNC110 - another task changes it
        await asyncio.sleep(0.001)
    shard.lost = True
    await asyncio.sleep(0.01)
    saving.cancel()
    await asyncio.gather(saving, return_exceptions=True)
    (saved,) = {words[6] for words in session._store.called if words[0] == "release"}
    assert msgspec.json.decode(unpack(saved)) == {"waits": 2}


async def test_waits_keep_their_age_whatever_became_of_their_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits keep their saved age by the clock of Redis, or the age of their first claim if none was saved."""
    monkeypatch.setattr("time.time", lambda: 1_700_000_000.0)
    given: list[Any] = []

    class Executions:
        def wait_many(self, _ids: object, **settings: Any) -> None:
            given.append(settings["checkpoint"])

    session = session_of(WaitSession, Executions(), lambda *_: 1)
    shard = held(3)
    shard.shard.ids[2] = "exec_0"
    session._stream(Claim(shard, 40, pack(b'{"taken_at":5,"version":2}'), 12))
    session._stream(Claim(shard, 40, b"", 0))
    assert given[0] == {"taken_at": 1_700_000_000.0 - 12, "version": 2}
    assert Checkpoint.load(given[1]).waiting_at(1_700_000_000.0) == deque(
        [Unfinished("exec_0", 2, 40.0), Unfinished("exec_1", 1, 40.0)]
    )


async def test_outcomes_of_waits_are_taken_until_the_shard_is_lost() -> None:
    """A session takes the outcomes of its own ids until it loses the shard."""
    shard = held(3)
    judged: list[int] = []

    @asynccontextmanager
    async def stream() -> AsyncIterator[Any]:
        async def outcomes() -> AsyncIterator[Any]:
            yield Outcome("foreign", execution=None, error=None, attempts=1, elapsed=0.1)
            shard.lost = True
            yield Outcome("exec_1", execution=None, error=None, attempts=1, elapsed=0.1)
            raise AssertionError

        yield outcomes()

    session = session_of(WaitSession, None, lambda *_: 1)
    session._judge = lambda _held, place, _outcome: judged.append(place)
    rooms = iter([None, asyncio.sleep(0)])
    session._recorder.room = lambda: next(rooms)
    await session._take(shard, stream())
    assert judged == [1]


async def test_a_shard_is_released_as_its_attempt_ended() -> None:
    """A lost shard is not released, and a shard whose client was closed is released at once."""
    session = session_of(LookupSession, Closed(), lambda *_: 1)
    shard = held(2)
    shard.lost = True
    await session._end_try(shard)
    assert session._store.called == []
    shard.lost = False
    error = ClientClosedError("closed")
    shard.errors[0] = Outcome("exec_0", execution=None, error=error, attempts=0, elapsed=0.1)
    await session._end_try(shard)
    assert [words[4] for words in session._store.called] == ["back"]


async def test_a_worker_that_is_asked_to_end_drains_its_sessions() -> None:
    """A handled signal drains the sessions and calls the earlier handler.

    A signal without a handler stays unchanged.
    """
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: seen.append(number))
    terminated = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # plugins of pytest may handle it
    try:
        worker = worker_of(Replies(lambda *_: [0]))
        session = worker._sessions["r"] = session_of(LookupSession, None, lambda *_: 1)
        worker._idle.clear()
        await worker.start()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(0)
        assert session._is_over
        worker.stop_sessions()
        stopping = asyncio.create_task(worker.stop())
        await asyncio.sleep(0)
        await worker.work("other")
        assert list(worker._sessions) == ["r"]
        del worker._sessions["r"]
        worker._idle.set()
        await stopping
        assert seen == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is not worker._handler
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, terminated)


async def test_signals_of_a_worker_reach_those_before_and_after_it() -> None:
    """A handler set after the worker's stays in place. The worker's handler does nothing after its loop has ended."""
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: seen.append(number))
    try:
        worker = worker_of(Replies(lambda *_: [0]))
        await worker.start()

        def later(number: int, frame: Any) -> None:
            worker._handler(number, frame)

        signal.signal(signal.SIGINT, later)
        await worker.stop()
        assert signal.getsignal(signal.SIGINT) is later
        signal.raise_signal(signal.SIGINT)
        assert seen == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


async def test_requests_in_flight_get_their_time_when_a_worker_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopping worker gives its requests some time and then closes the client."""
    monkeypatch.setattr("kaizen_async.workers.worker.DRAIN_SECONDS", 0)
    worker = worker_of(Replies(lambda *_: [0]))
    worker._idle.clear()
    worker.stop_sessions()
    await worker._closing
    assert worker._kaizen.is_closed


async def test_a_session_ends_although_redis_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped session ends after a time even if Redis is away."""
    monkeypatch.setattr("kaizen_async.workers.session.END_SECONDS", 0)
    monkeypatch.setattr("kaizen_async.workers.session.LEAVE_SECONDS", 0)
    away = asyncio.Event()
    session = session_of(LookupSession, None, lambda *_: away.wait())
    serving = asyncio.create_task(session.serve())
    await asyncio.sleep(0)
    session.stop()
    await asyncio.wait_for(serving, 20)
    assert {words[0] for words in session._store.called} <= {"beat", "claim", "leave"}


async def test_a_refusal_of_redis_ends_a_session() -> None:
    """A refused claim or heartbeat ends a session with its error."""

    def refusing(script: str) -> Callable[..., Any]:
        def reply(name: str, *_: Any) -> Any:
            if name == script:
                raise RunError("refused a command")
            return [b"running"] if name == "claim" else b"running"

        return reply

    for script in ("claim", "beat"):
        for kind in (LookupSession, WaitSession):
            with pytest.raises(RunError, match="refused"):
                await session_of(kind, None, refusing(script)).serve()


class Instant:
    """Executions whose lookups all succeed at once."""

    @asynccontextmanager
    async def stream(self, ids: Any) -> AsyncIterator[Any]:
        """Yield an outcome for each id, the first id last."""

        async def outcomes() -> AsyncIterator[Any]:
            first, *rest = list(ids)
            for execution_id in [*rest, first]:
                yield Outcome(execution_id, execution=None, error=None, attempts=1, elapsed=0.1)

        yield outcomes()


async def test_a_repeated_id_in_a_shard_has_two_outcomes() -> None:
    """A repeated id in a shard has an outcome for each of its numbers, and each outcome waits for room."""
    session = session_of(LookupSession, Instant(), lambda *_: [1])
    shard = held(3)
    shard.shard.ids[2] = "exec_0"
    judged: list[int] = []
    session._judge = lambda _held, place, _outcome: judged.append(place)
    rooms = iter([None, asyncio.sleep(0), None])
    session._recorder.room = lambda: next(rooms)
    session._open[1] = 3
    session._ready.extend((shard, place) for place in range(3))
    await session._look_up()
    assert sorted(judged) == [0, 1, 2]
    assert session._in_flight == {}


async def test_a_session_waits_while_too_much_is_unread() -> None:
    """A session claims nothing while too many outcomes are unread, and does not end."""
    session = session_of(LookupSession, None, lambda *_: [b"unread"])
    assert await session._claim(1) == []
    assert not session._is_over


async def test_a_shard_that_was_claimed_again_is_kept() -> None:
    """The loss of an earlier claim of a shard does not affect its later claim."""
    session = session_of(WaitSession, None, lambda *_: 1)
    earlier, later = held(), held()
    session._held[1] = later
    earlier.lost = True
    session._streams[earlier] = None
    session._on_recorded([earlier])
    await session._hand_over()
    assert session._held == {1: later}
    assert session._store.called == []


STORED = [Options().encoded(), b"0-0", b"id"]
"""What Redis holds of a run that a reader asks for first."""


class Acked:
    """The replies of Redis to a reader: those of the script `ack` in turn, and those of commands."""

    def __init__(self, *acks: tuple[int, bytes], entries: int = 0, read: Any = None, troubles: Any = ()) -> None:
        self.acks = iter(acks)
        self.entries = entries
        self.read = read
        self.troubles = iter(troubles)

    def __call__(self, name: str, *words: Any) -> Any:
        """Return a reply."""
        if name == "ack":
            return [*next(self.acks), b"0-0"]
        if words[0] == "XREAD":
            read, self.read = self.read, None
            return asyncio.sleep(0, read)
        if words[0] == "HGET":
            return b"id" if words[2] == "id" else next(self.troubles, None)
        return self.entries if words[0] == "XLEN" else STORED


def follower_of(redis: Callable[..., Any], *beside: Any) -> tuple[Any, list[str]]:
    """Return a reader, and the list of troubles that it reports."""
    troubles: list[str] = []
    store: Any = Replies(redis, troubles.append)
    return Follower(store, "r", keep_ms=1000, unknown="there is no run r", beside=beside), troubles


async def test_a_second_reader_reports_that_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second reader reports the start and the end of its wait."""
    monkeypatch.setattr("kaizen_async.workers.follower.BLOCK_MS", 0)
    follower, troubles = follower_of(
        Acked((0, b"finished"), (0, b"finished"), *[(1, b"finished")] * 9), asyncio.Event().wait
    )
    async with follower as outcomes:
        assert [outcome async for outcome in outcomes] == []
    assert troubles == [OTHER_READER, ""]


async def test_a_reader_continues_while_there_are_outcomes() -> None:
    """A reader continues after the run has finished until it has read all outcomes."""
    redis = Acked(*[(1, b"finished")] * 9, entries=1)
    follower, _ = follower_of(redis, asyncio.Event().wait)
    async with follower as outcomes:
        await outcomes._acknowledge()
        assert not await outcomes._is_over()
        redis.entries = 0
        assert await outcomes._is_over()


async def test_a_reader_leaves_out_what_no_worker_wrote(caplog: pytest.LogCaptureFixture) -> None:
    """What Redis holds is input. Each such batch is acknowledged, so it does not come again."""
    nested = b'{"number":2,"id":"a","execution":' + b"[" * 100_000
    batches = (b"junk", pack(b"{"), pack(b'{"number":"a","id":"b"}'), pack(nested), pack(b'{"number":1,"id":"a"}'))
    entries = [(f"{number}-0".encode(), {b"b": batch}) for number, batch in enumerate(batches, 1)]
    read = [[b"out", [*entries, (b"6-0", {b"foreign": b"1"})]]]
    follower, _ = follower_of(Acked(*[(1, b"finished")] * 9, read=read), asyncio.Event().wait)
    with caplog.at_level(logging.WARNING):
        async with follower as outcomes:
            await outcomes._acknowledge()
            assert [outcome.number async for outcome in outcomes] == [1]
    assert caplog.text.count("a batch that is not of outcomes is left out") == 5
    acks = [words for words in follower._store.called if words[0] == "ack"]
    assert acks[-2][6:9] == ("6-0", 1, len(batches[4]))


async def test_a_reader_reports_that_workers_cannot_work() -> None:
    """And that they can again."""
    redis = Acked(*[(1, b"finished")] * 9, troubles=[b"refused\x1b", b"refused\x1b", None])
    follower, troubles = follower_of(redis, asyncio.Event().wait)
    async with follower as outcomes:
        for _ in range(3):
            await outcomes._is_over()
    assert troubles == ["a worker cannot work on the run: refused\ufffd", ""]


async def test_what_a_reader_cannot_read_is_named() -> None:
    """With the way out."""
    nested = b'{"x":' + b"[" * 100_000
    for stored in ([b"{}", None, b"id"], [b"junk", b"0-0", b"id"], [nested, b"0-0", b"id"]):
        follower, _ = follower_of(lambda *_, stored=stored: stored)
        with pytest.raises(RunError, match="what Redis holds of run r cannot be read; purge the run"):
            await follower.__aenter__()


@pytest.mark.parametrize(("state", "error"), [(b"unknown", UnknownRunError), (b"cancelled", RunCancelledError)])
async def test_a_reader_of_a_run_that_is_gone_ends(state: bytes, error: type[Exception]) -> None:
    """A reader of a run that is gone raises an error with the reason."""
    follower, _ = follower_of(Acked((1, b"running"), *[(1, state)] * 9), asyncio.Event().wait)
    with pytest.raises(error):
        async with follower as outcomes:
            await anext(outcomes)


async def test_a_reader_leaves_although_redis_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader can leave while Redis is away."""
    monkeypatch.setattr("kaizen_async.workers.follower.LEAVE_SECONDS", 0)
    follower, _ = follower_of(lambda name, *_: asyncio.sleep(20) if name == "ack" else STORED)
    async with follower:
        pass
