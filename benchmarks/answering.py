"""A small raw asyncio server: `answering.py fast | throttling | failing | living`.

The executions of `living` tell by their ids how long they live: `2.5_x` ends 2.5 seconds after it was first asked for,
`never_x` never.

Prints its port and its event loop, then serves until it is ended. `GET /counters` tells what it was asked.
"""

import asyncio
import importlib
import importlib.util
import json
import re
import sys
import time
from collections import Counter
from typing import Final, cast

import data

BUCKET_RATE: Final = 100.0
"""Requests per second that the throttling server lets pass in the long run."""
BUCKET_BURST: Final = 20
"""Requests that it lets pass at once."""
LATENCY_SECONDS: Final = 0.005
"""How long the throttling and the failing server take to answer."""

_END: Final = b"\r\n\r\n"
_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_ID: Final = re.compile(rb'"id"\s*:\s*"([^"]+)"')
_ENDED: Final = re.compile(rb'"endTime":"[^"]*","durationMs":\d+')
_SIZE: Final = re.compile(rb"^POST /(\d+)kb/")


class Service:
    """Decides what a request gets."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.counted: Counter[str] = Counter()
        self._templates = {str(size).encode(): data.template(size) for size in data.SIZES}
        self._running = {
            size: (before, _ENDED.sub(b'"endTime":null,"durationMs":null', after))
            for size, (before, after) in self._templates.items()
        }
        self._first_asked: dict[bytes, float] = {}
        self._tokens = float(BUCKET_BURST)
        self._refilled = time.monotonic()

    def answer(self, head: bytes, body: bytes) -> tuple[bytes, float]:
        """Return the answer to a request, and the seconds after which it goes out."""
        if head.startswith(b"GET /counters"):
            return _answer(b"200 OK", json.dumps(self.counted).encode()), 0.0
        self.counted["requests"] += 1
        self.counted["bytes_received"] += len(head) + len(_END) + len(body)
        if self.mode == "failing":
            return _answer(b"503 Service Unavailable", b'{"message": "down"}'), LATENCY_SECONDS
        if self.mode == "throttling" and not self._take_token():
            self.counted["throttled"] += 1
            refusal = _answer(b"429 Too Many Requests", b'{"message": "slow down"}', b"Retry-After: 1\r\n")
            return refusal, LATENCY_SECONDS
        size, found = _SIZE.match(head), _ID.search(body)
        if size is None or found is None:
            return _answer(b"400 Bad Request", b'{"message": "not a look-up"}'), 0.0
        is_running = self.mode == "living" and not self._has_ended(found[1])
        before, after = (self._running if is_running else self._templates)[size[1]]
        record = before + found[1] + after
        return _answer(b"200 OK", record), LATENCY_SECONDS if self.mode == "throttling" else 0.0

    def _has_ended(self, execution_id: bytes) -> bool:
        seconds, _, _ = execution_id.partition(b"_")
        if seconds == b"never":
            return False
        now = time.monotonic()
        return now - self._first_asked.setdefault(execution_id, now) >= float(seconds)

    def _take_token(self) -> bool:
        now = time.monotonic()
        self._tokens = min(BUCKET_BURST, self._tokens + (now - self._refilled) * BUCKET_RATE)
        self._refilled = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


def _answer(status: bytes, body: bytes, headers: bytes = b"") -> bytes:
    return b"HTTP/1.1 %b\r\nContent-Type: application/json\r\n%bContent-Length: %d\r\n\r\n%b" % (
        status,
        headers,
        len(body),
        body,
    )


class Connection(asyncio.Protocol):
    """One keep-alive connection of HTTP/1.1: a request, its answer, the next request."""

    transport: asyncio.Transport

    def __init__(self, service: Service) -> None:
        self._service = service
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport to answer on."""
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, received: bytes) -> None:
        """Answer once the whole request is there."""
        self._received += received
        head, separator, rest = self._received.partition(_END)
        length = _LENGTH.search(head)
        wanted = int(length[1]) if length else 0
        if not separator or len(rest) < wanted:
            return
        self._received = rest[wanted:]
        answer, delay = self._service.answer(head, rest[:wanted])
        if delay:
            asyncio.get_running_loop().call_later(delay, self.transport.write, answer)
        else:
            self.transport.write(answer)


async def serve(mode: str) -> None:
    """Serve until ended."""
    service = Service(mode)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(service), "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], type(loop).__module__.partition(".")[0], flush=True)
    await server.serve_forever()


def main() -> None:
    """Run on uvloop where it is installed."""
    library = "uvloop" if importlib.util.find_spec("uvloop") else "asyncio"
    with asyncio.Runner(loop_factory=importlib.import_module(library).new_event_loop) as runner:
        runner.run(serve(sys.argv[1]))


if __name__ == "__main__":
    main()
