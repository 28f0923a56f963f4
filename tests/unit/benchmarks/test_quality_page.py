"""Size, speed and cost of forms: table and plot of one document."""

from __future__ import annotations

from typing import Any

from llmserve.benchmarks.quality_page import quality_markdown, quality_plot


def form(name: str, *, kl: float, size: int, runs: list[float] | None) -> dict[str, Any]:
    return {
        "form": name,
        "is_served": runs is not None,
        "bytes": size,
        "tokens_per_s": None if runs is None else {"1": runs, "8": [8 * run for run in runs]},
        "kl": kl,
        "kl_standard_error": kl / 10,
        "perplexity": 5.0 + kl,
    }


DOCUMENT: dict[str, Any] = {
    "date": "20261129-120000",
    "model": "m",
    "tokens": 512,
    "rows": [1, 8],
    "repeats": 2,
    "forms": [
        form("m", kl=0.0, size=4_000_000, runs=[50.0, 50.0]),
        form("m-int4, float32 activations", kl=0.1, size=1_000_000, runs=None),
        form("m-int4, integer activations", kl=0.11, size=1_000_000, runs=[100.0, 100.0]),
    ],
    "machine": {"cores": 2, "cpu": "a processor", "memory_bytes": 1 << 34},
    "command": "llmserve bench quality m m-int4 --text t.txt",
}


def test_table_has_size_speed_and_cost_of_every_form() -> None:
    page = quality_markdown(DOCUMENT, "plot.svg")
    assert "2026-11-29, 2 cores of a processor, 16 GiB" in page
    assert "| m | 4.00 | 50 (50-50) | 400 (400-400) | 0.000000 ± 0.000000 | 5.000 |" in page
    assert "| m-int4, float32 activations | 1.00 |  |  | 0.100000 ± 0.010000 | 5.100 |" in page
    assert page.endswith("(plot.svg)\n")
    assert "plot.svg" not in quality_markdown(DOCUMENT)


def test_plot_names_what_is_served_with_its_speed() -> None:
    plot = quality_plot(DOCUMENT)
    assert "int4: 100 tokens/s" in plot
    assert ">m: 50 tokens/s" in plot
    assert "float32" not in plot
