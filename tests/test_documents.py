"""README and docs/ do what they say: every Python block runs, and so does every shell block marked `<!-- run -->`.

A block of tests (with a function `test_…`) is run by pytest, any other as a script of its own in an empty folder. All
meet an emulator in which every execution exists, unless they bring their own. A block that needs what the test extra
does not bring is marked `<!-- needs: NAME -->` in the line above it: without NAME installed it is only compiled.
"""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from kaizen_async import KaizenError
from kaizen_async.errors import __doc__ as documented_tree
from kaizen_async.testing import KaizenEmulator, Life

PROJECT = Path(__file__).parent.parent
README = PROJECT / "README.md"
LOOPS = ["-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=function"]
DOCUMENTS = [README, *sorted((PROJECT / "docs").glob("*.md"))]


class Block(NamedTuple):
    """A fenced block: its language, what the comment above it says, its text, and where it begins."""

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
    """Return whether what a block says that it needs is there."""
    needed = re.findall(r"needs: ([\w.]+)", block.mark)
    return all(importlib.util.find_spec(name) is not None for name in needed)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return variables with a key that fits, and the commands of this Python first on the path."""
    monkeypatch.setenv("KAIZEN_API_KEY", "key-of-the-readme")
    commands = Path(sys.executable).parent
    return {**os.environ, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "PYTHONWARNINGS": "error"}


def run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    """Run a command to its end, which must be a good one, and return what it printed."""
    ran = subprocess.run(  # noqa: S603 - the README is ours
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def command_for(block: Block, folder: Path) -> list[str]:
    """Write a Python block into a folder; return the command that runs it."""
    is_test = any(
        isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
        for node in ast.parse(block.text).body
    )
    script = folder / "test_block.py"
    script.write_text(block.text)
    if is_test:
        return [sys.executable, "-m", "pytest", "-q", *LOOPS, str(script)]
    return [sys.executable, str(script)]


@pytest.mark.slow
@pytest.mark.timeout(90)
@those([block for block in EVERYWHERE if block.language == "python"])
def test_a_python_block_runs(block: Block, environment: dict[str, str], tmp_path: Path) -> None:
    """To its end, without a warning."""
    compile(block.text, block.place, "exec")
    if not can_run(block):
        pytest.skip(f"without {block.mark.removeprefix('needs: ')} it is only compiled")
    command = command_for(block, tmp_path)
    with KaizenEmulator(default_life=Life.ended()) as emulator:
        run(command, tmp_path, {**environment, "KAIZEN_BASE_URL": emulator.base_url})


@pytest.mark.slow
@pytest.mark.timeout(90)
@those([block for block in EVERYWHERE if block.mark == "run"])
def test_a_marked_shell_block_runs(block: Block, environment: dict[str, str], tmp_path: Path) -> None:
    """Each of its commands ends well."""
    (tmp_path / "ids.txt").write_text("exec_1\nexec_2\n")
    with KaizenEmulator(default_life=Life.ended()) as emulator:
        script = "set -euo pipefail\n" + re.sub(r"^\$ ", "", block.text, flags=re.MULTILINE)
        run(["bash", "-c", script], tmp_path, {**environment, "KAIZEN_BASE_URL": emulator.base_url})


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_no_block_is_overlooked(document: Path) -> None:
    """A document whose fences are written some other way does not pass for one without errors."""
    assert document.read_text().count("```python") == sum(block.language == "python" for block in blocks(document))


@pytest.mark.parametrize("mark", ["demo-command", "test-command"])
def test_the_commands_to_try_it_are_one_line_each(mark: str) -> None:
    """They are for copying; the gate runs them as they stand."""
    (block,) = (block for block in blocks() if block.mark == mark)
    assert block.language == "bash"
    assert len(block.text.splitlines()) == 1


def test_the_tree_of_errors_is_that_of_the_code() -> None:
    """Each class under its base, none missing."""
    (drawn,) = (block.text for block in EVERYWHERE if block.text.startswith("KaizenError\n"))
    lines = [re.match(r"[│ ├└─]*\w+", line) for line in drawn.splitlines()]
    own = re.findall(r"^    ([│ ├└─]*\w+Error)\b", documented_tree or "", re.MULTILINE)
    assert [line[0] for line in lines if line] == own
    assert KaizenError.__name__ == own[0]


def test_every_setting_is_in_the_table() -> None:
    """With a row of its own for each argument of the client."""
    import inspect

    from kaizen_async import KaizenClient

    rows = re.findall(r"^\| `(\w+)` \|", (PROJECT / "docs" / "settings.md").read_text(), re.MULTILINE)
    assert rows[: len(inspect.signature(KaizenClient).parameters)] == list(inspect.signature(KaizenClient).parameters)
