"""Records the responses of a real server into a file, and reads them back for an emulator to replay.

The file holds one JSON object per line, in the order in which the responses came. It holds a JSON body as it came, and
any other body as text or in base64. It contains no keys: request headers are not recorded, and `***` replaces what a
response quotes of the key, of cookies and of other headers of the request that may be secret.
"""

import base64
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Final, Self

import aiohttp
import msgspec
from aiohttp import web

from kaizen_async._transport.request_id import REQUEST_ID_HEADERS
from kaizen_async._transport.withhold import Withholder
from kaizen_async.config import resolve_base_url
from kaizen_async.errors import printable
from kaizen_async.testing.faults import Answer
from kaizen_async.testing.server import LoopbackServer

_ABOUT_CONNECTION: Final = frozenset(
    {"host", "content-length", "connection", "keep-alive", "transfer-encoding", "accept-encoding"}
)
"""Headers that are neither passed on nor replayed, because they are about one connection."""
_NOT_SECRET: Final = frozenset({"content-type", "accept", "user-agent", "traceparent", "tracestate", "baggage"})
_SHORTEST_SECRET: Final = 8
"""Characters of a value from which on it may be a secret, and not the number of a tenant. The key may be shorter."""
_KEPT_HEADERS: Final = ("content-type", "retry-after", "retry-after-ms", *REQUEST_ID_HEADERS)
_KEPT_PREFIXES: Final = ("ratelimit", "x-ratelimit")
_UPSTREAM_SECONDS: Final = 60.0


_HeaderText = Annotated[str, msgspec.Meta(pattern=r"^[^\r\n\0]*\Z")]


class _Line(msgspec.Struct, omit_defaults=True):
    """One response, when it came, and the request that it belongs to."""

    path: str
    id: str
    seconds: float
    status: int
    headers: dict[_HeaderText, _HeaderText]
    json: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    text: str | None = None
    base64: str | None = None

    def body(self) -> bytes:
        if self.json is not msgspec.UNSET:
            return bytes(self.json)
        return base64.b64decode(self.base64) if self.base64 is not None else (self.text or "").encode()


_line_decoder: Final = msgspec.json.Decoder(_Line)
_line_encoder: Final = msgspec.json.Encoder()


class _Asked(msgspec.Struct):
    id: str


class Recorder:
    """Stands between a client and a server, passes requests on, and writes the responses into a file.

        async with Recorder("https://api.kaizenautomation.com/", "bug.jsonl") as recorder:
            async with KaizenClient(base_url=recorder.base_url) as kaizen:
                ...

    Replay them with `emulator.replay("bug.jsonl")`.

    Args:
        base_url: Where the real API is. The same rules hold as for the client: https, or this machine.
        file: The file to write. An existing file is replaced.
        allow_insecure_http: Allow a plain http base_url to another machine.

    Raises:
        ValueError: `base_url` is not usable.
    """

    _session: aiohttp.ClientSession
    """Of the block; before it there is none."""

    def __init__(self, base_url: str, file: str | Path, *, allow_insecure_http: bool = False) -> None:
        self._upstream = resolve_base_url(base_url, allow_insecure_http=allow_insecure_http)
        self._file = Path(file)
        self._server = LoopbackServer(self._pass_on, "127.0.0.1", 0)
        self._started = 0.0

    @property
    def base_url(self) -> str:
        """Where the client is to send its requests."""
        return f"http://127.0.0.1:{self._server.port}/"

    async def __aenter__(self) -> Self:
        self._file.write_bytes(b"")
        self._started = time.monotonic()
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=_UPSTREAM_SECONDS), cookie_jar=aiohttp.DummyCookieJar()
        )
        await self._server.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._server.stop(keep_port=False)
        await self._session.close()

    async def _pass_on(self, request: web.BaseRequest) -> web.StreamResponse:
        """Pass one request on, and note the response. Without a response, the client and the file get a 502."""
        body = await request.read()
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _ABOUT_CONNECTION}
        url = self._upstream.with_path(self._upstream.raw_path + request.path.lstrip("/"))
        try:
            async with self._session.request(
                request.method, url, data=body, headers=headers, allow_redirects=False
            ) as response:
                answer = Answer(response.status, await response.read(), dict(_kept(response.headers.items())))
        except (aiohttp.ClientError, TimeoutError) as error:
            answer = Answer.message(502, f"the recorder got no response: {type(error).__name__}")
        self._note(request.path, body, answer, _secrets_in(headers))
        return answer.response()

    def _note(self, path: str, body: bytes, answer: Answer, secrets: Iterable[str]) -> None:
        headers, shown = dict(answer.headers), answer.body
        for withholder in map(Withholder, secrets):
            headers = {name: withholder.text(value) for name, value in headers.items()}
            shown = withholder.body(shown)
        line = _Line(path, _id_in(body), round(time.monotonic() - self._started, 3), answer.status, headers)
        _put_body(line, shown)
        with self._file.open("ab") as file:
            file.write(_line_encoder.encode(line) + b"\n")


def _secrets_in(headers: Mapping[str, str]) -> Iterator[str]:
    """Yield the values of a request's headers that a recording must not show: the key, and what else may be secret."""
    for name, value in headers.items():
        lower = name.lower()
        if lower == "authorization":
            yield value.partition(" ")[2] or value
        elif lower == "cookie":
            cookies = (part.partition("=")[2] for part in value.split(";"))
            yield from (cookie for cookie in cookies if len(cookie) >= _SHORTEST_SECRET)
        elif lower not in _NOT_SECRET and len(value) >= _SHORTEST_SECRET:
            yield value


def replies_in(file: Path) -> Iterator[tuple[str, str, Answer]]:
    """Yield path, id and response of each line of a recording.

    Raises:
        ValueError: A line is not part of a recording.
    """
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            read = _line_decoder.decode(line)
            headers = {name: value for name, value in read.headers.items() if name.lower() not in _ABOUT_CONNECTION}
            answer = Answer(read.status, read.body(), headers)
        except (ValueError, RecursionError) as error:
            shown = printable(f"{file}, line {number} is not a recorded response: {error}")
            raise ValueError(shown) from None
        yield read.path, read.id, answer


def _put_body(line: _Line, body: bytes) -> None:
    try:
        msgspec.json.decode(body)
        is_json = b"\n" not in body and b"\r" not in body
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        is_json = False
    if is_json:
        line.json = msgspec.Raw(body)
        return
    try:
        line.text = body.decode()
    except UnicodeDecodeError:
        line.base64 = base64.b64encode(body).decode()


def _kept(headers: Any) -> Iterator[tuple[str, str]]:
    for name, value in headers:
        if name.lower() in _KEPT_HEADERS or name.lower().startswith(_KEPT_PREFIXES):
            yield name, value


def _id_in(body: bytes) -> str:
    try:
        return msgspec.json.decode(body, type=_Asked).id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
