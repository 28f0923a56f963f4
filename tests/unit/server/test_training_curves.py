from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llmserve.lineage import TRAINING_LOG
from llmserve.server.training_curves import MAX_POINTS, read_curves


def write(folder: Path, lines: list[object]) -> Path:
    (folder / TRAINING_LOG).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_losses_and_held_out_losses_are_curves_of_their_own(tmp_path: Path) -> None:
    lines: list[object] = [
        {"step": 10, "loss": 4.0, "grad_norm": 1.0},
        {"step": 10, "held_out_loss": 3.9},
        {"step": 20, "loss": 3.0},
    ]
    assert read_curves(write(tmp_path, lines)) == {
        "loss": [(10, 4.0), (20, 3.0)],
        "held_out_loss": [(10, 3.9)],
    }


@pytest.mark.parametrize("count", [1, MAX_POINTS, MAX_POINTS + 1, 7919])
def test_a_long_curve_keeps_its_ends_and_its_shape(tmp_path: Path, count: int) -> None:
    losses = 2 + np.exp(-np.arange(count) / 500)
    lines = [{"step": step, "loss": float(loss)} for step, loss in enumerate(losses)]
    curves = read_curves(write(tmp_path, list(lines)))
    assert curves is not None
    points = curves["loss"]
    assert len(points) == min(count, len(points)) <= MAX_POINTS
    assert points[-1] == (count - 1, losses[-1])
    steps, values = np.array(points).T
    assert (np.diff(steps) > 0).all()
    assert np.allclose(values, 2 + np.exp(-steps / 500), atol=1e-3)


@pytest.mark.parametrize(
    "line", ["not json", '{"step": 1, "loss": NaN}', '{"step": "1", "loss": 2.0}', '{"loss": 1.0}']
)
def test_a_broken_log_is_told_and_serves_no_curves(
    tmp_path: Path, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / TRAINING_LOG).write_text(line + "\n")
    assert read_curves(tmp_path) is None
    assert TRAINING_LOG in caplog.text


def test_a_folder_without_a_log_has_no_curves(tmp_path: Path) -> None:
    assert read_curves(tmp_path) is None
    assert read_curves(write(tmp_path, [{"step": 1, "skipped": 2}])) is None
