"""Resolves host names in threads of its own.

asyncio resolves names in the loop's default executor. There, a name waits behind whatever else the program does in
threads, and a resolver that hangs keeps `asyncio.run` from returning. These threads are daemons that nobody waits for.
aiohttp asks only once at a time for the same name, so a resolver that hangs costs one thread per name.
"""

import asyncio
import contextlib
import ipaddress
import socket
import threading

from aiohttp.abc import AbstractResolver, ResolveResult


def _lookup(host: str, port: int, family: socket.AddressFamily) -> list[ResolveResult]:
    infos = socket.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    results: list[ResolveResult] = []
    for found, _, proto, _, address in infos:
        # The name of an address says which network interface a link-local one belongs to.
        name = socket.getnameinfo(address, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)[0]
        results.append(
            ResolveResult(
                hostname=host,
                host=name,
                port=int(address[1]),
                family=found,
                proto=proto,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
        )
    return results


class ThreadResolver(AbstractResolver):
    """Resolves each name in a thread of its own, with the system's resolver."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return the addresses of a host.

        Raises:
            OSError: It has none, or cannot be resolved now.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[ResolveResult]] = loop.create_future()

        def settle(results: list[ResolveResult] | None, error: Exception | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(results or [])
            else:
                future.set_exception(error)

        def work() -> None:
            results, failure = None, None
            try:
                results = _lookup(host, port, family)
            except Exception as error:  # noqa: BLE001 - it is raised where the name was asked for
                failure = error
            with contextlib.suppress(RuntimeError):  # the loop is closed by now, and nobody waits any more
                loop.call_soon_threadsafe(settle, results, failure)

        threading.Thread(target=work, name=f"kaizen_async resolves {host}", daemon=True).start()
        return await future

    async def close(self) -> None:
        """Do nothing: a thread ends with its result, or with the process."""


def resolves_to_this_machine(host: str, seconds: float = 2.0) -> bool:
    """Return whether a name resolves, within that time, and only to loopback addresses."""
    found: list[str] = []

    def work() -> None:
        with contextlib.suppress(OSError):
            found.extend(str(result["host"]) for result in _lookup(host, 0, socket.AF_UNSPEC))

    thread = threading.Thread(target=work, name=f"kaizen_async resolves {host}", daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(found) and all(is_loopback(address) for address in list(found))


def is_loopback(host: str) -> bool:
    """Return whether an address literal is one of this machine: 127.0.0.0/8, ::1, or the former mapped to IPv6."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)
