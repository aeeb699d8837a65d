"""What is stored of ids and outcomes: parts of the input as shards, outcomes as compressed lines of JSON.

Every outcome has a number: the place of its id in the input, from 1. By it a reader recognises an outcome that comes
twice, whatever the ids are. Nothing here is pickled, and what is read back is checked like any other input.
"""

import hashlib
import zlib
from collections.abc import Iterator
from typing import Any, Final, Generic, TypeVar

import msgspec

from kaizen_async._ids import require_id
from kaizen_async.errors import KaizenError, StatusError, printable
from kaizen_async.outcomes import Outcome

T = TypeVar("T")

LEVEL: Final = 1
"""Of the compression: records of one kind repeat each other so much that more effort saves little."""
MOST_BYTES: Final = 64 * 1024 * 1024
"""Size of an unpacked shard or batch above which it is refused, so that a foreign one cannot fill the memory."""


class Shard(msgspec.Struct, frozen=True):
    """Part of the input.

    Attributes:
        ids: In the order of the input.
        start: Number of the first id, if the numbers are consecutive.
        numbers: The numbers of the ids, if they are not.
    """

    ids: list[str]
    start: int = 0
    numbers: list[int] | None = None

    def number(self, place: int) -> int:
        """Return the number of the id at a place."""
        return self.start + place if self.numbers is None else self.numbers[place]


class RecordedError(msgspec.Struct, frozen=True):
    """Why there is no record of an id."""

    type: str
    """Name of the error's class."""
    message: str
    status: int | None = None
    """HTTP status of the response, if it was one."""


class RunOutcome(msgspec.Struct, Generic[T], frozen=True, omit_defaults=True):
    """What became of one id of a run: a record, or the error that stands in its place."""

    number: int
    """Place of the id in the input, from 1. An outcome that is delivered twice has the same number both times."""
    id: str
    execution: T | None = None
    error: RecordedError | None = None

    @property
    def ok(self) -> bool:
        """Whether there is a record."""
        return self.error is None


_encode: Final = msgspec.json.Encoder().encode
_shard_decoder: Final = msgspec.json.Decoder(Shard)


def pack(content: bytes) -> bytes:
    """Compress."""
    return zlib.compress(content, LEVEL)


def unpack(packed: bytes, most: int = MOST_BYTES) -> bytes:
    """Return what was compressed.

    Raises:
        ValueError: That was not compressed content, or more than `most` bytes of it.
    """
    reader = zlib.decompressobj()
    try:
        content = reader.decompress(packed, most)
    except zlib.error as error:
        raise ValueError(f"not compressed content: {error}") from None
    if not reader.eof:
        raise ValueError("compressed content is cut off, or too large")
    return content


def pack_shard(shard: Shard) -> bytes:
    """Return a shard as it is stored."""
    return pack(_encode(shard))


def unpack_shard(packed: bytes, size: int) -> Shard:
    """Return a stored shard.

    Raises:
        ValueError: It is not one of that size.
    """
    shard = _shard_decoder.decode(unpack(packed))
    if len(shard.ids) != size or (shard.numbers is not None and len(shard.numbers) != size):
        raise ValueError(f"the shard does not hold {size} ids")
    for execution_id in shard.ids:
        require_id(execution_id)
    return shard


def line_of(number: int, outcome: Outcome[Any]) -> bytes:
    """Return an outcome as a line of JSON, without the line break."""
    if outcome.error is not None:
        return _encode(RunOutcome[None](number, outcome.id, None, _recorded(outcome.error)))
    raw = getattr(outcome.execution, "raw", b"")
    record = bytes(raw) if isinstance(raw, (bytes, msgspec.Raw)) else b""
    if not record:
        record = _encode(outcome.execution)
    elif b"\n" in record:
        record = msgspec.json.format(record, indent=-1)
    return b'{"number":%d,"id":%b,"execution":%b}' % (number, _encode(outcome.id), record)


def line_of_failure(number: int, execution_id: str, kind: str, message: str) -> bytes:
    """Return the line of an id that was not looked up at all."""
    return _encode(RunOutcome[None](number, execution_id, None, RecordedError(kind, message)))


def _recorded(error: KaizenError) -> RecordedError:
    status = error.status if isinstance(error, StatusError) else None
    return RecordedError(type(error).__name__, str(error), status)


class Part(msgspec.Struct, frozen=True):
    """A part of the input that is stored in one step."""

    before: int
    """Ids of the input before it."""
    count: int
    digest: str
    """Of all ids up to its end."""
    shard: Shard
    invalid: list[bytes]
    """Outcomes of its invalid ids."""


class Input:
    """Counts ids, digests them, and divides them into parts; invalid ones become outcomes.

    Args:
        size: Ids in a part.

    Attributes:
        count: Ids added so far.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self._size = size
        self._hash = hashlib.sha256()
        self.skip()

    @property
    def digest(self) -> str:
        """SHA-256 of all ids so far, each with its length."""
        return self._hash.hexdigest()

    def add(self, execution_id: object) -> bool:
        """Add an id; return whether a part is complete."""
        self.count += 1
        raw = _bytes_of(execution_id)
        self._given.append(execution_id)
        self._hash.update(b"%d:%b" % (len(raw), raw))
        try:
            self._valid.append(require_valid(execution_id, raw))
            self._numbers.append(self.count)
        except (TypeError, ValueError) as error:
            shown = printable(raw.decode(errors="backslashreplace"))
            self._invalid.append(line_of_failure(self.count, shown, type(error).__name__, str(error)))
        return self.count - self._before >= self._size

    def part(self) -> Part | None:
        """Return what was added since the last part ended; None if nothing was."""
        if self.count == self._before:
            return None
        numbers = self._numbers if self._invalid else None
        shard = Shard(self._valid, 0 if numbers else self._before + 1, numbers)
        return Part(self._before, self.count - self._before, self.digest, shard, self._invalid)

    def skip(self) -> None:
        """End a part: it is stored."""
        self._before, self._hash_before = self.count, self._hash.copy()
        self._given: list[object] = []
        self._valid: list[str] = []
        self._numbers: list[int] = []
        self._invalid: list[bytes] = []

    def skip_to(self, count: int) -> str:
        """End a part within this one, because that much is stored already; return the digest up to there."""
        given = self._given
        self.count, self._hash = self._before, self._hash_before
        self.skip()
        digest = self.digest
        for execution_id in given:
            self.add(execution_id)
            if self.count == count:
                digest = self.digest
                self.skip()
        return digest


def _bytes_of(execution_id: object) -> bytes:
    if isinstance(execution_id, bytes):
        return execution_id
    text = execution_id if isinstance(execution_id, str) else f"{execution_id!r:.80}"
    return text.encode(errors="surrogatepass")


def require_valid(execution_id: object, raw: bytes) -> str:
    """Return an id that can be looked up.

    Raises:
        TypeError, ValueError: It cannot.
    """
    if isinstance(execution_id, bytes):
        try:
            execution_id = raw.decode()
        except UnicodeDecodeError:
            raise ValueError("an execution id must be UTF-8") from None
    return require_id(execution_id)


def lines_of(batch: bytes) -> Iterator[bytes]:
    """Yield the lines of a stored batch of outcomes."""
    yield from unpack(batch).split(b"\n")
