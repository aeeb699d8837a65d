"""1,000 lookups against a server that responds only with 503: the requests of each client."""

from typing import Any

from harness import RETRYING, Plan, Report, pairwise, progress, title
from table import Table
from worker import Job

ABOUT = "1,000 lookups against a server that always fails"
_LOOK_UPS = 1000
_IN_FLIGHT = 50
_PATIENCE = 65.0


def run(plan: Plan) -> Report:
    """Run each contender against a new server."""
    jobs = [
        Job("ends", name, "", _IN_FLIGHT, _LOOK_UPS, plan.uvloop, _IN_FLIGHT, patience=_PATIENCE)
        for name in plan.chosen((*RETRYING, "bare_tenacity"))
    ]
    progress("outage")
    measured = {job.contender: sample for job, sample in zip(jobs, pairwise(jobs, "failing"), strict=True)}
    progress("")
    table = Table(
        f"{_LOOK_UPS:,} lookups, {_IN_FLIGHT} in flight, the server always answering 503",
        ["client", "requests per lookup", "requests", "wall s", "ends"],
        [_row(name, sample) for name, sample in measured.items()],
        [f"Cut short after {_PATIENCE:.0f} s: `unfinished` lookups would go on, and those not begun do not count."],
    )
    return Report([table], measured)


def _row(name: str, sample: dict[str, Any]) -> list[str]:
    if "error" in sample:
        return [title(name), "failed", "-", "-", sample["error"]]
    ends = ", ".join(f"{count} {end}" for end, count in sorted(sample["ends"].items()))
    unfinished = sample["ends"].get("unfinished", 0)
    begun = _LOOK_UPS - unfinished + min(_IN_FLIGHT, unfinished)
    each = f"{sample['requests'] / begun:.2f}"
    return [title(name), each, f"{sample['requests']:,}", f"{sample['wall_s']:.1f}", ends]
