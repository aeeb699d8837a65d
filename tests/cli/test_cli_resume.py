"""After runs that end in every way, the last run leaves exactly one line for each id."""

import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from running_command import SECONDS, Piped, ids_in

from kaizen_async.testing import Fault, KaizenEmulator, Life

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
IDS = [f"exec_{number}" for number in range(80)]


@pytest.fixture
def server() -> Iterator[KaizenEmulator]:
    """Yield a slow emulator that knows all ids but one."""
    with KaizenEmulator(default_life=lambda name: None if name == IDS[7] else Life.ended()) as running:
        running.faults.always(Fault.latency(0.02))
        yield running


def lines_of(file: Path) -> int:
    """Return the number of line breaks in a file."""
    return file.read_bytes().count(b"\n") if file.exists() else 0


def run_until(server: KaizenEmulator, arguments: list[str], file: Path, signum: int | None, more: int) -> int:
    """Run a command, send it a signal after `more` new lines, and return the exit status."""
    before = lines_of(file)
    is_full_disk = signum == signal.SIGXFSZ
    size = file.stat().st_size if file.exists() else 0
    room = max(size + 300 * more, 6000) if is_full_disk else None  # so much that a checkpoint fits
    with Piped(*arguments, base_url=server.base_url, most_bytes=room) as command:
        deadline = time.monotonic() + SECONDS
        while signum is not None and not is_full_disk:
            assert time.monotonic() < deadline
            if command.process.poll() is not None or lines_of(file) >= before + more:
                command.process.send_signal(signum)
                break
            time.sleep(0.002)
        status, _, errors = command.end()
    assert "Traceback" not in errors
    return status


@pytest.mark.parametrize(
    ("command", "name"),
    [("get", "out.ndjson"), ("get", "out.csv"), ("wait", "out.ndjson"), ("wait", "out.json"), ("wait", "out.csv")],
)
def test_however_runs_end_each_id_has_one_line(server: KaizenEmulator, tmp_path: Path, command: str, name: str) -> None:
    """Runs that end by a full disk, SIGKILL, SIGTERM and SIGINT together leave one line for each id."""
    chance = Random(f"{command} {name}")
    source, file, checkpoint = tmp_path / "ids.txt", tmp_path / name, tmp_path / "waiting.json"
    source.write_text("\n".join(IDS))
    arguments = [command, "--input", str(source), "--output", str(file), "--format", name.partition(".")[2]]
    arguments += ["--concurrency", "5", *(["--resume"] if command == "get" else ["--checkpoint", str(checkpoint)])]
    ends = [signal.SIGXFSZ, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
    chance.shuffle(ends)
    for signum in ends:
        status = run_until(server, arguments, file, signum, chance.randrange(1, 15))
        assert status in {1, -signum, 128 + signum}
    assert run_until(server, arguments, file, None, 0) in {0, 1}  # one id does not exist
    assert Counter(ids_in(file)) == Counter(IDS)
    assert not checkpoint.exists()
