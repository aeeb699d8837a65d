"""The client chooses a proxy from its setting or the environment, and refuses invalid settings."""

from typing import Any

import pytest
from yarl import URL

from kaizen_async import KaizenClient
from kaizen_async._transport.proxies import environment_proxy, parse_proxy
from kaizen_async._transport.resolver import is_loopback

PASSWORD = "s3cret-pass"
API = URL("https://api.example.com/v1/")


@pytest.mark.parametrize(
    ("url", "shown", "has_password"),
    [
        ("http://proxy:8080", "http://proxy:8080", False),
        ("proxy:8080", "http://proxy:8080", False),
        ("https://proxy", "https://proxy", False),
        ("  http://proxy:3128/  ", "http://proxy:3128", False),
        (f"http://me:{PASSWORD}@proxy:8080", "http://proxy:8080", True),
        (f"me:{PASSWORD}@proxy:8080", "http://proxy:8080", True),
        (URL("http://[::1]:8080"), "http://[::1]:8080", False),
    ],
)
def test_a_proxy_is_read_with_or_without_a_scheme(url: Any, shown: str, has_password: bool) -> None:
    """A proxy URL needs no scheme, and its password does not appear in any repr."""
    proxy = parse_proxy(url, "proxy")
    assert str(proxy.url) == shown
    assert (proxy.authorization is not None) == has_password
    assert PASSWORD not in repr(proxy) + repr(proxy.authorization) + repr(proxy.secrets)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (f"socks5://me:{PASSWORD}@proxy:1080", "SOCKS"),
        (f"SOCKS5H://me:{PASSWORD}@proxy", "SOCKS"),
        (f"ftp://me:{PASSWORD}@proxy", "must be a URL such as"),
        (f"http://me:{PASSWORD}@", "must be a URL such as"),
        (f"http://[]{PASSWORD}@", "must be a URL such as"),
        (f"http://me:{PASSWORD}@proxy:port", "must be a URL such as"),
        (f"http://me:{PASSWORD}@proxy/path", "must be a URL such as"),
        ("", "must be a URL such as"),
        (5, "must be a URL, not int"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_refused_by_name(
    url: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An invalid proxy is refused with the name of its setting or variable, and without its password."""
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        KaizenClient("key", proxy=url)
    assert str(caught.value).startswith("proxy ")
    if url and isinstance(url, str):
        monkeypatch.setenv("https_proxy", url)
        with pytest.raises(ValueError, match="https_proxy") as in_environment:
            KaizenClient("key", trust_env=True)
        assert PASSWORD not in f"{caught.value!r}{in_environment.value!r}"


@pytest.mark.parametrize(
    ("environment", "proxy"),
    [
        ({}, None),
        ({"HTTPS_PROXY": "http://a:1"}, "http://a:1"),
        ({"https_proxy": "http://a:1", "HTTPS_PROXY": "http://b:2"}, "http://a:1"),
        ({"HTTP_PROXY": "http://a:1"}, None),
        ({"ALL_PROXY": "http://a:1"}, "http://a:1"),
        ({"all_proxy": "http://a:1", "HTTPS_PROXY": "https://b:2"}, "https://b:2"),
        ({"HTTPS_PROXY": " "}, None),
        *(({"HTTPS_PROXY": "http://a:1", "NO_PROXY": names}, None) for names in ("*", "example.com", ".example.com")),
        *(
            ({"HTTPS_PROXY": "http://a:1", "NO_PROXY": names}, None)
            for names in ("x, api.example.com", "*.example.com", "api.example.com:443", "API.EXAMPLE.COM.")
        ),
        *(
            ({"HTTPS_PROXY": "http://a:1", "no_proxy": names}, "http://a:1")
            for names in ("ample.com", "example.com:8443", "10.0.0.0/8", ",", "api.example.com.evil.test", ".")
        ),
    ],
)  # fmt: skip
def test_the_environment_names_a_proxy(environment: dict[str, str], proxy: str | None) -> None:
    """The environment variable for the URL's scheme gives the proxy, unless NO_PROXY names the host."""
    found = environment_proxy(API, environment)
    assert (None if found is None else str(found.url)) == proxy


@pytest.mark.parametrize(
    ("host", "no_proxy", "is_excluded"),
    [
        ("10.1.2.3", "10.0.0.0/8", True),
        ("11.1.2.3", "10.0.0.0/8", False),
        ("10.1.2.3", "10.1.2.3", True),
        ("10.1.2.3", "10.1.2.3:80", True),
        ("[2001:db8::1]", "2001:db8::/32", True),
        ("[2001:db9::1]", "2001:db8::/32", False),
        ("[::ffff:10.1.2.3]", "10.0.0.0/8", True),
        ("[2001:db8::1]", "[2001:db8::1]:80", True),
        ("10.1.2.3", "3", False),
    ],
)
def test_no_proxy_knows_ranges_of_addresses(host: str, no_proxy: str, is_excluded: bool) -> None:
    """NO_PROXY accepts address ranges in CIDR notation for both versions of IP."""
    found = environment_proxy(URL(f"http://{host}/"), {"http_proxy": "http://a:1", "no_proxy": no_proxy})
    assert (found is None) == is_excluded


def test_a_cgi_program_does_not_take_a_proxy_from_a_request() -> None:
    """In a CGI program HTTP_PROXY is ignored, because it contains the visitor's header `Proxy`."""
    environment = {"HTTP_PROXY": "http://a:1", "REQUEST_METHOD": "GET"}
    assert environment_proxy(URL("http://h/"), environment) is None
    assert environment_proxy(URL("http://h/"), {**environment, "http_proxy": "http://b:2"}) is not None


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1"])
def test_all_addresses_of_this_machine_are_known(host: str) -> None:
    """Every spelling of a loopback address counts as local."""
    assert is_loopback(host)
    assert not is_loopback("10.0.0.1")
    assert not is_loopback("example.com")
