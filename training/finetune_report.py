"""The table at the end of a fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["render_finetuning"]


def render_finetuning(result: dict[str, Any], model: Path) -> str:
    """Figures on the held-out rows before and after, and what it took."""
    before, after = result["before"] or {}, result["after"] or {}
    rows = [(name, _number(before.get(name)), _number(value)) for name, value in after.items()]
    lines = [("held-out rows", "before", "after"), *rows] if rows else []
    share = result["trained_parameters"] / result["parameters"]
    facts = [
        ("rows", f"{result['train_rows']:,} trained on, {result['held_out_rows']:,} held out"),
        ("cut, left out", f"{_both(result, 'truncated')}, {_both(result, 'dropped')}"),
        (
            "training",
            f"{result['steps']} steps, {result['passes']:.1f} passes, {result['seconds']:.1f} s; "
            f"weights of step {result['kept_step']}",
        ),
        ("weights trained", f"{result['trained_parameters']:,} ({share:.1%} of the model)"),
        ("model", str(model)),
    ]
    width = max(len(row[0]) for row in (*lines, *facts))
    table = [f"{name:<{width}}  {old:>10}  {new:>10}" for name, old, new in lines]
    return "\n".join([*table, *(f"{name:<{width}}  {value}" for name, value in facts)])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _both(result: dict[str, Any], what: str) -> int:
    total: int = result[f"train_{what}"] + result[f"held_out_{what}"]
    return total
