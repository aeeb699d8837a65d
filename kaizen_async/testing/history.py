"""The requests that came in, for a test to check afterwards."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Final

_REMEMBERED: Final = 10_000
_BODY_KEPT: Final = 4096
_SHOWN: Final = 10
_MASK: Final = "***"
_SECRET_HEADERS: Final = frozenset({"authorization", "proxy-authorization", "x-api-key", "api-key", "cookie"})


class Request:
    """A request that came in.

    Attributes:
        path: Its path, without the emulator's prefix.
        kind: The last part of the path but one, such as `"executions"`; the whole path of what is not served.
        id: The execution that was asked for; empty if the request did not say.
        method: The HTTP method.
        body: The first 4,096 bytes of its body. Empty for a request that was refused for its key.
        at: When it came in, in seconds of the emulator's clock.
        time: When it came in, as a date and time.
        status: The status of the response; None as long as there is none, and if the connection was ended instead.
    """

    __slots__ = ("_headers", "_length", "_moment", "at", "body", "id", "method", "path", "status")

    def __init__(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        at: float,
        moment: Callable[[float], datetime],
        length: int | None = None,
    ) -> None:
        self.method = method
        self.path = path
        self._headers = headers
        self._length = length
        self.id = ""
        self.body = b""
        self.at = at
        self.status: int | None = None
        self._moment = moment

    @property
    def headers(self) -> Mapping[str, str]:
        """Its headers, keys and cookies masked."""
        # A client in this process sends the same headers with each request, except for the length of the body.
        length = self._length
        return self._headers if length is None else {**self._headers, "Content-Length": str(length)}

    @property
    def kind(self) -> str:
        """The kind of lookup, by its path."""
        parts = self.path.strip("/").split("/")
        return "_".join(parts[:-1]) if len(parts) > 1 and parts[-1] == "get" else self.path

    @property
    def time(self) -> datetime:
        """When it came in."""
        return self._moment(self.at)

    def note(self, execution_id: str, body: bytes) -> None:
        """Note the id that the request is for, and its body."""
        self.id, self.body = execution_id, body[:_BODY_KEPT]

    def __repr__(self) -> str:
        return f"<Request {self.method} {self.path} {self.id!r} {self.status or 'without a response'}>"


class History:
    """The latest requests, and the numbers of all.

    Attributes:
        requests: The latest 10,000.
        count: How many came in.
        by_id: How many for each id.
        statuses: How often each status was sent.
    """

    def __init__(self) -> None:
        self.requests: deque[Request] = deque(maxlen=_REMEMBERED)
        self.count = 0
        self.by_id: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()

    def note(self, request: Request) -> None:
        """Note that a request came in."""
        self.count += 1
        self.requests.append(request)

    def matching(self, execution_id: str | None, path: str | None) -> int:
        """Return how many requests there were for an id, on a path; None for any."""
        if path is None:
            return self.count if execution_id is None else self.by_id[execution_id]
        wanted = "/" + path.strip("/")
        return sum(request.path == wanted and execution_id in {None, request.id} for request in list(self.requests))

    def complaint(self, execution_id: str | None, path: str | None, times: int | None) -> str | None:
        """Return why there are not as many requests as a test expects, or None. Without `times`, one is enough."""
        seen = self.matching(execution_id, path)
        if seen == times or (times is None and seen):
            return None
        what = "requests" + (f" for {execution_id!r}" if execution_id is not None else "")
        what += f" to {path}" if path is not None else ""
        expected = "at least one" if times is None else f"{times}"
        return f"expected {expected} {what}, saw {seen}; the latest were: {_listed(self.requests)}"


def masked(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return headers without the keys and cookies in them; of a key, the scheme is kept."""
    return {name: _masked(value) if name.lower() in _SECRET_HEADERS else value for name, value in headers}


def _masked(value: str) -> str:
    scheme, space, _ = value.partition(" ")
    return f"{scheme} {_MASK}" if space and scheme.isalpha() else _MASK


def _listed(requests: Iterable[Request]) -> str:
    latest = list(requests)[-_SHOWN:]
    return ", ".join(f"{request.path} {request.id!r} -> {request.status}" for request in latest) or "none"
