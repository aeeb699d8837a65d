"""Other lookups than that of instructor executions: workflow executions, and records of a caller's own."""

import copy
import json
import pickle
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from scripted_lives import EVERY_SECOND, at_once, now
from scripted_transport import Reply, ScriptedTransport
from virtual_time import virtual_time

from kaizen_async import (
    DeadlineExceededError,
    DecodeError,
    ExecutionStatus,
    KaizenClient,
    NotFoundError,
    Workflow,
    WorkflowExecution,
)
from kaizen_async._kinds import Kind
from kaizen_async._records.base import Record
from kaizen_async._transport.transport import Answer
from kaizen_async._transport.wire import Endpoint
from kaizen_async.testing import KaizenEmulator, Life, VirtualClock
from kaizen_async.testing import records as emulated

ENDPOINT = Endpoint("executions/get", WorkflowExecution, "execution")
FULL = (
    b'{"execution": {"id": "run_1", "workflow": {"id": "wf_1", "name": "Renew"}, "status": "Completed", '
    b'"startTime": "2026-11-23T12:00:00Z", "logins": [], "authentications": [], "contextAuthentications": [], '
    b'"name": null, "params": {"amount": 1.50, "many": 123456789012345678901234567890}, "raw": "a field of this name", '
    b'"batch": {"id": "b", "tags": ["x", "\\u00e9"]}, "attempts": 2, "liveViewUrl": null}}'
)


def wrapped(execution_id: str = "run_1", **fields: Any) -> bytes:
    """Return an answer with a record of a few fields."""
    return json.dumps({"execution": {"id": execution_id, "status": "InProgress", **fields}}).encode()


def decoded(**fields: Any) -> WorkflowExecution:
    """Return a record of a few fields."""
    return ENDPOINT.decode(wrapped(**fields), "run_1")


def test_the_known_fields_of_a_workflow_execution_are_typed() -> None:
    """As those of an instructor execution are."""
    execution = ENDPOINT.decode(FULL, "run_1")
    assert execution.status is ExecutionStatus.COMPLETED
    assert execution.workflow == Workflow("wf_1", "Renew")
    assert execution.start_time == datetime(2026, 11, 23, 12, tzinfo=UTC)


def test_a_workflow_execution_loses_nothing() -> None:
    """The JSON that came can be read byte for byte, and every field of it by its name."""
    execution = ENDPOINT.decode(FULL, "run_1")
    inner = FULL.removeprefix(b'{"execution": ').removesuffix(b"}")
    assert execution.raw == inner
    assert execution.to_dict() == json.loads(inner)
    assert execution.extra["raw"] == "a field of this name"
    assert execution.succeeded


def test_a_workflow_execution_survives_storage() -> None:
    """As a pickle and as a copy, with the fields that have no attribute."""
    execution = ENDPOINT.decode(FULL, "run_1")
    for again in (
        pickle.loads(pickle.dumps(execution)),  # noqa: S301 - our own bytes
        copy.deepcopy(execution),
        WorkflowExecution.from_dict(execution.to_dict()),
    ):
        assert again == execution
        assert hash(again) == hash(execution)
        assert again.extra["batch"] == {"id": "b", "tags": ["x", "é"]}


def test_a_change_of_a_field_without_attribute_is_not_a_change() -> None:
    """So a field that changes with every response does not make `watch` report one each time."""
    assert decoded(attempts=1) == decoded(attempts=2)


def test_a_workflow_execution_made_by_hand_has_no_other_fields() -> None:
    """There is no JSON that they could be in."""
    assert WorkflowExecution(id="run_1", status=ExecutionStatus.PAUSED).extra == {}


@pytest.mark.parametrize(
    ("fields", "is_finished"),
    [
        ({"status": "Enqueued"}, False),
        ({"status": "InProgress"}, False),
        ({"status": "Paused"}, False),
        ({"status": "Completed"}, True),
        ({"status": "Failed"}, True),
        ({"status": "Zorp"}, False),
        ({"status": "Zorp", "endTime": "2026-11-23T12:00:00Z"}, True),
        ({"status": "InProgress", "endTime": "2026-11-23T12:00:00Z"}, True),
        ({"status": "Completed", "endTime": None}, True),
    ],
    ids=str,
)
def test_a_workflow_execution_has_ended_by_its_end_time_or_status(fields: dict[str, Any], is_finished: bool) -> None:
    """A status that nobody knows is no end."""
    assert decoded(**fields).is_finished is is_finished


@pytest.mark.parametrize(
    ("fields", "duration"),
    [
        ({"durationMs": 1500}, timedelta(seconds=1.5)),
        ({"startTime": "2026-11-23T12:00:00Z", "endTime": "2026-11-23T12:01:00Z"}, timedelta(minutes=1)),
        ({"startTime": "2026-11-23T12:00:00Z"}, None),
        ({"endTime": "2026-11-23T12:01:00Z"}, None),
        ({}, None),
    ],
    ids=str,
)
def test_the_duration_of_a_workflow_execution_is_told_if_it_can_be(
    fields: dict[str, Any], duration: timedelta | None
) -> None:
    """By the server's figure, or else by its times."""
    assert decoded(**fields).duration == duration


@pytest.mark.parametrize(
    ("body", "path"),
    [
        (b'{"execution": {"id": "run_1"}}', "$.execution.status"),
        (b'{"execution": {"id": "run_1", "status": 7}}', "$.execution.status"),
        (b'{"id": "run_1", "status": "Completed"}', "$.execution"),
        (b'{"execution": {"id": "run_2", "status": "Completed"}}', "$.execution.id"),
    ],
)
def test_an_answer_that_holds_no_workflow_execution_is_refused(body: bytes, path: str) -> None:
    """With the place of the misfit, the wrapping included."""
    with pytest.raises(DecodeError) as caught:
        ENDPOINT.decode(body, "run_1")
    assert caught.value.path == path


async def test_every_verb_takes_workflow_executions(emulator: KaizenEmulator) -> None:
    """Against the emulator, which serves both kinds."""
    emulator.add("run_1", Life.ended(status="Failed"))
    async with KaizenClient(base_url=emulator.base_url) as kaizen:
        executions = kaizen.executions
        assert (await executions.get("run_1")).status == "Failed"
        found, missing = await executions.get_many(["run_1", "run_2"])
        assert found.unwrap().extra["attempts"] == 1
        assert isinstance(missing.error, NotFoundError)
        async with executions.stream(["run_1"]) as outcomes:
            assert [outcome.unwrap().id async for outcome in outcomes] == ["run_1"]
        assert (await executions.wait("run_1")).is_finished
        async with executions.wait_many(["run_1"]) as outcomes:
            assert [outcome.unwrap().id async for outcome in outcomes] == ["run_1"]
        async with executions.watch(["run_1"]) as changes:
            assert [change.after.status async for change in changes if change.after] == ["Failed"]
        assert (await kaizen.instructor_executions.get("run_1")).id == "run_1"


async def test_a_workflow_execution_is_waited_for_through_its_life() -> None:
    """Hours of it, in virtual time; the emulator tells no end time, so it is the status that ends the wait."""
    clock = VirtualClock()
    async with KaizenEmulator(clock=clock) as emulator:
        emulator.add("run_1", Life.of(("Enqueued", 0), ("InProgress", 60), ("Paused", 600), ("Completed", 7200)))
        async with KaizenClient(base_url=emulator.base_url, clock=clock) as kaizen:
            async with kaizen.executions.watch("run_1", deadline=None) as changes:
                seen = [change.after async for change in changes if change.after]
            assert [execution.status for execution in seen] == ["Enqueued", "InProgress", "Paused", "Completed"]
            assert {execution.end_time for execution in seen} == {None}
            assert 7200 <= clock.time() < 7300


@virtual_time
async def test_a_wait_under_an_unknown_status_ends_with_its_deadline() -> None:
    """Not in silence: the error has the record, and so the status."""
    transport = at_once(lambda i, _: Answer(200, {}, wrapped(i, status="Zorp")))
    async with transport.client() as kaizen:
        with pytest.raises(DeadlineExceededError) as caught:
            await kaizen.executions.wait("run_1", deadline=10, poll=EVERY_SECOND)
    assert caught.value.last_execution.status == "Zorp"
    assert now() == 10


class Brief(msgspec.Struct, frozen=True, rename="camel"):
    """Three fields of a record, of a caller's own choice."""

    id: str
    status: str
    end_time: datetime | None


class Finished(msgspec.Struct, frozen=True):
    """A record that judges for itself whether it has ended."""

    id: str
    progress: float

    @property
    def is_finished(self) -> bool:
        """Whether all is done."""
        return self.progress >= 1


async def test_a_record_of_three_fields_is_all_that_is_decoded(emulator: KaizenEmulator) -> None:
    """By every verb, waiting included: its `end_time` tells when an execution has ended."""
    emulator.add("exec_1", Life.ended(status="Completed"))
    async with KaizenClient(base_url=emulator.base_url) as kaizen:
        briefs = kaizen.lookups("instructor/executions/get", Brief)
        brief = await briefs.wait("exec_1")
        assert brief == await briefs.get("exec_1")
        assert (brief.id, brief.status) == ("exec_1", "Completed")
        assert brief.end_time is not None


class Everything(msgspec.Struct, frozen=True):
    """One typed field, and the JSON of all."""

    id: str
    raw: msgspec.Raw = msgspec.Raw()


@pytest.mark.parametrize("unwrap", [None, "execution", "not-a-python-name"])
def test_any_record_can_keep_the_json_that_it_came_in(unwrap: str | None) -> None:
    """In a field `raw`, whether or not the answer wraps it."""
    inner = b'{"id":"a",  "x": [1.0]}'
    body = inner if unwrap is None else b'{"' + unwrap.encode() + b'": ' + inner + b"}"
    record = Endpoint("path", Everything, unwrap).decode(body, "a")
    assert bytes(record.raw) == inner


def test_a_field_called_raw_of_another_type_is_a_field_like_others() -> None:
    """It holds what the server sent under that name."""

    class Coffee(msgspec.Struct):
        id: str
        raw: bool

    assert Endpoint("path", Coffee).decode(b'{"id": "a", "raw": true}', "a").raw is True


@virtual_time
async def test_a_record_may_judge_for_itself_whether_it_has_ended() -> None:
    """Its `is_finished` counts, and it needs no end time."""

    def play(execution_id: str, number: int) -> Reply:
        return Answer(200, {}, json.dumps({"id": execution_id, "progress": number / 4}).encode())

    transport = ScriptedTransport(play, latency=0)
    async with transport.client() as kaizen:
        record = await kaizen.lookups("progress/get", Finished).wait("a", poll=EVERY_SECOND)
    assert record.progress == 1
    assert transport.times == [0, 1, 2, 3]


class Method(msgspec.Struct):
    """A record whose `is_finished` would always be true, being a method."""

    id: str

    def is_finished(self) -> bool:
        """Return whether it has ended, to whoever calls."""
        return False


class Mute(msgspec.Struct):
    """A record that does not tell whether it has ended."""

    id: str


@pytest.mark.parametrize("record", [Method, Mute])
async def test_a_record_that_does_not_tell_its_end_cannot_be_waited_for(record: type[Any]) -> None:
    """It would be a wait without end, or none; looking it up is fine."""
    async with KaizenClient() as kaizen:
        executions = kaizen.lookups("path", record)
        with pytest.raises(TypeError, match=f"give {record.__name__} a field `end_time`"):
            await executions.wait("a")
        with pytest.raises(TypeError, match="or a property `is_finished`"):
            executions.watch("a")


class Preview(Record, frozen=True, gc=False, kw_only=True, omit_defaults=True):
    """The record of a third kind."""

    id: str
    status: ExecutionStatus
    end_time: datetime | None = None
    pages: int = 0


async def test_a_third_kind_is_an_entry_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulator makes up the fields that other kinds have, and a wait knows how it ends."""
    kind = Kind("previews", "previews/get", Preview, unwrap="preview")
    monkeypatch.setitem(emulated.KINDS, "/previews/get", emulated.served(kind))  # type: ignore[arg-type]
    async with KaizenEmulator() as emulator, KaizenClient(base_url=emulator.base_url) as client:
        emulator.add("p1", Life.ended())
        preview = await client.lookups(kind.path, kind.record, unwrap=kind.unwrap).wait("p1")
        assert (preview.id, preview.status, preview.pages) == ("p1", ExecutionStatus.COMPLETED, 0)
        assert preview.end_time is not None
