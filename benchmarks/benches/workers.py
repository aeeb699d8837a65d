"""The workers of `examples/taskiq_workers`, one process and two, beside a plain process with `stream`."""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import data
import server
from harness import Plan, Report, Results, clean_environment, progress, run_into, title, versus
from redis import Redis
from table import Table
from worker import Job

ABOUT = "look-ups by one and two worker processes of the taskiq example, beside a plain process"
_EXAMPLE = Path(__file__).parents[2] / "examples" / "taskiq_workers"
_PLAIN = "ours_stream"
_NAMES = {1: "taskiq, one worker process", 2: "taskiq, two worker processes"}
_RATE = "1000000"
"""Look-ups per second that the shared limiter lets pass: it is asked each time, and holds nobody back."""
_WARM_UP_IDS = 2000
_PATIENCE = 300.0
_WITHOUT_UVLOOP = "import sys; sys.modules['uvloop'] = None; from taskiq.__main__ import main; main()"
_WITH_UVLOOP = "from taskiq.__main__ import main; main()"


def run(plan: Plan) -> Report:
    """Let the plain process, one worker and two take turns, against the same server."""
    look_ups = plan.choose(quick=5_000, default=10_000, full=40_000)
    table = Table(f"{look_ups:,} ids, 1 KB records", ["", "ids/s", "vs. plain"])
    if shutil.which("redis-server") is None:
        table.notes.append("Not run: redis-server is not installed (Debian: apt-get install redis-server).")
        return Report([table], {})
    with server.fast(plan.server) as running:
        results = _rounds(plan, running.base_url(1), look_ups)
    for name in (_PLAIN, *_NAMES.values()):
        figure = results.figure(name, "per_second")
        shown = figure.show(spread=True) if figure else "failed"
        table.rows.append([title(name), shown, versus(results.ratio(name, "per_second", _PLAIN))])
    table.notes += [
        f"Server: {running.name}. Median (lowest-highest round).",
        "Server, Redis, producer and workers share the machine's cores.",
        "Shards of 500 ids, two at a time in each process. From the first recorded outcome to the last.",
        *results.notes(),
    ]
    return Report([table], results.as_json())


def _rounds(plan: Plan, url: str, look_ups: int) -> Results:
    results = Results()
    count = plan.choose(quick=1, default=5, full=9)
    for turn in range(count):
        progress(f"round {turn + 1}/{count}: workers")
        run_into(results, Job("speed", _PLAIN, url, look_ups=look_ups, uvloop=plan.uvloop))
        for processes, name in _NAMES.items():
            per_second = _per_second(processes, url, look_ups, uvloop=plan.uvloop)
            results.samples[name].append({"per_second": per_second})
    progress("")
    return results


def _per_second(processes: int, url: str, look_ups: int, *, uvloop: bool) -> float:
    """Let workers warm up and then do a run, by the times of the outcomes in Redis."""
    with tempfile.TemporaryDirectory(prefix="bench-redis-") as name, ExitStack() as stack:
        folder = Path(name)
        socket = folder / "socket"
        options = ["--port", "0", "--unixsocket", str(socket), "--dir", name, "--save", ""]
        stack.enter_context(_process(["redis-server", *options], folder, {}))
        environment = {"REDIS_URL": f"unix://{socket}", "KAIZEN_BASE_URL": url, "KAIZEN_RATE": _RATE}
        launch = [sys.executable, "-c", _WITH_UVLOOP if uvloop else _WITHOUT_UVLOOP]
        worker = ["worker", "tasks:broker", "-w", str(processes), "--max-async-tasks", "2"]
        redis = stack.enter_context(Redis(unix_socket_path=str(socket)))
        _await_socket(socket)
        stack.enter_context(_process([*launch, *worker], folder, environment))
        _produce("warm-up", _WARM_UP_IDS, folder, environment)
        _produce("measured", look_ups, folder, environment)
        outcomes: Any = redis.xinfo_stream("kaizen:measured:outcomes")
        if outcomes["length"] != look_ups:
            sys.exit(f"{look_ups} ids gave {outcomes['length']} outcomes")
        began, ended = (int(outcomes[which][0].split(b"-")[0]) for which in ("first-entry", "last-entry"))
        return look_ups / (ended - began) * 1000


def _produce(run: str, count: int, folder: Path, environment: dict[str, str]) -> None:
    """Send ids to the workers, and take their outcomes."""
    ids = folder / "ids.txt"
    ids.write_text("\n".join(data.execution_ids(count)))
    with _process([sys.executable, "produce.py", run, str(ids)], folder, environment) as process:
        if process.wait(_PATIENCE):
            sys.exit(f"the producer failed: {(folder / 'log').read_text()[-500:]}")


@contextmanager
def _process(command: list[str], folder: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(
            command,
            cwd=_EXAMPLE,
            env={**clean_environment(), **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(_PATIENCE)


def _await_socket(socket: Path) -> None:
    until = time.monotonic() + 10
    while not socket.exists():
        if time.monotonic() > until:
            sys.exit("redis-server did not start")
        time.sleep(0.02)
