"""A bar chart as SVG, readable on light and dark pages."""

import math
from html import escape
from typing import Final

_LABEL: Final = 265
_BARS: Final = 430
_VALUE: Final = 120
_ROW: Final = 26
_TOP: Final = 58
_STYLE: Final = (
    "text{font:13px system-ui,sans-serif;fill:#57606a}.title{font-weight:600;font-size:15px;fill:#24292f}"
    ".bar{fill:#9aa7b4}.ours{fill:#1f883d}text.ours{font-weight:600}.line{stroke:#9aa7b4;stroke-dasharray:2 3}"
    "@media(prefers-color-scheme:dark){text{fill:#9198a1}.title{fill:#e6edf3}.bar{fill:#59636e}.ours{fill:#3fb950}}"
)


def bar_chart(title: str, subtitle: str, bars: list[tuple[str, float, str, bool]]) -> str:
    """Return a chart of horizontal bars on a logarithmic scale, because the longest is many times the shortest.

    The shortest bar begins at the power of ten below it; lines mark the powers of ten.

    Args:
        title: What the bars measure.
        subtitle: The conditions of the measurement.
        bars: Label, length, the text at its end, and whether it is one of ours; top to bottom.
    """
    width, height = _LABEL + _BARS + _VALUE, _TOP + _ROW * len(bars) + 8
    lengths = [length for _, length, _, _ in bars]
    first = math.floor(math.log10(min(lengths)))
    last = max(math.log10(max(lengths)), first + 1)
    lines = "".join(_line(_place(10**power, first, last), height) for power in range(first, math.ceil(last)))
    rows = "".join(_row(index, bar, _place(bar[1], first, last)) for index, bar in enumerate(bars))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title)}">\n<style>{_STYLE}</style>\n'
        f'<text class="title" x="0" y="18">{escape(title)}</text>\n<text x="0" y="38">{escape(subtitle)}</text>\n'
        f"{lines}{rows}</svg>\n"
    )


def _place(value: float, first: int, last: float) -> float:
    """Return how far from the beginning of the bars a value lies, between two powers of ten."""
    return _BARS * (math.log10(value) - first) / (last - first)


def _line(place: float, height: int) -> str:
    x = _LABEL + place
    return f'<line class="line" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 6}" y2="{height - 4}"/>\n'


def _row(index: int, bar: tuple[str, float, str, bool], length: float) -> str:
    label, _, value, ours = bar
    top, kind = _TOP + _ROW * index, " ours" if ours else ""
    drawn = max(1.0, length)
    return (
        f'<text class="label{kind}" x="{_LABEL - 10}" y="{top + 14}" text-anchor="end">{escape(label)}</text>'
        f'<rect class="bar{kind}" x="{_LABEL}" y="{top}" width="{drawn:.1f}" height="18" rx="2"/>'
        f'<text class="value{kind}" x="{_LABEL + drawn + 8:.1f}" y="{top + 14}">{escape(value)}</text>\n'
    )
