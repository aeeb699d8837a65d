"""Finds what a server, or a gateway before it, calls a request: its support asks for that."""

import re
from collections.abc import Iterable, Mapping
from typing import Final

from kaizen_async._transport.head import Head
from kaizen_async.errors import MESSAGE_LIMIT, printable

REQUEST_ID_HEADERS: Final = (
    "x-request-id",
    "request-id",
    "x-amzn-requestid",
    "x-amzn-trace-id",
    "x-correlation-id",
    "cf-ray",
)
"""Header fields that name a request. The first of them that is there counts."""

_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


class RequestIds:
    """Reads the id of a request from the header fields of its response.

    Args:
        names: The fields that may hold it, the most telling first.

    Raises:
        TypeError, ValueError: These are not names of header fields.
    """

    def __init__(self, names: Iterable[str] = REQUEST_ID_HEADERS) -> None:
        if isinstance(names, str):
            raise TypeError(f"request_id_headers must be several names, such as ({names!r},), not one str")
        self._names = tuple(names)
        for name in self._names:
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise ValueError(f"request_id_headers must be names of header fields, and {name!r:.80} is not")
        alternatives = b"|".join(re.escape(name.encode()) for name in self._names)
        # Every response is searched, so its head is not taken apart for that.
        self._field = re.compile(rb"\r\n(%b):" % (alternatives or b"(?!)"), re.IGNORECASE)

    def of(self, headers: Mapping[str, str]) -> str | None:
        """Return the id of a request; None if its response does not tell."""
        if isinstance(headers, Head) and self._field.search(headers.head) is None:
            headers.searched_by = self
            return None
        for name in self._names:
            text = headers.get(name, "").strip()
            if text:
                return printable(text, MESSAGE_LIMIT)
        return None
