"""Gemma 2 and 3: their own spellings, defaults and refusals."""

from __future__ import annotations

from typing import Any

import pytest

from llmserve.config import RopeScaling
from llmserve.errors import ConfigError
from llmserve.families import family_of, parse_config, render_config
from support.published import parse_minimal
from support.variants import GEMMA2


def test_window_of_gemma_leaves_out_every_second_or_sixth_layer() -> None:
    assert parse_minimal("gemma2").full_attention_layers == (1, 3)
    assert parse_minimal("gemma3_text", num_hidden_layers=7).full_attention_layers == (5,)
    for name in ("sliding_window_pattern", "_sliding_window_pattern"):
        assert parse_minimal("gemma3_text", **{name: 2}).full_attention_layers == (1, 3)


def test_gemma_3_without_windows_has_one_base() -> None:
    config = parse_minimal(
        "gemma3_text", layer_types=["full_attention"] * 4, rope_local_base_freq=7.0
    )
    assert (config.sliding_window, config.local_rope_theta) == (None, None)


@pytest.mark.parametrize(
    "spelling",
    [
        {
            "rope_theta": 5e5,
            "rope_local_base_freq": 77.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 77.0},
            }
        },
    ],
)
def test_both_spellings_of_two_bases_are_read(spelling: dict[str, Any]) -> None:
    config = parse_minimal("gemma3_text", **spelling)
    assert (config.rope_theta, config.local_rope_theta) == (5e5, 77.0)
    assert config.rope_scaling == RopeScaling(kind="linear", factor=8.0)


def test_scale_that_no_whole_number_gives_is_ours_alone() -> None:
    values = render_config(GEMMA2, "llmserve")
    assert family_of(parse_config({**values, "attention_scale": 0.3})) == "llmserve"


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation 'gelu'"),
        ("gemma2", {"hidden_act": "silu"}, "hidden_act 'silu'"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "attention_softcap"),
        ("gemma2", {"sliding_window": None}, "there is no sliding_window"),
        ("gemma2", {"sliding_window": 4, "sliding_window_size": 8}, "sliding_window_size"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1e6}}, "one object for each layer type"),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "scaling of sliding_attention",
        ),
        (
            "gemma3_text",
            {
                "rope_local_base_freq": 5.0,
                "rope_parameters": {"sliding_attention": {"rope_theta": 7.0}},
            },
            "rope_theta",
        ),
        ("gemma3", {"text_config": {}}, "model_type 'gemma3' is not supported"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    family: str, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_minimal(family, **changes)
