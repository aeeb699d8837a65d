"""Workers with Redis from `kaizen_async.workers`, beside one process with `stream`."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import data
import server
from harness import Plan, Report, Results, clean_environment, progress, run_into, title, versus
from redis import Redis
from table import Table
from worker import Job

from kaizen_async.workers import Run, SharedLimit, Store, create_broker, register

ABOUT = "lookups by one, two and four worker processes, beside a plain process: speed, Redis, limit, recovery"
_PLAIN = "ours_stream"
_NAMES = {1: "one worker process", 2: "two worker processes", 4: "four worker processes"}
_WARM_UP_IDS = 4000
_LIMIT = 1000.0
_LIMIT_SECONDS = 12.0
_PATIENCE = 300.0
_WITHOUT_UVLOOP = "import sys; sys.modules['uvloop'] = None; from taskiq.__main__ import main; main()"
_WITH_UVLOOP = "from taskiq.__main__ import main; main()"


def run(plan: Plan) -> Report:
    """Run one process and the workers in turn against the same server, then measure the rest once."""
    lookups = plan.choose(quick=20_000, default=50_000, full=200_000)
    speed = Table(f"{lookups:,} ids, 1 KB records", ["", "ids/s", "vs. plain", "calls of Redis per 1,000 ids"])
    rest = Table("The rest", ["", "measured"])
    if shutil.which("redis-server") is None:
        speed.notes.append("Not run: redis-server is not installed (Debian: apt-get install redis-server).")
        return Report([speed], {})
    with server.fast(plan.server) as running:
        results = _rounds(plan, running.base_url(1), lookups)
        with _site(running.base_url(1), uvloop=plan.uvloop) as site:
            measured = asyncio.run(site.measure_rest())
    for name in (_PLAIN, *_NAMES.values()):
        figure, calls = results.figure(name, "per_second"), results.figure(name, "calls")
        shown = figure.show(spread=True) if figure else "failed"
        ratio = versus(results.ratio(name, "per_second", _PLAIN))
        speed.rows.append([title(name), shown, ratio, calls.show(1) if calls and name != _PLAIN else "-"])
    speed.notes += [
        f"Server: {running.name}. Median (lowest-highest round).",
        "Server, Redis, reader and workers share the machine's cores. From the start of the run to its last outcome.",
        *results.notes(),
    ]
    rest.rows += [[name, text] for name, text in measured.items()]
    return Report([speed, rest], {**results.as_json(), "rest": measured})


def _rounds(plan: Plan, url: str, lookups: int) -> Results:
    results = Results()
    count = plan.choose(quick=1, default=5, full=9)
    for turn in range(count):
        progress(f"round {turn + 1}/{count}: workers")
        run_into(results, Job("speed", _PLAIN, url, look_ups=lookups, uvloop=plan.uvloop))
        for sample in results.samples[_PLAIN]:
            sample.setdefault("calls", 0.0)
        for processes, name in _NAMES.items():
            with _site(url, uvloop=plan.uvloop) as site, site.workers(processes):
                asyncio.run(site.process("warm-up", _WARM_UP_IDS))
                results.samples[name].append(asyncio.run(site.process("measured", lookups)))
    progress("")
    return results


class _Site:
    """A Redis server and its workers."""

    def __init__(self, socket: Path, url: str, *, uvloop: bool) -> None:
        self.redis: Any = Redis(unix_socket_path=str(socket), decode_responses=True)
        self._folder = socket.parent
        self._url = f"unix://{socket}"
        self._environment = {"REDIS_URL": self._url, "KAIZEN_BASE_URL": url}
        self._launch = [sys.executable, "-c", _WITH_UVLOOP if uvloop else _WITHOUT_UVLOOP]

    @contextmanager
    def workers(self, processes: int) -> Iterator[subprocess.Popen[bytes]]:
        """Run further workers."""
        known = len(self._known())
        options = ["-w", str(processes), "--max-async-tasks", "100", "--shutdown-timeout", "10"]
        command = [*self._launch, "worker", "kaizen_async.workers.app:broker", *options]
        with _process(command, self._folder, self._environment) as started:
            _until(lambda: len(self._known()) >= known + processes, "workers")
            yield started

    def _known(self) -> set[str]:
        return set(self.redis.zrange("{kaizen}:workers", 0, -1))

    async def process(self, name: str, count: int) -> dict[str, Any]:
        """Process a run and read its outcomes. Return its rate and its calls of Redis."""
        broker = create_broker(self._url)
        register(broker, url=self._url)
        await broker.startup()
        calls = self._calls()
        async with Run(name, broker=broker, url=self._url) as run, run.process(data.execution_ids(count)) as outcomes:
            read = 0
            while await outcomes.next_line() is not None:
                read += 1
        await broker.shutdown()
        if read != count:
            sys.exit(f"{count} ids gave {read} outcomes")
        began, ended = self.redis.hmget(f"{{kaizen}}:run:{name}", "created_at", "recorded_at")
        per_second = count / (int(ended) - int(began)) * 1000
        return {"per_second": per_second, "calls": (self._calls() - calls) / count * 1000}

    def _holders(self) -> set[str]:
        return set(self.redis.hvals("{kaizen}:run:unread:held"))

    def _calls(self) -> int:
        """Return the number of scripts called and streams read, which are the round trips of workers and reader."""
        stats = self.redis.info("commandstats")
        names = ("evalsha", "eval", "xread", "xreadgroup", "hget", "hmget")
        return sum(int(stats.get(f"cmdstat_{name}", {}).get("calls", 0)) for name in names)

    async def measure_rest(self) -> dict[str, str]:
        """Measure bytes for each id, recovery from a SIGKILL, and the shared limit."""
        count = 100_000
        before = self.redis.info("memory")["used_memory"]
        async with Run("unread", url=self._url) as run:
            await run.produce(data.execution_ids(count))
            waiting = (self.redis.info("memory")["used_memory"] - before) / count
            with self.workers(1) as doomed:
                dead = self._known()
                with self.workers(1):
                    _until(lambda: dead & self._holders(), "shard for the first worker")
                    os.killpg(doomed.pid, signal.SIGKILL)
                    killed = time.monotonic()
                    _until(lambda: not dead & self._holders(), "recovery")
                    recovered = time.monotonic() - killed
                    _until(lambda: self.redis.hget("{kaizen}:run:unread", "state") == "finished", "end")
            done = (self.redis.info("memory")["used_memory"] - before) / count
        sent = await self._sent(2)
        most = max(sum(moment <= other < moment + 10 for other in sent) for moment in sent[:: int(_LIMIT / 10)])
        used = len(sent) / ((sent[-1] - sent[0]) * _LIMIT)
        return {
            "bytes in Redis for each id that waits": f"{waiting:.0f}",
            "bytes in Redis for each outcome of 1 KB that nobody has read": f"{done:.0f}",
            "seconds from SIGKILL of a worker until others may have its shards": f"{recovered:.1f}",
            f"most requests in 10 s at {_LIMIT:.0f}/s, two workers": f"{most / (10 * _LIMIT):.1%} of the limit",
            "use of that limit": f"{used:.1%}",
        }

    async def _sent(self, workers: int) -> list[float]:
        """Return the times of requests by workers that send as fast as the limit allows."""
        sent: list[float] = []
        ends = time.monotonic() + _LIMIT_SECONDS
        stores = [Store(self._url) for _ in range(workers)]
        limits = [SharedLimit(store, _LIMIT) for store in stores]

        async def send(limit: SharedLimit) -> None:
            while time.monotonic() < ends:
                await limit.take_turn()
                sent.append(time.monotonic())

        await asyncio.gather(*(send(limit) for limit in limits for _ in range(50)))
        for limit, store in zip(limits, stores, strict=True):
            await limit.aclose()
            await store.aclose()
        return sorted(sent)


@contextmanager
def _site(url: str, *, uvloop: bool) -> Iterator[_Site]:
    with tempfile.TemporaryDirectory(prefix="bench-redis-") as name, ExitStack() as stack:
        socket = Path(name) / "socket"
        options = ["--port", "0", "--unixsocket", str(socket), "--dir", name, "--save", ""]
        stack.enter_context(_process(["redis-server", *options], Path(name), {}))
        _until(socket.exists, "redis-server")
        site = _Site(socket, url, uvloop=uvloop)
        stack.callback(site.redis.close)
        yield site


@contextmanager
def _process(command: list[str], folder: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**clean_environment(), **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(_PATIENCE)


def _until(condition: Callable[[], Any], what: str) -> None:
    until = time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > until:
            sys.exit(f"no {what} within {_PATIENCE:.0f} s")
        time.sleep(0.02)
