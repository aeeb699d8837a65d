"""The fixture `kaizen_emulator`, in runs of pytest of its own."""

import subprocess
import sys
from collections.abc import Callable, Iterable

import pytest

pytest_plugins = "pytester"

LOOK_UP = """
import aiohttp, pytest

async def look_up(emulator, execution_id="exec_1"):
    async with aiohttp.ClientSession() as session:
        url = emulator.base_url + "instructor/executions/get"
        async with session.post(url, json={"id": execution_id}) as response:
            return response.status
"""

RESTART = """
async def test_restart(kaizen_emulator):
    kaizen_emulator.add("exec_1")
    assert await look_up(kaizen_emulator) == 200
    await kaizen_emulator.stop()
    with pytest.raises(aiohttp.ClientConnectorError):
        await look_up(kaizen_emulator)
    await kaizen_emulator.start()
    assert await look_up(kaizen_emulator) == 200
    await kaizen_emulator.until_quiet()

async def test_fresh(kaizen_emulator):
    assert await look_up(kaizen_emulator) == 404
    assert kaizen_emulator.request_count == 1
"""

ANYIO = """
pytestmark = pytest.mark.anyio

@pytest.fixture
def anyio_backend():
    return "asyncio"
"""

ALONE = """
import asyncio

@pytest.mark.parametrize("number", range(8))
def test_alone(kaizen_emulator, number):
    kaizen_emulator.add(f"exec_{number}")
    seen = [asyncio.run(look_up(kaizen_emulator, f"exec_{n}")) for n in range(8)]
    assert seen == [200 if n == number else 404 for n in range(8)]
"""

SETTINGS = """
import asyncio

@pytest.mark.kaizen_emulator(api_key="right", path_prefix="/kaizen")
def test_settings(kaizen_emulator):
    assert kaizen_emulator.base_url.endswith("/kaizen/")
    assert asyncio.run(look_up(kaizen_emulator)) == 401
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Callable[..., pytest.RunResult]:
    """Runs a pytest in which nothing is loaded but what a test asks for, with warnings as errors."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makeini("[pytest]\nstrict_markers = true\nfilterwarnings = error\n")

    def run_pytest(source: str, *arguments: str, plugins: Iterable[str] = ()) -> pytest.RunResult:
        pytester.makepyfile(source)
        loaded = [f"-p{plugin}" for plugin in ("_kaizen_async_pytest_plugin", *plugins)]
        return pytester.runpytest_subprocess(*loaded, *arguments)

    return run_pytest


def test_it_serves_tests_under_pytest_asyncio(run: Callable[..., pytest.RunResult]) -> None:
    """Each coroutine test gets a fresh emulator, and may stop and start it from its own loop."""
    options = ("-oasyncio_mode=auto", "-oasyncio_debug=true", "-oasyncio_default_fixture_loop_scope=function")
    run(LOOK_UP + RESTART, *options, plugins=["pytest_asyncio.plugin"]).assert_outcomes(passed=2)


def test_it_serves_tests_under_anyio(run: Callable[..., pytest.RunResult]) -> None:
    """The plugin of anyio is served just as well."""
    pytest.importorskip("anyio", reason="anyio is not installed")
    run(LOOK_UP + ANYIO + RESTART, plugins=["anyio.pytest_plugin"]).assert_outcomes(passed=2)


def test_it_serves_workers_of_xdist(run: Callable[..., pytest.RunResult]) -> None:
    """Tests that run at the same time in several processes do not see each other's emulator."""
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    run(LOOK_UP + ALONE, "-n2", plugins=["xdist"]).assert_outcomes(passed=8)


def test_it_serves_blocking_tests_with_settings(run: Callable[..., pytest.RunResult]) -> None:
    """Plain tests are served too, and a marker hands settings to the emulator."""
    run(LOOK_UP + SETTINGS).assert_outcomes(passed=1)


@pytest.mark.parametrize("settings", ["prot=1", "'right'"], ids=["unknown", "positional"])
def test_settings_that_do_not_exist_are_an_error(run: Callable[..., pytest.RunResult], settings: str) -> None:
    """A misspelt setting fails the test instead of being ignored."""
    outcome = run(f"import pytest\n@pytest.mark.kaizen_emulator({settings})\ndef test_it(kaizen_emulator):\n    pass\n")
    outcome.assert_outcomes(errors=1)
    outcome.stdout.fnmatch_lines(["*TypeError: *KaizenEmulator.__init__() *"])


def test_the_fixture_is_listed_with_what_it_does(run: Callable[..., pytest.RunResult]) -> None:
    """`pytest --fixtures` and `--markers` explain both names."""
    run("", "--fixtures").stdout.fnmatch_lines(["kaizen_emulator -- *", "*fresh for each test.*"])
    run("", "--markers").stdout.fnmatch_lines(["@pytest.mark.kaizen_emulator(*settings): *"])


def test_unused_it_loads_nothing_heavy() -> None:
    """Every run of pytest imports the plugin, so it brings in no HTTP library until a test asks for the fixture."""
    code = "import sys, _kaizen_async_pytest_plugin; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)  # noqa: S603 - our own
    assert not {"kaizen_async", "aiohttp", "msgspec", "tenacity", "yarl"} & set(loaded.stdout.split())


def test_it_is_found_by_its_entry_point(pytester: pytest.Pytester) -> None:
    """Whoever installs the package has the fixture, without a line in a conftest."""
    pytester.makepyfile("def test_it(kaizen_emulator):\n    assert kaizen_emulator.base_url\n")
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=1)
