"""The first lookup of a new client: creating it, connecting, requesting, decoding."""

import server
from harness import BARE, OURS, PEERS, Plan, Report, rounds, title, versus
from table import Table
from worker import Job

ABOUT = "the first lookup of a fresh client"
_KEYS = {
    "first_ms": "first client, ms",
    "first_cpu_ms": "CPU ms",
    "second_ms": "second client, ms",
    "second_cpu_ms": "CPU ms ",
}
_OURS = "ours_get"


def run(plan: Plan) -> Report:
    """Measure the first client of a process and the second. The difference is the cost of late imports."""
    names = plan.chosen((*OURS, *BARE, *PEERS))
    with server.fast(plan.server) as running:
        jobs = [Job("first", name, running.base_url(1), 1, uvloop=plan.uvloop) for name in names]
        results = rounds(jobs, plan.choose(quick=3, default=7, full=15))
    table = Table(
        "From making a client to its first record",
        ["client", *_KEYS.values(), "vs. ours"],
        notes=[
            f"Server: {running.name}. Imports come before; the clock starts when the client is made. Medians.",
        ],
    )
    for name in names:
        figures = [results.figure(name, key) for key in _KEYS]
        ratio = versus(results.ratio(name, "first_ms", _OURS))
        table.rows.append([title(name), *(figure.show(1) if figure else "failed" for figure in figures), ratio])
    table.notes += results.notes()
    return Report([table], results.as_json())
