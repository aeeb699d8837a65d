"""Keeps the API key out of every foreign text: of a server, a proxy or a session.

A server may repeat the key that it was sent, whole or cut off, and escape it as its framework does. So a text is
searched for parts of the key, in every spelling below, and none of them is shown.
"""

import base64
import re
import string
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from html.entities import html5
from typing import Any, Final, SupportsIndex
from weakref import WeakSet

WITHHELD: Final = "***"
"""Stands where the API key would."""

_TELLING: Final = 8
"""Characters of a key in a row that are not shown. Fewer, as in a key that a message cuts off, do no harm."""

_ENTITIES: Final = {name.lower().rstrip(";"): char for name, char in html5.items() if len(char) == 1 and char.isascii()}
_ESCAPED: Final = re.compile(
    r"\\{1,8}u00(?P<json>[0-9a-f]{2})"  # JSON, also JSON within JSON
    r"|\\{1,8}x(?P<repr>[0-9a-f]{2})"  # a repr
    r"|\\{1,8}(?P<char>[^\\])"  # any character behind a backslash: JSON allows it for a slash
    r"|%(?:25){0,4}(?P<url>[0-9a-f]{2})"  # a URL, also a URL within a URL
    r"|&(?:amp;){0,4}#x0*(?P<hex>[0-9a-f]{1,2});?"  # HTML, also HTML within HTML
    r"|&(?:amp;){0,4}#0*(?P<decimal>[0-9]{1,3});?"
    rf"|&(?:amp;){{0,4}}(?P<entity>{'|'.join(sorted(_ENTITIES, reverse=True))});",
    re.IGNORECASE,
)
_HEXADECIMAL: Final = {"json", "repr", "url", "hex"}
_URL_ALPHABET: Final = str.maketrans("-_", "+/")
_FOR_URLS: Final = str.maketrans("+/", "-_")
_LOWER: Final = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
_BLOCK: Final = 4
"""Characters of the blocks that a secret is divided into. A text without any of them shows no part that tells."""

_alive: Final[WeakSet["Withholder"]] = WeakSet()
_lock: Final = threading.Lock()
"""Guards `_alive`, because clients live in any thread."""


class Secret(str):
    """A string that does its work in a header. Its repr does not show it, nor do slices: debuggers cut long strings."""

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(WITHHELD)

    def __getitem__(self, _: SupportsIndex | slice) -> str:
        return WITHHELD


class SecretBytes(bytes):
    """The same for bytes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(WITHHELD)

    def __getitem__(self, _: SupportsIndex | slice) -> Any:
        return WITHHELD


class Withholder:
    """Replaces what a text shows of a secret. It shows nothing of the secret itself, in no repr and no `vars`.

    Args:
        secret: What must not be shown; empty for nothing.
    """

    __slots__ = ("__weakref__", "_blocks", "_encoded", "_plain")

    def __init__(self, secret: str) -> None:
        self._plain = {text.translate(_LOWER) for text in (secret, _unescaped(secret)[0]) if text}
        self._encoded = [] if len(secret) < _TELLING else _encodings(secret.encode())
        spellings = [*self._plain, *(encoded.translate(_LOWER) for encoded, _, _ in self._encoded)]
        self._blocks = {
            block
            for spelling in spellings
            for start in range(0, max(len(spelling) - _BLOCK, 0) + 1, _BLOCK)
            for block in (spelling[start : start + _BLOCK], spelling[start : start + _BLOCK].translate(_FOR_URLS))
        }
        with _lock:
            _alive.add(self)

    def __repr__(self) -> str:
        return f"<Withholder {WITHHELD}>"

    def text(self, said: str) -> str:
        """Return a text without the secret. Give it no more than will be shown: it takes time for each character."""
        if not self._plain:
            return said
        shown: list[str] = []
        shown_to = 0
        for start, end in sorted(self._places(said)):
            if start > shown_to or not shown:
                shown += [said[shown_to:start], WITHHELD]
            shown_to = max(shown_to, end)
        return "".join([*shown, said[shown_to:]])

    def stands_in(self, said: str) -> bool:
        """Return whether a text shows the secret. It is quick, for what every response brings."""
        lower = said.lower()
        has_block = bool([block for block in self._blocks if block in lower])
        is_escaped = "\\" in said or "%" in said or "&" in said
        return (has_block or is_escaped) and self.text(said) != said

    def body(self, said: bytes) -> bytes:
        """Return bytes without the secret."""
        return self.text(said.decode("latin-1")).encode("latin-1")

    def _places(self, said: str) -> Iterator[tuple[int, int]]:
        """Return the starts and ends of what shows the secret."""
        unescaped, place = _unescaped(said)
        as_said, as_meant = said.translate(_LOWER), unescaped.translate(_LOWER)
        for secret in self._plain:
            yield from _parts(as_said, secret, _TELLING)
            for start, end in _parts(as_meant, secret, _TELLING):
                yield place(start), place(end)
        for secret, telling, alphabet in self._encoded:
            for start, end in _parts(unescaped.translate(alphabet), secret, telling):
                yield place(start), place(end)


def shows_a_secret(said: str) -> bool:
    """Return whether a text shows a secret of any client of this process."""
    with _lock:
        withholders = list(_alive)
    return any(withholder.stands_in(said) for withholder in withholders)


def _encodings(secret: bytes) -> list[tuple[str, int, dict[int, int]]]:
    """Return what base64 and hexadecimal make of a secret, how much of it tells, and how to read their alphabets.

    The characters of base64 depend on where the secret begins, in one of three ways. Those at its ends, which depend on
    what stands before and after it too, are left out.
    """
    encodings = [(secret.hex(), 2 * _TELLING, _LOWER)]
    for before in range(3):
        encoded = base64.b64encode(bytes(before) + secret).decode()
        own = encoded[-(-before * 4 // 3) : (before + len(secret)) * 4 // 3]
        encodings.append((own, _TELLING * 4 // 3, _URL_ALPHABET))
    return encodings


def _parts(said: str, secret: str, telling: int) -> Iterator[tuple[int, int]]:
    """Return where a text holds so many characters of a secret in a row, or all of them.

    Every such part has a whole block in it, out of those that the secret is divided into. Those are quick to find.
    """
    telling = min(telling, len(secret))
    size = (telling + 1) // 2
    for block in range(0, len(secret) - size + 1, size):
        found = said.find(secret[block : block + size])
        while found >= 0:
            start, end, left, right = found, found + size, block, block + size
            while start and left and said[start - 1] == secret[left - 1]:
                start, left = start - 1, left - 1
            while end < len(said) and right < len(secret) and said[end] == secret[right]:
                end, right = end + 1, right + 1
            if end - start >= telling:
                yield start, end
            found = said.find(secret[block : block + size], end)


def _unescaped(said: str) -> tuple[str, Callable[[int], int]]:
    """Return a text with its escaped characters read, and a function that tells where a place in it was before."""
    plain: list[str] = []
    length = read_to = 0
    starts, origins = [0], [0]
    for escape in _ESCAPED.finditer(said):
        name = str(escape.lastgroup)
        written = escape[name]
        plain += [said[read_to : escape.start()], _meaning(name, written)]
        length += escape.start() - read_to
        read_to = escape.end()
        starts += [length, length + 1]
        origins += [escape.start(), read_to]
        length += 1

    def origin(place: int) -> int:
        piece = bisect_right(starts, place) - 1
        return origins[piece] + place - starts[piece]

    return "".join([*plain, said[read_to:]]), origin


def _meaning(name: str, written: str) -> str:
    if name in _HEXADECIMAL:
        return chr(int(written, 16))
    if name == "decimal":
        return chr(int(written))
    return _ENTITIES[written.lower()] if name == "entity" else written
