"""Which Host headers the emulator accepts.

A page in a browser can have its own host name resolved to 127.0.0.1 and then talk to whatever listens there (DNS
rebinding). Its requests carry that name in the Host header, so the emulator refuses them.
"""

import re
import socket
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from aiohttp import web

_HEADER: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/?#@\[\]]+)(?::[0-9]*)?")
_LOCAL_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})
EVERYWHERE: Final = frozenset({"0.0.0.0", "::", ""})  # noqa: S104 - recognised here; no default binds to it


def is_host(host: str) -> bool:
    """Return whether a text may be an address or name to listen on: without scheme, port, brackets and space."""
    return _address(host) is not None or re.fullmatch(r"[0-9A-Za-z._-]+", host) is not None


def is_loopback(host: str) -> bool:
    """Return whether an address can be reached from this machine only."""
    address = _address(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def reachable(host: str) -> str:
    """Return the address at which clients on this machine find what listens on a host."""
    if host in EVERYWHERE or host == "localhost":
        return "::1" if host == "::" else "127.0.0.1"
    return host


class HostCheck:
    """Decides by the Host header whether a request is meant for this emulator.

    Bound to loopback, it must name loopback. Bound to other addresses, it may also be any IP address, the name of this
    machine, or a name without a dot, as Docker gives them: an attacker cannot make these point here.

    Args:
        bound_to: The address that the emulator listens on.
        allowed: Further names; `"*"` for all.
    """

    def __init__(self, bound_to: str, allowed: Iterable[str]) -> None:
        self._names = _LOCAL_NAMES | {bound_to.lower(), *(name.lower() for name in allowed)}
        self._is_private = is_loopback(bound_to)

    def accepts_all(self, request: web.BaseRequest) -> bool:
        """Return whether a request is accepted: for its Host header, and for the host in its target if there is one."""
        header, host = request.headers.get("Host"), request.host
        return self.accepts(header) and (host == header or self.accepts(f"[{host}]" if ":" in host else host))

    def accepts(self, header: str | None) -> bool:
        """Return whether a request with this Host header is accepted."""
        host = _host_of(header or "")
        if host in self._names or "*" in self._names:
            return True
        address = _address(host)
        if self._is_private:
            return address is not None and address.is_loopback
        return address is not None or (bool(host) and "." not in host) or host == socket.gethostname().lower()


def _host_of(header: str) -> str:
    """Return the host of a Host header, without port, brackets and final dot; empty if the header is not valid."""
    match = _HEADER.fullmatch(header)
    return "" if match is None else match[1].strip("[]").removesuffix(".").lower()


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None
