"""Worker processes, a redis-server, a network between them and the API, and methods that break each of them."""

import asyncio
import json
import signal
import threading
import time
from collections.abc import Iterable
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from redis import Redis, RedisError
from running_examples import RedisServer, Running, free_port, python

TASKIQ = """
import multiprocessing, os
multiprocessing.set_start_method("fork")  # so that workers start with what is changed below
from kaizen_async.workers import session, worker
from taskiq.__main__ import main
silence = int(os.environ["TEST_SILENCE"])
session.DEAD_MS = worker.DEAD_MS = silence
session.BEAT_SECONDS = worker.BEAT_SECONDS = silence / 8000  # as many reports within the silence as usual
main()
"""
A_MINUTE_AHEAD = f"import time; now = time.time; time.time = lambda: now() + 60\n{TASKIQ}"
WORKER_OPTIONS = ("--max-async-tasks", "100", "--wait-tasks-timeout", "10", "--shutdown-timeout", "10")


class Network(threading.Thread):
    """A network that forwards bytes to a port of loopback until it is cut.

    Attributes:
        port: The port on which it listens.
    """

    def __init__(self, target: int) -> None:
        super().__init__(daemon=True)
        self.port = free_port()
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._is_cut = False
        self._listening = threading.Event()

    def run(self) -> None:
        """Serve."""
        with closing(self._loop):  # also if the port is taken
            server = self._loop.run_until_complete(asyncio.start_server(self._pass_on, "127.0.0.1", self.port))
            self._listening.set()
            self._loop.run_forever()
            server.close()
            self._reset()
            if left := asyncio.all_tasks(self._loop):
                self._loop.run_until_complete(asyncio.wait(left, timeout=10))
            self._loop.run_until_complete(asyncio.sleep(0.1))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.close()
            return
        self._writers |= {writer, far_writer}
        await asyncio.gather(self._copy(reader, far_writer), self._copy(far_reader, writer), return_exceptions=True)
        for end in (writer, far_writer):
            self._writers.discard(end)
            end.close()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward bytes. While the network is cut, they are lost without an error."""
        while data := await reader.read(65_536):
            if not self._is_cut:
                writer.write(data)
                await writer.drain()
        writer.close()

    def cut(self) -> None:
        """Lose all bytes from now on without closing a connection, as a network does."""
        self._is_cut = True

    def mend(self) -> None:
        """Forward bytes again, and reset all connections."""
        self._is_cut = False
        self._loop.call_soon_threadsafe(self._reset)

    def _reset(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    def __enter__(self) -> Self:
        self.start()
        assert self._listening.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self.join(10)


class Plant:
    """A site of workers.

    Attributes:
        redis: A client that connects to the server directly.
        network: The network between the server and all other processes.
        workers: The running workers.
    """

    def __init__(self, folder: Path, base_url: str, **settings: str) -> None:
        self._stack = ExitStack()
        self._folder = folder
        self._count = 0
        self.workers: list[Running] = []
        self.server = self._stack.enter_context(RedisServer(folder, "--appendonly", "yes"))
        self.network = self._stack.enter_context(Network(self.server.port))
        self.redis: Any = self._stack.enter_context(Redis(port=self.server.port, decode_responses=True))
        url = f"redis://127.0.0.1:{self.network.port}"
        self._settings = {"REDIS_URL": url, "KAIZEN_BASE_URL": base_url, **settings}

    def worker(self) -> None:
        """Start a further worker of one process."""
        self.start_workers(TASKIQ)

    def start_workers(self, *programs: str) -> None:
        """Start workers at the same time."""
        options = ("worker", "kaizen_async.workers.app:broker", "-w", "1", *WORKER_OPTIONS)
        started = [self._start(*python("-c", program, *options)) for program in programs]
        for worker in started:
            worker.says("Listening started.")
        self.workers += started

    def producer(self, run: str, ids: Iterable[str], *options: str) -> "Producer":
        """Start the command that sends ids and prints outcomes."""
        file = self._folder / f"{run}.txt"
        file.write_text("\n".join(ids))
        self._count += 1
        output = self._folder / f"{run}-{self._count}.ndjson"
        return self._stack.enter_context(
            Producer(run, output, self._folder, self._settings, "run", "start", run, str(file), *options)
        )

    def restart_redis(self, signum: signal.Signals = signal.SIGTERM, pause: float = 0.5) -> None:
        """End the server, and restart it on its files a moment later."""
        self.server.signal_all(signum)
        self.server.process.wait(20)
        time.sleep(pause)
        self.server = self._stack.enter_context(RedisServer(self._folder, "--appendonly", "yes", port=self.server.port))

    def outcomes(self, run: str) -> list[dict[str, Any]]:
        """Return all outcomes that the producers of a run have printed."""
        lines = [line for path in self._folder.glob(f"{run}-*.ndjson") for line in path.read_bytes().split(b"\n")[:-1]]
        return [json.loads(line) for line in lines]

    def fact(self, run: str, name: str) -> int:
        """Return a number of a run from Redis, or 0 while Redis is away."""
        with suppress(RedisError):
            return int(self.redis.hget(f"{{kaizen}}:run:{run}", name) or 0)
        return 0

    def done(self, run: str) -> int:
        """Return the number of recorded outcomes."""
        return self.fact(run, "done")

    def _start(self, *command: str) -> Running:
        self._count += 1
        log = self._folder / f"{self._count}.log"
        return self._stack.enter_context(Running(*command, folder=self._folder, log=log, settings=self._settings))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)


class Producer(Running):
    """The command `kaizen-async`, with its output in one file and its reports in another.

    Attributes:
        run: The run's name.
    """

    def __init__(self, run: str, output: Path, folder: Path, settings: dict[str, str], *arguments: str) -> None:
        self.run = run
        program = "import sys; from kaizen_async.__main__ import main; sys.stdout = open(sys.argv.pop(1), 'w'); main()"
        super().__init__(
            *python("-c", program, str(output), *arguments),
            folder=folder,
            log=output.with_suffix(".err"),
            settings=settings,
        )
