"""The kinds of executions of the API, in one table for the client, the emulator and the command."""

from typing import Any, Final, Generic, TypeVar

import msgspec

from kaizen_async.models import InstructorExecution, WorkflowExecution

T = TypeVar("T")


class Kind(msgspec.Struct, Generic[T], frozen=True):
    """A kind of executions.

    Attributes:
        name: What the command calls it.
        path: Where it is looked up, below the base URL.
        record: The Struct of its records. `_records/facts.py` reads from it what waits and the command need.
        unwrap: The field of the response that holds the record; None if the response is the record.
    """

    name: str
    path: str
    record: type[T]
    unwrap: str | None = None


INSTRUCTOR_EXECUTIONS: Final = Kind("instructor-executions", "instructor/executions/get", InstructorExecution)
EXECUTIONS: Final = Kind("executions", "executions/get", WorkflowExecution, unwrap="execution")

KINDS: Final[dict[str, Kind[Any]]] = {kind.name: kind for kind in (INSTRUCTOR_EXECUTIONS, EXECUTIONS)}
"""By name. The command uses the first one if none is given."""
