"""`config.json` of Gemma 2 and of Gemma 3's text models.

Their embeddings are scaled by sqrt(hidden_size), their norms' weights stored less 1, and a norm
stands before and after each half block (Gemma 2, arXiv 2408.00118, section 2; Gemma 3, arXiv
2503.19786, section 2). Names and defaults: `Gemma2Config` and `Gemma3TextConfig` of transformers 5.
"""

from __future__ import annotations

from typing import Any

from .config import ModelConfig
from .config_heads import Kind
from .config_keys import DECODER_KEYS, check_keys, parse_decoder, render_decoder
from .config_rope import parse_local_rope, render_local_rope
from .config_values import Values, first, take_bool, take_choice, take_count
from .config_windows import parse_windows, render_windows
from .errors import ConfigError

__all__ = ["parse_gemma2", "parse_gemma3", "render_gemma2", "render_gemma3"]

_KEYS = DECODER_KEYS | {
    "attention_bias", "attn_logit_softcapping", "final_logit_softcapping", "hidden_activation",
    "query_pre_attn_scalar", "sliding_window",
}  # fmt: skip
_GEMMA2_KEYS = _KEYS | {"sliding_window_size"}
_GEMMA3_KEYS = _KEYS | {
    "_sliding_window_pattern", "rope_local_base_freq", "sliding_window_pattern",
}  # fmt: skip
_DEFAULTS = {"head_dim": 256, "num_key_value_heads": 4, "sliding_window": 4096}
_GEMMA2_DEFAULTS = {
    "max_position_embeddings": 8192,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    **_DEFAULTS,
}
_GEMMA3_DEFAULTS = {"max_position_embeddings": 131_072, **_DEFAULTS}
_ACTIVATIONS = {"gelu_pytorch_tanh": "geglu_tanh"}


def parse_gemma2(values: Values) -> ModelConfig:
    """Gemma 2: capped scores and logits, a window in every other layer."""
    check_keys(values, _GEMMA2_KEYS)
    values = {**_GEMMA2_DEFAULTS, **values}
    if (
        first(values.get("sliding_window_size"), values["sliding_window"])
        != values["sliding_window"]
    ):
        raise ConfigError("sliding_window_size differs from sliding_window")
    windowed = [index % 2 == 0 for index in range(take_count(values, "num_hidden_layers"))]
    return ModelConfig(
        **_parse(values),
        **parse_windows(values, windowed),
        attention_softcap=values["attn_logit_softcapping"],
        logits_softcap=values["final_logit_softcapping"],
    )


def render_gemma2(config: ModelConfig) -> dict[str, Any]:
    """What `parse_gemma2` reads."""
    return {
        **_render(config, "gemma2", "Gemma2", ("sequence", "token", "embedding")),
        "attn_logit_softcapping": config.attention_softcap,
    }


def parse_gemma3(values: Values) -> ModelConfig:
    """Gemma 3, text: norms of each query and key head, mostly windows with a base of their own."""
    check_keys(values, _GEMMA3_KEYS)
    if values.get("attn_logit_softcapping") is not None:
        raise ConfigError("attn_logit_softcapping is not supported here: Gemma 3 has none")
    values = {**_GEMMA3_DEFAULTS, **values}
    pattern = take_count(values, "sliding_window_pattern", _pattern_of_version_5(values))
    num_layers = take_count(values, "num_hidden_layers")
    windows = parse_windows(values, [(index + 1) % pattern != 0 for index in range(num_layers)])
    rope = parse_local_rope(values)
    if not windows:
        del rope["local_rope_theta"]
    return ModelConfig(
        **_parse(values, rope),
        **windows,
        qk_norm="head",
        logits_softcap=values.get("final_logit_softcapping"),
    )


def render_gemma3(config: ModelConfig) -> dict[str, Any]:
    """What `parse_gemma3` reads."""
    return {
        **_render(config, "gemma3_text", "Gemma3Text", ("sequence", "embedding")),
        **render_local_rope(config),
        "attn_logit_softcapping": config.attention_softcap,
    }


def _pattern_of_version_5(values: Values) -> int:
    return take_count(values, "_sliding_window_pattern", 6)


def _parse(values: Values, rope: dict[str, Any] | None = None) -> dict[str, Any]:
    inner = take_choice(values, "hidden_activation", _ACTIVATIONS, "gelu_pytorch_tanh")
    if first(values.get("hidden_act"), "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise ConfigError(f"hidden_act {values['hidden_act']!r} is not supported here")
    fields = parse_decoder({**values, "hidden_act": "silu"}, tied=True, rope=rope)
    bias = take_bool(values, "attention_bias", False)
    scalar = take_count(values, "query_pre_attn_scalar", 256)
    return {
        **fields,
        "activation": inner,
        "attention_bias": bias,
        "attention_output_bias": bias,
        "norm_placement": "both",
        "norm_weight_offset": 1.0,
        "embedding_scale": fields["hidden_size"] ** 0.5,
        "attention_scale": None if scalar == fields["head_dim"] else scalar**-0.5,
    }


def _render(
    config: ModelConfig, model_type: str, prefix: str, heads: tuple[Kind, ...]
) -> dict[str, Any]:
    if config.hidden_size % config.num_heads:  # transformers insists, head_dim or not
        raise ConfigError(
            f"num_heads ({config.num_heads}) must divide hidden_size ({config.hidden_size}) there"
        )
    generation = prefix.removesuffix("Text") + "ForCausalLM"
    values = {
        **render_decoder(config, model_type, prefix, heads=heads, generation=generation),
        **render_windows(config),
        # transformers wants a window, be there layers with it or not.
        "sliding_window": first(config.sliding_window, _DEFAULTS["sliding_window"]),
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": config.attention_bias,
        "query_pre_attn_scalar": round(config.score_scale**-2),
        "final_logit_softcapping": config.logits_softcap,
    }
    del values["hidden_act"]
    return values
