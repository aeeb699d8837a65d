"""The head of a common HTTP response, read strictly. What is not common is left to aiohttp's parser.

Only the Date and a few other fields differ between two responses of one server. So the meaning of each line is
remembered, and reading a head is a lookup per line.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Final

CHUNKED: Final = -1
"""In place of a length: the body comes in chunks."""

_MOST_LENGTH_DIGITS: Final = 9
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.1 ([2-5][0-9]{2})(?: [\t\x20-\x7e\x80-\xff]*)?")
_INTERIM_LINE: Final = re.compile(rb"HTTP/1\.1 1(?!01)[0-9]{2}(?: [\t\x20-\x7e\x80-\xff]*)?")
_FIELD_LINE: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t\x20-\x7e\x80-\xff]*)")
_LENGTH: Final = re.compile(rb"[0-9]{1,%d}" % _MOST_LENGTH_DIGITS)
_WITHOUT_BODY: Final = frozenset({204, 304})

# What a line means, where it is not the length of the body.
_PLAIN: Final = -1
_UNCOMMON: Final = -2
_CHUNKED_BODY: Final = -3
_CODINGS: Final = {b"gzip": -4, b"x-gzip": -4, b"br": -5, b"zstd": -6, b"deflate": -7}
_CODING_NAMES: Final = {-4: "gzip", -5: "br", -6: "zstd", -7: "deflate"}
_UNCOMMON_FIELDS: Final = frozenset({b"upgrade", b"trailer"})

_MOST_REMEMBERED: Final = 1024
_LONGEST_REMEMBERED: Final = 256
_meanings: Final[dict[bytes, int]] = {}
_statuses: Final[dict[bytes, int]] = {}

_MOST_HEADS: Final = 256
_LONGEST_HEAD: Final = 1024
"""Heads that are remembered, and their bytes at most. Responses of one second and one length often have equal heads."""


class Head(Mapping[str, str]):
    """A common head: what it says about the body, and its fields, which are read only when somebody asks for one.

    Field names are looked up without regard to case.

    Attributes:
        head: Its bytes.
        status: The status of the response.
        length: Of the body in bytes; or CHUNKED.
        coding: The content coding of the body; "" for none.
        searched_by: Who has searched the fields and found nothing. Equal heads need not be searched again.
    """

    __slots__ = ("_fields", "coding", "head", "length", "searched_by", "status")

    def __init__(self, head: bytes, status: int, length: int, coding: str) -> None:
        self.head = head
        self.status = status
        self.length = length
        self.coding = coding
        self.searched_by: object = None
        self._fields: dict[str, str] | None = None

    def _read(self) -> dict[str, str]:
        if self._fields is None:
            self._fields = {}
            for line in self.head.split(b"\r\n")[1:]:
                name, _, value = line.partition(b":")
                # As aiohttp decodes them, so that a text is the same whichever parser read it.
                text = value.strip().decode("utf-8", "surrogateescape")
                self._fields.setdefault(name.decode("latin-1").lower(), text)
        return self._fields

    def __getitem__(self, name: str) -> str:
        return self._read()[name.lower()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())


_heads: Final[dict[bytes, Head]] = {}


def parse_head(head: bytes, most_lines: int) -> Head | None:
    """Return a head, or None if it is not common.

    Args:
        head: The bytes before the empty line that ends a head.
        most_lines: Header fields above which a head is not common.
    """
    if head.count(b"\r\n") > most_lines:
        return None
    parsed = _heads.get(head)
    if parsed is None:
        parsed = _parse(head)
        if parsed is not None and len(head) <= _LONGEST_HEAD:
            if len(_heads) >= _MOST_HEADS:
                _heads.clear()
            _heads[head] = parsed
    return parsed


def _parse(head: bytes) -> Head | None:  # noqa: C901 - flat, since many responses have heads of their own
    lines = head.split(b"\r\n")
    status_line = lines[0]
    status = _statuses.get(status_line) or _read_status(status_line)
    if status == _UNCOMMON:
        return None
    length = _PLAIN
    coding = ""
    chunked = False
    del lines[0]
    for line in lines:
        meaning = _meanings.get(line)
        if meaning is None:
            meaning = _read_field(line)
        if meaning == _PLAIN:
            continue
        if meaning >= 0:
            if length >= 0:
                return None
            length = meaning
        elif meaning == _CHUNKED_BODY:
            if chunked:
                return None
            chunked = True
        elif meaning == _UNCOMMON or coding:
            return None
        else:
            coding = _CODING_NAMES[meaning]
    if chunked == (length >= 0):
        return None
    return Head(head, status, CHUNKED if chunked else length, coding)


def is_plain_interim(lines: list[bytes]) -> bool:
    """Return whether the complete lines of a head are those of an interim response that can be dropped."""
    return not lines or (
        _INTERIM_LINE.fullmatch(lines[0]) is not None and all(_read_field(line) == _PLAIN for line in lines[1:])
    )


def _read_status(line: bytes) -> int:
    match = _STATUS_LINE.fullmatch(line)
    status = int(match[1]) if match else _UNCOMMON
    if status in _WITHOUT_BODY:
        status = _UNCOMMON
    return _remember(_statuses, line, status)


def _read_field(line: bytes) -> int:
    return _remember(_meanings, line, _meaning(line))


def _meaning(line: bytes) -> int:
    field = _FIELD_LINE.fullmatch(line)
    if field is None:
        return _UNCOMMON
    name, value = field[1].lower(), field[2].strip(b" ").lower()  # a tab makes aiohttp's parser read some differently
    if name == b"content-length":
        return int(value) if _LENGTH.fullmatch(value) else _UNCOMMON
    if name == b"connection":
        return _PLAIN if value == b"keep-alive" else _UNCOMMON
    if name == b"transfer-encoding":
        return _CHUNKED_BODY if value == b"chunked" else _UNCOMMON
    if name == b"content-encoding":
        return _CODINGS.get(value, _UNCOMMON)
    return _UNCOMMON if name in _UNCOMMON_FIELDS else _PLAIN


def _remember(known: dict[bytes, int], line: bytes, meaning: int) -> int:
    if len(line) <= _LONGEST_REMEMBERED:
        if len(known) >= _MOST_REMEMBERED:
            known.clear()
        known[line] = meaning
    return meaning
