"""The command for all benchmarks: `python benchmarks/run.py [BENCH ...] [options]`, with Python 3.11 or newer and pip.

It creates a virtual environment in `.bench-venv` with the pinned packages of `requirements.txt` and this project, keeps
it for the next run, and runs `bench.py` in it.
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
    """Return a hash of everything that the environment depends on."""
    return hashlib.sha256(sys.version.encode() + REQUIREMENTS.read_bytes()).hexdigest()


def prepare() -> Path:
    """Create the environment unless it exists, and return its Python."""
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
    if sys.version_info < (3, 11):  # noqa: UP036 - any Python may run this file
        sys.exit("Python 3.11 or later is needed")
    python = prepare()
    os.execv(python, [str(python), str(HERE / "bench.py"), *sys.argv[1:]])


if __name__ == "__main__":
    main()
