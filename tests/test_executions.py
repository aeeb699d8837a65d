"""The methods of `Executions` as their users call them, without a socket."""

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
    """Return the methods of a client whose session is passed in, so that aioresponses can respond."""
    async with aiohttp.ClientSession() as session:
        retry = RetryPolicy(max_attempts=3, initial_backoff=0)
        async with KaizenClient("key", session=session, retry=retry) as client:
            yield client.instructor_executions


def answer(url: URL, **request: Any) -> CallbackResult:
    """Respond with the requested record."""
    body = json.loads(request["data"])
    return CallbackResult(body=DOCUMENTED.replace(b"exec_9f2c1", body["id"].encode()))


async def test_get_sends_the_documented_request(
    executions: Executions[InstructorExecution], mocked: aioresponses
) -> None:
    """`get` sends a POST with the id as JSON and the key as a bearer token."""
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
async def test_get_raises_the_error_of_the_status(
    executions: Executions[InstructorExecution],
    mocked: aioresponses,
    status: int,
    error: type[StatusError],
    requests: int,
) -> None:
    """`get` raises the error class of the status, with the server's message in its text."""
    mocked.post(URL_OF_GET, status=status, body=b'{"message":"the reason"}', repeat=True)
    with pytest.raises(error, match=r"exec_1: the server answered .*: the reason") as caught:
        await executions.get("exec_1")
    assert caught.value.status == status
    assert caught.value.body == b'{"message":"the reason"}'
    assert caught.value.attempts == requests
    assert sum(len(calls) for calls in mocked.requests.values()) == requests


async def test_get_retries_after_a_fault(executions: Executions[InstructorExecution], mocked: aioresponses) -> None:
    """`get` retries after a broken connection and after a gateway's error page, and returns the record."""
    mocked.post(URL_OF_GET, exception=aiohttp.ServerDisconnectedError())
    mocked.post(URL_OF_GET, status=502, body=b"<html></html>", content_type="text/html")
    mocked.post(URL_OF_GET, callback=answer)
    assert (await executions.get("exec_1")).id == "exec_1"


async def test_get_raises_the_fault_that_lasts(
    executions: Executions[InstructorExecution], mocked: aioresponses
) -> None:
    """After its last attempt, `get` raises a TransportError whose cause is aiohttp's error."""
    fault = aiohttp.ClientConnectionError("no route")
    mocked.post(URL_OF_GET, exception=fault, repeat=True)
    with pytest.raises(TransportError, match=r"the connection failed: no route \(after 3 attempts\)") as caught:
        await executions.get("exec_1")
    assert caught.value.__cause__ is fault


async def test_get_raises_a_decode_error(executions: Executions[InstructorExecution], mocked: aioresponses) -> None:
    """A response that does not fit the record raises a DecodeError with the path, the id and the body."""
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
    """`get_many` returns one outcome for each id, in order, whether the lookup succeeded or failed."""

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
    """A stream yields one outcome for each id."""
    mocked.post(URL_OF_GET, callback=answer, repeat=True)
    async with executions.stream(f"exec_{n}" for n in range(20)) as outcomes:
        assert sorted([outcome.unwrap().id async for outcome in outcomes]) == sorted(f"exec_{n}" for n in range(20))


@pytest.mark.parametrize("verb", ["get", "get_many", "stream", "wait", "wait_many", "watch"])
def test_every_method_has_a_complete_docstring(verb: str) -> None:
    """The docstring of each method documents every parameter, the result and the errors, and repeats no default."""
    method = getattr(Executions, verb)
    text = inspect.getdoc(method) or ""
    for name in list(inspect.signature(method).parameters)[1:]:
        assert f"    {name}: " in text, name
    assert "\nReturns:\n" in text
    assert "\nRaises:\n" in text
    assert "default" not in text.lower()
