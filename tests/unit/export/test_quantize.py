"""Quantizing whole models: odd shapes, every variant, and a real checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from llmserve.checkpoint import Checkpoint, save_model
from llmserve.config import ModelConfig
from llmserve.errors import ConfigError, ExportError
from llmserve.export.measure import Comparison
from llmserve.export.quant_measure import measure_model
from llmserve.export.quantize import QuantizedModel, Scheme, quantize_model
from llmserve.layouts import linear_layers
from llmserve.quant.groups import QuantizedLinear
from llmserve.text.tokenizer import Tokenizer
from support.variants import GPT2, LLAMA, VARIANTS, random_tensors

ODD = ModelConfig(
    vocab_size=105,
    hidden_size=48,
    num_layers=1,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=172,
    max_seq_len=32,
    tie_word_embeddings=False,
)
ODD_288 = dataclasses.replace(
    ODD, hidden_size=288, intermediate_size=105, num_heads=9, num_kv_heads=3
)


def folder_of(path: Path, config: ModelConfig) -> Checkpoint:
    save_model(path, config, random_tensors(config))
    return Checkpoint.open(path)


def group_sizes(model: QuantizedModel) -> dict[int, int | None]:
    """Input width → group size."""
    return {
        layer.shape[1]: layer.group_size
        for layer in model.layers.values()
        if isinstance(layer, QuantizedLinear)
    }


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_read_back_as_it_was_quantized(
    tmp_path: Path, name: str, scheme: Scheme
) -> None:
    source = folder_of(tmp_path / "model", VARIANTS[name])
    model = quantize_model(source, scheme, 8)
    save_model(tmp_path / "small", source.config, model.tensors(source))
    written = Checkpoint.open(tmp_path / "small")
    assert written.config == source.config
    assert written.quantization is not None
    assert written.quantization.scheme == scheme
    assert written.stored_bytes() < source.stored_bytes()
    for tensor in source.names():
        np.testing.assert_array_equal(written.float32(tensor), model.float32(source, tensor))


def test_all_linear_layers_but_the_head_are_quantized(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "model", ODD)
    model = quantize_model(source, "int8")
    assert set(model.layers) == set(linear_layers(ODD)) - {"lm_head"}
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        np.testing.assert_array_equal(model.float32(source, name), source.float32(name))


@pytest.mark.parametrize(
    ("config", "asked", "expected"),
    [
        (ODD, 16, {48: 16, 172: 43}),
        (ODD, 43, {48: None, 172: 43}),
        (ODD, None, {48: None, 172: None}),
        (ODD_288, 32, {288: 32, 72: 36, 105: 35}),
    ],
)
def test_group_sizes_of_odd_widths(
    tmp_path: Path, config: ModelConfig, asked: int | None, expected: dict[int, int | None]
) -> None:
    model = quantize_model(folder_of(tmp_path / "model", config), "int4", asked)
    assert group_sizes(model) == expected


def test_scales_have_the_models_type(tmp_path: Path) -> None:
    config = dataclasses.replace(LLAMA, dtype="bfloat16")
    model = quantize_model(folder_of(tmp_path / "model", config), "int4", 8)
    for layer in model.layers.values():
        assert isinstance(layer, QuantizedLinear)
        assert layer.scale_dtype == "bfloat16"


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantizing_twice_gives_the_same_bytes(tmp_path: Path, scheme: Scheme) -> None:
    source = folder_of(tmp_path / "model", GPT2)
    for name in ("once", "twice"):
        save_model(tmp_path / name, GPT2, quantize_model(source, scheme, 8).tensors(source))
    once, twice = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        for name in ("once", "twice")
    )
    assert once == twice


def test_model_that_is_quantized_already_is_refused(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "model", LLAMA)
    save_model(tmp_path / "small", LLAMA, quantize_model(source, "int8").tensors(source))
    with pytest.raises(ConfigError, match=r"is quantized already \(int8\)"):
        quantize_model(Checkpoint.open(tmp_path / "small"), "int4", 8)


def test_layer_that_is_not_finite_is_named(tmp_path: Path) -> None:
    tensors = random_tensors(LLAMA)
    tensors["model.layers.1.mlp.down_proj.weight"][2, 2] = np.nan
    save_model(tmp_path / "model", LLAMA, tensors)
    with pytest.raises(ExportError, match=r"model\.layers\.1\.mlp\.down_proj holds NaN"):
        quantize_model(Checkpoint.open(tmp_path / "model"), "int4", 8)


def test_group_size_is_no_choice_of_bitsandbytes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="scheme nf4 has no choice of group size"):
        quantize_model(folder_of(tmp_path / "model", LLAMA), "nf4", 64)


@pytest.mark.bnb
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_layers_that_bitsandbytes_cannot_take_are_skipped_and_listed(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = dataclasses.replace(ODD, hidden_size=64, num_heads=8, num_kv_heads=4)
    source = folder_of(tmp_path / "model", config)
    model = quantize_model(source, "nf4")
    mlp = {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert set(model.skipped) == mlp
    save_model(tmp_path / "small", config, model.tensors(source))
    written = Checkpoint.open(tmp_path / "small")
    assert written.quantization is not None
    assert set(written.quantization.ignore) == {"lm_head", *mlp}
    for name in source.names():
        np.testing.assert_array_equal(written.float32(name), model.float32(source, name))


@pytest.mark.bnb
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_model_without_a_layer_for_bitsandbytes_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ConfigError, match="nf4 takes no layer of this model"):
        quantize_model(folder_of(tmp_path / "model", ODD), "nf4")


@pytest.fixture(scope="session")
def stories(shared_folder: Path, stories260k: Path) -> list[list[int]]:
    """The token ids of five stories, each with BOS before it."""
    path = shared_folder / "data/tinystories-sample/tinystories_sample.txt"
    tokenizer = Tokenizer.load(stories260k)
    texts = path.read_text(encoding="utf-8").split("<|endoftext|>")
    return [tokenizer.encode(text.strip()) for text in texts if text.strip()]


def compare(source: Checkpoint, model: QuantizedModel, windows: list[list[int]]) -> Comparison:
    return measure_model(source, model, windows, lambda *_: None)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("scheme", "group_size", "most"),
    [
        ("int8", None, 0.01),
        ("int8", 32, 0.01),
        ("int8", 16, 0.01),
        ("int8", 8, 0.01),
        ("int4", 32, 0.15),
        ("int4", 16, 0.1),
    ],
)
def test_loss_of_a_real_checkpoint(
    stories260k: Path,
    stories: list[list[int]],
    scheme: Scheme,
    group_size: int | None,
    most: float,
) -> None:
    source = Checkpoint.open(stories260k)
    found = compare(source, quantize_model(source, scheme, group_size), stories)
    print(f"{scheme} {group_size}: {found}")
    assert found.num_tokens == 1804
    assert found.loss_before == pytest.approx(1.2664, abs=1e-3)
    assert abs(found.loss_after - found.loss_before) <= most
