"""The picture of the loss curve."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from llmserve.errors import MissingDependencyError
from llmserve.training.curve import draw_loss_curve

LINES = [{"step": 10, "loss": 3.0}, {"step": 10, "held_out_loss": 3.1}, {"step": 20, "loss": 2.0}]


def test_same_log_gives_the_same_picture(tmp_path: Path) -> None:
    draw_loss_curve(tmp_path / "a.png", LINES, unigram_loss=5.0)
    draw_loss_curve(tmp_path / "b.png", LINES, unigram_loss=5.0)
    draw_loss_curve(tmp_path / "c.png", LINES[:1], unigram_loss=5.0)
    first, second, other = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert first.startswith(b"\x89PNG")
    assert first == second != other


def test_missing_matplotlib_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"llmserve\[train\]"):
        draw_loss_curve(tmp_path / "a.png", LINES)
