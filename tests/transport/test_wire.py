"""The meaning of a response, decided from its bytes and headers alone."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from yarl import URL

from kaizen_async import (
    DecodeError,
    InstructorExecution,
)
from kaizen_async._transport.wire import Endpoint, request_body
from kaizen_async.errors import BODY_LIMIT, MESSAGE_LIMIT

SAMPLES = Path(__file__).parents[1] / "samples"
DOCUMENTED = (SAMPLES / "documented.json").read_bytes()
EXECUTIONS = Endpoint("instructor/executions/get", InstructorExecution)


class Slim(msgspec.Struct):
    """The smallest record that can be looked up."""

    id: str


def misfit(body: bytes, endpoint: Endpoint[Any] = EXECUTIONS, execution_id: str = "exec_9f2c1") -> DecodeError:
    """Return the error for a body that does not fit the record."""
    with pytest.raises(DecodeError) as caught:
        endpoint.decode(body, execution_id)
    return caught.value


@pytest.mark.parametrize("execution_id", ["exec_1", 'a"b\\c', "執行", "\x00\n", "x" * 5000])
def test_a_request_asks_for_the_exact_id(execution_id: str) -> None:
    """The body of a request is `{"id": …}` with the exact id."""
    assert json.loads(request_body(execution_id)) == {"id": execution_id}


@pytest.mark.parametrize("sample", sorted(path.stem for path in SAMPLES.glob("*.json") if path.stem != "wrapped"))
def test_every_recorded_body_is_a_record(sample: str) -> None:
    """Every recorded body decodes: the example, nulls, unknown statuses and fields, and fractions."""
    record = EXECUTIONS.decode((SAMPLES / f"{sample}.json").read_bytes(), "exec_9f2c1")
    assert isinstance(record, InstructorExecution)
    assert record.id == "exec_9f2c1"


def test_a_record_may_be_wrapped_in_a_field() -> None:
    """An endpoint can unwrap a record, as `/executions/get` returns `{"execution": {…}}`."""
    endpoint = Endpoint("executions/get", Slim, unwrap="execution")
    assert endpoint.decode((SAMPLES / "wrapped.json").read_bytes(), "exec_9f2c1") == Slim("exec_9f2c1")
    assert misfit(b'{"other":{"id":"exec_9f2c1"}}', endpoint).path == "$.execution"
    assert misfit(b'{"execution":{"id":5}}', endpoint).path == "$.execution.id"


@pytest.mark.parametrize(
    "path", ["", "/instructor/executions/get", "https://other.example/get", "other:get", "//other"]
)
def test_a_path_must_stay_below_the_base_url(path: str) -> None:
    """A path that is absolute, or starts with a slash, is refused, because it would leave the base URL."""
    with pytest.raises(ValueError, match="must be relative to base_url"):
        Endpoint(path, Slim)


@pytest.mark.parametrize("path", ["../get", "%2e%2e/get", "%252e%252e/get", "..;x/get", " //other/get"])
def test_a_path_that_leaves_the_base_url_is_refused(path: str) -> None:
    """A path that leaves the base URL is refused in every spelling."""
    endpoint = Endpoint(path, Slim)
    with pytest.raises(ValueError, match="path must lead to a place below base_url"):
        endpoint.url_below(URL("https://api.example/v1/"))


@pytest.mark.parametrize("unwrap", [None, "execution"])
def test_a_field_for_the_json_gets_the_json_of_the_record(unwrap: str | None) -> None:
    """A field `raw` gets the JSON of the record without its wrapper."""

    class Whole(msgspec.Struct):
        id: str
        raw: msgspec.Raw = msgspec.Raw()

    inner = b'{"id": "a", "x": 1.0}'
    body = inner + b"\n" if unwrap is None else b'{"execution": %b}' % inner
    assert bytes(Endpoint("get", Whole, unwrap).decode(body, "a").raw) == inner


@pytest.mark.parametrize("record", [dict, msgspec.defstruct("NoId", [("name", str)]), None])
def test_a_record_type_is_a_struct_with_an_id(record: Any) -> None:
    """A record type needs a field `id`, so that the client can check which record it received."""
    with pytest.raises(TypeError, match=r"must be a msgspec\.Struct type with a field `id`"):
        Endpoint("get", record)


@pytest.mark.parametrize(
    ("body", "path", "reason"),
    [
        (b'{"id":"exec_9f2c1","status":"x"}', "$.endTime", "Object missing required field `endTime`"),
        (
            DOCUMENTED.replace(b"Renew the policy", b"").replace(b'""', b"7"),
            "$.workflow.name",
            "Expected `str`, got `int`",
        ),
        (
            DOCUMENTED.replace(b'"isManual": true', b'"isManual": "yes"'),
            "$.contextAuthentications[0].loginSummary.isManual",
            'it is "yes"',
        ),
        (b"[]", "$", "Expected `object`, got `array`"),
        (b"null", "$", "Expected `object`, got `null`"),
    ],
)
def test_json_that_does_not_fit_says_where_and_is_not_retried(body: bytes, path: str, reason: str) -> None:
    """JSON that does not fit the record raises an error with its path, and is not retried."""
    error = misfit(body)
    assert error.path == path
    assert error.reason.startswith("the response does not fit the record: ")
    assert reason in error.reason
    assert error.body == body
    assert not error.retryable


@pytest.mark.parametrize("body", [b"<html>502</html>", DOCUMENTED[:100], b"{", b'{"id":}', b"\xef\xbb\xbf{", b"nope"])
def test_invalid_json_is_retryable(body: bytes) -> None:
    """Invalid JSON is retryable, because a truncated body looks like it."""
    error = misfit(body)
    assert error.reason.startswith("the response is not JSON: ")
    assert error.path is None
    assert error.body == body
    assert error.retryable


def test_an_empty_body_is_reported() -> None:
    """An empty body, as of a 204, has its own error text and is retryable."""
    error = misfit(b"")
    assert error.reason == "the response is empty"
    assert error.retryable


def test_deep_nesting_raises_a_decode_error() -> None:
    """JSON that is nested too deeply raises a DecodeError."""
    error = misfit(b'{"x":' + b"[" * 100_000)
    assert error.reason == "the response is nested too deeply"
    assert error.path == "$"
    assert not error.retryable


def test_invalid_utf8_raises_a_decode_error() -> None:
    """Invalid UTF-8 raises a DecodeError, although msgspec raises a UnicodeDecodeError."""
    error = misfit(DOCUMENTED.replace(b"Insurer", b"\xff\xfe"))
    assert error.reason.startswith("the response does not fit the record: UnicodeDecodeError: ")
    assert error.path == "$"


def test_a_hook_of_the_users_record_may_raise_anything() -> None:
    """Any error of a record's `__post_init__` becomes the DecodeError of that record."""

    class Picky(msgspec.Struct):
        id: str

        def __post_init__(self) -> None:
            raise KeyError("not this one")

    error = misfit(b'{"id":"a"}', Endpoint("get", Picky), "a")
    assert error.reason == "the response does not fit the record: KeyError: 'not this one'"


def test_the_record_of_another_id_is_refused() -> None:
    """The record of another id is refused, so that a faulty cache cannot mix up executions."""
    error = misfit(DOCUMENTED, execution_id="exec_1")
    assert error.reason == "the server returned the record of another id, 'exec_9f2c1'"
    assert error.path == "$.id"
    assert error.retryable


@pytest.mark.parametrize(
    ("asked", "repeated"),
    [
        ("3F2504E0-4F89-11D3-9A0C-0305E82C3301", "3f2504e0-4f89-11d3-9a0c-0305e82c3301"),
        ("exec_1", "Exec_1"),
        ("exec_é", "exec_e\u0301"),
        ("exec_e\u0301", "EXEC_É"),
        ("straße", "STRASSE"),
        ("exec_1", " exec_1\n"),
        ("ﬁ_1", "FI_1"),
    ],
)
def test_an_id_in_another_spelling_is_the_same_id(asked: str, repeated: str) -> None:
    """The id in a record may differ in case, Unicode normal form and surrounding white space."""
    assert Endpoint("get", Slim).decode(json.dumps({"id": repeated}).encode(), asked) == Slim(repeated)
    misfit(json.dumps({"id": repeated + "0"}).encode(), Endpoint("get", Slim), asked)


def test_a_long_value_in_a_misfit_is_cut() -> None:
    """A long value in an error text is shortened, and the path is still found."""

    class Narrow(msgspec.Struct):
        id: str
        mood: msgspec.UnsetType | int | None = None

    body = b'{"id":"a","mood":"' + b"x\n" * 50_000 + b'"}'
    error = misfit(body.replace(b"\n", b"\\n"), Endpoint("get", Narrow), "a")
    assert error.path == "$.mood"
    assert len(error.reason) < MESSAGE_LIMIT + 50
    assert len(error.body) == BODY_LIMIT


def test_an_error_does_not_keep_the_whole_body() -> None:
    """A decode error keeps no reference to the whole body through its traceback."""
    error = misfit(b"[" + b" " * 1_000_000)
    assert error.__context__ is None or error.__context__.__traceback__ is None


@pytest.mark.parametrize("unwrap", [None, "execution"])
def test_unknown_fields_of_a_response_are_ignored(unwrap: str | None) -> None:
    """Unknown fields inside and around the record are ignored."""
    body = b'{"id":"a","x":1,"execution":{"id":"a","y":[2]},"z":null}'
    assert Endpoint("get", Slim, unwrap).decode(body, "a") == Slim("a")
