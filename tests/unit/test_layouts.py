"""Canonical tensors and their places in each family's files."""

from __future__ import annotations

import math

import pytest

from llmserve.families import family_of
from llmserve.layouts import (
    block_norms,
    expected_tensors,
    is_ignored,
    linear_layers,
    stored_name,
    stored_parts,
)
from support.variants import (
    GEMMA2,
    GPT2,
    LLAMA,
    MIXTRAL,
    OLMO2,
    PHI3,
    QWEN2_MOE,
    QWEN3_MOE,
    VARIANTS,
)


def test_llama_tensors_have_their_own_names_and_shapes() -> None:
    shapes = expected_tensors(LLAMA)
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (12, 24)
    assert shapes["model.layers.1.mlp.down_proj.weight"] == (24, 40)
    assert "lm_head.weight" not in shapes
    assert len(shapes) == 2 + 2 * 9
    assert len(linear_layers(LLAMA)) == 2 * 7


@pytest.mark.parametrize("name", VARIANTS)
def test_parts_cover_every_stored_tensor_exactly_once(name: str) -> None:
    config = VARIANTS[name]
    shapes = expected_tensors(config)
    parts = stored_parts(config, family_of(config))
    assert parts.keys() == shapes.keys()
    rows: dict[str, list[tuple[int, int]]] = {}
    for canonical, part in parts.items():
        turned = part.shape[::-1] if part.is_transposed else part.shape
        assert (part.stop - part.start, *turned[1:]) == shapes[canonical]
        rows.setdefault(part.name, []).append((part.start, part.stop))
    for stored, pieces in rows.items():
        part = next(part for part in parts.values() if part.name == stored)
        ends = [0, *sorted(stop for _, stop in pieces)]
        assert sorted(start for start, _ in pieces) == ends[:-1]
        assert ends[-1] == (part.shape[::-1] if part.is_transposed else part.shape)[0]
    stored_size = sum(math.prod({p.name: p for p in parts.values()}[n].shape) for n in rows)
    assert stored_size == sum(map(math.prod, shapes.values()))


def test_gpt2_keeps_query_key_and_value_in_one() -> None:
    part = stored_parts(GPT2, "gpt2")["model.layers.0.self_attn.k_proj.weight"]
    assert (part.name, part.shape) == ("transformer.h.0.attn.c_attn.weight", (24, 72))
    assert (part.start, part.stop, part.is_transposed) == (24, 48, True)


def test_phi3_keeps_query_key_and_value_in_one_and_gate_and_input_in_another() -> None:
    parts = stored_parts(PHI3, "phi3")
    layer = "model.layers.1"
    value = parts[f"{layer}.self_attn.v_proj.weight"]
    assert (value.name, value.shape) == (f"{layer}.self_attn.qkv_proj.weight", (48, 24))
    assert (value.start, value.stop, value.is_transposed) == (36, 48, False)
    up = parts[f"{layer}.mlp.up_proj.weight"]
    assert (up.name, up.shape) == (f"{layer}.mlp.gate_up_proj.weight", (80, 24))
    assert (up.start, up.stop) == (40, 80)


def test_mixtral_has_names_of_its_own_for_experts() -> None:
    parts = stored_parts(MIXTRAL, "mixtral")
    layer = "model.layers.1"
    assert parts[f"{layer}.mlp.gate.weight"].name == f"{layer}.block_sparse_moe.gate.weight"
    for ours, theirs in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
        part = parts[f"{layer}.mlp.experts.3.{ours}.weight"]
        assert part.name == f"{layer}.block_sparse_moe.experts.3.{theirs}.weight"


def test_norms_have_their_names_by_place() -> None:
    before, after, between, last = block_norms(GEMMA2)
    assert (before, after) == ("input_layernorm", "post_attention_layernorm")
    assert (between, last) == ("pre_feedforward_layernorm", "post_feedforward_layernorm")
    assert block_norms(LLAMA) == ("input_layernorm", None, "post_attention_layernorm", None)
    names = [name for name in expected_tensors(OLMO2) if "layers.0" in name and "layernorm" in name]
    assert names == [f"model.layers.0.{name}.weight" for name in block_norms(OLMO2) if name]


def test_what_decides_between_experts_is_no_linear_layer_to_quantize() -> None:
    layers = linear_layers(QWEN2_MOE)
    assert not any(name.endswith("gate") for name in layers)
    assert sum(".experts." in name for name in layers) == 2 * 5 * 3
    assert expected_tensors(QWEN2_MOE)["model.layers.0.mlp.shared_expert_gate.weight"] == (1, 24)
    dense = [name for name in linear_layers(QWEN3_MOE) if "layers.1.mlp" in name]
    assert len(dense) == 3


def test_names_without_prefix_and_constants_of_others_are_known() -> None:
    assert stored_name("h.0.ln_1.bias", "gpt2") == "transformer.h.0.ln_1.bias"
    assert stored_name("transformer.wte.weight", "gpt2") == "transformer.wte.weight"
    assert stored_name("lm_head.weight", "gpt2") == "lm_head.weight"
    assert stored_name("model.norm.weight", "llama") == "model.norm.weight"
    assert is_ignored("h.0.attn.bias", "gpt2")
    assert not is_ignored("h.0.attn.c_attn.bias", "gpt2")
    for family in ("llama", "mistral", "qwen2"):
        assert is_ignored("model.layers.0.self_attn.rotary_emb.inv_freq", family)
    assert not is_ignored("model.layers.0.self_attn.rotary_emb.inv_freq", "llmserve")
