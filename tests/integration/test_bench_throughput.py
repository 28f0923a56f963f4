"""`llmserve bench throughput` on a real checkpoint, with the plain loop beside the engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmserve.cli import main

pytestmark = pytest.mark.shared

SMALL = ("--num-prompts", "2", "--input-len", "4", "--output-len", "4", "--repeats", "1")


def test_every_setting_is_timed_and_reported(
    stories260k: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", "throughput", str(stories260k), *SMALL]
    assert main([*arguments, "--concurrency", "1,2", "--baseline", "plain"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert [row["concurrency"] for row in result["concurrency"]] == [1, 2]
    assert all(row["output_throughput"] > 0 for row in result["concurrency"])
    assert result["plain"]["output_throughput"] > 0
    assert result["one_stream_over_plain"] == pytest.approx(
        result["concurrency"][0]["output_throughput"] / result["plain"]["output_throughput"]
    )
    assert result["executed_form"].startswith("float32")
    assert any(line.startswith("plain loop") for line in table)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input-len", "509", "--concurrency", "1"], "the model's context is 512"),
        (
            ["--num-prompts", "4000", "--concurrency", "4000", "--output-len", "508"],
            "the KV cache holds",
        ),
    ],
)
def test_load_that_does_not_fit_is_refused(
    stories260k: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "throughput", str(stories260k), *SMALL, *arguments]) == 2
    assert message in capsys.readouterr().err
