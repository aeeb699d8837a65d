"""The session of a run that waits for its executions to end."""

import asyncio
import time
from collections import Counter
from contextlib import suppress
from typing import Any, Final

import msgspec

from kaizen_async._ledger import CHECKPOINT_VERSION, Checkpoint, Unfinished
from kaizen_async.workers.recorder import Held
from kaizen_async.workers.session import LOOK_AGAIN, Claim, Session, log
from kaizen_async.workers.shards import pack, unpack
from kaizen_async.workers.tasks import end

SAVE_SECONDS: Final = 30.0
"""Seconds after which the state of the waits of a shard is saved again: a crash loses no more."""
CLAIM_SECONDS: Final = 0.25
"""Time between two claims, in which other workers get their share."""


class WaitSession(Session):
    """Waits for the executions of many shards at once. The client's one scheduler polls for all of them."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._tasks: set[asyncio.Task[None]] = set()
        self._streams: dict[Held, Any] = {}

    async def _work(self) -> None:
        try:
            while not self._is_over:
                self._raise_failures()
                waiting = sum(len(held.left) for held in self._held.values())
                claims = await self._claim(1) if waiting < self._limits.waits else []
                for claim in claims:
                    self._tasks.add(asyncio.create_task(self._wait_for(claim)))
                self._changed.clear()
                await self._until_changed(CLAIM_SECONDS if claims else LOOK_AGAIN)
        finally:
            await end(*self._tasks)
        await self._recorder.flush()
        if self.state == "running":
            await self._hand_over()

    async def _until_changed(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    def _raise_failures(self) -> None:
        for task in [task for task in self._tasks if task.done()]:
            self._tasks.discard(task)
            task.result()

    async def _wait_for(self, claim: Claim) -> None:
        """Wait for the executions of one shard, and save the state of its waits from time to time."""
        held = claim.held
        while held.left - held.errors.keys() and not held.lost:
            stream = self._streams[held] = self._stream(claim)
            claim = msgspec.structs.replace(claim, checkpoint=b"")
            saver = asyncio.create_task(self._save(held, stream))
            try:
                await self._take(held, stream)
            finally:
                await end(saver)
        self._streams.pop(held, None)
        await self._end_try(held)

    def _stream(self, claim: Claim) -> Any:
        """Return a stream of all ids that are left, with the ages that the worker before saved.

        If it saved none, the waits are as old as the first claim of their shard.
        """
        held = claim.held
        if claim.checkpoint:
            try:
                state = msgspec.json.decode(unpack(claim.checkpoint), type=dict[str, Any])
                state["taken_at"] = time.time() - claim.saved  # by the clock of Redis: those of machines differ
                return self._executions.wait_many((), deadline=None, checkpoint=state)
            except (ValueError, RecursionError) as error:
                log.warning("run %s: the saved waits of shard %d are not usable: %s", self._run, held.number, error)
        ids = [held.shard.ids[place] for place in sorted(held.left)]
        if not claim.age:
            return self._executions.wait_many(ids, deadline=None)
        waits = [Unfinished(execution_id, count, claim.age) for execution_id, count in Counter(ids).items()]
        aged = Checkpoint(CHECKPOINT_VERSION, 0, time.time(), waits)
        return self._executions.wait_many((), deadline=None, checkpoint=aged.plain())

    async def _take(self, held: Held, stream: Any) -> None:
        places: dict[str, list[int]] = {}
        for place in held.left:
            places.setdefault(held.shard.ids[place], []).append(place)
        async with stream as outcomes:
            async for outcome in outcomes:
                if found := places.get(outcome.id):
                    self._judge(held, found.pop(), outcome)
                if (room := self._recorder.room()) is not None:
                    await room
                if held.lost:
                    return

    async def _hand_over(self) -> None:
        """Give shards back with the ages of their waits, so that the next worker polls no more often than this one."""
        for held, stream in self._streams.items():
            if self._held.get(held.number) is held:
                await self._release(held, "back", checkpoint=_packed(stream.checkpoint()))

    async def _save(self, held: Held, stream: Any) -> None:
        """Save the state of the waits, for the case that this worker dies."""
        while True:
            await asyncio.sleep(SAVE_SECONDS)
            await self._recorder.flush()
            if not held.unrecorded and not held.lost:
                await self._release(held, "keep", checkpoint=_packed(stream.checkpoint()))


def _packed(checkpoint: dict[str, Any]) -> bytes:
    """Return a checkpoint as it is stored. What was learned is shared in another way, and not once for each shard."""
    checkpoint.pop("learned", None)
    return pack(msgspec.json.encode(checkpoint))
