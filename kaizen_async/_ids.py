"""The sources of the ids of a call: how each kind of source is read, and which ids are valid.

- A **collection** (list, set, dict, deque, key view, array, …) is copied when the call is made. Later changes of
  it have no effect.
- A source with a length that can be read only once (`tqdm`, a progress bar) is read once, through one iterator. It has
  an end, so it is read to its end even after a deadline.
- Any other source (a generator, an asynchronous iterable) may be endless. It is read as outcomes are consumed.
  After a deadline, and after the client was closed, it is not read any further.

If the source raises, `IdSource.error` keeps the exception for the consumer.
"""

import asyncio
import math
import unicodedata
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    MappingView,
    Sequence,
    Sized,
)
from collections.abc import (
    Set as AbstractSet,
)
from itertools import islice
from operator import length_hint
from typing import Any, Final, TypeAlias, cast

from kaizen_async.clock import Clock, Timeout
from kaizen_async.errors import ClientClosedError, InvalidIdError

Ids: TypeAlias = Iterable[str] | AsyncIterable[str]

SLOW_SOURCE: Final = 0.002
"""Seconds for which a source may block the event loop per id before the loop gets turns of its own between two ids."""
TURNS_BETWEEN: Final = 5
"""Steps of the event loop between two ids of a source that blocks it: enough to hand a response to its consumer."""

_INVISIBLE: Final = frozenset({"Cc", "Cf", "Zl", "Zp", "Zs"})
_CONTROL: Final = frozenset({"Cc", "Zl", "Zp"})
_NOT_ONE_ID: Final = (str, bytes, bytearray, memoryview)


def require_id(execution_id: object) -> str:
    """Return an id that can be sent, as a plain `str`.

    Raises:
        TypeError: Not a string.
        ValueError: Empty, surrounded by white space, with a control character in it, or not valid Unicode.
    """
    problem = _problem_of(execution_id)
    if problem:
        raise ValueError(problem) if isinstance(execution_id, str) else TypeError(problem)
    # Subclasses (numpy.str_, Markup, a StrEnum) are strings. Encoders and dicts treat only an exact str as one.
    return str.__str__(cast("str", execution_id))


def _problem_of(execution_id: object) -> str:
    """Return why an id cannot be sent, or an empty text."""
    if not isinstance(execution_id, str):
        return f"an execution id must be a str, not {type(execution_id).__name__}: {execution_id!r:.80}"
    if not execution_id:
        return "an execution id must not be empty; leave blank lines out of the ids"
    if str.isprintable(execution_id) and execution_id[0] != " " != execution_id[-1]:  # the only space that is printable
        return ""
    return _problem_of_text(str.__str__(execution_id))


def _problem_of_text(text: str) -> str:
    for position, char in enumerate(text):
        if unicodedata.category(char) == "Cs":
            return f"an execution id must be valid Unicode: {text!r:.80} (character {position})"
    for position, place in ((0, "begin"), (len(text) - 1, "end")):
        if unicodedata.category(text[position]) in _INVISIBLE:
            return (
                f"an execution id must not {place} with white space or an invisible character: "
                f"{text!r:.80} (character {position}); pass line.strip() if the ids are lines of a file"
            )
    for position, char in enumerate(text):
        if unicodedata.category(char) in _CONTROL:
            return (
                f"an execution id must not contain a line break or another control character: "
                f"{text!r:.80} (character {position}); split the text, and pass line.strip() for each line"
            )
    return ""


class InvalidId:
    """An id that cannot be sent.

    Attributes:
        id: The value that the caller passed.
        error: Why it cannot be sent, with its position among the ids.
    """

    __slots__ = ("error", "id")

    def __init__(self, execution_id: Any, problem: str, position: int | None) -> None:
        self.id = execution_id
        place = "" if position is None else f"; it is at position {position} of the ids, counted from 0"
        named = str.__str__(execution_id) if isinstance(execution_id, str) else f"{execution_id!r:.80}"
        self.error = InvalidIdError(problem + place, position=position, execution_id=named)


def checked(execution_id: Any, position: int | None = None) -> str | InvalidId:
    """Return an id that can be sent, as a plain `str`, or why it cannot be."""
    problem = _problem_of(execution_id)
    return InvalidId(execution_id, problem, position) if problem else str.__str__(execution_id)


def require_ids(ids: object) -> None:
    """Refuse anything but a source of ids, especially a single string: its characters would be used as ids."""
    if isinstance(ids, _NOT_ONE_ID):
        raise TypeError(
            f"ids must be an iterable of ids, not one {type(cast('object', ids)).__name__}; pass [id], or use get(id)"
        )
    if not isinstance(ids, (Iterable, AsyncIterable)):
        raise TypeError(f"ids must be an iterable or asynchronous iterable of ids, not {type(ids).__name__}")


def _copy_of_collection(ids: Iterable[str], iterator: Iterator[str]) -> list[str] | None:
    """Return the ids of a collection; None for a source that can be read only once.

    Collections are recognized by their type, or by an iterator that knows how many items are left, as those of the
    builtin collections do. A length alone is no sign: `tqdm` has one, and reads its own source step by step.
    """
    if iterator is ids:
        return None
    is_collection = isinstance(ids, (Sequence, AbstractSet, Mapping, MappingView)) or hasattr(type(ids), "__getitem__")
    if is_collection or _knows_its_length(iterator):
        return list(iterator)
    return None


def _knows_its_length(iterator: Iterator[str]) -> bool:
    return hasattr(type(iterator), "__length_hint__") and length_hint(iterator, -1) >= 0


def _length_of(ids: object) -> int | None:
    try:
        return len(ids) if isinstance(ids, Sized) else None
    except TypeError:  # tqdm over a generator: it has `__len__`, and no length
        return None


class IdSource:
    """Hands the ids of one call to its workers, one at a time.

    Args:
        ids: What the caller passed in.
        closed: Returns whether the client was closed.
        late: Returns whether the call's deadline has passed.
        wait: Bounds a wait by the call's deadline and the closing of the client; raises TimeoutError then.
        clock: Measures how long the source blocks the event loop.

    Attributes:
        error: What the source raised, or that the client was closed before the source ended. It is for the consumer.
        taken: Ids handed out so far.
        total: How many ids there are, if that is known.
        late: The argument; a call may get more time.
        must_wait: Whether its next id has to be waited for: it is asynchronous, or it blocks the event loop.
    """

    def __init__(
        self,
        ids: Ids,
        *,
        closed: Callable[[], bool],
        late: Callable[[], bool],
        wait: Callable[[Awaitable[Any]], Awaitable[Any]],
        clock: Clock,
    ) -> None:
        self.error: BaseException | None = None
        self.taken = 0
        self.total: int | None = None
        self.must_wait = False
        self._closed = closed
        self.late = late
        self._wait = wait
        self._clock = clock
        self._lock = asyncio.Lock()
        self._pulling: Timeout | None = None
        self._exhausted = False
        # A tuple of strings, because the garbage collector does not visit it. A deque of a million ids takes it 20 ms.
        self._copy: tuple[str, ...] | None = None
        self._later: AsyncIterator[str] | None = None
        self._iterator: Iterator[str] = iter(())
        if isinstance(ids, AsyncIterable):
            self._later = aiter(ids)
            self.must_wait = True
        else:
            self._iterator = iter(ids)
            copied = _copy_of_collection(ids, self._iterator)
            if copied is None:
                self.total = _length_of(ids)
            else:
                self.total = len(copied)
                self._copy = tuple(copied)

    @property
    def has_an_end(self) -> bool:
        """Whether the source is read to its end even if nothing can be looked up any more."""
        return self.total is not None and self._later is None

    def unread(self) -> Iterator[str]:
        """Return the ids that are still in the copy of a collection. Reading any other source would use it up."""
        return iter(()) if self._copy is None else islice(self._copy, self.taken, None)

    def accounted(self) -> int:
        """Return how many ids of the source, from its beginning, were handed out or are in `unread`."""
        return self.taken if self._copy is None else max(self.taken, len(self._copy))

    def take_all(self) -> "list[str | InvalidId] | None":
        """Return all ids of a collection; None for another source, which `take` reads."""
        if self._copy is None or self._exhausted:
            return None
        copy, self._copy = self._copy, ()
        return [self._checked(execution_id) for execution_id in copy]

    async def take(self) -> "str | InvalidId | None":
        """Return the next id; None at the end, after an error, and when nothing can be looked up any more."""
        if not self.must_wait:
            return self.take_now()
        async with self._lock:
            if self._later is not None:
                return await self._take_later(self._later)
            # Without these turns, no request would be sent until the slow source has given ids to all workers.
            for _ in range(TURNS_BETWEEN):
                await asyncio.sleep(0)
            return self.take_now()

    def stop(self) -> None:
        """Hand out nothing more of a source that may be endless, and end the wait for its next id."""
        if not self.has_an_end:
            self._exhausted = True
            if self._pulling is not None:
                self._pulling.expire()

    def fail(self, error: BaseException) -> None:
        """Hand out nothing more, because of an error. The first error counts."""
        self.error = self.error or error
        self._exhausted = True

    def take_now(self) -> "str | InvalidId | None":
        """Do what `take` does, for a source that need not be waited for: see `must_wait`."""
        if self._exhausted or (not self.has_an_end and self._is_cut_off()):
            return None
        if self._copy is not None:
            if self.taken < len(self._copy):
                return self._checked(self._copy[self.taken])
            self._exhausted, self._copy = True, ()
            return None
        if self.total is not None and self.taken >= self.total and (self._closed() or self.late()):
            self._exhausted = True  # by its own word; an estimated length must not keep a cut-off call going
            return None
        return self._read()

    def _read(self) -> "str | InvalidId | None":
        began = self._clock.time()
        try:
            return self._checked(next(self._iterator))
        except StopIteration:
            self._end()
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the caller's, and is raised to the caller
            self.fail(_raisable(error))
        finally:
            self.must_wait = self._clock.time() - began > SLOW_SOURCE
        return None

    async def _take_later(self, iterator: AsyncIterator[str]) -> "str | InvalidId | None":
        if self._exhausted or self._is_cut_off():
            return None
        self._pulling = Timeout(self._clock, math.inf)
        try:
            async with self._pulling:
                taken: str | InvalidId | None = await self._wait(self._pull(iterator))
                return taken
        except TimeoutError:
            self._is_cut_off()
            self._exhausted = True
            return None
        finally:
            self._pulling = None

    async def _pull(self, iterator: AsyncIterator[str]) -> "str | InvalidId | None":
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        cancellations = task.cancelling()
        try:
            execution_id: Any = await anext(iterator)
        except StopAsyncIteration:
            self._end()
            return None
        except BaseException as error:
            # A source that something else has cancelled (its own queue reader, say) raises CancelledError, too. The
            # counter of the task shows whether this task was cancelled.
            if isinstance(error, asyncio.CancelledError) and task.cancelling() > cancellations:
                raise
            self.fail(_raisable(error))
            return None
        if task.cancelling() > cancellations:
            raise asyncio.CancelledError  # the source has swallowed it; the id is lost with the call
        return self._checked(execution_id)

    def _end(self) -> None:
        self._exhausted = True
        self.total = self.taken

    def _checked(self, execution_id: Any) -> "str | InvalidId":
        self.taken += 1
        return checked(execution_id, self.taken - 1)

    def _is_cut_off(self) -> bool:
        if self._closed():
            self.fail(ClientClosedError("the client was closed before all ids were taken"))
        return self._exhausted or self.late()


def _raisable(error: BaseException) -> BaseException:
    """Return an error that can be raised to the consumer without being misunderstood.

    A loop understands StopAsyncIteration as the end of the stream, a task understands CancelledError as its own
    cancellation, and an asynchronous generator understands GeneratorExit as its own closing.
    """
    if isinstance(error, (asyncio.CancelledError, GeneratorExit, StopIteration, StopAsyncIteration)):
        wrapped = RuntimeError(f"the source of the ids raised {type(error).__name__}")
        wrapped.__cause__ = error
        return wrapped
    return error
