"""Runs benches and prints their tables. `run.py` starts it inside the environment that it creates."""

import argparse
import importlib
import json
import os
import platform
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Final

from harness import Plan, Report
from table import Table

BENCHES: Final = (
    "pair",
    "peers",
    "decode",
    "imports",
    "memory",
    "looplag",
    "coldstart",
    "storm",
    "outage",
    "hedge",
    "hostile",
    "faults",
    "contract",
    "waiting",
    "polling",
    "workers",
    "telemetry",
)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the parsed command line."""
    about = {name: importlib.import_module(f"benches.{name}").ABOUT for name in BENCHES}
    parser = argparse.ArgumentParser(
        prog="python benchmarks/run.py",
        description="Benchmarks of kaizen_async beside its peers.",
        epilog="benches:\n" + "\n".join(f"  {name:10} {text}" for name, text in about.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("benches", nargs="*", metavar="BENCH", help="which to run (default: all)")
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument("--quick", action="store_const", const="quick", dest="effort", help="fewer rounds and cells")
    effort.add_argument("--full", action="store_const", const="full", dest="effort", help="more rounds, every cell")
    parser.add_argument("--only", default="", metavar="NAMES", help="contenders to take, by file name, comma-separated")
    parser.add_argument("--server", choices=("auto", "nginx", "asyncio"), default="auto", help="the fast server")
    parser.add_argument("--uvloop", action="store_true", help="run the contenders on uvloop")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample to a file")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables to a file as well")
    parser.add_argument("--versions", action="store_true", help="print the versions of everything, and do nothing else")
    parsed = parser.parse_args(arguments)
    if unknown := set(parsed.benches) - set(BENCHES):
        parser.error(f"unknown bench: {', '.join(sorted(unknown))}; there are {', '.join(BENCHES)}")
    return parsed


def versions() -> dict[str, str]:
    """Return the versions of Python and of every installed package."""
    packages = {found.metadata["Name"]: found.version for found in distributions()}
    return {"python": platform.python_version(), **dict(sorted(packages.items(), key=lambda item: item[0].lower()))}


def machine() -> str:
    """Return a line about the machine."""
    cores = os.cpu_count()
    load = ", ".join(f"{average:.1f}" for average in os.getloadavg())
    return f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {cores} cores, load {load}"


def main() -> None:
    """Run the requested benches."""
    asked = parse(sys.argv[1:])
    if asked.versions:
        print("\n".join(f"{name} {version}" for name, version in versions().items()))
        return
    only = frozenset(filter(None, asked.only.split(",")))
    plan = Plan(asked.effort or "default", asked.uvloop, asked.server, only)
    heading = f"{machine()}{', uvloop' if plan.uvloop else ''}, {plan.effort} run\n"
    print(heading)
    figures: dict[str, Any] = {}
    tables: list[Table] = []
    for name in asked.benches or BENCHES:
        report: Report = importlib.import_module(f"benches.{name}").run(plan)
        print(*report.tables, sep="\n", flush=True)
        figures[name] = report.figures
        tables += report.tables
    if asked.markdown:
        asked.markdown.parent.mkdir(parents=True, exist_ok=True)
        asked.markdown.write_text("\n".join(map(str, [heading, *tables])))
    if asked.json:
        everything = {"machine": machine(), "effort": plan.effort, "versions": versions(), "benches": figures}
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
