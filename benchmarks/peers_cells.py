"""How figures and their intervals are written in the tables of the comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .statistics import Interval

__all__ = ["shown_number", "shown_range", "shown_versions"]


def shown_versions(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every package or program of the rows, by name."""
    found = {name: version for row in rows for name, version in row["versions"].items() if version}
    return [f"{name} {version}" for name, version in sorted(found.items())]


def shown_number(value: float) -> str:
    """To three digits, or to the whole."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def shown_range(interval: Interval | None) -> str:
    """` (low-high)`; empty where there is none."""
    if interval is None:
        return ""
    return f" ({shown_number(interval.low)}-{shown_number(interval.high)})"
