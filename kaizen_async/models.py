"""The records of the API as frozen msgspec Structs: snake_case in Python, the API's names on the wire.

Which fields must a record have to be one? All that the reference marks as required, and they must fit. It is tempting
to ask for less, so that a field dropped by the server breaks nobody. But a record without `endTime` would be read as
"still running", and a wait for it would never end: wrong data is worse than an error that names the field. What keeps
such an error small: it costs that one record and no other, it carries the path and the body, and a record type of your
own with just the fields that you use decodes in its place: `kaizen.lookups(path, MyStruct)`.

What is left open, since the reference leaves it open:

- Status texts. An unknown one becomes an enum member of its own that keeps the exact text (`StatusEnum`).
- The members of the union in `authentications`, whose fields are not shown: one Struct takes them all, every field
  optional, so that a fifth kind decodes like the four.
- Unknown fields are ignored; `sessionId`, which sibling endpoints added later, is optional.

Sequences are tuples: a record is immutable and hashable all the way down. Since no cycle can arise, the garbage
collector need not track records (`gc=False`), which makes holding a million of them cheap.
"""

import logging
import re
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any, Final

import msgspec

from kaizen_async.errors import MESSAGE_LIMIT

log = logging.getLogger("kaizen_async")

AwareDatetime = Annotated[datetime, msgspec.Meta(tz=True)]
"""A point in time with its UTC offset, as RFC 3339 requires."""

_UNKNOWN_LIMIT: Final = 256
"""Unknown status texts that are kept as shared members; what comes after, or is long, gets a member per record."""

_WORDS: Final = re.compile(r"[A-Za-z][A-Za-z _-]{0,39}")
"""What a new status may look like. Anything else that a server sends in its place is not repeated in a log."""


class StatusEnum(StrEnum):
    """A string enum that accepts texts it does not know.

    `ExecutionStatus("Zorp")` is a member that equals, prints and pickles as `"Zorp"`; `is_known` tells it apart.
    """

    @property
    def is_known(self) -> bool:
        """Whether this version of the library has a name for the text."""
        return type(self).__members__.get(self._name_) is self

    @classmethod
    def _missing_(cls, value: object) -> Any:
        if not isinstance(value, str):
            return None
        member = _unknown_members.get((cls, value))
        if member is None:
            member = str.__new__(cls, value)
            member._name_ = member._value_ = value
            if len(_unknown_members) < _UNKNOWN_LIMIT and len(value) <= MESSAGE_LIMIT:
                _unknown_members[cls, value] = member
                shown = value if _WORDS.fullmatch(value) else f"a text of {len(value)} characters"
                log.warning("unknown %s: %s; a newer kaizen_async may have a name for it", cls.__name__, shown)
        return member


_unknown_members: dict[tuple[type[StatusEnum], str], StatusEnum] = {}


class ExecutionStatus(StatusEnum):
    """Status of an execution. The reference shows `Enqueued`; the others are those of the sibling `/executions/list`.

    Never decide by it whether an execution has ended: `InstructorExecution.is_finished` follows the documented rule.
    """

    ENQUEUED = "Enqueued"
    IN_PROGRESS = "InProgress"
    PAUSED = "Paused"
    COMPLETED = "Completed"
    FAILED = "Failed"


class AuthenticationStatus(StatusEnum):
    """Status of one authentication: texts inferred from the titles of the four members, which the reference hides."""

    ENQUEUED = "Enqueued"
    IN_PROGRESS = "InProgress"
    FINISHED = "Finished"
    FAILED = "Failed"


class ContextAuthenticationStatus(StatusEnum):
    """Status of a context authentication. The reference shows this one."""

    UNAUTHENTICATED = "Unauthenticated"


class Record(msgspec.Struct, frozen=True, rename="camel", gc=False):
    """Base of every Struct here: immutable, named in camel case on the wire, untracked by the garbage collector."""


_LONGEST: Final = 8e16
"""Milliseconds that a timedelta can hold: two and a half million years."""


def _duration(milliseconds: float) -> timedelta:
    return timedelta(milliseconds=min(max(milliseconds, -_LONGEST), _LONGEST))


class Workflow(Record, frozen=True, gc=False):
    """The workflow that an execution runs."""

    id: str
    name: str


class Login(Record, frozen=True, gc=False):
    """A login that an execution may use."""

    id: str
    name: str


class Authentication(Record, frozen=True, gc=False, omit_defaults=True):
    """One authentication of an execution: enqueued, in progress, finished, failed, or of a kind yet to come."""

    status: AuthenticationStatus | None = None
    browser_session_id: str | None = None
    live_view_url: str | None = None


class LoginSummary(Record, frozen=True, gc=False):
    """The login behind a context authentication."""

    login_id: str
    name: str
    is_manual: bool


class ContextAuthentication(Record, frozen=True, gc=False):
    """An authentication of the browser context, with its login."""

    context_authentication_id: str
    login_summary: LoginSummary
    authentication_status: ContextAuthenticationStatus


class InstructorExecution(Record, frozen=True, gc=False, kw_only=True, omit_defaults=True):
    """One instructor execution, as `POST /instructor/executions/get` answers it.

    `msgspec.json.encode(execution)` gives the API's JSON back.
    """

    id: str
    """Unique id of the execution."""
    workflow: Workflow
    logins: tuple[Login, ...]
    authentications: tuple[Authentication, ...]
    context_authentications: tuple[ContextAuthentication, ...]
    start_time: AwareDatetime
    """When it started."""
    end_time: AwareDatetime | None
    """When it ended; None while it is running."""
    duration_ms: float | None
    """How long it took, in milliseconds; None while it is running."""
    is_recording: bool
    browser_session_id: str | None
    status: ExecutionStatus
    session_id: str | None = None
    """The external id, where the server sends one."""

    @property
    def is_finished(self) -> bool:
        """Whether the execution has ended, however it ended: `endTime` is set."""
        return self.end_time is not None

    @property
    def duration(self) -> timedelta | None:
        """How long the execution took; None while it is running."""
        return None if self.duration_ms is None else _duration(self.duration_ms)


_ENDED: Final = frozenset({ExecutionStatus.COMPLETED, ExecutionStatus.FAILED})


class WorkflowExecution(Record, frozen=True, gc=False, kw_only=True, omit_defaults=True):
    """One workflow execution, as `POST /executions/get` answers it: active, enqueued, completed or failed.

    Provisional: what is known of it is that it shares these fields with an instructor execution, and the names of some
    that it has beside them, but not which of them are required, nor whether it tells when it ended. So only id and
    status must be there, and `end_time` and `duration_ms` are taken if they come. A later version may know more, and
    change this type.
    """

    id: str
    """Unique id of the execution."""
    status: ExecutionStatus
    workflow: Workflow | None = None
    logins: tuple[Login, ...] = ()
    authentications: tuple[Authentication, ...] = ()
    context_authentications: tuple[ContextAuthentication, ...] = ()
    start_time: AwareDatetime | None = None
    """When it started."""
    end_time: AwareDatetime | None = None
    """When it ended, if the server says so."""
    duration_ms: float | None = None
    """How long it took, in milliseconds, if the server says so."""
    raw: msgspec.Raw = msgspec.Raw()
    """The whole record as it came, with the fields that have no attribute here: `msgspec.json.encode(execution.raw)`
    gives it back byte for byte."""

    @property
    def fields(self) -> dict[str, Any]:
        """All that the server sent, by the API's names; decoded anew each time."""
        decoded: dict[str, Any] = msgspec.json.decode(bytes(self.raw) or b"{}")
        return decoded

    @property
    def is_finished(self) -> bool:
        """Whether the execution has ended: it has an end time, or one of the two statuses of ended ones.

        A status of a name that this version does not know (which is logged) counts as running, so a wait for an
        execution that ended under such a name, and without an end time, goes on to its deadline; the error then has
        the record as `.last_execution`. To take a running one for ended would be the worse mistake.
        """
        return self.end_time is not None or self.status in _ENDED

    @property
    def duration(self) -> timedelta | None:
        """How long the execution took; None while it is running, and if the server does not say."""
        if self.duration_ms is not None:
            return _duration(self.duration_ms)
        return None if self.start_time is None or self.end_time is None else self.end_time - self.start_time

    def __hash__(self) -> int:
        return hash((self.id, self.status))
