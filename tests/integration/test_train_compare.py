"""`llmserve train compare` on a small text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmserve.cli import main
from llmserve.training import finish
from support.training_runs import SEPARATOR, write_picture, write_text

TINY = [
    *("--vocab-size", "300", "--held-out", "0.1", "--hidden-size", "16", "--num-layers", "2"),
    *("--num-heads", "2", "--num-kv-heads", "1", "--intermediate-size", "24"),
    *("--max-seq-len", "16", "--batch-size", "4", "--warmup-steps", "2"),
    *("--precision", "float32", "--threads", "1", "--evaluate-every", "4"),
]


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "draw_loss_curve", write_picture)


def compare(tmp_path: Path, *options: str) -> int:
    text = write_text(tmp_path / "text.txt")
    arguments = ["--text", str(text), "--separator", SEPARATOR, "--out", str(tmp_path / "out")]
    return main(["train", "compare", *arguments, "--quiet", *TINY, *options])


def test_variants_are_trained_printed_and_plotted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--steps", "12", "--vary", "heads", "experts", "--seeds", "2", "--json"]
    assert compare(tmp_path, *options) == 0
    figures = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in figures] == [
        "base",
        "heads-mha",
        "experts-moe4",
        "experts-moe8",
    ]
    assert len({round(one["flops"] / figures[0]["flops"], 1) for one in figures}) == 1
    for one in figures:
        result = json.loads((tmp_path / "out" / one["name"] / "result.json").read_text())
        assert one["held_out_losses"][0] == result["held_out_loss"]
        assert len(one["held_out_losses"]) == 2
        assert one["curve"][-1] == [1.0, pytest.approx(result["held_out_loss"], rel=1e-5)]
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert page.count("<polyline") == 4
    assert "experts-moe8" in page
    trained = (tmp_path / "out" / "base" / "result.json").stat().st_mtime_ns
    assert compare(tmp_path, *options[:-1]) == 0  # all are there: the table again
    table = capsys.readouterr().out
    assert "against base" in table
    assert (tmp_path / "out" / "base" / "result.json").stat().st_mtime_ns == trained


def test_minutes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(tmp_path, "--minutes", "1") == 2
    assert "needs steps" in capsys.readouterr().err
