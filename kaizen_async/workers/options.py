"""What a run is asked to do. Stored with the run, and read back by workers as input."""

from typing import Literal, TypeAlias

import msgspec

from kaizen_async.client import KaizenClient
from kaizen_async.executions import Executions
from kaizen_async.models import InstructorExecution, WorkflowExecution

Kind: TypeAlias = Literal["instructor-executions", "executions"]
Execution: TypeAlias = InstructorExecution | WorkflowExecution


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=False):
    """What a run is asked to do with its ids."""

    kind: Kind = "instructor-executions"
    """What the ids are ids of."""
    wait: bool = False
    """Whether to wait for each execution to end."""

    def encoded(self) -> bytes:
        """Return the form in which it is stored."""
        return msgspec.json.encode(self)

    @property
    def record(self) -> type[InstructorExecution] | type[WorkflowExecution]:
        """The type of the records."""
        return InstructorExecution if self.kind == "instructor-executions" else WorkflowExecution

    def executions_of(self, kaizen: KaizenClient) -> Executions[InstructorExecution] | Executions[WorkflowExecution]:
        """Return what looks the ids up."""
        return kaizen.instructor_executions if self.kind == "instructor-executions" else kaizen.executions


def decode_options(stored: bytes) -> Options:
    """Return stored options.

    Raises:
        ValueError: They are not valid, or of a later version.
    """
    return msgspec.json.decode(stored, type=Options)
