"""The command `kaizen-async` in the test's process against an emulator."""

import asyncio
import json
import logging
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from io import BytesIO, StringIO
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from kaizen_async import (
    InstructorExecution,
    KaizenClient,
    Outcome,
    PollPolicy,
    RetryPolicy,
    TransportError,
)
from kaizen_async._cli import checkpoints, demo, options
from kaizen_async._cli.app import cli
from kaizen_async._cli.checkpoints import CheckpointFile, Saved, Taken
from kaizen_async._cli.ending import Stop
from kaizen_async._cli.formats import Layout
from kaizen_async._cli.ids import Source
from kaizen_async._ledger import Checkpoint
from kaizen_async.testing import Fault, KaizenEmulator, Life

Run = Callable[..., Result]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let waits accept a refusal at once."""
    policy = PollPolicy(min_interval=0.01, max_interval=0.15, refusal_patience=0)
    monkeypatch.setattr(options, "KaizenClient", partial(KaizenClient, poll=policy))


@pytest.fixture
def run(emulator: KaizenEmulator, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs the command against the emulator, with very frequent polls."""
    monkeypatch.setenv("KAIZEN_BASE_URL", emulator.base_url)
    quick = partial(KaizenClient, poll=PollPolicy(min_interval=0.01, max_interval=0.15))
    monkeypatch.setattr(options, "KaizenClient", quick)

    def invoke(*arguments: str, given: str | bytes = "") -> Result:
        result = CliRunner().invoke(cli, arguments, input=given, prog_name="kaizen-async")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


def lines_in(result: Result) -> list[dict[str, Any]]:
    """Return the decoded lines of output."""
    return [json.loads(line) for line in result.stdout.splitlines()]


def said(result: Result) -> str:
    """Return the last line of standard error without its duration."""
    return re.sub(r" · [\d.]+ s(?= ·)", "", result.stderr.splitlines()[-1])


def ids_in(result: Result) -> list[str]:
    """Return the ids of the lines of output, in order."""
    return [line["id"] for line in lines_in(result)]


class TestGet:
    """`get` writes one line for each id."""

    def test_records_are_written_as_the_api_names_their_fields(self, run: Run, emulator: KaizenEmulator) -> None:
        """A line is the record with the API's field names and nothing else."""
        emulator.add("exec_1", record={"sessionId": "s_1"})
        result = run("get", "exec_1")
        (record,) = lines_in(result)
        assert result.exit_code == 0
        assert record["sessionId"] == "s_1"
        assert msgspec.convert(record, InstructorExecution).id == "exec_1"
        assert "duration_ms" not in record
        assert said(result) == "1 found, 0 failed · 1 request"

    def test_a_failure_costs_its_own_line_only(self, run: Run, emulator: KaizenEmulator) -> None:
        """A failed id has a line with its error, the status is 1, and standard error has the counts."""
        emulator.add_many(["exec_1", "exec_3"])
        result = run("get", "exec_1", "exec_2", "exec_3")
        assert ids_in(result) == ["exec_1", "exec_2", "exec_3"]
        error = lines_in(result)[1]["error"]
        assert error["type"] == "NotFoundError"
        assert error["message"].startswith("the server answered 404")
        assert {name: error[name] for name in ("status", "attempts", "retryable")} == {
            "status": 404,
            "attempts": 1,
            "retryable": False,
        }
        assert result.exit_code == 1
        assert said(result) == "2 found, 1 failed (NotFoundError 1) · 3 requests"

    def test_results_for_arguments_come_in_their_order(self, run: Run, emulator: KaizenEmulator) -> None:
        """Results for arguments, also repeated ones, come in their order, whatever their durations."""
        emulator.add_many(["slow", "fast"])
        emulator.faults.next(Fault.latency(0.1), id="slow")
        assert ids_in(run("get", "slow", "fast", "slow", "fast")) == ["slow", "fast", "slow", "fast"]

    def test_results_for_lines_come_as_they_are_ready(self, run: Run, emulator: KaizenEmulator) -> None:
        """Results for lines of standard input come as they are ready."""
        emulator.add_many(["slow", "fast"])
        emulator.faults.next(Fault.latency(0.2), id="slow")
        assert ids_in(run("get", "-", given="slow\nfast\n")) == ["fast", "slow"]

    def test_lines_are_read_without_a_dash_when_there_are_no_arguments(
        self, run: Run, emulator: KaizenEmulator
    ) -> None:
        """Without arguments, the command reads standard input if it is not a terminal."""
        emulator.add("exec_1")
        assert ids_in(run("get", given="exec_1\n")) == ["exec_1"]

    @pytest.mark.parametrize(
        "given",
        ["exec_1\nexec_2\n", "exec_1\r\nexec_2", "\n\n  exec_1\t\n \nexec_2\n\n", "\ufeffexec_1\nexec_2\n"],
    )
    def test_white_space_blank_lines_and_byte_order_marks_are_no_part_of_ids(
        self, run: Run, emulator: KaizenEmulator, given: str
    ) -> None:
        """White space, blank lines and byte order marks are ignored, and the last line needs no line break."""
        emulator.add_many(["exec_1", "exec_2"])
        assert sorted(ids_in(run("get", "-", given=given))) == ["exec_1", "exec_2"]

    def test_white_space_around_arguments_is_ignored(self, run: Run, emulator: KaizenEmulator) -> None:
        """White space around arguments is ignored."""
        emulator.add("exec_1")
        assert ids_in(run("get", " exec_1 ")) == ["exec_1"]

    @pytest.mark.parametrize(
        ("bad", "why"),
        [
            (b"\xff\xfe", "line 2 of standard input is not valid text in its encoding"),
            (b"x" * 1_100_000, "line 2 of standard input is longer"),
            (b"exec\xe2\x80\x8b_1", "line 2 of standard input is not an id, because it contains U+200B (zero width"),
            (b'{"id": "exec_9"}', "line 2 of standard input is not an id, but looks like JSON or CSV"),
        ],
    )
    def test_an_invalid_line_is_reported(self, run: Run, emulator: KaizenEmulator, bad: bytes, why: str) -> None:
        """An invalid line is reported with status 2, and the other lines are looked up."""
        emulator.add_many(["exec_1", "exec_2"])
        result = run("get", "-", given=b"exec_1\n" + bad + b"\nexec_2\n")
        assert result.stdout.count("\n") == 2
        assert sorted(ids_in(result)) == ["exec_1", "exec_2"]
        assert why in result.stderr
        assert "1 line without a valid id" in result.stderr
        assert result.exit_code == 2

    def test_an_endless_line_is_not_kept(self, run: Run, emulator: KaizenEmulator) -> None:
        """A line is dropped as soon as it is too long."""
        pieces = [b"x" * 65_536] * 40 + [b"x\nexec_1\n"]

        class Long(BytesIO):
            def read1(self, size: int | None = -1, /) -> bytes:
                return pieces.pop(0) if pieces else b""

        taken = Source(Long(), "it", Layout())  # type: ignore[arg-type]

        async def take() -> list[str]:
            return [line async for line in taken]

        assert asyncio.run(take()) == ["exec_1"]
        assert taken.counts.invalid == 1

    def test_the_deadline_bounds_the_whole_command(self, run: Run, emulator: KaizenEmulator) -> None:
        """The deadline bounds the whole command, and each argument gets a line."""
        emulator.add("exec_1")
        emulator.faults.always(Fault.hang(), id="exec_2")
        result = run("get", "exec_1", "exec_2", "--deadline", "0.4")
        assert ids_in(result) == ["exec_1", "exec_2"]
        assert lines_in(result)[1]["error"]["type"] == "DeadlineExceededError"
        assert result.exit_code == 1

    def test_lines_left_unread_at_the_deadline_are_reported(self, run: Run, emulator: KaizenEmulator) -> None:
        """Standard error says that the deadline left lines unread, because they have no line of output."""
        emulator.faults.always(Fault.hang())
        given = "".join(f"exec_{number}\n" for number in range(1000))
        result = run("get", "--concurrency", "1", "--deadline", "0.2", given=given)
        assert result.exit_code == 1
        # The loop decides how many start in the last millisecond: uvloop's timers fire up to a millisecond early.
        assert re.match(
            r"out of time: 0 found, \d+ failed \(Deadline.* not all of standard input was read", result.stderr
        )
        assert len(lines_in(result)) < 1000

    def test_the_attempt_timeout_is_passed_on(self, run: Run, emulator: KaizenEmulator) -> None:
        """An attempt that exceeds `--attempt-timeout` is repeated."""
        emulator.add("exec_1")
        emulator.faults.next(Fault.hang(), id="exec_1")
        assert ids_in(run("get", "exec_1", "--attempt-timeout", "0.7")) == ["exec_1"]
        assert emulator.requests_for("exec_1") == 2

    def test_verbose_logs_attempts(self, run: Run, emulator: KaizenEmulator) -> None:
        """`-v` logs attempts to standard error, and afterwards the library is as quiet as before."""
        emulator.add("exec_1")
        result = run("get", "exec_1", "-v")
        assert "exec_1: attempt 1 got the record" in result.stderr
        log = logging.getLogger("kaizen_async")
        assert [handler for handler in log.handlers if not isinstance(handler, logging.NullHandler)] == []
        assert log.level == logging.NOTSET


class TestMisuse:
    """Invalid input is refused before anything is sent, with status 2 and advice."""

    @pytest.mark.parametrize(
        ("arguments", "why"),
        [
            (["get"], "no ids in standard input: name some (kaizen-async get exec_1 exec_2)"),
            (["wait"], "no ids in standard input: name some (kaizen-async wait exec_1 exec_2)"),
            (["watch", "-"], "no ids in standard input: name some (kaizen-async watch exec_1 exec_2)"),
            (["get", "exec_1", "-"], "ids or a dash"),
            (["get", "exec_1", " "], "is a variable of your shell unset?"),
            (["get", "\udcff"], "U+DCFF (not a Unicode character)"),
            (["get", "exec_1", "--base-url", "nonsense"], "the base URL must be an absolute URL"),
            (["get", "exec_1", "--base-url", "http://kaizen.example"], "or pass --allow-insecure-http"),
            (["get", "exec_1", "--concurrency", "0"], "0 is not in the range 1<=x<=100000"),
            (["get", "exec_1", "--concurrency", "100001"], "100001 is not in the range 1<=x<=100000"),
            (["get", "exec_1", "--rate", "nan"], "'nan' is not a number"),
            (["get", "exec_1", "--deadline", "soon"], "'soon' is not a number of seconds above 0"),
            (["get", "exec_1", "--deadline", "none"], "'none' is not a number of seconds above 0"),
            (["get", "exec_1", "--attempt-timeout", "nan"], "'nan' is not a number of seconds above 0"),
            (["wait", "exec_1", "--deadline", "-1"], "'-1' is not a number of seconds above 0, or none for no limit"),
            (["wait", "exec_1", "--deadline", "inf"], "'inf' is not a number"),
            (["emulator", "--fail-rate", "2"], "2.0 is not in the range 0<=x<=1"),
            (["demo", "--executions", "0"], "0 is not in the range x>=1"),
            (["frobnicate"], "No such command 'frobnicate'"),
        ],
    )
    def test_misuse(self, run: Run, emulator: KaizenEmulator, arguments: list[str], why: str) -> None:
        """Invalid arguments are refused with status 2, and nothing is sent."""
        result = run(*arguments)
        assert result.exit_code == 2
        assert why in " ".join(result.stderr.split())
        assert result.stdout == ""
        assert emulator.request_count == 0

    def test_an_invalid_key_is_refused_without_showing_it(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        """The error for an invalid key names its variable and does not show the key."""
        monkeypatch.setenv("KAIZEN_API_KEY", "se cret")
        result = run("get", "exec_1")
        assert result.exit_code == 2
        assert "KAIZEN_API_KEY contains whitespace" in result.stderr
        assert "cret" not in result.stderr

    def test_there_is_no_option_for_the_key(self, run: Run) -> None:
        """There is no option for the key, because other users could see it. The help names the variable."""
        assert "--api-key" not in run("get", "--help").stdout
        assert "KAIZEN_API_KEY" in run("--help").stdout

    @pytest.mark.parametrize("command", ["get", "wait", "watch"])
    @pytest.mark.parametrize(
        ("key", "advice"), [(None, "KAIZEN_API_KEY is not set"), ("wrong", "look at how KAIZEN_API_KEY is set")]
    )
    def test_a_refused_key_ends_the_command(
        self, impatient: None, monkeypatch: pytest.MonkeyPatch, command: str, key: str | None, advice: str
    ) -> None:
        """A refused key ends the command with status 2, because no lookup can succeed."""
        with KaizenEmulator(api_key="right", default_life=Life.ended()) as locked:
            monkeypatch.setenv("KAIZEN_BASE_URL", locked.base_url)
            if key is not None:
                monkeypatch.setenv("KAIZEN_API_KEY", key)
            result = CliRunner().invoke(cli, [command, "exec_1", "exec_2"])
        assert result.exit_code == 2
        assert f"the server refuses the API key (it responded with 401): {advice}: 0 " in result.stderr
        assert result.stdout == ""

    def test_an_execution_that_is_forbidden_is_one_failure(self, run: Run, emulator: KaizenEmulator) -> None:
        """A 403 for one id fails only that id."""
        emulator.add_many(["exec_1", "exec_2"])
        emulator.faults.always(Fault.status(403), id="exec_1")
        result = run("get", "exec_1", "exec_2")
        assert lines_in(result)[0]["error"]["type"] == "AuthenticationError"
        assert ids_in(result) == ["exec_1", "exec_2"]
        assert result.exit_code == 1

    def test_the_key_is_taken_from_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The command takes the key from the environment."""
        with KaizenEmulator(api_key="right", default_life=Life.ended()) as locked:
            monkeypatch.setenv("KAIZEN_BASE_URL", locked.base_url)
            monkeypatch.setenv("KAIZEN_API_KEY", "right")
            assert ids_in(CliRunner().invoke(cli, ["get", "exec_1"])) == ["exec_1"]


class TestWait:
    """`wait` writes one line for each end."""

    def test_ends_are_written_as_they_happen(self, run: Run, emulator: KaizenEmulator) -> None:
        """Ends are written in their order, and a failed execution gives status 1."""
        emulator.add("late", Life.lasting(1))
        emulator.add("early", Life.lasting(0.1, status="Failed"))
        result = run("wait", "late", "early")
        assert [(line["id"], line["status"]) for line in lines_in(result)] == [
            ("early", "Failed"),
            ("late", "Completed"),
        ]
        assert result.exit_code == 1
        assert said(result).startswith("2 ended (Completed 1 · Failed 1), 0 failed · ")

    def test_an_id_that_fails_has_its_line(self, run: Run, emulator: KaizenEmulator) -> None:
        """An id that fails has its line, the others continue, and the status is 1."""
        emulator.add("exec_1", Life.lasting(0.1))
        result = run("wait", "-", given="exec_1\nexec_2\n")
        ended = {line["id"]: line for line in lines_in(result)}
        assert ended.keys() == {"exec_1", "exec_2"}
        assert ended["exec_2"]["error"]["type"] == "NotFoundError"
        assert result.exit_code == 1
        assert said(result).startswith("1 ended (Completed 1), 1 failed (NotFoundError 1) · ")

    def test_an_execution_that_does_not_end_in_time_has_its_line(self, run: Run, emulator: KaizenEmulator) -> None:
        """An execution that does not end in time has a line with its last record, and the status is 1."""
        emulator.add("ends", Life.ended())
        emulator.add("runs", Life.running())
        result = run("wait", "ends", "runs", "--deadline", "0.4")
        assert ids_in(result) == ["ends", "runs"]
        error = lines_in(result)[1]["error"]
        assert error["type"] == "DeadlineExceededError"
        assert error["retryable"] is True
        assert error["lastExecution"]["status"] == "InProgress"
        assert result.exit_code == 1

    def test_no_limit_is_a_choice(self, run: Run, emulator: KaizenEmulator) -> None:
        """`--deadline none` waits without limit."""
        emulator.add("exec_1", Life.lasting(0.1))
        assert run("wait", "exec_1", "--deadline", "none").exit_code == 0


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Return a path for a checkpoint."""
    return tmp_path / "waiting.json"


class TestCheckpoint:
    """Runs with `wait --checkpoint` together print one end for each id."""

    @pytest.mark.parametrize("piped", [False, True])
    def test_runs_together_print_each_end_once(
        self, run: Run, emulator: KaizenEmulator, checkpoint: Path, piped: bool
    ) -> None:
        """The same command continues where time ran out, until all ids have ended and the file is removed."""
        wanted = [f"exec_{number}" for number in range(12)] + ["exec_0"]
        for number in range(12):
            emulator.add(f"exec_{number}", Life.lasting(0.12 * number))
        ended: list[str] = []
        statuses: list[int] = []
        for _ in count():
            given = {"given": "\n".join(wanted)} if piped else {}
            result = run(
                "wait", *([] if piped else wanted), "--deadline", "0.4", "--checkpoint", str(checkpoint), **given
            )
            ended += ids_in(result)
            statuses.append(result.exit_code)
            if not checkpoint.exists():
                break
            assert "out of time: " in result.stderr
            assert f"run the same command again to continue from {checkpoint}" in result.stderr
        assert Counter(ended) == Counter(wanted)
        assert statuses == [1] * (len(statuses) - 1) + [0]
        assert len(statuses) > 1
        assert f"nothing is left to do, so {checkpoint} is removed" in result.stderr

    def test_without_ids_it_continues_the_file(self, run: Run, emulator: KaizenEmulator, checkpoint: Path) -> None:
        """Without ids, the command continues the ids in the checkpoint."""
        emulator.add_many(["exec_1", "exec_2"], Life.running())
        first = run("wait", "exec_1", "exec_2", "--deadline", "0.1", "--checkpoint", str(checkpoint))
        assert said(first).startswith("out of time: 0 ended, 0 failed · 2 still waited for · ")
        assert "run the same command again" in first.stderr
        emulator.add_many(["exec_1", "exec_2"], Life.ended())
        second = run("wait", "--checkpoint", str(checkpoint))
        assert sorted(ids_in(second)) == ["exec_1", "exec_2"]
        assert second.exit_code == 0

    def test_further_ids_can_follow_the_same_ones(self, run: Run, emulator: KaizenEmulator, checkpoint: Path) -> None:
        """Ids that were already read are skipped, and further ids are added."""
        emulator.add("ended", Life.ended())
        emulator.add("exec_1", Life.running())
        first = run("wait", "ended", "exec_1", "--deadline", "0.4", "--checkpoint", str(checkpoint))
        emulator.add_many(["exec_1", "new"], Life.ended())
        second = run("wait", "ended", "exec_1", "new", "--checkpoint", str(checkpoint))
        assert ids_in(first) == ["ended"]
        assert sorted(ids_in(second)) == ["exec_1", "new"]

    def test_a_checkpoint_is_not_made_plain(
        self, run: Run, emulator: KaizenEmulator, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A run reads and saves a checkpoint without a dict for each id: with two million it would end too late."""
        monkeypatch.setattr(Checkpoint, "plain", None)
        emulator.add("exec_1", Life.running())
        assert run("wait", "exec_1", "--deadline", "0.1", "--checkpoint", str(checkpoint)).exit_code == 1
        assert "1 still waited for" in run("wait", "--deadline", "0.1", "--checkpoint", str(checkpoint)).stderr

    def test_an_empty_checkpoint_can_be_resumed(self, run: Run, emulator: KaizenEmulator, checkpoint: Path) -> None:
        """A run resumes from a checkpoint without ids, because a process may be killed at its start."""

        async def nothing() -> Checkpoint:
            async with KaizenClient() as kaizen, kaizen.instructor_executions.wait_many() as ends:
                return ends.left()

        saved = Saved(base_url=emulator.base_url, taken=Taken(), unprinted=[], waiting=asyncio.run(nothing()))
        CheckpointFile(checkpoint, emulator.base_url).save(saved)
        emulator.add("exec_1")
        assert ids_in(run("wait", "--checkpoint", str(checkpoint), given="exec_1")) == ["exec_1"]
        CheckpointFile(checkpoint, emulator.base_url).save(saved)
        result = run("wait", "--checkpoint", str(checkpoint))
        assert result.exit_code == 0
        assert said(result) == f"0 ended, 0 failed · 0 requests · nothing is left to do, so {checkpoint} is removed"

    @pytest.mark.parametrize("others", [["exec_2", "exec_1"], ["exec_1"], ["other", "another", "third"]])
    @pytest.mark.parametrize("piped", [False, True])
    def test_other_ids_are_refused(
        self, run: Run, emulator: KaizenEmulator, checkpoint: Path, others: list[str], piped: bool
    ) -> None:
        """Other ids than those of the checkpoint are refused instead of skipped."""
        emulator.add_many(["exec_1", "exec_2", *others], Life.running())
        run("wait", "exec_1", "exec_2", "--deadline", "0.1", "--checkpoint", str(checkpoint))
        before = checkpoint.read_bytes()
        arguments = ["wait", "--checkpoint", str(checkpoint)]
        result = run(*arguments, given="\n".join(others)) if piped else run(*arguments, *others)
        assert result.exit_code == 2
        assert "begins with 2 other ids" in result.stderr
        assert checkpoint.read_bytes() == before

    def test_an_input_without_ids_keeps_the_file(self, run: Run, emulator: KaizenEmulator, checkpoint: Path) -> None:
        """An input without ids is refused, and the checkpoint stays for the right input."""
        emulator.add("exec_1", Life.running())
        run("wait", "exec_1", "--deadline", "0.1", "--checkpoint", str(checkpoint))
        emulator.add("exec_1", Life.ended())
        second = run("wait", "--checkpoint", str(checkpoint), given="name,size\n")
        assert second.exit_code == 2
        assert "the first line of standard input looks like CSV without a column id (name, size)" in second.stderr
        assert checkpoint.exists()

    def test_a_refused_key_loses_no_id(
        self, impatient: None, monkeypatch: pytest.MonkeyPatch, checkpoint: Path
    ) -> None:
        """After a refused key, the same command with the right key waits for all ids."""
        with KaizenEmulator(api_key="right", default_life=Life.ended()) as locked:
            monkeypatch.setenv("KAIZEN_BASE_URL", locked.base_url)
            command = ["wait", "exec_1", "exec_2", "exec_1", "--checkpoint", str(checkpoint)]
            assert CliRunner().invoke(cli, command).exit_code == 2
            monkeypatch.setenv("KAIZEN_API_KEY", "right")
            assert Counter(ids_in(CliRunner().invoke(cli, command))) == Counter({"exec_1": 2, "exec_2": 1})

    def test_the_file_belongs_to_one_server(self, run: Run, emulator: KaizenEmulator, checkpoint: Path) -> None:
        """A checkpoint of another server is refused, because its ids are unknown there."""
        emulator.add("exec_1", Life.running())
        run("wait", "exec_1", "--deadline", "0.1", "--checkpoint", str(checkpoint))
        result = run("wait", "exec_1", "--base-url", "https://kaizen.example", "--checkpoint", str(checkpoint))
        assert result.exit_code == 2
        assert f"is about {emulator.base_url}, not https://kaizen.example/" in result.stderr

    @pytest.mark.parametrize(
        "content",
        [
            "",
            "{}",
            "[1, 2",
            '{"kind": "kaizen-async wait", "base_url": "", "taken": {}, "unprinted": [], "waiting": {}}',
            (
                '{"kind": "kaizen-async wait", "base_url": "URL", "taken": {}, "unprinted": [], '
                '"waiting": {"version": 1, "taken_at": 0.0, "ids": [], "learned": null}}'
            ),
        ],
    )
    def test_another_file_is_refused_and_kept(
        self, run: Run, emulator: KaizenEmulator, checkpoint: Path, content: str
    ) -> None:
        """A file that is not a checkpoint is refused and stays unchanged."""
        content = content.replace("URL", emulator.base_url)
        checkpoint.write_text(content)
        result = run("wait", "exec_1", "--checkpoint", str(checkpoint))
        assert result.exit_code == 2
        assert "is not a checkpoint of kaizen-async wait" in result.stderr
        assert checkpoint.read_text() == content

    def test_an_unreadable_checkpoint_is_reported_at_once(self, run: Run, tmp_path: Path) -> None:
        """A checkpoint that cannot be read is reported at once with status 2."""
        (tmp_path / "file").touch()
        result = run("wait", "exec_1", "--checkpoint", str(tmp_path / "file" / "waiting.json"))
        assert result.exit_code == 2
        assert "cannot read the checkpoint" in result.stderr

    def test_an_unwritable_checkpoint_is_reported_at_once(
        self, run: Run, emulator: KaizenEmulator, tmp_path: Path
    ) -> None:
        """A checkpoint that cannot be written is reported before the first request."""
        result = run("wait", "exec_1", "--checkpoint", str(tmp_path / "nowhere" / "waiting.json"))
        assert result.exit_code == 2
        assert "cannot write the checkpoint" in result.stderr
        assert emulator.request_count == 0

    def test_a_file_that_cannot_be_written_later_does_not_end_the_wait(
        self, run: Run, emulator: KaizenEmulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If a checkpoint cannot be written later, the command reports it, retries, and continues to wait."""
        folder = tmp_path / "folder"
        folder.mkdir()
        monkeypatch.setattr(checkpoints, "SAVE_EVERY", 0.01)
        monkeypatch.setattr(checkpoints, "SHARE_OF_TIME", 1000)
        reported: list[str] = []

        def report(text: str) -> None:
            reported.append(text)
            server.add("exec_1", Life.ended())

        monkeypatch.setattr(checkpoints, "say", report)

        def life(_: str) -> Life:
            folder.rename(tmp_path / "elsewhere")
            return Life.running()

        with KaizenEmulator(default_life=life) as server:
            result = run("wait", "exec_1", "--base-url", server.base_url, "--checkpoint", str(folder / "waiting.json"))
        assert reported[0].startswith("cannot write the checkpoint")
        assert reported[0].endswith("trying again")
        assert ids_in(result) == ["exec_1"]
        assert result.exit_code == 0

    def test_a_temporary_file_that_failed_is_not_left_behind(
        self, run: Run, emulator: KaizenEmulator, checkpoint: Path
    ) -> None:
        """A failed write leaves no temporary file behind."""
        emulator.add("exec_1", Life.running())
        checkpoint.mkdir()
        result = run("wait", "exec_1", "--checkpoint", str(checkpoint / ".." / checkpoint.name))
        assert result.exit_code == 2
        assert list(checkpoint.parent.iterdir()) == [checkpoint]


class TestWatch:
    """`watch` writes one line for each change."""

    def test_changes_have_a_before_and_an_after(self, run: Run, emulator: KaizenEmulator) -> None:
        """The first state has no `before`, and the last change is the end."""
        emulator.add("exec_1", Life.of(("Enqueued", 0), ("Zorp", 0.7), ("Completed", 1.4)))
        result = run("watch", "exec_1")
        seen = [(line["before"] and line["before"]["status"], line["after"]["status"]) for line in lines_in(result)]
        assert seen == [(None, "Enqueued"), ("Enqueued", "Zorp"), ("Zorp", "Completed")]
        assert result.exit_code == 0
        assert said(result).startswith("1 ended (Completed 1), 0 failed · ")

    def test_an_id_that_cannot_be_watched_has_its_line(self, run: Run, emulator: KaizenEmulator) -> None:
        """An id that fails has its line, the others continue, and the status is 1."""
        emulator.add("exec_1", Life.ended())
        result = run("watch", "exec_1", "exec_2")
        assert [line["error"]["type"] for line in lines_in(result) if "error" in line] == ["NotFoundError"]
        assert result.exit_code == 1
        assert said(result) == "1 ended (Completed 1), 1 failed (NotFoundError 1) · 2 requests"

    def test_an_execution_still_running_at_the_deadline_has_its_line(self, run: Run, emulator: KaizenEmulator) -> None:
        """An execution that still runs at the deadline has its line, and the status is 1."""
        emulator.add("exec_1", Life.running())
        result = run("watch", "-", "--deadline", "0.4", given="exec_1\n")
        assert lines_in(result)[-1]["error"]["type"] == "DeadlineExceededError"
        assert result.exit_code == 1

    def test_a_bad_line_is_reported(self, run: Run, emulator: KaizenEmulator) -> None:
        """An invalid line is reported with status 2, and the others are watched."""
        emulator.add("exec_1", Life.ended())
        result = run("watch", "-", given=b"exec_1\n\xff\n")
        assert ids_in(result) == ["exec_1"]
        assert result.exit_code == 2


class TestDemo:
    """`demo` runs thousands of lookups and loses none."""

    def test_every_lookup_is_accounted_for(self, run: Run) -> None:
        """The last line reports that every lookup has a result, and the status is 0."""
        result = run("demo", "--executions", "1200")
        assert result.exit_code == 0
        assert result.stdout.splitlines()[-1] == "1,200 of 1,200 accounted for"
        assert result.stdout.splitlines()[0].startswith("1,200 executions looked up in ")

    def test_the_same_seed_gives_the_same_counts(self, run: Run) -> None:
        """The same seed gives the same counts by status. The number of requests also depends on the machine."""
        shown = [run("demo", "--executions", "300", "--seed", seed) for seed in ("7", "7", "8")]
        statuses = [re.findall(r"(\d+)  (Completed|Failed|InProgress|Enqueued|Paused)", ran.stdout) for ran in shown]
        assert statuses[0] == statuses[1] != statuses[2]
        assert figures(shown[0])["found"] == "300"
        assert figures(shown[0])["faults met"] != "0"

    def test_failed_lookups_are_accounted_for_too(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        """With a fault in every request, failed lookups are counted too."""
        monkeypatch.setattr(demo, "KaizenClient", partial(KaizenClient, retry=RetryPolicy(initial_backoff=0.01)))
        result = run("demo", "--executions", "15", "--faults", "1")
        shown = figures(result)
        assert int(shown["found"]) + int(shown["failed"]) == 15
        assert int(shown["failed"]) > 0
        assert shown["lost"] == "0"
        assert result.exit_code == 0

    def test_a_lost_lookup_is_reported(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        """A lost lookup is reported with status 1."""
        look_up = demo._look_up

        async def lose_one(stop: Stop, kaizen: KaizenClient, account: demo.Account) -> None:
            account.wanted -= 1
            await look_up(stop, kaizen, account)
            account.wanted += 1

        monkeypatch.setattr(demo, "_look_up", lose_one)
        result = run("demo", "--executions", "10")
        assert figures(result)["lost"] == "1"
        assert result.stdout.splitlines()[-1] == "9 of 10 accounted for"
        assert result.exit_code == 1

    def test_before_the_first_outcome_there_is_no_slowest(self) -> None:
        """A demo that is interrupted before its first outcome shows no slowest lookup."""
        screen = Console(file=StringIO(), width=80)
        demo.show(demo.Account(wanted=5, seconds=1.0, interrupted=True), screen)
        assert isinstance(screen.file, StringIO)
        assert "slowest" not in screen.file.getvalue()
        assert "unfinished        5" in screen.file.getvalue()

    def test_an_outcome_that_comes_twice_is_not_accounted_for(self) -> None:
        """A second outcome for an id counts as an error of the account."""
        account = demo.Account(wanted=2)
        outcome: Outcome[InstructorExecution] = Outcome("exec_1", None, TransportError("no"), 1, 0.1)
        account.add(outcome)
        assert account.accounted == 1
        account.add(outcome)
        assert account.accounted == 0

    def test_the_program_that_it_shows_works(self, run: Run, emulator: KaizenEmulator) -> None:
        """The program that the demo shows runs unchanged in its own process."""
        emulator.add_many(["exec_1", "exec_2"])
        shown = run("demo", "--executions", "10").stdout
        assert all(line in shown for line in demo.SNIPPET.splitlines())
        code = [sys.executable, "-c", demo.SNIPPET]
        program = subprocess.run(code, capture_output=True, text=True, check=True)  # noqa: S603 - our own
        assert sorted(line.split()[0] for line in program.stdout.splitlines()) == ["exec_1", "exec_2", "exec_3"]
        assert "exec_3 exec_3: the server answered 404" in program.stdout


def figures(result: Result) -> dict[str, str]:
    """Return the counts of a demo by name."""
    shown: dict[str, str] = {}
    for line in result.stdout.splitlines():
        name, number = line[2:14].strip(), line[14:22].strip()
        if name and line.startswith("  ") and name not in ("throughput", "slowest"):
            shown[name] = number.replace(",", "")
    return shown
