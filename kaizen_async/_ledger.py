"""The ledger of a call: how many ids were taken, which are not done, and the checkpoint for a later call.

`stream` and `wait_many` keep the same ledger, and so does the command with both. The rule: an id that was taken stays
in the ledger until the consumer has its result. So a checkpoint stored after a result was handled never lacks an id; if
the process dies before the next checkpoint is stored, the results since then are handled again.
"""

import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Final, TypeAlias, cast

import msgspec

from kaizen_async._ids import IdSource

CHECKPOINT_VERSION: Final = 2
MOST_REPEATS: Final = 1_000_000
"""The most results that a checkpoint may ask for under one id."""
MOST_IDS: Final = 20_000_000
"""The most results that a checkpoint may ask for under all ids."""
_LONGEST: Final = 1e11
"""The largest number of seconds in a checkpoint: three thousand years. A larger number is a mistake."""

_Seconds = Annotated[float, msgspec.Meta(ge=0, le=_LONGEST)]
_Id: TypeAlias = str | int | float | bool | None
"""An id in JSON. An id that is not a string is invalid, and gets its outcome when the call is resumed."""


class Unfinished(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """An id without a result, as a checkpoint holds it: `[id, count, age, due_in, seen]`.

    Attributes:
        id: The id.
        count: How many results it has to get.
        age: Seconds for which it is known to have been running; 0 if it was never asked for.
        due_in: Seconds until its next poll. Negative if the poll is overdue.
        seen: Whether its record was received.
    """

    id: _Id
    count: Annotated[int, msgspec.Meta(ge=1, le=MOST_REPEATS)] = 1
    age: _Seconds = 0.0
    due_in: Annotated[float, msgspec.Meta(ge=-_LONGEST, le=_LONGEST)] = 0.0
    seen: bool = False


class Checkpoint(msgspec.Struct, frozen=True):
    """The unfinished ids of a call, as the `checkpoint()` of its stream gives them in plain JSON."""

    version: int
    taken: Annotated[int, msgspec.Meta(ge=0)]
    """How many ids from the beginning of the source are accounted for: each has its result, or is in `ids`."""
    taken_at: Annotated[float, msgspec.Meta(ge=0, le=_LONGEST)]
    """When the checkpoint was made, in seconds since the epoch."""
    ids: list[Unfinished]
    learned: Any = None
    """The learned durations of executions."""

    @classmethod
    def load(cls, state: object) -> "Checkpoint":
        """Return a checkpoint from its plain form, or one that was decoded, once it is checked.

        Raises:
            ValueError: It is not a checkpoint, or of another version; in one line.
        """
        try:
            checkpoint = state if isinstance(state, cls) else msgspec.convert(state, cls)
        except (msgspec.ValidationError, RecursionError, OverflowError) as error:
            raise ValueError(f"not a valid checkpoint: {_one_line(error)}") from None
        if checkpoint.version != CHECKPOINT_VERSION:
            raise ValueError(f"this checkpoint is of version {checkpoint.version}, not {CHECKPOINT_VERSION}")
        if checkpoint.total > MOST_IDS:
            raise ValueError(f"not a valid checkpoint: it stands for more than {MOST_IDS:,} ids")
        return checkpoint

    @property
    def total(self) -> int:
        """How many results the checkpoint asks for."""
        return sum([entry.count for entry in self.ids])

    def plain(self) -> dict[str, Any]:
        """Return the checkpoint as dicts, lists, strings and numbers."""
        plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self))
        return plain

    def waiting_at(self, now: float) -> deque[Unfinished]:
        """Return the ids, with their ages and times to the next poll as of now, in seconds since the epoch."""
        asleep = max(0.0, now - self.taken_at)
        return deque(
            Unfinished(
                entry.id, entry.count, entry.age + asleep if entry.age else 0.0, entry.due_in - asleep, entry.seen
            )
            for entry in self.ids
        )


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return "".join(char for char in text if char.isprintable()) or type(error).__name__


class Ledger:
    """Accounts for the ids of one call.

    Args:
        source: Where the ids come from.
        checkpoint: What an earlier call left to do.

    Attributes:
        pending: Ids that were taken and have no result yet, with how many results each has to get.
        resumed: Ids of the checkpoint that were not taken up yet.
        done: Results that the consumer has got.
    """

    def __init__(self, source: IdSource, checkpoint: Checkpoint | None = None, *, now: float = 0.0) -> None:
        self.source = source
        self.pending: dict[Any, int] = {}
        self.resumed: deque[Unfinished] = deque() if checkpoint is None else checkpoint.waiting_at(now)
        self.done = 0
        self._taken_before = 0 if checkpoint is None else checkpoint.taken
        self._resumable = 0 if checkpoint is None else checkpoint.total
        self._not_resumed = self._resumable
        self._added = 0

    @property
    def taken(self) -> int:
        """How many ids were taken: from the source, from the checkpoint, and by `add`."""
        return self.source.taken + self._added + self._resumable - self._not_resumed

    @property
    def total(self) -> int | None:
        """How many results there will be. None as long as the length of the source is unknown."""
        total = self.source.total
        return None if total is None else total + self._added + self._resumable

    def begin(self, execution_id: str, count: int = 1) -> bool:
        """Note that an id was taken. Return whether it was not pending before."""
        before = self.pending.get(execution_id, 0)
        self.pending[execution_id] = before + count
        return not before

    def add(self, count: int) -> None:
        """Note that ids were added to those of the source."""
        self._added += count

    def resume(self, count: int | None = None) -> Unfinished:
        """Take the next id of the checkpoint, with all its results or with `count` of them."""
        entry = self.resumed.popleft()
        if count is not None and entry.count > count:
            self.resumed.appendleft(msgspec.structs.replace(entry, count=entry.count - count))
            entry = msgspec.structs.replace(entry, count=count)
        self._not_resumed -= entry.count
        return entry

    def end_one(self, execution_id: str) -> None:
        """Note that there is one result for an id."""
        count = self.pending.pop(execution_id)
        if count > 1:
            self.pending[execution_id] = count - 1

    def end(self, execution_id: str) -> int:
        """Note that all results of an id are there; return how many it has to get."""
        return self.pending.pop(execution_id)

    def checkpoint(
        self, waiting: Iterable[Unfinished], ready: Iterable[Any], *, now: float, learned: Any = None
    ) -> Checkpoint:
        """Return a checkpoint.

        Args:
            waiting: The ids that are pending.
            ready: The ids whose results the consumer has not got.
            now: Seconds since the epoch.
            learned: What was learned about durations.
        """
        counted = Counter(_plain_id(execution_id) for execution_id in ready)
        unread = Counter(_plain_id(execution_id) for execution_id in self.source.unread())
        entries = [
            *waiting,
            *(Unfinished(execution_id, count) for execution_id, count in counted.items()),
            *self.resumed,
            *(Unfinished(execution_id, count) for execution_id, count in unread.items()),
        ]
        taken = self._taken_before + self.source.accounted()
        return Checkpoint(CHECKPOINT_VERSION, taken, now, entries, learned)

    def unfinished(self) -> Iterator[Unfinished]:
        """Return the pending ids without ages."""
        return (Unfinished(_plain_id(execution_id), count) for execution_id, count in self.pending.items())


def _plain_id(execution_id: Any) -> _Id:
    """Return an id in JSON. A value that JSON cannot hold becomes None, because both are invalid ids."""
    if isinstance(execution_id, str):
        return str.__str__(execution_id)
    if isinstance(execution_id, float):
        return float(execution_id) if math.isfinite(execution_id) else None
    return cast("_Id", execution_id) if type(execution_id) in {int, bool} else None
