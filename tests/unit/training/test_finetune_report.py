"""The table at the end of a fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmserve.training.finetune_report import render_finetuning

RESULT: dict[str, Any] = {
    "before": {"held_out_loss": 2.0},
    "after": {"held_out_loss": 1.0, "accuracy": 0.5},
    "train_rows": 1000,
    "held_out_rows": 10,
    "train_truncated": 3,
    "train_dropped": 1,
    "held_out_truncated": 2,
    "held_out_dropped": 0,
    "steps": 20,
    "kept_step": 10,
    "passes": 1.5,
    "seconds": 2.25,
    "parameters": 1000,
    "trained_parameters": 20,
}


def test_figures_stand_beside_those_before() -> None:
    lines = render_finetuning(RESULT, Path("run/model")).split("\n")
    assert lines[0].split() == ["held-out", "rows", "before", "after"]
    assert lines[1].split() == ["held_out_loss", "2.0000", "1.0000"]
    assert lines[2].split() == ["accuracy", "-", "0.5000"]
    assert "5, 1" in lines[4]
    assert "weights of step 10" in lines[5]
    assert "20 (2.0% of the model)" in lines[6]


def test_without_held_out_rows_there_are_no_figures() -> None:
    table = render_finetuning({**RESULT, "before": None, "after": None}, Path("run/model"))
    assert "held_out_loss" not in table
    assert "1,000 trained on" in table
