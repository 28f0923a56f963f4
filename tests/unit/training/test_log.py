"""The training log across a crash."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmserve.training.log import TrainingLog, read_log


def test_lines_after_the_checkpoint_go_when_a_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with TrainingLog(path, last_step=0) as log:
        for step in (10, 20, 30):
            log.write({"step": step, "loss": 1 / step})
    with TrainingLog(path, last_step=20) as log:
        log.write({"step": 30, "loss": 0.5})
    assert [line["step"] for line in read_log(path)] == [10, 20, 30]
    assert read_log(path)[-1]["loss"] == 0.5


def test_torn_last_line_is_no_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 10, "loss": 1.0}\n{"step": 20, "lo')
    assert read_log(path) == [{"step": 10, "loss": 1.0}]
    with TrainingLog(path, last_step=10):
        pass
    assert path.read_bytes() == b'{"step": 10, "loss": 1.0}\n'


def test_value_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path / "log.jsonl", last_step=0)
    with log, pytest.raises(ValueError, match="JSON"):
        log.write({"step": 1, "loss": float("nan")})
