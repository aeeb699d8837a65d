"""The JSON that the emulator sends: every documented field, made up from the id and the seed."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from hashlib import blake2b
from typing import Any, Final, NamedTuple, cast

import msgspec
from msgspec import inspect

from kaizen_async._kinds import KINDS, Kind
from kaizen_async.models import InstructorExecution, WorkflowExecution
from kaizen_async.testing.checks import check_type
from kaizen_async.testing.lives import Life, reached

Record = dict[str, Any]


def _plain(value: object) -> object:
    """Return a date and time of a class such as freezegun's FakeDatetime in the form that JSON gets."""
    if isinstance(value, (date, time)):
        return value.isoformat().removesuffix("+00:00") + "Z" * value.isoformat().endswith("+00:00")
    raise TypeError(f"{type(value).__name__} does not fit into JSON: {value!r:.100}")


_encode: Final = msgspec.json.Encoder(enc_hook=_plain).encode


class Snapshot(NamedTuple):
    """An execution at one moment."""

    id: str
    digest: str
    """32 hexadecimal digits of its own, from which the rest is made up."""
    status: str
    start: datetime
    duration_ms: int | None
    """None while it lives."""
    authentications: tuple[str, ...]
    """Their scripted statuses; empty if there is no script."""
    fields: Record
    """What the life sets itself."""

    @classmethod
    def of(cls, execution_id: str, life: Life, *, digest: str, start: datetime, age: float) -> "Snapshot":
        """Return what a life that began at `start` has come to after `age` seconds."""
        duration = life.duration
        return cls(
            execution_id,
            digest,
            life.status_at(age),
            start,
            None if duration is None or age < duration else round(duration * 1000),
            tuple(reached(steps, age) for steps in life.authentications) if life.authentications else (),
            life.fields_at(age),
        )


@dataclass(frozen=True, slots=True)
class Changes:
    """What a user wants otherwise in the record of one execution."""

    fields: Mapping[str, Any]
    without: tuple[str, ...]
    body: bytes | None

    @classmethod
    def checked(
        cls,
        workflow: str | Mapping[str, Any] | None,
        record: Mapping[str, Any] | None,
        without: Iterable[str],
        body: bytes | None,
    ) -> "Changes | None":
        """Return the changes, None if there are none; refuse what JSON cannot hold."""
        if isinstance(without, str):
            raise TypeError(f"without takes a list of field names: without=[{without!r}]")
        if body is not None:
            check_type("body", body, bytes, "encode it first; record= takes fields")
        check_type("record", record or {}, Mapping, 'give fields such as {"sessionId": "s"}')
        fields = dict(record or {})
        if workflow is not None:
            fields["workflow"] = _named("wf", workflow) if isinstance(workflow, str) else workflow
        changes = cls(msgspec.json.decode(_encode(fields), type=Record), tuple(without), body)
        return changes if changes.fields or changes.without or body is not None else None

    def apply(self, record: Record) -> Record:
        """Return the record with the changes."""
        return {name: value for name, value in {**record, **self.fields}.items() if name not in self.without}


class ServedKind(NamedTuple):
    """A kind of lookup: how its record is made, and under which name the response wraps it, if under one."""

    build: Callable[[Snapshot], Record]
    wrap: str | None = None

    def encode(self, snapshot: Snapshot, changes: Changes | None) -> bytes:
        """Return the body of the response."""
        if changes is not None and changes.body is not None:
            return changes.body
        record = {**self.build(snapshot), **snapshot.fields}
        if changes is not None:
            record = changes.apply(record)
        return encode(record, self.wrap)


def encode(record: Record, wrap: str | None = None) -> bytes:
    """Return a record as JSON, in an object under the name `wrap` if there is one."""
    return _encode(record if wrap is None else {wrap: record})


def instructor_execution(snapshot: Snapshot) -> Record:
    """Return the record of an instructor execution.

    The reference hides the fields of the four kinds of authentication but for one example: here, one that is enqueued
    has no browser session yet, and only one in progress can be viewed live. The status of a context authentication is
    the only one that the reference shows.
    """
    execution_id, digest, status, start, duration_ms, *_ = snapshot
    logins = _logins(digest)
    return {
        "id": execution_id,
        "workflow": _WORKFLOWS[int(digest[0], 16) % len(_WORKFLOWS)],
        "logins": logins,
        "authentications": _authentications(snapshot, len(logins)),
        "contextAuthentications": [_context_authentication(digest, login) for login in logins],
        "startTime": start,
        "endTime": None if duration_ms is None else start + timedelta(milliseconds=duration_ms),
        "durationMs": duration_ms,
        "isRecording": duration_ms is None,
        "browserSessionId": None if status == "Enqueued" else f"bs_{digest[8:24]}",
        "status": status,
    }


def workflow_execution(snapshot: Snapshot) -> Record:
    """Return the record of a workflow execution: what it is known to share, and made-up values of what it has beside.

    It is not known whether it says when it ended, so here it does not. Its status says that it has ended.
    """
    common = instructor_execution(snapshot)
    unshared = ("endTime", "durationMs", "isRecording", "browserSessionId")
    is_active = snapshot.status in {"InProgress", "Paused"}
    return {
        **{name: value for name, value in common.items() if name not in unshared},
        "name": None,
        "params": {},
        "metadata": {},
        "batch": None,
        "parentExecutionId": None,
        "attempts": 1,
        "downloads": [],
        "liveViewUrl": f"https://live.kaizen.example/{snapshot.digest[8:24]}" if is_active else None,
    }


def served(kind: Kind[Any]) -> ServedKind:
    """Return how a kind is served: by its entry in `_BUILDERS`, or with the fields that its Struct declares.

    A field that another kind has too gets the same value. A required field that no other kind has gets a value of its
    type.
    """
    struct = cast("inspect.StructType", inspect.type_info(kind.record))
    fields = {field.encode_name: field for field in struct.fields}

    def build(snapshot: Snapshot) -> Record:
        known = {**workflow_execution(snapshot), **instructor_execution(snapshot)}
        shared = {name: known[name] for name in fields if name in known}
        return {**_required(fields.values(), snapshot), **shared}

    return ServedKind(_BUILDERS.get(kind.record, build), kind.unwrap)


def _required(fields: Iterable[inspect.Field], snapshot: Snapshot) -> Record:
    return {field.encode_name: _value_of(field.type, snapshot) for field in fields if field.required}


def _value_of(kind: inspect.Type, snapshot: Snapshot) -> object:
    """Return a value of a type: null where the type allows that."""
    if isinstance(kind, inspect.Metadata):
        return _value_of(kind.type, snapshot)
    if isinstance(kind, inspect.StructType):
        return _required(kind.fields, snapshot)
    if isinstance(kind, inspect.EnumType):
        return next(iter(kind.cls)).value
    if isinstance(kind, inspect.LiteralType):
        return kind.values[0]
    values: dict[type[inspect.Type], object] = {
        inspect.StrType: snapshot.digest[:12],
        inspect.IntType: int(snapshot.digest[:2], 16),
        inspect.FloatType: int(snapshot.digest[:2], 16),
        inspect.BoolType: False,
        inspect.DateTimeType: snapshot.start,
        inspect.VarTupleType: [],
        inspect.ListType: [],
        inspect.DictType: {},
    }
    return values.get(type(kind))


_BUILDERS: Final[Mapping[type, Callable[[Snapshot], Record]]] = {
    InstructorExecution: instructor_execution,
    WorkflowExecution: workflow_execution,
}
SERVED: Final[dict[str, ServedKind]] = {f"/{kind.path}": served(kind) for kind in KINDS.values()}
"""The paths that are served, and what each returns."""


def digest_of(text: str) -> str:
    """Return the 32 hexadecimal digits that a text stands for."""
    return blake2b(text.encode(), digest_size=16).hexdigest()


def _named(prefix: str, name: str) -> dict[str, str]:
    """Return something with a name, and an id that depends on the name alone."""
    return {"id": f"{prefix}_{digest_of(name)[:12]}", "name": name}


_WORKFLOWS: Final = tuple(
    _named("wf", name)
    for name in ("Download invoices", "Export report", "Sync orders", "Update addresses", "Submit expenses")
)
_LOGINS: Final = tuple(_named("login", name) for name in ("Acme portal", "Globex", "Initech billing", "Umbrella HR"))


def _logins(digest: str) -> list[dict[str, str]]:
    """Return one login, for every fourth execution two."""
    first = int(digest[1], 16) % len(_LOGINS)
    return [_LOGINS[first], _LOGINS[first - 1]] if digest[2] in "048c" else [_LOGINS[first]]


def _authentications(snapshot: Snapshot, logins: int) -> list[Record]:
    statuses = snapshot.authentications or (_followed(snapshot),) * logins
    return [_authentication(f"bs_{snapshot.digest[8:22]}{i:02}", status) for i, status in enumerate(statuses)]


def _followed(snapshot: Snapshot) -> str:
    """Return the status of an authentication that has no script: it follows the execution."""
    if snapshot.status in {"Enqueued", "Failed"}:
        return snapshot.status
    return "InProgress" if snapshot.duration_ms is None else "Finished"


def _authentication(session: str, status: str) -> Record:
    if status == "Enqueued":
        return {"status": status}
    if status == "InProgress":
        live_view = f"https://live.kaizen.example/{session}"
        return {"browserSessionId": session, "status": status, "liveViewUrl": live_view}
    return {"browserSessionId": session, "status": status}


def _context_authentication(digest: str, login: Mapping[str, str]) -> Record:
    return {
        "contextAuthenticationId": f"ca_{digest[24:]}{login['id'][-4:]}",
        "loginSummary": {"loginId": login["id"], "name": login["name"], "isManual": digest[3] in "048c"},
        "authenticationStatus": "Unauthenticated",
    }
