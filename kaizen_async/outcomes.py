"""What becomes of one id."""

from typing import Generic, TypeVar, cast

import msgspec

from kaizen_async.errors import KaizenError

T = TypeVar("T")


class Outcome(msgspec.Struct, Generic[T], frozen=True):
    """The end of one look-up or wait: a record, or the error that stands in its place. Exactly one for each input id.

    An outcome that stands for several equal ids in flight together is the same object for each of them.
    """

    id: str
    """The id as it was passed in."""
    execution: T | None
    """The record; None if the look-up failed."""
    error: KaizenError | None
    """Why it failed; None if it did not."""
    attempts: int
    """HTTP requests sent for it, the first included. 0: nothing was sent."""
    elapsed: float
    """Seconds from the start of the look-up to this outcome: waiting for a slot, attempts and back-off."""

    @property
    def ok(self) -> bool:
        """Whether there is a record."""
        return self.error is None

    def unwrap(self) -> T:
        """Return the record, or raise the error."""
        if self.error is not None:
            try:
                raise self.error
            finally:
                # The traceback keeps this frame: without this, an error would keep itself alive.
                del self
        return cast("T", self.execution)


class Change(msgspec.Struct, Generic[T], frozen=True):
    """A change of an execution that is watched, or the error that ended the watch of it."""

    id: str
    """The id as it was passed in."""
    before: T | None
    """The last record before this one; None if this is the first, or an error."""
    after: T | None
    """The record now; None if the watch of this id ended with an error."""
    error: KaizenError | None
    """Why the watch of this id ended before the execution did."""
