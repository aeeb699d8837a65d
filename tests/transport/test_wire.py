"""What an answer means, decided from bytes and headers alone."""

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
    """The least that can be looked up."""

    id: str


def misfit(body: bytes, endpoint: Endpoint[Any] = EXECUTIONS, execution_id: str = "exec_9f2c1") -> DecodeError:
    """Return the error for a body that is no record."""
    with pytest.raises(DecodeError) as caught:
        endpoint.decode(body, execution_id)
    return caught.value


@pytest.mark.parametrize("execution_id", ["exec_1", 'a"b\\c', "執行", "\x00\n", "x" * 5000])
def test_a_request_asks_for_the_exact_id(execution_id: str) -> None:
    """The body is `{"id": …}`, whatever the id holds."""
    assert json.loads(request_body(execution_id)) == {"id": execution_id}


@pytest.mark.parametrize("sample", sorted(path.stem for path in SAMPLES.glob("*.json") if path.stem != "wrapped"))
def test_every_recorded_body_is_a_record(sample: str) -> None:
    """The documented example, null ends, unknown statuses, extra fields, any authentication, fractions."""
    record = EXECUTIONS.decode((SAMPLES / f"{sample}.json").read_bytes(), "exec_9f2c1")
    assert isinstance(record, InstructorExecution)
    assert record.id == "exec_9f2c1"


def test_a_record_may_be_wrapped_in_a_field() -> None:
    """`/executions/get` answers `{"execution": {…}}`: another endpoint is a declaration, not another engine."""
    endpoint = Endpoint("executions/get", Slim, unwrap="execution")
    assert endpoint.decode((SAMPLES / "wrapped.json").read_bytes(), "exec_9f2c1") == Slim("exec_9f2c1")
    assert misfit(b'{"other":{"id":"exec_9f2c1"}}', endpoint).path == "$.execution"
    assert misfit(b'{"execution":{"id":5}}', endpoint).path == "$.execution.id"


@pytest.mark.parametrize(
    "path", ["", "/instructor/executions/get", "https://other.example/get", "other:get", "//other"]
)
def test_a_path_must_stay_below_the_base_url(path: str) -> None:
    """A leading slash would drop the prefix of a gateway, an absolute URL would send the key elsewhere."""
    with pytest.raises(ValueError, match="must be relative to base_url"):
        Endpoint(path, Slim)


@pytest.mark.parametrize("path", ["../get", "%2e%2e/get", "%252e%252e/get", "..;x/get", " //other/get"])
def test_a_path_that_leaves_the_base_url_is_refused(path: str) -> None:
    """However it is spelled: the key would go to another place."""
    endpoint = Endpoint(path, Slim)
    with pytest.raises(ValueError, match="path must lead to a place below base_url"):
        endpoint.url_below(URL("https://api.example/v1/"))


@pytest.mark.parametrize("unwrap", [None, "execution"])
def test_a_field_for_the_json_gets_the_json_of_the_record(unwrap: str | None) -> None:
    """Without what wraps it."""

    class Whole(msgspec.Struct):
        id: str
        raw: msgspec.Raw = msgspec.Raw()

    inner = b'{"id": "a", "x": 1.0}'
    body = inner + b"\n" if unwrap is None else b'{"execution": %b}' % inner
    assert bytes(Endpoint("get", Whole, unwrap).decode(body, "a").raw) == inner


@pytest.mark.parametrize("record", [dict, msgspec.defstruct("NoId", [("name", str)]), None])
def test_a_record_type_is_a_struct_with_an_id(record: Any) -> None:
    """Without the id nobody could tell whose record was answered."""
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
    """The server means what it says; the same request would bring the same answer."""
    error = misfit(body)
    assert error.path == path
    assert error.reason.startswith("the response does not fit the record: ")
    assert reason in error.reason
    assert error.body == body
    assert not error.retryable


@pytest.mark.parametrize("body", [b"<html>502</html>", DOCUMENTED[:100], b"{", b'{"id":}', b"\xef\xbb\xbf{", b"nope"])
def test_what_is_no_json_may_be_the_transfers_fault(body: bytes) -> None:
    """A body cut off on its way looks like this, so it is worth another attempt."""
    error = misfit(body)
    assert error.reason.startswith("the response is not JSON: ")
    assert error.path is None
    assert error.body == body
    assert error.retryable


def test_an_empty_body_is_called_empty() -> None:
    """A 204, say."""
    error = misfit(b"")
    assert error.reason == "the response is empty"
    assert error.retryable


def test_nesting_beyond_reason_is_an_error_like_any_other() -> None:
    """A decoder that runs out of stack costs one record."""
    error = misfit(b'{"x":' + b"[" * 100_000)
    assert error.reason == "the response is nested too deeply"
    assert error.path == "$"
    assert not error.retryable


def test_invalid_utf8_is_an_error_like_any_other() -> None:
    """The decoder raises no error of its own family for it."""
    error = misfit(DOCUMENTED.replace(b"Insurer", b"\xff\xfe"))
    assert error.reason.startswith("the response does not fit the record: UnicodeDecodeError: ")
    assert error.path == "$"


def test_a_hook_of_the_users_record_may_raise_anything() -> None:
    """Whatever a `__post_init__` raises becomes the error of that one record."""

    class Picky(msgspec.Struct):
        id: str

        def __post_init__(self) -> None:
            raise KeyError("not this one")

    error = misfit(b'{"id":"a"}', Endpoint("get", Picky), "a")
    assert error.reason == "the response does not fit the record: KeyError: 'not this one'"


def test_the_record_of_another_id_is_refused() -> None:
    """A mixed-up cache in between must not pass one execution off as another."""
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
    """Servers change the case, the Unicode normal form, and the space around an id."""
    assert Endpoint("get", Slim).decode(json.dumps({"id": repeated}).encode(), asked) == Slim(repeated)
    misfit(json.dumps({"id": repeated + "0"}).encode(), Endpoint("get", Slim), asked)


def test_a_long_value_in_a_misfit_is_cut() -> None:
    """Enum errors of msgspec echo what the server sent; a message stays a line, and the path is still found."""

    class Narrow(msgspec.Struct):
        id: str
        mood: msgspec.UnsetType | int | None = None

    body = b'{"id":"a","mood":"' + b"x\n" * 50_000 + b'"}'
    error = misfit(body.replace(b"\n", b"\\n"), Endpoint("get", Narrow), "a")
    assert error.path == "$.mood"
    assert len(error.reason) < MESSAGE_LIMIT + 50
    assert len(error.body) == BODY_LIMIT


def test_an_error_does_not_hold_on_to_the_whole_body() -> None:
    """A million refused megabytes must not stay in memory by way of a traceback."""
    error = misfit(b"[" + b" " * 1_000_000)
    assert error.__context__ is None or error.__context__.__traceback__ is None


@pytest.mark.parametrize("unwrap", [None, "execution"])
def test_unknown_fields_of_an_answer_are_ignored(unwrap: str | None) -> None:
    """Inside and around the record."""
    body = b'{"id":"a","x":1,"execution":{"id":"a","y":[2]},"z":null}'
    assert Endpoint("get", Slim, unwrap).decode(body, "a") == Slim("a")
