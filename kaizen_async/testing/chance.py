"""Randomness that depends on its arguments alone: never on the order of arrival, the process or the moment."""

from hashlib import blake2b
from typing import Final

_DRAWN: Final = 2.0**53
"""As many different numbers as a float tells apart."""


def fraction(seed: int, *parts: str | int) -> float:
    """Return a number from 0 to below 1, always the same one for the same arguments, as if drawn evenly.

    Handy for lives that vary by id: `KaizenEmulator(default_life=lambda id: Life.lasting(60 * fraction(7, id)))`.
    """
    digest = blake2b(repr((seed, *parts)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / _DRAWN
