"""Every recorded body decodes to the expected record and encodes back to the same JSON."""

import copy
import gc
import json
import pickle
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest
from json_strategies import changed

from kaizen_async import (
    Authentication,
    AuthenticationStatus,
    ContextAuthentication,
    ContextAuthenticationStatus,
    ExecutionStatus,
    InstructorExecution,
    Login,
    LoginSummary,
    Workflow,
    WorkflowExecution,
    models,
)

SAMPLES = Path(__file__).parents[1] / "samples"


def recorded(name: str) -> InstructorExecution:
    """Return the record in a sample file."""
    return msgspec.json.decode((SAMPLES / f"{name}.json").read_bytes(), type=InstructorExecution)


def with_times(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with its times parsed, because one moment can be written in several ways."""
    times = {name: record[name] and datetime.fromisoformat(record[name]) for name in ("startTime", "endTime")}
    return record | times


def decode(body: bytes) -> InstructorExecution:
    """Return the record in a body."""
    return msgspec.json.decode(body, type=InstructorExecution)


def test_the_documented_example_decodes_in_full() -> None:
    """Every field of the API reference arrives under its Python name with its Python type."""
    assert recorded("documented") == InstructorExecution(
        id="exec_9f2c1",
        workflow=Workflow("wf_17", "Renew the policy"),
        logins=(Login("login_3", "Insurer portal"),),
        authentications=(Authentication(AuthenticationStatus.IN_PROGRESS, "bs_771", "https://live.example/bs_771"),),
        context_authentications=(
            ContextAuthentication(
                "ca_5",
                LoginSummary("login_3", "Insurer portal", is_manual=True),
                ContextAuthenticationStatus.UNAUTHENTICATED,
            ),
        ),
        start_time=datetime(2023, 11, 7, 5, 31, 56, tzinfo=UTC),
        end_time=datetime(2023, 11, 7, 5, 33, 59, tzinfo=UTC),
        duration_ms=123.0,
        is_recording=True,
        browser_session_id="bs_771",
        status=ExecutionStatus.ENQUEUED,
    )


@pytest.mark.parametrize("name", ["documented", "still_running", "unknown_status", "fractional_duration"])
def test_a_record_encodes_back_to_the_json_it_came_from(name: str) -> None:
    """A record encodes back to the same JSON, with API names, null ends and unknown statuses."""
    sent = json.loads((SAMPLES / f"{name}.json").read_bytes())
    assert with_times(json.loads(msgspec.json.encode(recorded(name)))) == with_times(sent)


def test_a_running_execution_has_no_end_and_no_duration() -> None:
    """A null end time means that the execution is still running."""
    execution = recorded("still_running")
    assert not execution.is_finished
    assert execution.end_time is None
    assert execution.duration is None
    assert execution.browser_session_id is None
    assert execution.start_time == datetime(2023, 11, 7, 5, 31, 56, 125_000, tzinfo=timezone(timedelta(hours=2)))


def test_only_the_end_time_marks_an_execution_as_finished() -> None:
    """An execution is finished if it has an end time, whatever its status is."""
    assert not decode(changed(status="Completed", endTime=None)).is_finished
    assert decode(changed(status="InProgress", endTime="2023-11-07T05:31:56Z")).is_finished


@pytest.mark.parametrize(
    ("sent", "milliseconds", "duration"),
    [(12.5, 12.5, timedelta(microseconds=12_500)), (123, 123, timedelta(milliseconds=123)), (0, 0, timedelta(0))],
)
def test_a_duration_may_carry_a_fraction(sent: float, milliseconds: float, duration: timedelta) -> None:
    """`durationMs` may be a whole number or a fraction."""
    execution = decode(changed(durationMs=sent))
    assert execution.duration_ms == milliseconds
    assert type(execution.duration_ms) is type(milliseconds)
    assert execution.duration == duration


def test_unknown_fields_do_not_affect_known_fields() -> None:
    """A record with unknown fields decodes, so that old clients keep working when the API grows."""
    execution = recorded("extra_fields")
    assert execution.workflow == Workflow("wf_17", "Renew the policy")
    assert execution.logins == (Login("login_3", "Insurer portal"),)
    assert not hasattr(execution, "region")


def test_the_session_id_is_there_where_it_is_sent() -> None:
    """A record has a session id if the server sent one, and encodes `sessionId` only in that case."""
    assert recorded("extra_fields").session_id == "external-44"
    assert recorded("documented").session_id is None
    assert json.loads(msgspec.json.encode(recorded("extra_fields")))["sessionId"] == "external-44"
    assert "sessionId" not in json.loads(msgspec.json.encode(recorded("documented")))


def test_all_kinds_of_authentication_decode_and_so_does_one_yet_to_come() -> None:
    """The four documented kinds of authentication decode, and so do an unknown kind and an empty one."""
    assert recorded("every_authentication").authentications == (
        Authentication(AuthenticationStatus.IN_PROGRESS, "bs_771", "https://live.example/bs_771"),
        Authentication(AuthenticationStatus.ENQUEUED),
        Authentication(AuthenticationStatus.FINISHED, "bs_772"),
        Authentication(AuthenticationStatus.FAILED),
        Authentication(AuthenticationStatus("WaitingForTouch")),
        Authentication(),
    )


DOCUMENTED = json.loads((SAMPLES / "documented.json").read_bytes())


@pytest.mark.parametrize("name", ["id", "status", "endTime"])
def test_a_missing_required_field_is_an_error(name: str) -> None:
    """A record without a required field is refused with its name, so that it never looks as if it still ran."""
    with pytest.raises(msgspec.ValidationError, match=f"missing required field `{name}`"):
        decode(changed(**{name: ...}))


READ_IF_ABSENT = {
    "workflow": Workflow("", ""),
    "logins": (),
    "authentications": (),
    "contextAuthentications": (),
    "startTime": None,
    "durationMs": None,
    "isRecording": False,
    "browserSessionId": None,
}


def test_each_documented_field_is_decided() -> None:
    """Every documented field is either required or has a default for its absence."""
    assert {*READ_IF_ABSENT, "id", "status", "endTime"} == set(DOCUMENTED)


@pytest.mark.parametrize("name", READ_IF_ABSENT)
def test_a_missing_descriptive_field_is_empty(name: str) -> None:
    """A record without a descriptive field decodes with an empty value, and encodes that value."""
    execution = decode(changed(**{name: ...}))
    (attribute,) = (field.name for field in msgspec.structs.fields(InstructorExecution) if field.encode_name == name)
    assert getattr(execution, attribute) == READ_IF_ABSENT[name]
    assert name in json.loads(msgspec.json.encode(execution))


def test_absent_texts_of_parts_are_empty() -> None:
    """Absent texts in the parts of a record are read as empty."""
    execution = decode(changed(workflow={}, logins=[{}], authentications=[{}], contextAuthentications=[{}]))
    assert execution.workflow == Workflow("", "")
    assert execution.logins == (Login("", ""),)
    assert execution.authentications == (Authentication(None, None, None),)
    (context,) = execution.context_authentications
    assert context == ContextAuthentication("", LoginSummary("", "", is_manual=False), context.authentication_status)
    assert context.authentication_status == ""
    assert not context.authentication_status.is_known


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"id": None}, r"\$\.id"),
        ({"workflow": {"id": "wf", "name": 5}}, r"\$\.workflow\.name"),
        ({"logins": [{"id": "a", "name": "b"}, {"id": 7, "name": "b"}]}, r"\$\.logins\[1\]\.id"),
        ({"authentications": "none"}, r"\$\.authentications"),
        ({"logins": [{}] * 257}, r"\$\.logins"),
        ({"endTime": "yesterday"}, r"\$\.endTime"),
        ({"endTime": 1700000000}, r"\$\.endTime"),
        ({"durationMs": "123"}, r"\$\.durationMs"),
        ({"isRecording": 1}, r"\$\.isRecording"),
        ({"status": None}, r"\$\.status"),
        ({"status": 3}, r"\$\.status"),
    ],
    ids=str,
)
def test_a_field_of_the_wrong_type_is_an_error(fields: dict[str, Any], path: str) -> None:
    """A field of the wrong type is refused with its path, because its meaning has changed."""
    with pytest.raises(msgspec.ValidationError, match=f"`{path}`$"):
        decode(changed(**fields))


@pytest.mark.parametrize(
    ("status", "end", "succeeded"),
    [
        ("Completed", "2026-11-23T12:00:00Z", True),
        ("Failed", "2026-11-23T12:00:00Z", False),
        ("Cancelled", "2026-11-23T12:00:00Z", None),
        ("Enqueued", "2026-11-23T12:00:00Z", None),
        ("Completed", None, None),
        ("InProgress", None, None),
    ],
)
def test_succeeded_is_known_once_it_has_ended(status: str, end: str | None, succeeded: bool | None) -> None:
    """`succeeded` is None while an execution runs, and if its status does not say whether it succeeded."""
    assert decode(changed(status=status, endTime=end)).succeeded is succeeded


@pytest.mark.parametrize(
    ("status", "succeeded"), [("Completed", True), ("Failed", False), ("InProgress", None), ("Zorp", None)]
)
def test_a_workflow_execution_succeeds_by_its_status(status: str, succeeded: bool | None) -> None:
    """The status alone decides `succeeded`. The duration is the time from start to end if both are known."""
    times = {"startTime": "2026-11-23T12:00:00Z", "endTime": "2026-11-23T12:01:00Z"}
    run = msgspec.convert({"id": "a", "status": status}, WorkflowExecution)
    assert (run.succeeded, run.is_finished, run.duration) == (succeeded, succeeded is not None, None)
    ended = msgspec.convert({"id": "a", "status": status, **times}, WorkflowExecution)
    assert (ended.succeeded, ended.is_finished, ended.duration) == (succeeded, True, timedelta(minutes=1))
    assert msgspec.structs.replace(ended, duration_ms=1500).duration == timedelta(seconds=1.5)


STATUSES = pytest.mark.parametrize("enum", [ExecutionStatus, AuthenticationStatus, ContextAuthenticationStatus])


@STATUSES
@pytest.mark.parametrize("text", ["Zorp", "", "enqueued", "ENQUEUED", "UNAUTHENTICATED", "In Progress", "執行", "a\nb"])
def test_an_unknown_status_keeps_its_exact_text(enum: type[models.StatusEnum], text: str) -> None:
    """An unknown status compares, hashes, prints, pickles and encodes as its text, and is marked as unknown."""
    status = enum(text)
    assert status == text
    assert isinstance(status, enum)
    assert not status.is_known
    assert str(status) == f"{status}" == status.value == text
    assert {text: 1}[status] == 1
    assert pickle.loads(pickle.dumps(status)) == status  # noqa: S301 - our own bytes
    assert copy.deepcopy(status) == copy.copy(status) == status
    assert msgspec.json.decode(msgspec.json.encode(status), type=enum) == status
    assert repr(text) in repr(status)
    assert text not in enum.__members__ or enum[text] != text


@STATUSES
def test_a_known_status_is_the_same_object_every_time(enum: type[models.StatusEnum]) -> None:
    """A known status decodes to its enum member, which compares and hashes as its text."""
    for member in enum:
        assert enum(member.value) is member
        assert member.is_known
        assert msgspec.json.decode(msgspec.json.encode(member.value), type=enum) is member
        assert {member.value: 1}[member] == 1
        assert str(member) == member.value


def test_unknown_statuses_do_not_become_members() -> None:
    """Iterating over the enum gives only the known statuses, whatever was decoded before."""
    ExecutionStatus("Zorp")
    assert [str(status) for status in ExecutionStatus] == ["Enqueued", "InProgress", "Paused", "Completed", "Failed"]


def test_the_same_unknown_text_in_two_enums_is_two_values() -> None:
    """Each enum has its own value for the same unknown text."""
    assert type(ExecutionStatus("Zorp")) is ExecutionStatus
    assert type(AuthenticationStatus("Zorp")) is AuthenticationStatus


@pytest.mark.parametrize("value", [5, None, b"Enqueued", ["Enqueued"]])
def test_a_status_is_text(value: object) -> None:
    """A status that is not text is refused."""
    with pytest.raises(ValueError, match="is not a valid ExecutionStatus"):
        ExecutionStatus(value)


def test_an_unknown_status_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The library logs each unknown status once. It does not log a text that cannot be a status."""
    monkeypatch.setattr(models, "_unknown_members", {})
    for text in ("Zorp", "Zorp", "Zo\nrp", "Zorp"):
        models.ExecutionStatus(text)
    models.AuthenticationStatus("Zorp")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", f"unknown {name}: {text}; a newer kaizen_async may have a name for it")
        for name, text in [
            ("ExecutionStatus", "Zorp"),
            ("ExecutionStatus", "a text of 5 characters"),
            ("AuthenticationStatus", "Zorp"),
        ]
    ]


def test_a_long_unknown_status_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A very long unknown status is not kept after its record is gone."""
    monkeypatch.setattr(models, "_unknown_members", {})
    assert models.ExecutionStatus("x" * 10_000) == "x" * 10_000
    assert not models._unknown_members


def test_a_flood_of_unknown_statuses_fills_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library shares a limited number of unknown statuses. Further ones are equal but not identical."""
    monkeypatch.setattr(models, "_unknown_members", {})
    texts = [f"status {n}" for n in range(1000)]
    statuses = [ExecutionStatus(text) for text in texts]
    assert statuses == texts
    assert len(models._unknown_members) == models._UNKNOWN_LIMIT
    assert ExecutionStatus(texts[0]) is statuses[0]
    assert ExecutionStatus(texts[-1]) == statuses[-1]
    assert ExecutionStatus(texts[-1]) is not statuses[-1]


def test_a_record_cannot_be_changed_and_can_be_a_key() -> None:
    """A record cannot be changed, and it can be the key of a dictionary."""
    execution = recorded("documented")
    with pytest.raises(AttributeError):
        execution.status = ExecutionStatus.FAILED  # type: ignore[misc]
    assert hash(execution) == hash(recorded("documented"))
    assert {execution: 1}[recorded("documented")] == 1


def test_a_record_pickles_and_copies() -> None:
    """Pickles and copies of a record are equal to it."""
    execution = recorded("every_authentication")
    assert pickle.loads(pickle.dumps(execution)) == execution  # noqa: S301 - our own bytes
    assert copy.deepcopy(execution) == execution


def test_records_are_not_tracked_by_the_garbage_collector() -> None:
    """Records are not tracked, so that a million of them do not slow down garbage collection."""
    execution = recorded("documented")
    parts = [execution, execution.workflow, execution.logins[0], execution.authentications[0]]
    assert not any(gc.is_tracked(part) for part in parts)


@pytest.mark.parametrize("milliseconds", [1e20, -1e20])
def test_a_huge_duration_is_limited(sample_execution: InstructorExecution, milliseconds: float) -> None:
    """A duration that a timedelta cannot hold is limited and does not raise."""
    strange = msgspec.structs.replace(sample_execution, duration_ms=milliseconds)
    assert strange.duration is not None
    assert abs(strange.duration).days > 900_000_000
