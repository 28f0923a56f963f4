"""Event files, read by TensorBoard itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmserve.training.monitor_tensorboard import EventFile, flatten


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    module: Any = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_numbers_of_a_line_are_scalars_of_its_step(tmp_path: Path) -> None:
    file = EventFile(tmp_path, first_step=1)
    file.write({"step": 10, "loss": 2.5, "grad_norms": {"layer 0": 0.5, "output": 1e-8}})
    file.write({"step": 300, "loss": 1.25, "held_out_loss": 1.5})
    file.close()
    assert read(tmp_path) == {
        "loss": [(10, 2.5), (300, 1.25)],
        "grad_norms/layer 0": [(10, 0.5)],
        "grad_norms/output": [(10, pytest.approx(1e-8))],
        "held_out_loss": [(300, 1.5)],
    }


def test_run_that_goes_on_replaces_what_it_makes_again(tmp_path: Path) -> None:
    first = EventFile(tmp_path, first_step=1)
    for step, loss in ((10, 3.0), (20, 2.0), (30, 9.0)):
        first.write({"step": step, "loss": loss})
    first.close()
    second = EventFile(tmp_path, first_step=21)
    second.write({"step": 30, "loss": 1.0})
    second.close()
    assert read(tmp_path) == {"loss": [(10, 3.0), (20, 2.0), (30, 1.0)]}


def test_flattened_line_has_only_numbers() -> None:
    line = {"step": 1, "loss": 0.5, "dead_units": {"layer 0": 0.0}, "note": "text"}
    assert dict(flatten(line)) == {"step": 1, "loss": 0.5, "dead_units/layer 0": 0.0}
