"""The comparison's arithmetic and table, and the plain loop on a small run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmserve.benchmarks.train_speed import Job, TrainSpeed, train_result, train_table
from llmserve.cli import main
from support.training_runs import write_text

JOB = Job(model="m", tokens="t", batch_size=4, steps=20, threads=1, precision="float32")
ROWS = [
    TrainSpeed("llmserve train", [300.0, 200.0, 100.0], [2_000_000] * 3),
    TrainSpeed("plain torch loop", [100.0, 100.0, 100.0], [4_000_000] * 3),
]


def test_ratios_are_of_runs_of_the_same_repeat() -> None:
    result = train_result(ROWS, JOB)
    assert [row["ours_over_it"] for row in result["rows"]] == [1.0, 2.0]
    assert result["rows"][0]["median_tokens_per_s"] == 200.0
    assert result["job"]["precision"] == "float32"
    assert "model" not in result["job"]


def test_table_has_speed_memory_and_ratio() -> None:
    _, ours, theirs = train_table(ROWS).splitlines()
    assert ours.split()[2:] == ["200", "100-300", "2", "MB"]
    assert theirs.split()[3:] == ["100", "100-100", "4", "MB", "2.00"]


@pytest.mark.slow
def test_both_loops_train_the_same_shape(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = "--hidden-size 16 --num-layers 1 --num-heads 2 --num-kv-heads 1 --intermediate-size 24"
    rest = "--max-seq-len 16 --batch-size 2 --steps 30 --repeats 1 --threads 1 --precision float32"
    text = write_text(tmp_path / "text.txt")
    code = main(["bench", "train", "--text", str(text), *sizes.split(), *rest.split()])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    result = json.loads(captured.out.splitlines()[-1])
    assert [row["name"] for row in result["rows"]] == ["llmserve train", "plain torch loop"]
    assert all(row["median_tokens_per_s"] > 0 for row in result["rows"])
    assert all(row["peak_bytes"][0] > 1e8 for row in result["rows"])  # torch alone is more


def test_too_few_steps_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "train", "--text", "x", "--steps", "10"]) == 2
    assert "--steps must be above 10" in capsys.readouterr().err
