"""The certificate: what it says, and that a changed weight, scale or setting is named."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmserve.checkpoint import Checkpoint, save_model
from llmserve.cli import main
from llmserve.config import Head, ModelConfig
from llmserve.durable import write_manifest
from llmserve.errors import ConfigError, ExportError
from llmserve.export import verify
from llmserve.export.quant_options import QuantizationOptions
from llmserve.export.quantize import quantize_model
from llmserve.export.quantize_folder import quantize_folder
from llmserve.export.verify import Verification, certify, verify_folder
from llmserve.export.verify_forms import FORMS, prepare, run_form
from llmserve.manifest import read_certificate
from llmserve.model.weights import load_model
from llmserve.runners.registry import load_runner
from support.models import make_model_folder
from support.variants import VARIANTS, random_tensors

INT8 = QuantizationOptions(scheme="int8", measure=False)
INT4 = QuantizationOptions(scheme="int4", group_size=16, measure=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("run") / "model")


@pytest.fixture(scope="module")
def original_of(model: Path) -> Callable[[str], Path]:
    """The model exported in some way; each made once. Not to be changed."""

    def folder(kind: str) -> Path:
        out = model.with_name(kind)
        if not out.exists():
            _make(model, out, kind)
        return out

    return folder


def _make(model: Path, out: Path, kind: str) -> None:
    if kind == "onnx":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
        from llmserve.export.export_onnx import export_onnx

        export_onnx(model, out, scheme="int8")
    elif kind == "int4":
        quantize_folder(model, out, INT4)
    else:
        quantize_folder(model, out, INT8)


@pytest.fixture
def folder_of(original_of: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy that may be changed."""
    return lambda kind: shutil.copytree(original_of(kind), tmp_path / kind)


def flip_bit(path: Path, tensor: str) -> None:
    """One bit of the first byte of a tensor in a safetensors file."""
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    start = json.loads(data[8 : 8 + length])[tensor]["data_offsets"][0]
    data[8 + length + start] ^= 1
    path.write_bytes(data)


def test_certificate_names_the_manifest_and_every_form(
    original_of: Callable[[str], Path],
) -> None:
    folder = original_of("int8")
    certificate = read_certificate(folder)
    assert certificate is not None
    manifest = (folder / "manifest.json").read_bytes()
    assert certificate["manifest_sha256"] == hashlib.sha256(manifest).hexdigest()
    names = [form["name"] for form in certificate["forms"]]
    assert names == ["training forward", *FORMS]
    for form in certificate["forms"]:
        assert 0 < form["mean_kl"] < certificate["accepted_kl"]
        assert 0 < form["mean_logit_error"] < form["max_logit_error"]
        assert form["perplexity_low"] < form["perplexity"] < form["perplexity_high"]
    layers = [layer["name"] for layer in certificate["layers"]]
    assert layers == ["model.layers.0", "model.layers.1", "model.norm"]
    assert all(0 < layer["relative_error"] < 0.1 for layer in certificate["layers"])


@pytest.mark.parametrize("kind", ["int8", "int4", "onnx"])
def test_untouched_folder_is_verified_alone_and_says_the_same(
    folder_of: Callable[[str], Path], kind: str
) -> None:
    folder = folder_of(kind)
    before = (folder / "certificate.json").read_bytes()
    (folder / "certificate.json").unlink()
    found = verify_folder(folder)
    assert found.findings == []
    after = json.loads((folder / "certificate.json").read_bytes())
    names = [form["name"] for form in after["forms"] if form["name"] != "training forward"]
    assert [form for form in json.loads(before)["forms"] if form["name"] in names] == [
        form for form in after["forms"] if form["name"] in names
    ]


def test_same_export_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    for name in ("once", "twice"):
        quantize_folder(model, tmp_path / name, INT8)
    for path in (tmp_path / "once").iterdir():
        assert path.read_bytes() == (tmp_path / "twice" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("is_rewritten", [False, True], ids=["", "manifest rewritten"])
@pytest.mark.parametrize(
    ("kind", "tensor"),
    [
        ("int8", "model.layers.1.mlp.down_proj.weight"),
        ("int4", "model.layers.0.self_attn.q_proj.weight_scale"),
        ("int8", "model.layers.1.input_layernorm.weight"),
    ],
)
def test_flipped_bit_is_found_and_its_layer_named(
    folder_of: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    kind: str,
    tensor: str,
    is_rewritten: bool,
) -> None:
    folder = folder_of(kind)
    flip_bit(folder / "model.safetensors", tensor)
    if is_rewritten:
        write_manifest(folder)
    assert main(["verify", str(folder)]) == 1
    printed = capsys.readouterr().out
    assert f"tensor {tensor}: changed" in printed
    assert "FAILED" in printed


def test_changed_weight_of_a_graph_is_found_and_named(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("onnx")
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(folder / "model.onnx")
    name = "model.layers.1.mlp.down_proj.weight"
    tensor = next(one for one in graph.graph.initializer if one.name == name)
    values = numpy_helper.to_array(tensor).copy()
    values.flat[7] ^= 1
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    onnx.save(graph, folder / "model.onnx")
    write_manifest(folder)
    assert verify_folder(folder).findings == [f"tensor {name}: changed"]


@pytest.mark.parametrize("kind", ["int8", "onnx"])
def test_changed_rope_base_is_named(folder_of: Callable[[str], Path], kind: str) -> None:
    folder = folder_of(kind)
    values = json.loads((folder / "config.json").read_text())
    values = json.loads(json.dumps(values).replace("10000.0", "20000.0"))
    (folder / "config.json").write_text(json.dumps(values))
    write_manifest(folder)
    findings = verify_folder(folder).findings
    assert findings
    assert all("rope_theta was 10000.0, is 20000.0" in finding for finding in findings)


def test_tensors_that_come_and_go_are_named(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("int8")
    record = json.loads((folder / "reference.json").read_text())
    record["tensors"]["gone"] = record["tensors"].pop("model.norm.weight")
    (folder / "reference.json").write_text(json.dumps(record))
    write_manifest(folder)
    findings = verify_folder(folder).findings
    assert findings == ["tensor gone: missing", "tensor model.norm.weight: was not there"]


@pytest.fixture
def _wrong_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A runner that is off where tokens come one at a time."""

    def wrong(name: str, *args: Any) -> Iterator[np.ndarray]:
        for logits in run_form(name, *args):
            yield logits + (np.arange(logits.shape[1]) % 5 if name == "decode" else 0)

    monkeypatch.setattr(verify, "run_form", wrong)


@pytest.mark.usefixtures("_wrong_decodes")
def test_form_that_diverges_fails_the_export_and_leaves_nothing(
    model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=r"the form 'decode' .* diverges .* nothing was written"):
        quantize_folder(model, tmp_path / "small", INT8)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("_wrong_decodes")
def test_form_that_diverges_is_named_and_not_certified(
    original_of: Callable[[str], Path], folder_of: Callable[[str], Path]
) -> None:
    folder = folder_of("int8")
    before = (folder / "certificate.json").read_bytes()
    found = verify_folder(folder)
    assert len(found.findings) == 1
    assert "the form 'decode'" in found.findings[0]
    assert (folder / "certificate.json").read_bytes() == before


def test_folder_without_a_record_needs_the_original(model: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(model)
    tensors = quantize_model(source, "int8", None).tensors(source)
    save_model(tmp_path / "small", source.config, tensors, copy_from=model)
    with pytest.raises(ConfigError, match="--against"):
        verify_folder(tmp_path / "small")
    found = verify_folder(tmp_path / "small", against=model)
    assert not found.findings
    assert found.notes == ["no reference.json: single tensors were not compared with a record"]
    assert read_certificate(tmp_path / "small") is not None


def test_trained_folder_is_held_to_its_own_training_forward(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    found = verify_folder(folder)
    assert found.certificate is not None
    assert found.certificate.source == Checkpoint.open(folder).fingerprint
    assert all(form.max_logit_error < 1e-3 for form in found.certificate.forms)
    assert all(form.top1_agreement == 1.0 for form in found.certificate.forms)


def test_original_of_another_model_shows(model: Path, folder_of: Callable[[str], Path],
                                         tmp_path: Path) -> None:  # fmt: skip
    other = make_model_folder(tmp_path / "other", seed=5)
    assert "diverges" in verify_folder(folder_of("int8"), against=other).findings[0]


def test_certificate_of_other_files_is_not_shown(
    folder_of: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of("int8")
    (folder / "generation_config.json").write_text("{}")
    write_manifest(folder)
    with caplog.at_level(logging.WARNING, "llmserve"):
        assert read_certificate(folder) is None
    assert "certifies other files" in caplog.text
    (folder / "certificate.json").write_text("no json")
    assert read_certificate(folder) is None


@pytest.mark.onnx
def test_model_with_a_head_is_held_to_its_tensors(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from llmserve.export.export_onnx import export_onnx

    config = dataclasses.replace(VARIANTS["llama"], head=Head(kind="embedding"))
    save_model(tmp_path / "model", config, random_tensors(config))
    export_onnx(tmp_path / "model", tmp_path / "onnx")
    found = verify_folder(tmp_path / "onnx")
    assert found.findings == []
    assert found.certificate is not None
    assert found.certificate.forms == ()


@pytest.mark.parametrize(
    "config",
    [VARIANTS[name] for name in ("llama", "mistral", "gemma2", "gpt2")],
    ids=["llama", "mistral", "gemma2", "gpt2"],
)
@pytest.mark.parametrize("runner", ["torch", "native"])
def test_every_form_gives_what_the_training_forward_gives(
    tmp_path: Path, config: ModelConfig, runner: str
) -> None:
    if runner == "native":
        pytest.importorskip("llmserve.native._kernels", reason="the kernels are not built here")
    save_model(tmp_path / "model", config, random_tensors(config, scale=0.1))
    checkpoint = Checkpoint.open(tmp_path / "model")
    random = np.random.default_rng(3)
    windows = [random.integers(0, config.vocab_size, length).tolist() for length in (40, 2, 33)]
    model: Any = load_model(checkpoint, dtype=torch.float32)
    loaded: Any = load_runner(runner, checkpoint, threads=1)
    prepare(loaded, windows)
    for name in FORMS:
        for window, found in zip(windows, run_form(name, loaded, windows), strict=True):
            with torch.inference_mode():
                wanted = model(torch.tensor([window]))[0].numpy()
            np.testing.assert_allclose(found, wanted, atol=1e-4, err_msg=name)


def test_certify_needs_no_manifest_yet(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "copy")
    (folder / "manifest.json").unlink()
    certificate = certify(folder, Checkpoint.open(model))
    write_manifest(folder)
    assert read_certificate(folder) == json.loads(json.dumps(certificate.as_json()))


def test_bfloat16_original_without_a_text_writes_its_own(tmp_path: Path) -> None:
    config = dataclasses.replace(VARIANTS["llama"], dtype="bfloat16")
    save_model(tmp_path / "model", config, random_tensors(config, scale=0.05))
    quantize_folder(tmp_path / "model", tmp_path / "small", INT8)
    certificate = read_certificate(tmp_path / "small")
    assert certificate is not None
    assert certificate["origin"] == "text that the original wrote"
    assert certificate["num_tokens"] > 8


def test_page_holds_figures_and_plots_and_fetches_nothing(
    original_of: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folders = [str(original_of("int8")), str(original_of("int4"))]
    assert main(["verify", *folders, "--html", str(tmp_path / "report.html")]) == 0
    printed = capsys.readouterr().out
    assert printed.count(": verified") == 2
    assert "prefix hit" in printed
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 5, "sizes, and layers and logits of each"
    assert "<script" not in page
    assert "http" not in page
    assert "model.layers.1" in page


def test_verification_that_found_nothing_to_execute_is_rendered(tmp_path: Path) -> None:
    from llmserve.export.report_html import render_report

    found = Verification(findings=["tensor <x>: changed"], certificate=None)
    page = render_report([(tmp_path, found)])
    assert "tensor &lt;x&gt;: changed" in page
