"""Waits for very many executions: memory per id, the delay of the event loop, and shared polls."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import server
from harness import Plan, Report, clean_environment, progress
from table import Table
from waiting import CONCURRENCY, Job

ABOUT = "200,000 ids in one wait, 1,000,000 with --full: memory, tasks and delay of the loop; many callers on few ids"
_PROCESS = Path(__file__).parent.parent / "waiting.py"
_LIFE_SECONDS = 5.0

Sample = dict[str, Any]


def run(plan: Plan) -> Report:
    """Wait for executions that do not end, then let many callers wait for few that do."""
    count = plan.choose(quick=10_000, default=200_000, full=1_000_000)
    seconds = plan.choose(quick=5.0, default=15.0, full=60.0)
    with server.answering("living") as running:
        job = Job("", running.base_url(1), count, seconds=seconds, uvloop=plan.uvloop)
        beside = {task: _measure(job, task=task) for task in ("idle", "looking_up", "waiting")}
        memory = _measure(job, task="memory")
        shared = {
            callers: _measure(job, task="sharing", ids=100, callers=callers, seconds=_LIFE_SECONDS)
            for callers in (100, 1000)
        }
    resident = beside["waiting"]["resident"]
    tables = [_loop_table(count, beside), _memory_table(count, memory, resident), _sharing_table(shared)]
    return Report(tables, {"ids": count, "beside": beside, "memory": memory, "shared": shared})


def _measure(job: Job, **changes: Any) -> Sample:
    job = dataclasses.replace(job, **changes)
    progress(f"waiting: {job.task}")
    command = [sys.executable, str(_PROCESS), json.dumps(dataclasses.asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), check=False, timeout=1800)
    progress("")
    if done.returncode:
        sys.exit(f"{job.task} failed:\n{done.stderr}")
    measured: Sample = json.loads(done.stdout.splitlines()[-1])
    return measured


def _loop_table(count: int, beside: dict[str, Sample]) -> Table:
    waiting = beside["waiting"]
    labels = {
        "idle": "nothing",
        "looking_up": f"stream, {CONCURRENCY} in flight",
        "waiting": f"wait_many of {count:,} ids, always overdue",
    }
    return Table(
        "A heartbeat of 1 ms beside full pace",
        ["beside", "p50 ms late", "p99 ms late", "worst ms", "requests a second"],
        [
            [label, *(f"{beside[task][key]:.2f}" for key in ("p50_ms", "p99_ms", "max_ms")), _rate(beside[task])]
            for task, label in labels.items()
        ],
        [
            f"Tasks in the waiting process: {waiting['tasks']}, of which {CONCURRENCY} make the polls.",
            f"Processor time of a poll: {waiting['cpu_us']:.0f} µs.",
            f"Polls came {waiting['poll_delay']:.1f} s late, as `stats()` says.",
            f"All ids were taken in after {waiting['taken_in_s']:.1f} s; leaving took {waiting['left_s']:.2f} s.",
        ],
    )


def _memory_table(count: int, memory: Sample, resident: float) -> Table:
    return Table(
        f"Bytes held for each of {count:,} ids that are waited for",
        ["what", "bytes per id"],
        [
            ["in all, by tracemalloc", f"{memory['held']:,.0f}"],
            ["of that, its last record (1 KB of JSON)", f"{memory['records']:,.0f}"],
            ["the wait", f"{memory['held'] - memory['records']:,.0f}"],
            ["in all, growth of the process that polls them", f"{resident:,.0f}"],
        ],
        ["The ids themselves belong to the caller and are not counted, nor are they in the growth."],
    )


def _sharing_table(shared: dict[int, Sample]) -> Table:
    return Table(
        f"Callers of wait in one loop on 100 ids that live {_LIFE_SECONDS:.0f} s",
        ["callers", "polls", "requests", "wall s", "processor s"],
        [
            [f"{callers:,}", *(f"{sample[key]:,}" for key in ("polls", "requests")), *_times(sample)]
            for callers, sample in shared.items()
        ],
    )


def _times(sample: Sample) -> list[str]:
    return [f"{sample['wall_s']:.1f}", f"{sample['cpu_s']:.2f}"]


def _rate(sample: Sample) -> str:
    return f"{sample['per_second']:,.0f}" if "per_second" in sample else "-"
