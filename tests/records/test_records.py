"""Records keep everything that the server sent, at no cost until it is read."""

import asyncio
import copy
import json
import pickle
import tracemalloc
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest
from json_strategies import changed

from kaizen_async import (
    DecodeError,
    InstructorExecution,
    KaizenClient,
    Record,
    Workflow,
    WorkflowExecution,
)
from kaizen_async._records.base import bytes_held, without_raw
from kaizen_async._records.tolerance import clean, parse_moment
from kaizen_async._transport.wire import LARGE_BODY, Endpoint
from kaizen_async.testing import KaizenEmulator, Life

SAMPLES = Path(__file__).parents[1] / "samples"
EXECUTIONS = Endpoint("instructor/executions/get", InstructorExecution)
RUNS = Endpoint("executions/get", WorkflowExecution, "execution")

SENT = (
    b' {"id": "exec_9f2c1",\t"status":"Completed","endTime":"2026-11-23T12:00:00Z", "durationMs": 123,\n'
    b'"workflow":{"id":"wf_17","name":"Renew","version":{"major":2}},"logins":[{"id":"l","name":"n","kind":"sso"}],'
    b'"authentications":[{"status":"Failed","error":"no"},{"status":"Failed","error":"again no"}],'
    b'"contextAuthentications":[{"loginSummary":{"loginId":"l","tries":3},"since":1}],'
    b'"params":{"amount":1.50},"error":null} '
)
WRAPPED = b'{"a": {}, "execution":' + SENT + b', "z": 1}'


@pytest.fixture(params=["plain", "wrapped"])
def execution(request: pytest.FixtureRequest) -> InstructorExecution | WorkflowExecution:
    """Return a record of either kind, with unknown fields at every depth."""
    if request.param == "plain":
        return EXECUTIONS.decode(SENT, "exec_9f2c1")
    return RUNS.decode(WRAPPED, "exec_9f2c1")


def each_way(record: Any) -> list[Any]:
    """Return a record, its pickled copy, its copy and its deep copy."""
    return [record, pickle.loads(pickle.dumps(record)), copy.copy(record), copy.deepcopy(record)]  # noqa: S301 - our own


def test_raw_holds_the_received_bytes(execution: InstructorExecution | WorkflowExecution) -> None:
    """`raw` holds the received bytes: the whole body, or the record inside it."""
    expected = SENT if isinstance(execution, InstructorExecution) else SENT.strip()
    for record in each_way(execution):
        assert record == execution
        assert record.raw == expected


def test_to_dict_has_all_that_was_received(execution: InstructorExecution) -> None:
    """`to_dict` returns all received fields under the API's names, with numbers as the server sent them."""
    for record in each_way(execution):
        assert record.to_dict() == dict(record) == json.loads(SENT)
        assert type(record.to_dict()["durationMs"]) is int


def test_unknown_fields_can_be_read_at_every_depth(execution: InstructorExecution) -> None:
    """`extra` returns the unknown fields at every depth, also after pickling and copying."""
    for record in each_way(execution):
        assert record.extra == {"params": {"amount": 1.5}, "error": None}
        for workflow in each_way(record.workflow):
            assert workflow.extra == {"version": {"major": 2}}
            assert workflow.to_dict() == {"id": "wf_17", "name": "Renew", "version": {"major": 2}}
        assert [login.extra for login in record.logins] == [{"kind": "sso"}]
        assert [one.extra for one in record.authentications] == [{"error": "no"}, {"error": "again no"}]
        (context,) = record.context_authentications
        assert context.extra == {"since": 1}
        assert context.login_summary.extra == {"tries": 3}


@pytest.mark.parametrize("absent", [{}, {"workflow": None, "contextAuthentications": [{"loginSummary": None}]}])
def test_absent_parts_have_no_unknown_fields(absent: dict[str, Any]) -> None:
    """An absent part is empty. It belongs to its own record, although all absent parts are equal."""
    fields = {"id": "exec_9f2c1", "status": "Completed", "endTime": None, "contextAuthentications": [{}], **absent}
    body = json.dumps(fields).encode()
    for endpoint in (Endpoint("path", InstructorExecution, keep_raw=False), EXECUTIONS):
        record = endpoint.decode(body, "exec_9f2c1")
        for part in (record.workflow, record.context_authentications[0].login_summary):
            if endpoint is EXECUTIONS:
                assert part.extra == part.to_dict() == {}
            else:
                with pytest.raises(AttributeError, match="keep_raw=False"):
                    _ = part.extra
        assert record.workflow is record.workflow


def test_typed_fields_alone_make_records_equal() -> None:
    """Only typed fields count for equality, so a changing unknown field is not a change."""
    other = EXECUTIONS.decode(SENT.replace(b"1.50", b"2.50"), "exec_9f2c1")
    execution = EXECUTIONS.decode(SENT, "exec_9f2c1")
    assert other == execution
    assert hash(other) == hash(execution)
    assert repr(other) == repr(execution)
    assert other.extra != execution.extra


def test_a_record_made_by_hand_has_typed_fields_alone() -> None:
    """A record made by hand, for example in a user's test, has only typed fields, and its error says why."""
    record = WorkflowExecution(id="a", status=msgspec.convert("Failed", type=Any), workflow=Workflow("w", "n"))
    assert record.extra == {}
    assert record.workflow is not None
    assert record.workflow.extra == {}
    assert record.to_dict()["workflow"] == {"id": "w", "name": "n"}
    with pytest.raises(AttributeError, match="because no lookup returned it"):
        _ = record.raw
    assert WorkflowExecution.workflow is not None


def test_a_changed_copy_has_no_raw() -> None:
    """A changed copy has no `raw`, because the server did not send it."""
    execution = EXECUTIONS.decode(SENT, "exec_9f2c1")
    assert not hasattr(msgspec.structs.replace(execution, is_recording=True), "raw")


@pytest.mark.parametrize("unwrap", [None, "execution"])
def test_keep_raw_false_says_so(unwrap: str | None) -> None:
    """With keep_raw=False the bytes are freed, and reading `raw` or `extra` raises an error that says so."""
    endpoint = Endpoint("path", InstructorExecution, unwrap, keep_raw=False)
    record = endpoint.decode(SENT if unwrap is None else WRAPPED, "exec_9f2c1")
    for one in each_way(record):
        with pytest.raises(AttributeError, match="not kept: the client was created with keep_raw=False"):
            _ = one.raw
        for part in (one, one.workflow, one.logins[0]):
            with pytest.raises(AttributeError, match="keep_raw=False"):
                _ = part.extra
        assert one.to_dict()["durationMs"] == 123
        assert "params" not in one.to_dict()


def test_a_record_can_drop_its_bytes() -> None:
    """A copy without its bytes serves waits for running executions. The original record keeps its bytes."""
    execution = EXECUTIONS.decode(SENT, "exec_9f2c1")
    light = without_raw(execution)
    weight = bytes_held(light)
    assert light == execution
    assert execution.raw == SENT
    assert execution.workflow.extra
    assert bytes_held(light) == weight
    with pytest.raises(AttributeError, match="not kept: waits keep it only for executions that have ended"):
        _ = without_raw(execution).workflow.extra
    with pytest.raises(AttributeError, match="not kept: waits keep it only for executions that have ended"):
        _ = light.raw
    assert without_raw(light) is light
    assert without_raw(5) == 5


class Brief(Record, frozen=True, gc=False):
    """A record type of the caller that derives from Record."""

    id: str
    duration_ms: int


class Plain(msgspec.Struct):
    """A record type that does not derive from Record."""

    id: str


def test_a_record_subclass_keeps_everything() -> None:
    """A record type that derives from Record keeps its JSON. Other record types are unaffected."""
    brief = Endpoint("path", Brief).decode(SENT, "exec_9f2c1")
    assert brief.duration_ms == 123
    assert brief.raw == SENT
    assert brief.extra["status"] == "Completed"
    assert Endpoint("path", Plain).decode(SENT, "exec_9f2c1") == Plain("exec_9f2c1")


def test_a_body_is_kept_once() -> None:
    """`raw` refers to the received bytes and does not copy them."""
    bodies = [bytes(SENT) + b" " * n for n in range(300, 400)]
    EXECUTIONS.decode(bodies[0], "exec_9f2c1")
    tracemalloc.start()
    kept = [EXECUTIONS.decode(body, "exec_9f2c1") for body in bodies]
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    light = [without_raw(record) for record in kept]
    assert held < 100 * (bytes_held(light[0]) + 300)
    assert bytes_held(kept[0]) - bytes_held(light[0]) > len(bodies[0])


def test_from_dict_reverses_to_dict(execution: InstructorExecution) -> None:
    """`from_dict` accepts the result of `to_dict`, and also Python times and unknown fields."""
    cls = type(execution)
    fields = execution.to_dict()
    again = cls.from_dict(fields)
    assert again == execution
    assert again.extra == execution.extra
    assert cls.from_dict({**fields, "endTime": execution.end_time}) == execution
    assert cls.from_dict({**fields, "unknown": object()}) == execution
    with pytest.raises(ValueError, match=r"\$\.status"):
        cls.from_dict({**fields, "status": 5})


NULLS = {
    "workflow": Workflow("", ""),
    "logins": (),
    "authentications": (),
    "contextAuthentications": (),
    "isRecording": False,
    "startTime": None,
}


@pytest.mark.parametrize("name", NULLS)
def test_null_is_read_as_absent(name: str) -> None:
    """A null in a descriptive field is read as absent, and `to_dict` still returns the null."""
    record = EXECUTIONS.decode(changed(**{name: None}), "exec_9f2c1")
    (attribute,) = (field.name for field in msgspec.structs.fields(InstructorExecution) if field.encode_name == name)
    assert getattr(record, attribute) == NULLS[name]
    assert record.to_dict()[name] is None


def test_nulls_in_parts_are_read_as_absent() -> None:
    """A null in a part of a record is read as absent at every depth."""
    parts = [{"contextAuthenticationId": None, "loginSummary": {"name": None, "isManual": None, "loginId": "l"}}]
    body = changed(workflow={"id": "w", "name": None}, contextAuthentications=parts, logins=[{"id": None}])
    record = EXECUTIONS.decode(body, "exec_9f2c1")
    assert record.workflow == Workflow("w", "")
    assert record.context_authentications[0].login_summary.login_id == "l"
    assert record.logins[0].id == ""


MOMENTS = {
    "2023-11-07T05:31:56.1234567Z": datetime(2023, 11, 7, 5, 31, 56, 123457, UTC),
    "2023-11-07T05:31:56,5Z": datetime(2023, 11, 7, 5, 31, 56, 500000, UTC),
    "2023-11-07T05:31:56": datetime(2023, 11, 7, 5, 31, 56, tzinfo=UTC),
    "2023-11-07 05:31:56.5": datetime(2023, 11, 7, 5, 31, 56, 500000, UTC),
    "2023-11-07T05:31": datetime(2023, 11, 7, 5, 31, tzinfo=UTC),
    "2023-11-07T05:31Z": datetime(2023, 11, 7, 5, 31, tzinfo=UTC),
    "2023-11-07T05:31:56 UTC": datetime(2023, 11, 7, 5, 31, 56, tzinfo=UTC),
    "2023-11-07T05:31:56+02": datetime(2023, 11, 7, 5, 31, 56, tzinfo=timezone(timedelta(hours=2))),
    "2023-11-07": datetime(2023, 11, 7, tzinfo=UTC),
    "2016-12-31T23:59:60Z": datetime(2017, 1, 1, tzinfo=UTC),
    "2016-12-31T23:59:60.5Z": datetime(2017, 1, 1, 0, 0, 0, 500000, UTC),
    "2023-12-31T24:00:00Z": datetime(2024, 1, 1, tzinfo=UTC),
    "2023-12-31T24:00:00.000+01:00": datetime(2024, 1, 1, tzinfo=timezone(timedelta(hours=1))),
}


@pytest.mark.parametrize("text", MOMENTS)
@pytest.mark.parametrize("field", ["startTime", "endTime"])
def test_a_time_is_read_in_every_form_that_has_one_meaning(text: str, field: str) -> None:
    """Times are read in the forms that .NET, Go, Python, databases and people write."""
    record = EXECUTIONS.decode(changed(**{field: text}), "exec_9f2c1")
    assert (record.start_time if field == "startTime" else record.end_time) == MOMENTS[text]
    assert record.is_finished


@pytest.mark.parametrize(
    "text",
    [
        "0001-01-01T00:00:00Z",
        "0001-01-01T00:00:00.0000000Z",
        "0001-01-01T00:00:00",
        "0001-01-01",
        "0001-01-01T00:00:00+01:00",
        "0000-00-00 00:00:00",
        "0000-00-00T00:00:00Z",
    ],
)
def test_a_zero_time_is_not_an_end(text: str) -> None:
    """A zero time means "not set" in Go, .NET and MySQL, so it is not an end."""
    record = EXECUTIONS.decode(changed(startTime=text, endTime=text), "exec_9f2c1")
    assert record.start_time is None
    assert EXECUTIONS.decode(changed(startTime=text), "exec_9f2c1").start_time is None
    assert record.end_time is None
    assert not record.is_finished
    run = RUNS.decode(b'{"execution":%b}' % changed(endTime=text, status="InProgress"), "exec_9f2c1")
    assert not run.is_finished


@pytest.mark.parametrize(
    "text",
    [
        "yesterday",
        "",
        "2023-11-07T25:00:00Z",
        "2023-11-07T24:00:01Z",
        "2023-11-07T05:60:00Z",
        "2023-11-07T05:31:61Z",
        "2023-02-30T00:00:00Z",
        "9999-12-31T24:00:00Z",
        "07/11/2023",
        "2023-11-07T05:31:56Z[UTC]",
    ],
)
def test_an_invalid_time_is_refused(text: str) -> None:
    """The error for an invalid time names the field, the value and the way to read the record."""
    with pytest.raises(DecodeError) as caught:
        EXECUTIONS.decode(changed(endTime=text), "exec_9f2c1")
    assert caught.value.path == "$.endTime"
    assert f"it is {json.dumps(text)}" in caught.value.reason
    assert "kaizen.lookups('instructor/executions/get', MyStruct)" in caught.value.reason
    assert parse_moment(text) == text


def test_the_suggested_lookup_names_the_wrapper() -> None:
    """The lookup that an error suggests includes `unwrap`, so that it can be copied."""
    with pytest.raises(DecodeError, match=r"kaizen\.lookups\('executions/get', MyStruct, unwrap='execution'\)"):
        RUNS.decode(b'{"execution":{"id":"exec_9f2c1"}}', "exec_9f2c1")


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        (rb"Renew \ud83d", "Renew �"),
        (rb"\ude00 Renew", "� Renew"),
        (rb"\ud83d\ud83d\ude00", "�😀"),
        (rb"\ud83d\u0041", "�A"),
        (rb"\\ud83d", r"\ud83d"),
        (rb"\\\ud83d\"", '\\�"'),
        (b"\xed\xa0\xbd", "�"),
    ],
)
@pytest.mark.parametrize("place", [b"Renew the policy", b"wf_17", b"somewhere"])
def test_half_surrogates_are_read(sent: bytes, read: str, place: bytes) -> None:
    """Lone surrogates are replaced in known and unknown fields. Complete pairs and escaped text stay unchanged."""
    documented = (SAMPLES / "documented.json").read_bytes().replace(b'{\n  "id"', b'{"place": "somewhere", "id"', 1)
    body = documented.replace(place, sent)
    assert body != documented
    record = EXECUTIONS.decode(body, "exec_9f2c1")
    run = RUNS.decode(b'{"execution":%b}' % body.strip(), "exec_9f2c1")
    assert run.raw == body.strip()
    for one in (record, run):
        texts = {one.workflow.name, one.workflow.id, one.extra["place"]}
        assert read in texts
    assert record.raw == body


def test_a_byte_order_mark_is_ignored() -> None:
    """A byte order mark is ignored when decoding and kept in `raw`."""
    body = b"\xef\xbb\xbf" + changed()
    record = EXECUTIONS.decode(body, "exec_9f2c1")
    assert record == EXECUTIONS.decode(changed(), "exec_9f2c1")
    assert record.raw == body
    assert record.to_dict() == json.loads(changed())
    assert RUNS.decode(b'\xef\xbb\xbf{"execution":%b}' % changed(), "exec_9f2c1").raw == changed()


def test_cleaning_keeps_offsets() -> None:
    """Cleaning a body keeps its length, so that the offsets of a record in it stay valid."""
    body = b'\xef\xbb\xbf{"a": "\\ud83d \xed\xa0\xbd \\\\ \\ud83d\\ude00"}'
    assert len(clean(body)) == len(body)
    assert json.loads(clean(body)) == {"a": "� � \\ 😀"}


class Moody(msgspec.Struct):
    """A nested record type of the caller with times."""

    id: str
    seen: list[datetime] = []
    tags: list[str] = []
    parts: "list[Moody] | None" = None
    mood: str | int = ""
    end_time: datetime | None = msgspec.field(default=None, name="endTime")


def test_records_of_a_users_own_are_read_as_tolerantly() -> None:
    """Record types of the caller accept the same forms of times and nulls."""
    parts = b'[{"id":"b","seen":null,"endTime":"0001-01-01T00:00:00"}]'
    body = b'{"id":"a","seen":["2023-11-07"],"parts":%b,"mood":null,"tags":null}' % parts
    record = Endpoint("get", Moody).decode(body, "a")
    assert record == Moody("a", [datetime(2023, 11, 7, tzinfo=UTC)], parts=[Moody("b")])
    with pytest.raises(
        DecodeError, match=r"does not fit the record: Expected `object`, got `int` - at `\$\.parts\[0\]`"
    ):
        Endpoint("get", Moody).decode(b'{"id":"a","seen":["2023-11-07"],"parts":[5]}', "a")
    with pytest.raises(DecodeError, match=r"Expected `array`, got `int` - at `\$\.seen`; it is 5"):
        Endpoint("get", Moody).decode(b'{"id":"a","seen":5}', "a")


def test_a_large_body_is_not_repaired() -> None:
    """A large body is not repaired, because that would block the event loop."""
    body = changed(logins=None, padding="x" * 200_000)
    with pytest.raises(DecodeError, match=r"got `null` - at `\$\.logins`"):
        EXECUTIONS.decode(body, "exec_9f2c1")


def test_a_record_of_a_hostile_server_is_small() -> None:
    """Records with too many parts or too much text are refused, so that a record stays small."""
    with pytest.raises(DecodeError, match="length <= 256"):
        EXECUTIONS.decode(changed(authentications=[{}] * 170_000), "exec_9f2c1")
    wide = [{"id": "😀" + "x" * 400} for _ in range(200)]
    with pytest.raises(DecodeError, match="take more than 262144 bytes"):
        EXECUTIONS.decode(json.dumps(changed and {**json.loads(changed()), "logins": wide}).encode(), "exec_9f2c1")
    many = changed(
        authentications=[{}] * 256, logins=[{}] * 256, contextAuthentications=[{}] * 256, workflow={"name": "😀" * 2000}
    )
    assert len(many) < LARGE_BODY
    assert bytes_held(without_raw(EXECUTIONS.decode(many, "exec_9f2c1"))) < 64 * 1024


async def test_every_method_gives_records_with_all_that_was_sent(emulator: KaizenEmulator) -> None:
    """Every method returns records with all received fields, also from memory and in watched changes."""
    emulator.add("exec_1", Life.ended(status="Completed"), record={"params": {"n": 1}})
    async with KaizenClient(base_url=emulator.base_url) as kaizen:
        executions = kaizen.instructor_executions
        records = [await executions.get("exec_1"), (await executions.get_many(["exec_1"]))[0].unwrap()]
        async with executions.stream(["exec_1"]) as outcomes:
            records += [outcome.unwrap() async for outcome in outcomes]
        async with executions.watch("exec_1") as changes:
            records += [change.after async for change in changes if change.after]
        records.append(await executions.wait("exec_1"))
        async with executions.wait_many(["exec_1"]) as outcomes:
            records += [outcome.unwrap() async for outcome in outcomes]
        records += await asyncio.gather(executions.get("exec_1"), executions.get("exec_1"))
    assert len(records) == 8
    for record in records:
        assert json.loads(record.raw)["params"] == record.extra["params"] == {"n": 1}
    async with KaizenClient(base_url=emulator.base_url, keep_raw=False) as kaizen:
        assert not hasattr(await kaizen.instructor_executions.wait("exec_1"), "raw")
        assert not hasattr(await kaizen.executions.get("exec_1"), "raw")


def test_the_size_of_a_record_includes_nested_values() -> None:
    """The measured size of a record includes nested objects and raw JSON. Measuring stops at its limit."""

    class Own(msgspec.Struct):
        id: str
        options: dict[str, list[str]]
        rest: msgspec.Raw

    small = Own("a", {}, msgspec.Raw(b"1"))
    assert bytes_held(Own("a", {"x": ["y" * 5000]}, msgspec.Raw(b"1"))) > bytes_held(small) + 5000
    assert bytes_held(Own("a", {"x" * 5000: []}, msgspec.Raw(b"1"))) > bytes_held(small) + 5000
    assert bytes_held(Own("a", {}, msgspec.Raw(b"1" * 5000))) > bytes_held(small) + 4900
    assert 100 < bytes_held([[n] for n in range(1000)], 100) < 10_000
