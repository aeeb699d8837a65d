"""The delay of another task in the same event loop while lookups run."""

import server
from harness import BARE, OURS, Plan, Report, rounds, title, versus
from table import Table
from worker import Job

ABOUT = "delay of a heartbeat in the same event loop"
_KEYS = {"p50_ms": "p50 ms late", "p99_ms": "p99 ms late", "max_ms": "worst ms"}


def run(plan: Plan) -> Report:
    """Let a task wake every millisecond while each contender works."""
    names = plan.chosen((*OURS, *BARE))
    look_ups = plan.choose(quick=5000, default=10_000, full=10_000)
    with server.fast(plan.server) as running:
        jobs = [Job("lag", name, running.base_url(1), 50, look_ups, plan.uvloop) for name in names]
        results = rounds(jobs, plan.choose(quick=2, default=5, full=9))
    table = Table(
        f"A heartbeat of 1 ms beside {look_ups:,} lookups, 50 in flight",
        ["client", *_KEYS.values(), "p99 vs. bare"],
        notes=[f"Server: {running.name}. Medians of the rounds."],
    )
    for name in names:
        figures = [results.figure(name, key) for key in _KEYS]
        ratio = versus(results.ratio(name, "p99_ms", "bare"))
        table.rows.append([title(name), *(figure.show(2) if figure else "failed" for figure in figures), ratio])
    table.notes += results.notes()
    return Report([table], results.as_json())
