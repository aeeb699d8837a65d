"""Both packages can be built, hold the right files, and work in an empty environment."""

import email
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import kaizen_async

ROOT = Path(__file__).parents[2]
BESIDE = {"_kaizen_async_command.py", "_kaizen_async_pytest_plugin.py"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


def run(*command: str | Path, folder: Path) -> str:
    """Run a command in a folder and return its output."""
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100, check=False)  # noqa: S603 - our own
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the source package, built from the working copy."""
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, folder=ROOT)
    (built,) = folder.glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel, built from the source package alone."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, folder=source)
    (built,) = folder.glob("*.whl")
    return built


def modules() -> set[str]:
    """Return the paths of the files that both packages should hold."""
    files = (path.relative_to(ROOT) for path in (ROOT / "kaizen_async").rglob("*") if path.is_file())
    return {path.as_posix() for path in files if "__pycache__" not in path.parts} | BESIDE


def test_the_source_package_is_complete(sdist: Path) -> None:
    """The source package holds the package, examples, tests with samples, licence and texts, and nothing else."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= modules() | {"LICENSE", "README.md", "pyproject.toml", "tests/conftest.py"}
    assert {"tests/samples/documented.json", "examples/taskiq_workers/tasks.py"} <= names
    tops = {name.partition("/")[0] for name in names}
    assert tops <= {
        *("kaizen_async", *BESIDE, "docs", "examples", "tests"),
        *("README.md", "CHANGELOG.md", "SECURITY.md", "LICENSE", "pyproject.toml", "PKG-INFO", ".gitignore"),
    }


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    """The wheel holds the package with its type marker and the licence, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"kaizen_async-{kaizen_async.__version__}.dist-info"
    assert {name for name in names if not name.startswith(info)} == modules()
    assert f"{info}/licenses/LICENSE" in names


def test_the_metadata_of_the_wheel(wheel: Path) -> None:
    """The wheel's metadata has the project's version, Python version, licence, dependencies and extras."""
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = email.message_from_bytes(archive.read(path))
    assert metadata["Name"] == "kaizen-async"
    assert metadata["Version"] == kaizen_async.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "MIT"
    assert set(metadata.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    required = {text.split(";")[0].strip() for text in metadata.get_all("Requires-Dist", []) if "extra ==" not in text}
    assert {name for text in required for name in re.findall(r"^[\w-]+", text)} == {"aiohttp", "msgspec", "tenacity"}
    assert all(">=" in text for text in required), "every dependency has a lower bound"


def test_the_description_on_pypi_links_only_to_what_exists_there(wheel: Path) -> None:
    """The description on PyPI has only absolute links, because relative links of the README are broken there."""
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        description = email.message_from_bytes(archive.read(path)).get_payload()
    targets = re.findall(r"\]\(([^)]*)\)", description)
    assert targets
    assert all(target.startswith("https://") for target in targets), targets
    assert "# kaizen_async" in description
    assert "README" not in description


def test_the_version_stands_in_one_place() -> None:
    """The version is written in one file, and all others read it from there."""
    assert PROJECT["dynamic"] == ["version", "readme"]
    holders = [
        path.relative_to(ROOT).as_posix()
        for path in [*(ROOT / "kaizen_async").rglob("*.py"), ROOT / "pyproject.toml"]
        if f'"{kaizen_async.__version__}"' in path.read_text()
    ]
    assert holders == ["kaizen_async/config.py"]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder into which pip has installed the wheel."""
    folder = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile")
    run(*pip, "--target", folder, wheel, folder=folder)
    return folder


def test_the_installed_wheel_is_imported_and_knows_its_version(installed: Path) -> None:
    """Python imports the installed wheel, not the working copy, and it has the right version."""
    script = f"""
import sys
sys.path.insert(0, {str(installed)!r})
import kaizen_async, kaizen_async.testing
from importlib.metadata import distribution
print(kaizen_async.__file__)
print(kaizen_async.__version__)
"""
    where, version = run(sys.executable, "-I", "-c", script, folder=installed).splitlines()
    assert where == str(installed / "kaizen_async" / "__init__.py")
    assert version == kaizen_async.__version__


def test_the_installed_wheel_brings_the_command_and_the_plugin(installed: Path) -> None:
    """The installed wheel has the entry points of the command and of the pytest plugin."""
    (entry_points,) = installed.glob("*.dist-info/entry_points.txt")
    text = entry_points.read_text()
    assert "kaizen-async = _kaizen_async_command:main" in text
    assert "[pytest11]" in text
    assert (installed / "bin" / "kaizen-async").exists()
