"""The fixture `kaizen_emulator` in nested runs of pytest."""

import subprocess
import sys
from collections.abc import Callable

import pytest

import _kaizen_async_pytest_plugin

pytest_plugins = "pytester"

LOOK_UP = """
import aiohttp, pytest
from kaizen_async.testing import Life

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

MERGED = """
import asyncio, pytest

pytestmark = pytest.mark.kaizen_emulator(seed=1, path_prefix="/module", api_key="module")

@pytest.mark.parametrize("is_shared", [False, True])
def test_of_a_module(kaizen_emulator, kaizen_emulator_module, is_shared):
    emulator = kaizen_emulator_module if is_shared else kaizen_emulator
    assert emulator.base_url.endswith("/module/")
    assert asyncio.run(look_up(emulator)) == 401

@pytest.mark.kaizen_emulator(path_prefix="/class", default_life=Life.ended())
class TestOfAClass:
    @pytest.mark.kaizen_emulator(api_key=None)
    def test_of_a_class(self, kaizen_emulator):
        assert kaizen_emulator.base_url.endswith("/class/")
        assert asyncio.run(look_up(kaizen_emulator)) == 200
"""

INDIRECT = """
import asyncio

@pytest.mark.kaizen_emulator(api_key="right", path_prefix="/kaizen")
@pytest.mark.parametrize("kaizen_emulator", [{}, {"api_key": None}], indirect=True, ids=["", "open"])
def test_each(kaizen_emulator, request):
    assert kaizen_emulator.base_url.endswith("/kaizen/")
    assert asyncio.run(look_up(kaizen_emulator)) == (404 if "open" in request.node.name else 401)
"""

SHARED = """
import asyncio

@pytest.fixture(scope="session")
def kaizen_emulator_settings():
    return {"api_key": "of the run"}

@pytest.fixture
def fresh(kaizen_emulator_module):
    kaizen_emulator_module.reset()
    return kaizen_emulator_module

@pytest.mark.parametrize("number", range(2))
def test_shared(fresh, kaizen_emulator_session, kaizen_emulator, number):
    assert fresh is not kaizen_emulator_session is not kaizen_emulator
    for emulator, requests in [(fresh, 1), (kaizen_emulator_session, number + 1), (kaizen_emulator, 1)]:
        assert asyncio.run(look_up(emulator)) == 401
        assert emulator.request_count == requests
"""

IN_VIRTUAL_TIME = """
import asyncio
from hypothesis import HealthCheck, given, settings, strategies
from kaizen_async import KaizenClient

async def status(emulator, clock):
    async with KaizenClient(base_url=emulator.base_url, clock=clock) as kaizen:
        return (await kaizen.instructor_executions.wait("exec_1", deadline=9000)).status

@given(seconds=strategies.floats(0, 7200))
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_examples(kaizen_emulator, kaizen_clock, seconds):
    kaizen_emulator.reset()
    assert kaizen_emulator.requests == []
    began = kaizen_clock.time()
    kaizen_emulator.add("exec_1", Life.lasting(seconds))
    assert asyncio.run(status(kaizen_emulator, kaizen_clock)) == "Completed"
    assert kaizen_clock.time() - began >= seconds

@pytest.mark.parametrize("turn", [1, 2])
def test_fresh_time(kaizen_clock, kaizen_emulator, turn):
    assert kaizen_clock.time() == 0
    asyncio.run(kaizen_clock.advance(5))
"""

SHARED_TIME = """
import asyncio
from kaizen_async.testing import VirtualClock

@pytest.fixture(scope="session")
def kaizen_emulator_settings():
    return {"clock": VirtualClock()}

@pytest.mark.parametrize("turn", [0, 1])
def test_shared_time(kaizen_clock, kaizen_emulator, kaizen_emulator_session, turn):
    assert kaizen_clock.time() == turn * 60
    began = kaizen_emulator.now(), kaizen_emulator_session.now()
    asyncio.run(kaizen_clock.advance(60))
    ended = kaizen_emulator.now(), kaizen_emulator_session.now()
    assert [(end - begin).total_seconds() for begin, end in zip(began, ended)] == [60, 60]
"""

UNITTEST = """
import asyncio, unittest

@pytest.mark.usefixtures("emulator_of_the_test")
class TestIt(unittest.IsolatedAsyncioTestCase):
    @pytest.fixture
    def emulator_of_the_test(self, kaizen_emulator):
        self.emulator = kaizen_emulator

    async def test_it(self):
        self.emulator.add("exec_1")
        self.assertEqual(await look_up(self.emulator), 200)
"""

ERRORS = """
import asyncio

@pytest.mark.kaizen_emulator(strict=True)
def test_strict(kaizen_emulator):
    assert asyncio.run(look_up(kaizen_emulator)) == 404

@pytest.mark.kaizen_emulator(default_life=lambda execution_id: 1 / 0)
def test_script(kaizen_emulator):
    assert asyncio.run(look_up(kaizen_emulator)) == 501

@pytest.mark.kaizen_emulator(prot=1)
def test_unknown_setting(kaizen_emulator):
    pass

@pytest.mark.kaizen_emulator("right")
def test_positional_setting(kaizen_emulator):
    pass
"""

ALONE = """
import asyncio

@pytest.mark.parametrize("number", range(8))
def test_alone(kaizen_emulator, number):
    kaizen_emulator.add(f"exec_{number}")
    seen = [asyncio.run(look_up(kaizen_emulator, f"exec_{n}")) for n in range(8)]
    assert seen == [200 if n == number else 404 for n in range(8)]
"""

PYTEST_ASYNCIO = (
    "-ppytest_asyncio.plugin",
    "-oasyncio_mode=auto",
    "-oasyncio_debug=true",
    "-oasyncio_default_fixture_loop_scope=function",
)


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Callable[..., pytest.RunResult]:
    """Return a function that runs pytest in this process, with chosen plugins only and warnings as errors."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makeini("[pytest]\nstrict_markers = true\nfilterwarnings = error\n")

    def run_pytest(source: str, *arguments: str) -> pytest.RunResult:
        pytester.makepyfile(source)
        return pytester.runpytest_inprocess("-p_kaizen_async_pytest_plugin", "-pno:faulthandler", *arguments)

    return run_pytest


@pytest.mark.parametrize(
    ("source", "arguments", "passed"),
    [
        pytest.param(RESTART, PYTEST_ASYNCIO, 2, id="pytest-asyncio"),
        pytest.param(ANYIO + RESTART, ["-panyio.pytest_plugin"], 2, id="anyio"),
        pytest.param(UNITTEST, (), 1, id="unittest"),
        pytest.param(IN_VIRTUAL_TIME, (), 3, id="hypothesis and virtual time"),
        pytest.param(MERGED, (), 3, id="markers of module, class and test"),
        pytest.param(INDIRECT, (), 2, id="indirect parametrization"),
        pytest.param(SHARED, (), 2, id="wider scopes"),
        pytest.param(SHARED_TIME, (), 2, id="one time for wider scopes"),
    ],
)
def test_it_serves_tests_of_every_kind(
    run: Callable[..., pytest.RunResult], source: str, arguments: list[str], passed: int
) -> None:
    """Coroutine tests and plain tests get a fresh emulator, or one of a wider scope if they request it."""
    run(LOOK_UP + source, *arguments).assert_outcomes(passed=passed)


def test_wrong_settings_and_scripts_are_errors(run: Callable[..., pytest.RunResult]) -> None:
    """Invalid settings are errors before the test, and script errors after it."""
    outcome = run(LOOK_UP + ERRORS)
    outcome.assert_outcomes(passed=2, errors=4)
    outcome.stdout.fnmatch_lines(
        [
            "*ScriptError: a request came in for 'exec_1', which does not exist*",
            "*ScriptError: the function given to default_life raised ZeroDivisionError*",
            "*TypeError: *KaizenEmulator.__init__() got an unexpected keyword argument 'prot'*",
            "*TypeError: the marker kaizen_emulator takes settings by name*",
        ]
    )


def test_the_fixtures_are_listed_with_what_they_do(run: Callable[..., pytest.RunResult]) -> None:
    """`pytest --fixtures` and `--markers` describe the fixture and the marker."""
    run("", "--fixtures").stdout.fnmatch_lines(["kaizen_emulator -- *", "*fresh for each test.*"])
    run("", "--markers").stdout.fnmatch_lines(["@pytest.mark.kaizen_emulator(*settings): *"])


def test_unused_it_loads_nothing_heavy() -> None:
    """The plugin loads no HTTP library until a test uses the fixture, because every pytest run imports it."""
    code = "import sys, _kaizen_async_pytest_plugin; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)  # noqa: S603 - our own
    assert not {"kaizen_async", "aiohttp", "msgspec", "tenacity", "yarl"} & set(loaded.stdout.split())


def test_it_is_found_by_its_entry_point(pytestconfig: pytest.Config) -> None:
    """Pytest finds the plugin by its entry point, without a conftest."""
    assert pytestconfig.pluginmanager.get_plugin("kaizen_async") is _kaizen_async_pytest_plugin


@pytest.mark.slow
def test_it_serves_workers_of_xdist(run: Callable[..., pytest.RunResult], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests in several xdist processes do not share an emulator."""
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)  # the other tests measure the plugin
    run(LOOK_UP + ALONE, "-pxdist", "-n2").assert_outcomes(passed=8)
