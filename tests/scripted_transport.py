"""A transport without a network, which sends scripted responses in virtual time."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeAlias
from unittest import mock

import pytest
from virtual_time import LoopClock
from yarl import URL

import kaizen_async._binding
from kaizen_async import KaizenClient, KaizenError, RateLimitError, RetryPolicy
from kaizen_async._lookup.health import Health
from kaizen_async._transport.transport import Answer

NEVER = float("inf")
"""Latency in seconds of a request without a response."""

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
    """Return a response outside 2xx. The keyword `retry_after` sets the header `Retry-After`."""
    body = b'{"message": "no such execution"}' if code == 404 else b""
    return Answer(code, {name.title().replace("_", "-"): value for name, value in headers.items()}, body)


Reply: TypeAlias = Answer | KaizenError | tuple[float, Answer | KaizenError]
"""A response or an error, optionally with its latency in seconds."""


class ScriptedTransport:
    """Responds to every request with `play(id, number)`, where number counts the requests for that id from 1.

    Attributes:
        latency: Default duration of a request in seconds.
        sent: The time and the id of each request.
        open: Requests in flight.
        most_open: The highest number of requests in flight.
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
        """The requested ids, in order."""
        return [execution_id for _, execution_id in self.sent]

    @property
    def times(self) -> list[float]:
        """The times of the requests, in virtual seconds."""
        return [round(time, 6) for time, _ in self.sent]

    @staticmethod
    def withhold(error: KaizenError) -> KaizenError:
        """Return the error unchanged, because there is no key to withhold."""
        return error

    def use_key(self, key: str) -> None:
        """Ignore the key, which is not needed."""

    @staticmethod
    def request_id(response: Answer) -> str | None:
        """Return the request id of a response."""
        return response.headers.get("x-request-id")

    @staticmethod
    def failed(failure: KaizenError, cause: Exception) -> KaizenError:
        """Return an error with its cause."""
        failure.__cause__ = cause
        return failure

    def reject(self) -> None:
        """Do nothing, because there is no connection."""

    @staticmethod
    def begin(url: URL, body: bytes, now: float, headers: object = None) -> None:
        """Return None, because there is no idle connection."""

    async def send_fresh(self, url: URL, body: bytes, is_held: Callable[[], bool]) -> Answer:
        """Send a request on a new connection. Here this is the same as `send`."""
        return await self.send(url, body, is_held)

    async def send(self, url: URL, body: bytes, is_held: Callable[[], bool]) -> Answer:
        """Record a request and return its reply."""
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
        """Mark the transport as closed."""
        assert not self.open, "closed under open requests"
        self.closed = True

    def client(self, **settings: Any) -> KaizenClient:
        """Return a client that uses this transport and the running loop's time."""
        client = KaizenClient(**{"clock": LoopClock(), **settings})
        with mock.patch.object(kaizen_async._binding, "Transport", return_value=self):
            client._binding.engine_here()
        return client


def health_of(client: KaizenClient) -> Health:
    """Return a client's view of the health of the server for instructor executions."""
    return client._binding.health_of(client.instructor_executions._endpoint)


def throttle(client: KaizenClient, retry_after: float) -> None:
    """Report a rejected request of another lookup to the health of a client."""
    health = health_of(client)
    error = RateLimitError("rejected", status=429, retry_after=retry_after, retryable=True)
    health.failed(health.send(), error, "somebody")


class SlowToConnect(ScriptedTransport):
    """A transport that takes 1.5 seconds to connect for ids with "slow", and then asks whether it may still send."""

    async def send(self, url: URL, body: bytes, is_held: Callable[[], bool]) -> Answer:
        """Return the reply to a request, or None if the request must not be sent any more."""
        await asyncio.sleep(1.5 if b"slow" in body else 0.0)
        return None if is_held() else await super().send(url, body, is_held)  # type: ignore[return-value]


async def failing(client: KaizenClient, execution_id: str = "a", **options: Any) -> KaizenError:
    """Return the error that a lookup raises."""
    with pytest.raises(KaizenError) as caught:
        await client.instructor_executions.get(execution_id, **options)
    return caught.value
