"""Runs work with every kind of Redis server, and an unusable server gives a clear error."""

import asyncio
import gc
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trustme
from running_examples import RedisServer, Running, free_port, require, taskiq, until

from kaizen_async import KaizenClient
from kaizen_async.testing import KaizenEmulator

require("taskiq", "taskiq_redis", "redis")

from redis import Redis  # noqa: E402 - skipped above without Redis
from taskiq import InMemoryBroker  # noqa: E402

from kaizen_async.workers import (  # noqa: E402
    NoWorkersError,
    RedisUnusableError,
    Run,
    RunError,
    Store,
    connect,
    create_broker,
    register,
)
from kaizen_async.workers import follower as follower_module  # noqa: E402
from kaizen_async.workers import run as run_module  # noqa: E402
from kaizen_async.workers import store as store_module  # noqa: E402
from kaizen_async.workers.worker import send_invitation  # noqa: E402

pytestmark = pytest.mark.timeout(60)

IDS = [f"exec_{number}" for number in range(30)]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Yield a stack for the servers of a test.

    Collect garbage afterwards, so that pytest reports an open connection at the test that opened it.
    """
    with ExitStack() as servers:
        yield servers
    gc.collect()


def tls(stack: ExitStack, folder: Path) -> str:
    """Start a server with TLS and a password, and return its URL."""
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    port = str(free_port())
    files = ("--tls-cert-file", "cert.pem", "--tls-key-file", "key.pem", "--tls-ca-cert-file", "ca.pem")
    secured = ("--port", "0", "--tls-port", port, "--tls-auth-clients", "no", "--requirepass", "s3cret/@")
    stack.enter_context(RedisServer(folder, *secured, *files))
    return f"rediss://:s3cret%2F%40@localhost:{port}?ssl_ca_certs={folder / 'ca.pem'}"


def acl(stack: ExitStack, folder: Path) -> str:
    """Start a server with the user that the documentation describes, and return its URL."""
    server = stack.enter_context(RedisServer(folder))
    documented = Path(__file__).parents[2] / "docs" / "workers.md"
    (line,) = (line for line in documented.read_text().splitlines() if line.startswith("ACL SETUSER"))
    with Redis.from_url(server.url) as redis:
        redis.execute_command(*line.replace(">PASSWORD", ">secret").split())
        redis.execute_command("ACL", "SETUSER", "default", "off")
    return server.url.replace("//", "//kaizen:secret@")


def cluster(stack: ExitStack, folder: Path) -> str:
    """Start a cluster of three servers, and return the URL of one of them."""
    servers = []
    for name in "abc":
        (folder / name).mkdir()
        # The cluster bus uses the port number plus 10,000.
        port = next(port for port in iter(free_port, 0) if port < 55_000)
        options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "500")
        servers.append(stack.enter_context(RedisServer(folder / name, *options, port=port)))
    nodes = [stack.enter_context(Redis.from_url(server.url)) for server in servers]
    for node, (first, last) in zip(nodes, ((0, 5000), (5001, 10_000), (10_001, 16_383)), strict=True):
        node.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
        node.execute_command("CLUSTER", "SET-CONFIG-EPOCH", first + 1)
    for server in servers[1:]:
        nodes[0].execute_command("CLUSTER", "MEET", "127.0.0.1", server.port)
    for node in nodes:
        until(lambda node=node: node.cluster("info")["cluster_slots_ok"] == "16384", "the slots of the cluster")
        until(lambda node=node: node.cluster("info")["cluster_state"] == "ok", "the cluster")
    return servers[1].url.replace("redis://", "redis+cluster://")


def sentinel(stack: ExitStack, folder: Path) -> str:
    """Start a server and a sentinel for it, and return the URL of the service."""
    server = stack.enter_context(RedisServer(folder, "--requirepass", "secret"))
    port = free_port()
    file = folder / "sentinel.conf"
    watches = f"sentinel monitor site 127.0.0.1 {server.port} 1\nsentinel auth-pass site secret\n"
    file.write_text(f"port {port}\nbind 127.0.0.1\ndir {folder}\n{watches}")
    log = folder / "sentinel.log"
    started = Running("redis-server", str(file), "--sentinel", folder=folder, log=log, settings={})
    stack.enter_context(started).says("+monitor master site")
    return f"redis+sentinel://:secret@127.0.0.1:{port}/site/0"


@pytest.mark.parametrize("start", [tls, acl, cluster, sentinel])
async def test_runs_work_wherever_redis_is(
    stack: ExitStack, tmp_path: Path, emulator: KaizenEmulator, start: Any
) -> None:
    """Runs work with TLS and a password, a user with few rights, a cluster, and a sentinel."""
    url = start(stack, tmp_path)
    workers = InMemoryBroker()
    register(workers, url=url, per_second=1000, client=partial(KaizenClient, base_url=emulator.base_url))
    queue = create_broker(url)
    await workers.startup()
    await queue.startup()
    async with Run("r", url=url, broker=workers) as run, run.process(IDS, wait=True, size=10) as outcomes:
        assert sorted([outcome.number async for outcome in outcomes]) == list(range(1, 31))
        assert (await run.status()).state == "finished"
    await workers.shutdown()
    messages = queue.listen()
    register(queue, url=url)
    async with Run("other", url=url, broker=queue) as run:
        await run.produce(["exec_1"])
        await send_invitation(queue, run.name)
        message: Any = await anext(messages)
        await message.ack()
        await run.cancel()
        await run.purge()
    await messages.aclose()
    await queue.shutdown()


def test_a_broker_is_of_the_same_kind_as_the_url() -> None:
    """The broker matches the kind of URL, so that invitations use the same Redis as the runs."""
    urls = ("redis://h", "redis+cluster://h", "redis+sentinel://a,b:1,[::1]:2/site?sentinel_password=x&ssl_ca_certs=c")
    kinds = [type(create_broker(url)).__name__ for url in urls[::2]]
    assert kinds == ["_StreamBroker", "_SentinelBroker"]


@pytest.mark.parametrize(
    "url",
    ["", "localhost", "http://h", "redis+other://h", "redis+sentinel://h", "redis+sentinel:///s", "redis://h:port"],
)
def test_an_invalid_url_of_redis_is_refused(url: str) -> None:
    """An invalid URL is refused with the valid forms."""
    with pytest.raises(ValueError, match="URL of Redis"):
        connect(url)


@pytest.mark.parametrize("name", ["", "-x", "a b", "a{b}", "ä", "x" * 101, "a:b", "a\n"])
def test_names_are_checked(name: str) -> None:
    """Names of runs and namespaces are checked, because they become parts of keys."""
    with pytest.raises(ValueError, match="must be 1 to 100 letters"):
        Run(name)
    with pytest.raises(ValueError, match="namespace must be"):
        Store(namespace=name)
    with pytest.raises(TypeError, match="run must be a str"):
        Run(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "url", "text"),
    [
        (["--requirepass", "secret"], "redis://127.0.0.1:{port}", "requires a valid user and password"),
        (["--requirepass", "secret"], "redis://:wr0ng@127.0.0.1:{port}", "requires a valid user and password"),
        (["--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"], "redis://127.0.0.1:{port}", "noeviction"),
        ([], "redis://127.0.0.1:1", "cannot be used: .*onnect"),
        ([], "redis+cluster://127.0.0.1:1", "cannot be used: "),
        ([], "redis://127.0.0.1:{silent}", "did not respond within 1 s"),
    ],
)
async def test_an_unusable_server_is_reported_at_once(
    stack: ExitStack, tmp_path: Path, options: list[str], url: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unusable server is reported in time, in one line without its password."""
    assert store_module.CONNECT_SECONDS < 5
    monkeypatch.setattr(store_module, "CONNECT_SECONDS", 1)
    server = stack.enter_context(RedisServer(tmp_path, *options))
    silent = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    with pytest.raises(RedisUnusableError, match=text) as caught:
        async with Run("r", url=url.format(port=server.port, silent=silent.getsockname()[1])):
            pass
    assert "\n" not in str(caught.value)
    assert "wr0ng" not in str(caught.value)


async def test_an_old_server_is_refused(stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of an old version is refused with its version."""
    server = stack.enter_context(RedisServer(tmp_path))
    store = Store(server.url)

    async def info() -> dict[str, Any]:
        return {"redis_version": "6.0.20"}

    monkeypatch.setattr(store._client, "info", info)
    with pytest.raises(RedisUnusableError, match=r"is version 6\.0\.20; this package needs 6\.2 or newer"):
        await store.require_usable()
    await store.aclose()


async def test_workers_that_do_not_know_the_task_are_noticed(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers without the task are detected, because they take invitations and never report."""
    monkeypatch.setattr(run_module, "KNOWS_SECONDS", 0.1)
    monkeypatch.setattr(run_module, "INVITE_SECONDS", 0.1)
    server = stack.enter_context(RedisServer(tmp_path))
    module = tmp_path / "foreign.py"
    module.write_text(f"from kaizen_async.workers import create_broker\nbroker = create_broker({server.url!r})\n")
    command = taskiq("worker", "foreign:broker", "-w", "1")
    worker = Running(*command, folder=tmp_path, log=tmp_path / "worker.log", settings={})
    stack.enter_context(worker).says("Listening started.")
    broker = create_broker(server.url)
    register(broker, url=server.url)
    await broker.startup()
    troubles: list[str] = []
    async with Run("r", url=server.url, broker=broker, on_trouble=troubles.append) as run:
        with pytest.raises(NoWorkersError, match="do not know the task"):
            async with run.process(IDS) as outcomes:
                await anext(outcomes)
    await broker.shutdown()


async def test_without_workers_a_reader_says_so_and_waits(
    stack: ExitStack, tmp_path: Path, emulator: KaizenEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without workers, a reader reports it and waits until there is one."""
    monkeypatch.setattr(run_module, "KNOWS_SECONDS", 0.1)
    monkeypatch.setattr(run_module, "INVITE_SECONDS", 0.1)
    monkeypatch.setattr(follower_module, "BLOCK_MS", 50)
    server = stack.enter_context(RedisServer(tmp_path))
    troubles: list[str] = []
    producer = create_broker(server.url)
    register(producer, url=server.url)
    workers = InMemoryBroker()
    register(workers, url=server.url, client=partial(KaizenClient, base_url=emulator.base_url))
    async with Run("r", url=server.url, broker=producer, on_trouble=troubles.append) as run:
        await run.produce(IDS)
        with pytest.raises(TimeoutError):
            async with run.follow() as outcomes:
                await asyncio.wait_for(anext(outcomes), 0.5)
        assert troubles == ["no worker is running"]
        await workers.startup()
        run.broker = workers
        await run._store.command("DEL", "{kaizen}:run:r:invited")  # an invitation lies in the queue of the other broker
        async with run.follow() as outcomes:
            assert len([outcome async for outcome in outcomes]) == 30
    await workers.shutdown()
    await producer.shutdown()


async def test_a_missing_permission_is_an_error(stack: ExitStack, tmp_path: Path) -> None:
    """A missing permission in Redis is an error and not a reason to retry."""
    server = stack.enter_context(RedisServer(tmp_path))
    with Redis.from_url(server.url) as redis:
        redis.execute_command("ACL", "SETUSER", "poor", "on", "nopass", "~*", "+ping", "+get")
    async with Run("r", url=server.url.replace("//", "//poor:x@")) as run:
        with pytest.raises(RedisUnusableError, match="permission"):
            await run.status()
        with pytest.raises(RunError, match="refused a command"):
            await run._store.command("GET", "a", "b")
