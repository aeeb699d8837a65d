r"""The records of the API as frozen msgspec Structs: snake_case in Python, the API's names on the wire.

A record that is slightly wrong is either refused or repaired. For each field, this was decided by the harm that a wrong
guess would do. `docs/records.md` has the same list as a table.

These are refused, because a wrong guess would do much harm:

- `id` or `status` is missing or null. The record would belong to no execution, or a failure would look like something
  else.
- `endTime` is missing. If that meant "still running", a wait would never end. Null does mean "still running".
- A value has another type, such as a number for a text. Then the meaning of the field has changed.
- A list has more than 256 elements, or the documented fields have more than 256 KiB. A small body must not fill the
  memory.

These are read, because a wrong guess would do little harm:

- A zero time (`0001-01-01T00:00:00Z` of Go and .NET, `0000-00-00` of MySQL) is read as null. It means "not set". As an
  end time, it would end a wait too early.
- `startTime` that is missing or null is read as None. Then only ages and durations are unknown.
- `logins`, `authentications` and `contextAuthentications` that are missing or null are read as empty, and so are
  `workflow`, its fields, and the texts of other parts. `isRecording` and `isManual` are read as False. The library
  decides nothing by these fields.
- `durationMs`, `browserSessionId` and `sessionId` that are missing are read as None, because the API allows null.
- A status that this version does not know is read as a member that keeps its text, because the API may add statuses.
- A time without an offset, and a date alone, are read in UTC. At worst the time is wrong by hours.
- 24:00, a leap second, digits beyond the microsecond, and a space for the T are read: only one moment can be meant.
- Half a surrogate pair (`"\ud83d"`, as JavaScript cuts text) is read as U+FFFD. One character of a text is lost.
- A byte order mark and unknown fields are read: neither changes what the others mean. `extra` gives the unknown fields.

A refusal is a `DecodeError` of that one record. It names the field, the value, and the remedy: a record type of your
own with the fields that you use, `kaizen.lookups(path, MyStruct)`.

Sequences are tuples, so a record and all its parts are immutable and hashable. Because no cycle can arise, the garbage
collector need not track records (`gc=False`). So a program can hold a million of them cheaply.
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
"""Unknown status texts that are kept as shared members. Later and long texts get a member for each record."""

_WORDS: Final = re.compile(r"[A-Za-z][A-Za-z _-]{0,39}")
"""The form of a plausible new status. Log lines do not repeat any other text that a server sends in its place."""


class StatusEnum(StrEnum):
    """A string enum that accepts unknown texts.

    `ExecutionStatus("Zorp")` is a member that equals, prints and pickles as `"Zorp"`. Its `is_known` is False.
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
    """Status of an execution. The API reference shows `Enqueued`; the others come from its sibling `/executions/list`.

    Use `is_finished`, not the status, to see whether an execution has ended: it follows the documented rule.
    """

    ENQUEUED = "Enqueued"
    IN_PROGRESS = "InProgress"
    PAUSED = "Paused"
    COMPLETED = "Completed"
    FAILED = "Failed"


class AuthenticationStatus(StatusEnum):
    """Status of one authentication. The API reference hides the four texts; they are inferred from their titles."""

    ENQUEUED = "Enqueued"
    IN_PROGRESS = "InProgress"
    FINISHED = "Finished"
    FAILED = "Failed"


class ContextAuthenticationStatus(StatusEnum):
    """Status of a context authentication. The API reference shows only this one."""

    UNAUTHENTICATED = "Unauthenticated"


if TYPE_CHECKING:
    Milliseconds: TypeAlias = float
else:
    Milliseconds = int | float  # so that 123 stays 123

Few: TypeAlias = Annotated[tuple[T, ...], msgspec.Meta(max_length=MOST_PARTS)]
"""The elements of a list of the API: see the table above."""


def _if_absent(value: T) -> T:
    """Declare the value of a documented field that is absent. The field is encoded even if it has this value."""
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
    """One authentication of an execution: enqueued, in progress, finished, failed, or in a state that is not known yet.

    The API reference does not show which fields belong to each state, so every field is optional.
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

    `raw`, `to_dict()` and `extra` give everything that the server sent. Comparing, hashing, printing and
    `msgspec.json.encode(execution)` use the fields below.
    """

    id: str
    """Unique id of the execution."""
    workflow: Workflow = _if_absent(Workflow())
    logins: Few[Login] = _if_absent(())
    authentications: Few[Authentication] = _if_absent(())
    context_authentications: Few[ContextAuthentication] = _if_absent(())
    start_time: Annotated[AwareDatetime | None, msgspec.Meta(extra=NULL_IS_UNDOCUMENTED)] = _if_absent(None)
    """When it started. None if the server does not say; the API does not document that case."""
    end_time: AwareDatetime | None
    """When it ended; None while it is running."""
    duration_ms: Milliseconds | None = _if_absent(None)
    """How long it took, in milliseconds; None while it is running."""
    is_recording: bool = _if_absent(value=False)
    browser_session_id: str | None = _if_absent(None)
    status: ExecutionStatus
    session_id: str | None = None
    """The external id, if the server sends one."""

    @property
    def is_finished(self) -> bool:
        """Whether the execution has ended, well or not: `endTime` is set."""
        return self.end_time is not None

    @property
    def succeeded(self) -> bool | None:
        """Whether the execution ended well. None while it is running, and if its status does not say."""
        return _VERDICTS.get(self.status) if self.is_finished else None

    @property
    def duration(self) -> timedelta | None:
        """How long the execution took. None while it is running, and if the server does not say."""
        return _duration(self.duration_ms, self.start_time, self.end_time)


@linked("workflow", "logins", "authentications", "context_authentications")
class WorkflowExecution(Record, frozen=True, gc=False, kw_only=True, omit_defaults=True):
    """One workflow execution, as `POST /executions/get` returns it: active, enqueued, completed or failed.

    This type is provisional. A workflow execution is known to share these fields with an instructor execution. `extra`
    gives its other fields. It is not known which fields are required, nor whether the server sends an end time, so only
    `id` and `status` are required here. A later version may change this type.
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
        """Whether the execution has ended: it has an end time, or its status is `Completed` or `Failed`.

        A status that this version does not know counts as running, and is logged. If an execution ends with such a
        status and without an end time, a wait for it continues until its deadline. The error then has the record as
        `.last_execution`. The opposite mistake would be worse: a wait would return a running execution as ended.
        """
        return self.end_time is not None or self.status in _VERDICTS

    @property
    def succeeded(self) -> bool | None:
        """Whether the execution ended well. None while it is running, and if its status does not say."""
        return _VERDICTS.get(self.status)

    @property
    def duration(self) -> timedelta | None:
        """How long the execution took. None while it is running, and if the server does not say."""
        return _duration(self.duration_ms, self.start_time, self.end_time)


_VERDICTS: Final = {ExecutionStatus.COMPLETED: True, ExecutionStatus.FAILED: False}
"""The statuses of ended executions, and whether they are a success."""

_LONGEST: Final = 8e16
"""Milliseconds that a timedelta can hold: two and a half million years."""


def _duration(milliseconds: float | None, start: datetime | None, end: datetime | None) -> timedelta | None:
    if milliseconds is not None:
        return timedelta(milliseconds=min(max(milliseconds, -_LONGEST), _LONGEST))
    return None if start is None or end is None else end - start
