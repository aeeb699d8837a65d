"""Every Python block of README and docs/ runs, and so does every shell block marked `<!-- run -->`.

A block with a function `test_…` is run by a nested pytest, any other block as a script, each in an empty folder. All
blocks use an emulator in which every execution exists, unless they start their own. A block that needs a package
outside the test extra is marked `<!-- needs: NAME -->` in the line above it. Without that package it is only compiled.
"""

import ast
import asyncio
import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from aiohttp.test_utils import unused_port

from kaizen_async import KaizenClient, KaizenError
from kaizen_async.errors import __doc__ as documented_tree
from kaizen_async.testing import KaizenEmulator, Life

PROJECT = Path(__file__).parents[2]
README = PROJECT / "README.md"
PYTEST = [
    *("-q", "-s", "--rootdir=.", "--import-mode=importlib", "-Werror", "-pno:cacheprovider", "-pno:faulthandler"),
    *("-p_kaizen_async_pytest_plugin", "-ppytest_asyncio.plugin", "-oasyncio_mode=auto"),
    "-oasyncio_default_fixture_loop_scope=function",
]
DOCUMENTS = [README, *sorted((PROJECT / "docs").glob("*.md"))]


class Block(NamedTuple):
    """A fenced block: its language, the comment above it, its text, and its place in the document."""

    language: str
    mark: str
    text: str
    place: str


def blocks(document: Path = README) -> list[Block]:
    """Return the blocks of a document."""
    text = document.read_text()
    name = document.relative_to(PROJECT)
    found = re.finditer(r"^(?:<!-- ([^\n]*) -->\n)?```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [
        Block(match[2], match[1] or "", match[3], f"{name}:{text.count(chr(10), 0, match.start(3)) + 1}")
        for match in found
    ]


EVERYWHERE = [block for document in DOCUMENTS for block in blocks(document)]


def those(chosen: list[Block]) -> pytest.MarkDecorator:
    """Parametrise a test by blocks."""
    return pytest.mark.parametrize("block", chosen, ids=[block.place for block in chosen])


def can_run(block: Block) -> bool:
    """Return whether the packages that a block needs are installed."""
    needed = re.findall(r"needs: ([\w.]+)", block.mark)
    return all(importlib.util.find_spec(name) is not None for name in needed)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return an empty folder to run in, with environment variables that point to an emulator."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KAIZEN_API_KEY", "key-of-the-readme")
    with KaizenEmulator(default_life=Life.ended()) as emulator:
        monkeypatch.setenv("KAIZEN_BASE_URL", emulator.base_url)
        yield tmp_path


def has_tests(block: Block) -> bool:
    """Return whether a Python block is for pytest."""
    functions = (
        node for node in ast.parse(block.text).body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return any(function.name.startswith("test_") for function in functions)


@pytest.mark.slow
@those([block for block in EVERYWHERE if block.language == "python"])
def test_a_python_block_runs(block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python block runs to its end without a warning."""
    compile(block.text, block.place, "exec")
    if not can_run(block):
        pytest.skip(f"without {block.mark.removeprefix('needs: ')} it is only compiled")
    script = folder / ("test_" + re.sub(r"\W", "_", block.place) + ".py")
    script.write_text(block.text)
    if has_tests(block):
        monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)  # they are for plugins
        assert pytest.main([*PYTEST, str(script)]) == pytest.ExitCode.OK
    else:
        runpy.run_path(str(script), run_name="__main__")


@pytest.mark.slow
@pytest.mark.timeout(90)
@those([block for block in EVERYWHERE if block.mark == "run"])
def test_a_marked_shell_block_runs(block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of a marked shell block succeeds."""
    (folder / "ids.txt").write_text("exec_1\nexec_2\n")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)  # the tests of the command measure it
    script = "set -euo pipefail\n" + re.sub(r"^\$ ", "", block.text, flags=re.MULTILINE)
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False)  # noqa: S603, S607 - our own
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_the_services_of_the_compose_file_work_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulator's command starts, its health check succeeds, and the app's environment leads a client to it."""
    files = {block.text.split()[1]: block.text for block in EVERYWHERE if block.text.startswith("# lives.yaml\n")}
    files |= {block.text.split()[1]: block.text for block in EVERYWHERE if block.text.startswith("# compose.yaml\n")}
    services = yaml.safe_load(files["compose.yaml"])["services"]
    emulator, app = services["kaizen"], services["app"]
    (folder / "lives.yaml").write_text(files["lives.yaml"])
    assert emulator["volumes"] == ["./lives.yaml:/lives.yaml:ro"]
    assert app["depends_on"] == {"kaizen": {"condition": "service_healthy"}}
    port = unused_port()
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    command = (
        shlex.split(emulator["command"])[2].rpartition("&& ")[2].replace(" /lives.yaml", f" lives.yaml --port {port}")
    )
    healthy = emulator["healthcheck"]["test"].replace("8080", str(port))
    served = subprocess.Popen(shlex.split(command), stdout=subprocess.PIPE)  # noqa: S603 - our own
    try:
        while subprocess.run(shlex.split(healthy), capture_output=True, check=False).returncode:  # noqa: S603 - our own
            assert served.poll() is None
        for name, value in app["environment"].items():
            monkeypatch.setenv(name, value.replace("kaizen:8080", f"127.0.0.1:{port}"))
        statuses = asyncio.run(looked_up("exec_1", "exec_2", "nobody"))
    finally:
        served.terminate()
        output, _ = served.communicate(timeout=20)
    assert statuses == {"exec_1": "Failed", "exec_2": "Paused", "nobody": "Enqueued"}
    assert served.returncode == 0
    assert b"503: 2" in output


async def looked_up(*ids: str) -> dict[str, str]:
    """Return the statuses of executions from a client that is configured by its environment."""
    async with KaizenClient() as kaizen:
        outcomes = await kaizen.instructor_executions.get_many(ids)
    return {outcome.id: outcome.unwrap().status.value for outcome in outcomes}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_no_block_is_overlooked(document: Path) -> None:
    """The parser finds every Python block of a document."""
    assert document.read_text().count("```python") == sum(block.language == "python" for block in blocks(document))


@pytest.mark.parametrize("mark", ["demo-command", "test-command"])
def test_the_commands_to_try_it_are_one_line_each(mark: str) -> None:
    """The README's commands to copy are one line each."""
    (block,) = (block for block in blocks() if block.mark == mark)
    assert block.language == "bash"
    assert len(block.text.splitlines()) == 1


def test_the_tree_of_errors_is_that_of_the_code() -> None:
    """The documented tree of errors has each class under its base class."""
    (drawn,) = (block.text for block in EVERYWHERE if block.text.startswith("KaizenError\n"))
    lines = [re.match(r"[│ ├└─]*\w+", line) for line in drawn.splitlines()]
    own = re.findall(r"^    ([│ ├└─]*\w+Error)\b", documented_tree or "", re.MULTILINE)
    assert [line[0] for line in lines if line] == own
    assert KaizenError.__name__ == own[0]


def test_every_setting_is_in_the_table() -> None:
    """The table of settings has one row for each argument of the client, in order."""
    import inspect

    from kaizen_async import KaizenClient

    rows = re.findall(r"^\| `(\w+)` \|", (PROJECT / "docs" / "settings.md").read_text(), re.MULTILINE)
    assert rows[: len(inspect.signature(KaizenClient).parameters)] == list(inspect.signature(KaizenClient).parameters)
