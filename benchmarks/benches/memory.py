"""The memory of bulk lookups, and whether a stream grows with the number of ids."""

from typing import Any

import server
from harness import Figure, Plan, Report, WorkerFailedError, progress
from harness import run as run_job
from table import Table
from worker import Job

ABOUT = "memory of bulk lookups"
_TRACED_IDS = 10_000
_KEEPS = "ours_get_many"
_STREAMS = "ours_stream"
_RECORDS = "records_alone"


def run(plan: Plan) -> Report:
    """Count the bytes of an outcome beyond its record, then measure the process with growing numbers of ids."""
    counts = plan.choose(quick=[10_000], default=[10_000, 100_000], full=[10_000, 100_000, 1_000_000])
    with server.fast(plan.server) as running:
        url = running.base_url(1)
        traced = {name: _measure(name, url, _TRACED_IDS, traced=True) for name in (_KEEPS, _RECORDS)}
        grown = {name: {count: _measure(name, url, count) for count in counts} for name in (_KEEPS, _STREAMS, _RECORDS)}
    tables = [_traced_table(traced), _growth_table(grown, counts)]
    return Report(tables, {"traced": traced, "process": grown})


def _measure(name: str, url: str, count: int, *, traced: bool = False) -> dict[str, Any]:
    progress(f"memory: {name}, {count:,} ids")
    try:
        return run_job(Job("memory", name, url, 50, count, traced=traced))
    except WorkerFailedError as error:
        return {"error": str(error)}
    finally:
        progress("")


def _traced_table(traced: dict[str, dict[str, Any]]) -> Table:
    table = Table(
        f"Bytes held for each of {_TRACED_IDS:,} ids, by tracemalloc",
        ["what", "bytes per id"],
        notes=["The ids themselves belong to the caller and are not counted. 1 KB records."],
    )
    held: dict[str, float | None] = {name: measured.get("held_bytes") for name, measured in traced.items()}
    for name, label in ((_KEEPS, "get_many: outcomes and records"), (_RECORDS, "the records alone")):
        table.rows.append([label, _bytes(held[name])])
        if held[name] is None:
            table.notes.append(traced[name]["error"])
    kept, records = held[_KEEPS], held[_RECORDS]
    beyond = kept - records if kept and records else None
    table.rows.append(["get_many, beyond the records", _bytes(beyond)])
    return table


def _growth_table(grown: dict[str, dict[int, dict[str, Any]]], counts: list[int]) -> Table:
    table = Table(
        "Peak memory of the process, MB",
        ["what", *(f"{count:,} ids" for count in counts), "last - first"],
        notes=["The list of ids is part of it for get_many; stream takes them from a generator."],
    )
    labels = {_KEEPS: "get_many", _STREAMS: "stream", _RECORDS: "the records alone, kept"}
    for name, label in labels.items():
        peaks = [grown[name][count].get("peak_mb") for count in counts]
        known = [Figure.of([peak]).show(1) if peak else "failed" for peak in peaks]
        growth = f"{peaks[-1] - peaks[0]:,.1f}" if peaks[0] and peaks[-1] else "-"
        table.rows.append([label, *known, growth])
    return table


def _bytes(count: float | None) -> str:
    return "failed" if count is None else f"{count:,.0f}"
