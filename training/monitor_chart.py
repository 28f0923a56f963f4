"""Line charts as inline SVG, drawn for a page that defines the colours (`monitor_page.py`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Series", "line_chart"]

_WIDTH, _HEIGHT = 520, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 12, 34
_MOST_POINTS = 300
"""Points of a line; of more, means of neighbours are drawn."""
_MANY_GRADES = 6
"""Graded series from which the legend names the first and the last alone."""

Point = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line of a chart."""

    label: str
    """Its name in the legend."""
    points: Sequence[Point]
    """By ascending x; y is finite."""
    color: str
    """A CSS colour."""
    is_dotted: bool = False
    """Whether its points are marked."""


@dataclass(frozen=True, slots=True)
class _Scale:
    """Values to a stretch of the picture."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        share = (self._at(value) - self._at(self.low)) / (self._at(self.high) - self._at(self.low))
        return self.start + share * (self.end - self.start)

    def _at(self, value: float) -> float:
        return math.log10(value) if self.is_log else value

    def ticks(self) -> list[float]:
        if not self.is_log:
            return _round_numbers(self.low, self.high)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        every = max(1, math.ceil((last - first) / 5))
        factors = (1, 2, 5) if last - first <= 2 else (1,)
        ticks = [f * 10.0**power for power in range(first, last + 1, every) for f in factors]
        return [tick for tick in ticks if self.low <= tick <= self.high]


def line_chart(
    series: Sequence[Series],
    *,
    unit: str,
    across: str = "step",
    is_log: bool = False,
    is_graded: bool = False,
) -> str:
    """An `<svg>` of the series, with a legend where there are several.

    Args:
        series: Lines; of a logarithmic chart, values of 0 and less are left out.
        unit: What y counts.
        across: What x counts.
        is_log: Whether y is logarithmic.
        is_graded: Whether the series are grades of one thing, as layers are: of many, the legend
            then names the ends.
    """
    drawn = [(one, _thinned(one.points, is_log=is_log)) for one in series]
    drawn = [(one, points) for one, points in drawn if points]
    if not drawn:
        return '<p class="empty">nothing measured yet</p>'
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points]
    right = _Scale(min(xs), max(max(xs), min(xs) + 1), _LEFT, _WIDTH - _RIGHT)
    low, high = _padded(min(ys), max(ys), is_log=is_log)
    up = _Scale(low, high, _HEIGHT - _BOTTOM, _TOP, is_log)
    body = _axes(right, up, unit, across)
    body += [_line(one, points, right, up) for one, points in drawn]
    label = escape(f"{unit} by {across}")
    picture = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
    return f"{picture}{''.join(body)}</svg>" + _legend(
        [one for one, _ in drawn], is_graded=is_graded
    )


def _thinned(points: Sequence[Point], *, is_log: bool) -> list[Point]:
    kept = [(x, y) for x, y in points if y > 0 or not is_log]
    size = math.ceil(len(kept) / _MOST_POINTS)
    if size < 2:
        return kept
    groups = [kept[start : start + size] for start in range(0, len(kept), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _padded(low: float, high: float, *, is_log: bool) -> tuple[float, float]:
    if is_log:
        # At least a decade, so that there is a tick to read.
        low, high = low / 1.3, high * 1.3
        return (low, high) if high / low > 10 else (low / 2, max(high, low * 10))
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return low - margin if low < 0 or low > margin else 0.0, high + margin


def _round_numbers(low: float, high: float) -> list[float]:
    """About five multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first = math.ceil(low / step)
    return [step * index for index in range(first, math.floor(high / step) + 1)]


def _axes(right: _Scale, up: _Scale, unit: str, across: str) -> list[str]:
    parts = []
    for value in up.ticks():
        y = up(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" '
                     f'y2="{y:.1f}"/>')  # fmt: skip
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" class="y">{_short(value)}</text>')
    below = _HEIGHT - _BOTTOM + 16
    parts += [
        f'<text x="{right(value):.1f}" y="{below}" class="x">{_short(value)}</text>'
        for value in right.ticks()
    ]
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(f'<text class="unit" transform="translate(12 {middle}) rotate(-90)">'
                 f"{escape(unit)}</text>")  # fmt: skip
    center = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="unit" x="{center}" y="{_HEIGHT - 3}">{escape(across)}</text>')
    return parts


def _line(series: Series, points: list[Point], right: _Scale, up: _Scale) -> str:
    places = [(right(x), up(y)) for x, y in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    title = f"<title>{escape(series.label)}: {_short(points[-1][1])} at the end</title>"
    line = f'<polyline points="{path}" style="stroke:{series.color}">{title}</polyline>'
    if not series.is_dotted and len(points) > 1:
        return line
    return line + "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" style="fill:{series.color}">'
        f"<title>{escape(series.label)}: {_short(value)} at {_short(step)}</title></circle>"
        for (x, y), (step, value) in zip(places, points, strict=True)
    )


def _legend(series: list[Series], *, is_graded: bool) -> str:
    if len(series) < 2:
        return ""
    is_short = is_graded and len(series) >= _MANY_GRADES
    shown = [series[0], series[-1]] if is_short else series
    between = "" if len(shown) == len(series) else f"<span>{len(series) - 2} between</span>"
    items = [
        f'<span><i style="background:{one.color}"></i>{escape(one.label)}</span>' for one in shown
    ]
    return f'<p class="legend">{items[0]}{between}{"".join(items[1:])}</p>'


def _short(value: float) -> str:
    """A number as short as it stays clear."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.3g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.3g}k"
    if abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.4g}"
