"""A small raw asyncio server: `answering.py fast | throttling | failing | living | tail`, or one of `FAULTS`.

With `living`, an id says how long its execution lives: `2.5_x` ends 2.5 seconds after the first request for it, and
`never_x` never ends.

It prints its port and its event loop, and then serves until it is killed. `GET /counters` returns its counters.
"""

import asyncio
import importlib
import importlib.util
import json
import random
import re
import sys
import time
from collections import Counter, deque
from typing import Final, cast

import data

BUCKET_RATE: Final = 100.0
"""Requests per second that the throttling server lets pass in the long run."""
BUCKET_BURST: Final = 20
"""Requests that it lets pass at once."""
LATENCY_SECONDS: Final = 0.005
"""How long the throttling and the failing server take to answer."""
FAULTS: Final = {
    "restart": "Connections are refused for 3 seconds, from 0.3 seconds after the first request on.",
    "outage": "Everything is answered 502 for 3 seconds, from 0.3 seconds after the first request on.",
    "partial": "A third of all requests, at random, is answered 500.",
    "limit503": "50 requests a second pass, 10 at once; others get 503 without Retry-After, as from nginx.",
    "random429": "A fifth of all requests, at random, is answered 429, at any rate.",
    "concurrency-limit": "Ten requests are served at a time, each in 50 ms; others get 429.",
    "limit1000": "1,000 requests a second pass, 200 at once; others get 429 with `Retry-After: 1`.",
}
"""What the servers do that are at fault."""
TAIL_SECONDS: Final = 0.02
"""How long most responses of `tail` take."""
SLOW_SHARE: Final = 0.03
SLOW_FACTOR: Final = 20
"""Share of the responses of `tail` that are slow, and how many times as long they take."""
OUTAGE: Final = (0.3, 3.3)
"""Seconds after the first request between which the server is down."""
SERVED_AT_ONCE: Final = 10
SERVICE_SECONDS: Final = 0.05
"""Of the server with a limit of concurrency."""
_BUCKETS: Final = {"throttling": (BUCKET_RATE, BUCKET_BURST), "limit503": (50.0, 10), "limit1000": (1000.0, 200)}

_END: Final = b"\r\n\r\n"
_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_ID: Final = re.compile(rb'"id"\s*:\s*"([^"]+)"')
_ENDED: Final = re.compile(rb'"endTime":"[^"]*","durationMs":\d+')
_SIZE: Final = re.compile(rb"^POST /(\d+)kb/")


class Service:
    """Chooses the response to each request."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.counted: Counter[str] = Counter()
        self._templates = {str(size).encode(): data.template(size) for size in data.SIZES}
        self._running = {
            size: (before, _ENDED.sub(b'"endTime":null,"durationMs":null', after))
            for size, (before, after) in self._templates.items()
        }
        self._first_asked: dict[bytes, float] = {}
        self._rate, self._burst = _BUCKETS.get(mode, (BUCKET_RATE, BUCKET_BURST))
        self._tokens = float(self._burst)
        self._refilled = time.monotonic()
        self._chance = random.Random(5)
        self._served_until: deque[float] = deque()
        self.first_request = asyncio.Event()
        self._began = 0.0

    def answer(self, head: bytes, body: bytes) -> tuple[bytes, float]:
        """Return the response to a request, and the seconds after which it is sent."""
        if head.startswith(b"GET /counters"):
            return _answer(b"200 OK", json.dumps(self.counted).encode()), 0.0
        self.counted["requests"] += 1
        self.counted["bytes_received"] += len(head) + len(_END) + len(body)
        if self.mode == "failing":
            return _answer(b"503 Service Unavailable", b'{"message": "down"}'), LATENCY_SECONDS
        if self.mode == "throttling" and not self._take_token():
            self.counted["throttled"] += 1
            return _SLOW_DOWN, LATENCY_SECONDS
        fault = self._fault()
        if fault is not None:
            self.counted["faults"] += 1
            return fault, LATENCY_SECONDS
        size, found = _SIZE.match(head), _ID.search(body)
        if size is None or found is None:
            return _answer(b"400 Bad Request", b'{"message": "not a lookup"}'), 0.0
        is_running = self.mode == "living" and not self._has_ended(found[1])
        before, after = (self._running if is_running else self._templates)[size[1]]
        record = before + found[1] + after
        return _answer(b"200 OK", record), self._latency()

    def _latency(self) -> float:
        if self.mode == "concurrency-limit":
            return SERVICE_SECONDS
        if self.mode == "tail":
            return TAIL_SECONDS * (SLOW_FACTOR if self._chance.random() < SLOW_SHARE else 1)
        return LATENCY_SECONDS if self.mode == "throttling" or self.mode in FAULTS else 0.0

    def _fault(self) -> bytes | None:
        """Return the faulty response to a request, if the server has a fault now."""
        if not self.first_request.is_set():
            self.first_request.set()
            self._began = time.monotonic()
        now = time.monotonic()
        match self.mode:
            case "outage" if OUTAGE[0] <= now - self._began < OUTAGE[1]:
                return _answer(b"502 Bad Gateway", b"<html>502</html>")
            case "partial" if self._chance.random() < 1 / 3:
                return _answer(b"500 Internal Server Error", b"<html>500</html>")
            case "limit503" if not self._take_token():
                return _answer(b"503 Service Temporarily Unavailable", b"<html>503</html>")
            case "random429" if self._chance.random() < 1 / 5:
                return _answer(b"429 Too Many Requests", b'{"message": "slow down"}')
            case "limit1000" if not self._take_token():
                return _SLOW_DOWN
            case "concurrency-limit":
                while self._served_until and self._served_until[0] <= now:
                    self._served_until.popleft()
                if len(self._served_until) >= SERVED_AT_ONCE:
                    return _answer(b"429 Too Many Requests", b'{"message": "slow down"}')
                self._served_until.append(now + SERVICE_SECONDS)
        return None

    def _has_ended(self, execution_id: bytes) -> bool:
        seconds, _, _ = execution_id.partition(b"_")
        if seconds == b"never":
            return False
        now = time.monotonic()
        return now - self._first_asked.setdefault(execution_id, now) >= float(seconds)

    def _take_token(self) -> bool:
        now = time.monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._refilled) * self._rate)
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


_SLOW_DOWN: Final = _answer(b"429 Too Many Requests", b'{"message": "slow down"}', b"Retry-After: 1\r\n")


class Connection(asyncio.Protocol):
    """A keep-alive connection of HTTP/1.1, with one request and one response at a time."""

    transport: asyncio.Transport

    def __init__(self, service: Service, connected: set["Connection"]) -> None:
        self._service = service
        self._connected = connected
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport for responses."""
        self.transport = cast("asyncio.Transport", transport)
        self._connected.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        """Forget the connection."""
        del error
        self._connected.discard(self)

    def data_received(self, received: bytes) -> None:
        """Respond when the request is complete."""
        self._received += received
        head, separator, rest = self._received.partition(_END)
        length = _LENGTH.search(head)
        wanted = int(length[1]) if length else 0
        if not separator or len(rest) < wanted:
            return
        self._received = rest[wanted:]
        answer, delay = self._service.answer(head, rest[:wanted])
        if delay:
            asyncio.get_running_loop().call_later(delay, self._write, answer)
        else:
            self.transport.write(answer)

    def _write(self, answer: bytes) -> None:
        """Write a response, unless the client has closed the connection."""
        if not self.transport.is_closing():
            self.transport.write(answer)


async def serve(mode: str) -> None:
    """Serve until the process ends."""
    service = Service(mode)
    connected: set[Connection] = set()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(service, connected), "127.0.0.1", 0, backlog=4096)
    port = server.sockets[0].getsockname()[1]
    print(port, type(loop).__module__.partition(".")[0], flush=True)
    if mode == "restart":
        await service.first_request.wait()
        await asyncio.sleep(OUTAGE[0])
        server.close()
        for connection in list(connected):
            connection.transport.abort()
        await asyncio.sleep(OUTAGE[1] - OUTAGE[0])
        server = await loop.create_server(lambda: Connection(service, connected), "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


def main() -> None:
    """Run on uvloop if it is installed."""
    library = "uvloop" if importlib.util.find_spec("uvloop") else "asyncio"
    with asyncio.Runner(loop_factory=importlib.import_module(library).new_event_loop) as runner:
        runner.run(serve(sys.argv[1]))


if __name__ == "__main__":
    main()
