"""The one command: `python benchmarks/run.py [BENCH ...] [options]`, with any Python from 3.11 that has pip.

Makes a virtual environment in `.bench-venv` with the pinned packages of `requirements.txt` and this project, keeps it
for the next time, and runs `bench.py` in it.
"""

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
ENVIRONMENT = PROJECT / ".bench-venv"
REQUIREMENTS = HERE / "requirements.txt"
STAMP = ENVIRONMENT / "made-from.txt"


def fingerprint() -> str:
    """Return what the environment depends on, in short."""
    return hashlib.sha256(sys.version.encode() + REQUIREMENTS.read_bytes()).hexdigest()


def prepare() -> Path:
    """Make the environment unless it is there already, and return its Python."""
    python = ENVIRONMENT / "bin" / "python"
    if STAMP.exists() and STAMP.read_text() == fingerprint():
        return python
    print(f"Setting up {ENVIRONMENT.name} with the pinned packages (once) ...", file=sys.stderr, flush=True)
    venv.create(ENVIRONMENT, clear=True, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--requirement", str(REQUIREMENTS)], check=True)
    subprocess.run([*pip, "--no-deps", "--editable", str(PROJECT)], check=True)
    STAMP.write_text(fingerprint())
    return python


def main() -> None:
    """Run the benchmarks in their environment."""
    if sys.version_info < (3, 11):  # noqa: UP036 - what runs this may be any Python
        sys.exit("Python 3.11 or later is needed")
    python = prepare()
    os.execv(python, [str(python), str(HERE / "bench.py"), *sys.argv[1:]])


if __name__ == "__main__":
    main()
