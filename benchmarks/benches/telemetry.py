"""What OpenTelemetry adds to a lookup: `get_many` of 5,000 ids with and without it, against the same server."""

import server
from harness import REFERENCE, Figure, Plan, Report, rounds, title
from table import Table
from worker import Job

ABOUT = "what metrics and spans of OpenTelemetry add to each lookup"
_NAMES = ("ours_metrics", "ours_unsampled", "ours_traced")


def run(plan: Plan) -> Report:
    """Measure them in turn."""
    look_ups = 5000
    with server.fast(plan.server) as running:
        jobs = [Job("speed", name, running.base_url(1), 50, look_ups, plan.uvloop) for name in (REFERENCE, *_NAMES)]
        results = rounds(jobs, plan.choose(quick=3, default=9, full=15))
    table = Table(
        f"{look_ups:,} ids, 50 in flight, 1 KB records",
        ["", "CPU µs per lookup", "CPU µs more than without"],
        notes=[f"Server: {running.name}. Medians (lowest-highest round); what is added is that of each round."],
    )
    without = results.samples.get(REFERENCE, [])
    added: dict[str, float] = {}
    for name in (REFERENCE, *_NAMES):
        figure = results.figure(name, "cpu_us")
        samples = results.samples.get(name, [])
        more = None
        if name != REFERENCE and len(samples) == len(without) and samples:
            more = Figure.of([mine["cpu_us"] - plain["cpu_us"] for mine, plain in zip(samples, without, strict=True)])
            added[name] = more.median
        table.rows.append(
            [
                title(name),
                figure.show(spread=True) if figure else "failed",
                more.show(spread=True) if more else "-",
            ]
        )
    table.notes += results.notes()
    return Report([table], {"added": added, **results.as_json()})
