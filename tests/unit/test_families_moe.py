"""Mixtral, Qwen2-MoE and Qwen3-MoE: their own spellings, defaults and refusals."""

from __future__ import annotations

from typing import Any

import pytest

from llmserve.errors import ConfigError
from llmserve.families import family_of, parse_config, render_config
from support.published import MINIMAL, parse_minimal
from support.variants import QWEN3_MOE


def test_absent_numbers_of_experts_are_those_of_the_family() -> None:
    counts = [
        (config.experts.num_experts, config.experts.num_experts_per_token)
        for family in ("mixtral", "qwen2_moe", "qwen3_moe")
        if (config := parse_minimal(family)).experts is not None
    ]
    assert counts == [(8, 2), (60, 4), (128, 8)]


def test_layers_without_experts_come_from_a_list_and_a_step() -> None:
    config = parse_minimal("qwen3_moe", mlp_only_layers=[3, 3], decoder_sparse_step=2)
    assert config.experts is not None
    assert config.experts.dense_layers == (0, 2, 3)
    assert render_config(config)["mlp_only_layers"] == [0, 2, 3]


@pytest.mark.parametrize(
    "changes",
    [{"num_experts": 0}, {"mlp_only_layers": [0, 1, 2, 3]}, {"decoder_sparse_step": 5}],
)
def test_model_without_a_layer_of_experts_is_the_family_without(changes: dict[str, Any]) -> None:
    assert family_of(parse_minimal("qwen3_moe", head_dim=128, **changes)) == "qwen3"
    assert family_of(parse_minimal("qwen2_moe", **changes)) == "qwen2"


def test_number_of_experts_is_read_under_either_name() -> None:
    one, other = (
        parse_minimal("qwen3_moe", **{n: 9}) for n in ("num_experts", "num_local_experts")
    )
    assert one == other
    assert one.experts is not None
    assert one.experts.num_experts == 9


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("mixtral", {"num_local_experts": 0}, "num_local_experts"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_token"),
        ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window without layer_types"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size"),
        ("qwen3_moe", {"num_experts": 4, "num_local_experts": 5}, "num_local_experts"),
        ("qwen3_moe", {"num_experts": False}, "num_experts"),
        ("qwen3_moe", {"num_experts": 4}, "num_experts_per_token"),
        ("qwen3_moe", {"num_experts": 1 << 20}, "num_experts"),
        ("qwen3_moe", {"num_experts": 20_000}, "over all layers"),
        ("qwen3_moe", {"mlp_only_layers": [4]}, "mlp_only_layers"),
        ("qwen3_moe", {"mlp_only_layers": "0"}, "mlp_only_layers"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    family: str, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_minimal(family, **changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"experts": 3}, "llmserve"),
        ({"experts": {"num_experts": 4}}, "llmserve"),
        ({"experts": {**MINIMAL}}, "llmserve"),
        ({"qk_norm": None}, "qk_norm"),
        ({"rotary_dim": "4"}, "rotary_dim"),
    ],
)
def test_experts_in_our_own_files_are_read_strictly(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_config({**render_config(QWEN3_MOE, "llmserve"), **changes})
