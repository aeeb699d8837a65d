"""The result of one id.

`Outcome` and `Change` are unions of two classes each, so that type checkers know after one test what is there:

    if outcome.error is None:
        print(outcome.execution.status)

    match outcome:
        case Found(execution=execution):
            print(execution.status)
        case LookupFailed(error=error):
            print(error)

An outcome describes the lookup, not the execution: an execution that failed was found, so its outcome is `ok`. Whether
the execution succeeded is in `outcome.execution.succeeded`.
"""

from typing import TYPE_CHECKING, Generic, Literal, NoReturn, TypeAlias, TypeVar, cast

import msgspec

from kaizen_async.errors import KaizenError

T = TypeVar("T")


class AnyOutcome(msgspec.Struct, Generic[T], frozen=True):
    """The end of one lookup or wait: a record, or the error in its place. There is exactly one for each input id.

    An outcome that stands for several equal ids in flight together is the same object for each of them.
    """

    id: str
    """The id as it was passed in."""
    execution: T | None
    """The record; None if the lookup failed."""
    error: KaizenError | None
    """Why the lookup failed; None if it did not."""
    attempts: int
    """HTTP requests sent for it, the first included. 0: nothing was sent."""
    elapsed: float
    """Seconds from the start of the lookup to this outcome: waiting for a slot, attempts and back-off."""
    request_id: str | None = None
    """The server's id of the request that decided, for its support. None if the server does not send one."""

    @property
    def ok(self) -> bool:
        """Whether there is a record. It says nothing about whether the execution succeeded."""
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


class Found(AnyOutcome[T], Generic[T], frozen=True, gc=False):
    """The outcome of a lookup that found the record, or of a wait that saw the execution end.

    The garbage collector does not track it, because it refers to nothing that refers back to it. (An error may, by its
    traceback.)
    """

    execution: T
    error: None

    if TYPE_CHECKING:

        @property
        def ok(self) -> Literal[True]: ...  # noqa: D102 - as above


class LookupFailed(AnyOutcome[T], Generic[T], frozen=True):
    """The outcome of a lookup or wait that failed."""

    execution: None
    error: KaizenError

    if TYPE_CHECKING:

        @property
        def ok(self) -> Literal[False]: ...  # noqa: D102 - as above
        def unwrap(self) -> NoReturn: ...  # noqa: D102 - as above


class AnyChange(msgspec.Struct, Generic[T], frozen=True):
    """A change of an execution that is watched, or the error that ended its watch."""

    id: str
    """The id as it was passed in."""
    before: T | None
    """The last record before this one; None if this is the first, or an error."""
    after: T | None
    """The record now; None if the watch of this id ended with an error."""
    error: KaizenError | None
    """Why the watch of this id ended before the execution did."""


class Seen(AnyChange[T], Generic[T], frozen=True):
    """A new state of an execution that is watched."""

    after: T
    error: None


class WatchFailed(AnyChange[T], Generic[T], frozen=True):
    """The end of a watch with an error."""

    before: None
    after: None
    error: KaizenError


if TYPE_CHECKING:
    Outcome: TypeAlias = Found[T] | LookupFailed[T]
    Change: TypeAlias = Seen[T] | WatchFailed[T]
else:
    # At run time they are the classes that the two have in common, so that isinstance works.
    Outcome = AnyOutcome
    Change = AnyChange
