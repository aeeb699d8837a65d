"""500 concurrent lookups against a throttling server: results, durations and requests of each client."""

from typing import Any

from answering import BUCKET_BURST, BUCKET_RATE
from harness import RETRYING, Plan, Report, pairwise, progress, title
from table import Table
from worker import Job

ABOUT = "500 lookups against a server that throttles"
_LOOK_UPS = 500
_FLOOR_SECONDS = (_LOOK_UPS - BUCKET_BURST) / BUCKET_RATE
_CALLERS = {"50 in flight": 50, "all of them at once": None}

Sample = dict[str, Any]


def run(plan: Plan) -> Report:
    """Run each contender against a new server, with 50 lookups in flight and with all 500 at once."""
    measured = {
        caller: _measure(caller, plan)
        for caller in plan.choose(quick=["50 in flight"], default=["50 in flight"], full=list(_CALLERS))
    }
    return Report([_table(caller, samples) for caller, samples in measured.items()], measured)


def _measure(caller: str, plan: Plan) -> list[Sample]:
    in_flight = _CALLERS[caller]
    jobs = [
        Job("ends", name, "", 50, _LOOK_UPS, plan.uvloop, in_flight, patience=120.0)
        for name in plan.chosen((*RETRYING, "bare_tenacity"))
        for _ in range(plan.choose(quick=1, default=1, full=3))
    ]
    progress(f"storm, the caller having {caller}")
    samples = pairwise(jobs, "throttling")
    progress("")
    return [{"contender": job.contender, **sample} for job, sample in zip(jobs, samples, strict=True)]


def _table(caller: str, samples: list[Sample]) -> Table:
    return Table(
        f"A storm of {_LOOK_UPS} lookups, the caller having {caller}",
        ["client", "ok", "wall s", "vs. the floor", "requests", "other ends"],
        [_row(sample) for sample in samples],
        [
            f"The server lets {BUCKET_RATE:.0f} requests a second pass, {BUCKET_BURST} of them at once.",
            "Others get 429 with `Retry-After: 1`. Every answer takes 5 ms.",
            f"The floor is {_FLOOR_SECONDS:.1f} s and {_LOOK_UPS} requests.",
            "kaizen_async and zyte-api have at most 50 in flight by their own limit, whatever the caller does.",
        ],
    )


def _row(sample: Sample) -> list[str]:
    name = title(sample["contender"])
    if "error" in sample:
        return [name, "failed", "-", "-", "-", sample["error"]]
    ends = dict(sample["ends"])
    ok, wall = ends.pop("ok", 0), sample["wall_s"]
    others = ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))
    return [name, str(ok), f"{wall:.1f}", f"{wall / _FLOOR_SECONDS:.2f} x", f"{sample['requests']:,}", others]
