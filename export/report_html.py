"""Verifications as one page that needs nothing else: no script, no other file, nothing fetched."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from .certificate import Certificate, FormResult
from .report_svg import bar_plot, scatter_plot
from .verify import Verification

__all__ = ["render_report"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #8885 }
td:first-child, th:first-child, td:last-child, th:last-child { text-align: left }
svg { width: 100%; max-width: 35rem; font-size: 11px; fill: currentColor }
svg path, svg line { fill: none; stroke: #8889 } svg rect, svg circle { fill: #2f6fb5 }
.failed { color: #b3261e } .plots { display: flex; flex-wrap: wrap; gap: 1rem }
@media (prefers-color-scheme: dark) { body { background: #16181c; color: #e6e6e6 } }
"""

Result = tuple[Path, Verification]


def render_report(results: Sequence[Result]) -> str:
    """The page of one or more folders; with several, their sizes and divergences in one plot."""
    sections = "".join(_section(path, found) for path, found in results)
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>llmserve verify</title>"
        f"<style>{_STYLE}</style><h1>What each served form is beside the original</h1>"
        f"<h2>Size against divergence</h2>{_sizes(results)}{sections}</html>\n"
    )


def _sizes(results: Sequence[Result]) -> str:
    points = []
    for path, found in results:
        certificate = found.certificate
        if certificate is None:
            continue
        for form in certificate.forms:
            size = certificate.weight_bytes / 1e6
            title = f"{path.name}, {form.name}: {size:.2f} MB, {form.mean_kl:.3g} nats"
            points.append(((size, form.mean_kl), title))
        original = certificate.source_weight_bytes / 1e6
        points.append(((original, 0.0), f"the original of {path.name}: {original:.2f} MB"))
    return scatter_plot(points, "MB of weights", "mean KL, nats a token")


def _section(path: Path, found: Verification) -> str:
    verdict = "failed" if found.findings else "verified"
    lines = [f"<h2 class='{verdict}'>{escape(str(path))}: {verdict}</h2>"]
    lines += [f"<p class='failed'>{escape(finding)}</p>" for finding in found.findings]
    lines += [f"<p>{escape(note)}</p>" for note in found.notes]
    if found.certificate is not None and found.certificate.forms:
        lines += [_table(found.certificate), _plots(found.certificate)]
    return "".join(lines)


def _table(certificate: Certificate) -> str:
    heads = (
        "form", "max logit error", "mean", "KL, nats", "same top-1", "perplexity", "95 %",
        "executed as",
    )  # fmt: skip
    rows = "".join(_row(form) for form in certificate.forms)
    facts = (
        f"Read: {certificate.origin}, {certificate.num_tokens} tokens. The original's perplexity "
        f"is {certificate.source_perplexity:.4f}. Accepted divergence: "
        f"{certificate.accepted_kl:g} nats a token. Manifest or file "
        f"{certificate.manifest_sha256}, original {certificate.source}."
    )
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f"<p>{escape(facts)}</p><table><tr>{head}</tr>{rows}</table>"


def _row(form: FormResult) -> str:
    cells = (
        form.name,
        f"{form.max_logit_error:.2e}",
        f"{form.mean_logit_error:.2e}",
        f"{form.mean_kl:.3e}",
        f"{100 * form.top1_agreement:.2f} %",
        f"{form.perplexity:.4f}",
        f"{form.perplexity_low:.4f} to {form.perplexity_high:.4f}",
        form.executed_form,
    )
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _plots(certificate: Certificate) -> str:
    worst = max(certificate.forms, key=lambda form: form.mean_kl)
    points = [((x, y), f"original {x}, {worst.name} {y}") for x, y in worst.scatter]
    scatter = scatter_plot(
        points, "the original's logit", f"logit of the form {worst.name}", has_diagonal=True
    )
    layers = [(layer.name, layer.relative_error) for layer in certificate.layers]
    bars = bar_plot(layers, "relative error of each block's output, weights alone")
    return f"<div class='plots'><div>{bars}</div><div>{scatter}</div></div>"
