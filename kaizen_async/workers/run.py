"""A run: ids that workers look up, from its start to its last outcome."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from types import TracebackType
from typing import Any, Final, Literal, Self, cast

import msgspec
from taskiq import AsyncBroker

from kaizen_async.config import require_duration
from kaizen_async.workers.broker import takes_unknown_tasks
from kaizen_async.workers.errors import (
    NoWorkersError,
    OtherInputError,
    RunCancelledError,
    RunError,
    UnknownRunError,
)
from kaizen_async.workers.follower import Follower
from kaizen_async.workers.options import Kind, Options, decode_options
from kaizen_async.workers.shards import Input, Part, pack, pack_shard
from kaizen_async.workers.source import AnyIds, in_chunks
from kaizen_async.workers.store import DEFAULT_URL, Store, require_name
from kaizen_async.workers.tasks import end
from kaizen_async.workers.worker import invite

SHARD_SIZE: Final = 1000
MOST_IN_SHARD: Final = 100_000
KEEP: Final = 7 * 86_400.0
ANY_RUN: Final = ""
"""In place of the id of a run, for what concerns the run that has the name now."""
INVITE_SECONDS: Final = 1.0
KNOWS_SECONDS: Final = 2.0
"""Time in which a worker that took an invitation reports that it lives, if it knows the task."""


class RunStatus(msgspec.Struct, frozen=True):
    """Where a run is."""

    name: str
    state: Literal["running", "finished", "cancelled"]
    wait: bool
    """Whether it waits for executions to end."""
    ids: int
    """Ids sent so far, invalid ones included."""
    total: int | None
    """Ids of the run; None until its whole input was sent."""
    digest: str
    """SHA-256 of the ids sent so far."""
    done: int
    """Ids with an outcome."""
    failed: int
    """Ids whose outcome is an error, invalid ones included."""
    invalid: int
    """Ids that could not be looked up at all."""
    set_aside: int
    """Shards that were given up after several tries."""
    read: int
    """Outcomes that a reader has acknowledged; Redis keeps them no more."""
    unread_bytes: int
    """Size of the outcomes that wait for a reader, compressed."""
    shards_waiting: int
    """Parts of the run that no worker has."""
    shards_held: int
    """Parts of the run that a worker has."""
    workers: int
    """Worker processes at work on the run."""
    age: float
    """Seconds since its start."""
    rate: float = 0.0
    """Outcomes per second: lately if a reader measures it, else since the start."""

    @property
    def seconds_left(self) -> float | None:
        """Seconds until it is finished at this rate; None if that is not known."""
        if self.total is None or not self.rate or self.state != "running":
            return None
        return (self.total - self.done) / self.rate


class Run:
    """Ids that workers look up, or wait for, on any number of machines.

        async with Run("invoices-2026-11", broker=broker) as run:
            await run.produce(ids)
            async with run.follow() as outcomes:
                async for outcome in outcomes:
                    print(outcome.number, outcome.id, outcome.execution or outcome.error)

    A run is bound to its ids: the same name with other ids is refused. Producing or following again resumes, after a
    crash of anything, where it was.

    Args:
        name: 1 to 100 letters, digits, dots, dashes and underscores.
        broker: The taskiq broker on which the workers' task is registered, started. None to only read and manage.
        url: The Redis server for runs, see `kaizen_async.workers.connect`.
        namespace: As the workers have it.
        keep: Seconds for which Redis keeps a run that nobody touches.
        on_trouble: Called with a text when Redis or the workers cannot be reached, and with "" when they can again.

    Raises:
        TypeError, ValueError: An argument is invalid.
    """

    def __init__(
        self,
        name: str,
        *,
        broker: AsyncBroker | None = None,
        url: str = DEFAULT_URL,
        namespace: str = "kaizen",
        keep: float = KEEP,
        on_trouble: Callable[[str], None] | None = None,
    ) -> None:
        self.name = require_name("run", name)
        require_duration("keep", keep)
        self._keep_ms = round(keep * 1000)
        self.broker = broker
        self._store = Store(url, namespace, on_trouble)
        self._key = self._store.run(name)

    async def __aenter__(self) -> Self:
        try:
            await self._store.require_usable()
        except BaseException:
            await self._store.aclose()
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._store.aclose()

    async def produce(
        self, ids: AnyIds, *, kind: Kind = "instructor-executions", wait: bool = False, size: int = SHARD_SIZE
    ) -> RunStatus:
        """Send ids to the workers; return once all are in Redis. They are worked on from the first ones on.

        Ids that are in the run already, from an earlier call with the same ids, are compared and not sent again. Two
        producers may send the same ids at the same time.

        Args:
            ids: Any iterable or asynchronous iterable. An id that cannot be looked up gets an outcome with the reason.
            kind: What the ids are ids of.
            wait: Wait for each execution to end.
            size: Ids that a worker takes at a time.

        Raises:
            OtherInputError: The run was started with other ids or options. Nothing was sent.
            RunCancelledError: It was cancelled.
            RunError: Redis refused a command for good.
        """
        run_id = await self._create(ids, Options(kind, wait), size)
        if self.broker is not None:
            await invite(self._store, self.broker)  # here, because a short input is sent before the task below begins
        inviting = asyncio.create_task(self._invite())
        try:
            await self._send(run_id, ids, size)
        finally:
            await end(inviting)
        return await self.status()

    @asynccontextmanager
    async def process(
        self, ids: AnyIds, *, kind: Kind = "instructor-executions", wait: bool = False, size: int = SHARD_SIZE
    ) -> AsyncGenerator[Follower]:
        """Send ids and follow the run at the same time: `async with run.process(ids) as outcomes: ...`.

        Arguments and errors are those of `produce` and `follow`.
        """
        run_id = await self._create(ids, Options(kind, wait), size)
        async with self._follower(self._invite, partial(self._send, run_id, ids, size)) as outcomes:
            yield outcomes

    async def _create(self, ids: AnyIds, options: Options, size: int) -> bytes:
        """Create the run unless there is one, of the same options; return its id."""
        if isinstance(ids, (str, bytes)):
            raise TypeError(f"ids must be an iterable of ids, not one {type(ids).__name__}; pass [id]")
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= MOST_IN_SHARD:
            raise ValueError(f"size must be an int from 1 to {MOST_IN_SHARD:,}, not {size!r}")
        new = (uuid.uuid4().hex, Input(size).digest)
        arguments = (self._store.runs, self.name, options.encoded(), self._keep_ms, *new)
        encoded, run_id = await self._store.script("create", self._key, *arguments, ANY_RUN)
        try:
            stored = decode_options(encoded or b"")
        except (ValueError, RecursionError):
            raise RunError(f"what Redis holds of run {self.name} cannot be read; purge the run") from None
        if stored != options:
            raise OtherInputError(
                f"run {self.name} was started with {_described(stored)}, not with {_described(options)}; "
                "choose another name, or purge the run"
            )
        return cast("bytes", run_id)

    async def _send(self, run_id: bytes, ids: AnyIds, size: int) -> None:
        sent = Input(size)
        stored = await self._stored()
        async for chunk in in_chunks(ids, size):
            for execution_id in chunk:
                is_full = sent.add(execution_id)
                if sent.count <= stored.count:
                    if sent.count == stored.count:
                        self._require_same(stored, sent.digest, sent.count)
                    if is_full or sent.count == stored.count:
                        sent.skip()
                elif is_full or stored.is_all:
                    stored = await self._append(run_id, sent, stored)
            if len(chunk) < size and sent.count > stored.count:
                stored = await self._append(run_id, sent, stored)
        while sent.count > stored.count:
            stored = await self._append(run_id, sent, stored)
        await self._finish_input(run_id, sent, stored)

    async def _append(self, run_id: bytes, sent: Input, stored: "_Stored") -> "_Stored":
        """Store a part, or find out that another producer has; return how much of the input is stored then."""
        part = sent.part()
        if part is None:
            return stored
        if not stored.is_all:
            arguments = _arguments(self._keep_ms, part)
            is_mine, *reply = await self._store.script("append", self._key, *arguments, run_id)
            stored = self._read(*reply)
            if is_mine:
                sent.skip()
                return stored
        if stored.count < part.before:
            raise RunError(
                f"run {self.name} has lost part of its input, as if Redis had lost data; "
                "send the same ids again to complete it"
            )
        if stored.is_all and sent.count > stored.count:
            self._require_same(stored, sent.digest, sent.count)
        if stored.count <= sent.count:
            self._require_same(stored, sent.skip_to(stored.count), stored.count)
        return stored

    async def _finish_input(self, run_id: bytes, sent: Input, stored: "_Stored") -> None:
        self._require_same(stored, sent.digest, sent.count)
        if not stored.is_all:
            arguments = (self._store.runs, self.name, sent.count, sent.digest)
            _, *reply = await self._store.script("produced", self._key, *arguments, run_id)
            self._require_same(self._read(*reply), sent.digest, sent.count)

    async def _stored(self) -> "_Stored":
        reply = await self._store.command("HMGET", self._key, "state", "count", "digest", "produced")
        return self._read(*reply)

    def _read(self, state: bytes | None, count: Any, digest: bytes, produced: bytes) -> "_Stored":
        if state is None:
            raise UnknownRunError(self._unknown())
        if state == b"cancelled":
            raise RunCancelledError(f"run {self.name} was cancelled; choose another name, or purge the run")
        return _Stored(int(count), digest.decode(), produced == b"1")

    def _require_same(self, stored: "_Stored", digest: str, count: int) -> None:
        if (stored.count, stored.digest) != (count, digest):
            raise OtherInputError(
                f"run {self.name} was started with other ids: {stored.count:,}{'' if stored.is_all else ' or more'} "
                f"of digest {stored.digest[:12]}; these are {count:,} or more of digest {digest[:12]}. "
                "Choose another name, or purge the run"
            )

    def _unknown(self) -> str:
        return f"there is no run {self.name} in {self._store.address} (namespace {self._store.tag[1:-1]})"

    async def _facts(self) -> dict[str, str]:
        reply: dict[bytes, bytes] = await self._store.command("HGETALL", self._key)
        facts = {name.decode(): value.decode(errors="replace") for name, value in reply.items()}
        if "state" not in facts:
            raise UnknownRunError(self._unknown())
        return facts

    async def status(self) -> RunStatus:
        """Return where the run is.

        Raises:
            UnknownRunError: The run does not exist.
        """
        facts = await self._facts()
        try:
            return await self._status_of(facts)
        except (KeyError, ValueError, RecursionError):
            raise RunError(f"what Redis holds of run {self.name} cannot be read; purge the run") from None

    async def _status_of(self, facts: dict[str, str]) -> RunStatus:
        waiting = await self._store.command("LLEN", f"{self._key}:todo")
        delayed = await self._store.command("ZCARD", f"{self._key}:later")
        held = await self._store.command("HLEN", f"{self._key}:held")
        workers = await self._store.command("ZCARD", f"{self._key}:members")
        seconds, microseconds = await self._store.command("TIME")
        whole = {name: int(facts[name]) for name in ("done", "failed", "invalid", "set_aside", "read", "unread_bytes")}
        age = max(0.0, int(seconds) + int(microseconds) / 1e6 - int(facts["created_at"]) / 1000)
        worked = int(facts.get("recorded_at", facts["created_at"])) - int(facts["created_at"])
        is_all = facts["produced"] == "1"
        return RunStatus(
            name=self.name,
            state=cast("Any", facts["state"]),
            wait=decode_options(facts["options"].encode()).wait,
            ids=int(facts["count"]),
            total=int(facts["count"]) if is_all else None,
            digest=facts["digest"],
            shards_waiting=waiting + delayed,
            shards_held=held,
            workers=workers if facts["state"] == "running" else 0,
            age=age,
            rate=whole["done"] / (worked / 1000) if worked > 0 else 0.0,
            **whole,
        )

    def follow(self) -> "Follower":
        """Yield outcomes as workers record them, until all of the run are read.

        Use it as `async with run.follow() as outcomes: async for outcome in outcomes: ...`. It resumes after the last
        outcome that was acknowledged. An outcome is acknowledged when the next one is asked for, or a moment later: so
        after a crash of the reader the last ones come again, with the same numbers. One reader follows a run at a
        time; another one waits until the first is gone.

        Raises:
            UnknownRunError: The run does not exist, or was purged during the call.
            RunCancelledError: The run was cancelled, and everything recorded before was read.
            NoWorkersError: Workers take the invitations but do not know the task.
        """
        return self._follower(self._invite)

    def _follower(self, *beside: Callable[[], Coroutine[Any, Any, None]]) -> Follower:
        return Follower(self._store, self.name, keep_ms=self._keep_ms, unknown=self._unknown(), beside=beside)

    async def retry_failed(self) -> int:
        """Have the ids looked up again whose outcome is an error; return how many. Invalid ids stay as they are.

        Their outcomes are recorded again under the same numbers.

        Raises:
            UnknownRunError, RunCancelledError: The run does not exist, or was cancelled.
        """
        retried: int = 0
        while True:
            arguments = (self._store.runs, self.name, 100)
            ids, left, state = await self._store.script("retry", self._key, *arguments, ANY_RUN)
            if state == b"unknown":
                raise UnknownRunError(self._unknown())
            if state == b"cancelled":
                raise RunCancelledError(f"run {self.name} was cancelled")
            retried += ids
            if not left or not ids:
                break
        if retried and self.broker is not None:
            await invite(self._store, self.broker)
        return retried

    async def cancel(self) -> RunStatus:
        """Stop the run: what has no outcome yet gets none. What is recorded can still be read.

        Raises:
            UnknownRunError: The run does not exist.
        """
        await self._store.script("cancel", self._key, self._store.runs, self.name, ANY_RUN)
        return await self.status()

    async def purge(self) -> None:
        """Delete everything that Redis has of the run. Workers and readers of it end within a moment.

        Raises:
            UnknownRunError: The run does not exist.
        """
        if not await self._store.script("purge", self._key, self._store.runs, self.name, ANY_RUN):
            raise UnknownRunError(self._unknown())

    async def _invite(self) -> None:
        """Bring workers to the run for as long as somebody produces or follows; workers do it among themselves, too."""
        began = time.monotonic()
        is_alone = False
        while self.broker is not None:
            live = await invite(self._store, self.broker)
            if live:
                if is_alone:
                    self._store.report_trouble("")
                is_alone = False
            elif time.monotonic() - began > KNOWS_SECONDS:
                # After an outage of Redis, workers that are known take a moment to report again.
                has_known = await self._store.command("ZCARD", self._store.workers)
                if not has_known and await takes_unknown_tasks(self.broker):
                    raise NoWorkersError(
                        "the broker's workers take the invitations but do not know the task; "
                        "call kaizen_async.workers.register(broker) in a module that they import"
                    )
                if not is_alone:
                    self._store.report_trouble("no worker is running")
                is_alone = True
            await asyncio.sleep(INVITE_SECONDS)


class _Stored(msgspec.Struct, frozen=True):
    """How much of its input a run holds."""

    count: int
    digest: str
    is_all: bool


def _arguments(keep_ms: int, part: Part) -> list[Any]:
    return [
        keep_ms,
        part.before,
        part.count,
        part.digest,
        pack_shard(part.shard),
        len(part.shard.ids),
        pack(b"\n".join(part.invalid)),
        len(part.invalid),
    ]


def _described(options: Options) -> str:
    return f"{options.kind}{', waiting for each to end' if options.wait else ''}"
