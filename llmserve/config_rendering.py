"""`config.json` as `transformers` writes it, for models that it opens unchanged.

Both spellings are written, version 4's (`rope_theta`, `rope_scaling`, `torch_dtype`) and version
5's (`rope_parameters`, `dtype`): each reads its own and ignores the other.
"""

from __future__ import annotations

from typing import Any

from .config import ModelConfig
from .config_values import render_scaling, render_special_ids

__all__ = ["render_gpt2", "render_llama", "render_mistral"]


def render_llama(config: ModelConfig) -> dict[str, Any]:
    """`config.json` of `model_type` llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **_render_llama_shape(config),
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


def render_mistral(config: ModelConfig) -> dict[str, Any]:
    """`config.json` of `model_type` mistral."""
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        **_render_llama_shape(config),
        "sliding_window": config.sliding_window,
    }


def _render_llama_shape(config: ModelConfig) -> dict[str, Any]:
    scaling = render_scaling(config.rope_scaling)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {
            "rope_theta": config.rope_theta,
            **(scaling or {"rope_type": "default"}),
        },
        **_render_shared(config),
    }


def render_gpt2(config: ModelConfig) -> dict[str, Any]:
    """`config.json` of `model_type` gpt2."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": config.max_seq_len,
        "activation_function": "gelu" if config.activation == "gelu" else "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        **_render_shared(config),
    }


def _render_shared(config: ModelConfig) -> dict[str, Any]:
    return {
        "tie_word_embeddings": config.tie_word_embeddings,
        **render_special_ids(config.bos_token_id, config.eos_token_ids, config.pad_token_id),
        "dtype": config.dtype,
        "torch_dtype": config.dtype,
    }
