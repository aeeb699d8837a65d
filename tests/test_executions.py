"""The verbs as their users meet them: plain questions, plain answers, no socket."""

import inspect
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aioresponses import CallbackResult, aioresponses
from yarl import URL

from kaizen_async import (
    AuthenticationError,
    DecodeError,
    Executions,
    InstructorExecution,
    KaizenClient,
    NotFoundError,
    Outcome,
    RetryPolicy,
    StatusError,
    TransportError,
)

URL_OF_GET = "https://api.kaizenautomation.com/instructor/executions/get"
DOCUMENTED = (Path(__file__).parent / "samples" / "documented.json").read_bytes()


@pytest.fixture
async def executions() -> AsyncIterator[Executions[InstructorExecution]]:
    """Return the verbs of a client whose session is given, so that aioresponses can answer for it."""
    async with aiohttp.ClientSession() as session:
        retry = RetryPolicy(max_attempts=3, initial_backoff=0)
        async with KaizenClient("key", session=session, retry=retry) as client:
            yield client.instructor_executions


def answer(url: URL, **request: Any) -> CallbackResult:
    """Answer with the record that was asked for."""
    body = json.loads(request["data"])
    return CallbackResult(body=DOCUMENTED.replace(b"exec_9f2c1", body["id"].encode()))


async def test_get_asks_as_the_reference_says(
    executions: Executions[InstructorExecution], mocked: aioresponses
) -> None:
    """A POST of the id as JSON, with the key as a bearer token."""
    mocked.post(URL_OF_GET, callback=answer)
    execution = await executions.get("exec_1")
    assert execution.id == "exec_1"
    assert execution.workflow.name == "Renew the policy"
    ((method, url), (call,)) = mocked.requests.popitem()
    assert (method, str(url)) == ("POST", URL_OF_GET)
    assert call.kwargs["data"] == b'{"id":"exec_1"}'
    assert call.kwargs["headers"]["Authorization"] == "Bearer key"
    assert call.kwargs["headers"]["Content-Type"] == "application/json"
    assert call.kwargs["allow_redirects"] is False


@pytest.mark.parametrize(
    ("status", "error", "requests"),
    [
        (401, AuthenticationError, 1),
        (403, AuthenticationError, 1),
        (404, NotFoundError, 1),
        (422, StatusError, 1),
        (500, StatusError, 3),
    ],
)
async def test_get_raises_what_the_status_means(
    executions: Executions[InstructorExecution],
    mocked: aioresponses,
    status: int,
    error: type[StatusError],
    requests: int,
) -> None:
    """With the server's own words in it."""
    mocked.post(URL_OF_GET, status=status, body=b'{"message":"the reason"}', repeat=True)
    with pytest.raises(error, match=r"exec_1: the server answered .*: the reason") as caught:
        await executions.get("exec_1")
    assert caught.value.status == status
    assert caught.value.body == b'{"message":"the reason"}'
    assert caught.value.attempts == requests
    assert sum(len(calls) for calls in mocked.requests.values()) == requests


async def test_get_tries_again_after_a_fault(executions: Executions[InstructorExecution], mocked: aioresponses) -> None:
    """A refused connection, a gateway's page, then the record."""
    mocked.post(URL_OF_GET, exception=aiohttp.ServerDisconnectedError())
    mocked.post(URL_OF_GET, status=502, body=b"<html></html>", content_type="text/html")
    mocked.post(URL_OF_GET, callback=answer)
    assert (await executions.get("exec_1")).id == "exec_1"


async def test_get_raises_the_fault_that_lasts(
    executions: Executions[InstructorExecution], mocked: aioresponses
) -> None:
    """From aiohttp's, which is its cause."""
    fault = aiohttp.ClientConnectionError("no route")
    mocked.post(URL_OF_GET, exception=fault, repeat=True)
    with pytest.raises(TransportError, match=r"the connection failed: no route \(after 3 attempts\)") as caught:
        await executions.get("exec_1")
    assert caught.value.__cause__ is fault


async def test_get_raises_what_does_not_fit(executions: Executions[InstructorExecution], mocked: aioresponses) -> None:
    """It names the place, the id and the bytes."""
    body = DOCUMENTED.replace(b"exec_9f2c1", b"exec_1").replace(b'"isRecording": true', b'"isRecording": 1')
    mocked.post(URL_OF_GET, body=body)
    with pytest.raises(DecodeError) as caught:
        await executions.get("exec_1")
    assert caught.value.path == "$.isRecording"
    assert caught.value.execution_id == "exec_1"
    assert caught.value.body == body
    assert "`$.isRecording`" in str(caught.value)


async def test_get_many_returns_outcomes_in_order(
    executions: Executions[InstructorExecution], mocked: aioresponses
) -> None:
    """One for each id, ok or not."""

    def answer_or_miss(url: URL, **request: Any) -> CallbackResult:
        return CallbackResult(status=404) if b"exec_2" in request["data"] else answer(url, **request)

    mocked.post(URL_OF_GET, callback=answer_or_miss, repeat=True)
    outcomes = await executions.get_many(["exec_1", "exec_2", "exec_3", "exec_1"])
    assert [(outcome.id, outcome.ok) for outcome in outcomes] == [
        ("exec_1", True),
        ("exec_2", False),
        ("exec_3", True),
        ("exec_1", True),
    ]
    assert all(isinstance(outcome, Outcome) for outcome in outcomes)


async def test_stream_yields_outcomes(executions: Executions[InstructorExecution], mocked: aioresponses) -> None:
    """One for each id."""
    mocked.post(URL_OF_GET, callback=answer, repeat=True)
    async with executions.stream(f"exec_{n}" for n in range(20)) as outcomes:
        assert sorted([outcome.unwrap().id async for outcome in outcomes]) == sorted(f"exec_{n}" for n in range(20))


@pytest.mark.parametrize("verb", ["get", "get_many", "stream", "wait", "wait_many", "watch"])
def test_every_verb_tells_what_it_takes_returns_and_raises(verb: str) -> None:
    """The docstring names each parameter; what bounds it stands in there, defaults only in the signature."""
    method = getattr(Executions, verb)
    text = inspect.getdoc(method) or ""
    for name in list(inspect.signature(method).parameters)[1:]:
        assert f"    {name}: " in text, name
    assert "\nReturns:\n" in text
    assert "\nRaises:\n" in text
    assert "default" not in text.lower()
