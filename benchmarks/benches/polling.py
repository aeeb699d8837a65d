"""Polls and the lag until ends are noticed, in virtual time: our cadence beside other rules and the limit."""

import dataclasses
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

from curves import Point, read
from harness import Plan, Report, progress
from linechart import Line, Panel, line_chart
from simulation import Measured, Method, simulate
from table import Table
from workload import COUNT, LEARNED, SECONDS, WORKFLOWS, Execution, Workload, known, most_in_flight

ABOUT = "polls and lag of waiting for 2,000 executions, beside other rules of when to poll and the limit"
CHART = Path(__file__).parent.parent / "results" / "polling.svg"
_PROCESSES = 2
_FIXED_5, _AGE_10 = Method("fixed", 5.0), Method("age", 0.1)
_OURS, _ORACLE = "ours, share", "oracle, share"
_SETTINGS: Final[dict[str, tuple[float, ...]]] = {
    "fixed": (1.0, 2.0, 5.0, 15.0, 30.0),
    "google polling": (20.0,),
    "google retry": (60.0,),
    "age": (0.05, 0.1, 0.2, 0.3),
    "ours, as shipped": (0.05,),
    _OURS: (0.02, 0.03, 0.05, 0.07, 0.1, 0.15),
    "ours, seconds": (1.5, 2.5, 4.0, 8.0, 16.0),
    _ORACLE: (0.0005, 0.001, 0.0025, 0.006, 0.014, 0.035),
    "oracle, seconds": (0.02, 0.07, 0.2, 0.8, 3.2),
}
_TARGETS_NEED: Final[dict[str, tuple[float, ...]]] = {
    "fixed": (5.0,),
    "age": (0.1,),
    _OURS: (0.02, 0.03, 0.05, 0.07, 0.1, 0.15),
    _ORACLE: (0.0005, 0.001, 0.0025, 0.006, 0.014, 0.035),
}
_LABELS: Final = {
    "fixed": "every {:g} s",
    "google polling": "google-api-core, polling: random, up to {:g} s, x 1.5",
    "google retry": "google-api-core, retry: random, up to {:g} s, x 2",
    "age": "{:.0%} of the age",
    "ours, as shipped": "ours, as shipped: aim {:.0%}, at most every 15 s",
    _OURS: "ours, aim {:.0%} of the duration",
    "ours, seconds": "ours, aim {:g} s",
    _ORACLE: "oracle, hazard x interval² / 2 age = {:g}",
    "oracle, seconds": "oracle, hazard x interval² / 2 = {:g} s",
}

Points = dict[Method, Point]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The results of all methods for one workload, for all executions and for those of known workflows."""

    executions: list[Execution]
    all: Points
    known: Points

    def curve(self, rule: str, *, of_known: bool = False) -> list[Point]:
        """Return a rule's points."""
        points = self.known if of_known else self.all
        return [point for method, point in points.items() if method.rule == rule]


def run(plan: Plan) -> Report:
    """Wait for the workload with every method, and with `--full` for other workloads too."""
    workload = Workload(count=plan.choose(quick=200, default=COUNT, full=COUNT))
    if plan.effort == "quick":
        workload = dataclasses.replace(workload, seconds=SECONDS / 2)
    outcome = _measure(workload, _TARGETS_NEED if plan.effort == "quick" else _SETTINGS)
    tables = [_methods_table(workload, outcome)]
    if outcome.known:
        tables.append(_known_table(outcome))
    tables.append(_targets_table(outcome))
    figures: dict[str, Any] = {"methods": _figures(outcome)}
    if plan.effort == "full":
        others = {name: _targets(_measure(other, _TARGETS_NEED)) for name, other in _others().items()}
        tables.append(_others_table(others))
        figures["others"] = others
    if plan.effort != "quick":
        CHART.parent.mkdir(exist_ok=True)
        CHART.write_text(_draw(workload, outcome))
    return Report(tables, figures)


def _others() -> dict[str, Workload]:
    return {
        **{f"seed {seed}": Workload(seed=seed) for seed in (2, 3, 4)},
        "starts over 12,000 s": Workload(seconds=12_000.0),
        "all start at once": Workload(seconds=0.0),
        "the five log-normal workflows alone": Workload(log_normal_only=True),
    }


def _measure(workload: Workload, settings: dict[str, tuple[float, ...]]) -> Outcome:
    methods = [Method(rule, setting) for rule, values in settings.items() for setting in values]
    measured: dict[Method, Measured] = {}
    with ProcessPoolExecutor(_PROCESSES, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(simulate, method, workload): method for method in methods}
        for future in as_completed(futures):
            measured[futures[future]] = future.result()
            progress(f"polling: {len(measured)}/{len(methods)}")
    progress("")
    executions = workload.executions()
    chosen = known(executions)
    points = {method: Point.of(executions, measured[method]) for method in methods}
    of_known = {method: Point.of(executions, measured[method], chosen) for method in methods} if len(chosen) > 1 else {}
    return Outcome(executions, points, of_known)


def _label(method: Method) -> str:
    return _LABELS[method.rule].format(method.setting)


def _row(method: Method, point: Point) -> list[str]:
    seconds = f"{point.lag:.1f}", f"{point.lag_p95:.1f}"
    return [_label(method), f"{point.polls:.1f}", *seconds, f"{point.share:.1%}", f"{point.share_p95:.1%}"]


_COLUMNS: Final = ["method", "polls per execution", "lag s, mean", "p95", "lag / duration, mean", "p95"]


def _methods_table(workload: Workload, outcome: Outcome) -> Table:
    executions = outcome.executions
    workflows = len({execution.workflow for execution in executions})
    mean = sum(execution.duration for execution in executions) / len(executions)
    return Table(
        "Polls, and lag from an end to its being noticed",
        _COLUMNS,
        [_row(method, point) for method, point in outcome.all.items()],
        [
            f"{len(executions):,} executions of {workflows} workflows, {mean:.0f} s long on average.",
            f"Started over {workload.seconds:,.0f} s, at most {most_in_flight(executions)} in flight.",
            "The first poll of each, at its start, counts. Ours learns from nothing.",
            "Intervals of ours, of the oracle and of shares of the age are 1 s at least.",
            "They are not bounded above but where the row says so.",
        ],
    )


def _known_table(outcome: Outcome) -> Table:
    kept = (_FIXED_5, _AGE_10)
    shown = {method: point for method, point in outcome.known.items() if method in kept or _is_contest(method)}
    return Table(
        f"The same, of executions that start after {LEARNED} of their workflow have ended",
        _COLUMNS,
        [_row(method, point) for method, point in shown.items()],
        [f"{len(known(outcome.executions)):,} of the executions."],
    )


def _is_contest(method: Method) -> bool:
    return method.rule.startswith(("ours", "oracle"))


def _targets(outcome: Outcome) -> dict[str, float | None]:
    """Return the three ratios."""
    fixed, age = outcome.all[_FIXED_5], outcome.all[_AGE_10]
    ours = outcome.curve(_OURS)
    polls = read(ours, "polls", where="share", equals=fixed.share)
    share = read(ours, "share", where="polls", equals=age.polls)
    return {
        "fixed": None if polls is None else polls / fixed.polls,
        "age": None if share is None else share / age.share,
        "oracle": max(_beside_oracle(outcome, _OURS, _ORACLE, "share"), default=None),
    }


def _beside_oracle(outcome: Outcome, ours: str, oracle: str, key: str) -> list[float]:
    """Return the ratios of our polls to the oracle's at the lag of each of its points, where both have values."""
    limit = outcome.curve(oracle, of_known=True)
    return [
        point.polls / polls
        for point in outcome.curve(ours, of_known=True)
        if (polls := read(limit, "polls", where=key, equals=getattr(point, key))) is not None
    ]


_ASKED: Final = {"fixed": 1 / 4, "age": 2 / 3, "oracle": 3 / 2}


def _targets_table(outcome: Outcome) -> Table:
    ratios = _targets(outcome)
    asked = {
        "fixed": "polls, beside every 5 s at its mean lag / duration",
        "age": "mean lag / duration, beside 10 % of the age at its polls",
        "oracle": f"polls, beside the oracle at equal mean lag / duration, {LEARNED} ended",
    }
    rows = [
        [text, f"at most {_ASKED[key]:.3f}", _ratio(ratios[key]), _verdict(key, ratios[key])]
        for key, text in asked.items()
    ]
    notes = ["Read from the curves of all aims; beside the oracle the worst of the aims that its curve reaches."]
    if len(outcome.executions) < COUNT:
        notes.append(f"The targets are for {COUNT:,} executions: of so few, most come before much is learned.")
    return Table(
        "Ours beside the others at equal lag or equal polls",
        ["ratio", "target", "measured", "verdict"],
        rows + _seconds_rows(outcome),
        notes,
    )


def _seconds_rows(outcome: Outcome) -> list[list[str]]:
    """Return the ratios for a lag in seconds, which has no target."""
    fixed = outcome.all[_FIXED_5]
    rows = []
    for rule, name in (("ours, seconds", ""), ("oracle, seconds", "the oracle's ")):
        curve = outcome.curve(rule)
        polls = read(curve, "polls", where="lag", equals=fixed.lag) if curve else None
        ratio = None if polls is None else polls / fixed.polls
        rows.append([f"aim in seconds: {name}polls, beside every 5 s at its mean lag", "-", _ratio(ratio), "-"])
    worst = max(_beside_oracle(outcome, "ours, seconds", "oracle, seconds", "lag"), default=None)
    rows.append(
        [f"aim in seconds: polls, beside the oracle at equal mean lag, {LEARNED} ended", "-", _ratio(worst), "-"]
    )
    return rows


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3f}"


def _verdict(key: str, ratio: float | None) -> str:
    if ratio is None:
        return "-"
    return "met" if ratio <= _ASKED[key] else "not met"


def _others_table(others: dict[str, dict[str, float | None]]) -> Table:
    return Table(
        "The same three ratios for other workloads",
        ["workload", "every 5 s, polls", "10 % of the age, lag", f"oracle, polls, {LEARNED} ended"],
        [
            [name, *("-" if ratio is None else f"{ratio:.3f} {_verdict(key, ratio)}" for key, ratio in ratios.items())]
            for name, ratios in others.items()
        ],
        [f"Where all start at once, none starts after {LEARNED} have ended."],
    )


def _figures(outcome: Outcome) -> dict[str, Any]:
    return {
        "all": {_label(method): dataclasses.asdict(point) for method, point in outcome.all.items()},
        "known": {_label(method): dataclasses.asdict(point) for method, point in outcome.known.items()},
        "targets": {key: {"measured": ratio, "at_most": _ASKED[key]} for key, ratio in _targets(outcome).items()},
    }


def _draw(workload: Workload, outcome: Outcome) -> str:
    google = outcome.curve("google polling") + outcome.curve("google retry")

    def lines(aim: str, key: str, factor: float) -> list[Line]:
        def line(label: str, points: list[Point], colour: str, style: str = "") -> Line:
            return Line(label, [(point.polls, factor * getattr(point, key)) for point in points], colour, style)

        return [
            line("fixed interval", outcome.curve("fixed"), "grey"),
            line("google-api-core", google, "orange"),
            line("share of the age", outcome.curve("age"), "blue"),
            line("oracle: the limit", outcome.curve(f"oracle, {aim}"), "black", "dashed"),
            line("kaizen_async", outcome.curve(f"ours, {aim}"), "green", "thick"),
        ]

    return line_chart(
        "How late an end is noticed, by polls spent",
        f"{len(outcome.executions):,} executions of {len(WORKFLOWS)} workflows, "
        f"started over {workload.seconds:,.0f} s, learning from nothing; down and left is better",
        [
            Panel(
                "aim: a share of the duration",
                "polls per execution",
                "mean lag, % of duration",
                lines("share", "share", 100),
            ),
            Panel("aim: seconds", "polls per execution", "mean lag, s", lines("seconds", "lag", 1)),
        ],
    )
