"""`get_many` of 5,000 ids beside the hand-written bare loop, with the same server process in the same run."""

import server
from harness import REFERENCE, Figure, Plan, Report, Results, rounds, title
from table import Table
from worker import Job

ABOUT = "get_many beside the bare aiohttp + msgspec loop, as a ratio"
_BARE = "bare"
_KEYS = {"cpu_us": "CPU µs per lookup", "wall_us": "wall µs per lookup"}


def run(plan: Plan) -> Report:
    """Measure the two in turn."""
    look_ups = 5000
    with server.fast(plan.server) as running:
        jobs = [Job("speed", name, running.base_url(1), 50, look_ups, plan.uvloop) for name in (REFERENCE, _BARE)]
        results = rounds(jobs, plan.choose(quick=3, default=7, full=15))
    table = Table(
        f"{look_ups:,} ids, 50 in flight, 1 KB records",
        ["", *_KEYS.values()],
        notes=[
            f"Server: {running.name}. Median (lowest-highest round); the ratio is the median of the rounds' ratios."
        ],
    )
    for name in (REFERENCE, _BARE):
        figures = [results.figure(name, key) for key in _KEYS]
        table.rows.append([title(name), *(figure.show(spread=True) if figure else "failed" for figure in figures)])
    ratios = {key: _ratio(results, key) for key in _KEYS}
    table.rows.append(["ratio", *(ratio.show(2, spread=True) if ratio else "-" for ratio in ratios.values())])
    table.notes += results.notes()
    medians = {key: ratio.median if ratio else None for key, ratio in ratios.items()}
    return Report([table], {"ratio": medians, **results.as_json()})


def _ratio(results: Results, key: str) -> Figure | None:
    ours, bare = results.samples.get(REFERENCE), results.samples.get(_BARE)
    if not ours or not bare or results.failures:
        return None
    return Figure.of([mine[key] / theirs[key] for mine, theirs in zip(ours, bare, strict=True)])
