"""What workers learn about durations, shared: each polls as sparingly as one worker that saw everything.

Workers do not merge what they have computed, they share what they have seen: the workflow and duration of every
execution that ended, in a log that all read. A worker that has read the log has learned exactly what one process learns
from the same ends. Only the order may differ, since a worker sees its own ends `SHARE_SECONDS` earlier than those of
others. Histories forget by 1 % for each end, so an end that comes n places later weighs at most 1/0.99**n as much.
"""

import asyncio
from typing import Any, Final

import msgspec

from kaizen_async._waiting.cadence import LONGEST_NAME
from kaizen_async.events import Event, RecordEnded
from kaizen_async.workers.errors import RunError
from kaizen_async.workers.shards import pack, unpack
from kaizen_async.workers.store import Store, log

SHARE_SECONDS: Final = 2.0
"""Time between two exchanges with the log."""
ENTRIES: Final = 2_000
"""Entries of the log that are kept, each with what a worker saw in `SHARE_SECONDS` at most."""
MOST_SEEN: Final = 5_000
"""Ends of one entry; of more, the latest ones count."""
MOST_BYTES: Final = 2 * 1024 * 1024
"""Unpacked size of an entry above which it is refused."""
KEEP_MS: Final = 7 * 86_400_000
_AT_ONCE: Final = 200
"""Ends that are learned from before other tasks run."""

_Seen = list[tuple[str, float]]
_decode: Final = msgspec.json.Decoder(_Seen).decode


class SharedDurations:
    """Shares the durations of the executions of one kind.

    Args:
        store: The log's home.
        worker: Id of the worker process.
        kind: What the executions are.
        executions: Learns from what others saw.
        record: The type of the records.
    """

    def __init__(self, store: Store, worker: str, kind: str, executions: Any, record: type) -> None:
        self._store = store
        self._worker = worker
        self._key = f"{store.tag}:learned:{kind}"
        self._executions = executions
        self._record = record
        self._seen: _Seen = []
        self._last = "0-0"

    def notice(self, event: Event) -> None:
        """Note an end that a poll of this worker has seen."""
        record: Any = event.outcome.execution if isinstance(event, RecordEnded) else None
        if isinstance(record, self._record):
            workflow, duration = getattr(record, "workflow", None), getattr(record, "duration", None)
            if workflow is not None and duration is not None and len(workflow.id) <= LONGEST_NAME:
                self._seen.append((workflow.id, duration.total_seconds()))
                del self._seen[:-MOST_SEEN]

    async def share(self) -> None:
        """Exchange with the log, for ever."""
        while True:
            try:
                while await self._exchange():
                    pass
            except RunError as error:
                log.warning("durations are not shared: %s", error)
            await asyncio.sleep(SHARE_SECONDS)

    async def _exchange(self) -> bool:
        """Add what was seen to the log and learn what others added; return whether there may be more."""
        seen, self._seen = self._seen, []
        packed = pack(msgspec.json.encode(seen)) if seen else b""
        try:
            entries = await self._store.script("learned", self._key, self._worker, packed, ENTRIES, KEEP_MS, self._last)
        except RunError:
            self._seen[:0] = seen
            raise
        for entry, flat in entries:
            self._last = entry.decode()
            fields = dict(zip(flat[::2], flat[1::2], strict=True))
            if fields.get(b"w") != self._worker.encode():
                await self._learn(fields.get(b"d", b""))
        return bool(entries)

    async def _learn(self, packed: bytes) -> None:
        try:
            seen = _decode(unpack(packed, MOST_BYTES))[-MOST_SEEN:]
        except (ValueError, RecursionError) as error:
            log.warning("durations in Redis cannot be read and are left out: %s", error)
            return
        for start in range(0, len(seen), _AT_ONCE):
            self._executions.learn(seen[start : start + _AT_ONCE])
            await asyncio.sleep(0)  # learning from many durations must not block the event loop
