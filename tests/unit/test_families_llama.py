"""Qwen2, Qwen3, OLMo 2 and Phi-3: their own spellings, defaults and refusals."""

from __future__ import annotations

from typing import Any

import pytest

from llmserve.errors import ConfigError
from llmserve.families import family_of, parse_config, render_config
from support.published import MINIMAL, parse_minimal


def test_window_of_qwen_begins_at_a_layer() -> None:
    windows = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}
    for family in ("qwen2", "qwen3"):
        config = parse_minimal(family, **windows)
        assert (config.sliding_window, config.full_attention_layers) == (3, (0, 1))
        assert parse_minimal(family, **{**windows, "max_window_layers": 4}).sliding_window is None
        assert (
            parse_minimal(family, **{**windows, "use_sliding_window": False}).sliding_window is None
        )
        listed = ["sliding_attention", *["full_attention"] * 3]
        assert parse_minimal(family, **windows, layer_types=listed).full_attention_layers == (
            1,
            2,
            3,
        )


@pytest.mark.parametrize("spelling", [{"partial_rotary_factor": 0.5}, {"rope_parameters": {
    "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
}}])  # fmt: skip
def test_both_spellings_of_partial_positions_are_read(spelling: dict[str, Any]) -> None:
    config = parse_minimal("phi3", **spelling)
    assert config.rotary_dim == 4
    assert family_of(config) == "phi3"


@pytest.mark.parametrize("head_dim", [6, 10, 49, 96, 128, 250])
def test_every_partial_width_survives_its_file(head_dim: int) -> None:
    for size in range(2, head_dim, 2):
        values = {"model_type": "phi3", **MINIMAL, "head_dim": head_dim}
        values |= {"partial_rotary_factor": size / head_dim + 1e-9}
        config = parse_config(values)
        assert config.rotary_dim == size
        assert parse_config(render_config(config)) == config


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("qwen2", {"max_window_layers": -1}, "max_window_layers"),
        ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "there is no sliding_window"),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["full"] * 4}, "layer_types"),
        (
            "qwen2",
            {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 3},
            "layer_types has 3 entries for 4 layers",
        ),
        ("qwen3", {"attention_bias": None, "hidden_act": "relu"}, "relu"),
        ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ("olmo2", {"sliding_window": 4}, "sliding_window"),
        ("olmo2", {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ("olmo2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("phi3", {"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, "longrope"),
        ("phi3", {"rope_scaling": {"type": "su", "long_factor": [1.0]}}, "su"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ("phi3", {"attention_bias": True}, "attention_bias"),
        ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ("phi3", {"partial_rotary_factor": True}, "partial_rotary_factor"),
        ("phi3", {"partial_rotary_factor": 0.01}, "rotary_dim"),
        ("phi3", {"partial_rotary_factor": 0.4}, "rotary_dim must be even"),
        (
            "phi3",
            {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 0.25}},
            "differs",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    family: str, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_minimal(family, **changes)
