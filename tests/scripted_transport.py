"""A transport without a network: it answers what a test says, in virtual time."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeAlias
from unittest import mock

import pytest
from virtual_time import LoopClock
from yarl import URL

import kaizen_async.client
from kaizen_async import KaizenClient, KaizenError, RateLimitError, RetryPolicy
from kaizen_async._lookup.health import Health
from kaizen_async._transport.transport import Answer

NEVER = float("inf")
"""Seconds of a request that is never answered."""

AT_ONCE = RetryPolicy(initial_backoff=0, max_backoff=0)
"""Retries without back-off."""


def record(execution_id: str, **fields: Any) -> Answer:
    """Return a 200 with a record."""
    body = {
        "id": execution_id,
        "workflow": {"id": "wf_1", "name": "Renew"},
        "logins": [],
        "authentications": [],
        "contextAuthentications": [],
        "startTime": "2026-11-23T12:00:00Z",
        "endTime": None,
        "durationMs": None,
        "isRecording": False,
        "browserSessionId": None,
        "status": "InProgress",
        **fields,
    }
    return Answer(200, {}, json.dumps(body).encode())


def status(code: int, **headers: str) -> Answer:
    """Return an answer outside 2xx; a header `Retry-After` is written `retry_after`."""
    body = b'{"message": "no such execution"}' if code == 404 else b""
    return Answer(code, {name.title().replace("_", "-"): value for name, value in headers.items()}, body)


Reply: TypeAlias = Answer | KaizenError | tuple[float, Answer | KaizenError]
"""What comes back; with seconds before it if it takes other than the usual time."""


class ScriptedTransport:
    """Answers every request by `play(id, number)`, where number counts the requests for that id from 1.

    Attributes:
        latency: Seconds that a request takes unless the reply says otherwise.
        sent: When each request came, and for which id.
        open: Requests in flight.
        most_open: The most there were at a time.
        closed: Whether the client has closed it.
    """

    is_inside = False

    def __init__(self, play: Callable[[str, int], Reply] | None = None, *, latency: float = 0.1) -> None:
        self._play = play or (lambda execution_id, _: record(execution_id))
        self.latency = latency
        self.sent: list[tuple[float, str]] = []
        self.numbers: Counter[str] = Counter()
        self.open = 0
        self.most_open = 0
        self.closed = False

    is_open = False
    is_out_of_step = False

    @property
    def ids(self) -> list[str]:
        """The ids asked for, in order."""
        return [execution_id for _, execution_id in self.sent]

    @property
    def times(self) -> list[float]:
        """When requests came, in virtual seconds."""
        return [round(time, 6) for time, _ in self.sent]

    @staticmethod
    def withhold(error: KaizenError) -> KaizenError:
        """Return the error as it is: there is no key here."""
        return error

    def use_key(self, key: str) -> None:
        """Take a key, which is not needed here."""

    @staticmethod
    def request_id(response: Answer) -> str | None:
        """Return what a server calls a request."""
        return response.headers.get("x-request-id")

    @staticmethod
    def failed(failure: KaizenError, cause: Exception) -> KaizenError:
        """Return an error with its cause."""
        failure.__cause__ = cause
        return failure

    def reject(self) -> None:
        """Do nothing: there is no connection."""

    @staticmethod
    def begin(url: URL, body: bytes, now: float) -> None:
        """Begin nothing at once: there is no idle connection."""

    async def send_fresh(self, url: URL, body: bytes, is_held: Callable[[], bool]) -> Answer:
        """Take a request on a new connection. There are no connections here."""
        return await self.send(url, body, is_held)

    async def send(self, url: URL, body: bytes, is_held: Callable[[], bool]) -> Answer:
        """Take a request, and answer it."""
        assert not self.closed, "a request after the transport was closed"
        execution_id = json.loads(body)["id"]
        self.sent.append((asyncio.get_running_loop().time(), execution_id))
        self.numbers[execution_id] += 1
        reply = self._play(execution_id, self.numbers[execution_id])
        latency, reply = reply if isinstance(reply, tuple) and not isinstance(reply, Answer) else (self.latency, reply)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            await (asyncio.Event().wait() if latency == NEVER else asyncio.sleep(latency))
        finally:
            self.open -= 1
        if isinstance(reply, KaizenError):
            raise reply
        return reply

    async def close(self) -> None:
        """Note it."""
        assert not self.open, "closed under open requests"
        self.closed = True

    def client(self, **settings: Any) -> KaizenClient:
        """Return a client that sends through here, and lives in the running loop's time."""
        client = KaizenClient(**{"clock": LoopClock(), **settings})
        with mock.patch.object(kaizen_async.client, "Transport", return_value=self):
            client._engine_here()
        return client


def health_of(client: KaizenClient) -> Health:
    """Return the health of the server for instructor executions, in the view of a client."""
    kind = client.instructor_executions
    endpoint = next(iter(client._endpoints.values()))
    del kind
    return client._health_of(endpoint)


def throttle(client: KaizenClient, retry_after: float) -> None:
    """Have a client believe that the server has rejected a request of somebody."""
    health = health_of(client)
    error = RateLimitError("rejected", status=429, retry_after=retry_after, retryable=True)
    health.failed(health.send(), error, "somebody")


class SlowToConnect(ScriptedTransport):
    """Takes 1.5 seconds to connect for ids with "slow" in them; then it asks whether it may still send."""

    async def send(self, url: URL, body: bytes, is_held: Callable[[], bool]) -> Answer:
        """Take a request, and answer it; return None if it must not be sent any more."""
        await asyncio.sleep(1.5 if b"slow" in body else 0.0)
        return None if is_held() else await super().send(url, body, is_held)  # type: ignore[return-value]


async def failing(client: KaizenClient, execution_id: str = "a", **options: Any) -> KaizenError:
    """Return the error that a lookup raises."""
    with pytest.raises(KaizenError) as caught:
        await client.instructor_executions.get(execution_id, **options)
    return caught.value
