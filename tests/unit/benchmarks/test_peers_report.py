"""What a comparison's rows say: ratios within rounds, bars, and the page made of the document."""

from __future__ import annotations

import pytest

from llmserve.benchmarks.peers_bars import BARS, Bar, best_peer, ratio_to, verdicts
from llmserve.benchmarks.peers_report import peers_markdown
from support.peer_rows import document, rates, row

RATE = "decode 8 tokens/s"


def test_ratio_is_that_of_the_rounds_whatever_the_machine_did_between_them() -> None:
    ours, peer = rates("llmserve native", [100.0, 10.0]), rates("llama.cpp", [50.0, 5.0])
    value, interval = ratio_to(ours, peer, RATE)
    assert value == pytest.approx(2.0)
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx((2.0, 2.0))


def test_latency_is_better_when_it_is_less() -> None:
    name = "http 1 TTFT p50 ms"
    ours, peer = row("llmserve", surface="http"), row("llama.cpp", surface="http")
    ours["figures"][name], peer["figures"][name] = [10.0], [30.0]
    assert ratio_to(ours, peer, name) == (pytest.approx(3.0), None)
    slower = row("transformers", "bf16", "http")
    slower["figures"][name] = [90.0]
    assert best_peer(ours, name, [ours, slower, peer]) is peer


@pytest.mark.parametrize(
    ("ours", "says"),
    [
        ([400.0], "reached (one round)"),
        ([420.0, 424.0, 422.0], "reached"),
        ([200.0, 800.0, 410.0], "reached, not for sure"),
        ([300.0, 300.0, 300.0], "missed by 25%"),
    ],
)
def test_verdict_says_by_how_much_and_how_sure(ours: list[float], says: str) -> None:
    rows = [rates("llmserve native", ours), rates("OpenVINO GenAI", [100.0] * len(ours))]
    [verdict] = verdicts("M", rows)
    assert verdict.says == says


def test_peer_that_counts_is_the_bars_first_engine_that_took_part() -> None:
    ours = rates("llmserve native", [400.0])
    rows = [ours, rates("llama.cpp", [300.0]), rates("transformers", [50.0], "bf16")]
    assert [v.peer for v in verdicts("M", rows)] == ["transformers bf16"]
    rows.append(rates("OpenVINO GenAI", [40.0], "int8"))
    assert [v.peer for v in verdicts("M", rows)] == ["OpenVINO GenAI int8"]


def test_same_scheme_only_where_the_bar_says_so() -> None:
    bar = Bar(figure=RATE, surface="process", times=1.0, is_same_scheme=True)
    ours = rates("llmserve native", [400.0])
    rows = [ours, rates("llama.cpp", [300.0], "int8"), rates("llama.cpp", [200.0])]
    assert best_peer(ours, RATE, rows, bar) is rows[2]


def test_another_model_has_no_bars() -> None:
    assert verdicts(None, [rates("llmserve native", [1.0]), rates("llama.cpp", [1.0])]) == []
    assert set(BARS) == {"S", "M", "L"}


def test_page_names_scheme_head_cache_and_what_was_left_out() -> None:
    ours, peer = rates("llmserve native", [400.0, 410.0]), rates("llama.cpp", [100.0, 100.0])
    failed = row("transformers", "bf16", "http")
    failed["problem"] = "it ended"
    page = peers_markdown(document([ours, peer, failed]))
    assert "| llmserve native | int4 weights, int8 head; bf16 |" in page
    assert "**4.05x**" in page
    assert "2 in process, 0 over HTTP" in page
    assert "left out: it ended." in page
    assert "reached, not for sure" not in page
    assert "    llmserve bench peers M\n" in page


def test_page_tells_bytes_of_a_step_by_the_rate_of_memory_in_the_same_round() -> None:
    ours = row("llmserve native")
    ours["figures"] = {"decode 1 tokens/s": [100.0, 50.0]}
    ours |= {"weight_bytes": 100_000_000, "token_bytes": 10_000}
    page = peers_markdown({**document([ours]), "memory_bytes_per_s": [2e10, 1e10]})
    # 160 tokens of 10 kB beside the weights: 10.16 GB/s of 20, 5.08 of 10.
    assert "| 100.0 | 1.6 | 7.18 (" in page
    assert "| 50.8 (50.8-50.8) % |" in page


def test_page_tells_how_much_a_busy_core_costs() -> None:
    ours, peer = rates("llmserve native", [100.0]), rates("llama.cpp", [90.0])
    ours["figures"]["decode 8 busy tokens/s"] = [50.0]
    page = peers_markdown({**document([ours, peer]), "busy": [8]})
    assert "| engine | weights, cache | 8 sequences |" in page
    assert "| llmserve native | int4 weights, int8 head; bf16 | 2 |" in page
    assert "| llama.cpp | int4 weights, int8 head; bf16 |  |" in page
