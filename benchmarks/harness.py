"""Runs contenders in their own processes, in turn, and computes medians of their measurements."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import server
from table import Table
from worker import Job, load

WORKER = Path(__file__).parent / "worker.py"
REFERENCE = "ours_get_many"
BEFORE = "before_get_many"
BEFORE_FOLDER = "KAIZEN_BEFORE"
"""The environment variable with the source folder of an earlier version, which then takes part in `peers`."""
OURS = ("ours_get_many", "ours_stream", "ours_get")
BARE = ("raw_sockets", "bare", "bare_workers")
PEERS = (
    "ry",
    "wreq",
    "pyreqwest",
    "pycurl_multi",
    "apify",
    "apify_bytes",
    "zyte",
    "openai_default",
    "openai_aiohttp",
    "browserbase_sdk",
    "httpx_pydantic",
)
RETRYING = ("ours_get_many", "ours_get", "zyte", "apify", "openai_default", "openai_aiohttp", "browserbase_sdk")
"""The clients that retry by themselves."""


@dataclass(frozen=True)
class Plan:
    """The amount of work, as chosen on the command line."""

    effort: str = "default"
    uvloop: bool = False
    server: str = "auto"
    only: frozenset[str] = frozenset()

    def choose(self, *, quick: Any, default: Any, full: Any) -> Any:
        """Return the value for the chosen effort."""
        return {"quick": quick, "default": default, "full": full}[self.effort]

    def chosen(self, names: Iterable[str]) -> list[str]:
        """Return the contenders that take part."""
        return [name for name in names if not self.only or name in self.only]


@dataclass(frozen=True)
class Figure:
    """A measured value: the median of the rounds, with the lowest and the highest value."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure":
        """Return the figure of some rounds."""
        return cls(statistics.median(values), min(values), max(values), len(values))

    def show(self, digits: int = 0, *, spread: bool = False) -> str:
        """Return the median as text, optionally with its range."""
        text = f"{self.median:,.{digits}f}"
        return f"{text} ({self.low:,.{digits}f}-{self.high:,.{digits}f})" if spread else text


@dataclass
class Results:
    """The measurements of each contender by round, and its failures. One good round is enough for a figure."""

    samples: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    failures: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def figure(self, name: str, key: str) -> Figure | None:
        """Return a contender's figure, or None if it failed."""
        samples = self.samples.get(name)
        return Figure.of([sample[key] for sample in samples]) if samples else None

    def ratio(self, name: str, key: str, reference: str = REFERENCE) -> float | None:
        """Return the ratio of a contender's figure to the reference's."""
        figure, base = self.figure(name, key), self.figure(reference, key)
        return figure.median / base.median if figure and base and base.median else None

    def as_json(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        return {"samples": dict(self.samples), "failures": dict(self.failures)}

    def notes(self) -> list[str]:
        """Return a line for each contender that failed in some round."""
        return [f"Failed rounds of {title(name)}: {len(said)} ({said[0]})." for name, said in self.failures.items()]


@dataclass
class Report:
    """The result of a bench: tables to print, and figures for JSON."""

    tables: list[Table]
    figures: dict[str, Any]


def clean_environment() -> dict[str, str]:
    """Return the environment with .pyc files and without proxies, which some clients use even for loopback."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.lower().endswith("_proxy") and name != "PYTHONDONTWRITEBYTECODE"
    }


def rounds(jobs: Sequence[Job], count: int) -> Results:
    """Run all jobs in turn, several times, so that a temporary disturbance affects all contenders alike."""
    results = Results()
    for turn in range(count):
        for job in jobs:
            if job.contender in results.failures and job.contender not in results.samples:
                continue
            progress(f"round {turn + 1}/{count}: {job.task}, {job.contender}")
            run_into(results, job)
    progress("")
    return results


def pairwise(jobs: Sequence[Job], mode: str) -> list[dict[str, Any]]:
    """Run jobs that mostly wait, two at a time, each against its own `answering.py` server."""

    def meet(job: Job) -> dict[str, Any]:
        with server.answering(mode) as running:
            try:
                measured = run(dataclasses.replace(job, base_url=running.base_url(1)))
            except WorkerFailedError as error:
                return {"error": str(error)}
            return {**measured, **running.counters()}

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(meet, jobs))


def run_into(results: Results, job: Job) -> None:
    """Run one job, and record its measurements or its failure."""
    try:
        results.samples[job.contender].append(run(job))
    except WorkerFailedError as error:
        results.failures[job.contender].append(str(error))


class WorkerFailedError(Exception):
    """Raised when a worker fails, with the last line of its output."""


def run(job: Job) -> dict[str, Any]:
    """Run one job in its own process."""
    command = [sys.executable, str(WORKER), json.dumps(dataclasses.asdict(job))]
    environment = clean_environment()
    if job.contender == BEFORE:
        environment["PYTHONPATH"] = environment[BEFORE_FOLDER]
    if job.authority is not None:
        environment["SSL_CERT_FILE"] = job.authority
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=1800)
    if done.returncode:
        raise WorkerFailedError((done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1][:200])
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def progress(text: str) -> None:
    """Show the current step on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def title(name: str) -> str:
    """Return a contender's title, or its name if it cannot be loaded."""
    try:
        return load(name).title
    except ImportError:
        return name


def versus(ratio: float | None) -> str:
    """Return a ratio as text."""
    return "-" if ratio is None else f"{ratio:.2f} x"
