"""The parts of the command `kaizen-async` in isolation."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from click.exceptions import Exit
from rich.console import Console

import _kaizen_async_command
from kaizen_async import (
    ExecutionStatus,
    InstructorExecution,
    KaizenClient,
    KaizenError,
    NotFoundError,
    Outcome,
    __version__,
)
from kaizen_async._cli import ending
from kaizen_async._cli.board import Board
from kaizen_async._cli.checkpoints import CheckpointFile, Saved, Taken, skip_taken
from kaizen_async._cli.ending import OutputClosedError, Stop, run
from kaizen_async._cli.formats import Layout
from kaizen_async._cli.ids import Arguments, Source
from kaizen_async._cli.output import InOrder, described
from kaizen_async._cli.progress import by_status
from kaizen_async._cli.table import Rows, age_of, spell
from kaizen_async._cli.wait import Statuses
from kaizen_async._ledger import Checkpoint, Unfinished
from kaizen_async.outcomes import Change
from kaizen_async.testing import KaizenEmulator, Life, VirtualClock

Found = Outcome[InstructorExecution]


@pytest.fixture
def record(sample_execution: InstructorExecution) -> Callable[..., InstructorExecution]:
    """Return a function that creates variants of the documented example."""

    def make(**changes: Any) -> InstructorExecution:
        return msgspec.structs.replace(sample_execution, **changes)

    return make


def found(execution: InstructorExecution) -> Found:
    """Return the outcome of a lookup that succeeded."""
    return Outcome(execution.id, execution, None, 1, 0.1)


def failed(execution_id: str, reason: str = "no such thing") -> Found:
    """Return the outcome of a lookup that failed."""
    error = NotFoundError(reason, status=404, execution_id=execution_id, attempts=1)
    return Outcome(execution_id, None, error, 1, 0.1)


def source(stream: Any) -> Source:
    """Return a source that reads ids from a stream."""
    return Source(stream, "standard input", Layout())


async def numbers(*, hang: bool = False) -> AsyncIterator[int]:
    """Yield 0, 1 and 2, and then end or hang."""
    for number in range(3):
        yield number
    if hang:
        await asyncio.Event().wait()


class TestStop:
    """A request to stop takes effect between two results."""

    async def test_results_end_when_asked_for_while_waiting(self) -> None:
        """A request to stop ends the wait for the next result."""
        stop = Stop(_current())
        asyncio.get_running_loop().call_later(0.01, stop.ask, "enough", 7)
        assert [number async for number in stop.each(numbers(hang=True))] == [0, 1, 2]
        assert (stop.reason, stop.status) == ("enough", 7)
        assert not _current().cancelling()

    async def test_results_end_when_asked_for_while_one_is_handled(self) -> None:
        """A request to stop lets the handling of the current result finish."""
        stop = Stop(_current())
        handled: list[int] = []
        async for number in stop.each(numbers()):
            stop.ask("enough", 7)
            await asyncio.sleep(0.01)
            handled.append(number)
        assert handled == [0]

    async def test_the_first_reason_counts(self) -> None:
        """The first reason to stop counts."""
        stop = Stop(_current())
        stop.ask("first", 1)
        stop.ask("second", 2)
        await stop.asked()
        assert (stop.reason, stop.status) == ("first", 1)

    async def test_other_cancellations_are_raised(self) -> None:
        """A cancellation from elsewhere is raised."""
        stop = Stop(_current())
        asyncio.get_running_loop().call_later(0.01, _current().cancel)
        with pytest.raises(asyncio.CancelledError):
            async for _ in stop.each(numbers(hang=True)):
                pass
        _current().uncancel()
        asyncio.get_running_loop().call_later(0.01, _current().cancel)
        with pytest.raises(asyncio.CancelledError):
            await stop.unless_asked(asyncio.sleep(10))
        _current().uncancel()

    @pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
    @pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
    def test_signals_ask_for_the_end(
        self, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals, status: int, loop: str
    ) -> None:
        """A signal requests a stop, and the exit status is the one that shells report."""
        if loop == "asyncio":
            monkeypatch.setitem(sys.modules, "uvloop", None)

        async def work(stop: Stop) -> int:
            assert type(asyncio.get_running_loop()).__module__.split(".")[0] == loop
            os.kill(os.getpid(), signum)
            await stop.asked()
            return stop.status

        before = signal.getsignal(signum)
        assert exit_status(work) == status
        assert signal.getsignal(signum) == before

    def test_a_second_signal_ends_the_work_at_once(self) -> None:
        """A second signal ends the work at once, unless it arrives together with the first."""

        async def work(stop: Stop) -> int:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.sleep(0.01)
            assert stop.reason
            asyncio.get_running_loop().call_later(ending.SAME_SIGNAL, os.kill, os.getpid(), signal.SIGINT)
            await asyncio.Event().wait()
            return 0

        assert exit_status(work) == 130

    def test_a_signal_that_is_to_be_ignored_stays_ignored(self) -> None:
        """A signal that is ignored, as under `nohup`, stays ignored."""

        async def work(stop: Stop) -> int:
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.sleep(0.01)
            return 5 if stop.reason else 0

        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            assert exit_status(work) == 0
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_ctrl_c_before_anything_listens_is_no_traceback(self) -> None:
        """Ctrl-C before the handlers are set gives status 130 without a traceback."""

        async def work(_: Stop) -> int:
            raise KeyboardInterrupt

        assert exit_status(work) == 130

    def test_a_closed_output_has_the_status_of_a_broken_pipe(self) -> None:
        """A closed output gives the status of a broken pipe."""

        async def work(_: Stop) -> int:
            raise OutputClosedError

        assert exit_status(work) == 141

    def test_an_unexpected_cancellation_is_raised(self) -> None:
        """An unexpected cancellation is raised, because it is a bug."""

        async def work(_: Stop) -> int:
            raise asyncio.CancelledError

        with pytest.raises(asyncio.CancelledError):
            exit_status(work)


def exit_status(work: ending.Work) -> int:
    """Return the exit status of a command's work."""
    with pytest.raises(Exit) as caught:
        run(work)
    return caught.value.exit_code


def _current() -> "asyncio.Task[Any]":
    task = asyncio.current_task()
    assert task is not None
    return task


class TestInOrder:
    """Results for arguments come in the order of the arguments."""

    def test_order_is_kept_for_arguments_only(self, record: Callable[..., InstructorExecution]) -> None:
        """Results keep the order of arguments, also of repeated ones, but not of lines."""
        outcomes = {name: found(record(id=name)) for name in "abc"}
        in_order = InOrder(Arguments(["a", "b", "a", "c"]))
        assert list(in_order.released_by(outcomes["a"])) == [outcomes["a"]]
        assert list(in_order.released_by(outcomes["c"])) == []
        assert list(in_order.released_by(outcomes["a"])) == []
        assert list(in_order.rest()) == [outcomes["a"], outcomes["c"]]
        passing = InOrder(source(BytesIO()))
        assert list(passing.released_by(outcomes["c"])) == [outcomes["c"]]
        assert list(passing.rest()) == []


class TestStatuses:
    """The watch beside a wait counts statuses."""

    async def test_it_counts_running_executions_without_polls(self) -> None:
        """The watch counts the statuses of running executions, also added ones, without polls of its own."""
        clock = VirtualClock()
        with KaizenEmulator(clock=clock.time) as server:
            server.add("first", Life.of(("Enqueued", 0), ("InProgress", 50), ("Completed", 100)))
            server.add("later", Life.of(("Enqueued", 0), ("Completed", 70)))
            seen: list[dict[str, int]] = []
            async with KaizenClient(base_url=server.base_url, clock=clock) as kaizen:
                executions = kaizen.instructor_executions
                statuses = Statuses(executions, ["first"], wanted=True)
                note = statuses._note

                def noting(change: Change[Any]) -> None:
                    note(change)
                    seen.append(dict(+statuses.counts))

                statuses._note = noting  # type: ignore[method-assign]

                async def ids() -> AsyncIterator[str]:
                    yield "first"
                    for execution_id in ("later", "unknown"):
                        statuses.add(execution_id)
                        yield execution_id

                async with executions.wait_many(ids()) as ends, statuses:
                    outcomes = [outcome async for outcome in ends]
                assert kaizen.stats().polls == sum(outcome.attempts for outcome in outcomes)
        assert {"Enqueued": 2} in seen
        assert {"InProgress": 1, "Enqueued": 1} in seen
        assert seen[-1] == {"InProgress": 1} or seen[-1] == {}
        assert all(sum(counts.values()) <= 2 for counts in seen)

    async def test_it_does_nothing_without_a_display(self, emulator: KaizenEmulator) -> None:
        """Without a display, the watch does nothing and keeps no ids."""
        async with KaizenClient(base_url=emulator.base_url) as kaizen:
            statuses = Statuses(kaizen.instructor_executions, ["a"], wanted=False)
            async with statuses:
                statuses.add("b")
            assert statuses._ids.empty()
        assert emulator.request_count == 0


class TestCheckpointFile:
    """The file on disk is always the old or the new checkpoint."""

    def test_a_write_that_fails_leaves_the_old_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A failed write keeps the old checkpoint and leaves no other file."""
        file = CheckpointFile(tmp_path / "waiting.json", "http://127.0.0.1/")
        saved = Saved(base_url="http://127.0.0.1/", taken=Taken(), unprinted=["a"], waiting=WAITING)
        file.save(saved)
        before = file.path.read_bytes()

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(click.ClickException, match="No space left on device"):
            file.save(msgspec.structs.replace(saved, unprinted=["b"]))
        assert file.path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [file.path]
        assert file.load() == saved

    def test_ids_include_awaited_and_unprinted_ids(self) -> None:
        """A checkpoint has awaited and unprinted ids, and counts each as often as it was read."""
        saved = Saved(base_url="", taken=Taken(), unprinted=["c"], waiting=WAITING)
        assert sorted(saved.ids()) == ["a", "b", "c"]
        assert saved.total == 4

    async def test_being_interrupted_while_skipping_changes_nothing(self) -> None:
        """An interruption while known ids are skipped does not change the checkpoint."""
        taken = Taken()
        for execution_id in ("a", "b"):
            taken.add(execution_id)
        saved = Saved(base_url="", taken=taken, unprinted=[], waiting=WAITING)
        read, write = os.pipe()
        with os.fdopen(read, "rb") as stream, os.fdopen(write, "wb") as pipe:
            pipe.write(b"a\n")
            pipe.flush()
            stop = Stop(_current())
            asyncio.get_running_loop().call_later(0.02, stop.ask, "interrupted", 130)
            assert await skip_taken(source(stream), saved, stop) == taken


WAITING = Checkpoint(2, 0, 0.0, [Unfinished("a", 2), Unfinished("b")])


class TestRows:
    """Outcomes are shown as rows of a table."""

    @pytest.fixture
    def screen(self) -> Console:
        """Return a terminal of 90 columns whose output can be read."""
        return Console(file=StringIO(), force_terminal=True, color_system=None, width=90)

    def test_rows(self, screen: Console, record: Callable[..., InstructorExecution]) -> None:
        """The table has one header.

        Recent executions show the time, older ones the date, and an error fills its row.
        """
        today = datetime.now(UTC)
        rows = Rows(screen, Arguments(["exec_1", "exec_2", "missing"]))
        rows.show(found(record(id="exec_1", duration_ms=65_000.0, start_time=today)))
        rows.show(found(record(id="exec_2", duration_ms=7_200_000.0, start_time=datetime(2020, 5, 6, 12, tzinfo=UTC))))
        rows.show(failed("missing"))
        header, first, second, third = shown(screen)
        assert header.split() == ["ID", "WORKFLOW", "STATUS", "STARTED", "TOOK"]
        assert first.split()[0] == "exec_1"
        assert today.astimezone().strftime("%H:%M:%S") in first
        assert "1 min 5 s" in first
        assert "05-06" in second
        assert "2 h 0 min" in second
        assert third.split()[:5] == ["missing", "no", "such", "thing", "(after"]

    def test_an_id_is_never_cut(self, screen: Console, record: Callable[..., InstructorExecution]) -> None:
        """An id is never shortened, so that it can be copied. A long id continues on the next line."""
        rows = Rows(screen, source(BytesIO()))
        rows.show(found(record(id="x" * 100)))
        assert sum(line[:45].count("x") for line in shown(screen)[1:]) == 100

    def test_text_of_the_server_neither_styles_nor_moves_anything(
        self, screen: Console, record: Callable[..., InstructorExecution]
    ) -> None:
        """The server's control characters are replaced, and its markup is shown as text."""
        workflow = msgspec.structs.replace(record().workflow, name="[red]\x1b[2J")
        Rows(screen, Arguments(["e"])).show(found(record(id="e", workflow=workflow, status=ExecutionStatus("\x07[b]"))))
        (_, row) = shown(screen)
        assert "[red]�[2J" in row
        assert "�[b]" in row

    def test_the_age_of_what_runs_grows(self, record: Callable[..., InstructorExecution]) -> None:
        """The age of a running execution counts from its start and is never below 0."""
        runs = {"end_time": None, "duration_ms": None}
        now = datetime.now(UTC)
        assert age_of(record(start_time=now - timedelta(hours=3), **runs)) == "3 h 0 min"
        assert age_of(record(start_time=now + timedelta(hours=3), **runs)) == "0 s"


class TestBoard:
    """The live table of `watch`."""

    @pytest.fixture
    def screen(self) -> Console:
        """Return a terminal of 100 columns and 10 lines whose output can be read."""
        return Console(file=StringIO(), force_terminal=True, color_system=None, width=100, height=10)

    async def test_it_shows_the_latest_state(self, screen: Console, record: Callable[..., InstructorExecution]) -> None:
        """The board shows the latest states in the order of the ids, with the time of a last change."""
        board = Board(screen, ["exec_1", "exec_2"])
        enqueued = record(id="exec_2", status=ExecutionStatus.ENQUEUED, end_time=None, duration_ms=None)
        running = record(id="exec_2", status=ExecutionStatus.IN_PROGRESS, end_time=None, duration_ms=None)
        board.show(Change("exec_2", None, enqueued, None))
        board.show(Change("exec_1", None, record(id="exec_1"), None))
        board.show(Change("exec_2", enqueued, running, None))
        board.show(Change("exec_3", None, None, failed("exec_3", "no such thing " * 10).error))
        header, third, first, second, counts = picture(board, screen)
        assert header.split() == ["ID", "WORKFLOW", "STATUS", "AGE", "LAST", "CHANGE"]
        assert first.startswith("exec_1")
        assert " ago" not in first
        assert second.startswith("exec_2")
        assert "InProgress" in second
        assert second.rstrip().endswith("0 s ago")
        assert third.startswith("exec_3")
        assert "no such thing" in third
        assert counts.strip().endswith("InProgress 1 · errors 1")
        assert "Enqueued 1 " in counts  # the documented example's status

    async def test_an_error_after_a_record_keeps_what_is_known(
        self, screen: Console, record: Callable[..., InstructorExecution]
    ) -> None:
        """An error keeps the workflow of its row, and its status no longer counts."""
        board = Board(screen, [])
        running = record(id="exec_1", end_time=None, duration_ms=None)
        board.show(Change("exec_1", None, running, None))
        board.show(Change("exec_1", None, None, failed("exec_1").error))
        _, row, counts = picture(board, screen)
        assert running.workflow.name in row
        assert "no such thing" in row
        assert counts.strip() == "errors 1"

    async def test_what_runs_comes_before_what_is_over(
        self, screen: Console, record: Callable[..., InstructorExecution]
    ) -> None:
        """If not all rows fit, running executions come first and the rest is counted."""
        board = Board(screen, [])
        for number in range(10):
            ends = {} if number % 2 else {"end_time": None, "duration_ms": None}
            execution = record(id=f"exec_{number}", **ends)
            board.show(Change(execution.id, None, execution, None))
        rows = picture(board, screen)[1:-1]
        assert [row.split()[0] for row in rows] == ["exec_2", "exec_4", "exec_6", "exec_8"]
        assert picture(board, screen)[-1].rstrip().endswith("6 not shown")

    async def test_it_can_show_failures_and_nothing_else(
        self, screen: Console, record: Callable[..., InstructorExecution]
    ) -> None:
        """With only failures, other executions are counted, and failures that do not fit are reported."""
        board = Board(screen, ["exec_1"], only_failed=True)
        board.show(Change("exec_1", None, record(id="exec_1", status=ExecutionStatus.COMPLETED), None))
        for number in range(2, 8):
            board.show(Change(f"exec_{number}", None, None, failed(f"exec_{number}").error))
        rows = picture(board, screen)[1:]
        assert [row.split()[0] for row in rows[:-1]] == ["exec_4", "exec_5", "exec_6", "exec_7"]
        assert rows[-1].rstrip() == "Completed 1 · errors 6 · 2 not shown"

    async def test_ids_are_there_before_their_first_state(self, screen: Console) -> None:
        """All ids have a row from the start, so that the table does not move."""
        assert [line.split() for line in picture(Board(screen, ["exec_1", "exec_1"]), screen)[1:-1]] == [["exec_1"]]

    async def test_the_last_picture_stays(self, screen: Console, record: Callable[..., InstructorExecution]) -> None:
        """The last state is drawn at the end of the block, however soon it ends."""
        async with Board(screen, []) as board:
            board.show(Change("exec_1", None, record(id="exec_1"), None))
        assert any(line.startswith("exec_1") for line in shown(screen))


def shown(screen: Console) -> list[str]:
    """Return the lines of a terminal."""
    assert isinstance(screen.file, StringIO)
    return screen.file.getvalue().rstrip().splitlines()


def picture(board: Board, screen: Console) -> list[str]:
    """Return the lines of a board's table."""
    with screen.capture() as captured:
        screen.print(board.picture())
    return captured.get().splitlines()


class TestWording:
    """Numbers, durations and errors are formatted for people."""

    @pytest.mark.parametrize(
        ("seconds", "words"),
        [
            (0, "0 s"),
            (59.4, "59 s"),
            (59.6, "1 min 0 s"),
            (185, "3 min 5 s"),
            (3600, "1 h 0 min"),
            (7999, "2 h 13 min"),
            (90_000, "1 d 1 h"),
            (10_000_000, "115 d 17 h"),
        ],
    )
    def test_durations_have_two_units(self, seconds: float, words: str) -> None:
        """A duration has at most two units."""
        assert spell(seconds) == words

    def test_an_error_is_described_without_its_id(self) -> None:
        """The description of an error omits its id, which may contain any text."""
        error = KaizenError("it broke", execution_id="a: \n", attempts=2)
        shown = described(error)
        assert (shown["type"], shown["message"]) == ("KaizenError", "it broke (after 2 attempts)")

    def test_statuses_with_a_count_of_zero_are_omitted(self) -> None:
        """Statuses with a count of 0 are omitted, and the server's text is made printable."""
        assert by_status({"B": 1200, "A\x1b": 1, "C": 0}, 0) == "A� 1 · B 1,200"
        assert by_status({}, 3) == "errors 3"


class TestEntryPoint:
    """The entry points `kaizen-async` and `python -m kaizen_async`."""

    @pytest.mark.parametrize("missing", ["click", "rich"])
    def test_without_the_extra_it_says_how_to_get_it(self, missing: str) -> None:
        """Without the extra, the command names it in one line and exits with status 2."""
        program = f"import sys; sys.modules[{missing!r}] = None; from _kaizen_async_command import main; main()"
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)  # noqa: S603 - our own
        assert result.returncode == 2
        assert result.stderr == "The command needs an extra: pip install 'kaizen-async[cli]'\n"

    def test_another_module_that_is_missing_is_not_taken_for_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another missing module raises its own error, so that a broken installation is not hidden."""
        monkeypatch.delitem(sys.modules, "kaizen_async._cli.app", raising=False)
        monkeypatch.setitem(sys.modules, "kaizen_async._cli.get", None)
        monkeypatch.setattr(signal, "signal", lambda *_: None)  # the handler is only for a separate process
        with pytest.raises(ModuleNotFoundError, match=r"kaizen_async\._cli\.get"):
            _kaizen_async_command.main()

    def test_the_module_runs(self) -> None:
        """`python -m kaizen_async --version` prints the version."""
        result = subprocess.run(
            [sys.executable, "-m", "kaizen_async", "--version"], capture_output=True, text=True, check=True
        )
        assert result.stdout == f"kaizen-async, version {__version__}\n"

    def test_the_library_does_without_the_command(self) -> None:
        """Importing the library loads neither click nor rich."""
        program = (
            "import sys, kaizen_async, kaizen_async.testing.emulator\n"
            "assert not {'click', 'rich', 'kaizen_async._cli'} & set(sys.modules), sys.modules"
        )
        subprocess.run([sys.executable, "-c", program], check=True)  # noqa: S603 - our own
