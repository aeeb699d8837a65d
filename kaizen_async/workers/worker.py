"""A worker process: the task that brings it to a run, its heartbeat, and its end."""

import asyncio
import logging
import os
import signal
import socket
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Final

from taskiq import AsyncBroker, AsyncTaskiqDecoratedTask, TaskiqEvents, TaskiqState

from kaizen_async.client import KaizenClient
from kaizen_async.errors import printable
from kaizen_async.events import Event
from kaizen_async.workers.errors import RunError
from kaizen_async.workers.learned import SharedDurations
from kaizen_async.workers.limit import SharedLimit, require_rate
from kaizen_async.workers.lookups import LookupSession
from kaizen_async.workers.options import Options, decode_options
from kaizen_async.workers.session import BEAT_SECONDS, DEAD_MS, Limits, Session
from kaizen_async.workers.store import DEFAULT_URL, Store, require_name
from kaizen_async.workers.tasks import end
from kaizen_async.workers.waits import WaitSession

log = logging.getLogger("kaizen_async.workers")

TASK_NAME: Final = "kaizen_async.workers:work"
DRAIN_SECONDS: Final = 3.0
"""Time that requests in flight get when a worker ends. It fits taskiq's `--shutdown-timeout`."""


def register(
    broker: AsyncBroker,
    *,
    url: str = DEFAULT_URL,
    namespace: str = "kaizen",
    per_second: float | None = None,
    client: Callable[..., KaizenClient] = KaizenClient,
    limits: Limits = Limits(),  # noqa: B008 - frozen
) -> AsyncTaskiqDecoratedTask[[str], Any]:
    """Register the task that works on runs on your own taskiq broker, and return it.

    Each worker process of the broker then has one client for all its runs, and reports in Redis that it lives. Any
    broker will do: a message only invites a worker to a run. What is to be done, by whom, and what is done is kept in
    Redis.

    Args:
        broker: Yours. A producer needs it too, see `Run`.
        url: The Redis server for runs, see `kaizen_async.workers.connect`.
        namespace: Keeps runs, workers and the limit apart from others on the same server.
        per_second: Requests per second of all workers together; None for no limit but the server's own.
        client: Makes the client of a process, called with keyword arguments that it must pass on to `KaizenClient`:
            `functools.partial(KaizenClient, concurrency=100)`.
        limits: Bounds of what runs may take.

    Raises:
        TypeError, ValueError: An argument is invalid.
    """
    require_name("namespace", namespace)
    require_rate(per_second)
    make = partial(Worker, url=url, namespace=namespace, per_second=per_second, client=client, limits=limits)
    workers: list[Worker] = []

    async def start(_state: TaskiqState) -> None:
        worker = make(broker)
        await worker.start()
        workers.append(worker)

    async def stop(_state: TaskiqState) -> None:
        while workers:
            await workers.pop().stop()

    async def work(run: str) -> None:
        """Work on a run until nothing of it is left, or this worker process ends."""
        await workers[-1].work(run)

    broker.add_event_handler(TaskiqEvents.WORKER_STARTUP, start)
    broker.add_event_handler(TaskiqEvents.WORKER_SHUTDOWN, stop)
    # Acknowledged at once: should this worker die, others are invited again.
    return broker.register_task(work, TASK_NAME, ack_type="when_received")


class Worker:
    """What all runs of a worker process share."""

    def __init__(
        self,
        broker: AsyncBroker,
        *,
        url: str,
        namespace: str,
        per_second: float | None,
        client: Callable[..., KaizenClient],
        limits: Limits,
    ) -> None:
        self.id = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._broker = broker
        self._store = Store(url, namespace)
        self._limit = SharedLimit(self._store, per_second)
        self._durations: dict[str, SharedDurations] = {}
        self._kaizen = client(deadline=None, limiter=self._limit, on_event=_Listener(self._limit, self._durations))
        self._sharing: list[asyncio.Task[None]] = []
        self._limits = limits
        self._sessions: dict[str, Session] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._handlers_before: dict[int, Callable[[int, Any], Any]] = {}
        self._beating: asyncio.Task[None] | None = None
        self._stopping = False

    def _share_durations(self, options: Options) -> None:
        """Share what waits of a kind learn, from the first of them on."""
        if options.kind not in self._durations:
            executions = options.executions_of(self._kaizen)
            shared = SharedDurations(self._store, self.id, options.kind, executions, options.record)
            self._durations[options.kind] = shared
            self._sharing.append(asyncio.create_task(shared.share()))

    async def start(self) -> None:
        """Begin to report that this worker lives."""
        self._beating = asyncio.create_task(self._beat())
        self._follow_signals()

    def _follow_signals(self) -> None:
        """Stop sessions when the process is asked to end, because taskiq waits for its tasks, and these have no end.

        A signal that nobody handles is left alone: it ends the process.
        """
        loop = asyncio.get_running_loop()

        def handle(number: int, frame: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self.stop_sessions)
            self._handlers_before[number](number, frame)

        self._handler = handle
        for signum in (signal.SIGTERM, signal.SIGINT):
            before = signal.getsignal(signum)
            if callable(before):
                self._handlers_before[signum] = before
                with suppress(ValueError):  # not in the main thread: the program calls the broker's shutdown
                    signal.signal(signum, handle)

    def _leave_signals(self) -> None:
        for signum, before in self._handlers_before.items():
            if signal.getsignal(signum) is self._handler:
                signal.signal(signum, before)

    def stop_sessions(self) -> None:
        """Claim nothing more, and give back what is not done."""
        if not self._stopping:
            self._stopping = True
            for session in self._sessions.values():
                session.stop()
            self._closing = asyncio.ensure_future(self._close_client())

    async def _close_client(self) -> None:
        """Close the client once the sessions have ended, or after a while: then other workers send its requests."""
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                await self._idle.wait()
        await self._kaizen.aclose()

    async def stop(self) -> None:
        """End: give back what is not done, and close everything."""
        self.stop_sessions()
        await self._closing
        await self._idle.wait()
        self._leave_signals()
        await end(self._beating, *self._sharing)
        await self._limit.aclose()
        await self._store.aclose()

    async def work(self, run: str) -> None:
        """Work on a run until it is over, unless this worker does so already.

        If it is purged, go on with the run that has taken its name by then.
        """
        try:
            require_name("run", run)
        except (TypeError, ValueError) as error:
            log.warning("an invitation to no valid run: %s", error)
            return
        is_purged = True
        while is_purged and (session := await self._session_of(run)) is not None:
            self._sessions[run] = session
            self._idle.clear()
            log.info("works on run %s", run)
            try:
                await session.serve()
            except RunError as error:
                await self._report(run, session, error)
            finally:
                del self._sessions[run]
                if not self._sessions:
                    self._idle.set()
            is_purged = session.state == "unknown"
            log.info("run %s is %s", run, {"running": "left", "unknown": "purged"}.get(session.state, session.state))

    async def _report(self, run: str, session: Session, error: RunError) -> None:
        """Tell the log and the reader of a run why this worker cannot work on it. Other runs are not concerned."""
        text = printable(str(error))
        log.error("run %s cannot be worked on: %s", run, text)
        with suppress(RunError):
            await self._store.script("trouble", self._store.run(run), text, session.run_id)

    async def _session_of(self, run: str) -> Session | None:
        """Return a session of a run, unless the run cannot be worked on or is worked on already."""
        if run in self._sessions or self._stopping:
            return None
        stored, run_id = await self._store.command("HMGET", self._store.run(run), "options", "id")
        if stored is None or run_id is None or run in self._sessions or self._stopping:
            return None
        try:
            options = decode_options(stored)
        except (ValueError, RecursionError) as error:
            log.warning("run %s cannot be worked on by this version: %s", run, printable(str(error)))
            return None
        if options.wait:
            self._share_durations(options)
        kind = WaitSession if options.wait else LookupSession
        return kind(self._store, self.id, run, run_id, options, self._kaizen, self._limits)

    async def _beat(self) -> None:
        while True:
            try:
                await invite(self._store, self._broker, self.id)
            except RunError as error:
                log.warning("the heartbeat failed: %s", error)
            await asyncio.sleep(BEAT_SECONDS)


class _Listener:
    """Passes on what all workers are to know: that the server throttles one, and how long executions took."""

    every_lookup = False

    def __init__(self, limit: SharedLimit, durations: Mapping[str, SharedDurations]) -> None:
        self._limit = limit
        self._durations = durations

    def __call__(self, event: Event) -> None:
        self._limit.notice(event)
        for durations in self._durations.values():
            durations.notice(event)


async def invite(store: Store, broker: AsyncBroker, worker: str = "") -> int:
    """Report that a worker lives, and invite live workers to runs that they do not work on; return how many live."""
    live, *pairs = await store.script("workers", store.workers, store.run(""), store.runs, worker, DEAD_MS)
    for name, count in zip(pairs[::2], pairs[1::2], strict=True):
        run = name.decode(errors="replace")
        with suppress(ValueError):
            require_name("run", run)
            for _ in range(count):
                await send_invitation(broker, run)
    return int(live)


async def send_invitation(broker: AsyncBroker, run: str) -> None:
    """Send the message that brings a worker to a run. If it gets lost, another follows."""
    task = broker.find_task(TASK_NAME)
    if task is None:
        raise RunError(f"the broker does not know the task {TASK_NAME}; call kaizen_async.workers.register(broker)")
    try:
        async with asyncio.timeout(5):
            await task.kiq(run)
    except Exception as error:  # noqa: BLE001 - brokers raise what their libraries raise
        log.warning("an invitation to run %s was not sent: %s", run, printable(str(error) or type(error).__name__))
