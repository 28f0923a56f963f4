"""What is logged of steps, and when the page is made anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmserve.training.log import read_log
from llmserve.training.monitor import Monitor
from llmserve.training.monitor_diagnosis import RunFacts
from llmserve.training.monitor_layers import LayerFigures
from llmserve.training.run_folder import RunFolder
from llmserve.training.trainer import StepResult

FACTS = RunFacts(passes_per_step=0.01, repeated_share=0.0, clip_norm=1.0)


def make(tmp_path: Path, *, step: int = 0) -> Monitor:
    return Monitor(
        RunFolder(tmp_path),
        FACTS,
        title="t",
        step=step,
        flops_per_token=1000,
        peak_flops=1e6,
    )


def result(loss: float, norm: float = 0.5, *, skipped: bool = False) -> StepResult:
    layers = LayerFigures({"output": norm}, {"output": 0.001})
    return StepResult(loss, norm, 1e-3, skipped, layers)


def test_line_holds_means_the_worst_step_and_the_last_steps_layers(tmp_path: Path) -> None:
    with make(tmp_path) as monitor:
        monitor.take(1, result(4.0, 0.2))
        monitor.take(2, result(9.0, 0.4))
        monitor.take(3, result(float("nan"), skipped=True))
        monitor.take(4, result(2.0, 0.6))
        counts = {0: torch.tensor([30.0, 10.0, 0.0, 0.0])}
        line = monitor.write_steps(4, tokens=100, seconds=2.0, counts=counts)
    assert line is not None
    assert line["loss"] == pytest.approx(5.0)
    assert (line["loss_max_step"], line["loss_max"]) == (2, 9.0)
    assert line["grad_norm"] == pytest.approx(0.4)
    assert line["skipped"] == 1
    assert line["tokens_per_s"] == pytest.approx(200.0)  # skipped steps read text, too
    assert line["mfu"] == pytest.approx(0.2)
    assert line["grad_norms"] == {"output": 0.6}
    assert line["expert_load"] == {"layer 0": 3.0}
    assert read_log(tmp_path / "training_log.jsonl") == [line]


def test_steps_that_were_all_skipped_make_no_line_of_their_own(tmp_path: Path) -> None:
    with make(tmp_path) as monitor:
        monitor.take(1, result(float("inf"), skipped=True))
        assert monitor.write_steps(1, tokens=1, seconds=1.0, counts={}) is None
        monitor.take(2, result(1.0))
        line = monitor.write_steps(2, tokens=1, seconds=1.0, counts={})
    assert line is not None
    assert line["skipped"] == 1  # the next line tells of them
    assert line["tokens_per_s"] == pytest.approx(1.0)


def test_page_of_a_long_log_is_made_anew_only_when_there_is_more(tmp_path: Path) -> None:
    def evaluate(monitor: Monitor, step: int) -> bool:
        """Whether the page was written."""
        (tmp_path / "training.html").unlink(missing_ok=True)
        monitor.write_evaluation(step, 2.0, {})
        return (tmp_path / "training.html").exists()

    with make(tmp_path) as monitor:
        written = [step for step in range(1, 301) if evaluate(monitor, step)]
        monitor.write_page()
    assert written[:40] == list(range(1, 41))
    assert len(written) < 160
    assert (tmp_path / "training.html").exists()
