"""config.json of others and our own: both spellings are read, the rest is refused by name."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from llmserve.config import ModelConfig, RopeScaling
from llmserve.errors import ConfigError
from llmserve.families import (
    family_of,
    parse_config,
    render_config,
    render_generation_config,
    with_generation_config,
)
from support.variants import GPT2, LLAMA, VARIANTS

MINIMAL_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
MINIMAL_MISTRAL = {**MINIMAL_LLAMA, "model_type": "mistral", "num_key_value_heads": 2}
MINIMAL_GPT2 = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def parse(values: dict[str, Any], **changes: Any) -> ModelConfig:
    return parse_config({**values, **changes})


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_survives_its_file(name: str) -> None:
    config = VARIANTS[name]
    assert family_of(config) == name.split("-")[0].replace("own", "llmserve")
    values = json.loads(json.dumps(render_config(config)))
    assert parse_config(values) == config
    assert with_generation_config(config, render_generation_config(config)) == config


def test_absent_settings_are_transformers_defaults() -> None:
    config = parse(MINIMAL_LLAMA)
    assert (config.num_kv_heads, config.head_dim, config.max_seq_len) == (4, 8, 2048)
    assert (config.norm_eps, config.rope_theta, config.tie_word_embeddings) == (1e-6, 1e4, False)
    config = parse(MINIMAL_GPT2)
    assert (config.intermediate_size, config.max_seq_len, config.activation) == (
        128,
        1024,
        "gelu_tanh",
    )
    assert config.tie_word_embeddings
    assert config.eos_token_ids == ()


def test_absent_settings_of_mistral_are_its_own_defaults() -> None:
    values = {**MINIMAL_MISTRAL, "num_attention_heads": 16}
    del values["num_key_value_heads"]
    config = parse_config(values)
    assert (config.num_kv_heads, config.max_seq_len, config.sliding_window) == (8, 131_072, 4096)
    assert (config.norm_eps, config.rope_theta, config.tie_word_embeddings) == (1e-6, 1e4, False)


def test_mistral_without_a_window_is_a_llama() -> None:
    layers = {"layer_types": ["full_attention"] * 2}
    config = parse(MINIMAL_MISTRAL, sliding_window=None, **layers)
    assert config == parse(MINIMAL_LLAMA, num_key_value_heads=2, max_position_embeddings=131_072)
    assert render_config(config)["model_type"] == "llama"


def test_window_of_mistral_holds_in_every_layer() -> None:
    layers = {"layer_types": ["sliding_attention"] * 2}
    config = parse(MINIMAL_MISTRAL, sliding_window=3, **layers)
    assert [config.window_of(index) for index in range(2)] == [3, 3]


def test_some_layers_may_be_without_the_window_in_our_own_files() -> None:
    values = render_config(LLAMA, "llmserve")
    config = parse(values, sliding_window=3, full_attention_layers=[1])
    assert [config.window_of(index) for index in range(2)] == [3, None]
    del values["sliding_window"], values["full_attention_layers"]
    assert parse_config(values) == LLAMA


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sliding_window": 0}, "sliding_window"),
        ({"sliding_window": "4"}, "sliding_window"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types"),
        ({"sliding_window": None, "layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_mistral_settings_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse(MINIMAL_MISTRAL, **changes)


def test_biases_in_a_mistral_file_are_named_as_unknown(caplog: pytest.LogCaptureFixture) -> None:
    assert not parse(MINIMAL_MISTRAL, attention_bias=True).attention_bias
    assert "attention_bias" in caplog.text


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
        {
            "rope_theta": 5e5,
            "rope_scaling": LLAMA3,
            "rope_parameters": {"rope_theta": 5e5, **LLAMA3},
        },
    ],
)
def test_both_spellings_of_rope_are_read(spelling: dict[str, Any]) -> None:
    config = parse(MINIMAL_LLAMA, **spelling)
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling(kind="llama3", factor=8.0, original_max_seq_len=32)


def test_oldest_spelling_of_linear_scaling_is_read() -> None:
    config = parse(MINIMAL_LLAMA, rope_scaling={"type": "linear", "factor": 2.0})
    assert config.rope_scaling == RopeScaling(kind="linear", factor=2.0)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["bfloat16", "torch.bfloat16"])
def test_both_spellings_of_the_type_are_read(key: str, value: str) -> None:
    assert parse(MINIMAL_LLAMA, **{key: value}).dtype == "bfloat16"


def test_end_ids_are_those_of_the_generation_config_then_the_rest() -> None:
    config = parse(MINIMAL_LLAMA, eos_token_id=[7, 3], bos_token_id=1)
    merged = with_generation_config(config, {"eos_token_id": [9, 7], "bos_token_id": 5})
    assert merged.eos_token_ids == (9, 7, 3)
    assert merged.bos_token_id == 1
    assert with_generation_config(config, {"eos_token_id": 4}).eos_token_ids == (4, 7, 3)
    assert with_generation_config(config, {}).eos_token_ids == (7, 3)


def test_ids_that_no_token_has_are_left_out_aloud(caplog: pytest.LogCaptureFixture) -> None:
    config = parse(MINIMAL_GPT2, bos_token_id=50256, eos_token_id=[50256, 3], pad_token_id=-1)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (None, (3,), None)
    assert len(caplog.records) == 3


def test_unknown_setting_of_others_is_named_in_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    parse(MINIMAL_LLAMA, new_thing=1, another=2, use_cache=True, transformers_version="5")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "another, new_thing" in caplog.text


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"model_type": None}, "model_type"),
        ({"hidden_act": "relu"}, "relu"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": 3}, "layer_types"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale": 1}}, "mscale"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 2e4}}, "rope_theta"),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 4.0},
            },
            "disagree",
        ),
        ({"dtype": "float64"}, "float64"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_attention_heads": 5}, "head_dim"),
        ({"attention_bias": "yes"}, "attention_bias"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse(MINIMAL_LLAMA, **changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"activation_function": "relu"}, "relu"),
        ({"activation_function": {}}, "activation_function"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"n_head": 3}, "n_head"),
    ],
)
def test_gpt2_settings_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse(MINIMAL_GPT2, **changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_sise": 32}, "hidden_sise"),
        ({"vocab_size": "64"}, "vocab_size"),
        ({"rope_scaling": {"kind": "linear"}}, "factor"),
        ({"rope_scaling": {"kind": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": 7}, "llmserve"),
        ({"eos_token_ids": 3}, "llmserve"),
        ({"eos_token_ids": ["a"]}, "eos_token_ids"),
        ({"eos_token_ids": [1.5]}, "eos_token_ids"),
        ({"bos_token_id": True}, "bos_token_id"),
        ({"eos_token_ids": [999]}, "999"),
        ({"mlp_bias": 1}, "mlp_bias"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"sliding_window": True}, "sliding_window"),
        ({"sliding_window": 4, "full_attention_layers": [0, 1]}, "every layer"),
        ({"sliding_window": 4, "full_attention_layers": [2]}, r"0 to 1, ascending, got \[2\]"),
        ({"sliding_window": 4, "full_attention_layers": [-1]}, "full_attention_layers"),
        ({"sliding_window": 4, "full_attention_layers": [0, 0]}, "ascending"),
        ({"sliding_window": 4, "full_attention_layers": [True]}, "full_attention_layers"),
        ({"sliding_window": 4, "full_attention_layers": "1"}, "full_attention_layers"),
        ({"sliding_window": 4, "full_attention_layers": 1}, "llmserve"),
        ({"full_attention_layers": [1]}, "needs sliding_window"),
    ],
)
def test_our_own_files_are_read_strictly(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse(render_config(LLAMA, "llmserve"), **changes)


def test_missing_setting_in_our_own_file_is_named() -> None:
    values = render_config(GPT2, "llmserve")
    del values["num_layers"]
    with pytest.raises(ConfigError, match="num_layers"):
        parse_config(values)
