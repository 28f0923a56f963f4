"""`config.json` of GPT-2: learned positions, LayerNorm, GELU, biases everywhere.

Names and defaults: `GPT2Config` of transformers 5.
"""

from __future__ import annotations

from typing import Any

from .config import ModelConfig
from .config_heads import render_head
from .config_keys import check_keys, parse_shared, render_shared
from .config_values import Values, first, take_choice, take_count
from .config_windows import parse_window
from .errors import ConfigError

__all__ = ["parse_gpt2", "render_gpt2"]

_KEYS = frozenset({
    "activation_function", "layer_norm_epsilon", "layer_types", "n_embd", "n_head", "n_inner",
    "n_layer", "n_positions",
})  # fmt: skip
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def parse_gpt2(values: Values) -> ModelConfig:
    """GPT-2."""
    check_keys(values, _KEYS)
    activation: Any = take_choice(values, "activation_function", _ACTIVATIONS, "gelu_new")
    hidden, heads = take_count(values, "n_embd"), take_count(values, "n_head")
    if hidden % heads:
        raise ConfigError(f"n_head ({heads}) must divide n_embd ({hidden})")
    return ModelConfig(
        **parse_shared(values, tied=True),
        **parse_window({**values, "sliding_window": None}),
        hidden_size=hidden,
        num_layers=take_count(values, "n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=take_count(values, "n_inner", 4 * hidden),
        max_seq_len=take_count(values, "n_positions", 1024),
        positions="learned",
        norm="layernorm",
        norm_eps=first(values.get("layer_norm_epsilon"), 1e-5),
        activation=activation,
        attention_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
    )


def render_gpt2(config: ModelConfig) -> dict[str, Any]:
    """What `parse_gpt2` reads."""
    return {
        **render_head(config, "GPT2", "GPT2LMHeadModel"),
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": config.max_seq_len,
        "activation_function": "gelu" if config.activation == "gelu" else "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        **render_shared(config),
    }
