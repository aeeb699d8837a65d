"""The session of a run that looks its ids up."""

import asyncio
from collections import deque
from collections.abc import Iterator
from typing import Final

from kaizen_async.errors import ClientClosedError
from kaizen_async.workers.recorder import Held
from kaizen_async.workers.session import LOOK_AGAIN, Claim, Session
from kaizen_async.workers.tasks import end

AHEAD: Final = 500
"""Ids that are ready at which the next shard is claimed."""


class LookupSession(Session):
    """Looks up the ids of all its shards in one stream, so that no lookup waits for the slowest one of a shard."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._ready: deque[tuple[Held, int]] = deque()
        self._in_flight: dict[str, deque[tuple[Held, int]]] = {}
        self._open: dict[int, int] = {}

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
        """Have the next shard ready before the ids of this one run out."""
        try:
            while not self._is_over:
                claims = await self._claim(1) if len(self._ready) < AHEAD else []
                for claim in claims:
                    self._add(claim)
                if not claims:
                    await asyncio.sleep(0.02 if self._ready else LOOK_AGAIN)
        finally:
            self._changed.set()

    def _add(self, claim: Claim) -> None:
        held = claim.held
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
            held, place = self._ready.popleft()
            if held.lost:
                continue
            execution_id = held.shard.ids[place]
            self._in_flight.setdefault(execution_id, deque()).append((held, place))
            yield execution_id

    def _take_back(self, execution_id: str) -> tuple[Held, int]:
        places = self._in_flight[execution_id]
        found = places.popleft()
        if not places:
            del self._in_flight[execution_id]
        return found
