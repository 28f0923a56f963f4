"""The shape of a model: combinations that make none are refused, with the field's name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from llmserve.config import Experts, ModelConfig
from llmserve.errors import ConfigError
from support.variants import GEMMA2, GEMMA3, LLAMA, QWEN2_MOE, QWEN3_MOE

EXPERTS = {"num_experts": 4, "num_experts_per_token": 2, "intermediate_size": 8}


def llama(**changes: Any) -> ModelConfig:
    return dataclasses.replace(LLAMA, **changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rotary_dim": 3}, "rotary_dim must be even"),
        ({"rotary_dim": 8}, "rotary_dim must be a whole number from 1 to 6"),
        ({"rotary_dim": 2, "positions": "learned"}, "rotary_dim needs positions 'rope'"),
        ({"local_rope_theta": 1e4}, "local_rope_theta needs sliding_window"),
        ({"local_rope_theta": -1.0, "sliding_window": 4}, "local_rope_theta must be a positive"),
        (
            {"local_rope_theta": 1e4, "sliding_window": 4, "positions": "none"},
            "local_rope_theta needs positions",
        ),
        ({"norm_weight_offset": 0.5}, "norm_weight_offset"),
        ({"norm_weight_offset": True}, "norm_weight_offset"),
        ({"norm_weight_offset": 1.0, "norm": "layernorm"}, "need norm 'rmsnorm'"),
        ({"qk_norm": "head", "norm": "layernorm"}, "need norm 'rmsnorm'"),
        ({"qk_norm": "heads"}, "qk_norm must be one of none, head, full"),
        ({"norm_placement": "middle"}, "norm_placement must be one of pre, post, both"),
        ({"activation": "geglu"}, "activation"),
        ({"embedding_scale": 0.0}, "embedding_scale"),
        ({"embedding_scale": None}, "embedding_scale"),
        ({"attention_scale": float("nan")}, "attention_scale"),
        ({"attention_softcap": float("inf")}, "attention_softcap"),
        ({"attention_softcap": 0}, "attention_softcap"),
        ({"logits_softcap": "30"}, "logits_softcap"),
        ({"attention_bias": 1}, "attention_bias"),
    ],
)
def test_values_out_of_range_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        llama(**changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_experts": 0}, "num_experts must be a whole number"),
        ({"num_experts": True}, "num_experts"),
        ({"num_experts_per_token": 5}, "num_experts_per_token must be a whole number from 1 to 4"),
        ({"intermediate_size": 0}, "experts.intermediate_size"),
        ({"shared_intermediate_size": 0}, "shared_intermediate_size"),
        ({"normalize_weights": 1}, "normalize_weights"),
    ],
)
def test_experts_out_of_range_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Experts(**{**EXPERTS, **changes})


@pytest.mark.parametrize(
    ("experts", "changes", "named"),
    [
        ({"dense_layers": (0, 1)}, {}, "names every layer"),
        ({"dense_layers": (2,)}, {}, "dense_layers must be layers from 0 to 1"),
        ({"dense_layers": (0, 0)}, {}, "ascending"),
        ({"num_experts": 1 << 16}, {}, "over all layers"),
        ({}, {"activation": "gelu"}, "gated activation"),
        ({}, {"mlp_bias": True}, "no mlp_bias"),
    ],
)
def test_experts_that_do_not_fit_the_model_are_refused(
    experts: dict[str, Any], changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        llama(experts=Experts(**{**EXPERTS, **experts}), **changes)


def test_defaults_are_resolved() -> None:
    assert (LLAMA.rotary_size, LLAMA.score_scale) == (6, 6**-0.5)
    changed = llama(rotary_dim=4, attention_scale=0.5)
    assert (changed.rotary_size, changed.score_scale) == (4, 0.5)
    assert [config.is_gated for config in (LLAMA, GEMMA2, llama(activation="gelu"))] == [
        True,
        True,
        False,
    ]


def test_layers_are_told_apart() -> None:
    assert [GEMMA3.has_local_rope(index) for index in range(2)] == [True, False]
    assert [GEMMA2.has_local_rope(index) for index in range(2)] == [False, False]
    assert [QWEN3_MOE.has_experts(index) for index in range(2)] == [True, False]
    assert [LLAMA.has_experts(index) for index in range(2)] == [False, False]


def test_settings_beyond_the_known_ones_are_those_not_at_their_default() -> None:
    known = {field.name for field in dataclasses.fields(LLAMA)} - {"qk_norm", "experts"}
    assert LLAMA.settings_beyond(known) == []
    assert QWEN2_MOE.settings_beyond(known) == ["experts"]
    assert QWEN3_MOE.settings_beyond(known) == ["qk_norm", "experts"]
