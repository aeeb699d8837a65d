"""Records lose nothing: what the server sent can be read from each, and costs nothing until then."""

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
from kaizen_async._records.base import without_raw
from kaizen_async._records.tolerance import clean, parse_moment
from kaizen_async._records.weight import bytes_held
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
    """Return a record with unknown fields at every depth, of either kind."""
    if request.param == "plain":
        return EXECUTIONS.decode(SENT, "exec_9f2c1")
    return RUNS.decode(WRAPPED, "exec_9f2c1")


def each_way(record: Any) -> list[Any]:
    """Return a record, and what pickling and copying make of it."""
    return [record, pickle.loads(pickle.dumps(record)), copy.copy(record), copy.deepcopy(record)]  # noqa: S301 - our own


def test_raw_is_what_was_received(execution: InstructorExecution | WorkflowExecution) -> None:
    """Byte for byte: the whole body, or the record inside it."""
    expected = SENT if isinstance(execution, InstructorExecution) else SENT.strip()
    for record in each_way(execution):
        assert record == execution
        assert record.raw == expected


def test_to_dict_has_all_that_was_received(execution: InstructorExecution) -> None:
    """Under the API's names, with numbers as they were sent."""
    for record in each_way(execution):
        assert record.to_dict() == dict(record) == json.loads(SENT)
        assert type(record.to_dict()["durationMs"]) is int


def test_unknown_fields_can_be_read_at_every_depth(execution: InstructorExecution) -> None:
    """Without parsing by hand, after pickling and copying too."""
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
    """An absent part is read as empty. It belongs to its own record, although all absent parts are equal."""
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
    """An unknown field that changes with every response is not a change."""
    other = EXECUTIONS.decode(SENT.replace(b"1.50", b"2.50"), "exec_9f2c1")
    execution = EXECUTIONS.decode(SENT, "exec_9f2c1")
    assert other == execution
    assert hash(other) == hash(execution)
    assert repr(other) == repr(execution)
    assert other.extra != execution.extra


def test_a_record_made_by_hand_has_typed_fields_alone() -> None:
    """For tests of a user's code; it says why there is no JSON."""
    record = WorkflowExecution(id="a", status=msgspec.convert("Failed", type=Any), workflow=Workflow("w", "n"))
    assert record.extra == {}
    assert record.workflow is not None
    assert record.workflow.extra == {}
    assert record.to_dict()["workflow"] == {"id": "w", "name": "n"}
    with pytest.raises(AttributeError, match="because no lookup returned it"):
        _ = record.raw
    assert WorkflowExecution.workflow is not None


def test_a_changed_copy_has_no_raw() -> None:
    """The server did not send it."""
    execution = EXECUTIONS.decode(SENT, "exec_9f2c1")
    assert not hasattr(msgspec.structs.replace(execution, is_recording=True), "raw")


@pytest.mark.parametrize("unwrap", [None, "execution"])
def test_keep_raw_false_says_so(unwrap: str | None) -> None:
    """The bytes are freed, the typed fields stay, and nothing pretends that there were no other fields."""
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


def test_a_record_can_let_go_of_its_bytes() -> None:
    """As waits do while an execution is running; the record that was handed out keeps them."""
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
    """A record type of a user's own that has what the library's have."""

    id: str
    duration_ms: int


class Plain(msgspec.Struct):
    """One that has not."""

    id: str


def test_a_record_type_of_ones_own_can_keep_everything_too() -> None:
    """By deriving from Record. Others are unaffected."""
    brief = Endpoint("path", Brief).decode(SENT, "exec_9f2c1")
    assert brief.duration_ms == 123
    assert brief.raw == SENT
    assert brief.extra["status"] == "Completed"
    assert Endpoint("path", Plain).decode(SENT, "exec_9f2c1") == Plain("exec_9f2c1")


def test_a_body_is_kept_once() -> None:
    """Raw refers to the bytes that were read anyway."""
    bodies = [bytes(SENT) + b" " * n for n in range(300, 400)]
    EXECUTIONS.decode(bodies[0], "exec_9f2c1")
    tracemalloc.start()
    kept = [EXECUTIONS.decode(body, "exec_9f2c1") for body in bodies]
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    light = [without_raw(record) for record in kept]
    assert held < 100 * (bytes_held(light[0]) + 300)
    assert bytes_held(kept[0]) - bytes_held(light[0]) > len(bodies[0])


def test_from_dict_takes_what_to_dict_gives(execution: InstructorExecution) -> None:
    """Also with times that are Python's already; unknown fields are kept where JSON can hold them."""
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
    """Where a wrong guess is cheap; what was sent can still be read."""
    record = EXECUTIONS.decode(changed(**{name: None}), "exec_9f2c1")
    (attribute,) = (field.name for field in msgspec.structs.fields(InstructorExecution) if field.encode_name == name)
    assert getattr(record, attribute) == NULLS[name]
    assert record.to_dict()[name] is None


def test_nulls_in_parts_are_read_as_absent() -> None:
    """At every depth."""
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
    """As .NET, Go, Python, databases and people write it."""
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
    """It says "not set" in Go, .NET and MySQL."""
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
def test_a_time_that_is_none_is_refused_with_the_way_out(text: str) -> None:
    """The error names the field, what came, and what to do."""
    with pytest.raises(DecodeError) as caught:
        EXECUTIONS.decode(changed(endTime=text), "exec_9f2c1")
    assert caught.value.path == "$.endTime"
    assert f"it is {json.dumps(text)}" in caught.value.reason
    assert "kaizen.lookups('instructor/executions/get', MyStruct)" in caught.value.reason
    assert parse_moment(text) == text


def test_the_way_out_names_the_wrapping() -> None:
    """So that it can be copied."""
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
    """As JavaScript leaves them, in known and unknown fields. What is whole, or escaped itself, is left alone."""
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
    """It is part of what was received, and changes nothing."""
    body = b"\xef\xbb\xbf" + changed()
    record = EXECUTIONS.decode(body, "exec_9f2c1")
    assert record == EXECUTIONS.decode(changed(), "exec_9f2c1")
    assert record.raw == body
    assert record.to_dict() == json.loads(changed())
    assert RUNS.decode(b'\xef\xbb\xbf{"execution":%b}' % changed(), "exec_9f2c1").raw == changed()


def test_cleaning_keeps_places() -> None:
    """So a record inside a body is found where it was sent."""
    body = b'\xef\xbb\xbf{"a": "\\ud83d \xed\xa0\xbd \\\\ \\ud83d\\ude00"}'
    assert len(clean(body)) == len(body)
    assert json.loads(clean(body)) == {"a": "� � \\ 😀"}


class Moody(msgspec.Struct):
    """A record type of a user's own with times, nested in itself."""

    id: str
    seen: list[datetime] = []
    tags: list[str] = []
    parts: "list[Moody] | None" = None
    mood: str | int = ""
    end_time: datetime | None = msgspec.field(default=None, name="endTime")


def test_records_of_a_users_own_are_read_as_tolerantly() -> None:
    """Their types say where times are and what null may be left out."""
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
    """Python code that walks through megabytes would hold up the event loop."""
    body = changed(logins=None, padding="x" * 200_000)
    with pytest.raises(DecodeError, match=r"got `null` - at `\$\.logins`"):
        EXECUTIONS.decode(body, "exec_9f2c1")


def test_a_record_of_a_hostile_server_is_small() -> None:
    """Lists of empty objects, and texts that take four times their size, are refused above a limit."""
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
    """Also the one that answers from memory, and a change that is watched."""
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


def test_records_of_ones_own_are_weighed_with_all_that_is_in_them() -> None:
    """Objects and JSON that was left as it came, too. Counting ends where enough is known."""

    class Own(msgspec.Struct):
        id: str
        options: dict[str, list[str]]
        rest: msgspec.Raw

    small = Own("a", {}, msgspec.Raw(b"1"))
    assert bytes_held(Own("a", {"x": ["y" * 5000]}, msgspec.Raw(b"1"))) > bytes_held(small) + 5000
    assert bytes_held(Own("a", {"x" * 5000: []}, msgspec.Raw(b"1"))) > bytes_held(small) + 5000
    assert bytes_held(Own("a", {}, msgspec.Raw(b"1" * 5000))) > bytes_held(small) + 4900
    assert 100 < bytes_held([[n] for n in range(1000)], 100) < 10_000
