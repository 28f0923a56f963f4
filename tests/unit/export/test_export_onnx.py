"""`llmserve export onnx`: the folder, its check, and that it appears whole or not at all (R17)."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmserve import failpoints
from llmserve.checkpoint import Checkpoint, save_model
from llmserve.cli import main
from llmserve.durable import verify_manifest
from llmserve.export.quantize import quantize_model
from llmserve.failpoints import FailpointError
from support.models import make_model_folder

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from llmserve.export import export_onnx as module
from llmserve.export.export_onnx import export_onnx
from llmserve.export.onnx_check import ParityResult

pytestmark = pytest.mark.onnx


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.disarm_all()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("run") / "model")


def test_folder_holds_graph_config_tokenizer_figures_and_manifest(
    model: Path, tmp_path: Path
) -> None:
    stages: list[str] = []
    result = export_onnx(model, tmp_path / "onnx", on_stage=stages.append)
    assert {path.name for path in (tmp_path / "onnx").iterdir()} == {
        *("model.onnx", "config.json", "generation_config.json", "tokenizer.json"),
        *("tokenizer_config.json", "chat_template.jinja", "export.json", "lineage.json"),
        "manifest.json",
    }
    verify_manifest(tmp_path / "onnx")
    assert result.num_bytes == (tmp_path / "onnx/model.onnx").stat().st_size
    figures = json.loads((tmp_path / "onnx/export.json").read_text())
    assert figures["parity"]["max_logit_error"] == result.parity.max_logit_error <= 1e-4
    lineage = json.loads((tmp_path / "onnx/lineage.json").read_text())
    assert lineage["export"]["source"] == Checkpoint.open(model).fingerprint
    assert len(stages) == 3


def test_figures_are_printed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "onnx", str(model), "--out", str(tmp_path / "onnx")]) == 0
    printed = capsys.readouterr().out
    assert "4 prompts, 32 tokens each, same tokens, largest logit error" in printed
    assert f"ONNX graph: {tmp_path / 'onnx'}" in printed


def test_quantized_model_is_exported_dequantized_and_says_so(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Checkpoint.open(model)
    small = tmp_path / "small"
    tensors = quantize_model(source, "int4", 16).tensors(source)
    save_model(small, source.config, tensors, copy_from=model)
    assert main(["export", "onnx", str(small)]) == 0
    assert "the model's int4 weights are float32 in the graph" in capsys.readouterr().out
    assert (tmp_path / "small-onnx/model.onnx").is_file()


def test_graph_that_misses_the_tolerance_leaves_nothing(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llmserve.export.onnx_check.TOLERANCE", -1.0)
    assert main(["export", "onnx", str(model), "--out", str(tmp_path / "onnx")]) == 1
    assert "differs from the model at step 0" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_file_as_target_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "onnx", str(model), "--out", str(tmp_path / "model.onnx")]) == 2
    assert "--out names a folder" in capsys.readouterr().err


def test_package_that_is_missing_is_named(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("llmserve.export.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main(["export", "onnx", str(model)]) == 1
    assert "needs the package 'onnx'" in capsys.readouterr().err


def test_no_failed_operation_leaves_half_a_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parity = ParityResult(num_steps=1, num_prompts=1, max_logit_error=0.0)
    monkeypatch.setattr(module, "check_parity", lambda *_: parity)  # slow, and writes nothing
    monkeypatch.setattr(module, "OnnxDecoder", lambda *_: None)
    out = tmp_path / "onnx"
    failures = 0
    for turn in range(1, 500):
        failpoints.arm(f"durable.op=raise@{turn}")
        try:
            export_onnx(model, out)
            break
        except FailpointError:
            failures += 1
            if out.exists():
                verify_manifest(out)
                shutil.rmtree(out)
        finally:
            failpoints.disarm_all()
    assert failures > 20
    verify_manifest(out)
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"], "a temporary folder is left"
