"""The reader's side of a run: outcomes as they are recorded, each at least once, in constant memory."""

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from kaizen_async.errors import printable
from kaizen_async.workers.errors import RunCancelledError, RunError, UnknownRunError
from kaizen_async.workers.options import Execution, decode_options
from kaizen_async.workers.shards import RunOutcome, lines_of
from kaizen_async.workers.store import Store, log
from kaizen_async.workers.tasks import end

LEASE_MS: Final = 10_000
"""Milliseconds after which a reader that does not report any more counts as gone."""
ACK_SECONDS: Final = 0.5
"""Time between two acknowledgements of what was read."""
BLOCK_MS: Final = 300
"""Milliseconds that Redis lets a reader wait for outcomes."""
AT_ONCE: Final = 4
"""Batches of outcomes that a reader gets in one reply."""
LEAVE_SECONDS: Final = 2.0
"""Time for the last acknowledgement. Without Redis, what was not acknowledged comes again."""
OTHER_READER: Final = "another reader follows the run; waiting until it is gone"


class _Batch(msgspec.Struct, frozen=True):
    """Outcomes that were recorded together."""

    entry: str
    count: int
    size: int
    """Bytes in Redis."""


class _Outline(msgspec.Struct):
    """What every outcome has. All else of its line is checked to be JSON."""

    number: int
    id: str


_outline: Final = msgspec.json.Decoder(_Outline)


class Follower:
    """Outcomes of a run as workers record them. Use it as `async with … as outcomes: async for outcome in outcomes`.

    Leaving the block acknowledges the outcomes that were handled: those after which another one was asked for.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        *,
        keep_ms: int,
        unknown: str,
        beside: Sequence[Callable[[], Coroutine[Any, Any, None]]],
    ) -> None:
        self._store = store
        self._name = name
        self._key = store.run(name)
        self._keep_ms = keep_ms
        self._unknown = unknown
        self._beside = beside
        self._tasks: list[asyncio.Task[None]] = []
        self._reader = uuid.uuid4().hex
        self._state = ""
        self._has_lease: bool | None = None
        self._acked = self._last = "0-0"
        self._handled = [0, 0]
        self._handled_entry = ""
        self._unhandled: deque[_Batch] = deque()
        self._lines: deque[bytes] = deque()
        self._left_in_batch = 0
        self._acked_at = -ACK_SECONDS
        self._decoder: msgspec.json.Decoder[Any] | None = None
        self._run_id = b""
        self._trouble = ""

    async def __aenter__(self) -> Self:
        stored = await self._store.command("HMGET", self._key, "options", "acked", "id")
        if stored[0] is None:
            raise UnknownRunError(self._unknown)
        try:
            kind: Any = decode_options(stored[0] if all(stored) else b"").record
        except (ValueError, RecursionError):
            raise RunError(f"what Redis holds of run {self._name} cannot be read; purge the run") from None
        self._decoder = msgspec.json.Decoder(RunOutcome[kind])
        self._acked = self._last = stored[1].decode()
        self._run_id = stored[2]
        self._tasks = [asyncio.create_task(work()) for work in self._beside]
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await end(*self._tasks)
        with suppress(TimeoutError, UnknownRunError):
            async with asyncio.timeout(LEAVE_SECONDS):
                await self._acknowledge(lease_ms=0)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RunOutcome[Execution]:
        if self._decoder is None:
            raise RuntimeError(
                "enter it first: `async with run.follow() as outcomes: async for outcome in outcomes: ...`"
            )
        line = await self.next_line()
        if line is None:
            raise StopAsyncIteration
        outcome: RunOutcome[Execution] = self._decoder.decode(line)
        return outcome

    async def next_line(self) -> bytes | None:
        """Return the next outcome as its line of JSON, or None at the end.

        Raises:
            UnknownRunError, RunCancelledError, NoWorkersError: As `Run.follow`.
        """
        while not self._lines:
            self._note_handled()
            if time.monotonic() - self._acked_at > ACK_SECONDS:
                await self._acknowledge()
            if not await self._fetch() and await self._is_over():
                return None
        return self._lines.popleft()

    def _note_handled(self) -> None:
        """Count the batches of which the consumer has asked for more than the last outcome."""
        while self._unhandled:
            batch = self._unhandled.popleft()
            self._handled_entry = batch.entry
            self._handled[0] += batch.count
            self._handled[1] += batch.size

    async def _fetch(self) -> bool:
        """Get outcomes, waiting a little for them; return whether there were some."""
        for task in self._tasks:
            if task.done():
                task.result()
        if not self._has_lease:
            await asyncio.sleep(BLOCK_MS / 1000)
            return False
        words = ("XREAD", "COUNT", AT_ONCE, "BLOCK", BLOCK_MS, "STREAMS", f"{self._key}:out", self._last)
        reply = await self._store.command(*words)
        entries = _entries(reply)
        if entries and await self._store.command("HGET", self._key, "id") != self._run_id:
            raise UnknownRunError(self._unknown)  # and these may be outcomes of another run that took the name
        for entry, fields in entries:
            lines = self._lines_in(fields.get(b"b", b""))
            self._lines.extend(lines)
            self._unhandled.append(_Batch(entry.decode(), len(lines), len(fields[b"b"]) if lines else 0))
            self._last = entry.decode()
        return bool(entries)

    def _lines_in(self, batch: bytes) -> list[bytes]:
        """Return the outcomes of a batch; none if no worker wrote it."""
        try:
            lines = list(lines_of(batch))
            for line in lines:
                _outline.decode(line)
        except (ValueError, RecursionError) as error:
            log.warning("run %s: a batch that is not of outcomes is left out: %s", self._name, printable(str(error)))
            return []
        return lines

    async def _is_over(self) -> bool:
        """Return whether nothing will come any more."""
        await self._acknowledge()
        await self._look_for_trouble()
        _, *producing = self._tasks
        if not self._has_lease or self._state == "running" or not all(task.done() for task in producing):
            return False
        for task in producing:
            task.result()
        if await self._store.command("XLEN", f"{self._key}:out"):
            return False
        if self._state == "cancelled":
            raise RunCancelledError(f"run {self._name} was cancelled; what was recorded before has been read")
        return True

    async def _look_for_trouble(self) -> None:
        """Report why workers cannot work on the run, and that they can again."""
        trouble = printable((await self._store.command("HGET", self._key, "trouble") or b"").decode(errors="replace"))
        if trouble != self._trouble:
            self._store.report_trouble(trouble and f"a worker cannot work on the run: {trouble:.200}")
        self._trouble = trouble

    async def _acknowledge(self, lease_ms: int = LEASE_MS) -> None:
        """Let Redis forget what was handled, keep the lease of the only reader, and learn the state of the run."""
        entry = self._handled_entry or self._acked
        mine, state, acked = await self._store.script(
            "ack", self._key, self._keep_ms, self._reader, lease_ms, self._acked, entry, *self._handled, self._run_id
        )
        self._acked_at = time.monotonic()
        if state == b"unknown":
            raise UnknownRunError(self._unknown)
        self._state = state.decode()
        if mine:
            self._handled = [0, 0]
            self._handled_entry = ""
            self._acked = acked.decode()
            if not self._has_lease:
                self._last = self._acked
        had_lease, self._has_lease = self._has_lease, bool(mine)
        if (had_lease is False) == self._has_lease:
            self._store.report_trouble("" if self._has_lease else OTHER_READER)


def _entries(reply: Any) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """Return the entries of the one stream in a reply to XREAD."""
    return reply[0][1] if reply else []
