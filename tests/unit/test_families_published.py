"""Published models, and what all families beside Llama and GPT-2 have in common."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmserve.config import Experts, ModelConfig
from llmserve.errors import ConfigError
from llmserve.families import family_of, parse_config, render_config
from support.published import MINIMAL, PUBLISHED
from support.variants import GEMMA2, GEMMA3, MIXTRAL, PHI3, QWEN3_MOE, VARIANTS


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_model_is_read_without_a_word_and_written_as_its_family(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    values = PUBLISHED[name]
    config = parse_config(values)
    assert not caplog.records
    expected = "mistral" if values["model_type"] == "phi3" else values["model_type"]
    assert family_of(config) == expected  # whole heads turned: what others call a Mistral
    assert parse_config(json.loads(json.dumps(render_config(config)))) == config
    assert config.dtype == "bfloat16"


def test_published_settings_arrive() -> None:
    read = {name: parse_config(values) for name, values in PUBLISHED.items()}
    qwen2, qwen3 = read["Qwen2.5-0.5B"], read["Qwen3-0.6B"]
    assert (qwen2.attention_bias, qwen2.attention_output_bias, qwen2.head_dim) == (True, False, 64)
    assert (qwen3.qk_norm, qwen3.attention_bias, qwen3.q_size) == ("head", False, 2048)
    assert qwen2.sliding_window is qwen3.sliding_window is None
    assert read["Phi-3-mini-4k-instruct"].sliding_window == 2047
    gemma2 = read["gemma-2-2b"]
    assert (gemma2.attention_softcap, gemma2.logits_softcap, gemma2.embedding_scale) == (50, 30, 48)
    assert [gemma2.window_of(index) for index in range(3)] == [4096, None, 4096]
    gemma3 = read["gemma-3-1b-it"]
    assert gemma3.full_attention_layers == (5, 11, 17, 23)
    assert (gemma3.rope_theta, gemma3.local_rope_theta) == (1e6, 1e4)
    assert (gemma3.attention_scale, gemma3.attention_softcap) == (None, None)
    assert read["Mixtral-8x7B-v0.1"].experts == Experts(
        num_experts=8, num_experts_per_token=2, intermediate_size=14336
    )
    assert read["Qwen1.5-MoE-A2.7B"].experts == Experts(
        num_experts=60,
        num_experts_per_token=4,
        intermediate_size=1408,
        shared_intermediate_size=5632,
        normalize_weights=False,
    )
    assert read["Qwen3-30B-A3B"].experts == Experts(
        num_experts=128, num_experts_per_token=8, intermediate_size=768
    )


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("qwen2", {"max_seq_len": 32_768, "num_kv_heads": 32, "norm_eps": 1e-6}),
        ("qwen3", {"max_seq_len": 32_768, "num_kv_heads": 32, "head_dim": 128}),
        ("olmo2", {"max_seq_len": 2048, "num_kv_heads": 32, "norm_eps": 1e-5}),
        ("phi3", {"max_seq_len": 4096, "num_kv_heads": 32, "norm_eps": 1e-5}),
        ("gemma2", {"max_seq_len": 8192, "num_kv_heads": 4, "head_dim": 256, "norm_eps": 1e-6}),
        ("gemma3_text", {"max_seq_len": 131_072, "num_kv_heads": 4, "rope_theta": 1e6}),
        ("mixtral", {"max_seq_len": 131_072, "num_kv_heads": 8, "rope_theta": 1e6}),
        ("qwen2_moe", {"max_seq_len": 32_768, "num_kv_heads": 16, "attention_bias": True}),
        ("qwen3_moe", {"max_seq_len": 32_768, "num_kv_heads": 4, "attention_bias": False}),
    ],
)
def test_absent_settings_are_transformers_defaults(family: str, fields: dict[str, Any]) -> None:
    values = {"model_type": family, **MINIMAL, "hidden_size": 64, "num_attention_heads": 32}
    del values["num_key_value_heads"]
    config = parse_config(values)
    assert {name: getattr(config, name) for name in fields} == fields
    assert config.tie_word_embeddings == family.startswith("gemma")


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("gemma3_text", GEMMA2),
        ("gemma2", GEMMA3),
        ("mistral", PHI3),
        ("qwen2_moe", QWEN3_MOE),
        ("mixtral", QWEN3_MOE),
        ("qwen3_moe", MIXTRAL),
        ("qwen3_moe", VARIANTS["qwen3"]),
        ("llama", VARIANTS["own-odd-heads"]),
    ],
)
def test_file_of_a_family_that_cannot_hold_the_model_is_not_written(
    family: Any, config: ModelConfig
) -> None:
    with pytest.raises(ConfigError, match=f"model_type '{family}' cannot hold"):
        render_config(config, family)
