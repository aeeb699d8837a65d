"""Records outcomes in batches: one call to Redis for all that came within a tenth of a second."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

from kaizen_async.outcomes import Outcome
from kaizen_async.workers.errors import RunError
from kaizen_async.workers.shards import Shard, line_of, pack, pack_shard
from kaizen_async.workers.store import Store
from kaizen_async.workers.tasks import end

BATCH_SECONDS: Final = 0.1
BATCH_BYTES: Final = 512 * 1024
BATCH_OUTCOMES: Final = 2000
MOST_UNRECORDED: Final = 8000
"""Outcomes that wait to be recorded, for instance while Redis restarts, before no more are taken."""


class Held:
    """A shard that this worker holds.

    Attributes:
        number: Of the shard in its run.
        token: Of its claim; outcomes of an earlier claim are refused.
        shard: The ids.
        tries: Earlier tries that failed.
        why: What failed in the last of them.
        left: Places of the ids that have no outcome yet.
        errors: Outcomes of this try that another try may better, by place.
        lost: Whether it belongs to another worker by now.
        is_set_aside: Whether the next outcomes are those of a shard that is given up.
    """

    def __init__(self, number: int, token: str, tries: int, why: str, shard: Shard, bits: bytes) -> None:
        self.number = number
        self.token = token
        self.tries = tries
        self.shard = shard
        self.why = why
        self.errors: dict[int, Outcome[Any]] = {}
        self.lost = False
        self.is_set_aside = False
        self._bits = bytearray(bits.ljust((len(shard.ids) + 7) // 8, b"\0"))
        self.left = {place for place in range(len(shard.ids)) if not self._bits[place // 8] >> place % 8 & 1}
        self._sequence = 0
        self._places: list[int] = []
        self._lines: list[bytes] = []
        self._failed: list[int] = []

    @property
    def unrecorded(self) -> int:
        """Outcomes that wait to be recorded."""
        return len(self._lines)

    def put(self, place: int, line: bytes, *, failed: bool) -> None:
        """Add the outcome of the id at a place."""
        self.left.discard(place)
        self._places.append(place)
        self._lines.append(line)
        if failed:
            self._failed.append(place)

    def take_batch(self) -> list[Any]:
        """Return what the script `record` takes for what was added since the last time, but for the packed parts."""
        self._sequence += 1
        for place in self._places:
            self._bits[place // 8] |= 1 << place % 8
        failed = Shard(
            [self.shard.ids[place] for place in self._failed], 0, [self.shard.number(place) for place in self._failed]
        )
        batch = [
            self.number,
            self.token,
            self._sequence,
            len(self._lines),
            len(self._failed),
            int(self.is_set_aside),
            bytes(self._bits),
            b"\n".join(self._lines),
            failed if self._failed else None,
        ]
        self.is_set_aside = False
        self._places, self._lines, self._failed = [], [], []
        return batch


class Recorder:
    """Collects the outcomes of the shards of one run and records them.

    Args:
        store: Where they go.
        run: The run's name.
        run_id: Its id.
        on_recorded: Called with the shards whose outcomes are recorded; `lost` is set on those of which they were
            refused.
    """

    def __init__(self, store: Store, run: str, run_id: bytes, on_recorded: Callable[[list[Held]], None]) -> None:
        self._store = store
        self._run = run
        self._run_id = run_id
        self._on_recorded = on_recorded
        self._pending: dict[int, Held] = {}
        self._count = 0
        self._bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._flushing: asyncio.Task[None] | None = None
        self._failure: RunError | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    def put(self, held: Held, place: int, outcome: Outcome[Any]) -> None:
        """Add an outcome."""
        self.put_line(held, place, line_of(held.shard.number(place), outcome), failed=outcome.error is not None)

    def put_line(self, held: Held, place: int, line: bytes, *, failed: bool) -> None:
        """Add an outcome that is a line already."""
        self._raise_failure()
        if held.lost or place not in held.left:
            return
        held.put(place, line, failed=failed)
        self._pending[held.number] = held
        self._count += 1
        self._bytes += len(line)
        if self._bytes >= BATCH_BYTES or self._count >= BATCH_OUTCOMES:
            self._flush_soon()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(BATCH_SECONDS, self._flush_soon)

    def room(self) -> Awaitable[object] | None:
        """Return None if outcomes may be added, else something to await before."""
        return self._idle.wait() if self._count >= MOST_UNRECORDED else None

    async def flush(self) -> None:
        """Record all that was added.

        Raises:
            RunError: Redis refused it for good.
        """
        while self._pending or not self._idle.is_set():
            self._flush_soon()
            await self._idle.wait()
        self._raise_failure()

    def _flush_soon(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._pending and self._idle.is_set():
            self._idle.clear()
            self._flushing = asyncio.ensure_future(self._flush())

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    async def _flush(self) -> None:
        """Record one batch. Only one is on its way, so the batches of a shard stay in order."""
        pending, self._pending = self._pending, {}
        self._count = self._bytes = 0
        shards = list(pending.values())
        try:
            arguments = await asyncio.to_thread(_packed, [held.take_batch() for held in shards])
            replies = await self._store.script(
                "record", self._store.run(self._run), self._store.runs, self._run, *arguments, self._run_id
            )
            for held, is_ours in zip(shards, replies, strict=True):
                held.lost = held.lost or not is_ours
        except RunError as error:
            self._failure = error
            return
        finally:
            self._idle.set()
        self._on_recorded(shards)
        if self._count >= BATCH_OUTCOMES:
            self._flush_soon()
        elif self._pending and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(BATCH_SECONDS, self._flush_soon)

    async def aclose(self) -> None:
        """Stop. The next worker with this shard does what was not recorded."""
        if self._timer is not None:
            self._timer.cancel()
        await end(self._flushing)


def _packed(batches: list[list[Any]]) -> list[Any]:
    """Compress batches; in a thread, since that takes longer than an event loop may stand still."""
    arguments: list[Any] = []
    for *facts, lines, failed in batches:
        arguments += [*facts, pack(lines), b"" if failed is None else pack_shard(failed)]
    return arguments
