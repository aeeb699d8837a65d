"""The cost of 50 concurrent hostile responses for the event loop, the CPU and the memory of a client."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from harness import Plan, Report, clean_environment, progress
from hostile_server import KINDS
from table import Table

ABOUT = "50 hostile responses at once: how long the loop stalls, processor time, memory"
_HERE: Final = Path(__file__).parents[1]
_WAYS: Final = {"own connection": [], "session.post": ["--post"]}
_LOOPS: Final = {"asyncio": [], "uvloop": ["--uvloop"]}


def run(plan: Plan) -> Report:
    """Measure each kind of response with each kind of connection."""
    rounds = plan.choose(quick=1, default=1, full=3)
    schemes = plan.choose(quick=["http"], default=["http", "https"], full=["http", "https"])
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        certificate = _certificate(Path(folder)) if "https" in schemes else None
        for scheme in schemes if certificate else ["http"]:
            with _serving(certificate if scheme == "https" else None) as port:
                for number, kind in enumerate([*KINDS, "mixed"]):
                    name = kind if kind == "mixed" else str(number)
                    for way, way_options in _WAYS.items():
                        for loop, loop_options in _LOOPS.items():
                            progress(f"hostile: {kind}, {scheme}, {way}, {loop}")
                            options = [*way_options, *loop_options]
                            if scheme == "https":
                                options += ["--ca-file", str(certificate)]
                            cell = f"{scheme}, {way}, {loop}"
                            measured = [_meet(f"{scheme}://localhost:{port}/{name}", options) for _ in range(rounds)]
                            figures.setdefault(kind, {})[cell] = measured
    progress("")
    tables = [
        _table("Longest stall of the event loop, ms", figures, "stall_ms"),
        _table("Longest stall of an idle process beside it, ms", figures, "idle_ms"),
        _table("Most processor time between two beats of the event loop, ms", figures, "busy_ms"),
        _table("Processor time, ms", figures, "cpu_ms"),
        _table("Memory at the peak, MB", figures, "memory_mb"),
    ]
    return Report(tables, figures)


def _meet(base_url: str, options: list[str]) -> dict[str, Any]:
    command = [sys.executable, str(_HERE / "hostile_client.py"), base_url, *options]
    control = [sys.executable, str(_HERE / "idle_beat.py")]
    environment = clean_environment()
    with subprocess.Popen(
        control, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=_HERE
    ) as idle:
        ran = subprocess.run(
            command, capture_output=True, text=True, timeout=60, env=environment, cwd=_HERE, check=False
        )
        idle_ms, _ = idle.communicate()
    if ran.returncode:
        return {"error": (ran.stderr.strip().splitlines() or ["no output"])[-1]}
    measured: dict[str, Any] = json.loads(ran.stdout)
    return {**measured, "idle_ms": float(idle_ms)}


@contextmanager
def _serving(certificate: Path | None) -> Iterator[int]:
    command = [sys.executable, str(_HERE / "hostile_server.py"), *(["--tls", str(certificate)] if certificate else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=clean_environment(), cwd=_HERE) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.terminate()


def _certificate(folder: Path) -> Path | None:
    """Return a file with a certificate for localhost and its key, or None without openssl."""
    openssl = shutil.which("openssl")
    if openssl is None:
        return None
    file, key = folder / "both.pem", folder / "key.pem"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "1"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(file)], check=True, capture_output=True)
    file.write_text(file.read_text() + key.read_text())
    return file


def _table(title: str, figures: dict[str, dict[str, Any]], key: str) -> Table:
    cells = list(next(iter(figures.values())))
    table = Table(title, ["response", *cells])
    for kind, measured in figures.items():
        shown = []
        for cell in cells:
            found = [sample[key] for sample in measured.get(cell, []) if key in sample]
            shown.append(f"{max(found):,.0f}" if found else "failed")
        table.rows.append([kind, *shown])
    return table
