"""`config.json` of others and our own ⇄ `ModelConfig`.

Four families are read and written: `llama` (RoPE, RMSNorm, SwiGLU), `mistral` (the same without
biases, every layer with a sliding window), `gpt2` (learned positions, LayerNorm, GELU) and our own
`llmserve` for every other mix. A setting of others that would change the result and is not
supported is refused by name; one that is unknown is named in a warning; in our own files it is an
error. Names and defaults: `LlamaConfig`, `MistralConfig` and `GPT2Config` of transformers, in the
spellings of versions 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and 5 (`rope_parameters`,
`dtype`).
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, cast

from .config import ModelConfig, RopeScaling
from .config_rendering import render_gpt2, render_llama, render_mistral
from .config_values import (
    Values,
    first,
    parse_rope,
    parse_special_ids,
    render_special_ids,
    take_bool,
    take_choice,
    take_count,
)
from .errors import ConfigError
from .layouts import Family, expected_tensors

__all__ = [
    "Family",
    "expected_tensors",
    "family_of",
    "parse_config",
    "render_config",
    "render_generation_config",
    "with_generation_config",
]

_log = logging.getLogger("llmserve")

_LLAMA_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu"}
_GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}

# Settings of others that would change the result; these values of theirs do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "auto_map": (None,),
    "is_encoder_decoder": (False, None),
    "partial_rotary_factor": (1.0, None),
    "scale_attn_by_inverse_layer_idx": (False, None),
    "scale_attn_weights": (True, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
}
_SHARED_KEYS = {
    "bos_token_id", "dtype", "eos_token_id", "layer_types", "model_type", "pad_token_id",
    "quantization_config", "tie_word_embeddings", "torch_dtype", "vocab_size",
}  # fmt: skip
_LLAMA_KEYS = {
    "attention_bias", "head_dim", "hidden_act", "hidden_size", "intermediate_size",
    "max_position_embeddings", "mlp_bias", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta",
}  # fmt: skip
_MISTRAL_KEYS = _LLAMA_KEYS - {"attention_bias", "mlp_bias"} | {"sliding_window"}
_MISTRAL_DEFAULTS = {
    "max_position_embeddings": 131_072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}
_GPT2_KEYS = {
    "activation_function", "layer_norm_epsilon", "n_embd", "n_head", "n_inner", "n_layer",
    "n_positions",
}  # fmt: skip
# Settings of others without effect on what is computed here: training, tasks, bookkeeping.
_WITHOUT_EFFECT = {
    "_name_or_path", "architectures", "attention_dropout", "attn_pdrop", "chunk_size_feed_forward",
    "embd_pdrop", "id2label", "initializer_range", "label2id", "n_ctx", "output_attentions",
    "output_hidden_states", "pretraining_tp", "problem_type", "reorder_and_upcast_attn",
    "resid_pdrop", "return_dict", "summary_activation", "summary_first_dropout",
    "summary_proj_to_labels", "summary_type", "summary_use_proj", "task_specific_params",
    "transformers_version", "use_cache",
}  # fmt: skip
_OWN_FIELDS = {field.name: field for field in dataclasses.fields(ModelConfig)}


def parse_config(values: Values) -> ModelConfig:
    """The model that a `config.json` describes.

    Raises:
        ConfigError: a family, setting or combination that is not supported, or a value out of
            range; the message names it.
    """
    family = values.get("model_type")
    if family == "llama":
        return _parse_llama(values)
    if family == "mistral":
        return _parse_mistral(values)
    if family == "gpt2":
        return _parse_gpt2(values)
    if family == "llmserve":
        return _parse_own(values)
    raise ConfigError(
        f"model_type {family!r} is not supported; llmserve opens 'llama', 'mistral', 'gpt2' and "
        "'llmserve'"
    )


def family_of(config: ModelConfig) -> Family:
    """The family whose files can hold the model unchanged, `llmserve` if no other program's can."""
    if _is_llama(config):
        return "llama"
    if _is_mistral(config):
        return "mistral"
    return "gpt2" if _is_gpt2(config) else "llmserve"


def render_config(config: ModelConfig, family: Family | None = None) -> dict[str, Any]:
    """`config.json` for a model, by default of the family that `family_of` finds."""
    family = family or family_of(config)
    if family == "llama":
        return render_llama(config)
    if family == "mistral":
        return render_mistral(config)
    if family == "gpt2":
        return render_gpt2(config)
    return {"model_type": "llmserve", **dataclasses.asdict(config)}


def with_generation_config(config: ModelConfig, values: Values) -> ModelConfig:
    """`config` with the special ids of a `generation_config.json`: its end ids first, then ours."""
    ids = parse_special_ids(values, config.vocab_size)
    return dataclasses.replace(
        config,
        eos_token_ids=tuple(dict.fromkeys(ids["eos_token_ids"] + config.eos_token_ids)),
        bos_token_id=first(config.bos_token_id, ids["bos_token_id"]),
        pad_token_id=first(config.pad_token_id, ids["pad_token_id"]),
    )


def render_generation_config(config: ModelConfig) -> dict[str, Any]:
    """`generation_config.json`: the special ids that the model has."""
    ids = render_special_ids(config.bos_token_id, config.eos_token_ids, config.pad_token_id)
    return {name: value for name, value in ids.items() if value is not None}


def _parse_llama(values: Values) -> ModelConfig:
    _check_keys(values, _LLAMA_KEYS)
    bias = take_bool(values, "attention_bias", False)
    return ModelConfig(
        **_llama_shape(values),
        attention_bias=bias,
        attention_output_bias=bias,
        mlp_bias=take_bool(values, "mlp_bias", False),
    )


def _parse_mistral(values: Values) -> ModelConfig:
    values = {**_MISTRAL_DEFAULTS, **values}
    window = values["sliding_window"]  # null is no window, other than absence
    kind = "full_attention" if window is None else "sliding_attention"
    _check_keys(values, _MISTRAL_KEYS, layer_kind=kind)
    return ModelConfig(**_llama_shape(values), sliding_window=window)


def _llama_shape(values: Values) -> dict[str, Any]:
    """The `ModelConfig` fields that Llama's and Mistral's files have in common."""
    hidden, heads = take_count(values, "hidden_size"), take_count(values, "num_attention_heads")
    theta, scaling = parse_rope(values)
    return {
        **_shared(values, tied=False),
        "hidden_size": hidden,
        "num_layers": take_count(values, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": take_count(values, "num_key_value_heads", heads),
        "head_dim": take_count(values, "head_dim", _head_dim(hidden, heads)),
        "intermediate_size": take_count(values, "intermediate_size"),
        "max_seq_len": take_count(values, "max_position_embeddings", 2048),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": first(values.get("rms_norm_eps"), 1e-6),
        "activation": take_choice(values, "hidden_act", _LLAMA_ACTIVATIONS, "silu"),
    }


def _parse_gpt2(values: Values) -> ModelConfig:
    _check_keys(values, _GPT2_KEYS)
    activation = take_choice(values, "activation_function", _GPT2_ACTIVATIONS, "gelu_new")
    hidden, heads = take_count(values, "n_embd"), take_count(values, "n_head")
    if hidden % heads:
        raise ConfigError(f"n_head ({heads}) must divide n_embd ({hidden})")
    return ModelConfig(
        **_shared(values, tied=True),
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
        activation=cast(Any, activation),
        attention_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
    )


def _parse_own(values: Values) -> ModelConfig:
    fields = {name: value for name, value in values.items() if name in _OWN_FIELDS}
    unknown = sorted(values.keys() - _OWN_FIELDS.keys() - {"model_type", "quantization_config"})
    if unknown:
        raise ConfigError(f"unknown settings {unknown} for model_type 'llmserve'")
    for name in fields.keys() & {
        name for name, field in _OWN_FIELDS.items() if field.type == "bool"
    }:
        take_bool(values, name, False)
    try:
        if fields.get("rope_scaling") is not None:
            fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
        for name in ("eos_token_ids", "full_attention_layers"):
            fields[name] = tuple(fields.get(name, ()))
        _check_ids(fields)
        return ModelConfig(**fields)
    except TypeError as error:
        raise ConfigError(f"settings for model_type 'llmserve': {error}") from error


def _check_ids(fields: dict[str, Any]) -> None:
    for name in ("bos_token_id", "pad_token_id", "eos_token_ids"):
        value = fields.get(name)
        for token_id in value if isinstance(value, tuple) else [value]:
            if token_id is not None and type(token_id) is not int:
                raise ConfigError(f"{name} holds {token_id!r}, which is no token id")


def _check_keys(
    values: Values, family_keys: set[str], *, layer_kind: str = "full_attention"
) -> None:
    for name in sorted(_NEUTRAL.keys() & values.keys() - family_keys):
        if values[name] not in _NEUTRAL[name]:
            raise ConfigError(f"{name} = {values[name]!r} is not supported")
    layer_types = first(values.get("layer_types"), [layer_kind])
    if not isinstance(layer_types, list) or any(kind != layer_kind for kind in layer_types):
        raise ConfigError(f"layer_types other than {layer_kind!r} are not supported here")
    unknown = values.keys() - family_keys - _SHARED_KEYS - _NEUTRAL.keys() - _WITHOUT_EFFECT
    if unknown:
        _log.warning("config.json: unknown settings ignored: %s", ", ".join(sorted(unknown)))


def _shared(values: Values, *, tied: bool) -> dict[str, Any]:
    vocab_size = take_count(values, "vocab_size")
    dtype = first(values.get("dtype"), values.get("torch_dtype"), "float32")
    return {
        "vocab_size": vocab_size,
        "tie_word_embeddings": take_bool(values, "tie_word_embeddings", tied),
        "dtype": str(dtype).removeprefix("torch."),
        **parse_special_ids(values, vocab_size),
    }


def _head_dim(hidden: int, heads: int) -> int | None:
    """Width of a head where no setting gives it; None, so refused as missing, if there is none."""
    return hidden // heads if hidden % heads == 0 else None


def _is_llama(config: ModelConfig) -> bool:
    return _is_llama_shaped(config) and config.sliding_window is None


def _is_mistral(config: ModelConfig) -> bool:
    return (
        _is_llama_shaped(config)
        and config.sliding_window is not None
        and not config.full_attention_layers
        and not config.attention_bias
        and not config.mlp_bias
    )


def _is_llama_shaped(config: ModelConfig) -> bool:
    return (
        config.positions == "rope"
        and config.norm == "rmsnorm"
        and config.activation == "swiglu"
        and config.attention_bias == config.attention_output_bias
        and config.hidden_size % config.num_heads == 0  # transformers insists, head_dim or not
    )


def _is_gpt2(config: ModelConfig) -> bool:
    return (
        config.positions == "learned"
        and config.norm == "layernorm"
        and config.activation in ("gelu", "gelu_tanh")
        and config.attention_bias
        and config.attention_output_bias
        and config.mlp_bias
        and config.num_kv_heads == config.num_heads
        and config.q_size == config.hidden_size
        and config.sliding_window is None
    )
