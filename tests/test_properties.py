"""Properties that Hypothesis checks for any input: records and mutations of them, headers, statuses, errors and ids."""

import copy
import json
import pickle
from datetime import UTC, datetime, timedelta, timezone
from email.utils import format_datetime
from math import inf
from random import Random
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import fuzz_decode
import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from json_strategies import ids, json_values, mutated, records, texts, times
from multidict import CIMultiDict

from kaizen_async import DecodeError, InstructorExecution, RateLimitError, RetryPolicy, StatusError, TransportError
from kaizen_async._lookup.health import Health
from kaizen_async._lookup.retry import Retrier, State
from kaizen_async._records.tolerance import is_zero
from kaizen_async._transport.statuses import LONGEST_INSTRUCTION, is_throttling, parse_retry_after, status_error
from kaizen_async._transport.wire import Endpoint, request_body
from kaizen_async.config import RETRIED_STATUSES
from kaizen_async.errors import BODY_LIMIT, MESSAGE_LIMIT, printable
from kaizen_async.models import AuthenticationStatus, ContextAuthenticationStatus, ExecutionStatus

T = TypeVar("T")

EXECUTIONS = Endpoint("instructor/executions/get", InstructorExecution)

searched = settings(max_examples=100, deadline=None, derandomize=True, database=None)
"""Every run checks the same inputs, so that the gate never fails at random. `fuzz_decode.py` tries further inputs."""


def pickled(something: T) -> T:
    """Return a pickled copy."""
    return cast("T", pickle.loads(pickle.dumps(something)))  # noqa: S301 - our own bytes


@searched
@given(records)
def test_a_record_that_fits_decodes_and_encodes_to_the_same(record: dict[str, Any]) -> None:
    """Any valid record encodes back to the JSON that it was decoded from."""
    execution = EXECUTIONS.decode(json.dumps(record).encode(), record["id"])
    assert json.loads(msgspec.json.encode(execution)) == record
    assert EXECUTIONS.decode(msgspec.json.encode(execution), record["id"]) == execution
    assert execution.is_finished is (record["endTime"] is not None)


@searched
@given(records, st.dictionaries(texts, json_values, max_size=3))
def test_unknown_fields_change_nothing(record: dict[str, Any], unknown: dict[str, Any]) -> None:
    """A new field of the server does not change the decoded record."""
    body, more = json.dumps(record).encode(), json.dumps({**unknown, **record}).encode()
    assert fuzz_decode.decode(more, record["id"]) == fuzz_decode.decode(body, record["id"]) or set(unknown) & {
        "sessionId"
    }


@searched
@given(records)
def test_a_record_survives_copying_pickling_and_hashing(record: dict[str, Any]) -> None:
    """Copies and pickles of a record are equal to it and have the same hash."""
    execution = EXECUTIONS.decode(json.dumps(record).encode(), record["id"])
    for twin in (copy.copy(execution), copy.deepcopy(execution), pickled(execution)):
        assert twin == execution
        assert hash(twin) == hash(execution)


@searched
@given(mutated(records))
def test_a_mutated_record_is_a_record_or_a_decode_error(body: bytes) -> None:
    """Any mutated response gives a record or a DecodeError, and no other error."""
    fuzz_decode.check(body)


@searched
@given(st.binary() | json_values.map(lambda value: json.dumps(value).encode()))
@example(b"")
@example(b"null")
@example(b"\xef\xbb\xbf{}")
@example(b"[" * 100_000)
@example(b'{"id":' * 100_000)
@example(b'{"id":"exec_1","durationMs":1e400}')
@example(b'{"id":"exec_1","startTime":"2026-12-31T23:59:60Z"}')
def test_any_bytes_are_a_record_or_a_decode_error(body: bytes) -> None:
    """Any bytes give a record or a DecodeError, and no other error."""
    fuzz_decode.check(body)


@searched
@given(
    st.datetimes(datetime(2, 1, 1), datetime(9998, 1, 1)),  # noqa: DTZ001
    st.timedeltas(timedelta(hours=-23), timedelta(hours=23)),
    st.sampled_from(["T", "t", " "]),
)
def test_a_time_in_any_offset_is_the_same_moment(moment: datetime, offset: timedelta, separator: str) -> None:
    """A time with any offset in whole minutes decodes to the same moment."""
    aware = moment.replace(tzinfo=timezone(timedelta(minutes=offset // timedelta(minutes=1))))
    text = aware.isoformat().replace("T", separator)
    body = json.dumps({**json.loads(fuzz_decode.DOCUMENTED), "startTime": text}).encode()
    execution = fuzz_decode.decode(body, fuzz_decode.DOCUMENTED_ID)
    assert isinstance(execution, InstructorExecution)
    assert execution.start_time == aware


@searched
@given(times)
def test_a_time_without_an_offset_is_in_utc(text: str) -> None:
    """A time without an offset is read as UTC, so that all times of records can be compared."""
    body = json.dumps({**json.loads(fuzz_decode.DOCUMENTED), "startTime": text.removesuffix("Z")}).encode()
    execution = fuzz_decode.decode(body, fuzz_decode.DOCUMENTED_ID)
    assert isinstance(execution, InstructorExecution)
    expected = datetime.fromisoformat(text)
    assert execution.start_time == (None if is_zero(expected) else expected)


@searched
@given(texts, st.sampled_from([ExecutionStatus, AuthenticationStatus, ContextAuthenticationStatus]))
def test_any_status_keeps_its_text(text: str, enum: type[ExecutionStatus]) -> None:
    """A known or unknown status compares, prints, hashes, pickles and encodes as its text."""
    status = enum(text)
    assert status == text
    assert str(status) == f"{status}" == status.value == text
    assert hash(status) == hash(text)
    assert pickled(status) == status
    assert json.loads(msgspec.json.encode(status)) == text
    assert status.is_known is (text in list(enum.__members__.values()))


@searched
@given(ids)
def test_an_id_travels_as_it_is(execution_id: str) -> None:
    """The body of a request contains exactly the id."""
    assert json.loads(request_body(execution_id)) == {"id": execution_id}


headers = st.dictionaries(
    st.sampled_from(["Retry-After", "retry-after", "Retry-After-Ms", "Date"]),
    st.text(max_size=40)
    | st.integers(-10, 10**12).map(str)
    | st.floats().map(str)
    | st.datetimes(timezones=st.just(UTC)).map(lambda moment: format_datetime(moment, usegmt=True))
    | st.sampled_from(["nan", "inf", "-5", "1e9", "1_0", "٣", "²", "0x10", " 7 ", "9" * 5000, "Wed, 21 Oct 2015"]),
    max_size=3,
)


@searched
@given(headers, st.floats(-1e12, 1e12))
def test_a_retry_after_is_a_time_or_nothing(found: dict[str, str], now: float) -> None:
    """Any header gives a valid number of seconds or None, and never an error."""
    wait = parse_retry_after(CIMultiDict(found), now)
    assert wait is None or 0 <= wait <= LONGEST_INSTRUCTION


@searched
@given(st.integers(0, 10**10 - 1), st.floats(-1e12, 1e12))
def test_a_retry_after_in_seconds_is_that_many_up_to_a_day(wait: int, now: float) -> None:
    """A Retry-After in seconds counts up to the longest accepted time, whatever the clock says."""
    for header, seconds in (("Retry-After", wait), ("retry-after-ms", wait / 1000)):
        believed = seconds if seconds <= LONGEST_INSTRUCTION else None
        assert parse_retry_after(CIMultiDict({header: str(wait)}), now) == believed


@searched
@given(
    st.datetimes(datetime(1990, 1, 1), datetime(9000, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001
    st.integers(-(10**6), 10**9),
    st.floats(0, 1e12),
)
def test_a_retry_after_date_counts_from_the_date_header(sent: datetime, wait: int, now: float) -> None:
    """A Retry-After date counts from the Date header, whatever the clocks say. A date in the past means now."""
    sent = sent.replace(microsecond=0)
    found = {"Date": sent, "Retry-After": sent + timedelta(seconds=wait)}
    spoken = CIMultiDict({name: format_datetime(moment, usegmt=True) for name, moment in found.items()})
    assert parse_retry_after(spoken, now) == (max(0, wait) if wait <= LONGEST_INSTRUCTION else None)


@searched
@given(
    st.integers(300, 999),
    headers,
    st.binary(max_size=200)
    | json_values.map(lambda value: json.dumps(value).encode())
    | st.builds(lambda name, text: json.dumps({name: text}).encode(), st.sampled_from(["message", "error"]), st.text()),
)
def test_any_refusal_is_a_status_error(status: int, found: dict[str, str], body: bytes) -> None:
    """Any error status, headers and body give a StatusError with printable text and a short body."""
    error = status_error(status, CIMultiDict(found), body, retried=RETRIED_STATUSES, now=1.7e9)
    assert isinstance(error, StatusError)
    assert isinstance(error, RateLimitError) is (status == 429)
    assert error.retryable is (status in RETRIED_STATUSES or is_throttling(error))
    assert str(error).isprintable()
    assert len(str(error)) <= 3 * MESSAGE_LIMIT
    assert error.body == body[:BODY_LIMIT]


@searched
@given(st.text())
def test_foreign_text_becomes_printable_and_short(text: str) -> None:
    """`printable` makes any text printable and short, and keeps text that already is."""
    shown = printable(text)
    assert shown.isprintable()
    assert len(shown) <= MESSAGE_LIMIT
    assert printable(shown) == shown
    if text.isprintable() and len(text) <= MESSAGE_LIMIT:
        assert shown == text


errors = st.one_of(
    st.builds(TransportError, texts, retryable=st.booleans(), disconnected=st.booleans()),
    st.builds(StatusError, texts, status=st.integers(300, 599), body=st.binary(), retry_after=st.none() | st.floats(0)),
    st.builds(DecodeError, texts, path=st.none() | texts, body=st.binary()),
)


@searched
@given(errors, st.text(max_size=20), st.integers(0, 9))
def test_any_error_survives_pickling_and_copying(
    error: TransportError | StatusError | DecodeError, execution_id: str, attempts: int
) -> None:
    """Copies and pickles of any error have the same attributes and the same text, which begins with the id."""
    error.execution_id, error.attempts = execution_id, attempts
    for twin in (pickled(error), copy.copy(error), copy.deepcopy(error)):
        assert type(twin) is type(error)
        assert vars(twin) == vars(error)
        assert str(twin) == str(error)
    assert str(error).startswith(printable(execution_id))


@searched
@given(st.integers(1, 2000), st.floats(0, 1e6), st.floats(0, 1e6))
def test_back_off_is_bounded_under_any_policy(attempts: int, initial: float, longest: float) -> None:
    """Under any policy, the wait before an attempt is a number between 0 and max_backoff."""
    policy = RetryPolicy(initial_backoff=initial, max_backoff=longest)
    retrier = Retrier(Health(lambda: 0.0, Random(1)), Random(attempts), policy, lambda: 0.0)
    state = State(retrier._retrying, SimpleNamespace(spent=attempts, deadline_at=inf))
    state.failure = TransportError("x")
    assert 0 <= retrier._wait(state) <= longest


def test_the_fuzz_target_finds_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fuzz target fails if the decoder raises another error or returns an invalid result."""
    monkeypatch.setattr(fuzz_decode.EXECUTIONS, "_decode", lambda _: 1 / 0)
    with pytest.raises(AssertionError):
        fuzz_decode.check(b"{}")
    monkeypatch.setattr(fuzz_decode.EXECUTIONS, "_decode", lambda _: None)
    with pytest.raises(AssertionError):
        fuzz_decode.check(b"{}")


def test_the_fuzz_target_runs() -> None:
    """The fuzz target runs over a few thousand inputs, which are the same in every run."""
    assert fuzz_decode.fuzz(seconds=60, seed=1, most=4000) >= 4000
