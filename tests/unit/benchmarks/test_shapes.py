"""Random models to time: shapes, sameness, and what else opens them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from llmserve.benchmarks import shapes
from llmserve.benchmarks.shapes import SHAPES, make_model, random_tensor
from llmserve.checkpoint import Checkpoint
from llmserve.cli import main
from llmserve.config import ModelConfig
from llmserve.errors import ConfigError
from llmserve.layouts import expected_tensors
from llmserve.text.tokenizer import Tokenizer

SMALL = dataclasses.replace(
    SHAPES["S"], vocab_size=700, hidden_size=48, num_layers=2, num_heads=2, num_kv_heads=1
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "model"
    make_model(SMALL, folder)
    return folder


@pytest.mark.parametrize(
    ("name", "millions"), [("S", 15.2), ("M", 134.5), ("L", 1235.8), ("XL", 8030.3)]
)
def test_shapes_have_the_sizes_they_are_named_for(name: str, millions: float) -> None:
    config = SHAPES[name]
    parameters = sum(map(math.prod, expected_tensors(config).values()))
    assert parameters / 1e6 == pytest.approx(millions, abs=0.1)
    assert config.q_size == config.hidden_size


def test_folder_opens_with_weights_as_said(model: Path) -> None:
    source = Checkpoint.open(model)
    assert source.config == SMALL
    assert source.dtype_of("model.embed_tokens.weight") == "bfloat16"
    values = source.float32("model.layers.1.mlp.up_proj.weight")
    assert values.std() == pytest.approx(0.02, rel=0.02)
    assert values.mean() == pytest.approx(0.0, abs=5e-4)
    assert (source.float32("model.layers.0.input_layernorm.weight") == 1).all()
    other = source.float32("model.layers.1.mlp.gate_proj.weight")
    assert abs(np.corrcoef(values.ravel(), other.ravel())[0, 1]) < 0.02


def test_tokenizer_has_a_token_for_every_row(model: Path) -> None:
    tokenizer = Tokenizer.load(model)
    assert tokenizer.vocab_size == SMALL.vocab_size
    text = "any text, Übung 日本語\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.bos_token_id == SMALL.bos_token_id


def test_same_seed_gives_the_same_files_and_another_does_not(model: Path, tmp_path: Path) -> None:
    make_model(SMALL, tmp_path / "same")
    make_model(SMALL, tmp_path / "other", seed=1)
    manifest = (model / "manifest.json").read_bytes()
    assert (tmp_path / "same/manifest.json").read_bytes() == manifest
    assert (tmp_path / "other/manifest.json").read_bytes() != manifest


def test_large_tensor_is_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = random_tensor((30, 7), "bfloat16", np.random.default_rng(3))
    monkeypatch.setattr(shapes, "_CHUNK", 64)
    parts = random_tensor((30, 7), "bfloat16", np.random.default_rng(3))
    assert parts.data.shape == (30, 7)
    np.testing.assert_array_equal(parts.data, whole.data)


def test_vocabulary_too_large_for_the_words_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "_word_texts", lambda num_words, generator: ["aa bb aa bb"])
    with pytest.raises(ConfigError, match="not 700"):
        make_model(SMALL, tmp_path / "model")


@pytest.mark.parametrize("name", SHAPES)
def test_command_writes_a_shape_and_replaces_only_when_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    small: dict[str, ModelConfig] = {name: SMALL}
    monkeypatch.setattr(shapes, "SHAPES", small)
    command = ["bench", "make-model", "--shape", name, "--out", str(tmp_path / "made")]
    assert main(command) == 0
    assert "random weights" in capsys.readouterr().out
    assert Checkpoint.open(tmp_path / "made").config == SMALL
    assert main(command) == 2
    assert main([*command, "--overwrite", "--seed", "4"]) == 0
