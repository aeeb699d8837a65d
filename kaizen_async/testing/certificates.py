"""Certificates for an emulator with TLS, made by trustme (extra `testing`).

trustme is what the tests of aiohttp, trio and urllib3 use; making certificates with `cryptography` itself takes a page
of code that would have to be kept up with what TLS stacks accept.
"""

import ssl
from typing import Any

from kaizen_async.testing.hosts import reachable


class Certificates:
    """A certificate authority of one emulator, and its server's certificate.

    Raises:
        ImportError: trustme is not installed.
    """

    def __init__(self, host: str) -> None:
        try:
            import trustme  # noqa: PLC0415 - an extra, for those who serve TLS
        except ImportError as error:
            raise ImportError(
                "tls=True makes a certificate with trustme, which is not installed: pip install kaizen-async[testing]"
            ) from error
        self._authority: Any = trustme.CA()
        self._certificate: Any = self._authority.issue_cert("localhost", "127.0.0.1", "::1", reachable(host))

    def for_server(self) -> ssl.SSLContext:
        """Return the context of the server."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._certificate.configure_cert(context)
        return context

    def for_client(self) -> ssl.SSLContext:
        """Return a context that trusts this authority and no other."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._authority.configure_trust(context)
        return context
