"""The page about a run, `training.html`: one file that needs nothing else, not even scripts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from .monitor_chart import Series, line_chart
from .monitor_diagnosis import Finding

__all__ = ["document", "render_page"]

Lines = Sequence[dict[str, Any]]

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5b6675; --paper: #f6f7f9;
  --card: #fff; --rule: #dfe3e8; --one: #1f6feb; --two: #d1570a; --three: #6b7685; --lift: 42%;
  --fine: #1a7f37; --note: #1f6feb; --warning: #b35900; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #98a3b3; --paper: #12161c;
  --card: #1a2028; --rule: #2e3744; --one: #69a7ff; --two: #ff9e57; --three: #8b96a5; --lift: 64%;
  --fine: #57c278; --note: #69a7ff; --warning: #f0a95c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px 20px 48px; max-width: 1160px; color: var(--ink);
  background: var(--paper); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 22px; margin: 0; } h2 { font-size: 15px; margin: 0 0 6px; }
.sub { color: var(--soft); margin: 2px 0 20px; }
.figures { display: flex; flex-wrap: wrap; gap: 10px 36px; margin: 0 0 20px; }
.figures div { min-width: 84px; } .figures b { display: block; font-size: 20px; font-weight: 600;
  font-variant-numeric: tabular-nums; } .figures span { color: var(--soft); font-size: 13px; }
ul.findings { list-style: none; margin: 0 0 20px; padding: 0; display: grid; gap: 8px; }
ul.findings li { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  border-left: 4px solid var(--kind); padding: 9px 14px; }
ul.findings b { color: var(--kind); margin-right: 6px; }
.charts { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(400px, 1fr)); }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 14px 16px 10px; } svg { display: block; width: 100%; max-width: 760px; height: auto; }
section p { color: var(--soft); font-size: 13px; margin: 0 0 8px; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; } text.y { text-anchor: end; }
text.x, text.unit { text-anchor: middle; } .grid { stroke: var(--rule); }
polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 6px 0 4px; font-size: 13px;
  color: var(--soft); } .legend i { display: inline-block; width: 14px; height: 3px;
  margin-right: 6px; vertical-align: middle; border-radius: 2px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px; text-align: right; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 500; }
@media (max-width: 460px) { .charts { grid-template-columns: 1fr; } body { padding: 16px 12px; } }
"""

_WORDS = {"fine": "Fine.", "note": "Note.", "warning": "Warning."}


def document(title: str, body: str) -> str:
    """A whole page around `body`, in the reader's choice of light or dark."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>{body}</body></html>\n"
    )


def render_page(title: str, lines: Lines, findings: Sequence[Finding]) -> str:
    """The page about the run whose log has `lines`."""
    steps = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "held_out_loss" in line]
    charts = "".join(
        f"<section><h2>{name}</h2><p>{about}</p>{chart}</section>"
        for name, about, chart in _charts(steps, held_out)
    )
    done = f"{steps[-1]['step']:,} steps done" if steps else "not begun"
    return document(
        title,
        f'<header><h1>{escape(title)}</h1><p class="sub">{done}</p></header>'
        f"{_figures(steps, held_out)}{_findings(findings)}<div class='charts'>{charts}</div>",
    )


def _charts(steps: Lines, held_out: Lines) -> list[tuple[str, str, str]]:
    loss = [
        Series(label="training", points=_points(steps, "loss"), color="var(--one)"),
        Series(
            label="held out",
            points=_points(held_out, "held_out_loss"),
            color="var(--two)",
            is_dotted=True,
        ),
    ]
    plain = [
        ("Learning rate", "Of the last step of each line.", "learning_rate", "rate"),
        ("Gradient norm", "Of the whole gradient before clipping.", "grad_norm", "norm"),
        ("Speed", "Tokens trained on in a second.", "tokens_per_s", "tokens/s"),
        ("MFU", "Share of the machine's measured peak that the model's arithmetic takes.", "mfu",
         "share"),
    ]  # fmt: skip
    by_layer = [
        ("Gradient norm by layer", "Far apart: vanishing or exploding.", "grad_norms", "norm"),
        ("Update ratio by layer", "Change of the weights in a step, relative to them; around 0.001 "
         "is usual.", "update_ratios", "ratio"),
    ]  # fmt: skip
    charts = [("Loss", "Nats per token.", line_chart(loss, unit="nats"))]
    charts += [
        (name, about, line_chart([_single(steps, key)], unit=unit, is_log=key == "grad_norm"))
        for name, about, key, unit in plain
    ]
    charts += [
        (name, about, line_chart(_layers(steps, key), unit=unit, is_log=True, is_graded=True))
        for name, about, key, unit in by_layer
    ]
    dead = _layers(held_out, "dead_units")
    charts.append(
        ("Dead units by layer", "Share of the feed-forward's units that stay near zero.",
         line_chart(dead, unit="share", is_graded=True))
    )  # fmt: skip
    load = _layers(steps, "expert_load")
    if load:
        charts.append(
            ("Busiest expert by layer", "How many times its even share it gets.",
             line_chart(load, unit="times", is_graded=True))
        )  # fmt: skip
    return charts


def _single(lines: Lines, key: str) -> Series:
    return Series(label=key, points=_points(lines, key), color="var(--one)")


def _layers(lines: Lines, key: str) -> list[Series]:
    """A series for each layer, from blue at the input to red at the output."""
    names = list(dict.fromkeys(name for line in lines for name in line.get(key, ())))
    return [
        Series(
            label=name,
            points=[(line["step"], line[key][name]) for line in lines if name in line.get(key, ())],
            color=f"hsl({215 + 140 * index / max(1, len(names) - 1):.0f} 70% var(--lift))",
        )
        for index, name in enumerate(names)
    ]


def _points(lines: Lines, key: str) -> list[tuple[float, float]]:
    return [(line["step"], line[key]) for line in lines if key in line]


def _figures(steps: Lines, held_out: Lines) -> str:
    figures = []
    if steps:
        last = steps[-1]
        figures += [
            ("training loss", f"{last['loss']:.4f}"),
            ("tokens/s", f"{last['tokens_per_s']:,.0f}"),
            ("MFU", f"{last['mfu']:.1%}"),
            ("gradient norm", f"{last['grad_norm']:.3g}"),
        ]
    if held_out:
        lowest = min(held_out, key=lambda line: float(line["held_out_loss"]))
        figures.insert(1, ("held-out loss", f"{held_out[-1]['held_out_loss']:.4f}"))
        figures.insert(2, (f"lowest, at step {lowest['step']:,}", f"{lowest['held_out_loss']:.4f}"))
    items = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in figures)
    return f'<div class="figures">{items}</div>'


def _findings(findings: Sequence[Finding]) -> str:
    items = "".join(
        f'<li style="--kind: var(--{finding.kind})"><b>{_WORDS[finding.kind]}</b>'
        f"{escape(finding.text)}</li>"
        for finding in findings
    )
    return f'<ul class="findings">{items}</ul>'
