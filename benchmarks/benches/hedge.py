"""The slowest responses, when 3 % of the responses take 20 times as long as the others."""

import server
from answering import SLOW_FACTOR, SLOW_SHARE, TAIL_SECONDS
from harness import Figure, Plan, Report, Results, progress, run_into, title
from table import Table
from worker import Job

ABOUT = "p99 with 3 % of the responses 20 times slower, hedged and not"
_NAMES = ("ours_hedged", "ours_get_many", "hedge_python", "hedge_python_tuned", "bare_workers")
_IN_FLIGHT = 20


def run(plan: Plan) -> Report:
    """Run the contenders in turn, each against a new server."""
    look_ups = plan.choose(quick=2000, default=5000, full=20_000)
    results = Results()
    names = plan.chosen(_NAMES)
    for turn in range(plan.choose(quick=1, default=3, full=5)):
        for name in names:
            progress(f"hedge: round {turn + 1}, {name}")
            with server.answering("tail") as running:
                job = Job("tail", name, running.base_url(1), _IN_FLIGHT, look_ups, plan.uvloop)
                run_into(results, job)
                if samples := results.samples.get(name):
                    samples[-1].setdefault("requests", running.counters()["requests"] / samples[-1]["asked"])
    progress("")
    table = Table(
        f"{look_ups:,} lookups, {_IN_FLIGHT} in flight; responses take {TAIL_SECONDS * 1000:.0f} ms, "
        f"{SLOW_SHARE:.0%} of them {SLOW_FACTOR} times as long",
        ["client", "p99 / p50", "p50 ms", "p99 ms", "p99.9 ms", "requests per lookup", "CPU us"],
        [_row(results, name) for name in names],
        ["Target for the hedged client: p99 at most 4 times the median (aim 2), for 1.05 requests per lookup."],
    )
    table.notes += results.notes()
    return Report([table], results.as_json())


def _row(results: Results, name: str) -> list[str]:
    figures: list[Figure | None] = [
        results.figure(name, key) for key in ("p99_p50", "p50_ms", "p99_ms", "p999_ms", "requests", "cpu_us")
    ]
    digits = (1, 1, 1, 1, 3, 0)
    return [title(name), *(f.show(d) if f else "failed" for f, d in zip(figures, digits, strict=True))]
