"""The kinds of executions that the command looks up, and what it shows of either."""

from typing import Final, TypeAlias

import msgspec

from kaizen_async import _kinds
from kaizen_async._records.tolerance import clean
from kaizen_async.client import KaizenClient
from kaizen_async.executions import Executions
from kaizen_async.models import InstructorExecution, WorkflowExecution

Execution: TypeAlias = InstructorExecution | WorkflowExecution

KINDS: Final = tuple(_kinds.KINDS)
"""The choices of `--kind`, which follow the paths of the API. The first one is used if none is given."""


def executions_of(kaizen: KaizenClient, kind: str) -> Executions[Execution]:
    """Return what looks up executions of a kind."""
    chosen = _kinds.KINDS[kind]
    return kaizen.lookups(chosen.path, chosen.record, unwrap=chosen.unwrap)


def as_json(record: Execution | None) -> object:
    """Return what is to be written in a line for a record: all that the server sent, where the record keeps it."""
    if record is None:
        return None
    raw: bytes | None = getattr(record, "raw", None)
    return record.to_dict() if raw is None else msgspec.Raw(msgspec.json.format(clean(raw), indent=-1))


def workflow_of(record: Execution) -> str:
    """Return the name of a record's workflow; nothing if it has none."""
    return "" if record.workflow is None else record.workflow.name
