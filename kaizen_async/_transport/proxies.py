"""Which proxy a request goes through: the one of `proxy=`, or with `trust_env` the environment's.

A wrong or unknown proxy setting is refused when the client is created. If it were ignored, the API key would take the
direct route.
"""

import base64
import ipaddress
import os
import re
from collections.abc import Mapping
from typing import Final

from yarl import URL

from kaizen_async._transport.withhold import Secret

_SCHEMES: Final = frozenset({"http", "https"})
_SOCKS: Final = re.compile(r"socks", re.IGNORECASE)


class Proxy:
    """A proxy without its password, and the header that carries the password.

    Attributes:
        url: Scheme, host and port.
        authorization: The value of Proxy-Authorization; None if the proxy asks for no name.
        secrets: What no text may show.
    """

    __slots__ = ("authorization", "secrets", "url")

    def __init__(self, url: URL) -> None:
        user, password = url.user, url.password
        self.url = url.with_user(None).with_path("", encoded=True)
        self.authorization: Secret | None = None
        self.secrets: tuple[Secret, ...] = ()
        if user is not None or password is not None:
            credentials = base64.b64encode(f"{user or ''}:{password or ''}".encode()).decode()
            self.authorization = Secret(f"Basic {credentials}")
            self.secrets = tuple(Secret(text) for text in (credentials, password) if text)

    def __repr__(self) -> str:
        return f"<Proxy {self.url}>"


def parse_proxy(text: object, name: str) -> Proxy:
    """Return a proxy of a setting or an environment variable.

    Args:
        text: Its URL. Without a scheme, http is meant, as for curl.
        name: What to call it in an error. The URL itself is not shown, because it may hold a password.

    Raises:
        TypeError, ValueError: It cannot be used as a proxy.
    """
    if isinstance(text, URL):
        text = str(text)
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a URL, not {type(text).__name__}")
    spelled = text.strip()
    if "://" not in spelled:
        spelled = f"http://{spelled}"
    try:
        url = URL(spelled)
        is_usable = bool(url.host) and url.port is not None and url.raw_path in {"", "/"} and not url.query_string
    except (ValueError, IndexError):  # yarl raises IndexError for "//[]@"
        url, is_usable = URL(), False
    if _SOCKS.match(spelled):
        raise ValueError(
            f"{name} names a SOCKS proxy, which is not supported; "
            "use an HTTP proxy, or pass a session with a connector of aiohttp_socks"
        )
    if not is_usable or url.scheme not in _SCHEMES:
        raise ValueError(f"{name} must be a URL such as http://user:password@host:port, with the scheme http or https")
    return Proxy(url)


def environment_proxy(url: URL, environment: Mapping[str, str] = os.environ) -> Proxy | None:
    """Return the proxy that the environment names for a URL, or None.

    Read are HTTPS_PROXY or HTTP_PROXY by the scheme of the URL, else ALL_PROXY, unless NO_PROXY names its host. The
    lower-case name comes first. HTTP_PROXY in capital letters is not read in a CGI program, where a client sets it.

    Raises:
        ValueError: A variable cannot be used as a proxy; it is named, also if this URL would not use it.
    """
    proxies: dict[str, Proxy | None] = {}
    for kind in ("http", "https", "all"):
        name, value = _variable(f"{kind}_proxy", environment)
        proxies[kind] = parse_proxy(value, name) if value else None
    if _is_excluded(url, _variable("no_proxy", environment)[1]):
        return None
    return proxies[url.scheme] or proxies["all"]


def _variable(name: str, environment: Mapping[str, str]) -> tuple[str, str]:
    for spelled in (name, name.upper()):
        is_forged = spelled == "HTTP_PROXY" and "REQUEST_METHOD" in environment
        if environment.get(spelled, "").strip() and not is_forged:
            return spelled, environment[spelled].strip()
    return name, ""


def _is_excluded(url: URL, no_proxy: str) -> bool:
    """Return whether NO_PROXY names a host: as a domain with all below it, an address, a range of addresses, or `*`."""
    host = (url.host or "").rstrip(".").lower()
    return any(_names(entry, host, url.port) for entry in re.split(r"[\s,]+", no_proxy) if entry)


def _names(entry: str, host: str, port: int | None) -> bool:
    if entry == "*":
        return True
    entry = entry.lower()
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        address = None
    if address is not None:
        network = _network(entry)
        if network is not None:
            mapped = getattr(address, "ipv4_mapped", None)
            return address in network or (mapped is not None and mapped in network)
    name, colon, wanted_port = entry.rpartition(":")
    if colon and wanted_port.isdigit() and (":" not in name or name.endswith("]")):
        return int(wanted_port) == port and _names(name.strip("[]"), host, port)
    domain = entry.lstrip("*").strip(".")
    # The end of an address is not a domain: "3" does not name 10.1.2.3.
    return bool(domain) and (host == domain or (address is None and host.endswith(f".{domain}")))


def _network(entry: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(entry.strip("[]"), strict=False)
    except ValueError:
        return None
