"""`config.json` of models with experts: Mixtral, Qwen2-MoE and Qwen3-MoE.

Names and defaults: `MixtralConfig`, `Qwen2MoeConfig` and `Qwen3MoeConfig` of transformers 5.
"""

from __future__ import annotations

from typing import Any

from .config import Experts, ModelConfig
from .config_keys import DECODER_KEYS, check_keys, parse_decoder, render_decoder
from .config_rope import parse_rope
from .config_values import Values, first, take_bool, take_count, take_layers
from .config_windows import parse_window, parse_windows, render_windows
from .errors import ConfigError

__all__ = [
    "parse_mixtral",
    "parse_qwen2_moe",
    "parse_qwen3_moe",
    "render_mixtral",
    "render_qwen2_moe",
    "render_qwen3_moe",
]

_MIXTRAL_KEYS = DECODER_KEYS | {"num_experts_per_tok", "num_local_experts", "sliding_window"}
_QWEN_KEYS = DECODER_KEYS | {
    "decoder_sparse_step", "max_window_layers", "mlp_only_layers", "moe_intermediate_size",
    "norm_topk_prob", "num_experts", "num_experts_per_tok", "sliding_window", "use_sliding_window",
}  # fmt: skip
_QWEN2_KEYS = _QWEN_KEYS | {"qkv_bias", "shared_expert_intermediate_size"}
_QWEN3_KEYS = _QWEN_KEYS | {"attention_bias", "num_local_experts"}
_MIXTRAL_DEFAULTS = {
    "max_position_embeddings": 131_072,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
}
_QWEN2_DEFAULTS = {
    "max_position_embeddings": 32_768,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 16,
    "shared_expert_intermediate_size": 5632,
}
_QWEN3_DEFAULTS = {
    "max_position_embeddings": 32_768,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
}


def parse_mixtral(values: Values) -> ModelConfig:
    """Mixtral: Mistral with experts in every layer."""
    check_keys(values, _MIXTRAL_KEYS)
    values = {**_MIXTRAL_DEFAULTS, **values}
    experts = Experts(
        num_experts=take_count(values, "num_local_experts", 8),
        num_experts_per_token=take_count(values, "num_experts_per_tok", 2),
        intermediate_size=take_count(values, "intermediate_size"),
    )
    rope = parse_rope(values, theta=1_000_000.0)
    return ModelConfig(**parse_decoder(values, rope=rope), **parse_window(values), experts=experts)


def render_mixtral(config: ModelConfig) -> dict[str, Any]:
    """What `parse_mixtral` reads."""
    experts = _experts_of(config)
    return {
        **render_decoder(config, "mixtral", "Mixtral"),
        "intermediate_size": experts.intermediate_size,
        "num_local_experts": experts.num_experts,
        "num_experts_per_tok": experts.num_experts_per_token,
        "sliding_window": config.sliding_window,
    }


def parse_qwen2_moe(values: Values) -> ModelConfig:
    """Qwen2-MoE: Qwen2 with experts, and one more that every token goes through."""
    check_keys(values, _QWEN2_KEYS)
    values = {**_QWEN2_DEFAULTS, **values}
    num_layers = take_count(values, "num_hidden_layers")
    is_windowed = take_bool(values, "use_sliding_window", False)
    if is_windowed and values.get("layer_types") is None:
        # Versions of transformers differ in which layers these are.
        raise ConfigError("use_sliding_window without layer_types is not supported here")
    window = values.get("sliding_window", 4096) if is_windowed else None
    return ModelConfig(
        **parse_decoder(values),
        **parse_windows({**values, "sliding_window": window}, [False] * num_layers),
        attention_bias=take_bool(values, "qkv_bias", True),
        experts=_parse_experts(
            values, 60, shared=take_count(values, "shared_expert_intermediate_size")
        ),
    )


def render_qwen2_moe(config: ModelConfig) -> dict[str, Any]:
    """What `parse_qwen2_moe` reads."""
    return {
        **render_decoder(config, "qwen2_moe", "Qwen2Moe"),
        **_render_experts(config),
        **render_windows(config),
        "shared_expert_intermediate_size": _experts_of(config).shared_intermediate_size,
        "use_sliding_window": config.sliding_window is not None,
        "qkv_bias": config.attention_bias,
    }


def parse_qwen3_moe(values: Values) -> ModelConfig:
    """Qwen3-MoE: Qwen3 with experts; a window in every layer or in none."""
    check_keys(values, _QWEN3_KEYS)
    values = {**_QWEN3_DEFAULTS, **values}
    if not take_bool(values, "use_sliding_window", False):
        values["sliding_window"] = None
    bias = take_bool(values, "attention_bias", False)
    return ModelConfig(
        **parse_decoder(values),
        **parse_window({"sliding_window": 4096, **values}),
        attention_bias=bias,
        attention_output_bias=bias,
        qk_norm="head",
        experts=_parse_experts(values, 128, shared=None),
    )


def render_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    """What `parse_qwen3_moe` reads."""
    return {
        **render_decoder(config, "qwen3_moe", "Qwen3Moe"),
        **_render_experts(config),
        "sliding_window": config.sliding_window,
        "use_sliding_window": config.sliding_window is not None,
        "attention_bias": config.attention_bias,
    }


def _parse_experts(values: Values, default: int, *, shared: int | None) -> Experts | None:
    """Qwen's settings, `default` experts where there is no number.

    None where every layer is left with one plain feed-forward.
    """
    num_layers = take_count(values, "num_hidden_layers")
    step = take_count(values, "decoder_sparse_step", 1)
    dense = set(take_layers(values, "mlp_only_layers", num_layers))
    dense |= {index for index in range(num_layers) if (index + 1) % step}
    num_experts = _num_experts(values, default)
    if num_experts == 0 or len(dense) == num_layers:
        return None
    return Experts(
        num_experts=num_experts,
        num_experts_per_token=take_count(values, "num_experts_per_tok"),
        intermediate_size=take_count(values, "moe_intermediate_size"),
        shared_intermediate_size=shared,
        normalize_weights=take_bool(values, "norm_topk_prob", False),
        dense_layers=tuple(sorted(dense)),
    )


def _num_experts(values: Values, default: int) -> int:
    """Under either of its names: version 5 of transformers writes Qwen3's as Mixtral's."""
    one, other = values.get("num_experts"), values.get("num_local_experts")
    if one is not None and other not in (None, one):
        raise ConfigError(f"num_experts is {one!r} and {other!r} in num_local_experts")
    found = first(one, other, default)
    return (
        0
        if type(found) is int and found == 0
        else take_count({"num_experts": found}, "num_experts")
    )


def _render_experts(config: ModelConfig) -> dict[str, Any]:
    experts = _experts_of(config)
    return {
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.num_experts_per_token,
        "moe_intermediate_size": experts.intermediate_size,
        "norm_topk_prob": experts.normalize_weights,
        "mlp_only_layers": list(experts.dense_layers),
        "decoder_sparse_step": 1,
    }


def _experts_of(config: ModelConfig) -> Experts:
    if config.experts is None:
        raise ConfigError("a model without experts is none of these families")
    return config.experts
