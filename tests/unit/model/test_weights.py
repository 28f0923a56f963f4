"""Weights between folders, models and canonical names."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmserve.checkpoint import Checkpoint, save_model
from llmserve.errors import CheckpointError
from llmserve.layouts import expected_tensors, linear_layers
from llmserve.model.transformer import Transformer
from llmserve.model.weights import canonical_tensors, load_canonical, load_model, to_stored
from llmserve.quant.dtypes import from_float32, to_float32
from llmserve.quant.groups import quantize_rtn
from support.variants import LLAMA, VARIANTS, random_tensors


@pytest.mark.parametrize("name", VARIANTS)
def test_folder_to_model_to_canonical_is_exact(tmp_path: Path, name: str) -> None:
    config = VARIANTS[name]
    tensors = random_tensors(config)
    save_model(tmp_path / "m", config, tensors)
    model = load_model(Checkpoint.open(tmp_path / "m"))
    assert not model.training
    split = canonical_tensors(model)
    assert {key: tuple(value.shape) for key, value in split.items()} == expected_tensors(config)
    for key, values in tensors.items():
        np.testing.assert_array_equal(split[key].numpy(), values)


@pytest.mark.parametrize("name", VARIANTS)
def test_model_to_folder_keeps_the_logits(tmp_path: Path, name: str) -> None:
    model = Transformer(VARIANTS[name]).eval()
    model.initialize(torch.Generator().manual_seed(1))
    tensors = {key: to_stored(value) for key, value in canonical_tensors(model).items()}
    save_model(tmp_path / "m", model.config, tensors)
    again = load_model(Checkpoint.open(tmp_path / "m"))
    ids = torch.arange(20)[None]
    assert torch.equal(again(ids), model(ids))


def test_canonical_tensors_are_views_and_load_canonical_their_inverse() -> None:
    model, other = Transformer(LLAMA), Transformer(LLAMA)
    views = canonical_tensors(model)
    views["model.layers.0.self_attn.k_proj.weight"].fill_(3.0)
    fused = model.get_parameter("layers.0.self_attn.qkv_proj.weight")
    assert float(fused[24:36].detach().min()) == 3.0
    load_canonical(other, views)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_tensors_that_do_not_fit_are_refused_and_nothing_is_copied() -> None:
    model = Transformer(LLAMA)
    good = {name: torch.zeros(shape) for name, shape in expected_tensors(LLAMA).items()}
    for wrong in (
        {**good, "lm_head.weight": torch.zeros(1)},
        {name: value for name, value in good.items() if name != "model.norm.weight"},
        {**good, "model.norm.weight": torch.zeros(1)},
    ):
        with pytest.raises(CheckpointError, match=r"lm_head\.weight|model\.norm\.weight"):
            load_canonical(model, wrong)
    assert all(bool(parameter.any()) for parameter in model.parameters())


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("asked", [None, torch.float32, torch.bfloat16])
def test_types_are_kept_or_turned(tmp_path: Path, stored: Any, asked: Any) -> None:
    config = dataclasses.replace(LLAMA, dtype=stored)
    tensors = random_tensors(config)
    save_model(tmp_path / "m", config, tensors)
    model = load_model(Checkpoint.open(tmp_path / "m"), dtype=asked)
    assert model.norm.weight.dtype == (asked or getattr(torch, stored))
    for name, values in canonical_tensors(model).items():
        rounded = torch.from_numpy(to_float32(from_float32(tensors[name], stored)))
        assert torch.equal(values, rounded.to(values.dtype))


def test_stored_form_keeps_type_and_bits() -> None:
    values = torch.tensor([[1.5, -3.0], [0.1, 7.0]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        stored = to_stored(values.to(dtype).T)
        assert stored.dtype == str(dtype).removeprefix("torch.")
        np.testing.assert_array_equal(to_float32(stored), values.to(dtype).T.float().numpy())


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_folder_is_dequantized(tmp_path: Path, bits: Any) -> None:
    tensors: dict[str, Any] = dict(random_tensors(LLAMA))
    for layer in linear_layers(LLAMA):
        tensors[f"{layer}.weight"] = quantize_rtn(tensors[f"{layer}.weight"], bits, None)
    save_model(tmp_path / "m", LLAMA, tensors)
    split = canonical_tensors(load_model(Checkpoint.open(tmp_path / "m")))
    for layer in linear_layers(LLAMA):
        expected = tensors[f"{layer}.weight"].dequantize()
        np.testing.assert_array_equal(split[f"{layer}.weight"].numpy(), expected)
