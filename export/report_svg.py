"""The plots of a report as SVG, drawn by hand: a page with them needs no other file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

__all__ = ["bar_plot", "scatter_plot"]

_WIDTH, _HEIGHT = 560, 300
_LEFT, _BOTTOM, _TOP, _RIGHT = 64, 44, 16, 16

Point = tuple[float, float]


def bar_plot(values: Sequence[tuple[str, float]], label: str) -> str:
    """One bar for each name, from zero; the name and the value on hovering."""
    largest = max((value for _, value in values), default=0.0) or 1.0
    width = (_WIDTH - _LEFT - _RIGHT) / max(1, len(values))
    bars = []
    for index, (name, value) in enumerate(values):
        height = (_HEIGHT - _TOP - _BOTTOM) * value / largest
        x, y = _LEFT + index * width, _HEIGHT - _BOTTOM - height
        bars.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(1.0, width - 2):.1f}" '
            f'height="{height:.1f}"><title>{escape(name)}: {value:.3g}</title></rect>'
        )
    axis = _text(_LEFT - 6, _TOP + 8, f"{largest:.2g}", "end")
    axis += _text(_LEFT - 6, _HEIGHT - _BOTTOM, "0", "end")
    return _svg("".join(bars) + axis, label)


def scatter_plot(
    points: Sequence[tuple[Point, str]], x_label: str, y_label: str, *, has_diagonal: bool = False
) -> str:
    """Points with a text each on hovering; the diagonal where both axes mean the same."""
    finite = [(x, y) for (x, y), _ in points if math.isfinite(x) and math.isfinite(y)]
    xs, ys = [x for x, _ in finite] or [0.0], [y for _, y in finite] or [0.0]
    if has_diagonal:
        xs = ys = [*xs, *ys]
    x_range, y_range = _range(xs), _range(ys)
    parts = []
    if has_diagonal:
        low, high = (_place((end, end), x_range, y_range) for end in x_range)
        parts.append(
            f'<line x1="{low[0]:.1f}" y1="{low[1]:.1f}" x2="{high[0]:.1f}" y2="{high[1]:.1f}"/>'
        )
    for point, title in points:
        if point not in finite:
            continue
        x, y = _place(point, x_range, y_range)
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{escape(title)}</title></circle>'
        )
    parts += [_text(_LEFT, _HEIGHT - 24, f"{x_range[0]:.3g}", "start")]
    parts += [_text(_WIDTH - _RIGHT, _HEIGHT - 24, f"{x_range[1]:.3g}", "end")]
    parts += [_text(_LEFT - 6, _HEIGHT - _BOTTOM, f"{y_range[0]:.2g}", "end")]
    parts += [_text(_LEFT - 6, _TOP + 8, f"{y_range[1]:.2g}", "end")]
    return _svg("".join(parts), f"{y_label}, against {x_label}")


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _place(point: Point, x_range: Point, y_range: Point) -> Point:
    """Where a point is on the paper."""
    x = (point[0] - x_range[0]) / (x_range[1] - x_range[0])
    y = (point[1] - y_range[0]) / (y_range[1] - y_range[0])
    return (
        _LEFT + x * (_WIDTH - _LEFT - _RIGHT),
        _HEIGHT - _BOTTOM - y * (_HEIGHT - _TOP - _BOTTOM),
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(content: str, label: str) -> str:
    frame = f'<path d="M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"/>' + _text(
        _WIDTH / 2, _HEIGHT - 6, label, "middle"
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{frame}{content}</svg>"
    )
