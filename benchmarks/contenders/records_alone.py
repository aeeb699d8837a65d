"""Decoded records without a client and a server, to measure the memory of everything else."""

from collections.abc import Iterable

import contender
import data
import msgspec

from kaizen_async import InstructorExecution


class Contender(contender.Contender):
    """Decodes the served record with each id."""

    title = "the records alone"

    async def setup(self) -> None:
        """Prepare the record's JSON before and after the id."""
        self._before, self._after = data.template(1)
        self._decode = msgspec.json.Decoder(InstructorExecution).decode

    async def look_up(self, execution_id: str) -> str:
        """Decode one."""
        return self._record(execution_id).id

    async def close(self) -> None:
        """Do nothing, because nothing is open."""

    async def keep(self, ids: Iterable[str]) -> object:
        """Decode and keep all records."""
        return [self._record(execution_id) for execution_id in ids]

    def _record(self, execution_id: str) -> InstructorExecution:
        return self._decode(self._before + execution_id.encode() + self._after)
