"""The command with unusual settings, files, inputs and servers."""

import asyncio
import json
import os
import signal
import time
from collections import Counter
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import click
import pytest
from click.testing import CliRunner
from running_command import Command, Piped, ids_in

import _kaizen_async_command
from kaizen_async import AuthenticationError, ExecutionStatus, StatusError, WorkflowExecution, __main__
from kaizen_async._cli import app, checkpoints, output, progress, results
from kaizen_async._cli.app import cli
from kaizen_async._cli.checkpoints import CheckpointFile
from kaizen_async._cli.ending import OutputError
from kaizen_async._cli.formats import Layout
from kaizen_async._cli.ids import Arguments, Source
from kaizen_async._cli.output import Output, OutputOptions, _document_for
from kaizen_async._cli.progress import Progress, Tally, Trouble, by_status, line_of_lookups
from kaizen_async._cli.wait import Wait
from kaizen_async._ledger import Checkpoint
from kaizen_async.events import AttemptEnded, Gated, OutageBegan, OutageEnded
from kaizen_async.testing import Fault, KaizenEmulator, Life


def test_headers_are_sent_and_never_shown(command: Command, server: KaizenEmulator, tmp_path: Path) -> None:
    """Headers come from options and files, and their values are never shown."""
    file = tmp_path / "headers.txt"
    file.write_text("X-File: from-file\n\n")
    sent = command("get", "a", "-H", "X-Tenant:  secret-1 ", "--header", f"@{file}", "-v")
    assert sent.exit_code == 0
    assert "secret-1" not in sent.output
    headers = server.requests[-1].headers
    assert (headers["X-Tenant"], headers["X-File"]) == ("secret-1", "from-file")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("secret-1", "give a header as NAME: VALUE"),
        (": secret-1", "give a header as NAME: VALUE"),
        ("X y: secret-1", "is not the name of a header field"),
        ("X: secret-1\nsecret-1", "holds a line break"),
        ("Host: secret-1", "the client sets 'Host' itself"),
        ("@no-file", "cannot read no-file: No such file"),
    ],
)
def test_headers_that_cannot_be_sent(command: Command, server: KaizenEmulator, given: str, why: str) -> None:
    """An invalid header is refused without showing its value."""
    refused = command("get", "a", "-H", given)
    assert (refused.exit_code, server.request_count) == (2, 0)
    assert why in " ".join(refused.stderr.split())
    assert "secret-1" not in refused.stderr


def test_invalid_settings_are_refused(command: Command, server: KaizenEmulator, tmp_path: Path) -> None:
    """Each invalid setting is refused by name before anything is sent."""
    text = tmp_path / "text"
    text.write_bytes(b"\xff")
    refused = {
        ("--ca-file", text): "it holds no certificate in PEM format",
        ("--ca-file", tmp_path / "none"): "No such file",
        ("--proxy", "nonsense"): "proxy",
        ("--fields", "id,,x"): "give names separated by commas",
        ("-H", "A: 1", "-H", "a: 2"): "a is given twice",
        ("-H", f"@{text}"): "is not UTF-8 text",
    }
    for arguments, why in refused.items():
        result = command("get", "a", *arguments)
        assert result.exit_code == 2, arguments
        assert why in result.stderr
    watched = command("watch", "a", "-f", "table", "-o", tmp_path / "x")
    assert "the live table of watch needs a terminal" in watched.stderr
    assert server.request_count == 0


def test_requests_are_spaced_by_the_rate(command: Command, server: KaizenEmulator) -> None:
    """`--rate` spaces the requests, and the first one is sent at once."""
    began = time.monotonic()
    assert command("get", "a", "b", "c", "--rate", "50").exit_code == 0
    assert time.monotonic() - began >= 2 / 50


def test_completion_scripts(command: Command) -> None:
    """Both ways to get a completion script give one for the command."""
    assert "_kaizen_async_completion" in command("completion", "zsh").stdout
    with Piped(base_url="", settings={"_KAIZEN_ASYNC_COMPLETE": "bash_source"}) as shell:
        status, output, _ = shell.end()
    assert (status, b"_kaizen_async_completion" in output) == (0, True)


def test_an_error_of_decoding_is_not_replaced() -> None:
    """The error handler replaces only characters that an encoding lacks, and raises decoding errors."""
    error = UnicodeDecodeError("ascii", b"\xff", 0, 1, "no")
    with pytest.raises(UnicodeDecodeError):
        app._replace(error)


def test_many_bad_lines_are_counted(command: Command) -> None:
    """The first twenty invalid lines are reported one by one, and the rest as a number."""
    result = command("get", "-", "-q", given=b"a\n" + b"b c\n" * 24 + b"\xef\xbf\xbd\n")
    assert result.stderr.count("because it contains U+0020") == 20
    assert "5 more lines of standard input are not ids" in result.stderr
    assert "is not valid text in its encoding" in command("get", "-", given="a\ufffd\n").stderr
    assert command("get", "-", "-q", given="a\n").stderr == ""


def test_arguments_of_every_length_and_encoding(command: Command) -> None:
    """A very long argument is an id, and undecoded bytes are read as UTF-8."""
    assert command("get", "x" * 5000).exit_code == 1
    undecoded = "é".encode().decode("ascii", "surrogateescape")
    assert json.loads(command("get", undecoded).stdout)["id"] == "é"


def test_a_record_keeps_the_id_that_was_asked_for(command: Command, server: KaizenEmulator) -> None:
    """The output has the requested id, even if the server spells it differently. Invalid UTF-8 is replaced."""
    record = WorkflowExecution(id="abc", status=ExecutionStatus("x"))
    assert json.loads(_document_for(record, "ABC"))["id"] == "ABC"
    server.add("odd", Life.ended(), body=b'{"execution":{"id":"odd","status":"x","note":"\xff"}}')
    shown = command("get", "--kind", "executions", "odd", "--fields", "id,note").stdout
    assert json.loads(shown) == {"id": "odd", "note": "\ufffd"}


def test_results_do_not_go_into_the_file_of_ids(server: KaizenEmulator, tmp_path: Path) -> None:
    """The command refuses standard output that is the file of ids."""
    file = tmp_path / "ids.txt"
    file.write_text("a\n")
    with file.open("rb") as stdin, file.open("ab") as stdout:
        with Piped("get", "-", base_url=server.base_url, stdin=stdin.fileno(), stdout=stdout.fileno()) as running:
            status, _, said = running.end()
    assert (status, file.read_text()) == (2, "a\n")
    assert "standard output is the file that the ids come from" in said


async def test_a_named_pipe_opens_once_it_has_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a named pipe waits for a reader without blocking the event loop."""
    monkeypatch.setattr(output, "LOOK_AGAIN", 0)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    opening = asyncio.create_task(output._open_device(pipe))
    for _ in range(3):
        await asyncio.sleep(0)
    assert not opening.done()
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with await opening as device:
        device.write(b"x")
        assert os.read(reader, 9) == b"x"
    os.close(reader)
    with pytest.raises(FileNotFoundError):
        await output._open_device(tmp_path / "missing")


@pytest.mark.parametrize("name", ["get", "wait", "watch"])
def test_a_signal_ends_the_wait_for_the_reader_of_a_pipe(
    name: str, command: Command, server: KaizenEmulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal ends the wait for a pipe's reader before any lookup."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    async def never(_: Path) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(60)

    monkeypatch.setattr(output, "_open_device", never)
    assert command(name, "a", "-o", pipe).exit_code == 143
    assert not server.requests


def test_checkpoints_that_cannot_be_read(
    command: Command, server: KaizenEmulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device, a file with deep nesting and a file that is too large are refused as checkpoints."""
    file = tmp_path / "waiting.json"
    start = f'{{"kind":"kaizen-async wait","base_url":"{server.base_url}","taken":{{}},"unprinted":[],"waiting":'
    file.write_text(start + '{"x":' + "[" * 1_000_000)
    for path, why in ((file, "nested too deeply"), (Path("/dev/null"), "not a regular file")):
        assert why in command("wait", "a", "--checkpoint", path).stderr
    monkeypatch.setattr(checkpoints, "LARGEST", 10)
    assert "too large" in command("wait", "a", "--checkpoint", file).stderr


def test_files_of_results_that_cannot_be_read(
    command: Command, server: KaizenEmulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of results that cannot be read is refused and stays unchanged."""
    file = tmp_path / "out.ndjson"
    file.write_text("x" * 100)
    monkeypatch.setattr(results, "LONGEST_LINE", 50)
    assert "lines that are too long" in command("get", "a", "-o", file, "--resume").stderr

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.undo()
    monkeypatch.setenv("KAIZEN_BASE_URL", "http://127.0.0.1:9")
    saved_at(server, tmp_path / "waiting.json", 0)
    with monkeypatch.context() as context:
        context.setattr(results.os, "fstat", fail)
        with pytest.raises(click.UsageError, match="cannot resume from"):
            results.ResultFile(Output(OutputOptions(file=file), Arguments()), file).ids_since(0)
    monkeypatch.setattr(os, "truncate", fail)
    assert "cannot resume from" in command("get", "a", "-o", file, "--resume").stderr
    assert file.read_text() == "x" * 100


def saved_at(server: KaizenEmulator, file: Path, written: int, *ids: object) -> None:
    """Write a checkpoint of a wait for ids, with the size of its output file."""
    entries = [[execution_id, 2] for execution_id in ids]
    state = {
        "kind": "kaizen-async wait",
        "base_url": server.base_url,
        "taken": {"count": 0, "digest": ""},
        "unprinted": ["c"],
        "waiting": {"version": 2, "taken": 0, "taken_at": 0.0, "ids": entries, "learned": None},
        "written": written,
    }
    file.write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("options", "before", "torn", "after"),
    [
        (["--only-ids"], "", "a\na\nc\nb", "a a b b c"),
        (["-f", "json"], "[\n]\n", '[\n{"id":"a"},\n{"id":"a"},\n{"id":"c"},\n{"id":"b",', "a a b b c"),
        (["-f", "json"], '[\n{"id":"z"}\n]\n', '[\n{"id":"z"},\n{"id":"a"},\n{"id":"a"},\n{"id":"c"}', "a a b b c z"),
        (["--fields", "status"], "", "", None),
        (["-f", "table"], "", "", None),
    ],
)
def test_results_that_are_newer_than_the_checkpoint_count(
    command: Command, server: KaizenEmulator, tmp_path: Path, options: list[str], before: str, torn: str, after: Any
) -> None:
    """Results newer than the checkpoint count, and a truncated one is removed.

    Output without ids is only appended to.
    """
    file, checkpoint = tmp_path / "out", tmp_path / "waiting.json"
    file.write_text(torn)
    written = len(before.removesuffix("\n]\n")) if before else 0
    saved_at(server, checkpoint, written, "a", "b")
    result = command("wait", "--checkpoint", checkpoint, "-o", file, *options)
    assert result.exit_code == 0
    text = file.read_text()
    if after is None:
        assert len(text.splitlines()) >= 5
        return
    ids = text.split() if options == ["--only-ids"] else [record["id"] for record in json.loads(text)]
    assert sorted(ids) == after.split()
    assert "3 already there" in result.stderr


def test_a_second_crash_forgets_no_result_of_the_first(
    command: Command, server: KaizenEmulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a resumed run also crashes, the next run still knows the results of both."""
    file, checkpoint = tmp_path / "out.ndjson", tmp_path / "waiting.json"
    saved_at(server, checkpoint, 0)
    file.write_text('{"id":"a"}\n{"id":"b"}\n')
    server.add("d", Life.ended())
    arguments = ("wait", "-", "--checkpoint", checkpoint, "-o", file)
    save, saves = CheckpointFile.save, list[None]()
    with monkeypatch.context() as context:
        context.setattr(CheckpointFile, "save", lambda *given: saves or saves.append(save(*given)))
        context.setattr(CheckpointFile, "remove", lambda _: None)
        command(*arguments, given="a\nb\nd\n")
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]) + '{"id":')
    result = command(*arguments, given="a\nb\nd\n")
    assert (result.exit_code, sorted(ids_in(file))) == (0, ["a", "b", "c", "d"])
    assert not checkpoint.exists()


def test_output_files_that_do_not_belong_to_the_checkpoint(
    command: Command, server: KaizenEmulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shorter output file is appended to, and one with other content is refused."""
    file, checkpoint = tmp_path / "out.ndjson", tmp_path / "waiting.json"
    saved_at(server, checkpoint, 500, "a")
    assert command("wait", "--checkpoint", checkpoint, "-o", file).exit_code == 0
    assert len(file.read_text().splitlines()) == 3
    saved_at(server, checkpoint, 0, "a")
    file.write_text("something else\n")
    refused = command("wait", "--checkpoint", checkpoint, "-o", file)
    assert "is not the file of results that belongs to the checkpoint" in " ".join(refused.stderr.split())
    assert file.read_text() == "something else\n"


def test_a_file_with_two_records_of_an_id_keeps_the_first(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed file keeps the first of two records of an id."""
    monkeypatch.setattr(results, "AT_ONCE", 1)
    file = tmp_path / "out.ndjson"
    file.write_text('{"id":"a","n":1}\n{"id":"a","n":2}\n')
    assert command("get", "-o", file, "--resume").exit_code == 0
    assert file.read_text() == '{"id":"a","n":1}\n'


def test_before_a_stream_has_ended_there_is_no_total() -> None:
    """Without a total there is no progress share, and without a rate no remaining time."""
    plan: Any = SimpleNamespace(saved=None, ids=Source(BytesIO(), "it", Layout()))  # type: ignore[arg-type]
    stop: Any = None
    assert Wait(stop, plan)._total is None
    still: Any = SimpleNamespace(rate=0.0)
    assert line_of_lookups(still, Tally(), 5) == "0 / 5 · 0/s"


def test_the_module_is_the_command() -> None:
    """`python -m kaizen_async` runs the command."""
    assert __main__.main is _kaizen_async_command.main


def test_the_same_arguments_are_not_waited_for_again(command: Command, server: KaizenEmulator, tmp_path: Path) -> None:
    """Arguments whose results are newer than the checkpoint are not awaited again."""
    file, checkpoint = tmp_path / "out.ndjson", tmp_path / "waiting.json"
    file.write_text('{"id":"a"}\n')
    saved_at(server, checkpoint, 0)
    result = command("wait", "a", "b", "--checkpoint", checkpoint, "-o", file)
    assert (result.exit_code, server.requests_for("a")) == (0, 0)
    first, *others = [json.loads(line)["id"] for line in file.read_text().splitlines()]
    assert (first, sorted(others)) == ("a", ["b", "c"])


def test_ctrl_c_while_the_file_of_results_is_read(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the file of results is read sends and writes nothing."""

    async def interrupted(_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(10)

    monkeypatch.setattr(results.ResultFile, "load", interrupted)
    result = command("get", "a", "-o", tmp_path / "out.ndjson", "--resume")
    assert result.exit_code == 130
    assert result.stderr.startswith("interrupted: 0 found")


class TestTrouble:
    """Reports of pauses, outages and failures."""

    def test_pauses_and_outages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A pause is reported first, and an outage until it is over."""
        trouble = Trouble()
        assert trouble.words() == ""
        trouble(Gated(status=429, retry_after=3.0, pause=60.0))
        assert trouble.words() == "paused by the server for 1 min 0 s"
        monkeypatch.setattr(trouble, "_paused_until", 0.0)
        down = StatusError("the server answered 503", status=503, execution_id="a", attempts=1)
        trouble(OutageBegan(url="", error=down, refused=False, age=4.0, next_probe=1.0))
        assert trouble.words() == "the server has been failing for 4 s: the server answered 503"
        trouble(AttemptEnded("a", "", 1, 0.1, 200, None))
        assert trouble.words() != ""
        trouble(OutageEnded(url="", lasted=5.0, failed=3))
        assert trouble.words() == ""

    def test_requests_that_only_fail(self) -> None:
        """Failures are reported after two seconds until a success. A refused key is named."""
        trouble = Trouble()
        refused = AuthenticationError("the server answered 401", status=401, execution_id="a", attempts=1)
        trouble(AttemptEnded("a", "", 1, 5.0, 401, refused))
        assert trouble.words() == "the server has refused the API key for 5 s: the server answered 401"
        trouble(AttemptEnded("a", "", 1, 0.1, 200, None))
        assert trouble.words() == ""

    def test_statuses_beyond_the_eighth_are_summed_up(self) -> None:
        """Counts by status show eight statuses and the sum of the others."""
        assert by_status({f"S{number:02}": 1 for number in range(10)}).endswith("S07 1 · others 2")

    async def test_without_a_terminal_there_is_a_line_now_and_then(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Without a terminal, progress is a line from time to time, and one at once when trouble starts or ends."""
        monkeypatch.setattr(progress, "REFRESH", 0)
        monkeypatch.setattr(progress, "PLAIN_EVERY", 1000)
        troubles = iter(["", "the server is down", "the server is down", "", ""])
        over = asyncio.Event()

        def trouble() -> str:
            found = next(troubles, None)
            if found is None:
                over.set()
            return found or ""

        async with Progress(lambda _: "3 found", trouble=trouble):
            await over.wait()
            monkeypatch.setattr(progress, "PLAIN_EVERY", 0)
        assert capsys.readouterr().err.splitlines()[:2] == ["3 found · the server is down", "3 found"]


def test_watch_on_a_dumb_terminal_reports_lines(
    command: Command, server: KaizenEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`watch` on a dumb terminal reports progress lines, and the table at the end."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(progress, "REFRESH", 0.01)
    monkeypatch.setattr(progress, "PLAIN_EVERY", 0)
    server.add("runs", Life.running())
    result = command("watch", "a", "runs", "-f", "table", "--deadline", "0.5")
    assert result.exit_code == 1
    assert "1 ended · Completed 1 · 1 running · 0 failed" in result.stderr
    assert "DeadlineExceeded" not in result.stderr.splitlines()[0]


def test_the_emulator_plays_a_script_on_every_address(tmp_path: Path) -> None:
    """The emulator on all addresses warns that other machines can reach it, and names executions of its script."""
    script = tmp_path / "script.json"
    script.write_text('{"executions": {"mine": {"status": "Completed"}}}')
    with Piped("emulator", "--port", "0", "--host", "0.0.0.0", "--config", str(script), base_url="") as emulator:  # noqa: S104 - the test needs it
        shown = b"".join(emulator.line() for _ in range(3))
        _, _, said = emulator.stopped_by(signal.SIGINT)
    assert b" watch mine" in shown
    assert "Note: other machines can reach this emulator at 0.0.0.0 and that without a key" in said
    script.write_text("[]")
    refused = CliRunner().invoke(cli, ["emulator", "--config", str(script)])
    assert refused.exit_code == 2


def test_a_refused_key_loses_no_result_and_leaves_whole_json(
    command: Command, server: KaizenEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refused key ends the command with complete JSON, including results that waited for their order."""
    server.faults.always(Fault.status(401), id="b")
    ended = command("get", "a", "b", "c", "--format", "json", "--concurrency", "1")
    assert ended.exit_code == 2
    assert "the server refuses the API key" in ended.stderr
    assert [record["id"] for record in json.loads(ended.stdout)] == ["a"]
    ended = command("get", "b", "c", "--format", "json")
    assert ended.exit_code == 2
    assert {record["id"] for record in json.loads(ended.stdout)} <= {"c"}


def test_failed_ids_of_a_json_file_are_repeated_once_each(
    command: Command, server: KaizenEmulator, tmp_path: Path
) -> None:
    """`--resume` looks each failed id of a JSON file up once, while new results replace old ones."""
    file = tmp_path / "out.json"
    ids = [f"x{number}" for number in range(300)]
    error = {"type": "NotFoundError", "message": "no", "attempts": 1, "retryable": False}
    lines = ",\n".join(json.dumps({"id": each, "error": error}) for each in ids)
    file.write_text(f"[\n{lines}\n]\n")
    ended = command("get", "-o", file, "--format", "json", "--resume")
    assert ended.exit_code == 1
    assert Counter(server.requests_for(each) for each in ids) == {1: 300}
    assert sorted(record["id"] for record in json.loads(file.read_text())) == sorted(ids)


async def test_a_failed_sync_does_not_end_the_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed write is reported and retried."""
    monkeypatch.setattr(checkpoints, "SAVE_EVERY", 0.001)
    said: list[str] = []
    monkeypatch.setattr(checkpoints, "say", said.append)
    nothing = Checkpoint(2, 0, 0.0, [])
    saved = checkpoints.Saved(base_url="http://x/", taken=checkpoints.Taken(), unprinted=[], waiting=nothing)
    again = asyncio.Event()
    endings = iter([saved, OutputError("cannot write out.ndjson"), saved])

    def snapshot() -> checkpoints.Saved:
        ending = next(endings, None)
        if isinstance(ending, OutputError):
            raise ending
        if ending is None:
            again.set()
        return saved

    async with checkpoints.Saving(checkpoints.CheckpointFile(tmp_path / "saved", "http://x/"), snapshot):
        await asyncio.wait_for(again.wait(), 10)
    assert said == ["cannot write out.ndjson; trying again"]


def test_ctrl_c_before_the_work_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C before the work starts gives status 130 without a traceback."""
    monkeypatch.setattr(app, "cli", mock.Mock(side_effect=click.Abort))
    assert app._run() == 130


def test_fields_choose_a_format_that_has_them(
    command: Command, server: KaizenEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--fields` chooses a format that supports it and is refused with others."""
    assert OutputOptions(fields=("id",)).resolved == "ndjson"
    for other in (["--format", "table"], ["--only-ids"]):
        refused = command("get", "a", "--fields", "id", *other)
        assert refused.exit_code == 2
        assert f"{' '.join(other)} has no use for --fields" in refused.stderr


def test_ctrl_c_before_results_of_earlier_runs_are_read(
    command: Command, server: KaizenEmulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends a command that reads the results of earlier runs, before any lookup."""

    async def interrupted(_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(60)

    monkeypatch.setattr(results.ResultFile, "load", interrupted)
    ended = command("get", "a", "--resume", "-o", tmp_path / "results.ndjson")
    assert (ended.exit_code, "interrupted: " in ended.stderr) == (130, True)
    assert not server.requests
