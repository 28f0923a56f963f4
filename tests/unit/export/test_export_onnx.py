"""`llmserve export onnx`: the folder, its check, and that it appears whole or not at all (R17)."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from llmserve import failpoints
from llmserve.checkpoint import Checkpoint, save_model
from llmserve.cli import main
from llmserve.config import ModelConfig
from llmserve.durable import verify_manifest
from llmserve.errors import ExportError
from llmserve.export.quantize import Scheme, quantize_model
from llmserve.manifest import read_certificate
from support.foreign_folders import FOREIGN, write_foreign_folder
from support.models import make_model_folder
from support.variants import VARIANTS, random_tensors

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx

from llmserve.export.export_onnx import export_onnx

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
        *("genai_config.json", "manifest.json", "reference.json", "reference.logits"),
        "certificate.json",
    }
    verify_manifest(tmp_path / "onnx")
    assert result.num_bytes == (tmp_path / "onnx/model.onnx").stat().st_size
    figures = json.loads((tmp_path / "onnx/export.json").read_text())
    assert figures["parity"]["max_logit_error"] == result.parity.max_logit_error <= 1e-4
    lineage = json.loads((tmp_path / "onnx/lineage.json").read_text())
    assert lineage["export"]["source"] == Checkpoint.open(model).fingerprint
    assert stages[:3] == [
        "building the graph", "checking its form", "comparing it with torch, token by token"
    ]  # fmt: skip


def test_figures_are_printed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "onnx", str(model), "--out", str(tmp_path / "onnx")]) == 0
    printed = capsys.readouterr().out
    assert "12 prompts, 64 tokens each, largest logit error" in printed
    assert "same likeliest token at 100.00 %" in printed
    assert f"ONNX graph: {tmp_path / 'onnx'}" in printed


def quantized(
    model: Path, folder: Path, scheme: Scheme, group_size: int | None, *, is_symmetric: bool = True
) -> Path:
    source = Checkpoint.open(model)
    small = quantize_model(source, scheme, group_size, is_symmetric=is_symmetric)
    save_model(folder, source.config, small.tensors(source), copy_from=model)
    return folder


@pytest.mark.parametrize("is_symmetric", [True, False], ids=["", "zero points"])
@pytest.mark.parametrize(
    ("scheme", "group_size"), [("int8", None), ("int8", 16), ("int4", 16), ("int4", None)]
)
@pytest.mark.usefixtures("quick_certificate")
def test_quantized_model_keeps_its_integers(
    model: Path, tmp_path: Path, scheme: Scheme, group_size: int | None, is_symmetric: bool
) -> None:
    small = quantized(model, tmp_path / "small", scheme, group_size, is_symmetric=is_symmetric)
    result = export_onnx(small, tmp_path / "o")
    assert result.form == f"{scheme} weights, int8 activations, int8 head"
    assert not result.float_layers
    assert result.parity is not None
    assert result.parity.mean_kl < 0.02
    graph = onnx.load(tmp_path / "o/model.onnx").graph
    ops = [node.op_type for node in graph.node]
    in_blocks = (scheme, group_size, is_symmetric) != ("int8", None, True)
    assert ops.count("MatMulNBits") == (8 if in_blocks else 0)
    assert ops.count("MatMulInteger") == (1 if in_blocks else 9)
    zeros = [one.name for one in graph.initializer if one.name.endswith(".zero_point")]
    assert len(zeros) == (0 if is_symmetric else 8)
    assert "DynamicQuantizeLinear" not in ops


@pytest.mark.parametrize("form", FOREIGN)
@pytest.mark.usefixtures("quick_certificate")
def test_folders_of_others_keep_their_integers(tmp_path: Path, form: Any) -> None:
    write_foreign_folder(tmp_path / "model", form)
    result = export_onnx(tmp_path / "model", tmp_path / "onnx")
    assert bool(result.float_layers) is (form in ("gptq-order", "g_idx"))


def test_groups_that_the_graph_has_no_product_for_are_float32_and_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = quantized(model, tmp_path / "small", "int4", 8)
    assert main(["export", "onnx", str(small)]) == 0
    printed = capsys.readouterr().out
    assert "float32, as the graph has no product for their form: model.layers.0" in printed
    assert "and 10 more" in printed


def test_scheme_that_is_not_the_folders_own_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = quantized(model, tmp_path / "small", "int4", 16)
    assert main(["export", "onnx", str(small), "--scheme", "int8"]) == 2
    assert "is quantized already (int4)" in capsys.readouterr().err
    assert not (tmp_path / "small-onnx").exists()


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_weights_are_rounded_as_the_scheme_says(
    model: Path, tmp_path: Path, scheme: Literal["int8", "int4"]
) -> None:
    result = export_onnx(model, tmp_path / "onnx", scheme=scheme)
    assert result.parity is not None
    assert 0 < result.parity.mean_kl < 0.02
    assert result.parity.top1_agreement > 0.85
    figures = json.loads((tmp_path / "onnx/export.json").read_text())
    assert figures["scheme"] == scheme


def test_weight_that_is_not_a_number_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(model)
    tensors = {name: source.float32(name).copy() for name in source.names()}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    save_model(tmp_path / "bad", source.config, tensors)
    with pytest.raises(ExportError, match=r"model\.layers\.1\.mlp\.up_proj"):
        export_onnx(tmp_path / "bad", tmp_path / "onnx", scheme="int8")
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize(
    ("hidden_size", "num_heads", "vocab_size"), [(48, 6, 105), (172, 4, 361), (288, 6, 105)]
)
def test_odd_shapes(tmp_path: Path, hidden_size: int, num_heads: int, vocab_size: int) -> None:
    config = ModelConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, num_layers=1, num_heads=num_heads,
        num_kv_heads=2, head_dim=hidden_size // num_heads - hidden_size // num_heads % 2,
        intermediate_size=3 * hidden_size // 2 + 1, max_seq_len=64,
    )  # fmt: skip
    tensors = random_tensors(config, scale=0.1)
    tensors["model.layers.0.self_attn.o_proj.weight"][:] = 0.0
    tensors["model.layers.0.mlp.gate_proj.weight"][0, 0] = 1e4
    save_model(tmp_path / "model", config, tensors)
    for scheme in ("fp32", "int4"):
        export_onnx(tmp_path / "model", tmp_path / scheme, scheme=scheme)


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


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt2"])
def test_every_form_of_a_graph_is_what_the_training_forward_is(tmp_path: Path, name: str) -> None:
    """Windows, caps and learned positions on the runner itself, in chunks, batches and decoding."""
    config = VARIANTS[name]
    save_model(tmp_path / "model", config, random_tensors(config, scale=0.1))
    export_onnx(tmp_path / "model", tmp_path / "onnx")
    certificate = read_certificate(tmp_path / "onnx")
    assert certificate is not None
    forms = {form["name"]: form for form in certificate["forms"]}
    assert {"paged", "chunked", "decode", "batched"} < forms.keys()
    assert "prefix hit" not in forms
    assert all(form["max_logit_error"] < 1e-4 for form in forms.values())
