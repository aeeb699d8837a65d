"""One HTTP response, as the layers above read it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec


class Answer(msgspec.Struct, frozen=True, gc=False):
    """A complete response: status, header fields (looked up without regard to case) and the unpacked body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Inside(msgspec.Struct, gc=False):
    """A response of a server in this process, which it gives again until its record changes.

    Attributes:
        answer: The response.
        decoded: The kind of lookup that last decoded the body, and the record. The same body is decoded once.
    """

    answer: Answer
    decoded: tuple[object, Any] = (None, None)


class Offer(NamedTuple):
    """A response that a server in this process would give at once, as an emulator in virtual time does."""

    response: Inside
    take: Callable[[], None]
    """Sends the request that gets it. Until then the server knows of none."""
