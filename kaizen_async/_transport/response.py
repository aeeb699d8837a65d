"""One HTTP response, as the layers above read it."""

from collections.abc import Mapping
from typing import NamedTuple


class Answer(NamedTuple):
    """A complete response: status, header fields (looked up without regard to case) and the unpacked body."""

    status: int
    headers: Mapping[str, str]
    body: bytes
