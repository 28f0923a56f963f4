"""Adapters beside the model against merged weights; rows against the company they are in."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmserve.adapters import Adapter, Place
from llmserve.checkpoint import Checkpoint, save_model
from llmserve.config import ModelConfig
from llmserve.errors import CheckpointError
from llmserve.layouts import linear_layers
from llmserve.model.attention import CausalAttention
from llmserve.model.transformer import Transformer
from llmserve.model.weights import load_canonical, load_model
from llmserve.quant.groups import quantize_rtn
from llmserve.runners.torch_lora import LoraSet
from support.adapters import ATTENTION, MLP, merged_tensors, random_adapter
from support.variants import LLAMA, VARIANTS, random_tensors

TOLERANCE = 1e-4  # float32 logits of size 1 to 10; measured: at most 2.5e-6
BASE, FIRST, SECOND = 0, 1, 2


def make_model(config: ModelConfig, tensors: dict[str, Any]) -> Transformer:
    model = Transformer(config).eval()
    load_canonical(model, {name: torch.from_numpy(values) for name, values in tensors.items()})
    return model


def make_set(config: ModelConfig, *adapters: Adapter, **options: Any) -> LoraSet:
    options = {"dtype": torch.float32, "device": "cpu", **options}
    return LoraSet(config, adapters, **options)


def random_ids(length: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(LLAMA.vocab_size, (length,), generator=generator)


@torch.inference_mode()
def packed_logits(
    model: Transformer, loras: LoraSet, rows: Sequence[tuple[torch.Tensor, int]]
) -> list[torch.Tensor]:
    """Logits of whole sequences, packed into one step, each with the adapter of its id."""
    lengths = [len(ids) for ids, _ in rows]
    cu_seqlens = np.array([0, *np.cumsum(lengths)])
    causal = CausalAttention(model.config)

    def attend(layer_index: int, q: Any, k: Any, v: Any) -> torch.Tensor:
        parts = zip(*(tensor[None].split(lengths, 1) for tensor in (q, k, v)), strict=True)
        return torch.cat([causal(layer_index, *part)[0] for part in parts])

    adapt = loras.for_step(np.array([adapter_id for _, adapter_id in rows]), cu_seqlens)
    positions = torch.cat([torch.arange(length) for length in lengths])
    hidden = model.hidden(torch.cat([ids for ids, _ in rows]), positions, attend, adapt)
    return list(model.logits(hidden).split(lengths))


@torch.inference_mode()
def error(found: torch.Tensor, model: Transformer, ids: torch.Tensor) -> float:
    return float((found - model(ids[None])[0]).abs().max())


@pytest.mark.parametrize(
    "name",
    ["llama", "llama-untied", "llama-biases", "mistral", "phi3", "gemma2", "qwen3_moe", "gpt2"],
)
@pytest.mark.parametrize(
    "projections", [(*ATTENTION, *MLP), ("q_proj", "v_proj"), ("k_proj",), ("up_proj", "o_proj")]
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_adapter_equals_merged_weights(
    name: str, projections: Sequence[str], deterministic: bool
) -> None:
    config = VARIANTS[name]
    tensors = random_tensors(config, scale=0.15)
    adapter = random_adapter(config, projections=projections)
    model, merged = (
        make_model(config, tensors),
        make_model(config, merged_tensors(tensors, adapter)),
    )
    loras = make_set(config, adapter, deterministic=deterministic)
    ids = random_ids(20)
    (found,) = packed_logits(model, loras, [(ids, FIRST)])
    assert error(found, model, ids) > 0.1
    assert error(found, merged, ids) < TOLERANCE


@pytest.mark.parametrize("deterministic", [False, True])
def test_rows_of_one_step_get_each_their_own_adapter(deterministic: bool) -> None:
    tensors = random_tensors(LLAMA, scale=0.15)
    adapters = [
        random_adapter(LLAMA, "first", seed=1),
        random_adapter(LLAMA, "second", seed=2, projections=["v_proj", "gate_proj"], layers=[1]),
    ]
    models = [
        make_model(LLAMA, tensors),
        *(make_model(LLAMA, merged_tensors(tensors, adapter)) for adapter in adapters),
    ]
    loras = make_set(LLAMA, *adapters, deterministic=deterministic)
    assert loras.names == ("first", "second")
    ids = [SECOND, BASE, FIRST, SECOND, FIRST, BASE]
    rows = [(random_ids(3 + n, seed=n), adapter_id) for n, adapter_id in enumerate(ids)]
    for (row, adapter_id), found in zip(rows, packed_logits(models[0], loras, rows), strict=True):
        errors = [error(found, model, row) for model in models]
        assert errors[adapter_id] < TOLERANCE
        assert min(errors[:adapter_id] + errors[adapter_id + 1 :]) > 0.01


@pytest.mark.parametrize("bits", [4, 8])
def test_adapter_on_a_quantized_folder_adapts_the_dequantized_weights(
    tmp_path: Path, bits: Any
) -> None:
    tensors: dict[str, Any] = dict(random_tensors(LLAMA, scale=0.15))
    dequantized = dict(tensors)
    for layer in linear_layers(LLAMA):
        quantized = quantize_rtn(tensors[f"{layer}.weight"], bits, None)
        tensors[f"{layer}.weight"] = quantized
        dequantized[f"{layer}.weight"] = quantized.dequantize()
    save_model(tmp_path / "m", LLAMA, tensors)
    adapter = random_adapter(LLAMA)
    model = load_model(Checkpoint.open(tmp_path / "m"))
    ids = random_ids(20)
    (found,) = packed_logits(model, make_set(LLAMA, adapter), [(ids, FIRST)])
    merged = make_model(LLAMA, merged_tensors(dequantized, adapter))
    assert error(found, merged, ids) < TOLERANCE


def test_step_without_adapters_adapts_nothing() -> None:
    loras = make_set(LLAMA, random_adapter(LLAMA))
    cu_seqlens = np.array([0, 2, 5])
    assert loras.for_step(None, cu_seqlens) is None
    assert loras.for_step(np.array([BASE, BASE]), cu_seqlens) is None
    assert loras.for_step(np.array([BASE, FIRST]), np.array([0, 5, 5])) is None
    assert loras.for_step(np.array([BASE, FIRST]), cu_seqlens) is not None


def test_projection_that_no_adapter_of_the_step_adapts_gets_nothing() -> None:
    adapters = [random_adapter(LLAMA, projections=[name]) for name in ("q_proj", "down_proj")]
    adapt = make_set(LLAMA, *adapters).for_step(np.array([FIRST]), np.array([0, 3]))
    assert adapt is not None
    assert adapt(0, "down_proj", torch.ones(3, 40)) is None
    assert adapt(0, "qkv_proj", torch.ones(3, 24)) is not None


def test_adapter_that_does_not_fit_is_refused() -> None:
    other = dataclasses.replace(LLAMA, hidden_size=32)
    with pytest.raises(CheckpointError, match=r"adapter 'a'.*the model takes \[4, 24\]"):
        make_set(LLAMA, random_adapter(other))


def test_added_values_are_in_the_models_type() -> None:
    adapter = random_adapter(LLAMA, projections=["o_proj"])
    exact = make_set(LLAMA, adapter).for_step(np.array([FIRST]), np.array([0, 5]))
    short = make_set(LLAMA, adapter, dtype=torch.bfloat16).for_step(
        np.array([FIRST]), np.array([0, 5])
    )
    assert exact is not None
    assert short is not None
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    added = short(1, "o_proj", x)
    wanted = exact(1, "o_proj", x.float())
    assert added is not None
    assert added.dtype == torch.bfloat16
    pair = adapter.pairs[Place(1, "o_proj")]
    by_hand = pair.scale * x.float().numpy() @ pair.a.T @ pair.b.T
    torch.testing.assert_close(wanted, torch.from_numpy(by_hand), rtol=0, atol=1e-5)
    torch.testing.assert_close(added.float(), wanted, rtol=0.03, atol=0.03)  # 8 bits, three times


def test_rows_without_an_adapter_keep_every_bit_and_sign() -> None:
    loras = make_set(LLAMA, random_adapter(LLAMA))
    adapt = loras.for_step(np.array([BASE, FIRST]), np.array([0, 4, 6]))
    assert adapt is not None
    x = torch.full((6, 24), torch.inf)  # overflows next to them stay where they are
    added = adapt(0, "qkv_proj", x)
    assert added is not None
    y = torch.tensor([0.0, -0.0, 1e-45, -torch.inf])[:, None].expand(4, 48)
    kept = (y + added[:4]).contiguous()
    assert torch.equal(kept.view(torch.int32), y.contiguous().view(torch.int32))
    assert not torch.isfinite(added[4:]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [LLAMA, dataclasses.replace(LLAMA, intermediate_size=75), VARIANTS["gpt2"]],
    ids=["llama", "odd", "gpt2"],
)
def test_deterministic_row_is_the_same_wherever_it_is_and_whoever_is_beside_it(
    config: ModelConfig, dtype: torch.dtype
) -> None:
    """Tiles of 32 rows: one row in every place, among others of any adapters and sequences."""
    adapters = [random_adapter(config, str(n), seed=n, rank=3 + 2 * n) for n in range(3)]
    loras = make_set(config, *adapters, dtype=dtype, deterministic=True)
    generator, random = torch.Generator().manual_seed(0), np.random.default_rng(0)
    for projection, width in (("qkv_proj", 24), ("down_proj", config.intermediate_size)):
        row = torch.randn(width, generator=generator).to(dtype)
        seen = set()
        for place in range(32):
            x = torch.randn(32, width, generator=generator).to(dtype)
            x[place] = row
            ids = random.integers(0, 4, 32)
            ids[place] = SECOND
            if place % 4 == 0:
                ids[:] = SECOND
            adapt = loras.for_step(ids, np.arange(33))
            assert adapt is not None
            added = adapt(1, projection, x)
            assert added is not None
            seen.add(added[place].float().numpy().tobytes())
        assert len(seen) == 1
