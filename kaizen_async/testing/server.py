"""Serving on one port, stopping at once, and serving there again."""

import asyncio
import socket
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from ssl import SSLContext
from typing import Final

from aiohttp import web

from kaizen_async.testing.certificates import Certificates

_BACKLOG: Final = 1024
_KEEPALIVE: Final = 86_400.0
"""A day: idle connections are ended by the client or by a fault, never by a timer, so that runs are repeatable."""
_CANCELLED_WITHIN: Final = 1.0
"""Seconds that what is cancelled may take to end; none of ours takes any."""
_HANDOVER_TURNS: Final = 4
"""Turns of the loop that asyncio needs to make a connection, which can be closed, of a socket that it has accepted."""


class LoopbackServer:
    """Serves a handler on one port.

    The port is held while the server is stopped. Otherwise another program may get it. Most likely that is
    the client under test: a client that connects to a free port of the local range may be connected to itself.
    """

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        host: str,
        port: int,
        *,
        tls: bool = False,
    ) -> None:
        self.host = host
        self.port = port
        self.scheme = "https" if tls else "http"
        self._certificates = Certificates(host) if tls else None
        self._handler = handler
        self._running: _Running | None = None
        self._held: socket.socket | None = None

    @property
    def connections(self) -> list[web.RequestHandler]:
        """The connections that are open."""
        return [] if self._running is None else self._running.server.connections

    def client_context(self) -> SSLContext:
        """Return what a client needs to trust the certificate.

        Raises:
            RuntimeError: It serves http.
        """
        if self._certificates is None:
            raise RuntimeError("this emulator serves plain http; make it with tls=True")
        return self._certificates.for_client()

    async def start(self) -> None:
        """Begin to serve.

        Raises:
            RuntimeError: It serves already.
            OSError: The address is not available.
        """
        if self._running is not None:
            raise RuntimeError("the emulator is running already; stop() it first")
        listener, self._held = self._held or _bind(self.host, self.port), None
        self.port = listener.getsockname()[1]
        server = web.Server(self._handler, handler_cancellation=True, access_log=None, keepalive_timeout=_KEEPALIVE)
        runner = web.ServerRunner(server, shutdown_timeout=_CANCELLED_WITHIN)
        await runner.setup()
        context = None if self._certificates is None else self._certificates.for_server()
        await web.SockSite(runner, listener, backlog=_BACKLOG, ssl_context=context).start()
        self._running = _Running(asyncio.get_running_loop(), listener, server, runner)

    async def stop(self, *, keep_port: bool) -> None:
        """Close every connection, and end the requests in progress. A cancellation does not stop it.

        Args:
            keep_port: Whether to hold the port, so that `start` gets it again.

        Raises:
            RuntimeError: It serves in another event loop.
        """
        running = self._running
        if running is not None:
            if running.loop is not asyncio.get_running_loop():
                raise RuntimeError(
                    "the emulator serves in another event loop; stop it there, "
                    "or give it a thread of its own: `with KaizenEmulator() as emulator:`"
                )
            self._running = None
            await asyncio.shield(self._end(running, keep_port=keep_port))
        elif not keep_port:
            self._release_port()

    async def _end(self, running: "_Running", *, keep_port: bool) -> None:
        await running.stop_accepting()
        if keep_port:
            self._held = _bind(self.host, self.port)
            weakref.finalize(self, self._held.close)
        await running.close_connections()

    def _release_port(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None


@dataclass(frozen=True, slots=True)
class _Running:
    loop: asyncio.AbstractEventLoop
    listener: socket.socket
    server: web.Server
    runner: web.ServerRunner

    async def stop_accepting(self) -> None:
        """Close the port, but not before what was accepted has become a connection.

        A server that is closed in between loses the socket, still open: https://github.com/python/cpython/issues/109564
        """
        self.loop.remove_reader(self.listener)
        for _ in range(_HANDOVER_TURNS):
            await asyncio.sleep(0)
        for site in self.runner.sites:
            await site.stop()

    async def close_connections(self) -> None:
        """Close all connections, and wait until the requests on them have ended."""
        for transport in filter(None, [connection.transport for connection in self.server.connections]):
            transport.abort()
        await self.runner.cleanup()


def _bind(host: str, port: int) -> socket.socket:
    """Return a socket that has the address but does not listen: connecting to it is refused."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise OSError(error.errno, f"cannot listen on {host} port {port}: {error.strerror}") from None
    return bound
