"""`--kind executions` makes the command use workflow executions."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from kaizen_async import Change, ExecutionStatus, Outcome, WorkflowExecution
from kaizen_async._cli.app import cli
from kaizen_async._cli.board import Board
from kaizen_async._cli.ids import Arguments
from kaizen_async._cli.output import document_of
from kaizen_async._cli.table import Rows
from kaizen_async._transport.wire import Endpoint
from kaizen_async.testing import KaizenEmulator, Life

BARE = WorkflowExecution(id="run_1", status=ExecutionStatus.COMPLETED)
"""A record with the required fields alone."""


@pytest.fixture
def server() -> Iterator[KaizenEmulator]:
    """Yield an emulator with some workflow executions."""
    with KaizenEmulator() as emulator:
        emulator.add("run_1", Life.ended(status="Failed"))
        emulator.add("run_2", Life.running(status="Paused"))
        yield emulator


def command(server: KaizenEmulator, *arguments: str) -> Result:
    """Run a command against the emulator."""
    return CliRunner().invoke(cli, [*arguments, "--base-url", server.base_url])


@pytest.mark.parametrize("verb", ["get", "wait"])
def test_a_workflow_execution_is_written_with_all_that_the_server_sent(server: KaizenEmulator, verb: str) -> None:
    """The output has all fields of a workflow execution, without the wrapper."""
    ran = command(server, verb, "--kind", "executions", "run_1")
    assert ran.exit_code == (1 if verb == "wait" else 0)  # the execution failed
    written = json.loads(ran.stdout)
    assert (written["id"], written["status"], written["attempts"]) == ("run_1", "Failed", 1)
    assert "raw" not in written


def test_watch_writes_workflow_executions(server: KaizenEmulator) -> None:
    """`watch` writes workflow executions before and after a change."""
    ran = command(server, "watch", "--kind", "executions", "run_1")
    (change,) = map(json.loads, ran.stdout.splitlines())
    assert change["before"] is None
    assert change["after"]["parentExecutionId"] is None


def test_an_unknown_kind_is_misuse(server: KaizenEmulator) -> None:
    """An unknown kind is refused with the list of kinds."""
    ran = command(server, "get", "--kind", "zorp", "run_1")
    assert ran.exit_code == 2
    assert "'instructor-executions', 'executions'" in ran.stderr
    assert not server.request_count


def test_a_checkpoint_belongs_to_its_kind(server: KaizenEmulator, tmp_path: Path) -> None:
    """A checkpoint of another kind is refused, because its ids name other executions."""
    file = str(tmp_path / "waiting.json")
    first = command(server, "wait", "--kind", "executions", "run_2", "--deadline", "0.5", "--checkpoint", file)
    assert first.exit_code == 1
    other = command(server, "wait", "run_2", "--deadline", "0.5", "--checkpoint", file)
    assert other.exit_code == 2
    assert "give the same --base-url and --kind" in " ".join(other.stderr.split())
    again = command(server, "wait", "--kind", "executions", "--deadline", "0.5", "--checkpoint", file)
    assert again.exit_code == 1


def test_a_record_that_came_in_many_lines_is_written_in_one() -> None:
    """A record of several lines is written in one, and numbers keep their digits."""
    pretty = b'{\n "id": "run_1",\n "status": "Failed",\n "amount": 1.50\n}'
    record = Endpoint("executions/get", WorkflowExecution).decode(pretty, "run_1")
    assert document_of(record) == b'{"id":"run_1","status":"Failed","amount":1.50}'


def console() -> tuple[Console, io.StringIO]:
    """Return a terminal and its output."""
    shown = io.StringIO()
    return Console(file=shown, width=80), shown


def test_missing_values_are_blank_in_a_row() -> None:
    """A missing workflow, start or duration is blank in a row."""
    screen, shown = console()
    Rows(screen, Arguments(["run_1"])).show(Outcome("run_1", BARE, None, 1, 0.1))
    assert shown.getvalue().splitlines()[-1].split() == ["run_1", "Completed"]


async def test_missing_values_are_blank_on_the_board() -> None:
    """A missing workflow, start or duration is blank on the board."""
    screen, shown = console()
    board = Board(screen, ["run_1"])
    board.show(Change("run_1", None, BARE, None))
    screen.print(board.picture())
    assert shown.getvalue().splitlines()[1].split() == ["run_1", "Completed"]
