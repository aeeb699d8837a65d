"""One worker process at work on one run: it claims shards, works on them, and gives back what it cannot finish."""

import asyncio
import logging
import uuid
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Any, Final

import msgspec

from kaizen_async.client import KaizenClient
from kaizen_async.errors import ClientClosedError, printable
from kaizen_async.outcomes import Outcome
from kaizen_async.workers.options import Options
from kaizen_async.workers.recorder import Held, Recorder
from kaizen_async.workers.shards import Shard, line_of_failure, unpack_shard
from kaizen_async.workers.store import Store
from kaizen_async.workers.tasks import end

log = logging.getLogger("kaizen_async.workers")

BEAT_SECONDS: Final = 1.0
"""Time between two reports of a worker that it lives."""
DEAD_MS: Final = 8_000
"""Milliseconds of silence after which a worker counts as dead, and its shards go to others."""
FAULT_MS: Final = 60_000
"""A worker that dies this soon after claiming a shard, without one outcome of it, may have died of that shard."""
MOST_TRIES: Final = 5
"""Times that a shard is tried; then the ids that still fail get their error as outcome."""
RETRY_DELAYS: Final = (1, 2, 5, 10)
"""Seconds before the second to the last try."""
LOOK_AGAIN: Final = 0.5
"""Seconds after which a worker without a shard asks for one again."""
LEAVE_SECONDS: Final = 3.0
"""Time for giving shards back when a worker ends. If Redis is away, others notice the silence of this worker."""
END_SECONDS: Final = 6.0
"""Time for recording what is known when a worker ends. It includes the time that requests in flight get."""


class Limits(msgspec.Struct, frozen=True):
    """Bounds of what a run may take."""

    keep: float = 7 * 86_400.0
    """Seconds for which Redis keeps a run that nobody touches."""
    waits: int = 100_000
    """Executions that a worker process waits for at the same time, at most."""
    unread_bytes: int = 0
    """Size of recorded outcomes that nobody has read yet, in bytes, at which workers pause. 0: 200 for each id of the
    run, at least 64 MB."""


class Claim(msgspec.Struct, frozen=True):
    """A shard that was claimed, and what is known of it from before."""

    held: Held
    age: float
    """Seconds since it was claimed for the first time."""
    checkpoint: bytes
    saved: float
    """Seconds since the checkpoint was saved."""


class Session(ABC):
    """What one worker process does for one run.

    Args:
        store: The run's home.
        worker: Id of the worker process.
        run: Name of the run.
        run_id: Its id. If it is purged, a run that takes its name is not worked on by this session.
        options: What to do with the ids.
        kaizen: Sends the requests.
        limits: Bounds.

    Attributes:
        state: Of the run.
        run_id: The argument.
    """

    def __init__(
        self,
        store: Store,
        worker: str,
        run: str,
        run_id: bytes,
        options: Options,
        kaizen: KaizenClient,
        limits: Limits,
    ) -> None:
        self.state = "running"
        self._store = store
        self._worker = worker
        self._run = run
        self.run_id = run_id
        self._executions: Any = options.executions_of(kaizen)
        self._limits = limits
        self._recorder = Recorder(store, run, run_id, self._on_recorded)
        self._held: dict[int, Held] = {}
        self._claiming = asyncio.Lock()
        self._changed = asyncio.Event()
        self._stopping = asyncio.Event()

    async def serve(self) -> None:
        """Work until the run is over or `stop` is called; then nothing is held any more."""
        beats = asyncio.create_task(self._beat())
        work = asyncio.create_task(self._work())
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({beats, work, stopping}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({beats, work}, return_when=asyncio.FIRST_COMPLETED, timeout=END_SECONDS)
        finally:
            await end(beats, work, stopping)
            await self._recorder.aclose()
            await self._leave()
        for task in (beats, work):
            if not task.cancelled():
                task.result()

    def stop(self) -> None:
        """Claim nothing more, and end once what is in flight has ended."""
        self._stopping.set()
        self._changed.set()

    @abstractmethod
    async def _work(self) -> None:
        """Claim shards and work on them until `_is_over`."""

    @property
    def _is_over(self) -> bool:
        return self._stopping.is_set() or self.state != "running"

    async def _beat(self) -> None:
        """Report that this worker lives and what it holds, and learn whether the run is over."""
        while True:
            async with self._claiming:
                reply = await self._script("beat", self._store.workers, self._worker, DEAD_MS, FAULT_MS, *self._held)
            self.state = reply.decode()
            if self.state != "running":
                self._changed.set()
            await asyncio.sleep(BEAT_SECONDS)

    async def _claim(self, most: int) -> list[Claim]:
        """Claim shards. Those that failed too often get their outcomes here."""
        async with self._claiming:
            if self._is_over:
                return []
            keep = round(self._limits.keep * 1000)
            token = uuid.uuid4().hex
            state, *rows = await self._script(
                "claim", keep, self._worker, most, len(self._held), self._limits.unread_bytes, token
            )
            if state != b"unread":
                self.state = state.decode()
            claims = [self._opened(token, *row) for row in rows]
            self._held.update((claim.held.number, claim.held) for claim in claims)
        for claim in claims:
            if claim.held.tries >= MOST_TRIES:
                await self._set_aside(claim.held)
        return [claim for claim in claims if claim.held.tries < MOST_TRIES]

    def _opened(
        self,
        token: str,
        number: int,
        size: int,
        tries: int,
        age_ms: int,
        saved_ms: int,
        bits: bytes,
        ids: bytes | None,
        checkpoint: bytes,
        why: bytes,
    ) -> Claim:
        reason = why.decode(errors="replace")
        try:
            shard = unpack_shard(ids or b"", size)
        except (ValueError, RecursionError) as error:
            reason = f"what Redis holds of it cannot be read: {printable(str(error))}"
            shard, tries = Shard([""] * size), MOST_TRIES
        return Claim(Held(number, token, tries, reason, shard, bits), age_ms / 1000, checkpoint, saved_ms / 1000)

    async def _set_aside(self, held: Held) -> None:
        """Give up a shard: each of its ids gets the error of the last try, or one that says why there is none."""
        held.is_set_aside = True
        log.error("run %s: shard %d is set aside after %d tries: %s", self._run, held.number, MOST_TRIES, held.why)
        for place in sorted(held.left):
            if place in held.errors:
                self._recorder.put(held, place, held.errors[place])
            else:
                line = line_of_failure(
                    held.shard.number(place),
                    held.shard.ids[place],
                    "ShardFailedError",
                    f"set aside after {MOST_TRIES} tries: {held.why}",
                )
                self._recorder.put_line(held, place, line, failed=True)
        await self._recorder.flush()

    def _judge(self, held: Held, place: int, outcome: Outcome[Any]) -> None:
        """Record an outcome, unless another try of its id may bring a better one."""
        error = outcome.error
        if error is None or not (error.retryable or isinstance(error, ClientClosedError | TimeoutError)):
            self._recorder.put(held, place, outcome)
        else:
            held.errors[place] = outcome

    async def _end_try(self, held: Held) -> None:
        """Give a shard back if ids are left: to any worker at once, or after a while if they failed."""
        await self._recorder.flush()
        if held.lost or not held.left:
            return
        if self._is_over or all(isinstance(o.error, ClientClosedError) for o in held.errors.values()):
            await self._release(held, "back")
            return
        error = next(reversed(held.errors.values())).error
        held.why = printable(str(error))
        if held.tries + 1 >= MOST_TRIES:
            await self._set_aside(held)
        else:
            await self._release(held, "failed", delay=RETRY_DELAYS[min(held.tries, len(RETRY_DELAYS) - 1)])

    async def _release(self, held: Held, what: str, *, delay: float = 0.0, checkpoint: bytes = b"") -> None:
        """Give a shard back (`back`, `failed`), or save where its waits are (`keep`)."""
        if what != "keep":
            self._forget(held)
        await self._script("release", held.number, held.token, what, round(delay * 1000), checkpoint, held.why)

    def _on_recorded(self, shards: list[Held]) -> None:
        for held in shards:
            if held.lost or not (held.left or held.unrecorded):
                self._forget(held)
        self._changed.set()

    def _forget(self, held: Held) -> None:
        """Report a shard as held no more, unless this worker has claimed it again since."""
        if self._held.get(held.number) is held:
            del self._held[held.number]

    async def _leave(self) -> None:
        """Give back all that is still held."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_SECONDS):
                for held in list(self._held.values()):
                    await self._release(held, "back")
                await self._script("leave", self._worker)

    async def _script(self, name: str, *arguments: Any) -> Any:
        return await self._store.script(name, self._store.run(self._run), *arguments, self.run_id)
