"""aiohttp's errors, and what becomes of them: one of ours, that shows no secret and keeps nothing alive."""

import errno
from collections.abc import Callable, Iterator
from ssl import SSLCertVerificationError
from typing import Final, cast

import aiohttp
from aiohttp.http_exceptions import ContentEncodingError, HttpProcessingError, LineTooLong

from kaizen_async._transport.encodings import UnpackError
from kaizen_async._transport.reading import Limits, TooLongHeadError
from kaizen_async._transport.statuses import PROXY_ADVICE
from kaizen_async.errors import TransportError, quoted

LOCAL_SHORTAGES: Final = {
    errno.EMFILE: "this process may not open more files; raise its limit (ulimit -n)",
    errno.ENFILE: "this machine may not open more files; raise fs.file-max",
    errno.EADDRNOTAVAIL: "this machine has no free local port; widen net.ipv4.ip_local_port_range",
    errno.ENOBUFS: "this machine has no buffer space left; raise its limits for sockets",
    errno.ENOMEM: "this machine has no memory left for sockets",
}
"""What an error number of connecting says about this machine, and how to raise the limit."""

_CODEC_ADVICE: Final = "Please install"
"""In aiohttp's message about a response compressed in a way that this installation does not know."""
_TOO_LONG_HEAD: Final = ("Too many headers", "Got more than")
"""In aiohttp's messages about headers beyond the limits, which it raises without a class of their own."""
_DISCONNECTED_ERRNOS: Final = frozenset({errno.ECONNRESET, errno.EPIPE, errno.ECONNABORTED, errno.ETIMEDOUT, None})


def translate(error: Exception, limits: Limits | None = None) -> TransportError:  # noqa: PLR0911 - a case per kind
    """Return our error for one that aiohttp, or our connection, raised.

    The order matters: a certificate error is a connection error, and a ClientResponseError is not a response with that
    status: aiohttp raises one with status 400 for everything it cannot parse.
    """
    text = one_line(str(error)) or type(error).__name__
    if isinstance(error, (aiohttp.ClientConnectorCertificateError, SSLCertVerificationError)):
        return TransportError(f"the server's certificate does not verify: {text}", retryable=False)
    if isinstance(error, aiohttp.InvalidURL):
        return TransportError(f"not a URL that can be requested: {text}", retryable=False)
    if isinstance(error, aiohttp.ClientConnectorError):
        return TransportError(f"could not connect: {text}")
    if isinstance(error, TooLongHeadError) or _is_too_long_head(error):
        return _too_long_head(limits)
    if isinstance(error, UnpackError):
        return _garbled("the response does not unpack", text)
    if isinstance(error, (aiohttp.ClientResponseError, HttpProcessingError)):
        return _not_http(error)
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return TransportError("the server closed the connection without a response", disconnected=True)
    if isinstance(error, aiohttp.ClientPayloadError):
        if isinstance(error.__cause__, ContentEncodingError):
            return _garbled("the response does not unpack", error.__cause__.message)
        return TransportError("the response was cut off")
    disconnected = isinstance(error, OSError) and error.errno in _DISCONNECTED_ERRNOS
    return TransportError(f"the connection failed: {text}", disconnected=disconnected)


def shortage(error: BaseException) -> int | None:
    """Return the error number if connecting failed because this machine lacks something."""
    number = getattr(getattr(error, "os_error", error), "errno", None)
    return number if number in LOCAL_SHORTAGES else None


def without_frames(error: BaseException) -> BaseException:
    """Return an error whose chain refers to no frame: frames hold headers, sockets and, in a cycle, the error."""
    for link in _chain(error):
        link.__traceback__ = None
    return error


def said_by(error: BaseException) -> str:
    """Return what an error and its causes say, and the notes on them. aiohttp's quote what they could not parse."""
    said: list[str] = []
    for link in _chain(error):
        said += [text_of(link), text_of(link, repr), *map(str, getattr(link, "__notes__", ()))]
    return " ".join(said)


def text_of(error: BaseException, spell: Callable[[BaseException], str] = str) -> str:
    """Return the text of an error, or nothing if its class fails to give one."""
    try:
        return spell(error)
    except Exception:  # noqa: BLE001 - the error is another's, and may raise anything here
        return ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, its causes, what it was raised in the handling of, and the errors of a group; each once."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        link = todo.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            yield link
            todo += [link.__cause__, link.__context__]
            if isinstance(link, BaseExceptionGroup):
                todo += cast("BaseExceptionGroup[BaseException]", link).exceptions


def one_line(text: str) -> str:
    """Return foreign text as one printable line, marked as such."""
    return quoted(" ".join(text.split()))


def _is_too_long_head(error: Exception) -> bool:
    # The message of a ServerDisconnectedError may be the part of a response that came.
    message = getattr(error, "message", None)
    return isinstance(error, LineTooLong) or (
        isinstance(message, str) and any(text in message for text in _TOO_LONG_HEAD)
    )


def _too_long_head(limits: Limits | None) -> TransportError:
    most = f" ({limits.head} bytes)" if limits else ""
    lines = f" ({limits.head_lines})" if limits else ""
    return TransportError(
        f"the response's headers are longer than max_header_bytes{most} or more than max_header_lines{lines}",
        garbled=True,
    )


def _not_http(error: aiohttp.ClientResponseError | HttpProcessingError) -> TransportError:
    """Return the error for what is not a response of the server: the refusal of a proxy, or not HTTP."""
    if isinstance(error, aiohttp.ClientHttpProxyError):
        advice = PROXY_ADVICE if error.status in {401, 407} else ""
        reason = f"the proxy answered {error.status} {one_line(error.message)}{advice}"
        return TransportError(reason, retryable=error.status >= 500)  # noqa: PLR2004 - the class of server errors
    return _garbled("the response is not valid HTTP", error.message)


def _garbled(reason: str, message: str) -> TransportError:
    """Return the error for a response that cannot be read. One that needs a missing codec never can be."""
    return TransportError(f"{reason}: {one_line(message)}", retryable=_CODEC_ADVICE not in message, garbled=True)
