"""The cost contract: the cost of one lookup beside the bare loop, in ratios and counts instead of seconds."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import server
from harness import REFERENCE, Figure, Plan, Report, Results, progress, rounds, title, versus
from harness import run as run_job
from table import Table
from worker import Job

ABOUT = "the cost contract: ratios and counts per lookup"
_BARE, _FLOOR, _RECORDS = "bare", "raw_sockets", "records_alone"
_LOOK_UPS = 5000
_PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
_PLACE = re.compile(r"(<!-- cost contract -->\n).*?(\n<!-- end -->)", re.DOTALL)
"""Where the page shows the table."""


def run(plan: Plan) -> Report:
    """Measure processor time in turn, and count requests, bytes and memory."""
    names = (REFERENCE, _BARE, _FLOOR)
    with server.fast(plan.server) as running:
        url = running.base_url(1)
        jobs = [Job("speed", name, url, 50, _LOOK_UPS, plan.uvloop) for name in names]
        speed = rounds(jobs, plan.choose(quick=3, default=5, full=11))
        progress("contract: memory")
        held = {name: run_job(Job("memory", name, url, 50, 10_000, traced=True)) for name in (REFERENCE, _RECORDS)}
    counted = {name: _count(name, plan) for name in names}
    progress("")
    beyond = held[REFERENCE]["held_bytes"] - held[_RECORDS]["held_bytes"]
    figures = {"speed": speed.as_json(), "counted": counted, "bytes_beyond_the_record": beyond}
    table = _table(speed, counted, beyond, running.name)
    if plan.effort != "quick":
        _PAGE.write_text(_PLACE.sub(lambda place: place[1] + table.grid() + place[2], _PAGE.read_text()))
    return Report([table], figures)


def _count(name: str, plan: Plan) -> dict[str, Any]:
    progress(f"contract: requests, {name}")
    with server.answering("fast") as running:
        run_job(Job("ends", name, running.base_url(1), 50, _LOOK_UPS, plan.uvloop, 50))
        return running.counters()


def _table(speed: Results, counted: dict[str, dict[str, Any]], beyond: float, server_name: str) -> Table:
    def row(label: str, value: Callable[[str], str]) -> list[str]:
        return [label, *(value(name) for name in (REFERENCE, _BARE, _FLOOR))]

    def ratio(name: str) -> str:
        return versus(speed.ratio(name, "cpu_us", _BARE))

    return Table(
        "What a lookup costs",
        ["each lookup", *(title(name) for name in (REFERENCE, _BARE, _FLOOR))],
        [
            row("processor time, beside the bare loop", ratio),
            row("requests", lambda name: f"{counted[name]['requests'] / _LOOK_UPS:.2f}"),
            row("bytes sent", lambda name: f"{counted[name]['bytes_received'] / _LOOK_UPS:.0f}"),
            ["bytes held beyond the record", Figure.of([beyond]).show(), "-", "-"],
        ],
        [f"{_LOOK_UPS:,} ids, 50 in flight, 1 KB records. Time: {server_name}. Counts: raw asyncio server."],
    )
