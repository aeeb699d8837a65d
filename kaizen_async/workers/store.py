"""The Redis server: where it is, whether it can be used, and calls that ride out its restarts.

All keys share one hash tag, so a script may touch any of them on a Redis Cluster too. A script changes everything it
changes in one step and may be sent twice: then its second run changes nothing. So a call whose reply was lost is
simply repeated.
"""

import asyncio
import hashlib
import logging
import random
import re
import time
from collections.abc import Awaitable, Callable
from functools import cache
from importlib.resources import files
from typing import Any, Final, cast
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec
from redis import exceptions
from redis.asyncio import Redis, RedisCluster, Sentinel
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from kaizen_async.workers.errors import RedisUnusableError, RunError

log = logging.getLogger("kaizen_async.workers")

DEFAULT_URL: Final = "redis://localhost"
OLDEST: Final = (6, 2)
"""The first version of Redis with everything that the scripts use."""
CONNECT_SECONDS: Final = 3.0
"""Time to find out that a server cannot be used."""
COMMAND_SECONDS: Final = 5.0
"""Time after which a connection, or a command without a reply, is tried again."""
LONGEST_BACKOFF: Final = 1.0

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_PASSING: Final = (
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.ClusterError,
    exceptions.ReadOnlyError,
    exceptions.TryAgainError,
    exceptions.RedisClusterException,
    OSError,
)
_PASSING_REPLY: Final = re.compile(
    r"\b(MISCONF|LOADING|BUSY|READONLY|CLUSTERDOWN|MASTERDOWN|TRYAGAIN|NOREPLICAS|UNBLOCKED)\b"
)
_FULL: Final = re.compile(r"\bOOM\b")


def require_name(what: str, name: str) -> str:
    """Return a name that may be part of a key.

    Raises:
        TypeError, ValueError: It is not.
    """
    if not isinstance(name, str):
        raise TypeError(f"{what} must be a str, not {type(name).__name__}")
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{what} must be 1 to 100 letters, digits, dots, dashes or underscores, starting with a letter or digit, "
            f"not {name!r:.120}"
        )
    return name


def connect(url: str) -> Any:
    """Return a client of the server at a URL, without connecting yet.

    Args:
        url: `redis://`, `rediss://` (TLS) or `unix://` for one server; `redis+cluster://` or `rediss+cluster://` and
            one node of a cluster; `redis+sentinel://` or `rediss+sentinel://` with all sentinels, separated by commas,
            and the name of the service as the path. User, password and options of redis-py go where its URLs have them.

    Raises:
        ValueError: Not such a URL.
    """
    scheme, mark, rest = url.partition("://")
    kind = scheme.partition("+")[2]
    plain = f"{scheme.partition('+')[0]}://{rest}"
    settings: dict[str, Any] = {
        # Longer than CONNECT_SECONDS: at the first connection, that limit ends before these and names the server.
        "socket_connect_timeout": COMMAND_SECONDS,
        "socket_timeout": COMMAND_SECONDS,
    }
    try:
        if kind == "sentinel" and mark:
            found = sentinels_of(plain)
            sentinels: Any = Sentinel(  # type: ignore[no-untyped-call]
                found.addresses,
                sentinel_kwargs={**settings, **found.sentinel_settings},
                **settings,
                **found.settings,
            )
            return sentinels.master_for(found.service, redis_class=_ServiceClient)
        if kind == "cluster" and mark:
            # Without redis-py's pauses between attempts: `Store.call` has its own.
            return RedisCluster.from_url(plain, retry=Retry(NoBackoff(), 3), **settings)
        if not kind and mark:
            client: Any = Redis
            return client.from_url(plain, retry=Retry(NoBackoff(), 0), **settings)
    except ValueError as error:
        raise ValueError(f"the URL of Redis is not valid: {_without_secret(str(error), url)}") from None
    raise ValueError(
        "the URL of Redis must begin with redis://, rediss://, unix://, redis+cluster://, rediss+cluster://, "
        "redis+sentinel:// or rediss+sentinel://"
    )


class _ServiceClient(Redis):
    """A client of the primary that sentinels name."""

    async def aclose(self, close_connection_pool: bool | None = None) -> None:  # noqa: FBT001 - redis-py's signature
        """Close the connections to the primary and to the sentinels."""
        await super().aclose(close_connection_pool)
        pool: Any = self.connection_pool
        await close_sentinels(pool.sentinel_manager)


async def close_sentinels(manager: Any) -> None:
    """Close the connections to sentinels, which redis-py leaves open."""
    for sentinel in manager.sentinels:
        await sentinel.aclose()


class Sentinels(msgspec.Struct, frozen=True):
    """What the URL of a service behind sentinels says."""

    addresses: list[tuple[str, int]]
    service: str
    settings: dict[str, Any]
    """Of connections to the service's servers."""
    sentinel_settings: dict[str, Any]
    """Of connections to the sentinels."""


def sentinels_of(url: str) -> Sentinels:
    """Return what the URL of a service says: `redis://HOST:PORT,HOST:PORT/SERVICE/DB`.

    `sentinel_username` and `sentinel_password` are options of the URL; user and password are those of the service.

    Raises:
        ValueError: Not such a URL.
    """
    scheme, _, rest = url.partition("://")
    authority, _, path = rest.partition("/")
    parts = urlsplit(f"{scheme}://sentinels/{path}")  # which refuses a list of hosts with an IPv6 address
    credentials, _, hosts = authority.rpartition("@")
    user, _, password = credentials.partition(":")
    service, _, database = parts.path.strip("/").partition("/")
    if not service or not hosts:
        raise ValueError("redis+sentinel://HOST:PORT,HOST:PORT/SERVICE names at least one sentinel and the service")
    addresses: list[tuple[str, int]] = []
    for text in hosts.split(","):
        host, _, port = text.rpartition(":") if re.search(r":\d+$", text) else (text, "", "26379")
        addresses.append((host.strip("[]"), int(port)))
    options = dict(parse_qsl(parts.query))
    secure: dict[str, Any] = {name: value for name, value in options.items() if name.startswith("ssl_")}
    if parts.scheme == "rediss":
        secure["ssl"] = True
    of_service = {"username": unquote(user) or None, "password": unquote(password) or None, "db": int(database or 0)}
    of_sentinels = {
        name.removeprefix("sentinel_"): value for name, value in options.items() if name.startswith("sentinel_")
    }
    return Sentinels(addresses, service, {**of_service, **secure}, {**of_sentinels, **secure})


@cache
def _text(name: str) -> str:
    folder = files("kaizen_async.workers") / "scripts"
    shared = "" if name in {"workers", "permits", "pause", "learned"} else (folder / "common.lua").read_text()
    return shared + (folder / f"{name}.lua").read_text()


class Store:
    """Keys and scripts in one Redis server, for one event loop.

    Args:
        url: See `connect`.
        namespace: Keeps what belongs together apart from others on the same server, for instance two accounts.
        on_trouble: Called when the server cannot be used for now, and with an empty text when it can again.
    """

    def __init__(
        self, url: str = DEFAULT_URL, namespace: str = "kaizen", on_trouble: Callable[[str], None] | None = None
    ) -> None:
        self.tag = "{" + require_name("namespace", namespace) + "}"
        self.workers = f"{self.tag}:workers"
        self.runs = f"{self.tag}:runs"
        self._url = url
        self._client = connect(url)
        self._trouble = ""
        self._trouble_since = 0.0
        self.report_trouble: Callable[[str], object] = on_trouble or _ignore

    def run(self, name: str) -> str:
        """Return the key of a run."""
        return f"{self.tag}:run:{name}"

    async def require_usable(self) -> None:
        """Find out within a few seconds whether the server can be used.

        Raises:
            RedisUnusableError: It cannot; the text says why.
        """
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self._require_usable()
        except TimeoutError:
            raise RedisUnusableError(
                f"Redis at {self.address} did not respond within {CONNECT_SECONDS:.0f} s; check the URL and the network"
            ) from None
        except (exceptions.RedisError, exceptions.RedisClusterException, OSError) as error:
            raise self._unusable(error) from None

    async def _require_usable(self) -> None:
        await self._client.ping()
        try:
            facts = await self._client.info()
        except exceptions.NoPermissionError:
            return
        if isinstance(next(iter(facts.values()), None), dict):  # a cluster: facts of each node
            facts = next(iter(facts.values()))
        version = str(facts.get("redis_version", "0"))
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST:
            raise RedisUnusableError(f"Redis at {self.address} is version {version}; this package needs 6.2 or newer")
        if facts.get("maxmemory") and facts.get("maxmemory_policy") != "noeviction":
            raise RedisUnusableError(
                f"Redis at {self.address} drops keys when it is full (maxmemory-policy {facts['maxmemory_policy']}), "
                "and would lose outcomes; set it to noeviction"
            )

    def _unusable(self, error: Exception) -> RedisUnusableError:
        text = _without_secret(str(error), self._url)
        if re.search("unknown command .?HELLO", text):  # 6.0 knows it
            return RedisUnusableError(f"Redis at {self.address} is too old; this package needs 6.2 or newer")
        if "AUTH" in text.upper() or "WRONGPASS" in text or isinstance(error, exceptions.AuthenticationError):
            return RedisUnusableError(
                f"Redis at {self.address} requires a valid user and password ({text}); "
                "give them in the URL: redis://USER:PASSWORD@HOST"
            )
        return RedisUnusableError(f"Redis at {self.address} cannot be used: {text}")

    @property
    def address(self) -> str:
        """The URL without user, password and options."""
        parts = urlsplit(self._url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    async def script(self, name: str, key: str, *args: Any) -> Any:
        """Run a script, again and again until Redis has run it."""
        text = _text(name)
        sha = _sha(name)

        async def run() -> Any:
            try:
                return await self._client.evalsha(sha, 1, key, *args)
            except exceptions.NoScriptError:
                return await self._client.eval(text, 1, key, *args)

        return await self.call(run)

    async def command(self, *words: Any) -> Any:
        """Send a command, again and again until Redis has done it; one that may be done twice."""
        return await self.call(lambda: self._client.execute_command(*words))

    async def call(self, attempt: Callable[[], Awaitable[Any]]) -> Any:
        """Repeat an attempt until Redis responds, unless it never will."""
        backoff = 0.05
        while True:
            try:
                reply = await _heeding_cancel(attempt)
            except exceptions.AuthenticationError as error:
                raise self._unusable(error) from None
            except _PASSING as error:
                self._tell(f"Redis is unreachable ({_without_secret(str(error), self._url)})")
            except exceptions.ResponseError as error:
                if isinstance(error, exceptions.OutOfMemoryError) or _FULL.search(str(error)):
                    self._tell("Redis is full (maxmemory)")
                elif _PASSING_REPLY.search(str(error)):
                    self._tell(f"Redis refuses for now ({str(error)[:100]})")
                else:
                    raise self._final(error) from None
            else:
                if self._trouble:
                    self._tell("")
                return reply
            await asyncio.sleep(backoff * random.uniform(0.5, 1))  # noqa: S311 - spreads load, guards nothing
            backoff = min(2 * backoff, LONGEST_BACKOFF)

    def _final(self, error: exceptions.ResponseError) -> RunError:
        if isinstance(error, exceptions.NoPermissionError) or "NOAUTH" in str(error):
            return self._unusable(error)
        return RunError(f"Redis at {self.address} refused a command: {_without_secret(str(error), self._url)}")

    def _tell(self, trouble: str) -> None:
        """Report once that the server cannot be used, and once that it can again."""
        if bool(trouble) != bool(self._trouble):
            if trouble:
                self._trouble_since = time.monotonic()
                log.warning("%s; trying again until it responds", trouble)
            else:
                log.warning("Redis responds again after %.1f s", time.monotonic() - self._trouble_since)
        if trouble != self._trouble:
            self.report_trouble(trouble)
        self._trouble = trouble

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()


def _ignore(_trouble: str) -> None:
    """Report trouble to nobody."""


async def _heeding_cancel(attempt: Callable[[], Awaitable[Any]]) -> Any:
    """Make an attempt, and raise CancelledError if the task was cancelled during it.

    redis-py sends with `asyncio.wait_for`, which on Python 3.11 may return a result instead of raising it.
    """
    task = cast("asyncio.Task[Any]", asyncio.current_task())
    before = task.cancelling()
    try:
        return await attempt()
    finally:
        if task.cancelling() > before:
            raise asyncio.CancelledError


@cache
def _sha(name: str) -> str:
    return hashlib.sha1(_text(name).encode()).hexdigest()  # noqa: S324 - how Redis names a script


def _without_secret(text: str, url: str) -> str:
    """Return one line of text without the password of a URL."""
    password = unquote(urlsplit(url.replace("+cluster", "").replace("+sentinel", "")).password or "")
    line = " ".join(text.split())
    return line.replace(password, "***") if password else line
