"""Statuses and headers of responses outside 2xx, and the verdicts that follow from them."""

from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from multidict import CIMultiDict

from kaizen_async import (
    AttemptTimeoutError,
    AuthenticationError,
    ClientClosedError,
    DeadlineExceededError,
    DecodeError,
    KaizenError,
    NotFoundError,
    RateLimitError,
    StatusError,
    TransportError,
)
from kaizen_async._lookup.verdicts import Verdict, verdict
from kaizen_async._transport.statuses import is_throttling, parse_retry_after, status_error
from kaizen_async.config import RETRIED_STATUSES
from kaizen_async.errors import BODY_LIMIT


def answered(
    status: int, body: bytes = b"", headers: dict[str, str] | None = None, retried: frozenset[int] = RETRIED_STATUSES
) -> StatusError:
    """Return the error for a response."""
    return status_error(status, CIMultiDict(headers or {}), body, retried=retried, now=0.0)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, StatusError),
        (401, AuthenticationError),
        (403, AuthenticationError),
        (404, NotFoundError),
        (408, StatusError),
        (409, StatusError),
        (429, RateLimitError),
        (500, StatusError),
        (503, StatusError),
        (301, StatusError),
        (799, StatusError),
    ],
)
def test_a_status_has_its_class(status: int, error: type[StatusError]) -> None:
    """Each status has its error class, and all other statuses share one."""
    made = answered(status)
    assert type(made) is error
    assert made.status == status


def test_the_policys_statuses_are_retried_and_no_others() -> None:
    """Only the statuses of the policy are retryable."""
    retried = {status for status in range(300, 600) if answered(status).retryable}
    assert retried == {408, 420, 425, 429, 500, 502, 503, 504, 507, 509, *range(520, 528), 529, 530}
    assert answered(404, retried=frozenset({404})).retryable
    assert not answered(503, retried=frozenset({404})).retryable


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (404, b"", "the server answered 404 Not Found"),
        (599, b"", "the server answered 599"),
        (500, b'{"message": "it broke"}', "the server answered 500 Internal Server Error: it broke"),
        (500, b'{"error": "it broke"}', "the server answered 500 Internal Server Error: it broke"),
        (500, b'{"message": "", "error": "it broke"}', "the server answered 500 Internal Server Error: it broke"),
        (500, b'{"message": {"text": "x"}, "error": 5}', "the server answered 500 Internal Server Error"),
        (500, b'{"message": "a\\nb"}', "the server answered 500 Internal Server Error: a�b"),
        (502, b"<html>no</html>", "the server answered 502 Bad Gateway"),
        (502, b'{"message": "\xff"}', "the server answered 502 Bad Gateway"),
        (502, b"[" * 100_000, "the server answered 502 Bad Gateway"),
        (502, b'["message"]', "the server answered 502 Bad Gateway"),
        (401, b"", "the server answered 401 Unauthorized; check api_key or KAIZEN_API_KEY"),
        (403, b'{"error":"no"}', "the server answered 403 Forbidden: no; check api_key or KAIZEN_API_KEY"),
    ],
)
def test_the_reason_has_the_servers_message(status: int, body: bytes, reason: str) -> None:
    """The reason has the server's message if the body is JSON with a message.

    HTML and empty bodies are accepted too.
    """
    error = answered(status, body)
    assert error.reason == reason
    assert error.body == body[:BODY_LIMIT]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_an_error_that_says_why(status: int) -> None:
    """A redirect is an error, because following it would send the key to another server."""
    assert "redirects are not followed" in answered(status, headers={"Location": "https://x.example"}).reason


SENT = datetime(2026, 11, 23, 12, 0, 0, tzinfo=UTC)
LATER = "Mon, 23 Nov 2026 12:00:30 GMT"


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({}, None),
        ({"Retry-After": "0"}, 0),
        ({"Retry-After": "2"}, 2),
        ({"retry-after": " 2 "}, 2),
        ({"Retry-After": "2.5"}, 2.5),
        ({"Retry-After": "3600"}, 3600),
        ({"Retry-After": "86400"}, 86_400),
        ({"Retry-After-Ms": "1500"}, 1.5),
        ({"retry-after-ms": "0.5"}, 0.0005),
        ({"Retry-After-Ms": "1500", "Retry-After": "9"}, 1.5),
        ({"Retry-After-Ms": "soon", "Retry-After": "9"}, 9),
        ({"Retry-After": LATER}, 30),
        ({"Retry-After": "Mon, 23 Nov 2026 12:00:30 -0000"}, 30),
        ({"Retry-After": "Mon, 23 Nov 2026 13:00:30 +0100"}, 30),
        ({"Retry-After": LATER, "Date": "Mon, 23 Nov 2026 12:00:10 GMT"}, 20),
        ({"Retry-After": LATER, "Date": "Fri, 23 Nov 2029 12:00:10 GMT"}, 0),
        ({"Retry-After": LATER, "Date": "nonsense"}, 30),
        ({"Retry-After": "Mon, 23 Nov 2026 11:00:00 GMT"}, 0),
    ],
)
def test_retry_after_is_read_in_every_form(headers: dict[str, str], wait: float | None) -> None:
    """Retry-After is read as seconds, milliseconds, or a date by the server's clock. A past date means now."""
    assert parse_retry_after(CIMultiDict(headers), SENT.timestamp()) == wait


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            "-1",
            "-0",
            "+5",
            "nan",
            "inf",
            "1e9",
            "0x10",
            "1_0",
            "1,5",
            ".5",
            "5.",
            "5 s",
            "soon",
            "²",
            "٣",
            "\uff11",
        ),
        *("9999999999", "99999999999", "9" * 5000, "1." + "9" * 5000, "86400001", "1795600000"),
        *("Mon, 99 Nov 2026 12:00:30 GMT", "Mon, 23 Nov 99999999999999999999 12:00:30 GMT", "2026-11-23T12:00:30Z"),
        *("Mon, 23 Nov 2026 99:00:30 GMT", "23 Nov", ",", "Mon,", "0 0 0 0 0 0", "\x00"),
    ],
)
@pytest.mark.parametrize("header", ["Retry-After", "Retry-After-Ms"])
def test_a_malformed_retry_after_is_ignored(header: str, text: str) -> None:
    """A malformed Retry-After is ignored, so it never raises and never causes an endless wait."""
    assert parse_retry_after(CIMultiDict({header: text}), SENT.timestamp()) is None


def test_any_date_that_parses_gives_a_wait_from_now() -> None:
    """A date from the standard library's formatter gives the right number of seconds."""
    for ahead in (0, 1, 86_400):
        date = format_datetime(datetime.fromtimestamp(SENT.timestamp() + ahead, UTC), usegmt=True)
        assert parse_retry_after(CIMultiDict({"Retry-After": date}), SENT.timestamp()) == ahead


def test_the_error_of_a_response_has_its_retry_after() -> None:
    """The error of a response has the Retry-After in seconds as an attribute."""
    assert answered(429, headers={"Retry-After": "3600"}).retry_after == 3600
    assert answered(503).retry_after is None


NOW = int(SENT.timestamp())


@pytest.mark.parametrize(
    ("status", "headers", "wait"),
    [
        (429, {"RateLimit-Reset": "7"}, 7),
        (429, {"X-RateLimit-Reset": "7"}, 7),
        (429, {"X-RateLimit-Reset": str(NOW + 7)}, 7),
        (429, {"X-RateLimit-Reset": str((NOW + 7) * 1000)}, 7),
        (429, {"X-Rate-Limit-Reset": str(NOW + 7)}, 7),
        (429, {"X-RateLimit-Reset": str(NOW - 7)}, 0),
        (429, {"X-RateLimit-Reset": str(NOW + 7), "Date": "Mon, 23 Nov 2026 12:00:02 GMT"}, 5),
        (429, {"X-RateLimit-Reset": str(NOW + 90_000)}, None),
        (429, {"X-RateLimit-Reset": "86401"}, None),
        (429, {"X-RateLimit-Reset": "soon"}, None),
        (429, {"RateLimit": '"default";r=0;t=7'}, 7),
        (429, {"RateLimit": '"default"; r=0; t=7'}, 7),
        (429, {"RateLimit": '"default";t=7'}, 7),
        (429, {"RateLimit": '"hour";r=50;t=3000, "second";r=0;t=7'}, 7),
        (429, {"RateLimit": '"hour";r=50;t=3000'}, None),
        (429, {"RateLimit": '"default";r=0'}, None),
        (429, {"RateLimit": "limit=100, remaining=0, reset=7"}, 7),
        (429, {"RateLimit": "Limit = 100; Remaining = 0; Reset = 7"}, 7),
        (429, {"RateLimit": '"default";r=0;t=7.5'}, None),
        (429, {"RateLimit": '"default";r=0;t=7' + " " * 1024}, None),
        (429, {"Retry-After": "2", "RateLimit-Reset": "7"}, 2),
        (429, {"Retry-After": str(NOW), "RateLimit-Reset": "7"}, 7),
        (429, {"RateLimit-Reset": "7", "RateLimit-Remaining": "3"}, None),
        (420, {"X-RateLimit-Reset": "7"}, 7),
        (529, {"RateLimit-Reset": "7"}, 7),
        (503, {"RateLimit-Reset": "7"}, None),
        (503, {"RateLimit-Reset": "7", "RateLimit-Remaining": "0"}, 7),
        (403, {"X-RateLimit-Reset": str(NOW + 7), "X-RateLimit-Remaining": "4999"}, None),
        (403, {"X-RateLimit-Reset": str(NOW + 7), "X-RateLimit-Remaining": "0"}, 7),
        (500, {"RateLimit-Reset": "7", "RateLimit-Remaining": "0"}, None),
    ],
)
def test_a_reset_is_a_time_to_wait_where_a_quota_is_exhausted(
    status: int, headers: dict[str, str], wait: float | None
) -> None:
    """If a quota is exhausted, its reset header gives the time to wait. Retry-After takes precedence."""
    error = status_error(status, CIMultiDict(headers), b"", retried=RETRIED_STATUSES, now=NOW)
    assert error.retry_after == wait


@pytest.mark.parametrize(
    ("status", "bare", "timed"),
    [
        (429, True, True),
        (420, True, True),
        (529, True, True),
        (503, False, True),
        (403, False, True),
        (509, False, True),
        (500, False, False),
        (401, False, False),
        (404, False, False),
    ],
)
def test_which_statuses_throttle(status: int, bare: bool, timed: bool) -> None:
    """Some statuses always throttle, and some only with a Retry-After."""
    for throttles, headers in ((bare, {}), (timed, {"Retry-After": "1"})):
        error = answered(status, headers=headers)
        assert is_throttling(error) is throttles
        assert (verdict(error) is Verdict.THROTTLED) is throttles
        assert error.retryable or not throttles
        assert answered(status, headers=headers, retried=frozenset()).retryable is False


def test_a_403_that_names_a_time_is_about_the_rate_and_not_the_key() -> None:
    """A 403 with a Retry-After is a RateLimitError and gives no advice about the key."""
    error = answered(403, headers={"Retry-After": "1"})
    assert isinstance(error, RateLimitError)
    assert "api_key" not in error.reason


HTML = b"<html>"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (answered(404, b'{"error": "unknown id"}'), Verdict.NOT_FOUND),
        (answered(404, b' \n{"mess'), Verdict.NOT_FOUND),
        (answered(404, HTML), Verdict.UNRELATED),
        (answered(404), Verdict.UNRELATED),
        *((answered(status, HTML), Verdict.REFUSED) for status in (401, 402, 403, 407, 511)),
        *((answered(status), Verdict.UNRELATED) for status in (301, 302, 307, 400, 405, 409, 421, 423, 501, 505)),
        *((answered(status), Verdict.FAILING) for status in (408, 425, 500, 502, 503, 504, 507, 520, 530, 599)),
        (TransportError("reset"), Verdict.FAILING),
        (AttemptTimeoutError("slow"), Verdict.FAILING),
        (TransportError("not HTTP", garbled=True), Verdict.GARBLED),
        (DecodeError("not JSON", path=None, retryable=True), Verdict.GARBLED),
        (DecodeError("another record", path="$"), Verdict.UNRELATED),
        (TransportError("certificate", retryable=False), Verdict.UNUSABLE),
        (DeadlineExceededError("late"), Verdict.NO_EVIDENCE),
        (ClientClosedError("closed"), Verdict.NO_EVIDENCE),
    ],
)
def test_each_error_has_its_verdict(error: KaizenError, expected: Verdict) -> None:
    """Each error has a verdict: it concerns the id, the pace, the server, the client, or nothing of these."""
    assert verdict(error) is expected
