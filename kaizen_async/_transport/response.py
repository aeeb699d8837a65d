"""One HTTP response, as the layers above read it."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import msgspec


class Answer(msgspec.Struct, frozen=True, gc=False):
    """A complete response: status, header fields (looked up without regard to case) and the unpacked body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Offer(NamedTuple):
    """A response that a server in this process would give at once, as an emulator in virtual time does."""

    answer: Answer
    take: Callable[[], None]
    """Sends the request that gets it. Until then the server knows of none."""
