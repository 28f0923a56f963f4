"""A comparison of variants as a table on the terminal and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .monitor_chart import Series, line_chart
from .monitor_page import document

__all__ = ["Compared", "render_comparison", "render_comparison_page"]

_HEAD = ("variant", "loss", "against base", "bits/byte", "parameters", "steps", "tokens/s", "time")


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What training one variant gave; means where there are several seeds."""

    name: str
    """The variant's."""
    held_out_loss: float
    """Nats per token at the end."""
    held_out_losses: tuple[float, ...]
    """The same for each seed."""
    bits_per_byte: float
    """Of the held-out text."""
    parameters: int
    """Weights, those of idle experts too."""
    steps: int
    """Optimizer steps, for equal operations."""
    flops: float
    """Operations of the whole training."""
    seconds: float
    """Time in optimizer steps."""
    tokens_per_s: float
    """Tokens trained on in a second."""
    curve: tuple[tuple[float, float], ...]
    """Share of the training done and held-out loss, at evaluations; of the first seed."""


def render_comparison(figures: Sequence[Compared]) -> str:
    """The table, best first."""
    rows = [_HEAD, *_rows(figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def render_comparison_page(figures: Sequence[Compared]) -> str:
    """The page: held-out loss over the share of the compute, and the table."""
    series = [
        Series(
            label=one.name,
            points=[(100 * share, loss) for share, loss in one.curve],
            color="var(--ink)"
            if one.name == "base"
            else f"hsl({360 * index / len(figures):.0f} 70% var(--lift))",
            is_dotted=True,
        )
        for index, one in enumerate(figures)
    ]
    head = "".join(f"<th>{name}</th>" for name in _HEAD)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in _rows(figures)
    )
    chart = line_chart(series, unit="held-out loss, nats", across="% of the compute")
    return document(
        "Comparison of variants",
        '<header><h1>Comparison of variants</h1><p class="sub">Each changes one thing of the base '
        f"and takes the same {figures[0].flops:.3g} floating-point operations.</p></header>"
        f'<section>{chart}</section><br><section class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></section>",
    )


def _rows(figures: Sequence[Compared]) -> list[tuple[str, ...]]:
    base = figures[0].held_out_loss
    return [
        (
            one.name,
            _with_range(one),
            "" if one.name == "base" else f"{one.held_out_loss - base:+.4f}",
            f"{one.bits_per_byte:.4f}",
            f"{one.parameters:,}",
            f"{one.steps:,}",
            f"{one.tokens_per_s:,.0f}",
            f"{one.seconds:.0f} s",
        )
        for one in sorted(figures, key=lambda one: one.held_out_loss)
    ]


def _with_range(one: Compared) -> str:
    """The mean loss, with the distance of the farthest seed where there are several."""
    if len(one.held_out_losses) == 1:
        return f"{one.held_out_loss:.4f}"
    farthest = max(abs(loss - one.held_out_loss) for loss in one.held_out_losses)
    return f"{one.held_out_loss:.4f} ±{farthest:.4f}"
