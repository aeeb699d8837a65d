"""An async client for Kaizen executions: look up one, many or endless ids, and wait for them to end."""

from kaizen_async._bulk import OutcomeStream
from kaizen_async._records.base import Record
from kaizen_async._waiting.streams import ChangeStream, WaitStream
from kaizen_async.client import KaizenClient
from kaizen_async.config import ConnectionPolicy, HedgePolicy, PollPolicy, RetryPolicy, __version__
from kaizen_async.errors import (
    AttemptTimeoutError,
    AuthenticationError,
    ClientClosedError,
    DeadlineExceededError,
    DecodeError,
    InvalidIdError,
    KaizenError,
    NotFoundError,
    RateLimitError,
    StatusError,
    TransportError,
)
from kaizen_async.executions import Executions
from kaizen_async.models import (
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
)
from kaizen_async.outcomes import Change, Found, LookupFailed, Outcome, Seen, WatchFailed
from kaizen_async.stats import ClientStats
from kaizen_async.tables import to_columns

__all__ = [
    "AttemptTimeoutError",
    "Authentication",
    "AuthenticationError",
    "AuthenticationStatus",
    "Change",
    "ChangeStream",
    "ClientClosedError",
    "ClientStats",
    "ConnectionPolicy",
    "ContextAuthentication",
    "ContextAuthenticationStatus",
    "DeadlineExceededError",
    "DecodeError",
    "ExecutionStatus",
    "Executions",
    "Found",
    "HedgePolicy",
    "InstructorExecution",
    "InvalidIdError",
    "KaizenClient",
    "KaizenError",
    "Login",
    "LoginSummary",
    "LookupFailed",
    "NotFoundError",
    "Outcome",
    "OutcomeStream",
    "PollPolicy",
    "RateLimitError",
    "Record",
    "RetryPolicy",
    "Seen",
    "StatusError",
    "TransportError",
    "WaitStream",
    "WatchFailed",
    "Workflow",
    "WorkflowExecution",
    "__version__",
    "to_columns",
]
