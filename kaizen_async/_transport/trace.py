"""What telemetry adds to a request, and what it learns about the connection.

A lookup that is observed puts a trace into its context just before it sends. Nobody else pays for it.
"""

import asyncio
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Final

from kaizen_async._transport.withhold import SecretBytes

_UNSAFE: Final = frozenset(map(chr, (*range(0x20), 0x7F)))


class RequestTrace:
    """One request that is observed.

    Attributes:
        headers: Headers to send beside the client's own.
        status: The status of the response, once it is known, also if the response breaks off later.
        peer: Address and port of the other end of the connection.
    """

    __slots__ = ("headers", "peer", "status")

    def __init__(self, headers: Mapping[str, str]) -> None:
        self.headers = headers
        self.status: int | None = None
        self.peer: tuple[str, int] | None = None

    def note(self, status: int | None, transport: asyncio.BaseTransport | None) -> None:
        """Note the status of the response, if its head was read, and the other end of the connection."""
        self.status = status
        peer: Any = None if transport is None else transport.get_extra_info("peername")
        match peer:
            case (str(address), int(port), *_):
                self.peer = address, port
            case _:  # of a Unix socket it is a path
                pass

    def put_into(self, head: SecretBytes) -> SecretBytes:
        """Return the head of a request with the headers before its last line, which is not complete yet."""
        start, _, last = map(SecretBytes, head.rpartition(b"\r\n"))
        lines = "".join(f"\r\n{name}: {value}" for name, value in self.headers.items()).encode("latin-1", "replace")
        return SecretBytes(b"%b%b\r\n%b" % (start, lines, last))


current_trace: ContextVar[RequestTrace | None] = ContextVar("kaizen_async_trace", default=None)


def trace_of(headers: Mapping[str, str]) -> RequestTrace:
    """Return the trace of a request with headers. Those that could end a line are left out."""
    return RequestTrace({name: value for name, value in headers.items() if not _UNSAFE & {*name, *value}})


def begin_trace(headers: Mapping[str, str]) -> RequestTrace:
    """Have the next request of this context traced."""
    trace = trace_of(headers)
    current_trace.set(trace)
    return trace
