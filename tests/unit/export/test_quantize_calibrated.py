"""Calibrated methods on whole models: odd shapes, hostile weights, every variant, a real one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from llmserve.checkpoint import Checkpoint, save_model
from llmserve.config import ModelConfig
from llmserve.errors import ConfigError, ExportError
from llmserve.export.measure import text_windows
from llmserve.export.quant_measure import measure_model
from llmserve.export.quant_plan import Method, Scheme
from llmserve.export.quantize import QuantizedModel, quantize_model
from llmserve.layouts import linear_layers
from llmserve.quant.groups import QuantizedLinear
from llmserve.text.tokenizer import Tokenizer
from support.variants import LLAMA, VARIANTS, random_tensors

CALIBRATED: tuple[Method, ...] = ("mse", "gptq", "awq", "best")
ODD = dataclasses.replace(
    LLAMA, vocab_size=105, hidden_size=48, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=8,
    intermediate_size=172,
)  # fmt: skip
LAYER = "model.layers.1.mlp.up_proj.weight"


def windows(config: ModelConfig) -> list[list[int]]:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, config.vocab_size, (6, min(config.max_seq_len, 30)))
    return [[int(token) for token in row] for row in rows]


def folder(path: Path, config: ModelConfig, tensors: dict[str, np.ndarray]) -> Checkpoint:
    save_model(path / "model", config, tensors)
    return Checkpoint.open(path / "model")


def quantize(
    source: Checkpoint, method: Method, scheme: Scheme = "int4", size: int | None = 16
) -> QuantizedModel:
    return quantize_model(source, scheme, size, method=method, windows=windows(source.config))


@pytest.mark.parametrize(
    "config",
    [
        ODD,
        dataclasses.replace(ODD, vocab_size=361, hidden_size=288, intermediate_size=105),
        dataclasses.replace(ODD, vocab_size=50_257, num_layers=1, tie_word_embeddings=False),
    ],
    ids=["48-172", "288-105", "vocabulary-50257"],
)
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_odd_shapes_are_read_back_as_they_were_quantized(
    tmp_path: Path, config: ModelConfig, method: Method
) -> None:
    source = folder(tmp_path, config, random_tensors(config))
    model = quantize(source, method)
    assert set(model.layers) == set(linear_layers(config)) - {"lm_head"}
    save_model(tmp_path / "small", config, model.tensors(source))
    written = Checkpoint.open(tmp_path / "small")
    for name in source.names():
        np.testing.assert_array_equal(written.float32(name), model.float32(source, name))


@pytest.mark.parametrize("name", ["gpt2", "gemma3_text", "olmo2", "qwen2_moe", "own-sinusoidal"])
@pytest.mark.parametrize("method", CALIBRATED)
def test_every_kind_of_model_is_as_close_as_after_rounding_to_nearest(
    tmp_path: Path, name: str, method: Method
) -> None:
    config = VARIANTS[name]
    source = folder(tmp_path, config, random_tensors(config))
    kls = [
        measure_model(source, model, windows(config), lambda *_: None).mean_kl
        for model in (quantize(source, method, size=8), quantize(source, "rtn", size=8))
    ]
    # Random weights reward no model of the inputs; a wrong fold would cost many times more.
    assert kls[0] < 1.5 * kls[1]


@pytest.mark.parametrize("method", CALIBRATED)
def test_layer_of_zeros_stays_zero(tmp_path: Path, method: Method) -> None:
    tensors = random_tensors(ODD)
    tensors[LAYER][:] = 0.0
    source = folder(tmp_path, ODD, tensors)
    assert not quantize(source, method).float32(source, LAYER).any()


@pytest.mark.parametrize("method", CALIBRATED)
def test_outlier_is_kept_and_harms_its_group_alone(tmp_path: Path, method: Method) -> None:
    tensors = random_tensors(ODD)
    tensors[LAYER][3, 20] = 1e4
    source = folder(tmp_path, ODD, tensors)
    model = quantize(source, method)
    layer = model.layers[LAYER.removesuffix(".weight")]
    assert isinstance(layer, QuantizedLinear)
    found = model.float32(source, LAYER)
    assert np.isfinite(found).all()
    divisors = found[3, 20] / 1e4  # AWQ multiplies columns
    assert 0.05 < divisors < 20
    others = np.delete(np.arange(48), range(16, 32))
    assert np.abs(found[3, others]).max() < 20


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("method", CALIBRATED)
@pytest.mark.parametrize(
    "name", [LAYER, "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"]
)
def test_tensor_that_is_not_finite_is_refused_by_name(
    tmp_path: Path, method: Method, name: str, value: float
) -> None:
    tensors = random_tensors(ODD)
    tensors[name].reshape(-1)[5] = value
    source = folder(tmp_path, ODD, tensors)
    with pytest.raises(ExportError, match=f"{name.removesuffix('.weight')} holds NaN"):
        quantize(source, method)


def test_method_that_calibrates_needs_a_text(tmp_path: Path) -> None:
    source = folder(tmp_path, ODD, random_tensors(ODD))
    with pytest.raises(ConfigError, match="method gptq needs a text to calibrate on"):
        quantize_model(source, "int4", 16, method="gptq")


@pytest.fixture(scope="module")
def tales(shared_folder: Path, stories260k: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Windows to measure on, of the first 60,000 characters, and to calibrate on, of the rest."""
    text = (shared_folder / "data/tinystories-sample/niklas6_tinystories.txt").read_text()
    tokenizer = Tokenizer.load(stories260k)
    pieces = (text[:60_000], text[60_000:])
    ids = [tokenizer.encode(piece, add_special_tokens=False) for piece in pieces]
    measured, calibrated = (text_windows(part, length=512, bos_token_id=1) for part in ids)
    return measured, calibrated


@pytest.mark.shared
def test_int8_of_a_real_model_loses_less_than_another_programs(
    stories260k: Path, tales: tuple[list[list[int]], list[list[int]]]
) -> None:
    """0.0013 nats on this text is what somebody else's int8, groups of 8, lost."""
    source = Checkpoint.open(stories260k)
    model = quantize_model(source, "int8")
    found = measure_model(source, model, tales[0][:24], lambda *_: None)
    assert found.loss_after - found.loss_before <= 0.0013
    for name, layer in model.layers.items():
        assert isinstance(layer, QuantizedLinear)
        bits = 8 + 8 * layer.scales.nbytes / layer.values.size
        assert bits <= 12, name


@pytest.mark.shared
def test_gptq_beats_rounding_to_nearest_on_a_real_model(
    stories260k: Path, tales: tuple[list[list[int]], list[list[int]]]
) -> None:
    source = Checkpoint.open(stories260k)
    gptq, nearest = (
        measure_model(
            source,
            quantize_model(source, "int4", 32, method=method, windows=tales[1][:16]),
            tales[0][:12],
            lambda *_: None,
        )
        for method in ("gptq", "rtn")
    )
    assert gptq.kl_margin is not None
    assert nearest.kl_margin is not None
    assert gptq.mean_kl + gptq.kl_margin < nearest.mean_kl - nearest.kl_margin
