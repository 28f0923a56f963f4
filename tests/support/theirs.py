"""Models of transformers, the oracle: small, with random weights, in every variant we open."""

from __future__ import annotations

from typing import Any

import torch

_LLAMA: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 56,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {"vocab_size": 67, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
_GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
_MISTRAL = {**_LLAMA, "sliding_window": 7}
_QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
_PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
_GEMMA2 = {**_LLAMA, "head_dim": 12, "sliding_window": 6, "query_pre_attn_scalar": 20}
_GEMMA3 = {**_GEMMA2, "query_pre_attn_scalar": 12}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_MOE = {**_LLAMA, "num_experts_per_tok": 2, "num_local_experts": 5}
_QWEN_MOE = {
    **_LLAMA,
    "head_dim": 12,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
}
_QWEN2_MOE = {**_QWEN_MOE, "shared_expert_intermediate_size": 36}

_CLASSES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM"),
    "phi3": ("Phi3Config", "Phi3ForCausalLM"),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM"),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM"),
    "qwen2moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM"),
    "qwen3moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
}
THEIRS: dict[str, dict[str, Any]] = {
    "llama-gqa": _LLAMA,
    "llama-mha": {**_LLAMA, "num_key_value_heads": 4},
    "llama-mqa": {**_LLAMA, "num_key_value_heads": 1},
    "llama-tied": {**_LLAMA, "tie_word_embeddings": True},
    "llama-biases": {**_LLAMA, "attention_bias": True, "mlp_bias": True},
    "llama-wide-heads": {**_LLAMA, "head_dim": 20},
    "llama-theta": {**_LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
    "llama-linear": {**_LLAMA, "rope_parameters": _LINEAR},
    "llama-llama3": {**_LLAMA, "rope_parameters": _LLAMA3},
    "llama-eps": {**_LLAMA, "rms_norm_eps": 0.1},
    "mistral": _MISTRAL,
    "mistral-window-of-one": {**_MISTRAL, "sliding_window": 1},
    "mistral-wide-window": {**_MISTRAL, "sliding_window": 200},
    "mistral-no-window": {**_MISTRAL, "sliding_window": None},
    "mistral-wide-heads": {**_MISTRAL, "head_dim": 20, "tie_word_embeddings": True},
    "mistral-linear": {**_MISTRAL, "rope_parameters": _LINEAR},
    "gpt2": _GPT2,
    "gpt2-untied": {**_GPT2, "tie_word_embeddings": False},
    "gpt2-inner": {**_GPT2, "n_inner": 40},
    "gpt2-exact-gelu": {**_GPT2, "activation_function": "gelu"},
    "gpt2-eps": {**_GPT2, "layer_norm_epsilon": 0.1},
    "qwen2": _LLAMA,
    "qwen2-tied-wide": {**_LLAMA, "head_dim": 20, "tie_word_embeddings": True},
    "qwen2-windows": {**_LLAMA, **_QWEN_WINDOW},
    "qwen2-listed-windows": {
        **_LLAMA, **_QWEN_WINDOW, "layer_types": [_SLIDING, _FULL, _SLIDING],
    },
    "qwen3": {**_LLAMA, "head_dim": 12},
    "qwen3-biases": {**_LLAMA, "head_dim": 8, "attention_bias": True},
    "qwen3-windows": {**_LLAMA, "head_dim": 8, **_QWEN_WINDOW},
    "olmo2": _LLAMA,
    "olmo2-biases-tied": {**_LLAMA, "attention_bias": True, "tie_word_embeddings": True},
    "olmo2-linear": {**_LLAMA, "rope_parameters": _LINEAR},
    "phi3": _LLAMA,
    "phi3-window": {**_LLAMA, "sliding_window": 7, "num_key_value_heads": 4},
    "phi3-partial": {**_LLAMA, "rope_parameters": _PARTIAL, "tie_word_embeddings": True},
    "gemma2": _GEMMA2,
    "gemma2-uncapped": {
        **_GEMMA2, "attn_logit_softcapping": None, "final_logit_softcapping": None,
    },
    "gemma2-tight-caps": {
        **_GEMMA2, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0,
    },
    "gemma2-no-window": {**_GEMMA2, "layer_types": [_FULL] * 3},
    "gemma2-mqa-biases": {**_GEMMA2, "num_key_value_heads": 1, "attention_bias": True},
    "gemma3": {**_GEMMA3, "num_hidden_layers": 7},
    "gemma3-linear": {
        **_GEMMA3,
        "layer_types": [_SLIDING, _FULL, _SLIDING],
        "rope_parameters": {_FULL: _LINEAR, _SLIDING: {"rope_type": "default", "rope_theta": 50.0}},
    },
    "gemma3-no-window": {**_GEMMA3, "layer_types": [_FULL] * 3, "tie_word_embeddings": False},
    "gemma3-scalar-cap": {
        **_GEMMA3, "query_pre_attn_scalar": 30, "final_logit_softcapping": 3.0,
    },
    "mixtral": _MOE,
    "mixtral-window": {**_MOE, "sliding_window": 7, "tie_word_embeddings": True},
    "mixtral-one-expert": {**_MOE, "num_experts_per_tok": 1},
    "qwen2moe": _QWEN2_MOE,
    "qwen2moe-normed-no-bias": {**_QWEN2_MOE, "norm_topk_prob": True, "qkv_bias": False},
    "qwen2moe-dense-layers": {**_QWEN2_MOE, "decoder_sparse_step": 2},
    "qwen2moe-windows": {
        **_QWEN2_MOE, **_QWEN_WINDOW, "layer_types": [_FULL, _SLIDING, _SLIDING],
    },
    "qwen3moe": _QWEN_MOE,
    "qwen3moe-normed-biases": {**_QWEN_MOE, "norm_topk_prob": True, "attention_bias": True},
    "qwen3moe-dense-layers": {**_QWEN_MOE, "mlp_only_layers": [2, 0]},
    "qwen3moe-window": {**_QWEN_MOE, "use_sliding_window": True, "sliding_window": 5},
}  # fmt: skip
"""Name → settings; the name's first word is the family."""

HEADS = {
    "LlamaForSequenceClassification": ("llama-gqa", 3),
    "MistralForSequenceClassification": ("mistral", 1),
    "Qwen2ForTokenClassification": ("qwen2", 4),
    "Phi3ForTokenClassification": ("phi3-partial", 2),
    "LlamaForQuestionAnswering": ("llama-tied", 2),
    "MixtralForQuestionAnswering": ("mixtral", 2),
    "Qwen3Model": ("qwen3", 2),
    "Gemma3TextForSequenceClassification": ("gemma3-linear", 2),
    "Gemma2ForTokenClassification": ("gemma2", 5),
    "Gemma3TextModel": ("gemma3", 2),
    "Olmo2ForSequenceClassification": ("olmo2", 2),
    "Qwen2MoeForSequenceClassification": ("qwen2moe", 2),
    "Qwen3MoeForQuestionAnswering": ("qwen3moe", 2),
    "GPT2ForSequenceClassification": ("gpt2", 3),
    "GPT2ForTokenClassification": ("gpt2", 3),
    "GPT2ForQuestionAnswering": ("gpt2", 2),
    "GPT2Model": ("gpt2", 2),
}
"""Class with a head → the model under it, and its number of labels."""


def make_with_head(transformers: Any, class_name: str) -> Any:
    """The same with a head in place of the output layer."""
    name, num_labels = HEADS[class_name]
    return _make(transformers, name, class_name, num_labels=num_labels, pad_token_id=0)


def make_theirs(transformers: Any, name: str) -> Any:
    """A model of transformers with random weights, its biases and norms too."""
    return _make(transformers, name, _CLASSES[name.split("-")[0]][1])


def _make(transformers: Any, name: str, model_name: str, **settings: Any) -> Any:
    config_name, _ = _CLASSES[name.split("-")[0]]
    config = getattr(transformers, config_name)(**{**THEIRS[name], **settings})
    config._attn_implementation = "eager"  # the one that caps scores
    model = getattr(transformers, model_name)(config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            shift = 1.0 if parameter.ndim == 1 else 0.0
            parameter.normal_(shift, 0.2, generator=generator)
    return model
