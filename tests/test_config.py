"""Settings and policies refuse invalid values when they are created, and say what to do."""

import math
import re
from typing import Any

import pytest

from kaizen_async import KaizenClient, RetryPolicy, __version__
from kaizen_async.config import DEFAULT_BASE_URL, RETRIED_STATUSES, require_duration, resolve_api_key, resolve_base_url


def base_url(text: str | None, environment: dict[str, str] | None = None, *, insecure: bool = False) -> str:
    """Return the resolved base URL."""
    return str(resolve_base_url(text, allow_insecure_http=insecure, environment=environment or {}))


def test_a_given_key_overrides_the_environment() -> None:
    """KAIZEN_API_KEY counts only if no key is passed. An empty variable counts as unset."""
    assert resolve_api_key("given", {"KAIZEN_API_KEY": "found"}) == "given"
    assert resolve_api_key(None, {"KAIZEN_API_KEY": "found"}) == "found"
    assert resolve_api_key(None, {"KAIZEN_API_KEY": ""}) is None
    assert resolve_api_key(None, {}) is None


@pytest.mark.parametrize(
    "key", ["", " ", "s3cr3t\n", "\ns3cr3t", "a s3cr3t", "s3cr3t\x00", "s3cr3t\x7f", "s3cr3tß", "s3cr3t\r\nX: y"]
)
def test_a_key_that_is_invalid_in_a_header_is_refused(key: str) -> None:
    """The error explains how such a key usually arises and does not show the key."""
    with pytest.raises(ValueError, match=r"use \.strip\(\)") as caught:
        resolve_api_key(key, {})
    assert "s3cr3t" not in str(caught.value)


def test_an_invalid_key_in_the_environment_is_refused() -> None:
    """A key in the environment is checked too, because a key read from a file often ends in a line break."""
    with pytest.raises(ValueError, match="line break"):
        resolve_api_key(None, {"KAIZEN_API_KEY": "key\n"})


def test_a_key_of_another_type_is_refused() -> None:
    """A key of type bytes raises a TypeError."""
    with pytest.raises(TypeError, match="api_key must be a str, not bytes"):
        resolve_api_key(b"key", {})  # type: ignore[arg-type]


def test_a_given_base_url_overrides_the_environment() -> None:
    """KAIZEN_BASE_URL counts only if no URL is passed. An empty variable counts as unset."""
    environment = {"KAIZEN_BASE_URL": "https://found.example"}
    assert base_url("https://given.example", environment) == "https://given.example/"
    assert base_url(None, environment) == "https://found.example/"
    assert base_url(None, {"KAIZEN_BASE_URL": ""}) == DEFAULT_BASE_URL
    assert base_url(None) == DEFAULT_BASE_URL


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("https://gateway.example/kaizen", "https://gateway.example/kaizen/"),
        ("https://gateway.example/kaizen/", "https://gateway.example/kaizen/"),
        ("https://gateway.example:8443/a/b", "https://gateway.example:8443/a/b/"),
        ("https://gateway.example/a%2Fb", "https://gateway.example/a%2Fb/"),
        ("https://gateway.example/a%2F", "https://gateway.example/a%2F/"),
        ("http://localhost:8080", "http://localhost:8080/"),
        ("http://127.0.0.1:8080/x", "http://127.0.0.1:8080/x/"),
        ("http://[::1]:8080", "http://[::1]:8080/"),
    ],
)
def test_a_base_url_keeps_its_path_and_ends_in_a_slash(text: str, url: str) -> None:
    """A base URL keeps its path prefix with escaped characters, and ends in a slash."""
    assert base_url(text) == url


@pytest.mark.parametrize(
    "text",
    [
        *["", "api.example", "/x", "ftp://api.example", "https://", "https://[::1", "http:x"],
        *["https://a..example", f"https://{'a' * 64}.example", "https://xn--"],
    ],
)
def test_an_invalid_url_is_refused(text: str) -> None:
    """The error for an invalid URL shows a valid one."""
    with pytest.raises(ValueError, match=re.escape(f"must be an absolute URL such as {DEFAULT_BASE_URL!r}")):
        base_url(text, {"KAIZEN_BASE_URL": "https://found.example"})


@pytest.mark.parametrize(
    "text",
    [
        "https://me@h.example",
        "https://me:pw@h.example",
        "https://:pw@h.example",
        "https://h.example/?key=s",
        "https://h.example/#x",
    ],
)
def test_a_base_url_holds_no_secrets(text: str) -> None:
    """A base URL with a user, password, query or fragment is refused, and the error does not show it."""
    with pytest.raises(ValueError, match="pass the key as api_key") as caught:
        base_url(text)
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize("host", ["api.example", "10.0.0.1", "127.0.0.1.evil.example", "0.0.0.0"])  # noqa: S104 - refused
def test_plain_http_leaves_the_machine_only_when_asked_to(host: str) -> None:
    """Plain HTTP to another machine would expose the key, so the caller has to allow it."""
    with pytest.raises(ValueError, match="allow_insecure_http=True"):
        base_url(f"http://{host}/")
    assert base_url(f"http://{host}/", insecure=True) == f"http://{host}/"


def test_a_base_url_of_another_type_is_refused() -> None:
    """A base URL of type bytes raises a TypeError."""
    with pytest.raises(TypeError, match="base_url must be a str, not bytes"):
        base_url(b"https://api.example")  # type: ignore[arg-type]


NUMBERS_OF_SECONDS = [
    ("1", TypeError),
    (None, TypeError),
    (True, TypeError),
    (math.nan, ValueError),
    (math.inf, ValueError),
    (-1, ValueError),
]


@pytest.mark.parametrize(("value", "error"), [*NUMBERS_OF_SECONDS, (0, ValueError), (0.0, ValueError)])
def test_a_duration_is_a_finite_number_above_zero(value: Any, error: type[Exception]) -> None:
    """Text, booleans, nan, infinity, zero and negative numbers are not valid durations."""
    with pytest.raises(error, match=r"^pause must be a"):
        require_duration("pause", value)


@pytest.mark.parametrize("value", [1, 0.001, 1e9])
def test_any_other_number_is_a_duration(value: float) -> None:
    """Whole and fractional numbers above zero are valid durations."""
    require_duration("pause", value)


@pytest.mark.parametrize("field", ["initial_backoff", "max_backoff"])
@pytest.mark.parametrize(("value", "error"), NUMBERS_OF_SECONDS)
def test_a_backoff_is_checked_where_the_policy_is_made(field: str, value: Any, error: type[Exception]) -> None:
    """Creating a policy with an invalid back-off raises an error that names the field."""
    with pytest.raises(error, match=f"^{field} must be a"):
        RetryPolicy(**{field: value})


def test_a_backoff_may_be_zero() -> None:
    """A back-off of zero is valid, for example in tests."""
    policy = RetryPolicy(initial_backoff=0, max_backoff=0)
    assert (policy.initial_backoff, policy.max_backoff) == (0, 0)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"max_attempts": 0}, ValueError, "max_attempts must be at least 1, not 0"),
        ({"max_attempts": 2.0}, TypeError, "max_attempts must be an int, not float"),
        ({"max_attempts": True}, TypeError, "max_attempts must be an int, not bool"),
        ({"statuses": frozenset({200})}, ValueError, "statuses must be at least 300, not 200"),
        ({"statuses": frozenset({"503"})}, TypeError, "statuses must be an int, not str"),
        ({"statuses": 503}, TypeError, r"statuses must be a frozenset, such as frozenset\(\{503\}\), not 503"),
    ],
)
def test_a_retry_policy_that_cannot_work_is_refused(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    """A policy cannot retry successful statuses, and needs at least one attempt."""
    with pytest.raises(error, match=message):
        RetryPolicy(**settings)


def test_policies_are_values() -> None:
    """Equal policies compare and hash equal, and a policy cannot be changed."""
    assert RetryPolicy() == RetryPolicy(statuses=RETRIED_STATUSES)
    assert hash(RetryPolicy(max_attempts=2)) == hash(RetryPolicy(max_attempts=2))
    with pytest.raises(AttributeError):
        RetryPolicy().max_attempts = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"concurrency": 0}, ValueError, "concurrency must be at least 1, not 0"),
        ({"concurrency": 10**11}, ValueError, "concurrency must be at most 100,000, not 100000000000"),
        ({"concurrency": "50"}, TypeError, "concurrency must be an int, not str"),
        ({"attempt_timeout": 0}, ValueError, "attempt_timeout must be a finite number of seconds above 0"),
        ({"attempt_timeout": None}, TypeError, "attempt_timeout must be a number of seconds, not NoneType"),
        ({"deadline": 0}, ValueError, "deadline must be a finite number of seconds above 0"),
        ({"deadline": math.inf}, ValueError, "deadline must be a finite number of seconds above 0"),
        ({"max_response_bytes": 0}, ValueError, "max_response_bytes must be at least 1, not 0"),
        ({"ended_records": -1}, ValueError, "ended_records must be at least 0, not -1"),
        ({"retry": 5}, TypeError, "retry must be a RetryPolicy, not int"),
        ({"poll": 5}, TypeError, "poll must be a PollPolicy, not int"),
        ({"connections": 5}, TypeError, "connections must be a ConnectionPolicy, not int"),
        ({"connection_max_age": 0}, ValueError, "connection_max_age must be a finite number of seconds above 0"),
        ({"keep_raw": "no"}, TypeError, "keep_raw must be True or False, not 'no'"),
        ({"api_key": "key\n"}, ValueError, "api_key is empty or contains whitespace"),
        ({"base_url": "http://api.example"}, ValueError, "allow_insecure_http=True"),
    ],
)
def test_an_invalid_setting_is_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    """An invalid setting raises an error when the client is created, not at the first request."""
    with pytest.raises(error, match=message):
        KaizenClient(**settings)


async def test_warm_up_checks_its_argument() -> None:
    """`warm_up` refuses an invalid number of connections."""
    async with KaizenClient("key") as client:
        with pytest.raises(ValueError, match="connections must be at least 1, not 0"):
            await client.warm_up(0)
        with pytest.raises(TypeError, match="connections must be an int, not float"):
            await client.warm_up(2.0)  # type: ignore[arg-type]


def test_a_client_needs_no_deadline() -> None:
    """A deadline of None sets no limit."""
    assert "open" in repr(KaizenClient(deadline=None))


def test_the_version_is_a_version() -> None:
    """The version, which the User-Agent and the packages use, has the form of a version."""
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z]+\d+)?", __version__)
