"""`kaizen-async run` with a worker in the same process: its output and its exit status."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from running_command import OnTerminal
from running_examples import RedisServer, free_port, require

from kaizen_async._cli import run as run_module
from kaizen_async._cli.run import _described, run
from kaizen_async.testing import KaizenEmulator, Life

require("taskiq", "taskiq_redis", "redis")

from kaizen_async.workers import Follower, Run  # noqa: E402 - skipped above without Redis
from kaizen_async.workers.run import RunStatus  # noqa: E402 - skipped above without Redis

NAMES = count()
BROKER = """
import os
from taskiq import InMemoryBroker
from kaizen_async.workers import register

broker = InMemoryBroker()
register(broker, url=os.environ["REDIS_URL"], namespace=os.environ["KAIZEN_NAMESPACE"])
"""
Command = Callable[..., Result]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """Yield a Redis server."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def command(server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    """Return a function that runs a command with its own runs."""
    name = f"broker{next(NAMES)}"
    (tmp_path / f"{name}.py").write_text(BROKER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(run_module, "REPORT_SECONDS", 0.05)
    for variable in ("REDIS_URL", "KAIZEN_NAMESPACE"):
        monkeypatch.setenv(variable, "")

    def call(*arguments: str, url: str = server.url, broker: str = f"{name}:broker", **options: Any) -> Result:
        monkeypatch.delitem(sys.modules, name, raising=False)
        given = ["--redis", url, "--namespace", name, "--broker", broker, *arguments]
        return CliRunner().invoke(run, given, **options)

    with KaizenEmulator(default_life=lambda i: None if i.startswith("no_") else Life.ended()) as emulator:
        monkeypatch.setenv("KAIZEN_BASE_URL", emulator.base_url)
        yield call


def test_a_run_is_started_followed_and_purged(command: Command, tmp_path: Path) -> None:
    """`start` writes outcomes to standard output and everything else to standard error. `status` and `purge` work."""
    (tmp_path / "ids.txt").write_bytes(b"\xef\xbb\xbfexec_1\n\nno_1\n")
    started = command("start", "r", "ids.txt", "--size", "1")
    assert started.exit_code == 1
    assert sorted(line[:14] for line in started.stdout.splitlines()) == ['{"number":1,"i', '{"number":2,"i']
    assert "r finished: 2 of 2 done, 1 failed" in started.stderr
    assert "r finished: 2 of 2 done, 1 failed" in command("status", "r").stdout
    assert '"state":"finished"' in command("status", "r", "--json").stdout
    assert "1 id to look up again" in command("retry", "r").stderr
    again = command("follow", "r")
    assert (again.exit_code, len(again.stdout.splitlines())) == (1, 1)
    assert "no_1" in again.stdout
    assert command("purge", "r").exit_code == 0
    gone = command("status", "r")
    assert (gone.exit_code, gone.stderr.splitlines()[-1][:29]) == (2, "Error: there is no run r in r")


def test_outcomes_do_not_control_the_terminal(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server may put anything into a record, and another program anything into Redis."""
    lines = iter([b'{"id":"a\xc2\x9b\xe2\x80\xa8\xe2\x80\xae\xff"}', b"\x1b]52;c;x\x07", None])

    async def next_line(_: object) -> bytes | None:
        return next(lines)

    monkeypatch.setattr(Follower, "next_line", next_line)
    shown = command("start", "r", input=b"exec_1\n")
    assert shown.stdout == '{"id":"a\\u009b\\u2028\\u202e\ufffd"}\n ]52;c;x \n'


def test_a_run_can_be_sent_and_left(command: Command) -> None:
    """`start --detach` writes no outcomes, only the progress."""
    sent = command("start", "r", "--detach", input=b"exec_1\nexec_2\n")
    assert (sent.exit_code, sent.stdout) == (0, "")
    assert "of 2 done, 0 failed" in sent.stderr
    assert "r cancelled" in command("cancel", "r").stderr or "r finished" in command("status", "r").stdout


def test_output_that_cannot_be_written_ends_the_command(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unwritable output ends the command. The run continues, and the same command resumes it."""

    class Full:
        def __init__(self, *_args: object, **_options: object) -> None:
            pass

        async def write(self, _data: bytes) -> None:
            raise run_module.OutputError("no space left")

    monkeypatch.setattr(run_module, "StreamWriter", Full)
    ended = command("start", "r", input=b"exec_1\n")
    assert ended.exit_code == run_module.FAILED
    assert "workers continue; the same command again resumes" in ended.stderr


@pytest.mark.parametrize("hangs", ["produce", "status", "retry_failed", "cancel", "purge", "__aenter__"])
def test_every_command_ends_with_ctrl_c(command: Command, monkeypatch: pytest.MonkeyPatch, hangs: str) -> None:
    """Ctrl-C ends every command at once without a traceback, even if Redis hangs."""

    async def interrupted(*_arguments: object, **_options: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(60)

    monkeypatch.setattr(Run, hangs, interrupted)
    arguments = {"produce": ("start", "r", "--detach"), "retry_failed": ("retry", "r"), "__aenter__": ("status", "r")}
    ended = command(*arguments.get(hangs, (hangs, "r")), input=b"exec_1\n")
    assert (ended.exit_code, ended.stdout) == (130, "")
    if hangs == "produce":
        assert (
            "interrupted: Redis does not tell where the run is\nthe same command again sends the rest" in ended.stderr
        )


def test_ctrl_c_on_a_terminal_leaves_a_run_that_resumes(server: RedisServer, tmp_path: Path) -> None:
    """Ctrl-C on a terminal ends `start` with two lines that say how to resume. A second Ctrl-C is no traceback."""
    (tmp_path / "ids.txt").write_text("exec_1\nexec_2\n")
    start = ("run", "--redis", server.url, "--namespace", "terminal", "start", "r", str(tmp_path / "ids.txt"))
    with OnTerminal(*start, base_url="") as terminal:
        terminal.until("r running: 0 of 2 done")
        terminal.press("\x03")
        status, screen = terminal.end()
    assert (status, "Traceback" in screen) == (130, False)
    interrupted, how = screen.splitlines()[-2:]
    assert interrupted.startswith("interrupted: r running: 0 of 2 done")
    assert how == "workers continue; the same command again resumes"
    with OnTerminal(*start, base_url="") as terminal:
        terminal.until("r running: 0 of 2 done")
        terminal.press("\x03\x03")
        status, screen = terminal.end()
    assert "Traceback" not in screen
    assert status in {130, -signal.SIGINT}


def test_an_interrupted_reader_does_not_wait_for_redis(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted reader checks the run's status once more, for a moment only."""

    async def interrupted(*_arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(60)

    monkeypatch.setattr(run_module, "STATUS_SECONDS", 0)
    monkeypatch.setattr(run_module, "REPORT_SECONDS", 60)
    monkeypatch.setattr(Run, "status", interrupted)
    ended = command("start", "r", input=b"exec_1\n")
    assert ended.exit_code == 130
    assert "interrupted: Redis does not tell where the run is" in ended.stderr


def test_standard_input_uses_its_own_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command does not read `sys.stdin` in a thread, because the interpreter would crash at its end."""
    (tmp_path / "typed").write_bytes(b"exec_1\n")
    with (tmp_path / "typed").open() as typed:
        monkeypatch.setattr(sys, "stdin", typed)
        with run_module._standard_input() as stream:
            assert stream is not typed.buffer
            assert list(stream) == [b"exec_1\n"]


def test_a_worker_takes_the_place_of_the_command(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker replaces the command's process, so that taskiq gets the signals.

    Redis and the broker must be usable.
    """
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _program, arguments: started.append(arguments))
    assert command("worker", "--processes", "3").exit_code == 0
    assert (started[0][1], started[0][3]) == ("-c", "worker")
    assert "from taskiq" in started[0][2]
    assert started[0][5:7] == ["--workers", "3"]
    assert command("worker", broker=run_module.OWN_BROKER).exit_code == 0
    assert started[1][1] == "-P", "only a broker of one's own is imported from the present folder"
    (tmp_path / "bare.py").write_text("from taskiq import InMemoryBroker\n\nbroker = InMemoryBroker()\n")
    for refused in (
        command("worker", broker="bare:broker"),
        command("worker", url=f"redis://127.0.0.1:{free_port()}"),
        command("worker", broker="no_module:broker"),
    ):
        assert refused.exit_code == 2
        assert refused.stderr.startswith("Error: ")
    assert len(started) == 2


def test_without_the_extra_the_command_names_it(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra, the command names it instead of a traceback."""
    monkeypatch.setitem(sys.modules, "kaizen_async.workers", None)
    refused = command("status", "r")
    assert refused.exit_code == 2
    assert "pip install 'kaizen-async[workers]'" in refused.stderr


def test_trouble_is_reported_at_its_start_and_end(capsys: pytest.CaptureFixture[str]) -> None:
    """Standard error reports the start and the end of trouble."""
    run_module._say("Redis is full")
    run_module._say("")
    assert capsys.readouterr().err == "Redis is full\nback again\n"


def status_of(**changes: Any) -> RunStatus:
    """Return the status of a run of 30 ids."""
    numbers = dict.fromkeys(("failed", "invalid", "set_aside", "read", "unread_bytes", "shards_waiting"), 0)
    known: dict[str, Any] = {"state": "running", "ids": 30, "total": 30, "digest": "", "done": 10, "workers": 1}
    return RunStatus("r", wait=False, shards_held=1, **{**numbers, **known, "age": 9.0, **changes})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rate": 5.0}, "r running: 10 of 30 done, 0 failed, 5/s, 1 worker, 4 s left"),
        ({"total": None}, "r running: 10 of 30 or more done, 0 failed, 0/s, 1 worker"),
        (
            {"state": "finished", "failed": 3, "invalid": 2, "set_aside": 1},
            "r finished: 10 of 30 done, 3 failed, 2 of these not ids, 1 shard set aside",
        ),
    ],
)
def test_the_progress_of_a_run_is_one_line(changes: dict[str, Any], text: str) -> None:
    """The progress of a run is one line with all known figures."""
    assert _described(status_of(**changes)) == text


async def test_the_rate_is_that_of_the_last_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate covers the last seconds, and works even if the clock of Redis stands still."""
    monkeypatch.setattr(run_module, "REPORT_SECONDS", 0)
    seen: list[str] = []

    class Growing:
        async def status(self) -> RunStatus:
            seen.append(report.line)
            if len(seen) == 5:
                raise asyncio.CancelledError
            return status_of(done=5 * len(seen), age=float(3 * len(seen)))

    report: Any = run_module._Report()
    with pytest.raises(asyncio.CancelledError):
        await report.follow(Growing())
    assert [line.partition("failed, ")[2].partition("/s")[0] for line in seen] == ["", "0", "2", "2", "2"]
