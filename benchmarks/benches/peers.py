"""Every contender against one fast server: CPU time, throughput, latency, memory."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import server
from chart import bar_chart
from harness import BARE, BEFORE, BEFORE_FOLDER, OURS, PEERS, REFERENCE, Plan, Report, Results, rounds, title, versus
from table import Table
from worker import Job, load

ABOUT = "kaizen_async beside its peers, the bare loop and raw sockets"
CHART = Path(__file__).parent.parent / "results" / "peers.svg"


class Cell(NamedTuple):
    """What differs between two tables."""

    concurrency: int = 50
    size: int = 1
    tls: bool = False
    packed: bool = False
    uvloop: bool = False

    def __str__(self) -> str:
        scheme, loop = "https" if self.tls else "http", "uvloop" if self.uvloop else "asyncio"
        records = f"{self.size} KB records{', gzip in chunks' if self.packed else ''}"
        return f"{self.concurrency} in flight, {records}, {scheme}, {loop}"


_MAIN = Cell()
_WAYS = [
    Cell(tls=tls, packed=packed, uvloop=uvloop)
    for packed in (False, True)
    for tls in (False, True)
    for uvloop in (False, True)
][1:]
"""The other ways to send the same: over TLS, packed, and on the other event loop."""


def run(plan: Plan) -> Report:
    """Measure each cell."""
    before = (BEFORE,) if os.environ.get(BEFORE_FOLDER) else ()
    names = plan.chosen((*OURS, *before, *BARE, *PEERS))
    sizes = [Cell(1), Cell(500), Cell(50, 20)]
    cells = plan.choose(
        quick=[_MAIN],
        default=[_MAIN, *sizes, *(way for way in _WAYS if not (way.packed and (way.tls or way.uvloop)))],
        full=[_MAIN, *sizes, Cell(10), Cell(1, 20), Cell(500, 20), *_WAYS],
    )
    figures: dict[str, Any] = {}
    tables = []
    with server.fast(plan.server) as running:
        for cell in cells:
            if running.tls_port is None and (cell.tls or cell.packed):
                continue  # only nginx does that
            jobs = [_job(name, plan, running, cell) for name in names]
            results = rounds(jobs, plan.choose(quick=2, default=3 if cell == _MAIN else 2, full=5))
            figures[str(cell)] = results.as_json()
            tables.append(_table(results, names, str(cell), running.name))
            if cell == _MAIN and plan.effort != "quick" and not plan.only:
                _draw(results, names, running.name)
    return Report(tables, figures)


def _job(name: str, plan: Plan, running: server.Server, cell: Cell) -> Job:
    look_ups = plan.choose(quick=2000, default=3000, full=10000)
    if load(name).slow:
        look_ups = max(look_ups // 6, 2 * cell.concurrency)
    return Job(
        "speed",
        name,
        running.base_url(cell.size, tls=cell.tls, packed=cell.packed),
        cell.concurrency,
        look_ups,
        cell.uvloop or plan.uvloop,
        authority=str(running.authority) if cell.tls else None,
    )


def _ranked(results: Results, names: list[str]) -> list[str]:
    measured = {name: figure.median for name in names if (figure := results.figure(name, "cpu_us"))}
    return [*sorted(measured, key=measured.__getitem__), *(name for name in names if name not in measured)]


def _table(results: Results, names: list[str], cell: str, server_name: str) -> Table:
    table = Table(
        f"Lookups, {cell}",
        ["client", "CPU µs per lookup", "spread", "CPU vs. ours", "lookups/s", "p50 ms", "p99 ms", "peak MB"],
        notes=[f"Server: {server_name}. Ours is `get_many`. Medians; spread is the lowest and highest round."],
    )
    table.notes += results.notes()
    for name in _ranked(results, names):
        cpu = results.figure(name, "cpu_us")
        if cpu is None:
            table.rows.append([title(name), "failed", *("-" for _ in range(6))])
            continue
        shown = [results.figure(name, key) for key in ("per_second", "p50_ms", "p99_ms", "peak_mb")]
        table.rows.append(
            [
                title(name),
                cpu.show(),
                f"{cpu.low:,.0f}-{cpu.high:,.0f}",
                versus(results.ratio(name, "cpu_us")),
                *(figure.show(digits) if figure else "-" for figure, digits in zip(shown, (0, 1, 1, 0), strict=True)),
            ]
        )
    return table


def _draw(results: Results, names: list[str], server_name: str) -> None:
    bars = []
    for name in _ranked(results, names):
        figure, ratio = results.figure(name, "cpu_us"), results.ratio(name, "cpu_us")
        if figure:
            value = figure.show() if ratio is None or name == REFERENCE else f"{figure.show()}  ({ratio:.1f} x)"
            bars.append((title(name), figure.median, value, name in OURS))
    subtitle = f"µs on a logarithmic scale, 50 in flight, 1 KB records, {server_name} on loopback; less is better"
    CHART.parent.mkdir(exist_ok=True)
    CHART.write_text(bar_chart("Processor time per lookup", subtitle, bars))
