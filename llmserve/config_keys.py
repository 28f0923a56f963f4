"""Which settings of somebody else's `config.json` are understood, and what all families share.

A setting that would change the result and is not supported is refused by name; one that is unknown
is named in a warning.
"""

from __future__ import annotations

import logging
from typing import Any

from .config import ModelConfig
from .config_heads import ALL_HEADS, Kind, parse_head, render_head
from .config_rope import parse_rope, render_rope
from .config_values import (
    Values,
    first,
    parse_special_ids,
    take_bool,
    take_choice,
    take_count,
)
from .errors import ConfigError

__all__ = [
    "DECODER_KEYS",
    "check_keys",
    "parse_decoder",
    "parse_shared",
    "render_decoder",
    "render_shared",
    "render_special_ids",
]

_log = logging.getLogger("llmserve")

# Settings of others that would change the result; these values of theirs do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "auto_map": (None,),
    "is_encoder_decoder": (False, None),
    "token_classification_bias": (True, None),
    "scale_attn_by_inverse_layer_idx": (False, None),
    "scale_attn_weights": (True, None),
    "sliding_window": (None,),
    "use_bidirectional_attention": (False, None),
    "use_sliding_window": (False, None),
}
_SHARED_KEYS = {
    "architectures", "bos_token_id", "dtype", "eos_token_id", "id2label", "model_type",
    "num_labels", "pad_token_id", "quantization_config", "tie_word_embeddings", "torch_dtype",
    "vocab_size",
}  # fmt: skip
DECODER_KEYS = frozenset({
    "head_dim", "hidden_act", "hidden_size", "intermediate_size", "layer_types",
    "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "partial_rotary_factor", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta",
})  # fmt: skip
"""Settings of every family but GPT-2's: Llama's names."""
# Settings of others without effect on what is computed here: training, tasks, bookkeeping.
_WITHOUT_EFFECT = {
    "_name_or_path", "attention_dropout", "attn_pdrop", "cache_implementation",
    "chunk_size_feed_forward", "classifier_dropout", "embd_pdrop", "initializer_range",
    "label2id", "n_ctx", "output_attentions", "output_hidden_states", "output_router_logits",
    "pretraining_tp", "problem_type", "reorder_and_upcast_attn", "resid_pdrop", "return_dict",
    "router_aux_loss_coef", "router_jitter_noise", "summary_activation", "summary_first_dropout",
    "summary_proj_to_labels", "summary_type", "summary_use_proj", "task_specific_params",
    "transformers_version", "use_cache",
}  # fmt: skip
_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu"}


def check_keys(values: Values, family_keys: frozenset[str]) -> None:
    """Look at all settings of a file whose family knows `family_keys`, beside those of everybody.

    Raises:
        ConfigError: a setting has a value that is not supported.
    """
    for name in sorted(_NEUTRAL.keys() & values.keys() - family_keys):
        if values[name] not in _NEUTRAL[name]:
            raise ConfigError(f"{name} = {values[name]!r} is not supported")
    unknown = values.keys() - family_keys - _SHARED_KEYS - _NEUTRAL.keys() - _WITHOUT_EFFECT
    if unknown:
        _log.warning("config.json: unknown settings ignored: %s", ", ".join(sorted(unknown)))


def parse_shared(values: Values, *, tied: bool) -> dict[str, Any]:
    """The `ModelConfig` fields that every family spells alike; `tied` is the family's default."""
    vocab_size = take_count(values, "vocab_size")
    dtype = first(values.get("dtype"), values.get("torch_dtype"), "float32")
    return {
        "vocab_size": vocab_size,
        "tie_word_embeddings": take_bool(values, "tie_word_embeddings", tied),
        "dtype": str(dtype).removeprefix("torch."),
        "head": parse_head(values),
        **parse_special_ids(values, vocab_size),
    }


def parse_decoder(
    values: Values, *, tied: bool = False, rope: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The `ModelConfig` fields behind `DECODER_KEYS`, windows left out.

    `rope` are those of the positions, where the family has a spelling of its own.
    """
    hidden, heads = take_count(values, "hidden_size"), take_count(values, "num_attention_heads")
    return {
        **parse_shared(values, tied=tied),
        **(parse_rope(values) if rope is None else rope),
        "hidden_size": hidden,
        "num_layers": take_count(values, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": take_count(values, "num_key_value_heads", heads),
        # Where no setting gives it: refused as missing, if there is no such width.
        "head_dim": take_count(values, "head_dim", None if hidden % heads else hidden // heads),
        "intermediate_size": take_count(values, "intermediate_size"),
        "max_seq_len": take_count(values, "max_position_embeddings", 2048),
        "norm_eps": first(values.get("rms_norm_eps"), 1e-6),
        "activation": take_choice(values, "hidden_act", _ACTIVATIONS, "silu"),
    }


def render_decoder(
    config: ModelConfig,
    model_type: str,
    prefix: str,
    *,
    heads: tuple[Kind, ...] = ALL_HEADS,
    generation: str | None = None,
) -> dict[str, Any]:
    """What `parse_decoder` reads.

    Classes in transformers begin with `prefix`. The family has those of `heads`, and `generation`,
    if it is not called as the others are.
    """
    return {
        **render_head(config, prefix, generation or f"{prefix}ForCausalLM", heads),
        "model_type": model_type,
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
        **render_rope(config),
        **render_shared(config),
    }


def render_shared(config: ModelConfig) -> dict[str, Any]:
    """What `parse_shared` reads, in the spellings of versions 4 and 5."""
    return {
        "tie_word_embeddings": config.tie_word_embeddings,
        **render_special_ids(config),
        "dtype": config.dtype,
        "torch_dtype": config.dtype,
    }


def render_special_ids(config: ModelConfig) -> dict[str, Any]:
    """The special ids as other programs write them: one end id as a number, several as a list."""
    ends = config.eos_token_ids
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": None if not ends else ends[0] if len(ends) == 1 else list(ends),
        "pad_token_id": config.pad_token_id,
    }
