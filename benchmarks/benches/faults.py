"""Servers that restart, fail partly, or reject: the lost lookups and the requests of each client."""

from typing import Any

from answering import FAULTS
from harness import RETRYING, Plan, Report, pairwise, progress, title
from table import Table
from worker import Job

ABOUT = "restart, outage, partial, limit503, random429, concurrency-limit, limit1000: what is lost, and the load"
_IN_FLIGHT = 50
_PATIENCE = 30.0
_CONTENDERS = (*RETRYING, "bare_tenacity")
_LOOK_UPS = {
    "restart": 6000,
    "outage": 6000,
    "partial": 3000,
    "limit503": 300,
    "random429": 5000,
    "concurrency-limit": 600,
    "limit1000": 4000,
}


def run(plan: Plan) -> Report:
    """Run each contender against a new server of each kind."""
    chosen = plan.choose(quick=["restart", "limit503"], default=list(_LOOK_UPS), full=list(_LOOK_UPS))
    measured = {fault: _measure(fault, plan) for fault in chosen}
    return Report([_table(fault, samples) for fault, samples in measured.items()], measured)


def _measure(fault: str, plan: Plan) -> dict[str, dict[str, Any]]:
    jobs = [
        Job("ends", name, "", _IN_FLIGHT, _LOOK_UPS[fault], plan.uvloop, _IN_FLIGHT, patience=_PATIENCE)
        for name in plan.chosen(_CONTENDERS)
    ]
    progress(fault)
    samples = pairwise(jobs, fault)
    progress("")
    return {job.contender: sample for job, sample in zip(jobs, samples, strict=True)}


def _table(fault: str, samples: dict[str, dict[str, Any]]) -> Table:
    return Table(
        f"{fault}: {_LOOK_UPS[fault]:,} lookups, {_IN_FLIGHT} in flight",
        ["client", "lost", "wall s", "requests per lookup", "other ends"],
        [_row(fault, name, sample) for name, sample in samples.items()],
        [FAULTS[fault], f"Cut short after {_PATIENCE:.0f} s: the rest counts as `unfinished`."],
    )


def _row(fault: str, name: str, sample: dict[str, Any]) -> list[str]:
    if "error" in sample:
        return [title(name), "failed", "-", "-", sample["error"]]
    ends = dict(sample["ends"])
    lost = _LOOK_UPS[fault] - ends.pop("ok", 0)
    others = ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))
    each = f"{sample['requests'] / _LOOK_UPS[fault]:.2f}"
    return [title(name), f"{lost:,}", f"{sample['wall_s']:.1f}", each, others]
