"""Servers whose faults follow one another or mix, on real sockets: nothing is lost, and few requests are wasted."""

import asyncio
import ssl
from collections.abc import Callable

import pytest
import trustme
from scripted_server import RESET, Request, Script, ScriptedServer, client_for, closing, ok, response, run_on

from kaizen_async import AuthenticationError, RetryPolicy
from kaizen_async._lookup import health

AUTHORITY = trustme.CA()
CERTIFICATE = AUTHORITY.issue_cert("127.0.0.1")
COUNT = 120
PATIENT = RetryPolicy(max_attempts=10, initial_backoff=0.01, max_backoff=0.05)

on_each_socket = pytest.mark.parametrize(
    ("loop", "scheme"), [("asyncio", "http"), ("uvloop", "http"), ("asyncio", "https"), ("uvloop", "https")]
)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pauses end early, since these tests wait in real time."""
    for name, value in {
        "FIRST_PROBE": 0.01,
        "CONFIRMATION": 0.05,
        "START_RATE": 500.0,
        "START_RATE_LIMITED": 500.0,
    }.items():
        monkeypatch.setattr(health, name, value)


def server(play: Callable[[Request], Script], scheme: str) -> ScriptedServer:
    """Return a server with or without TLS."""
    if scheme == "http":
        return ScriptedServer(play)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    CERTIFICATE.configure_cert(context)
    return ScriptedServer(play, ssl_context=context)


def trusting() -> ssl.SSLContext:
    """Return the TLS settings of a client."""
    context = ssl.create_default_context()
    AUTHORITY.configure_trust(context)
    return context


def resets_then_rejections(request: Request) -> Script:
    """Reset all connections for a while, then reject all requests, then work."""
    if 40 < request.number <= 61:
        return [RESET]
    return [response({}, 429)] if 61 < request.number <= 63 else [ok(request)]


def gateway_errors_then_lag(request: Request) -> Script:
    """Work, then respond 502 or 504 for a while, then respond late."""
    if 30 < request.number <= 51:
        return [response(b"<html>", 502 + 2 * (request.number % 2))]
    return [ok(request)] if request.number <= 30 else [0.01, ok(request)]


def one_of_three_resets_and_one_rejects(request: Request) -> Script:
    """Behave like three replicas: one resets every other request, and one rejects every other with a time to wait."""
    if request.number % 6 == 0:
        return [RESET]
    return [response({}, 429, {"retry-after-ms": "10"})] if request.number % 6 == 1 else [ok(request)]


@on_each_socket
@pytest.mark.parametrize("play", [resets_then_rejections, gateway_errors_then_lag, one_of_three_resets_and_one_rejects])
def test_faults_that_follow_one_another_lose_nothing(play: Callable[[Request], Script], loop: str, scheme: str) -> None:
    """If faults follow one another or mix, every lookup succeeds, with at most twice as many requests."""

    async def main() -> None:
        async with (
            server(play, scheme) as scripted,
            closing(client_for(scripted, ssl_context=trusting(), concurrency=20, retry=PATIENT), scripted) as client,
        ):
            ids = [f"e{number}" for number in range(COUNT)]
            outcomes = await client.instructor_executions.get_many(ids)
            assert [outcome.unwrap().id for outcome in outcomes] == ids
            assert len(scripted.requests) <= 2 * COUNT

    run_on(loop, main(), debug=False)


@on_each_socket
@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_revoked_ends_a_batch(status: int, loop: str, scheme: str) -> None:
    """If the key is revoked during a batch, the ids that are not sent yet end with the same error, unsent."""

    async def main() -> None:
        async with (
            server(
                lambda request: [ok(request) if request.number <= 100 else response({}, status)], scheme
            ) as scripted,
            closing(client_for(scripted, ssl_context=trusting(), concurrency=20), scripted) as client,
        ):
            outcomes = await client.instructor_executions.get_many([f"e{number}" for number in range(1000)])
            errors = [outcome.error for outcome in outcomes if outcome.error is not None]
            assert len(errors) == 900
            assert all(type(error) is AuthenticationError and error.status == status for error in errors)
            assert sum(error.attempts == 0 for error in errors) >= 870
            assert len(scripted.requests) <= 140

    run_on(loop, main(), debug=False)


@on_each_socket
def test_one_kind_of_lookup_that_fails_does_not_stop_another(loop: str, scheme: str) -> None:
    """If one kind of lookup always fails, the lookups of another kind succeed without a pause."""

    def play(request: Request) -> Script:
        return [response({}, 503)] if request.target.startswith("/executions") else [ok(request)]

    async def main() -> None:
        async with (
            server(play, scheme) as scripted,
            closing(client_for(scripted, ssl_context=trusting(), concurrency=20), scripted) as client,
        ):
            ids = [f"e{number}" for number in range(COUNT)]
            failing = asyncio.create_task(client.executions.get_many(ids, deadline=0.2))
            outcomes = await client.instructor_executions.get_many(ids)
            assert all(outcome.attempts == 1 for outcome in outcomes)
            assert not any(outcome.ok for outcome in await failing)
            assert client.stats().outages == 1

    run_on(loop, main(), debug=False)
