"""Mocks, recorders and tracers that patch aiohttp get the requests, also if they come after the first one.

What is not installed is skipped. `pip install vcrpy pook ddtrace elastic-apm` adds what this project's extras lack.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NEIGHBOURS = Path(__file__).parents[1] / "neighbours.py"
MODULES = {
    "vcrpy": "vcr",
    "patched_request": "aiohttp",
    "patched_post": "aiohttp",
    "opentelemetry": "opentelemetry.sdk",
}
"""What a package is imported as, where that is not its name."""


def run(name: str, directory: Path) -> dict[str, Any]:
    """Run a package in a process of its own, because it patches all of it, and return what it reports."""
    module = MODULES.get(name, name)
    if importlib.util.find_spec(module.split(".")[0]) is None or importlib.util.find_spec(module) is None:
        pytest.skip(f"{name} is not installed")
    ran = subprocess.run(  # noqa: S603 - our own file
        [sys.executable, str(NEIGHBOURS), name, str(directory)], capture_output=True, text=True, check=False, timeout=25
    )
    assert ran.returncode == 0, ran.stderr
    report: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    assert report["before"] == 1
    return report


@pytest.mark.parametrize(
    ("name", "recorded"),
    [("vcrpy", 1), ("pook", 0), ("aioresponses", 0), ("patched_request", 0), ("patched_post", 0)],
)
def test_a_mock_gets_the_request_and_the_server_gets_nothing(name: str, recorded: int, tmp_path: Path) -> None:
    """The key does not leave the process either. A recorder lets through what it records, and no more."""
    report = run(name, tmp_path)
    assert report["seen"] >= 1
    assert len(report["after"]) == recorded


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("ddtrace", "x-datadog-trace-id"),
        ("elasticapm", "traceparent"),
        ("sentry_sdk", "sentry-trace"),
        ("opentelemetry", "traceparent"),
    ],
)
def test_a_tracer_puts_its_header_into_the_request(name: str, header: str, tmp_path: Path) -> None:
    """So the trace continues in the server."""
    [head] = run(name, tmp_path)["after"]
    assert f"\r\n{header}: " in head
