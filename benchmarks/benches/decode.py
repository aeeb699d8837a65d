"""From the bytes of a response to a record: kaizen_async's own decoder beside others."""

import json
import time
import timeit
import tracemalloc
from collections.abc import Callable
from typing import Any

import data
import msgspec
import orjson
from harness import Figure, Plan, Report, progress
from pydantic import BaseModel
from shapes import LeanExecution, pydantic_execution
from table import Table

from kaizen_async import InstructorExecution
from kaizen_async._transport.wire import Endpoint

ABOUT = "decoding one record"
_OURS = "kaizen_async (typed, checked, id compared)"
_KEPT = 200

Decode = Callable[[], Any]


def run(plan: Plan) -> Report:
    """Time each decoder in turn, for both sizes."""
    figures = {f"{size} KB": _measure(size, plan) for size in data.SIZES}
    tables = [_table(cell, measured) for cell, measured in figures.items()]
    return Report(tables, {cell: {name: vars(row) for name, row in rows.items()} for cell, rows in figures.items()})


class Row:
    """The cost of one decoder."""

    def __init__(self, microseconds: list[float], kilobytes: float) -> None:
        self.microseconds = microseconds
        self.kilobytes = kilobytes


def _decoders(body: bytes) -> dict[str, Decode]:
    ours = Endpoint("instructor/executions/get", InstructorExecution).decode
    alone = msgspec.json.Decoder(InstructorExecution).decode
    lean = msgspec.json.Decoder(LeanExecution).decode
    untyped = msgspec.json.Decoder().decode
    validate = pydantic_execution(BaseModel).model_validate_json
    unknown = body.replace(b'"Unauthenticated"', b'"SomethingNewAsIs"')
    return {
        _OURS: lambda: ours(body, data.SAMPLE_ID),
        "its Struct alone": lambda: alone(body),
        "all of it, every login's status unknown to it": lambda: ours(unknown, data.SAMPLE_ID),
        "msgspec, leanest Struct (no enums, no dates)": lambda: lean(body),
        "msgspec, untyped": lambda: untyped(body),
        "orjson.loads": lambda: orjson.loads(body),
        "json.loads": lambda: json.loads(body),
        "pydantic": lambda: validate(body),
    }


def _measure(size: int, plan: Plan) -> dict[str, Row]:
    decoders = _decoders(data.body(size))
    number = plan.choose(quick=500, default=3000, full=10_000) // (1 if size == 1 else 10)
    times: dict[str, list[float]] = {name: [] for name in decoders}
    for turn in range(plan.choose(quick=5, default=11, full=21)):
        progress(f"decode, {size} KB, round {turn + 1}")
        for name, decode in decoders.items():
            seconds = timeit.timeit(decode, number=number, timer=time.process_time)
            times[name].append(seconds / number * 1e6)
    progress("")
    return {name: Row(times[name], _kilobytes(decode)) for name, decode in decoders.items()}


def _kilobytes(decode: Decode) -> float:
    decode()
    tracemalloc.start()
    kept = [decode() for _ in range(_KEPT)]
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return held / len(kept) / 1e3


def _table(cell: str, rows: dict[str, Row]) -> Table:
    table = Table(
        f"Decoding one record of {cell}",
        ["decoder", "CPU µs", "spread", "vs. ours", "kB kept"],
        notes=["Median and spread of interleaved rounds; kB kept is what the decoded record holds in memory."],
    )
    ours = Figure.of(rows[_OURS].microseconds).median
    for name, row in rows.items():
        figure = Figure.of(row.microseconds)
        spread = f"{figure.low:,.2f}-{figure.high:,.2f}"
        table.rows.append([name, figure.show(2), spread, f"{figure.median / ours:.2f} x", f"{row.kilobytes:.1f}"])
    return table
