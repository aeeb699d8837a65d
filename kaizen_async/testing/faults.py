"""What may go wrong between a server and its client, one constructor per fault."""

import asyncio
import math
import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from json import dumps
from socket import SO_LINGER, SOL_SOCKET
from statistics import NormalDist
from typing import Final, Literal, TypeAlias, cast

from aiohttp import web

from kaizen_async.testing.checks import check_number, check_seconds, check_type

JSON_HEADERS: Final = {"Content-Type": "application/json"}

_GATEWAY_PAGE: Final = (
    b"<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n"
    b"<body>\r\n<center><h1>502 Bad Gateway</h1></center>\r\n</body>\r\n</html>\r\n"
)
_WIDEST_SIGMA: Final = 5.0
_LEAST_DRAWN: Final = 1e-9
"""No draw is nearer to 0 or 1 than this, where a normal distribution would be infinite."""
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)

Ending: TypeAlias = Literal["close", "reset", "hang"]
"""What becomes of a connection: closed (FIN), reset (RST), or left open and silent."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A response as plain data."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=lambda: JSON_HEADERS)

    def __post_init__(self) -> None:
        check_type("status", self.status, int)
        check_number("status", self.status, 200, 999, "Fault.raw() sends any bytes")
        check_type("body", self.body, bytes, "encode it first")
        check_type("headers", self.headers, Mapping)

    @classmethod
    def message(cls, status: int, text: str = "", headers: Mapping[str, str] | None = None) -> "Answer":
        """Return an error whose JSON body holds the text, or the standard phrase of the status."""
        body = dumps({"message": text or _phrase(status)}).encode()
        return cls(status, body, {**JSON_HEADERS, **(headers or {})})

    def response(self) -> web.Response:
        """Return the response as aiohttp sends it."""
        return web.Response(status=self.status, body=self.body, headers=self.headers)


@dataclass(slots=True)
class Exchange:
    """One request in the emulator: what a fault can read and use.

    Attributes:
        id: The id asked for.
        number: How many requests for this id have come in, with this one.
        ordinary: Returns the response that the request would get now without any fault.
        draw: Returns a number from 0 to below 1 that depends on the seed, the id, the number and a text of yours.
        sleep: Waits for some seconds, in the emulator's virtual time if it has one.
    """

    id: str
    number: int
    ordinary: Callable[[], Answer]
    draw: Callable[[str], float]
    sleep: Callable[[float], Awaitable[None]]
    let_go: Callable[[], None]
    _request: web.BaseRequest | None

    @property
    def request(self) -> web.BaseRequest:
        """The request as aiohttp received it, its body read."""
        if self._request is None:
            raise RuntimeError("this request did not come over a connection; a fault of your own gets one that did")
        return self._request

    @property
    def transport(self) -> asyncio.Transport:
        """The connection. It is there as long as the exchange is: when it is lost, the exchange is cancelled."""
        return cast("asyncio.Transport", self.request.transport)

    async def meet(self, fault: "Fault") -> web.StreamResponse | Answer | None:
        """Let the fault play; return the response if it makes one."""
        try:
            return await fault.play(self)
        except ConnectionError:
            transport = None if self._request is None else self._request.transport
            if self._request is None or (transport is not None and not transport.is_closing()):
                raise
            # Writing found the connection closing: the exchange is about to be cancelled, which is not an error.
            return await self.end("hang")

    async def end(self, ending: Ending) -> web.StreamResponse:
        """Close, reset or leave the connection, and never return: losing the connection cancels the exchange."""
        if ending == "reset":
            self.transport.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, _RESET_ON_CLOSE)
            self.transport.abort()
        elif ending == "close":
            self.transport.close()
        self.let_go()
        never: asyncio.Future[web.StreamResponse] = asyncio.get_running_loop().create_future()
        return await never

    async def begin(self, answer: Answer) -> web.StreamResponse:
        """Send the headers of a response, and announce the length of its body."""
        response = web.StreamResponse(status=answer.status, headers=answer.headers)
        response.content_length = len(answer.body)
        await response.prepare(self.request)
        return response

    async def half(self, ending: Ending) -> web.StreamResponse:
        """Send the headers and the first half of the body, then end, and never return."""
        answer = self.ordinary()
        response = await self.begin(answer)
        await response.write(answer.body[: len(answer.body) // 2])
        return await self.end(ending)


Reply: TypeAlias = web.StreamResponse | Answer | None
Play: TypeAlias = Callable[[Exchange], Awaitable[Reply]]


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong with one request; made by the constructors below.

    `Fault("name", play)` makes one of your own: `play(exchange)` is a coroutine function that returns an `Answer` or a
    response of aiohttp, or None to pass the request on to the next fault, and at last to the ordinary response.

    Attributes:
        name: How the fault shows in a repr.
        play: What happens.
        delays: Whether the fault only takes time: such faults come before all that make a response.
        needs_connection: Whether it plays with the connection, so that the request must come over one.
    """

    name: str
    play: Play = field(repr=False)
    delays: bool = False
    needs_connection: bool = field(default=True, repr=False)

    def __post_init__(self) -> None:
        check_type("name", self.name, str)
        if not callable(self.play):
            raise TypeError(f"play must be a coroutine function of an Exchange, not {self.play!r:.100}")

    @classmethod
    def status(cls, status: int, *, headers: Mapping[str, str] | None = None, body: bytes | None = None) -> "Fault":
        """The client sees this status, by default with a JSON body that holds the phrase of the status in `message`."""
        check_type("status", status, int)
        check_number("status", status, 200, 599, "Fault.raw() sends any bytes")
        if body is None:
            answer = Answer.message(status, headers=headers)
        else:
            check_type("body", body, bytes, "encode it first")
            answer = Answer(status, body, dict(headers or {}))
        return cls._answering(f"status({status})", answer)

    @classmethod
    def html_502(cls) -> "Fault":
        """The client sees the 502 page of a gateway: HTML where JSON was expected."""
        return cls._answering("html_502()", Answer(502, _GATEWAY_PAGE, {"Content-Type": "text/html"}))

    @classmethod
    def body(cls, body: bytes) -> "Fault":
        """The client sees a 200 with this body, announced as JSON whatever it is."""
        check_type("body", body, bytes, "encode it first")
        return cls._answering(f"body({body[:20]!r})", Answer(200, body))

    @classmethod
    def malformed_body(cls) -> "Fault":
        """The client sees a 200 that is complete for HTTP, its JSON broken off in the middle."""

        async def play(exchange: Exchange) -> Answer:
            answer = exchange.ordinary()
            return Answer(200, answer.body[: len(answer.body) // 2])

        return cls("malformed_body()", play, needs_connection=False)

    @classmethod
    def latency(cls, seconds: float) -> "Fault":
        """The client waits that long before the response begins: the ordinary one, or that of another fault."""
        check_seconds("seconds", seconds)

        async def play(exchange: Exchange) -> None:
            await exchange.sleep(seconds)

        return cls(f"latency({seconds})", play, delays=True, needs_connection=False)

    @classmethod
    def lognormal_latency(cls, median: float, sigma: float = 0.5) -> "Fault":
        """The client waits for a time drawn from a log-normal distribution, as latencies of real servers are spread.

        Args:
            median: Seconds that half of the requests stay below.
            sigma: Standard deviation of the logarithm; with 0.5, one request in a hundred takes over 3.2 medians.
        """
        check_seconds("median", median)
        check_number("sigma", sigma, 0, _WIDEST_SIGMA)
        normal = NormalDist()

        async def play(exchange: Exchange) -> None:
            drawn = min(max(exchange.draw("latency"), _LEAST_DRAWN), 1 - _LEAST_DRAWN)
            await exchange.sleep(median * math.exp(sigma * normal.inv_cdf(drawn)))

        return cls(f"lognormal_latency({median}, {sigma})", play, delays=True, needs_connection=False)

    @classmethod
    def hang(cls) -> "Fault":
        """The client receives nothing: the emulator reads the request and never responds."""
        return cls("hang()", _ending("hang"), needs_connection=False)

    @classmethod
    def reset(cls) -> "Fault":
        """The client sees its connection reset (RST) before any byte of a response."""
        return cls("reset()", _ending("reset"))

    @classmethod
    def disconnect(cls) -> "Fault":
        """The client sees its connection closed (FIN) before any byte of a response."""
        return cls("disconnect()", _ending("close"))

    @classmethod
    def truncated_body(cls) -> "Fault":
        """The client sees headers and half the body that they announce, then its connection closed (FIN)."""
        return cls("truncated_body()", _halving("close"))

    @classmethod
    def reset_mid_body(cls) -> "Fault":
        """The client sees headers and half the body that they announce, then its connection reset (RST)."""
        return cls("reset_mid_body()", _halving("reset"))

    @classmethod
    def stalled_body(cls) -> "Fault":
        """The client sees headers and half the body that they announce, then nothing more, the connection open."""
        return cls("stalled_body()", _halving("hang"))

    @classmethod
    def trickle(cls, seconds_per_byte: float) -> "Fault":
        """The client sees the ordinary response, complete. Its body comes with `seconds_per_byte` between two bytes."""
        check_seconds("seconds_per_byte", seconds_per_byte)

        async def play(exchange: Exchange) -> web.StreamResponse:
            answer = exchange.ordinary()
            response = await exchange.begin(answer)
            for position in range(len(answer.body)):
                await exchange.sleep(seconds_per_byte)
                await response.write(answer.body[position : position + 1])
            return response

        return cls(f"trickle({seconds_per_byte})", play)

    @classmethod
    def raw(cls, *script: bytes | float, then: Ending = "close") -> "Fault":
        r"""The client sees these bytes as they are, with a pause for each number of seconds, then what `then` says.

        For responses that HTTP libraries refuse to send, such as an invalid chunk after valid headers:
        `Fault.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", 0.03, b"ZZ\r\n", then="hang")`.
        """
        if then not in ("close", "reset", "hang"):
            raise ValueError(f'then must be "close", "reset" or "hang", not {then!r}')
        for piece in script:
            if not isinstance(piece, bytes):
                check_seconds("a pause between pieces of bytes", piece)

        async def play(exchange: Exchange) -> web.StreamResponse:
            for piece in script:
                if isinstance(piece, bytes):
                    exchange.transport.write(piece)
                else:
                    await exchange.sleep(piece)
            return await exchange.end(then)

        shown = ", ".join(map(repr, script))
        return cls(f"raw({shown:.60}, then={then!r})", play)

    @classmethod
    def _answering(cls, name: str, answer: Answer) -> "Fault":
        async def play(_: Exchange) -> Answer:
            return answer

        return cls(name, play, needs_connection=False)


def _ending(ending: Ending) -> Play:
    async def play(exchange: Exchange) -> web.StreamResponse:
        return await exchange.end(ending)

    return play


def _halving(ending: Ending) -> Play:
    async def play(exchange: Exchange) -> web.StreamResponse:
        return await exchange.half(ending)

    return play


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return f"Status {status}"
