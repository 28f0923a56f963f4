"""The comparison in a few lines: one form of ours, ratios, and every bar that was missed."""

from __future__ import annotations

from llmserve.benchmarks.peers_recorded import NOTE
from llmserve.benchmarks.peers_summary import peers_summary
from support.peer_rows import document, row


def test_each_row_is_of_the_first_scheme_beside_the_best_peer() -> None:
    rows = [
        row("llmserve native", "int4", decode_8_tokens__s=[400.0, 400.0]),
        row("llmserve native", "int8", decode_8_tokens__s=[900.0, 900.0]),
        row("llama.cpp", decode_8_tokens__s=[100.0, 100.0]),
        row("OpenVINO GenAI", "int8", decode_8_tokens__s=[200.0, 160.0]),
        row("llmserve", "int4", "http", http_8_tokens__s=[30.0]),
        row("llama.cpp", "int4", "http", http_8_tokens__s=[60.0]),
    ]
    lines = peers_summary(document(rows)).splitlines()
    assert lines[0].startswith(
        "**Model M**, ours with int4 weights, int8 head, 2026-11-28, 2 cores of a processor"
    )
    assert lines[4:6] == [
        "| decoding, 8 at a time | 400 | 179, OpenVINO GenAI int8 | 2.24 (0.542-9.23) |",
        "| over HTTP, 8 at a time | 30 | 60, llama.cpp int4 | 0.50 (one round) |",
    ]
    folded = lines.index("<details><summary>Command and versions</summary>")
    assert lines[folded + 2].startswith("`llmserve bench peers M`; ")
    assert lines[-1] == "</details>"


def test_bars_missed_are_named_for_every_scheme() -> None:
    rows = [
        row("llmserve native", "int4", decode_8_tokens__s=[500.0]),
        row("llmserve native", "int8", decode_8_tokens__s=[300.0]),
        row("OpenVINO GenAI", "int8", decode_8_tokens__s=[100.0]),
    ]
    text = peers_summary({**document(rows), "shape": "M"})
    assert "<summary>Of the 2 bars set for this model, 1 are reached; the others</summary>" in text
    missed = "- in process decode 8 tokens/s, int8: 3.00 of 4 times OpenVINO GenAI int8"
    assert [line for line in text.splitlines() if line.startswith("- ")] == [missed]


def test_a_peer_that_did_not_run_is_told_of() -> None:
    rows = [
        row("llmserve", "int4", "http", http_8_tokens__s=[100.0]),
        row("llama.cpp", "int4", "http", http_8_tokens__s=[207.0]),
    ]
    text = peers_summary({**document(rows), "shape": "M"})
    assert "| 225, vLLM bf16 (scaled, not run here) | 0.44 (one round) |" in text
    assert NOTE in text
