"""The table of predictions, from documents made by hand."""

from __future__ import annotations

from typing import Any

from llmserve.benchmarks.plan_page import plan_markdown


def document(model: str, predicted: float, measured: float, **changes: Any) -> dict[str, Any]:
    return {
        "date": "20261130-120000",
        "model": model,
        "max_num_seqs": 8,
        "input_len": 64,
        "output_len": 32,
        "loops": [
            {
                "max_concurrency": 4,
                "predicted": {"output_throughput": predicted},
                "measured": {"output_throughput": measured},
                "miss": predicted / measured - 1,
            }
        ],
        "knee": {"rate": 22.0},
        "measured_knee": {"rate": 20.0},
        "knee_miss": 0.1,
        "machine": {"cores": 2, "cpu": "a processor", "memory_bytes": 1 << 34},
        "command": f"llmserve plan {model} --check",
        **changes,
    }


def test_every_prediction_has_a_row_and_every_kind_its_misses() -> None:
    page = plan_markdown([document("m", 900.0, 1000.0), document("n", 2400.0, 2000.0)])
    lines = page.splitlines()
    assert lines[0].startswith("2026-11-30, 2 cores of a processor")
    assert "| m | 8 | 64 / 32 | 4 at a time | 900 tokens/s | 1,000 | -10.0% |" in lines
    assert "| n | 8 | 64 / 32 | highest rate in time | 22 requests/s | 20 | +10.0% |" in lines
    assert "**Highest rates, 2 settings**: off by 10.0% in the median, 10.0% at most" in page
    assert "Closed loops, 2: off by 15.0% in the median, 20.0% at most, 1 of 2 too high" in page
    assert "All together: off by 10.0% in the median, 20.0% at most, 3 of 4 too high" in page
    assert "    llmserve plan m --check" in lines


def test_rate_that_was_not_found_has_no_row() -> None:
    page = plan_markdown([document("m", 1.0, 1.0), document("n", 1.0, 1.0, knee_miss=None)])
    assert page.count("highest rate in time") == 1
    assert "Highest rates, 1 settings" in page
