"""The session of a run that looks its ids up."""

import asyncio
import math
from collections import deque
from collections.abc import Iterator
from typing import Final

from kaizen_async.errors import ClientClosedError
from kaizen_async.workers.recorder import Held
from kaizen_async.workers.session import LOOK_AGAIN, Claim, Session
from kaizen_async.workers.tasks import end

AHEAD: Final = 2000
"""Ids that are kept ready, so that no lookup waits for a claim."""
MOST_AT_ONCE: Final = 20
"""Shards of one claim."""
LOOK_SOON: Final = 0.02
"""Seconds after which a worker that found no shard asks again at first: a producer is about to send more."""


class LookupSession(Session):
    """Looks up the ids of all its shards in one stream, so that no lookup waits for the slowest one of a shard."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._ready: deque[tuple[Held, int]] = deque()
        self._in_flight: dict[str, list[tuple[Held, int]]] = {}
        self._open: dict[int, int] = {}
        self._few_ready = asyncio.Event()
        self._shard_size = AHEAD

    async def _work(self) -> None:
        claiming = asyncio.create_task(self._claim_ahead())
        try:
            while not self._is_over:
                if claiming.done():
                    await claiming
                if self._ready:
                    await self._look_up()
                else:
                    self._changed.clear()
                    await self._changed.wait()
        finally:
            await end(claiming)
        await self._recorder.flush()

    async def _claim_ahead(self) -> None:
        """Have the next shards ready before the ids of these run out."""
        pause = LOOK_SOON
        try:
            while not self._is_over:
                missing = AHEAD - len(self._ready)
                if missing <= 0:
                    self._few_ready.clear()
                    await self._few_ready.wait()
                    continue
                claims = await self._claim(min(math.ceil(missing / self._shard_size), MOST_AT_ONCE))
                for claim in claims:
                    self._add(claim)
                if claims:
                    pause = LOOK_SOON
                else:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, LOOK_AGAIN)
        finally:
            self._changed.set()

    def _add(self, claim: Claim) -> None:
        held = claim.held
        self._shard_size = len(held.shard.ids)
        self._open[held.number] = len(held.left)  # of an earlier claim of this shard nothing is in flight any more
        self._ready.extend((held, place) for place in sorted(held.left))
        self._changed.set()

    async def _look_up(self) -> None:
        try:
            async with self._executions.stream(self._hand_out()) as outcomes:
                async for outcome in outcomes:
                    held, place = self._take_back(outcome.id)
                    self._judge(held, place, outcome)
                    self._open[held.number] -= 1
                    if not self._open[held.number] and held.errors:
                        await self._end_try(held)
                    if (room := self._recorder.room()) is not None:
                        await room
        except ClientClosedError:
            self.stop()

    def _hand_out(self) -> Iterator[str]:
        """Yield ids while there are some: of all shards, the next one included if it is there in time."""
        while self._ready and not self._is_over:
            held, place = entry = self._ready.popleft()
            if len(self._ready) < AHEAD:
                self._few_ready.set()
            if held.lost:
                continue
            execution_id = held.shard.ids[place]
            same = self._in_flight.get(execution_id)
            if same is None:
                self._in_flight[execution_id] = [entry]
            else:
                same.append(entry)
            yield execution_id

    def _take_back(self, execution_id: str) -> tuple[Held, int]:
        same = self._in_flight[execution_id]
        if len(same) == 1:
            del self._in_flight[execution_id]
        return same.pop()
