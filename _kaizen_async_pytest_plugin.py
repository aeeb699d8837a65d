"""The fixture `kaizen_emulator` for pytest: an emulator that serves for the length of one test.

It stands beside the package, not in it: every run of pytest in an environment with kaizen_async imports this file, and
must not pay for aiohttp if no test asks for the fixture.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from kaizen_async.testing.emulator import KaizenEmulator


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line(
        "markers", "kaizen_emulator(**settings): settings for the KaizenEmulator of the fixture kaizen_emulator"
    )


@pytest.fixture
def kaizen_emulator(request: pytest.FixtureRequest) -> "Iterator[KaizenEmulator]":
    """A running `KaizenEmulator`, fresh for each test.

    It serves in a thread of its own, so it suits every kind of test: plain functions, coroutines under pytest-asyncio
    or anyio, applications and workers that run loops or processes of their own.

    `@pytest.mark.kaizen_emulator(api_key="secret")` hands it settings. An application that makes its client from the
    environment finds it by `monkeypatch.setenv("KAIZEN_BASE_URL", kaizen_emulator.base_url)`.
    """
    # Only here: whoever never asks for the fixture must not pay for the import of an HTTP server.
    from kaizen_async.testing.emulator import KaizenEmulator  # noqa: PLC0415

    marker: pytest.Mark | None = request.node.get_closest_marker("kaizen_emulator")
    settings: dict[str, Any] = {} if marker is None else dict(marker.kwargs)
    with KaizenEmulator(*(marker.args if marker else ()), **settings) as emulator:
        yield emulator
