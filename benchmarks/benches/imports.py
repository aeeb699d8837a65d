"""The cost of imports, each measured in a new interpreter."""

import json
import subprocess
import sys
from typing import Any

from harness import Figure, Plan, Report, clean_environment, progress
from table import Table

ABOUT = "import time"
_BASE = "import aiohttp, msgspec, tenacity"
_CASES = {
    "kaizen_async, on top of aiohttp + msgspec + tenacity": (_BASE, "import kaizen_async"),
    "aiohttp + msgspec + tenacity": ("", _BASE),
    "kaizen_async, all in": ("", "import kaizen_async"),
    "apify-client": ("", "from apify_client import ApifyClientAsync"),
    "zyte-api": ("", "from zyte_api import AsyncZyteAPI"),
    "openai": ("", "from openai import AsyncOpenAI"),
    "browserbase": ("", "from browserbase import AsyncBrowserbase"),
    "httpx + pydantic": ("", "import httpx; from pydantic import BaseModel"),
}
_OURS = "kaizen_async, all in"
_PROGRAM = """
import json, sys, time
{before}
modules, wall, cpu = len(sys.modules), time.perf_counter(), time.process_time()
{measured}
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
print(json.dumps({{"ms": wall * 1e3, "cpu_ms": cpu * 1e3, "modules": len(sys.modules) - modules}}))
"""


def run(plan: Plan) -> Report:
    """Import each in turn."""
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in _CASES}
    for name in _CASES:
        _import(name)  # writes the .pyc files
    for turn in range(plan.choose(quick=3, default=9, full=21)):
        for name, taken in samples.items():
            progress(f"round {turn + 1}: import, {name}")
            taken.append(_import(name))
    progress("")
    return Report([_table(samples)], {"samples": samples})


def _import(name: str) -> dict[str, Any]:
    before, measured = _CASES[name]
    program = _PROGRAM.format(before=before, measured=measured)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=clean_environment(), check=True
    )
    taken: dict[str, Any] = json.loads(done.stdout)
    return taken


def _table(samples: dict[str, list[dict[str, Any]]]) -> Table:
    table = Table(
        "Importing, in a fresh interpreter",
        ["what", "CPU ms", "spread", "vs. ours", "wall ms", "modules"],
        notes=["Medians and spread; `.pyc` files written before; modules are those newly loaded."],
    )
    ours = Figure.of([sample["cpu_ms"] for sample in samples[_OURS]]).median
    for name, taken in samples.items():
        wall, cpu = (Figure.of([sample[key] for sample in taken]) for key in ("ms", "cpu_ms"))
        spread = f"{cpu.low:,.0f}-{cpu.high:,.0f}"
        row = [name, cpu.show(1), spread, f"{cpu.median / ours:.2f} x", wall.show(1), str(taken[0]["modules"])]
        table.rows.append(row)
    return table
