r"""The records of the API as frozen msgspec Structs: snake_case in Python, the API's names on the wire.

What a record must have, and what is read from one that is slightly off, was decided field by field. The question was
what a wrong guess would cost. `docs/records.md` has the same list as a table.

Refused, because a guess would be dear:

- No `id` or no `status`, or null: it would be the record of nobody, or a failure would pass for something else.
- No `endTime`: read as "still running", a wait for it would never end. Null does mean "still running".
- A value of another type, such as a number for a text: the meaning of the field has changed.
- A list of more than 256 elements, or documented fields of more than 256 KiB: small bodies must not fill the memory.

Read, because a guess is cheap:

- A zero time (`0001-01-01T00:00:00Z` of Go and .NET, `0000-00-00` of MySQL) as null. It means "not set"; taken for an
  end, it would end a wait too early.
- `startTime` missing or null as None: then only ages and durations are unknown.
- `logins`, `authentications` and `contextAuthentications` missing or null as empty; `workflow`, its fields, and the
  texts of other parts as empty texts; `isRecording` and `isManual` as False. They describe; nothing is decided by them.
- `durationMs`, `browserSessionId` and `sessionId` missing as None, because the API allows null.
- A status that this version does not know as a member that keeps its text: the API leaves the set of statuses open.
- A time without an offset, or a date alone, in UTC: at worst the time is off by hours. The end is none the less one.
- 24:00, a leap second, digits beyond the microsecond, a space for the T: there is one moment that is meant.
- Half a surrogate pair (`"\ud83d"`, as JavaScript cuts text) as U+FFFD: one character of a text is lost.
- A byte order mark, and an unknown field: neither changes what the others mean. `extra` gives the unknown fields.

A refusal is a `DecodeError` of that one record. It names the field, what came, and the way out: a record type of your
own with the fields that you use, `kaizen.lookups(path, MyStruct)`.

Sequences are tuples: a record is immutable and hashable all the way down. Since no cycle can arise, the garbage
collector need not track records (`gc=False`), which makes holding a million of them cheap.
"""

import logging
import re
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias, TypeVar

import msgspec

from kaizen_async._records.base import Part, Record, linked
from kaizen_async._records.schema import NULL_IS_UNDOCUMENTED, status_schema
from kaizen_async._records.tolerance import MOST_PARTS
from kaizen_async._transport.withhold import shows_a_secret
from kaizen_async.errors import MESSAGE_LIMIT

T = TypeVar("T")

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
            if value and len(_unknown_members) < _UNKNOWN_LIMIT and len(value) <= MESSAGE_LIMIT:
                _unknown_members[cls, value] = member
                is_plain = _WORDS.fullmatch(value) and not shows_a_secret(value)
                shown = value if is_plain else f"a text of {len(value)} characters"
                log.warning("unknown %s: %s; a newer kaizen_async may have a name for it", cls.__name__, shown)
        return member

    @classmethod
    def __get_pydantic_core_schema__(cls, _source_type: object, _handler: Any) -> Any:
        """Tell pydantic that any text is a status."""
        return status_schema(cls)


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


if TYPE_CHECKING:
    Milliseconds: TypeAlias = float
else:
    Milliseconds = int | float  # so that 123 stays 123

Few: TypeAlias = Annotated[tuple[T, ...], msgspec.Meta(max_length=MOST_PARTS)]
"""The elements of a list of the API: see the table above."""


def _if_absent(value: T) -> T:
    """Declare how a documented field is read if it is absent. Such a field is encoded even if it has this value."""
    default: T = msgspec.field(default_factory=lambda: value)
    return default


class Workflow(Part, frozen=True, gc=False):
    """The workflow that an execution runs."""

    id: str = _if_absent("")
    name: str = _if_absent("")


class Login(Part, frozen=True, gc=False):
    """A login that an execution may use."""

    id: str = _if_absent("")
    name: str = _if_absent("")


class Authentication(Part, frozen=True, gc=False, omit_defaults=True):
    """One authentication of an execution: enqueued, in progress, finished, failed, or of a kind yet to come.

    The reference does not show which fields each kind has, so every field is optional.
    """

    status: AuthenticationStatus | None = None
    browser_session_id: str | None = None
    live_view_url: str | None = None


class LoginSummary(Part, frozen=True, gc=False):
    """The login behind a context authentication."""

    login_id: str = _if_absent("")
    name: str = _if_absent("")
    is_manual: bool = _if_absent(value=False)


@linked("login_summary")
class ContextAuthentication(Part, frozen=True, gc=False):
    """An authentication of the browser context, with its login."""

    context_authentication_id: str = _if_absent("")
    login_summary: LoginSummary = _if_absent(LoginSummary())
    authentication_status: ContextAuthenticationStatus = _if_absent(ContextAuthenticationStatus(""))


_ENDED: Final = frozenset({ExecutionStatus.COMPLETED, ExecutionStatus.FAILED})


@linked("workflow", "logins", "authentications", "context_authentications")
class InstructorExecution(Record, frozen=True, gc=False, kw_only=True, omit_defaults=True):
    """One instructor execution, as `POST /instructor/executions/get` returns it.

    `raw`, `to_dict()` and `extra` give all that the server sent. Comparing, hashing, printing and
    `msgspec.json.encode(execution)` use the fields listed here.
    """

    id: str
    """Unique id of the execution."""
    workflow: Workflow = _if_absent(Workflow())
    logins: Few[Login] = _if_absent(())
    authentications: Few[Authentication] = _if_absent(())
    context_authentications: Few[ContextAuthentication] = _if_absent(())
    start_time: Annotated[AwareDatetime | None, msgspec.Meta(extra=NULL_IS_UNDOCUMENTED)] = _if_absent(None)
    """When it started; None if the server does not say, which the API does not document."""
    end_time: AwareDatetime | None
    """When it ended; None while it is running."""
    duration_ms: Milliseconds | None = _if_absent(None)
    """How long it took, in milliseconds; None while it is running."""
    is_recording: bool = _if_absent(value=False)
    browser_session_id: str | None = _if_absent(None)
    status: ExecutionStatus
    session_id: str | None = None
    """The external id, where the server sends one."""

    @property
    def is_finished(self) -> bool:
        """Whether the execution has ended, however it ended: `endTime` is set."""
        return self.end_time is not None

    @property
    def succeeded(self) -> bool | None:
        """Whether the execution ended well; None while it is running, or if its status does not tell."""
        return _VERDICTS.get(self.status) if self.is_finished else None

    @property
    def duration(self) -> timedelta | None:
        """How long the execution took; None while it is running, and if the server does not say."""
        return _duration(self.duration_ms, self.start_time, self.end_time)


@linked("workflow", "logins", "authentications", "context_authentications")
class WorkflowExecution(Record, frozen=True, gc=False, kw_only=True, omit_defaults=True):
    """One workflow execution, as `POST /executions/get` returns it: active, enqueued, completed or failed.

    Provisional: it is known to share these fields with an instructor execution, and to have others, which `extra`
    gives. It is not known which of them are required, nor whether it tells when it ended. So only `id` and `status`
    must be there. A later version may know more, and change this type.
    """

    id: str
    """Unique id of the execution."""
    status: ExecutionStatus
    workflow: Workflow | None = None
    logins: Few[Login] = ()
    authentications: Few[Authentication] = ()
    context_authentications: Few[ContextAuthentication] = ()
    start_time: AwareDatetime | None = None
    """When it started."""
    end_time: AwareDatetime | None = None
    """When it ended, if the server says so."""
    duration_ms: Milliseconds | None = None
    """How long it took, in milliseconds, if the server says so."""

    @property
    def is_finished(self) -> bool:
        """Whether the execution has ended: it has an end time, or one of the two statuses of ended ones.

        A status that this version does not know (which is logged) counts as running. So a wait for an execution that
        ended with such a status, and without an end time, continues to its deadline; the error then has the record as
        `.last_execution`. To take a running execution for an ended one would be the worse mistake.
        """
        return self.end_time is not None or self.status in _VERDICTS

    @property
    def succeeded(self) -> bool | None:
        """Whether the execution ended well; None while it is running, or if its status does not tell."""
        return _VERDICTS.get(self.status)

    @property
    def duration(self) -> timedelta | None:
        """How long the execution took; None while it is running, and if the server does not say."""
        return _duration(self.duration_ms, self.start_time, self.end_time)


_VERDICTS: Final = {ExecutionStatus.COMPLETED: True, ExecutionStatus.FAILED: False}
"""The statuses of ended executions, and whether they are a success."""

_LONGEST: Final = 8e16
"""Milliseconds that a timedelta can hold: two and a half million years."""


def _duration(milliseconds: float | None, start: datetime | None, end: datetime | None) -> timedelta | None:
    if milliseconds is not None:
        return timedelta(milliseconds=min(max(milliseconds, -_LONGEST), _LONGEST))
    return None if start is None or end is None else end - start
