"""The report of a quantization as text for a terminal."""

from __future__ import annotations

from .measure import Comparison
from .quant_report import LayerReport, QuantizationReport

__all__ = ["format_report"]


def format_report(report: QuantizationReport, *, layers: bool = False) -> str:
    """A table of what changed; with `layers`, one line for each layer before it."""
    sections = [_layer_lines(report.layers)] if layers else []
    sections.append(_summary(report))
    sections.append(_remarks(report))
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _summary(report: QuantizationReport) -> list[str]:
    found = report.comparison
    return [
        _row("", "before", "after"),
        _row("size of the weights", _size(report.bytes_before), _size(report.bytes_after)),
        *([] if found is None else _before_and_after(found)),
        _row("bits per weight", "", f"{report.bits_per_weight:.3f}"),
        *(["quality: not measured"] if found is None else _differences(found)),
        *([] if report.cache_comparison is None else _with_cache(report.cache_comparison)),
    ]


def _before_and_after(found: Comparison) -> list[str]:
    return [
        _row("perplexity", f"{found.perplexity_before:.4f}", f"{found.perplexity_after:.4f}"),
        _row("loss, nats per token", f"{found.loss_before:.5f}", f"{found.loss_after:.5f}"),
    ]


def _differences(found: Comparison) -> list[str]:
    return [
        _row("KL divergence, nats", "", f"{found.mean_kl:.6f}", _margin(found.kl_margin)),
        _row("same likeliest token", "", f"{found.top1_agreement:.2%}"),
        _row("largest logit error", "", f"{found.max_logit_error:.4f}"),
        _row("tokens measured", "", str(found.num_tokens)),
    ]


def _with_cache(found: Comparison) -> list[str]:
    return [
        "with the int8 KV cache:",
        _row("perplexity", f"{found.perplexity_before:.4f}", f"{found.perplexity_after:.4f}"),
        _row("KL divergence, nats", "", f"{found.mean_kl:.6f}", _margin(found.kl_margin)),
    ]


def _remarks(report: QuantizationReport) -> list[str]:
    lines = [f"note: {note}" for note in report.notes]
    if report.left_as_they_are:
        lines.append(f"left as they are: {', '.join(report.left_as_they_are)}")
    if report.rescaled:
        lines.append(f"rescaled with the layers after them: {len(report.rescaled)} norms or biases")
    return lines


def _layer_lines(layers: tuple[LayerReport, ...]) -> list[str]:
    width = max(len(layer.name) for layer in layers)
    head = (
        f"{'layer':<{width}}  {'shape':>13}  {'form':>8}  {'group':>5}  {'bits':>6}  max error  "
        "relative"
    )
    return [head, *(_layer_line(layer, width) for layer in layers)]


def _layer_line(layer: LayerReport, width: int) -> str:
    shape = f"{layer.shape[0]}x{layer.shape[1]}"
    return (
        f"{layer.name:<{width}}  {shape:>13}  {layer.form:>8}  {layer.group_size or 'row':>5}  "
        f"{layer.bits_per_weight:>6.2f}  {layer.max_error:>9.2e}  {layer.relative_error:>8.5f}"
    )


def _row(label: str, before: str, after: str, margin: str = "") -> str:
    return f"{label:<24}{before:>14}{after:>14}{margin}"


def _margin(margin: float | None) -> str:
    return "" if margin is None else f" ± {margin:.6f}"


def _size(num_bytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes} B"
