"""The fixtures of kaizen_async for pytest: `kaizen_emulator`, its siblings of wider scope, and `kaizen_clock`.

This file stands beside the package, not in it: every run of pytest in an environment with kaizen_async imports it, and
must not pay for aiohttp if no test asks for a fixture.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from kaizen_async.testing.clock import VirtualClock
    from kaizen_async.testing.emulator import KaizenEmulator

MARKER = "kaizen_emulator"


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line(
        "markers", f"{MARKER}(**settings): settings for the KaizenEmulator of the fixture kaizen_emulator"
    )


@pytest.fixture(scope="session")
def kaizen_emulator_settings() -> dict[str, Any]:
    """Settings for all emulators of these fixtures: none; override it in a conftest to return your own."""
    return {}


@pytest.fixture
def kaizen_clock(request: pytest.FixtureRequest, kaizen_emulator_settings: dict[str, Any]) -> "VirtualClock":
    """A `VirtualClock`, fresh for each test. The fixture kaizen_emulator of the same test lives in its time.

    Give it to the client: `KaizenClient(base_url=kaizen_emulator.base_url, clock=kaizen_clock)`. If the settings of the
    emulator name a `VirtualClock`, as those of a wider scope may, it is that one.
    """
    from kaizen_async.testing.clock import VirtualClock  # noqa: PLC0415 - see the top of this file

    given = (kaizen_emulator_settings | _marked(request)).get("clock")
    return given if isinstance(given, VirtualClock) else VirtualClock()


@pytest.fixture
def kaizen_emulator(
    request: pytest.FixtureRequest, kaizen_emulator_settings: dict[str, Any]
) -> "Iterator[KaizenEmulator]":
    """A running `KaizenEmulator`, fresh for each test.

    It serves in a thread of its own, so it suits every kind of test: plain functions, coroutines under pytest-asyncio
    or anyio, applications and workers that run loops or processes of their own.

    `@pytest.mark.kaizen_emulator(api_key="secret")` hands it settings. Markers of module, class and test merge; of
    equal names the innermost counts. So does indirect parametrization, by dicts of settings. A test that also asks for
    kaizen_clock gets an emulator in its time. An application that makes its client from the environment finds it by
    `monkeypatch.setenv("KAIZEN_BASE_URL", kaizen_emulator.base_url)`.
    """
    settings = kaizen_emulator_settings | _marked(request) | getattr(request, "param", {})
    if "kaizen_clock" in request.fixturenames:
        settings.setdefault("clock", request.getfixturevalue("kaizen_clock"))
    yield from _serving(settings)


@pytest.fixture(scope="module")
def kaizen_emulator_module(
    request: pytest.FixtureRequest, kaizen_emulator_settings: dict[str, Any]
) -> "Iterator[KaizenEmulator]":
    """A running `KaizenEmulator` for all tests of a module; call its `reset()` where one must not see the other.

    Markers of the module, and indirect parametrization, hand it settings.
    """
    yield from _serving(kaizen_emulator_settings | _marked(request) | getattr(request, "param", {}))


@pytest.fixture(scope="session")
def kaizen_emulator_session(kaizen_emulator_settings: dict[str, Any]) -> "Iterator[KaizenEmulator]":
    """A running `KaizenEmulator` for a whole run; call its `reset()` where one test must not see the other."""
    yield from _serving(kaizen_emulator_settings)


def _marked(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return the settings of the markers that apply, the innermost last."""
    settings: dict[str, Any] = {}
    for marker in reversed(list(request.node.iter_markers(MARKER))):
        if marker.args:
            raise TypeError(f"the marker {MARKER} takes settings by name, such as api_key='secret', not {marker.args}")
        settings |= marker.kwargs
    return settings


def _serving(settings: dict[str, Any]) -> "Iterator[KaizenEmulator]":
    from kaizen_async.testing.emulator import KaizenEmulator  # noqa: PLC0415 - see the top of this file

    with KaizenEmulator(**settings) as emulator:
        yield emulator
