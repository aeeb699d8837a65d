"""Parts of the workers that need no Redis server: inputs, outcome lines and repeated calls."""

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("redis", reason="without redis: pip install -e '.[workers]'")
pytest.importorskip("taskiq_redis", reason="without taskiq-redis: pip install -e '.[workers]'")

from redis import exceptions
from scripted_store import Replies
from taskiq import InMemoryBroker
from virtual_time import virtual_time

from kaizen_async import (
    ExecutionStatus,
    InstructorExecution,
    KaizenClient,
    NotFoundError,
    Outcome,
    PollPolicy,
    Workflow,
)
from kaizen_async._cli.run import _imported as imported_broker
from kaizen_async.events import AttemptEnded, Gated, RecordEnded
from kaizen_async.workers import (
    OtherInputError,
    RedisUnusableError,
    Run,
    RunError,
    SharedLimit,
    Store,
    UnknownRunError,
    register,
)
from kaizen_async.workers import limit as limit_module
from kaizen_async.workers import store as store_module
from kaizen_async.workers.broker import create_broker, takes_unknown_tasks
from kaizen_async.workers.learned import SharedDurations
from kaizen_async.workers.run import RunStatus
from kaizen_async.workers.shards import Input, line_of, pack, unpack
from kaizen_async.workers.source import in_chunks
from kaizen_async.workers.store import connect, sentinels_of
from kaizen_async.workers.worker import send_invitation


class Record(msgspec.Struct):
    """A record in the form in which it was received."""

    id: str
    raw: bytes = b""


def added(ids: list[Any]) -> Input:
    """Return an input of ids in one part."""
    given = Input(1000)
    for execution_id in ids:
        given.add(execution_id)
    return given


def test_a_part_may_end_where_another_producer_ended_its_own() -> None:
    """A part can start after another producer's part, with its digest. Invalid ids stay invalid."""
    ids: list[Any] = ["a", "b", 3, b"d", 5]
    given = added(ids)
    assert given.skip_to(3) == added(ids[:3]).digest
    part = given.part()
    assert part is not None
    assert (part.before, part.count, part.shard.ids, len(part.invalid)) == (3, 2, ["d"], 1)
    assert given.digest == added(ids).digest
    assert Input(5).part() is None


@pytest.mark.parametrize(
    ("record", "line"),
    [
        (Record("a", b'{"id": "a",\n "n": 1}'), b'{"number":3,"id":"a","execution":{"id":"a","n":1}}'),
        (Record("a", b'{"id": "a"}'), b'{"number":3,"id":"a","execution":{"id": "a"}}'),
    ],
)
def test_an_outcome_is_one_line_with_the_record_as_it_came(record: Record, line: bytes) -> None:
    """An outcome is one line with the received record, without its line breaks."""
    outcome: Outcome[Any] = Outcome("a", execution=record, error=None, attempts=1, elapsed=0.1)
    assert line_of(3, outcome) == line


def test_a_record_without_its_source_is_encoded() -> None:
    """A record without its JSON is encoded from its fields, and an error has its type and status."""
    outcome: Outcome[Any] = Outcome("a", execution=Record("a"), error=None, attempts=1, elapsed=0.1)
    assert msgspec.json.decode(line_of(1, outcome))["execution"]["id"] == "a"
    failed: Outcome[Any] = Outcome(
        "a", execution=None, error=NotFoundError("gone", status=404), attempts=1, elapsed=0.1
    )
    error = msgspec.json.decode(line_of(1, failed))["error"]
    assert (error["type"], error["status"]) == ("NotFoundError", 404)


def test_unpacking_is_bounded() -> None:
    """Compressed data above the bound is refused, because a small text may unpack to any size."""
    assert unpack(pack(b"\0" * 999), 1000) == b"\0" * 999
    with pytest.raises(ValueError, match="too large"):
        unpack(pack(b"\0" * 1_000_000), 1000)


async def test_a_source_that_is_left_early_is_closed() -> None:
    """A source that is left early is closed, and a thread that reads it ends after its current id."""
    closed = asyncio.Event()

    async def endless() -> AsyncIterator[str]:
        try:
            for number in count():
                yield str(number)
        finally:
            closed.set()

    def blocking() -> Iterator[str]:
        for number in count():
            yield str(number)

    source = endless()
    for ids in (source, blocking()):
        chunks: Any = in_chunks(ids, 2)
        assert await anext(chunks) == ["0", "1"]
        await chunks.aclose()
    await source.aclose()
    assert closed.is_set()


@pytest.mark.parametrize(("ids", "sizes"), [(4, [2, 2]), (5, [2, 2, 1])])
async def test_a_source_may_end_where_a_part_ends(ids: int, sizes: list[int]) -> None:
    """A source that ends at the end of a part gives no empty last part."""

    async def source() -> AsyncIterator[str]:
        for number in range(ids):
            yield str(number)

    chunks = [chunk async for chunk in in_chunks(source(), 2)]
    assert [len(chunk) for chunk in chunks] == sizes
    assert [each for chunk in chunks for each in chunk] == [str(number) for number in range(ids)]


def test_the_remaining_time_of_a_run() -> None:
    """The remaining time is known only while a run works and its total and rate are known."""
    numbers = dict.fromkeys(("failed", "invalid", "set_aside", "read", "unread_bytes"), 0)
    shards = {"shards_waiting": 1, "shards_held": 1, "workers": 1, "age": 9.0, "digest": ""}
    working = RunStatus("r", "running", False, 30, 30, done=10, rate=5.0, **numbers, **shards)  # type: ignore[misc,arg-type]
    assert working.seconds_left == 4
    for change in ({"total": None}, {"rate": 0.0}, {"state": "finished"}):
        assert msgspec.structs.replace(working, **change).seconds_left is None


@pytest.mark.parametrize(
    ("ids", "size", "text"), [("exec_1", 1, "iterable of ids"), (["a"], 0, "size"), (["a"], True, "size")]
)
async def test_arguments_of_a_run_are_checked(ids: Any, size: Any, text: str) -> None:
    """Invalid arguments of a run are refused before Redis is used."""
    run = Run("r")
    with pytest.raises((TypeError, ValueError), match=text):
        await run.produce(ids, size=size)
    with pytest.raises(RuntimeError, match="enter it first"):
        await anext(run.follow())


def failing(*errors: Exception) -> Callable[[], Any]:
    """Return a call that raises each error in turn and then replies."""
    left = list(errors)

    async def attempt() -> str:
        if left:
            raise left.pop(0)
        return "reply"

    return attempt


@pytest.mark.parametrize("error", [None, exceptions.ConnectionError()])
async def test_a_call_that_is_cancelled_ends(error: Exception | None) -> None:
    """A cancelled call ends, even if the awaited call swallows the cancellation."""
    store = Store("redis://localhost")

    async def attempt() -> str:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(20)
        if error is not None:
            raise error
        return "PONG"

    calling = asyncio.create_task(store.call(attempt))
    await asyncio.sleep(0)
    calling.cancel()
    await asyncio.wait([calling], timeout=5)
    assert calling.cancelled()
    await store.aclose()


@virtual_time
async def test_a_call_is_repeated_until_it_succeeds(caplog: pytest.LogCaptureFixture) -> None:
    """A call is repeated until it succeeds, and each trouble is reported once, as is its end."""
    caplog.set_level(logging.WARNING)
    reported: list[str] = []
    store = Store("redis://user:pass@localhost", on_trouble=reported.append)
    attempt = failing(
        exceptions.ConnectionError("refused pass"),
        exceptions.ConnectionError("refused pass"),
        exceptions.ResponseError("OOM command not allowed"),
        exceptions.ResponseError("LOADING Redis is loading the dataset in memory"),
    )
    assert await store.call(attempt) == "reply"
    assert [text[:20] for text in reported] == [
        "Redis is unreachable",
        "Redis is full (maxme",
        "Redis refuses for no",
        "",
    ]
    assert "pass" not in " ".join(reported)
    assert len(caplog.records) == 2
    assert await store.call(failing()) == "reply"
    await store.aclose()


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (exceptions.AuthenticationError("WRONGPASS no"), RedisUnusableError, "requires a valid user and password"),
        (exceptions.NoPermissionError("no permission"), RedisUnusableError, "cannot be used: no permission"),
        (exceptions.ResponseError("NOAUTH Authentication required."), RedisUnusableError, "valid user and password"),
        (exceptions.ResponseError("WRONGTYPE of key"), RunError, "refused a command: WRONGTYPE"),
    ],
)
async def test_a_permanent_refusal_of_redis_is_raised(error: Exception, kind: type[RunError], text: str) -> None:
    """A permanent refusal of Redis is raised as an error of one line."""
    store = Store()
    with pytest.raises(kind, match=text):
        await store.call(failing(error))
    await store.aclose()


async def test_a_server_too_old_to_say_hello_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server without HELLO is refused as too old."""
    store = Store()
    error = exceptions.ResponseError("unknown command `HELLO`, with args beginning with: ")
    monkeypatch.setattr(store._client, "ping", failing(error))
    with pytest.raises(RedisUnusableError, match=r"is too old; this package needs 6\.2 or newer"):
        await store.require_usable()
    await store.aclose()


async def test_a_user_without_info_may_continue(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without INFO may continue, because some providers forbid it. A cluster reports each node's version."""
    store = Store()

    async def ping() -> bool:
        return True

    async def forbidden() -> Any:
        raise exceptions.NoPermissionError("no permission")

    async def of_nodes() -> Any:
        return {"a:1": {"redis_version": "5.0.1"}, "b:1": {"redis_version": "5.0.1"}}

    monkeypatch.setattr(store._client, "ping", ping)
    monkeypatch.setattr(store._client, "info", forbidden)
    await store.require_usable()
    monkeypatch.setattr(store._client, "info", of_nodes)
    with pytest.raises(RedisUnusableError, match=r"version 5\.0\.1"):
        await store.require_usable()
    monkeypatch.setattr(store_module, "CONNECT_SECONDS", 0.01)
    monkeypatch.setattr(store._client, "ping", lambda: asyncio.sleep(9))
    with pytest.raises(RedisUnusableError, match="did not respond"):
        await store.require_usable()
    await store.aclose()


def test_sentinels_and_their_options_come_from_the_url() -> None:
    """The URL gives the sentinels' addresses, TLS options and credentials."""
    url = "rediss://me:p%40ss@a,b:1,[::1]:2/site/3?sentinel_password=x&ssl_ca_certs=c"
    found = sentinels_of(url)
    assert found.addresses == [("a", 26379), ("b", 1), ("::1", 2)]
    secure = {"ssl": True, "ssl_ca_certs": "c"}
    assert found.settings == {"username": "me", "password": "p@ss", "db": 3, **secure}
    assert found.sentinel_settings == {"password": "x", **secure}
    assert connect(url.replace("rediss://", "rediss+sentinel://")) is not None


async def test_a_broker_listens_again_when_redis_was_away(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A broker continues to listen after Redis was away, and each trouble is reported once."""
    monkeypatch.setattr("kaizen_async.workers.broker._AGAIN", 0)
    broker: Any = create_broker()
    replies = iter([OSError("gone"), exceptions.ConnectionError("gone"), "message", OSError("gone"), "other"])
    groups = iter([OSError("still gone"), None, None])

    async def listen(_broker: Any) -> AsyncIterator[Any]:
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
            yield reply

    async def declare(_broker: Any) -> None:
        if error := next(groups):
            raise error

    monkeypatch.setattr("taskiq_redis.RedisStreamBroker.listen", listen)
    monkeypatch.setattr("taskiq_redis.RedisStreamBroker._declare_consumer_group", declare)
    messages = broker.listen()
    with caplog.at_level(logging.WARNING):
        assert [await anext(messages), await anext(messages)] == ["message", "other"]
    await messages.aclose()
    assert [record.getMessage()[:40] for record in caplog.records] == ["the queue of invitations is unreachable:"] * 2


async def test_an_invitation_that_cannot_be_sent_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An invitation that cannot be sent is logged. A broker without the task raises an error."""
    broker = InMemoryBroker()
    with pytest.raises(RunError, match="does not know the task"):
        await send_invitation(broker, "r")
    register(broker)

    async def refuse(_message: object) -> None:
        raise OSError

    monkeypatch.setattr(broker, "kick", refuse)
    with caplog.at_level(logging.WARNING):
        await send_invitation(broker, "r")
    assert "an invitation to run r was not sent" in caplog.text
    assert not await takes_unknown_tasks(broker)
    assert not await takes_unknown_tasks(create_broker("redis://127.0.0.1:1"))


@virtual_time
async def test_permits_are_put_back_when_their_request_ends_or_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each permit is used or returned when the worker ends, which does not wait for a Redis that is away."""
    monkeypatch.setattr(limit_module, "AHEAD", 60.0)
    store: Any = Replies(lambda *_: [0, 5, 200_000, 1000])
    limit = SharedLimit(store, 10)
    waiting = asyncio.create_task(limit.take_turn())
    held_back = asyncio.create_task(limit.take_turn())
    await asyncio.sleep(0.05)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    limit.notice(Gated(429, 0.3, 0.3))
    limit.notice(AttemptEnded("a", "url", 1, 0.1, 200, None))
    limit.pause(0)
    limit.pause(0.1)
    await held_back
    store.reply = lambda *_: asyncio.sleep(60)
    await limit.aclose()
    assert store.called[-1][0] == "permits"
    assert store.called[-1][4] > 0


async def test_durations_of_other_workers_are_learned(caplog: pytest.LogCaptureFixture) -> None:
    """A worker learns the durations of other workers, but not its own again and not invalid ones."""
    learned: list[tuple[str, float]] = []

    class Executions:
        def learn(self, seen: list[tuple[str, float]]) -> None:
            learned.extend(seen)

    entries = [
        (b"1-0", [b"w", b"me", b"d", pack(b'[["wf",1.0]]')]),
        (b"2-0", [b"w", b"other", b"d", pack(b'[["wf",2.0]]')]),
        (b"3-0", [b"w", b"other", b"d", b"junk"]),
    ]
    replies = [entries, []]
    store: Any = Replies(lambda *_: replies.pop(0))
    shared = SharedDurations(store, "me", "executions", Executions(), Record)
    outcome: Outcome[Any] = Outcome("a", execution=Record("a"), error=None, attempts=1, elapsed=0.1)
    shared.notice(RecordEnded("a", "url", outcome))
    named = InstructorExecution(
        id="a",
        workflow=Workflow(id="w" * 201),
        start_time=None,
        end_time=None,
        duration_ms=5,
        status=ExecutionStatus("x"),
    )
    for_long = SharedDurations(store, "me", "executions", Executions(), InstructorExecution)
    for_long.notice(RecordEnded("a", "url", Outcome("a", execution=named, error=None, attempts=1, elapsed=0.1)))
    assert not for_long._seen, "a hostile server may give a workflow any name"
    assert await shared._exchange()
    assert not await shared._exchange()
    assert learned == [("wf", 2.0)]
    assert store.called[-1][-1] == "3-0"
    assert store.called[0][3] == b""
    assert "cannot be read" in caplog.text


@virtual_time
async def test_durations_are_shared_on_after_an_error(caplog: pytest.LogCaptureFixture) -> None:
    """Durations that could not be shared because of an error are shared later."""
    shared_later: list[bytes] = []

    def reply(*words: Any) -> list[Any]:
        if len(store.called) < 3:
            raise RunError("refused a command: WRONGTYPE")
        shared_later.append(words[3])
        return []

    store: Any = Replies(reply)
    shared = SharedDurations(store, "me", "executions", None, Record)
    shared._seen = [("wf", 1.0)]
    sharing = asyncio.create_task(shared.share())
    await asyncio.sleep(10)
    sharing.cancel()
    await asyncio.gather(sharing, return_exceptions=True)
    assert unpack(shared_later[0]) == b'[["wf",1.0]]'
    assert caplog.text.count("durations are not shared: refused a command: WRONGTYPE") == 2


async def test_hostile_durations_teach_nothing_that_lasts() -> None:
    """Hostile durations in Redis do not move any interval beyond its bounds."""
    hostile = (0, -1, 1e308, 5e-324, 10**15)
    async with KaizenClient() as client:
        executions = client.instructor_executions
        entries = [
            (f"{number}-0".encode(), [b"w", b"other", b"d", pack(text)])
            for number, text in enumerate(
                [msgspec.json.encode([["wf", duration]] * 500) for duration in hostile]
                + [b'[["wf",NaN]]', b'[["wf",1e999]]', b'[["wf",true]]', b'{"wf":1}', b"[[null,1]]", b"[" * 10_000]
                + [msgspec.json.encode([["w" * 100_000, 1.0]] * 100)]
            )
        ]
        replies = [entries, []]
        shared = SharedDurations(Replies(lambda *_: replies.pop(0)), "me", "executions", executions, Record)  # type: ignore[arg-type]
        while await shared._exchange():
            pass
        _, group = executions._binding.polls(executions._endpoint, None)
        policy = PollPolicy()
        for age in (1.0, 100.0, 10_000.0):
            delay = group.cadence.next_delay(age, "wf")
            assert policy.min_interval <= delay <= policy.max_interval * (1 + policy.spread)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("no_module_of_ours:broker", "No module named"),
        ("broker_of_others", "no usable taskiq broker"),
        ("broker_of_others:broker", "does not know the task; call"),
    ],
)
def test_a_broker_that_cannot_be_used_is_refused(
    path: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command refuses an unusable broker before it starts anything."""
    (tmp_path / "broker_of_others.py").write_text("from taskiq import InMemoryBroker\nbroker = InMemoryBroker()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(ValueError, match=text):
        imported_broker(path)


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        ("KAIZEN_RATE", "many", "KAIZEN_RATE must be a number of requests per second, not 'many'"),
        *(("KAIZEN_RATE", rate, "must be a finite number") for rate in ("0", "-1", "nan", "inf")),
        ("KAIZEN_BASE_URL", "ftp://host", "base_url"),
        ("KAIZEN_API_KEY", "a\nb", "api_key is empty or contains"),
    ],
)
def test_settings_of_workers_are_checked_before_they_start(
    variable: str, value: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invalid settings of workers are refused before the start, because taskiq would restart the workers endlessly."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "kaizen_async.workers.app", raising=False)
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=text):
        imported_broker("kaizen_async.workers.app:broker")
    monkeypatch.delenv(variable)
    assert imported_broker("kaizen_async.workers.app:broker") is not None


async def test_a_run_with_a_lost_part_raises_an_error() -> None:
    """If Redis lost a part of a run, the same ids complete it. A run that is gone is unknown."""
    run = Run("r")
    run._store: Any = Replies(lambda *_: [0, b"running", b"0", b"", b"0"])
    sent = added(["a", "b"])
    sent.skip()
    stored = run._read(b"running", b"2", sent.digest.encode(), b"0")
    assert await run._append(b"id", sent, stored) is stored
    sent.add("c")
    with pytest.raises(RunError, match="has lost part of its input"):
        await run._append(b"id", sent, stored)
    with pytest.raises(UnknownRunError, match="no run r in redis://h"):
        run._read(None, None, b"", b"")


def run_on(reply: Callable[..., Any]) -> tuple[Any, list[str]]:
    """Return a run with a scripted store, and the list of troubles that it reports."""
    run: Any = Run("r")
    troubles: list[str] = []
    run._store = Replies(reply, troubles.append)
    return run, troubles


async def test_a_part_that_another_producer_cut_in_two_is_completed() -> None:
    """If another producer has sent the first half of a part, this one sends the rest as its own part."""
    digest, whole = added(["a", "b"]).digest.encode(), added(["a", "b", "c"]).digest.encode()
    replies = {
        "command": iter([[b"running", b"0", b"", b"0"]]),
        "append": iter([[0, b"running", b"2", digest, b"0"], [1, b"running", b"3", whole, b"0"]]),
        "produced": iter([[1, b"running", b"3", whole, b"1"]]),
    }
    run, _ = run_on(lambda name, *_: next(replies[name]))
    await run._send(b"id", ["a", "b", "c"], 3)
    parts = [words for words in run._store.called if words[0] == "append"]
    assert [words[3:5] for words in parts] == [(0, 3), (2, 1)]


async def test_ids_that_another_producer_left_out_are_refused() -> None:
    """Further ids are refused if another producer has already ended the input."""
    digest = added(["a", "b"]).digest.encode()
    replies = {"command": [b"running", b"0", b"", b"0"], "append": [0, b"running", b"2", digest, b"1"]}
    run, _ = run_on(lambda name, *_: replies[name])
    with pytest.raises(OtherInputError, match="started with other ids: 2 of digest"):
        await run._send(b"id", ["a", "b", "c"], 3)


async def test_failed_ids_are_retried_in_parts() -> None:
    """Failed ids are retried in parts, because a long script would block Redis."""
    replies = iter([[100, 5, b"running"], [5, 0, b"running"]])
    run, _ = run_on(lambda *_: next(replies))
    assert await run.retry_failed() == 105


async def test_that_no_worker_runs_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing worker is reported once, and so is its return. Those known from before an outage are not foreign."""

    async def all_taken(_broker: object) -> bool:
        return True

    monkeypatch.setattr("kaizen_async.workers.run.takes_unknown_tasks", all_taken)
    monkeypatch.setattr("kaizen_async.workers.run.KNOWS_SECONDS", -1)
    monkeypatch.setattr("kaizen_async.workers.run.INVITE_SECONDS", 0)
    live = iter([1, 0, 0, 1])
    run, troubles = run_on(lambda name, *_: 2 if name == "command" else [next(live)])
    run.broker = InMemoryBroker()
    with pytest.raises(RuntimeError, match="StopIteration"):
        await run._invite()
    assert troubles == ["no worker is running", ""]
