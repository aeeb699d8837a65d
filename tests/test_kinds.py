"""The client looks up other kinds of records: workflow executions, and record types of the caller."""

import copy
import json
import pickle
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

import click
import msgspec
import pytest
from click.testing import CliRunner
from scripted_lives import EVERY_SECOND, at_once, now
from scripted_transport import Reply, ScriptedTransport
from virtual_time import virtual_time

from kaizen_async import (
    AuthenticationStatus,
    DeadlineExceededError,
    DecodeError,
    ExecutionStatus,
    KaizenClient,
    NotFoundError,
    Workflow,
    WorkflowExecution,
)
from kaizen_async._cli.app import cli
from kaizen_async._kinds import KINDS, Kind
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
    """Return the body of a response with a record of a few fields."""
    return json.dumps({"execution": {"id": execution_id, "status": "InProgress", **fields}}).encode()


def decoded(**fields: Any) -> WorkflowExecution:
    """Return a record with a few fields."""
    return ENDPOINT.decode(wrapped(**fields), "run_1")


def test_the_known_fields_of_a_workflow_execution_are_typed() -> None:
    """The known fields of a workflow execution have the same types as those of an instructor execution."""
    execution = ENDPOINT.decode(FULL, "run_1")
    assert execution.status is ExecutionStatus.COMPLETED
    assert execution.workflow == Workflow("wf_1", "Renew")
    assert execution.start_time == datetime(2026, 11, 23, 12, tzinfo=UTC)


def test_a_workflow_execution_loses_nothing() -> None:
    """A workflow execution keeps the JSON of the response byte for byte, and gives every field by name."""
    execution = ENDPOINT.decode(FULL, "run_1")
    inner = FULL.removeprefix(b'{"execution": ').removesuffix(b"}")
    assert execution.raw == inner
    assert execution.to_dict() == json.loads(inner)
    assert execution.extra["raw"] == "a field of this name"
    assert execution.succeeded


def test_a_workflow_execution_survives_storage() -> None:
    """Pickles, copies and dictionaries of a workflow execution keep the fields that have no attribute."""
    execution = ENDPOINT.decode(FULL, "run_1")
    for again in (
        pickle.loads(pickle.dumps(execution)),  # noqa: S301 - our own bytes
        copy.deepcopy(execution),
        WorkflowExecution.from_dict(execution.to_dict()),
    ):
        assert again == execution
        assert hash(again) == hash(execution)
        assert again.extra["batch"] == {"id": "b", "tags": ["x", "é"]}


def test_fields_without_attribute_do_not_count_as_changes() -> None:
    """Records that differ only in fields without an attribute are equal, so `watch` does not report them as changes."""
    assert decoded(attempts=1) == decoded(attempts=2)


def test_a_workflow_execution_made_by_hand_has_no_other_fields() -> None:
    """A workflow execution that was not decoded from JSON has no extra fields."""
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
    """An end time or a final status marks a workflow execution as finished. An unknown status does not."""
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
def test_the_duration_of_a_workflow_execution(fields: dict[str, Any], duration: timedelta | None) -> None:
    """The duration is the server's figure, or else the difference of the times, or None."""
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
def test_a_response_without_a_workflow_execution_is_refused(body: bytes, path: str) -> None:
    """A response that does not fit raises a DecodeError with the path, which includes the wrapper."""
    with pytest.raises(DecodeError) as caught:
        ENDPOINT.decode(body, "run_1")
    assert caught.value.path == path


async def test_every_method_accepts_workflow_executions(emulator: KaizenEmulator) -> None:
    """All six methods work with workflow executions against the emulator, which serves both kinds."""
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
    """`watch` follows a workflow execution for virtual hours.

    Its status ends the wait, because the emulator sends no end time.
    """
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
    """A wait for an execution with an unknown status ends at its deadline, and the error has the last record."""
    transport = at_once(lambda i, _: Answer(200, {}, wrapped(i, status="Zorp")))
    async with transport.client() as kaizen:
        with pytest.raises(DeadlineExceededError) as caught:
            await kaizen.executions.wait("run_1", deadline=10, poll=EVERY_SECOND)
    assert caught.value.last_execution.status == "Zorp"
    assert now() == 10


class Brief(msgspec.Struct, frozen=True, rename="camel"):
    """A record type of the caller with three fields."""

    id: str
    status: str
    end_time: datetime | None


class Finished(msgspec.Struct, frozen=True):
    """A record type with its own `is_finished`."""

    id: str
    progress: float

    @property
    def is_finished(self) -> bool:
        """Whether the progress is complete."""
        return self.progress >= 1


async def test_a_record_type_may_declare_few_fields(emulator: KaizenEmulator) -> None:
    """A record type with three fields works, also for waiting, because its `end_time` says when the execution ended."""
    emulator.add("exec_1", Life.ended(status="Completed"))
    async with KaizenClient(base_url=emulator.base_url) as kaizen:
        briefs = kaizen.lookups("instructor/executions/get", Brief)
        brief = await briefs.wait("exec_1")
        assert brief == await briefs.get("exec_1")
        assert (brief.id, brief.status) == ("exec_1", "Completed")
        assert brief.end_time is not None


class Everything(msgspec.Struct, frozen=True):
    """A record type with one typed field and the JSON of the whole record."""

    id: str
    raw: msgspec.Raw = msgspec.Raw()


@pytest.mark.parametrize("unwrap", [None, "execution", "not-a-python-name"])
def test_any_record_can_keep_the_json_that_it_came_in(unwrap: str | None) -> None:
    """A record type with a field `raw` keeps its JSON, whether or not the response wraps it."""
    inner = b'{"id":"a",  "x": [1.0]}'
    body = inner if unwrap is None else b'{"' + unwrap.encode() + b'": ' + inner + b"}"
    record = Endpoint("path", Everything, unwrap).decode(body, "a")
    assert bytes(record.raw) == inner


def test_a_raw_field_of_another_type_is_an_ordinary_field() -> None:
    """A field `raw` of another type holds the value that the server sent under that name."""

    class Coffee(msgspec.Struct):
        id: str
        raw: bool

    assert Endpoint("path", Coffee).decode(b'{"id": "a", "raw": true}', "a").raw is True


@virtual_time
async def test_a_record_type_may_define_is_finished() -> None:
    """A wait uses the `is_finished` of a record type that has no end time."""

    def play(execution_id: str, number: int) -> Reply:
        return Answer(200, {}, json.dumps({"id": execution_id, "progress": number / 4}).encode())

    transport = ScriptedTransport(play, latency=0)
    async with transport.client() as kaizen:
        record = await kaizen.lookups("progress/get", Finished).wait("a", poll=EVERY_SECOND)
    assert record.progress == 1
    assert transport.times == [0, 1, 2, 3]


class Method(msgspec.Struct):
    """A record whose `is_finished` is a method, so the attribute would always be true."""

    id: str

    def is_finished(self) -> bool:
        """Return whether the execution has ended."""
        return False


class Mute(msgspec.Struct):
    """A record that does not say whether it has ended."""

    id: str


@pytest.mark.parametrize("record", [Method, Mute])
async def test_a_record_without_an_end_cannot_be_waited_for(record: type[Any]) -> None:
    """`wait` and `watch` refuse a record type that does not say when it has ended."""
    async with KaizenClient() as kaizen:
        executions = kaizen.lookups("path", record)
        with pytest.raises(TypeError, match=f"give {record.__name__} a field `end_time`"):
            await executions.wait("a")
        with pytest.raises(TypeError, match="or a property `is_finished`"):
            executions.watch("a")


class Scene(msgspec.Struct, frozen=True, rename="camel"):
    """A part of a preview."""

    title: str
    note: str = ""


class Preview(Record, frozen=True, gc=False, kw_only=True, omit_defaults=True):
    """The record of a third kind, with required fields that no other kind has."""

    id: str
    status: ExecutionStatus
    end_time: datetime | None
    pages: int
    ratio: Annotated[float, msgspec.Meta(ge=0)]
    is_draft: bool
    rendered_at: datetime
    format: Literal["pdf", "png"]
    cover: Scene
    scenes: tuple[Scene, ...]
    tags: list[str]
    sizes: dict[str, int]
    theme: Annotated[str | None, msgspec.Meta(extra={"described": False})]
    quality: AuthenticationStatus
    comment: str = ""


@pytest.fixture
def third_kind(monkeypatch: pytest.MonkeyPatch) -> Kind[Preview]:
    """Add a kind to the table, for the library, the emulator and the command."""
    kind = Kind("previews", "previews/get", Preview, unwrap="preview")
    monkeypatch.setitem(KINDS, kind.name, kind)
    monkeypatch.setitem(emulated.SERVED, f"/{kind.path}", emulated.served(kind))
    return kind


async def test_a_third_kind_is_an_entry_and_its_struct(third_kind: Kind[Preview]) -> None:
    """One entry in the table of kinds and its Struct are enough for the emulator and for a wait."""
    async with KaizenEmulator() as emulator, KaizenClient(base_url=emulator.base_url) as client:
        emulator.add("p1", Life.ended())
        preview = await client.lookups(third_kind.path, third_kind.record, unwrap=third_kind.unwrap).wait("p1")
        assert (preview.id, preview.status, preview.comment) == ("p1", ExecutionStatus.COMPLETED, "")
        assert (preview.format, preview.theme, preview.tags, preview.sizes, preview.scenes) == ("pdf", None, [], {}, ())
        assert preview.cover.title
        assert preview.end_time is not None


@pytest.mark.parametrize(
    ("verb", "form"), [("get", "table"), ("wait", "table"), ("get", "csv"), ("wait", "ndjson"), ("watch", "ndjson")]
)
def test_the_command_knows_a_third_kind(third_kind: Kind[Preview], verb: str, form: str) -> None:
    """The command reads and writes records of a third kind, which lack a workflow, a start and a duration."""
    with KaizenEmulator() as emulator:
        emulator.add("p1", Life.ended(status="Failed"))
        base_url = emulator.base_url
        (option,) = (option for option in cli.commands[verb].params if option.name == "kind")
        choices, option.type = option.type, click.Choice([*KINDS])
        try:
            ran = CliRunner().invoke(
                cli, [verb, "--kind", third_kind.name, "--format", form, "--base-url", base_url, "p1"]
            )
        finally:
            option.type = choices
    assert ran.exit_code == (0 if verb == "get" else 1), ran.output
    assert "p1" in ran.stdout
    assert "Failed" in ran.stdout
