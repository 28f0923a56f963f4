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
    TrainSpeed("llmserve train", [220.0, 200.0, 180.0], [2_000_000] * 3),
    TrainSpeed("plain torch loop", [101.0, 100.0, 99.0], [4_000_000] * 3),
]


def test_ratios_are_of_all_runs_with_their_intervals() -> None:
    result = train_result(ROWS, JOB)
    ours, theirs = result["rows"]
    assert ours["median_tokens_per_s"] == 200.0
    assert "ours_over_its_tokens_per_s" not in ours
    ratio = theirs["ours_over_its_tokens_per_s"]
    assert ratio["value"] == pytest.approx(2.0, rel=0.01)
    assert 1.5 < ratio["interval"]["low"] < 2.0 < ratio["interval"]["high"] < 2.7
    assert theirs["ours_over_its_peak_bytes"]["value"] == pytest.approx(0.5)
    assert result["job"]["precision"] == "float32"
    assert "model" not in result["job"]


def test_table_has_speed_memory_and_ratios() -> None:
    _, ours, theirs = train_table(ROWS).splitlines()
    assert ours.split()[2:] == ["200", "180-220", "2", "MB"]
    speed, memory = theirs.split()[5], theirs.split()[9:]
    assert speed == "1.99"
    assert memory == ["0.50", "(0.50-0.50)"]


def test_one_repeat_has_ratios_without_intervals() -> None:
    rows = [TrainSpeed("a", [300.0], [1_000_000]), TrainSpeed("b", [100.0], [4_000_000])]
    assert train_table(rows).splitlines()[2].split() == [
        "b",
        "100",
        "100-100",
        "3.00",
        "4",
        "MB",
        "0.25",
    ]
    assert "ours_over_its_peak_bytes" not in train_result(rows, JOB)["rows"][1]


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
