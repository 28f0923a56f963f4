"""Size, speed and cost of a model's forms as a page: one table and one plot, from the document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .machine import date_and_machine
from .plots import Dot, dot_plot, standalone
from .statistics import mean_of_runs

__all__ = ["quality_markdown", "quality_plot"]

Document = Mapping[str, Any]


def quality_markdown(document: Document, plot: str | None = None) -> str:
    """The page; `plot` is the address of the drawing, None: it has none."""
    return "\n".join(_lines(document, plot)) + "\n"


def quality_plot(document: Document) -> str:
    """An SVG file: size across, KL divergence up, each form's name and speed beside its dot."""
    dots = [
        Dot(x=form["bytes"] / 1e6, y=form["kl"], label=f"{_short(document, form)}: {_speed(form)}")
        for form in document["forms"]
        if form["is_served"]
    ]
    return standalone(dot_plot(dots, x_label="MB", y_label="KL divergence, nats a token"))


def _lines(document: Document, plot: str | None) -> Iterator[str]:
    counts = document["rows"]
    yield f"## {document['model']}"
    yield ""
    yield (
        f"{date_and_machine(document)}. KL divergence and perplexity over {document['tokens']} "
        f"tokens of held-out text; decoding is the geometric mean of {document['repeats']} "
        "interleaved rounds. `float32 activations` is what the rounded weights alone cost; the "
        "other rows are what is served."
    )
    yield ""
    yield f"    {document['command']}"
    yield ""
    heads = " | ".join(f"{count} at a time, tokens/s" for count in counts)
    yield f"| form | MB | {heads} | KL, nats a token | perplexity |"
    yield f"|---|---|{'---|' * len(counts)}---|---|"
    for form in document["forms"]:
        rates = form["tokens_per_s"] or {}
        cells = " | ".join(_rate(rates.get(str(count), ())) for count in counts)
        yield (
            f"| {form['form']} | {form['bytes'] / 1e6:.2f} | {cells} "
            f"| {form['kl']:.6f} ± {form['kl_standard_error']:.6f} | {form['perplexity']:.3f} |"
        )
    if plot is not None:
        yield ""
        yield f"![size, cost and speed of each form]({plot})"


def _short(document: Document, form: Mapping[str, Any]) -> str:
    """The form's name without the model's, and without what all dots have in common."""
    name: str = form["form"]
    return name.removeprefix(f"{document['model']}-").partition(",")[0]


def _speed(form: Mapping[str, Any]) -> str:
    runs = (form["tokens_per_s"] or {}).get("1", ())
    return f"{mean_of_runs(runs)[0]:,.0f} tokens/s" if runs else "not timed"


def _rate(runs: list[float]) -> str:
    if not runs:
        return ""
    value, interval = mean_of_runs(runs)
    return f"{value:,.0f}" + (f" ({interval.low:,.0f}-{interval.high:,.0f})" if interval else "")
