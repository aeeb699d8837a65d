"""The command on every kind of terminal, with closed or full streams, and with Ctrl-C at any moment."""

import os
import re
import signal
import time
from collections.abc import Iterator

import pytest
from click.testing import CliRunner
from running_command import OnTerminal, Piped

from kaizen_async._cli.app import cli
from kaizen_async.testing import Fault, KaizenEmulator, Life

HOSTILE = "a\x1b]52;c;x\x07\u202eb\u200b\x9b31m\n\u2028é日"


@pytest.fixture
def server() -> Iterator[KaizenEmulator]:
    """Yield an emulator with finished executions, and with unusual and hostile records."""
    with KaizenEmulator(default_life=Life.ended()) as running:
        first, last = "0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999Z"
        running.add("year-1", record={"startTime": first, "endTime": first})
        running.add("year-9999", record={"startTime": last, "endTime": last})
        running.add("hostile", record={"status": HOSTILE, "workflow": {"id": "w", "name": HOSTILE}})
        running.add("runs", Life.running(), record={"startTime": last})
        refused = b"HTTP/1.1 403 No\r\nContent-Length: 9\r\n\r\n\x1b]52;c;x\x07"
        running.faults.always(Fault.raw(refused), id="refused")
        yield running


CANNOT_WRITE = "cannot write to standard output"


@pytest.mark.parametrize(
    ("streams", "arguments", "status", "shown"),
    [
        ("<&-", "get exec_1", 0, "1 found, 0 failed"),
        ("<&-", "get", 2, "cannot read standard input: Bad file descriptor"),
        (">&-", "get exec_1", 1, f"{CANNOT_WRITE}: Bad file descriptor"),
        (">&-", "wait exec_1", 1, f"{CANNOT_WRITE}: Bad file descriptor"),
        (">/dev/full", "watch exec_1", 1, f"{CANNOT_WRITE}: No space left on device"),
        (">/dev/full", "get exec_1 -f json", 1, f"{CANNOT_WRITE}: No space left on device"),
        (">/dev/full", "get --help", 1, f"{CANNOT_WRITE}: No space left on device"),
        (">&-", "--version", 1, f"{CANNOT_WRITE}: Bad file descriptor"),
        ("2>&-", "get exec_1", 0, "exec_1 "),
        ("2>/dev/full", "watch exec_1", 0, "exec_1 "),
        ("2>&-", "get", 2, ""),
        (">&- 2>&-", "get exec_1", 1, ""),
        ("<&- >&- 2>&-", "wait exec_1", 1, ""),
        ("<&- >/dev/full 2>/dev/full", "demo --executions 3", 1, ""),
    ],
)
def test_streams_that_are_closed_or_full(
    server: KaizenEmulator, streams: str, arguments: str, status: int, shown: str
) -> None:
    """The exit status says whether the results were written, and the reason is printed once."""
    with OnTerminal(*arguments.split(), base_url=server.base_url, streams=streams) as terminal:
        ended, screen = terminal.end()
    assert (ended, "Traceback" in screen) == (status, False), screen
    assert shown in screen
    assert screen.count(CANNOT_WRITE) == shown.count(CANNOT_WRITE)


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("arguments", ["--help", "get --help", "--version", "completion bash", "demo --executions 3"])
def test_a_closed_reader_is_not_an_error(server: KaizenEmulator, arguments: str) -> None:
    """A closed reader, as in `kaizen-async --help | true`, gives the status of a broken pipe and no message."""
    reader, writer = os.pipe()
    os.close(reader)
    with Piped(*arguments.split(), base_url=server.base_url, stdout=writer) as command:
        os.close(writer)
        assert command.end() == (141, b"", "")


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        (C_LOCALE, (30, 100)),
        ({"PYTHONIOENCODING": "ascii"}, (30, 100)),
        ({"PYTHONIOENCODING": "latin-1", "TZ": "Pacific/Kiritimati"}, (30, 100)),
        ({"COLUMNS": "0"}, (30, 100)),
        ({"COLUMNS": "10", "LINES": "0"}, (30, 100)),
        ({"COLUMNS": "100000"}, (30, 100)),
        ({"COLUMNS": "-1", "TERM": "dumb"}, (30, 100)),
        ({"NO_COLOR": "1", "TZ": "Etc/GMT+12"}, (0, 0)),
        ({"FORCE_COLOR": "1", "TERM": "dumb", "TZ": "nonsense"}, (1, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["get", "watch"])
def test_terminals_of_every_kind(
    server: KaizenEmulator, command: str, settings: dict[str, str], size: tuple[int, int]
) -> None:
    """The server's text neither moves nor colours the terminal, and all characters fit its encoding."""
    ids = ["year-1", "year-9999", "hostile", "refused", "exec_é日", "runs"]
    settings = {**settings, "KAIZEN_BASE_URL": f"  {server.base_url} "}
    arguments = [command, *ids, "--deadline", "0.5"] if command == "watch" else [command, *ids]
    with OnTerminal(*arguments, base_url="", settings=settings, size=size) as terminal:
        status, screen = terminal.end()
        raw = terminal.raw
    assert (status, "Traceback" in screen) == (1, False), screen
    assert b"\x1b]" not in raw
    assert b"\x07" not in raw
    assert len(raw) < 30_000
    text = raw.decode("ascii" if "LC_ALL" in settings else settings.get("PYTHONIOENCODING", "utf-8"))
    assert not re.search("[\u202e\u200b\u2028\x9b]", text)
    if "NO_COLOR" in settings:
        assert "\x1b[3" not in text
    if settings.get("TERM") == "dumb":
        assert "\x1b" not in text


def test_colours_can_be_forced_into_a_pipe(server: KaizenEmulator) -> None:
    """FORCE_COLOR colours output in a pipe, for example for `less -R`."""
    with OnTerminal(
        "get",
        "exec_1",
        "-f",
        "table",
        base_url=server.base_url,
        streams="| cat",
        settings={"FORCE_COLOR": "1"},
    ) as terminal:
        terminal.end()
        assert b"\x1b[32mCompleted" in terminal.raw


def test_help_fits_every_terminal() -> None:
    """All help texts are ASCII."""
    for name, command in [("", cli), *cli.commands.items()]:
        shown = CliRunner().invoke(command, ["--help"], prog_name=f"kaizen-async {name}")
        assert shown.exit_code == 0
        assert shown.stdout.isascii(), name


@pytest.mark.parametrize(
    ("arguments", "until", "status"),
    [
        ("get hangs exec_1", r"1 / 2 · ", 130),
        ("wait runs", r"0 / 1 · InProgress 1", 130),
        ("watch runs", r"InProgress", 130),
        ("demo --executions 1000000", r"retries", 130),
        ("emulator --port 0", r"until Ctrl-C", 0),
        ("get -", r"", 130),
    ],
)
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c(server: KaizenEmulator, arguments: str, until: str, status: int, times: int) -> None:
    """Ctrl-C ends each command in order, and a second one ends it at once, without a traceback."""
    server.faults.always(Fault.hang(), id="hangs")
    with OnTerminal(*arguments.split(), base_url=server.base_url) as terminal:
        if until:
            terminal.until(until)
        else:
            terminal.press("exec_1\n")
            terminal.until("Completed")
        for _ in range(times):
            terminal.press("\x03")
            time.sleep(0.01)
        ended, screen = terminal.end()
    assert "Traceback" not in screen
    # The second signal may arrive after the interpreter has removed its handlers. A shell reports 130 for that too.
    assert ended in ({status} if times == 1 else {status, 130, -signal.SIGINT}), screen


@pytest.mark.parametrize("delay", [0.05, 0.15, 0.3, 0.45])
def test_ctrl_c_while_the_command_starts(server: KaizenEmulator, delay: float) -> None:
    """Ctrl-C during the start ends the command at once without a traceback."""
    with Piped("get", "exec_1", base_url=server.base_url, new=True) as command:
        assert command.line() == b"starts\n"
        time.sleep(delay)
        status, _, said = command.stopped_by(signal.SIGINT)
    assert status in {0, 130, -signal.SIGINT}  # without Python's handlers the signal itself ends the process
    assert "Traceback" not in said
