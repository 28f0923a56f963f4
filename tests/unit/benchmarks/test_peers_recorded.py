"""Recorded figures of a server that did not run, carried over by llama.cpp's ratio."""

from __future__ import annotations

from typing import Any

import pytest

from llmserve.benchmarks.peers_bars import verdicts
from llmserve.benchmarks.peers_recorded import RECORDED, SCALED, VLLM, with_recorded
from support.peer_rows import row

RATE, TTFT = "http 8 tokens/s", "http 8 TTFT p50 ms"


def server(engine: str, scheme: str, **figures: list[float]) -> Any:
    return row(engine, scheme, "http", **figures)


def llama_cpp(scheme: str, *times: float) -> dict[str, Any]:
    """llama.cpp, that many times faster than where the figures were recorded, round by round."""
    there = RECORDED["M"].llama_cpp[scheme]
    return server(
        "llama.cpp",
        scheme,
        http_8_tokens__s=[there[RATE] * factor for factor in times],
        http_8_TTFT_p50_ms=[there[TTFT] / factor for factor in times],
    )


def test_each_round_is_scaled_by_what_llama_cpp_did_in_it() -> None:
    *_, added = with_recorded("M", [llama_cpp("int4", 2.0, 0.5)])
    assert (added["engine"], added["scheme"], added["is_ours"]) == (VLLM, SCALED, False)
    there = RECORDED["M"].vllm
    assert added["figures"][RATE] == pytest.approx([2 * there[RATE], there[RATE] / 2])
    assert added["figures"][TTFT] == pytest.approx([there[TTFT] / 2, 2 * there[TTFT]])
    assert added["figures"]["http 1 tokens/s"] == []  # llama.cpp was not asked one at a time


def test_several_schemes_count_by_their_geometric_mean() -> None:
    *_, added = with_recorded("M", [llama_cpp("int4", 4.0), llama_cpp("int8", 1.0)])
    assert added["figures"][RATE] == pytest.approx([2 * RECORDED["M"].vllm[RATE]])


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ("S", [llama_cpp("int4", 1.0)]),
        (None, [llama_cpp("int4", 1.0)]),
        ("L", [llama_cpp("int4", 1.0)]),  # only int8 was recorded
        ("M", [server("transformers", "bf16", http_8_tokens__s=[100.0])]),
        ("M", [llama_cpp("int4", 1.0), server(VLLM, "bf16", http_8_tokens__s=[100.0])]),
    ],
    ids=["shape unknown", "no shape", "other scheme", "no llama.cpp", "vLLM ran"],
)
def test_nothing_is_added_where_it_is_not_known_or_not_needed(shape: Any, rows: Any) -> None:
    assert with_recorded(shape, rows) == rows


def test_a_vllm_that_failed_is_stood_in_for() -> None:
    failed = server(VLLM, "bf16")
    assert with_recorded("M", [llama_cpp("int4", 1.0), failed])[-1]["scheme"] == SCALED


def test_its_figures_count_in_the_bars() -> None:
    ours = server("llmserve", "int4", http_8_tokens__s=[1800.0])
    rows = with_recorded("M", [ours, llama_cpp("int4", 1.0)])
    rate = next(verdict for verdict in verdicts("M", rows) if verdict.bar.figure == RATE)
    assert rate.peer == "vLLM bf16 (scaled, not run here)"
    assert rate.ratio == pytest.approx(8.0)
