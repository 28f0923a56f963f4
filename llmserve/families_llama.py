"""`config.json` of Llama's relatives: one gated feed-forward, a norm before each half block.

Names and defaults: `LlamaConfig`, `MistralConfig`, `Qwen2Config`, `Qwen3Config`, `Phi3Config` and
`Olmo2Config` of transformers 5. Each `parse_` reads a file, each `render_` writes what it reads;
a model that the family cannot express is a `ConfigError`, or reads back as another.
"""

from __future__ import annotations

from typing import Any

from .config import ModelConfig
from .config_keys import DECODER_KEYS, check_keys, parse_decoder, render_decoder
from .config_rope import parse_partial_rope, render_partial_rope
from .config_values import Values, take_bool, take_count
from .config_windows import parse_window, parse_windows, render_windows
from .errors import ConfigError

__all__ = [
    "parse_llama",
    "parse_mistral",
    "parse_olmo2",
    "parse_phi3",
    "parse_qwen2",
    "parse_qwen3",
    "qwen_windows",
    "render_llama",
    "render_mistral",
    "render_olmo2",
    "render_phi3",
    "render_qwen2",
    "render_qwen3",
]

_BIAS_KEYS = DECODER_KEYS | {"attention_bias"}
_WINDOW_KEYS = DECODER_KEYS | {"sliding_window"}
_QWEN_KEYS = _WINDOW_KEYS | {"max_window_layers", "use_sliding_window"}
# Its older files name code of their own, which nobody needs to run.
_PHI3_KEYS = _WINDOW_KEYS | {"auto_map", "original_max_position_embeddings"}
_MISTRAL_DEFAULTS = {
    "max_position_embeddings": 131_072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}
_QWEN_DEFAULTS = {"max_position_embeddings": 32_768, "num_key_value_heads": 32}
_PHI3_DEFAULTS = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_OLMO2_DEFAULTS = {"rms_norm_eps": 1e-5}


def parse_llama(values: Values) -> ModelConfig:
    """Llama: biases on all of attention's projections and the feed-forward's, or on none."""
    check_keys(values, _BIAS_KEYS | {"mlp_bias"})
    return ModelConfig(
        **parse_decoder(values),
        **_biases(values),
        **parse_window({**values, "sliding_window": None}),
        mlp_bias=take_bool(values, "mlp_bias", False),
    )


def render_llama(config: ModelConfig) -> dict[str, Any]:
    """What `parse_llama` reads."""
    _check_heads(config)
    return {
        **render_decoder(config, "llama", "Llama"),
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


def parse_mistral(values: Values) -> ModelConfig:
    """Mistral: no biases, and a window in every layer or in none."""
    check_keys(values, _WINDOW_KEYS)
    values = {**_MISTRAL_DEFAULTS, **values}  # a null window is none, other than an absent one
    return ModelConfig(**parse_decoder(values), **parse_window(values))


def render_mistral(config: ModelConfig) -> dict[str, Any]:
    """What `parse_mistral` reads."""
    _check_heads(config)
    values = render_decoder(config, "mistral", "Mistral")
    return {**values, "sliding_window": config.sliding_window}


def parse_qwen2(values: Values) -> ModelConfig:
    """Qwen2 and 2.5: biases on query, key and value; a window from some layer on, if at all."""
    check_keys(values, _QWEN_KEYS)
    values = {**_QWEN_DEFAULTS, **values}
    return ModelConfig(**parse_decoder(values), **qwen_windows(values), attention_bias=True)


def render_qwen2(config: ModelConfig) -> dict[str, Any]:
    """What `parse_qwen2` reads."""
    return {**render_decoder(config, "qwen2", "Qwen2"), **_render_qwen_windows(config)}


def parse_qwen3(values: Values) -> ModelConfig:
    """Qwen3: like Llama, with norms of each query and key head, and Qwen2's windows."""
    check_keys(values, _QWEN_KEYS | _BIAS_KEYS)
    values = {**_QWEN_DEFAULTS, "head_dim": 128, **values}
    return ModelConfig(
        **parse_decoder(values), **_biases(values), **qwen_windows(values), qk_norm="head"
    )


def render_qwen3(config: ModelConfig) -> dict[str, Any]:
    """What `parse_qwen3` reads."""
    return {
        **render_decoder(config, "qwen3", "Qwen3"),
        **_render_qwen_windows(config),
        "attention_bias": config.attention_bias,
    }


def qwen_windows(values: Values) -> dict[str, Any]:
    """Windows of Qwen's files: in the layers from `max_window_layers` on, where they are used."""
    num_layers = take_count(values, "num_hidden_layers")
    first_windowed = values.get("max_window_layers", 28)
    if type(first_windowed) is not int or first_windowed < 0:
        raise ConfigError(f"max_window_layers must be a whole number, got {first_windowed!r}")
    if not take_bool(values, "use_sliding_window", False):
        return parse_windows({**values, "sliding_window": None}, [False] * num_layers)
    is_windowed = [index >= first_windowed for index in range(num_layers)]
    return parse_windows({"sliding_window": 4096, **values}, is_windowed)


def _render_qwen_windows(config: ModelConfig) -> dict[str, Any]:
    windows = [config.window_of(index) is not None for index in range(config.num_layers)]
    return {
        **render_windows(config),
        "use_sliding_window": any(windows),
        "max_window_layers": windows.index(True) if any(windows) else config.num_layers,
    }


def parse_phi3(values: Values) -> ModelConfig:
    """Phi-3 and 4: like Mistral, with positions in a part of each head; fused on disk."""
    check_keys(values, _PHI3_KEYS | {"attention_bias"})
    if take_bool(values, "attention_bias", False):
        raise ConfigError("attention_bias is not supported here")
    values = {**_PHI3_DEFAULTS, **values}
    hidden, heads = take_count(values, "hidden_size"), take_count(values, "num_attention_heads")
    rope = parse_partial_rope(values, take_count(values, "head_dim", hidden // heads))
    return ModelConfig(**parse_decoder(values, rope=rope), **parse_window(values))


def render_phi3(config: ModelConfig) -> dict[str, Any]:
    """What `parse_phi3` reads."""
    _check_heads(config)
    return {
        **render_decoder(config, "phi3", "Phi3", heads=("sequence", "token", "embedding")),
        **render_partial_rope(config),
        "sliding_window": config.sliding_window,
    }


def parse_olmo2(values: Values) -> ModelConfig:
    """OLMo 2: norms after the half blocks, and of all queries and all keys together."""
    check_keys(values, _BIAS_KEYS)
    values = {**_OLMO2_DEFAULTS, **values}
    return ModelConfig(
        **parse_decoder(values),
        **_biases(values),
        **parse_window({**values, "sliding_window": None}),
        norm_placement="post",
        qk_norm="full",
    )


def render_olmo2(config: ModelConfig) -> dict[str, Any]:
    """What `parse_olmo2` reads."""
    values = render_decoder(config, "olmo2", "Olmo2", heads=("sequence", "embedding"))
    return {**values, "attention_bias": config.attention_bias}


def _biases(values: Values) -> dict[str, Any]:
    bias = take_bool(values, "attention_bias", False)
    return {"attention_bias": bias, "attention_output_bias": bias}


def _check_heads(config: ModelConfig) -> None:
    """What transformers insists on in these families, whatever `head_dim` says."""
    if config.hidden_size % config.num_heads:
        raise ConfigError(
            f"num_heads ({config.num_heads}) must divide hidden_size ({config.hidden_size}) there"
        )
