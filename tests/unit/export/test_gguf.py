"""`llmserve export gguf`: what stands in the file, against a reader and a model of its own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from llmserve.checkpoint import Checkpoint, save_model
from llmserve.cli import main
from llmserve.config import Head, ModelConfig
from llmserve.errors import ConfigError, ExportError
from llmserve.export.gguf import export_gguf
from llmserve.export.gguf_blocks import BlockType
from llmserve.export.quantize import quantize_model
from llmserve.model.weights import load_model
from llmserve.text.tokenizer import Tokenizer
from support.gguf_reader import read_gguf, run_llama
from support.models import TEXT, make_model_folder
from support.variants import LLAMA, VARIANTS, random_tensors

IDS = [1, 17, 3, 3, 40, 9, 22, 65, 0, 5, 31]
FILES = Tokenizer.train("char", [TEXT], vocab_size=300).files()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("run") / "model")


def save(folder: Path, config: ModelConfig, *, seed: int = 0) -> Path:
    """A model folder with random weights, and a tokenizer of 300 tokens at most."""
    config = dataclasses.replace(config, vocab_size=300, eos_token_ids=(2, 5))
    save_model(folder, config, random_tensors(config, seed=seed), extra_files=FILES)
    return folder


@torch.inference_mode()
def torch_logits(folder: Path) -> np.ndarray:
    logits: np.ndarray = load_model(Checkpoint.open(folder))(torch.tensor([IDS]))[0].numpy()
    return logits


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("llama")])
def test_file_run_as_llama_cpp_does_gives_our_logits(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", VARIANTS[name])
    export_gguf(folder, tmp_path / "model.gguf", kind="f32")
    found = run_llama(read_gguf(tmp_path / "model.gguf"), IDS)
    np.testing.assert_allclose(found, torch_logits(folder), atol=2e-4)


@pytest.mark.parametrize(("kind", "bits"), [("q8_0", 8), ("q4_0", 4)])
def test_blocks_are_within_half_a_step_of_the_weights(
    model: Path, tmp_path: Path, kind: BlockType, bits: int
) -> None:
    source = Checkpoint.open(model)
    result = export_gguf(model, tmp_path / "model.gguf", kind=kind)
    file = read_gguf(tmp_path / "model.gguf")
    assert file.types["blk.0.ffn_up.weight"] == kind
    assert file.types["token_embd.weight"] == "q8_0"  # also beside q4_0: it is the head
    assert file.types["blk.0.attn_norm.weight"] == "f32"
    assert result.plain == ("blk.0.ffn_down.weight", "blk.1.ffn_down.weight")  # 48 is no 32
    assert {file.types[name] for name in result.plain} == {"f16"}
    weight = source.float32("model.layers.1.mlp.up_proj.weight")
    found = file.tensors["blk.1.ffn_up.weight"]
    largest = np.abs(weight).reshape(48, 1, 32).max(axis=2, keepdims=True)
    step = largest / (2 ** (bits - 1) - 1)  # at least as wide as the blocks' own
    error = np.abs((found - weight).reshape(48, 1, 32))
    assert (error <= 0.51 * step).all()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_float_types_keep_their_precision(model: Path, tmp_path: Path, kind: BlockType) -> None:
    export_gguf(model, tmp_path / "model.gguf", kind=kind)
    file = read_gguf(tmp_path / "model.gguf")
    assert {file.types[name] for name in file.types if "norm" not in name} == {kind}
    weight = Checkpoint.open(model).float32("model.layers.0.mlp.gate_proj.weight")
    bits = {"f16": 11, "bf16": 8}[kind]
    np.testing.assert_allclose(
        file.tensors["blk.0.ffn_gate.weight"], weight, rtol=2.0**-bits, atol=2e-8
    )


def test_type_is_the_folders_own_unless_told(model: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(Checkpoint.open(model).config, dtype="bfloat16")
    save_model(tmp_path / "model", config, random_tensors(config), copy_from=model)
    assert export_gguf(tmp_path / "model", tmp_path / "model.gguf").kind == "bf16"
    assert export_gguf(model, tmp_path / "other.gguf").kind == "f32"


def test_metadata_describe_the_model(model: Path, tmp_path: Path) -> None:
    export_gguf(model, tmp_path / "model.gguf", kind="q8_0")
    metadata = read_gguf(tmp_path / "model.gguf").metadata
    assert metadata["general.architecture"] == "llama"
    assert metadata["general.name"] == "model"
    assert metadata["general.file_type"] == 7
    assert metadata["llama.attention.head_count_kv"] == 2
    assert metadata["llama.rope.dimension_count"] == 8
    assert metadata["llama.context_length"] == 256
    entry = json.loads(metadata["llmserve.lineage"])["export"]
    assert entry == {
        "source": Checkpoint.open(model).fingerprint,
        "format": "gguf",
        "type": "q8_0",
    }


def test_window_wider_than_the_context_is_none(tmp_path: Path) -> None:
    config = dataclasses.replace(LLAMA, sliding_window=LLAMA.max_seq_len)
    folder = save(tmp_path / "model", config)
    export_gguf(folder, tmp_path / "model.gguf")
    found = run_llama(read_gguf(tmp_path / "model.gguf"), IDS)
    np.testing.assert_allclose(found, torch_logits(folder), atol=2e-4)


@pytest.mark.parametrize("name", ["mistral", "gpt2", "own-none", "own-qkv-bias", "own-odd-heads"])
def test_other_shapes_are_refused(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", VARIANTS[name])
    with pytest.raises(ConfigError, match="family"):
        export_gguf(folder, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_head_in_place_of_the_output_layer_is_refused_by_name(tmp_path: Path) -> None:
    config = dataclasses.replace(LLAMA, head=Head(kind="sequence", labels=("bad", "good")))
    folder = save(tmp_path / "model", config)
    with pytest.raises(ConfigError, match=r"head \(sequence\)"):
        export_gguf(folder, tmp_path / "model.gguf")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0"])
def test_weight_that_is_no_number_is_named(tmp_path: Path, value: float, kind: BlockType) -> None:
    config = dataclasses.replace(LLAMA, vocab_size=300, hidden_size=64, head_dim=16)
    tensors = random_tensors(config)
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 5] = value
    save_model(tmp_path / "model", config, tensors, extra_files=FILES)
    with pytest.raises(ExportError, match=r"layers\.1\.self_attn\.k_proj"):
        export_gguf(tmp_path / "model", tmp_path / "model.gguf", kind=kind)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_number_beyond_float16_is_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(LLAMA, vocab_size=300)
    tensors = random_tensors(config)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_model(tmp_path / "model", config, tensors, extra_files=FILES)
    with pytest.raises(ExportError, match=r"up_proj.* beyond the range of float16"):
        export_gguf(tmp_path / "model", tmp_path / "model.gguf", kind="f16")


def test_quantized_model_is_written_dequantized_or_not_at_all(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Checkpoint.open(model)
    tensors = quantize_model(source, "int4", 16).tensors(source)
    save_model(tmp_path / "small", source.config, tensors, copy_from=model)
    assert main(["export", "gguf", str(tmp_path / "small"), "--type", "q8_0"]) == 2
    assert "quantized already (int4)" in capsys.readouterr().err
    assert main(["export", "gguf", str(tmp_path / "small")]) == 0
    assert "the model's int4 weights are f32 in the file" in capsys.readouterr().out
    name = "model.layers.0.mlp.up_proj.weight"
    found = read_gguf(tmp_path / "small-f32.gguf").tensors["blk.0.ffn_up.weight"]
    np.testing.assert_array_equal(found, Checkpoint.open(tmp_path / "small").float32(name))


def test_file_beside_the_model_is_the_default_and_is_not_replaced(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", "gguf", str(model), "--type", "q4_0"]
    out = model.with_name("model-q4_0.gguf")
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert f"GGUF file: {out}" in printed
    assert "f16, as 32 does not divide their width: blk.0.ffn_down.weight" in printed
    before = out.read_bytes()
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert out.read_bytes() == before, "the same model gives the same bytes"


def test_folder_as_target_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        export_gguf(model, tmp_path, overwrite=True)
