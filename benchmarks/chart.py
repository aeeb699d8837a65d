"""A bar chart as SVG, readable on light and dark pages."""

from html import escape
from typing import Final

_LABEL: Final = 265
_BARS: Final = 430
_VALUE: Final = 120
_ROW: Final = 26
_TOP: Final = 58
_STYLE: Final = (
    "text{font:13px system-ui,sans-serif;fill:#57606a}.title{font-weight:600;font-size:15px;fill:#24292f}"
    ".bar{fill:#9aa7b4}.ours{fill:#1f883d}text.ours{font-weight:600}"
    "@media(prefers-color-scheme:dark){text{fill:#9198a1}.title{fill:#e6edf3}.bar{fill:#59636e}.ours{fill:#3fb950}}"
)


def bar_chart(title: str, subtitle: str, bars: list[tuple[str, float, str, bool]]) -> str:
    """Return a chart of horizontal bars.

    Args:
        title: What the bars measure.
        subtitle: Under which conditions.
        bars: Label, length, the text at its end, and whether it is one of ours; top to bottom.
    """
    width, height = _LABEL + _BARS + _VALUE, _TOP + _ROW * len(bars) + 8
    longest = max((length for _, length, _, _ in bars), default=0.0) or 1.0
    rows = "".join(_row(index, bar, longest) for index, bar in enumerate(bars))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title)}">\n<style>{_STYLE}</style>\n'
        f'<text class="title" x="0" y="18">{escape(title)}</text>\n<text x="0" y="38">{escape(subtitle)}</text>\n'
        f"{rows}</svg>\n"
    )


def _row(index: int, bar: tuple[str, float, str, bool], longest: float) -> str:
    label, length, value, ours = bar
    top, kind = _TOP + _ROW * index, " ours" if ours else ""
    drawn = max(1.0, _BARS * length / longest)
    return (
        f'<text class="label{kind}" x="{_LABEL - 10}" y="{top + 14}" text-anchor="end">{escape(label)}</text>'
        f'<rect class="bar{kind}" x="{_LABEL}" y="{top}" width="{drawn:.1f}" height="18" rx="2"/>'
        f'<text class="value{kind}" x="{_LABEL + drawn + 8:.1f}" y="{top + 14}">{escape(value)}</text>\n'
    )
