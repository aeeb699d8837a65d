"""Line charts on logarithmic axes as SVG, readable on light and dark pages."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import product
from typing import Final

_PLOT_WIDTH: Final = 370
_PLOT_HEIGHT: Final = 290
_PANEL: Final = 450
_LEFT: Final = 58
_TOP: Final = 84
_LEGEND_WIDTH: Final = 172
_LEGENDS_IN_A_ROW: Final = 5
_LEGEND_ROW: Final = 22
_COLOURS: Final = {
    "grey": ("#6e7781", "#9198a1"),
    "orange": ("#bc6c00", "#e3a13b"),
    "blue": ("#0969da", "#58a6ff"),
    "green": ("#1a7f37", "#3fb950"),
    "black": ("#24292f", "#e6edf3"),
}
"""On light pages, on dark ones."""
_STYLE: Final = (
    "text{font:13px system-ui,sans-serif;fill:#57606a}.title{font-weight:600;font-size:15px;fill:#24292f}"
    ".panel{font-weight:600}.grid{stroke:#d0d7de;stroke-width:.7}.line{fill:none;stroke-width:2}"
    ".dashed{stroke-dasharray:6 4}.thick{stroke-width:3}"
)
_DARK: Final = "text{fill:#9198a1}.title{fill:#e6edf3}.grid{stroke:#3d444d}"


@dataclass(frozen=True)
class Line:
    """One curve: its name, its points and its style."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    style: str = ""
    """"dashed", "thick" or neither."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]


def line_chart(title: str, subtitle: str, panels: Sequence[Panel]) -> str:
    """Return a chart with its panels side by side and a legend below them."""
    legend = {line.label: line for panel in panels for line in panel.lines}
    legend_top = _TOP + _PLOT_HEIGHT + 66
    width = _PANEL * len(panels)
    height = legend_top + _LEGEND_ROW * math.ceil(len(legend) / _LEGENDS_IN_A_ROW) - 4
    body = "".join(_panel(panel, index * _PANEL + _LEFT) for index, panel in enumerate(panels))
    body += "".join(_legend(line, index, legend_top) for index, line in enumerate(legend.values()))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title)}">\n<style>{_style()}</style>\n'
        f'<text class="title" x="0" y="18">{escape(title)}</text>\n<text x="0" y="38">{escape(subtitle)}</text>\n'
        f"{body}</svg>\n"
    )


def _style() -> str:
    light, dark = (
        "".join(
            f".line.{name}{{stroke:{both[page]}}}.dot.{name}{{fill:{both[page]}}}" for name, both in _COLOURS.items()
        )
        for page in (0, 1)
    )
    return f"{_STYLE}{light}@media(prefers-color-scheme:dark){{{_DARK}{dark}}}"


class _Axis:
    """Maps values to positions along a length, by their logarithm."""

    def __init__(self, values: Sequence[float], length: float) -> None:
        self._low, self._high = math.log(min(values) / 1.15), math.log(max(values) * 1.15)
        self._length = length

    def place(self, value: float) -> float:
        return (math.log(value) - self._low) / (self._high - self._low) * self._length

    def marks(self) -> list[float]:
        """Return the 1s, 2s and 5s of each decade within the axis."""
        candidates = (digit * 10.0**decade for decade, digit in product(range(-6, 7), (1, 2, 5)))
        return [mark for mark in candidates if self._low <= math.log(mark) <= self._high]


def _panel(panel: Panel, left: float) -> str:
    x = _Axis([x for line in panel.lines for x, _ in line.points], _PLOT_WIDTH)
    y = _Axis([y for line in panel.lines for _, y in line.points], _PLOT_HEIGHT)
    bottom, middle = _TOP + _PLOT_HEIGHT, left + _PLOT_WIDTH / 2
    parts = [f'<text class="panel" x="{left}" y="{_TOP - 14}">{escape(panel.title)}</text>\n']
    for mark in x.marks():
        at = f"{left + x.place(mark):.1f}"
        parts.append(f'<path class="grid" d="M{at} {_TOP}V{bottom}"/>')
        parts.append(f'<text x="{at}" y="{bottom + 18}" text-anchor="middle">{mark:g}</text>\n')
    for mark in y.marks():
        at = bottom - y.place(mark)
        parts.append(f'<path class="grid" d="M{left} {at:.1f}h{_PLOT_WIDTH}"/>')
        parts.append(f'<text x="{left - 7}" y="{at + 4:.1f}" text-anchor="end">{mark:g}</text>\n')
    parts.append(f'<text x="{middle}" y="{bottom + 40}" text-anchor="middle">{escape(panel.x_label)}</text>\n')
    turn = f"rotate(-90 {left - 42} {_TOP + _PLOT_HEIGHT / 2})"
    parts.append(
        f'<text x="{left - 42}" y="{_TOP + _PLOT_HEIGHT / 2}" text-anchor="middle" transform="{turn}">'
        f"{escape(panel.y_label)}</text>\n"
    )
    for line in panel.lines:
        places = [(left + x.place(along), bottom - y.place(up)) for along, up in sorted(line.points)]
        parts.append(_curve(line, places))
    return "".join(parts)


def _curve(line: Line, places: Sequence[tuple[float, float]]) -> str:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    dots = "".join(f'<circle class="dot {line.colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>' for x, y in places)
    return f'<path class="line {line.colour} {line.style}" d="M{path}"/>{dots}\n'


def _legend(line: Line, index: int, top: float) -> str:
    row, column = divmod(index, _LEGENDS_IN_A_ROW)
    left, middle = column * _LEGEND_WIDTH + 20, top + row * _LEGEND_ROW
    sample = _curve(line, [(left, middle), (left + 30, middle)])
    return f'{sample}<text x="{left + 40}" y="{middle + 4}">{escape(line.label)}</text>\n'
