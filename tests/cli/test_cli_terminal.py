"""The command `kaizen-async` in its own process, with pipes, signals and a real terminal."""

import json
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from running_command import OnTerminal, Piped

from kaizen_async.testing import Fault, KaizenEmulator, Life

pytestmark = pytest.mark.slow
LOOPS = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])


@pytest.fixture
def server() -> Iterator[KaizenEmulator]:
    """Yield an emulator on which every id has ended, except ids that a test adds."""
    with KaizenEmulator(default_life=Life.ended()) as running:
        yield running


def ids_in(output: bytes) -> list[str]:
    """Return the ids of lines of output, in order."""
    return [json.loads(line)["id"] for line in output.splitlines()]


def without_time(text: str) -> str:
    """Return a summary without its duration."""
    return re.sub(r" · [\d.]+ s(?= ·)", "", text)


class TestPipes:
    """Standard input and output are pipes and files."""

    @LOOPS
    def test_a_line_is_looked_up_as_soon_as_it_is_there(self, server: KaizenEmulator, loop: str) -> None:
        """The command looks a line up as soon as it arrives, before the pipe ends."""
        with Piped("get", base_url=server.base_url, loop=loop) as command:
            for number in range(3):
                command.feed(f"exec_{number}\n".encode())
                assert json.loads(command.line())["id"] == f"exec_{number}"
            assert command.end()[:2] == (0, b"")

    @LOOPS
    def test_a_file_is_read_like_a_pipe(self, server: KaizenEmulator, tmp_path: Path, loop: str) -> None:
        """A file is read and written like a pipe."""
        source, target = tmp_path / "ids.txt", tmp_path / "records.ndjson"
        wanted = [f"exec_{number}" for number in range(300)]
        source.write_text("\n".join(wanted))
        with source.open() as stdin, target.open("wb") as stdout:
            with Piped(
                "get", "-", base_url=server.base_url, loop=loop, stdin=stdin.fileno(), stdout=stdout.fileno()
            ) as command:
                status, _, said = command.end()
        assert (status, without_time(said)) == (0, "300 found, 0 failed · 300 requests\n")
        assert sorted(ids_in(target.read_bytes())) == sorted(wanted)

    @LOOPS
    def test_a_closed_pipe_ends_the_command_quietly(self, server: KaizenEmulator, loop: str) -> None:
        """A closed output pipe, as by `| head -1`, ends the command quietly with status 141."""
        with Piped("get", base_url=server.base_url, loop=loop) as command:
            command.feed(b"exec_1\n")
            command.line()
            command.stop_reading()
            command.feed(b"exec_2\n")
            assert command.end() == (141, b"", "")

    @LOOPS
    def test_a_slow_reader_slows_the_requests(self, server: KaizenEmulator, loop: str) -> None:
        """A slow reader slows the requests down, and no result is lost."""
        wanted = [f"exec_{number}" for number in range(400)]
        with Piped("get", "-", "--concurrency", "5", base_url=server.base_url, loop=loop) as command:
            command.feed("\n".join(wanted).encode() + b"\n")
            first, asked = command.line(), 0
            while asked < server.request_count:
                asked = server.request_count
                time.sleep(0.3)
            assert asked < len(wanted)
            status, rest, _ = command.end()
        assert status == 0
        assert sorted(ids_in(first + rest)) == sorted(wanted)

    @pytest.mark.parametrize("command", ["wait", "watch"])
    def test_a_pipe_that_stays_open_does_not_outlive_the_deadline(self, server: KaizenEmulator, command: str) -> None:
        """The deadline ends the command with an open pipe, and standard error says that input was left unread."""
        with Piped(command, "--deadline", "0.6", base_url=server.base_url) as process:
            process.feed(b"exec_1\n")
            assert json.loads(process.line())
            process.process.wait(20)
            status, rest, said = process.end()
        assert (status, rest) == (1, b"")
        assert without_time(said) == (
            "out of time: 1 ended (Completed 1), 0 failed · not all of standard input was read · 1 request\n"
        )

    def test_a_full_disk_is_reported(self, server: KaizenEmulator) -> None:
        """A full disk is reported in one line."""
        with (
            Path("/dev/full").open("wb") as full,
            Piped("get", "exec_1", base_url=server.base_url, stdout=full.fileno()) as command,
        ):
            status, _, said = command.end()
        assert (status, without_time(said)) == (
            1,
            "cannot write to standard output: No space left on device: 1 found, 0 failed · 1 request\n",
        )


class TestSignals:
    """Ctrl-C and similar signals end a command cleanly."""

    @pytest.mark.parametrize(
        ("loop", "signum", "status"), [("asyncio", signal.SIGINT, 130), ("uvloop", signal.SIGTERM, 143)]
    )
    def test_get_reports_its_progress(
        self, server: KaizenEmulator, loop: str, signum: signal.Signals, status: int
    ) -> None:
        """An interrupted `get` has written all results so far and reports its progress."""
        with Piped("get", "-", base_url=server.base_url, loop=loop) as command:
            command.feed(b"exec_1\n")
            assert ids_in(command.line()) == ["exec_1"]
            ended, rest, said = command.stopped_by(signum)
        assert (ended, rest) == (status, b"")
        assert without_time(said) == "interrupted: 1 found, 0 failed · not all of standard input was read · 1 request\n"

    def test_wait_leaves_a_checkpoint_that_resumes(self, server: KaizenEmulator, tmp_path: Path) -> None:
        """An interrupted `wait` leaves a checkpoint, and both runs together print one end for each id."""
        server.add_many(["runs_1", "runs_2"], Life.running())
        checkpoint = str(tmp_path / "waiting.json")
        command_line = ("wait", "ends", "runs_1", "runs_2", "--checkpoint", checkpoint)
        with Piped(*command_line, base_url=server.base_url) as command:
            assert ids_in(command.line()) == ["ends"]
            status, output, said = command.stopped_by(signal.SIGINT)
        assert (status, output) == (130, b"")
        assert said.startswith("interrupted: 1 ended (Completed 1), 0 failed · 2 still waited for · ")
        assert said.endswith(f" · run the same command again to continue from {checkpoint}\n")
        server.add_many(["runs_1", "runs_2"], Life.ended())
        with Piped(*command_line, base_url=server.base_url) as command:
            status, output, said = command.end()
        assert status == 0
        assert sorted(ids_in(output)) == ["runs_1", "runs_2"]
        assert said.startswith("2 ended (Completed 2), 0 failed · ")
        assert said.endswith(f" · nothing is left to do, so {checkpoint} is removed\n")

    def test_an_unprinted_end_is_printed_by_the_next_run(self, server: KaizenEmulator, tmp_path: Path) -> None:
        """An end whose line could not be written is printed by the next run."""
        checkpoint = str(tmp_path / "waiting.json")
        with Piped("wait", "-", "--checkpoint", checkpoint, base_url=server.base_url) as command:
            command.feed(b"exec_1\n")
            ended = ids_in(command.line())
            command.stop_reading()
            command.feed(b"exec_2\n")
            command.process.wait(20)
            assert command.end() == (141, b"", "")
        with Piped("wait", "-", "--checkpoint", checkpoint, base_url=server.base_url) as command:
            command.feed(b"exec_1\nexec_2\nexec_3\n")
            status, output, _ = command.end()
        assert status == 0
        assert ended == ["exec_1"]
        assert sorted(ids_in(output)) == ["exec_2", "exec_3"]

    def test_a_killed_process_leaves_its_last_checkpoint(self, server: KaizenEmulator, tmp_path: Path) -> None:
        """After a SIGKILL, the next run prints at least all ends that the first did not print."""
        server.add_many(["runs_1", "runs_2"], Life.running())
        checkpoint = str(tmp_path / "waiting.json")
        command_line = ("wait", "ends", "runs_1", "runs_2", "--checkpoint", checkpoint)
        with Piped(*command_line, base_url=server.base_url) as command:
            first = ids_in(command.line())
            assert command.stopped_by(signal.SIGKILL) == (-signal.SIGKILL, b"", "")
        server.add_many(["runs_1", "runs_2"], Life.ended())
        with Piped(*command_line, base_url=server.base_url) as command:
            status, output, _ = command.end()
        assert status == 0
        assert set(first + ids_in(output)) == {"ends", "runs_1", "runs_2"}
        assert Counter(ids_in(output)).most_common(1)[0][1] == 1

    def test_the_emulator_serves_until_then(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The emulator prints commands to paste, and Ctrl-C is its normal end."""
        settings = ("--port", "0", "--executions", "2", "--duration", "0", "--fail-rate", "1", "--api-key-required")
        with Piped("emulator", *settings, base_url="") as emulator:
            said = emulator.line() + emulator.line() + emulator.line()
            base_url = re.findall(rb"http://\S+/", said)[0].decode()
            assert (
                f"KAIZEN_API_KEY=emulator-key KAIZEN_BASE_URL={base_url} kaizen-async watch exec_1 exec_2\n"
                in said.decode()
            )
            with Piped("get", "exec_1", base_url=base_url) as command:
                assert command.end()[0] == 2
            monkeypatch.setenv("KAIZEN_API_KEY", "emulator-key")
            with Piped("get", "exec_2", "exec_3", base_url=base_url) as command:
                status, output, _ = command.end()
            assert status == 1
            assert [json.loads(line).get("status") for line in output.splitlines()] == ["Failed", None]
            status, rest, _ = emulator.stopped_by(signal.SIGINT)
        assert status == 0
        assert rest.splitlines()[-1] == b"3 requests, responses 200: 1, 401: 1, 404: 1"

    def test_an_unused_emulator_reports_no_requests(self, server: KaizenEmulator) -> None:
        """An unused emulator reports 0 requests, and a taken port is an error."""
        with Piped("emulator", "--port", "0", "--rate-limit", "5", "--faults", "0.1", base_url="") as emulator:
            assert b"exec_1 exec_2 exec_3" in emulator.line() + emulator.line() + emulator.line()
            assert emulator.stopped_by(signal.SIGTERM)[1].splitlines()[-1] == b"0 requests"
        port = server.base_url.split(":")[-1].strip("/")
        with Piped("emulator", "--port", port, base_url="") as emulator:
            status, _, said = emulator.end()
        assert status == 2
        assert "Address already in use; --port 0 takes a free port" in said


class TestTerminal:
    """The command on a terminal."""

    def test_get_shows_a_table(self, server: KaizenEmulator) -> None:
        """`get` shows a table, and no progress for short work."""
        with OnTerminal("get", "exec_1", "exec_2", base_url=server.base_url) as terminal:
            status, screen = terminal.end()
        header, first, second, summary = screen.splitlines()
        assert without_time(summary) == "2 found, 0 failed · 2 requests"
        assert header.split() == ["ID", "WORKFLOW", "STATUS", "STARTED", "TOOK"]
        assert first.startswith("exec_1 ")
        assert second.startswith("exec_2 ")
        assert "Completed" in first
        assert status == 0

    def test_get_shows_the_progress_of_long_work(self, server: KaizenEmulator) -> None:
        """`get` shows the progress of long work below the table, and Ctrl-C reports the rest."""
        server.faults.always(Fault.hang(), id="hangs")
        server.faults.always(Fault.status(404), id="missing")
        with OnTerminal("get", "missing", "hangs", "exec_1", base_url=server.base_url) as terminal:
            terminal.until(r"missing .*404")
            terminal.until(r"2 / 3 · \d+/s · .* 1 failed")
            terminal.press("\x03")
            status, screen = terminal.end()
        assert status == 130
        assert re.search(r"exec_1 .*Completed", screen), "it was found, though it had to wait for its turn"
        assert without_time(screen.splitlines()[-1]) == (
            "interrupted: 1 found, 1 failed (NotFoundError 1) · 1 not looked up · 3 requests"
        )
        assert "Traceback" not in screen

    def test_ids_can_be_typed(self, server: KaizenEmulator) -> None:
        """With a dash, ids can be typed without progress in between."""
        with OnTerminal("get", "-", base_url=server.base_url) as terminal:
            terminal.press("exec_1\n")
            terminal.until(r"exec_1 .*Completed")
            terminal.press("exec_2\n\x04")
            assert "exec_2" in terminal.until(r"exec_2 .*Completed")
            assert terminal.end()[0] == 0

    @pytest.mark.parametrize("command", ["get", "wait", "watch"])
    def test_without_ids_nothing_is_read_from_a_terminal(self, server: KaizenEmulator, command: str) -> None:
        """Without ids, the command does not read from a terminal, because it would seem to hang."""
        with OnTerminal(command, base_url=server.base_url) as terminal:
            status, screen = terminal.end()
        assert status == 2
        assert f"no ids: name some (kaizen-async {command} exec_1 exec_2)" in " ".join(screen.split())

    def test_progress_goes_to_standard_error(self, server: KaizenEmulator, tmp_path: Path) -> None:
        """Progress goes to standard error, results to standard output, and the counts stay at the end."""
        server.faults.always(Fault.latency(0.3))
        source, target = tmp_path / "ids.txt", tmp_path / "records.ndjson"
        source.write_text("\n".join(f"exec_{number}" for number in range(30)))
        with OnTerminal("get", "--concurrency", "5", base_url=server.base_url, stdin=source, stdout=target) as terminal:
            terminal.until(r"\d+ / 30 · ")
            status, screen = terminal.end()
        assert status == 0
        assert without_time(screen.splitlines()[-1]) == "30 found, 0 failed · 30 requests"
        assert len(ids_in(target.read_bytes())) == 30

    def test_wait_shows_counts_by_status(self, server: KaizenEmulator, tmp_path: Path) -> None:
        """`wait` shows counts of running, finished and failed executions without additional polls."""
        server.add_many(["runs_1", "runs_2"], Life.running())
        server.faults.always(Fault.status(404), id="missing")
        source = tmp_path / "ids.txt"
        source.write_text("runs_1\nruns_2\nended\nmissing")
        with OnTerminal("wait", base_url=server.base_url, stdin=source) as terminal:
            terminal.until(r"2 / 4 · Completed 1 · InProgress 2 · 1 failed")
            terminal.press("\x03")
            status, screen = terminal.end()
        assert status == 130
        assert screen.splitlines()[-1].startswith(
            "interrupted: 1 ended (Completed 1), 1 failed (NotFoundError 1) · 2 still waited for · "
        )
        assert server.requests_for("ended") == 1

    def test_wait_resumes_from_a_checkpoint_without_ids(self, server: KaizenEmulator, tmp_path: Path) -> None:
        """A resumed `wait` without ids shows the counts of the remaining ids."""
        server.add("exec_1", Life.running())
        checkpoint = str(tmp_path / "waiting.json")
        with OnTerminal("wait", "exec_1", "exec_2", "--checkpoint", checkpoint, base_url=server.base_url) as terminal:
            terminal.until("1 / 2 · ")
            terminal.press("\x03")
            assert terminal.end()[0] == 130
        with OnTerminal("wait", "--checkpoint", checkpoint, base_url=server.base_url) as terminal:
            terminal.until("0 / 1 · InProgress 1")
            server.add("exec_1", Life.ended())
            assert "exec_1" in terminal.until(r"exec_1 .*Completed")
            assert terminal.end()[0] == 0

    def test_watch_shows_a_live_table(self, server: KaizenEmulator) -> None:
        """`watch` updates its table in place, and Ctrl-C ends it."""
        server.add("exec_1", Life.running(status="Enqueued"))
        with OnTerminal("watch", "exec_1", "exec_2", base_url=server.base_url) as terminal:
            terminal.until(r"exec_1 .*Enqueued")
            server.add("exec_1", Life.running())
            terminal.until(r"exec_1 .*InProgress .* ago")
            terminal.press("\x03")
            status, screen = terminal.end()
        assert status == 130
        assert screen.splitlines()[-1].startswith("interrupted: 1 ended (Completed 1), 0 failed · 1 still running · ")

    def test_watch_takes_ids_from_a_file(self, server: KaizenEmulator, tmp_path: Path) -> None:
        """`watch` reads ids from a file, and the table stays at the end."""
        source = tmp_path / "ids.txt"
        source.write_text("exec_1\nexec_2\n")
        with OnTerminal("watch", base_url=server.base_url, stdin=source) as terminal:
            status, screen = terminal.end()
        assert status == 0
        assert screen.splitlines()[-2].strip() == "Completed 2"

    def test_the_demo_can_be_interrupted(self) -> None:
        """An interrupted demo shows its results so far."""
        with OnTerminal("demo", "--executions", "1000000", base_url="") as terminal:
            terminal.until(r"[\d,]+ / 1,000,000 · [\d,]+ retries")
            terminal.press("\x03")
            status, screen = terminal.end()
        assert status == 130
        assert re.search(r"unfinished +\d", screen)
        assert re.fullmatch(r"[\d,]+ of 1,000,000 accounted for", screen.splitlines()[-1])
