"""No text that quotes the API key shows it, in any encoding."""

import base64
import html
import json
import urllib.parse
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaizen_async._transport.withhold import WITHHELD, Secret, SecretBytes, Withholder

KEY = "sk-live/4eC39HqL+yjWDarjtT1zdp7dc=&<'\">"

SPELLINGS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "JSON": lambda key: json.dumps(key)[1:-1],
    "JSON with escaped slashes": lambda key: json.dumps(key)[1:-1].replace("/", "\\/"),
    "JSON in JSON": lambda key: json.dumps(json.dumps(key))[3:-3],
    "JSON, every character escaped": lambda key: "".join(f"\\u{ord(char):04X}" for char in key),
    "a repr": lambda key: "".join(f"\\x{ord(char):02x}" for char in key),
    "HTML": html.escape,
    "HTML in HTML": lambda key: html.escape(html.escape(key)),
    "HTML, decimal": lambda key: "".join(f"&#{ord(char):03};" for char in key),
    "HTML, hexadecimal": lambda key: "".join(f"&#x{ord(char):X};" for char in key),
    "HTML, by names": lambda key: key.replace("/", "&sol;").replace("+", "&plus;").replace("=", "&equals;"),
    "a URL": lambda key: urllib.parse.quote(key, safe=""),
    "a URL in a URL": lambda key: urllib.parse.quote(urllib.parse.quote(key, safe=""), safe=""),
    "a URL, every character escaped": lambda key: "".join(f"%{ord(char):02x}" for char in key),
    "hexadecimal": lambda key: key.encode().hex().upper(),
}
BASE64 = {
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "base64 for URLs": lambda text: base64.urlsafe_b64encode(text.encode()).decode(),
    "base64 in a URL": lambda text: urllib.parse.quote(base64.b64encode(text.encode()).decode(), safe=""),
}


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_is_withheld(spell: Callable[[str], str]) -> None:
    """The key is replaced in every encoding, and the text around it stays unchanged."""
    said = f"the key {spell(KEY)}, twice: {spell(KEY)}."
    assert Withholder(KEY).text(said) == f"the key {WITHHELD}, twice: {WITHHELD}."
    assert Withholder(KEY).body(said.encode()) == f"the key {WITHHELD}, twice: {WITHHELD}.".encode()


@pytest.mark.parametrize("before", ["", ":", "ab", "Bearer "])
@pytest.mark.parametrize("encode", BASE64.values(), ids=BASE64)
def test_base64_is_withheld_wherever_the_key_stands_in_it(encode: Callable[[str], str], before: str) -> None:
    """In base64, only the characters before the key and a few bits at its ends remain."""
    left = Withholder(KEY).text(encode(before + KEY)).split(WITHHELD)
    assert len(left) == 2
    assert encode(before + "x").startswith(left[0])
    assert len(urllib.parse.unquote(left[1]).rstrip("=")) <= 1


@given(st.integers(0, len(KEY)), st.integers(0, len(KEY)), st.sampled_from(sorted(SPELLINGS)))
def test_a_part_of_the_key_is_withheld(start: int, end: int, spelling: str) -> None:
    """Eight or more consecutive characters of the key are replaced, because a message may contain a part of it."""
    shown = Withholder(KEY).text(f"{SPELLINGS[spelling](KEY[start:end])} …")
    assert shown.endswith(" …")
    assert (WITHHELD in shown) == (end - start >= 8)


@given(st.text(st.characters(codec="latin-1", exclude_characters="sk"), max_size=200))
def test_text_without_the_key_is_unchanged(said: str) -> None:
    """Text without the key is unchanged, also with escaped characters."""
    assert Withholder("sksksksksksk").text(said) == said
    assert Withholder("").text(said) == said


@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="\\%&*"), min_size=8))
def test_any_key_is_withheld(key: str) -> None:
    """Any key is replaced in plain text, JSON, HTML and URLs."""
    for spell in (str, lambda key: json.dumps(key)[1:-1], html.escape, urllib.parse.quote):
        assert Withholder(key).text(f"<{spell(key)}>") == f"<{WITHHELD}>"


@pytest.mark.parametrize("key", ["k", "key", "sk-test"])
def test_a_short_key_is_withheld_as_a_whole(key: str) -> None:
    """Only the whole of a short key is replaced, because its parts occur in many words."""
    assert Withholder(key).text(f"<{key}>") == f"<{WITHHELD}>"


def test_nothing_shows_the_key() -> None:
    """No repr shows the key, also in containers and slices."""
    secret, in_bytes = Secret(KEY), SecretBytes(KEY.encode())
    for shown in (secret, in_bytes, [secret], {"a": secret}, secret[:80], in_bytes[:80], Withholder(KEY)):
        assert KEY[:8] not in repr(shown)
    assert (secret, in_bytes) == (KEY, KEY.encode())
