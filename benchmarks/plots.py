"""Lines on axes as SVG text, without a plotting library: what a report's page needs and no more.

Colours are classes (`s0`, `s1`, ...) that the page's style sheet fills, so that one drawing serves
light and dark. Nothing in it is a script.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["PAGE_STYLE", "Dot", "Series", "dot_plot", "line_plot", "standalone", "tick_values"]

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 12, 40
NUM_TICKS = 5
LINE = 13
"""Height of a line of text."""

PLOT_STYLE = """
:root { color-scheme: light dark; --text: #1d2733; --soft: #5c6b7a; --back: #fff; --grid: #dde3e9;
  --s0: #1f6fd1; --s1: #c7511f; --s2: #2b8a57; --s3: #8a4fbf; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e9ee; --soft: #9aa8b5; --back: #14191f;
  --grid: #2b343d; --s0: #6aa9f5; --s1: #f08c5a; --s2: #62c48e; --s3: #bf94ea; } }
svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--soft); }
.end { text-anchor: end; } .middle { text-anchor: middle; }
.grid { stroke: var(--grid); fill: none; } .line { fill: none; stroke-width: 1.8; }
.dots { fill: none; stroke-width: 4; stroke-linecap: round; }
.s0 { stroke: var(--s0); } .s1 { stroke: var(--s1); } .s2 { stroke: var(--s2); }
.s3 { stroke: var(--s3); }
"""
"""Colours of lines and text, light and dark by the reader's system: all that a drawing needs."""
PAGE_STYLE = (
    PLOT_STYLE
    + """\
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 58rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .3rem 0; } .soft, td small { color: var(--soft); }
.warning { border-left: 4px solid var(--s1); padding-left: .6rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: right; padding: .2rem .5rem; border-bottom: 1px solid var(--grid);
  font-variant-numeric: tabular-nums; white-space: nowrap; vertical-align: top; }
th { white-space: normal; } th:first-child { text-align: left; font-weight: normal; }
.words td { text-align: left; white-space: normal; } td small { display: block; }
code { overflow-wrap: anywhere; }
@media (max-width: 36rem) { svg text { font-size: 16px; } th, td { padding: .2rem .3rem; } }
"""
)
"""Of a page with tables and drawings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line."""

    name: str
    points: Sequence[tuple[float, float]]
    is_dots: bool = False
    """Whether the points stand alone instead of being joined."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """One named point."""

    x: float
    y: float
    label: str


def dot_plot(dots: Sequence[Dot], *, x_label: str, y_label: str) -> str:
    """An `<svg>` of named points on axes from 0 on; a name stands on the side that has room."""
    series = Series(name="", points=[(dot.x, dot.y) for dot in dots], is_dots=True)
    x_ticks, y_ticks, scale = _scaled(series.points)
    return "\n".join(
        [
            _opening(x_label, y_label),
            *_axes(x_ticks, y_ticks, scale, x_label, y_label),
            _line(series, 0, scale),
            *_names(dots, scale),
            "</svg>",
        ]
    )


def line_plot(series: Sequence[Series], *, x_label: str, y_label: str) -> str:
    """An `<svg>` of all series on common axes from 0 on, with a legend."""
    x_ticks, y_ticks, scale = _scaled([point for one in series for point in one.points])
    return "\n".join(
        [
            _opening(x_label, y_label),
            *_axes(x_ticks, y_ticks, scale, x_label, y_label),
            *(_line(one, number, scale) for number, one in enumerate(series)),
            *(_legend(one.name, number) for number, one in enumerate(series)),
            "</svg>",
        ]
    )


def standalone(svg: str) -> str:
    """A drawing as a file of its own: with its name space, and the colours in it."""
    head = "<svg xmlns='http://www.w3.org/2000/svg' font-family='system-ui, sans-serif'"
    body = svg.removeprefix("<svg")
    start, end, rest = body.partition(">")
    return f"{head}{start}{end}<style>{PLOT_STYLE}</style>{rest}\n"


def tick_values(most: float) -> list[float]:
    """Round numbers from 0 to about `most`: steps of 1, 2 or 5 times a power of ten."""
    if most <= 0:
        return [0.0, 1.0]
    rough = most / NUM_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    return [index * step for index in range(int(most / step * (1 + 1e-9)) + 1)]


def _scaled(
    points: Sequence[tuple[float, float]],
) -> tuple[list[float], list[float], tuple[float, float]]:
    """Ticks of both axes, and pixels for 1 on each."""
    most_x, most_y = (max((point[axis] for point in points), default=0.0) for axis in (0, 1))
    x_ticks, y_ticks = tick_values(most_x), tick_values(most_y)
    scale = (
        (WIDTH - LEFT - RIGHT) / max(most_x, x_ticks[-1]),
        (HEIGHT - TOP - BOTTOM) / max(most_y, y_ticks[-1]),
    )
    return x_ticks, y_ticks, scale


def _opening(x_label: str, y_label: str) -> str:
    label = escape(f"{y_label} by {x_label}", quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'


def _names(dots: Sequence[Dot], scale: tuple[float, float]) -> Iterator[str]:
    """From the lowest on, each above the one before it, so that none is written over another."""
    last = float(HEIGHT)
    for dot in sorted(dots, key=lambda dot: (dot.y, dot.x)):
        x, y = _x(dot.x, scale), min(_y(dot.y, scale) - 6, last - LINE)
        last = y
        is_right = x > (LEFT + WIDTH) / 2
        place = f'class="end" x="{x - 4:.1f}"' if is_right else f'x="{x + 4:.1f}"'
        yield f'<text {place} y="{max(y, TOP):.1f}">{escape(dot.label)}</text>'


def _x(value: float, scale: tuple[float, float]) -> float:
    return LEFT + value * scale[0]


def _y(value: float, scale: tuple[float, float]) -> float:
    return HEIGHT - BOTTOM - value * scale[1]


def _axes(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    scale: tuple[float, float],
    x_label: str,
    y_label: str,
) -> Iterator[str]:
    floor, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for tick in y_ticks:
        y = _y(tick, scale)
        yield f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>'
        yield f'<text class="end" x="{LEFT - 6}" y="{y + 4:.1f}">{tick:g}</text>'
    for tick in x_ticks:
        x = _x(tick, scale)
        yield f'<path class="grid" d="M{x:.1f} {TOP}V{floor}"/>'
        yield f'<text class="middle" x="{x:.1f}" y="{floor + 16}">{tick:g}</text>'
    yield f'<text class="end" x="{right}" y="{HEIGHT - 6}">{escape(x_label)}</text>'
    middle = (TOP + floor) // 2
    yield (
        f'<text class="middle" transform="translate(14 {middle}) rotate(-90)">'
        f"{escape(y_label)}</text>"
    )


def _line(series: Series, number: int, scale: tuple[float, float]) -> str:
    places = [(_x(x, scale), _y(y, scale)) for x, y in series.points]
    if series.is_dots:
        dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)
        return f'<path class="dots s{number}" d="{dots}"/>'
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline class="line s{number}" points="{points}"/>'


def _legend(name: str, number: int) -> str:
    x, y = LEFT + 4 + 110 * number, HEIGHT - 8
    return (
        f'<path class="line s{number}" d="M{x} {y - 4}h16"/>'
        f'<text x="{x + 22}" y="{y}">{escape(name)}</text>'
    )
