"""`llmserve bench offline` from model to table: our engine and transformers in their processes."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from llmserve.benchmarks.shapes import SHAPES, make_model
from llmserve.cli import main

pytest.importorskip("transformers")

CONFIG = dataclasses.replace(
    SHAPES["S"], vocab_size=400, hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1,
    head_dim=32, intermediate_size=96,
)  # fmt: skip
SMALL = ("--prefill-len", "24", "--input-len", "8", "--output-len", "4", "--sequences", "1,3")


@pytest.mark.slow
def test_both_are_timed_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tmp_path / "model")
    make_model(CONFIG, tmp_path / "model")
    assert main(["quantize", model, "--scheme", "int8", "--no-measure"]) == 0
    capsys.readouterr()
    command = ["bench", "offline", model, "--schemes", "int8", "--runner", "torch", *SMALL]
    assert main([*command, "--transformers", sys.executable, "--repeats", "2"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    ours, theirs = result["rows"]
    assert (ours["engine"], ours["scheme"]) == ("llmserve torch", "int8")
    assert "int8 weights" in ours["weights"]
    assert (theirs["engine"], theirs["scheme"]) == ("transformers", "bf16")
    assert theirs["versions"]["transformers"]
    for row in (ours, theirs):
        assert list(row["measurements"]) == ["prefill 24", "decode 1", "decode 3"]
        assert all(len(taken["runs"]) == 2 for taken in row["measurements"].values())
        assert all(min(taken["runs"]) > 0 for taken in row["measurements"].values())
    assert ours["over_best_peer"].keys() == ours["measurements"].keys()
    assert any(line.startswith("transformers: bf16, bf16 head, bf16 cache") for line in table)


def test_peer_that_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model(CONFIG, tmp_path / "model")
    command = ["bench", "offline", str(tmp_path / "model"), "--schemes", "bf16", *SMALL]
    assert main([*command, "--runner", "torch", "--llama-cpp", str(tmp_path)]) == 2
    assert "model-bf16.gguf is missing" in capsys.readouterr().err
