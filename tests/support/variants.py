"""One small configuration for every variant of the model, and random tensors for it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from llmserve.config import Experts, ModelConfig, RopeScaling
from llmserve.layouts import expected_tensors

LLAMA = ModelConfig(
    vocab_size=67,
    hidden_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    intermediate_size=40,
    max_seq_len=48,
    bos_token_id=1,
    eos_token_ids=(2, 5),
    pad_token_id=0,
)
GPT2 = dataclasses.replace(
    LLAMA,
    num_kv_heads=4,
    positions="learned",
    norm="layernorm",
    activation="gelu_tanh",
    attention_bias=True,
    attention_output_bias=True,
    mlp_bias=True,
    eos_token_ids=(2,),
)
MISTRAL = dataclasses.replace(LLAMA, sliding_window=5)
QWEN2 = dataclasses.replace(LLAMA, attention_bias=True)
QWEN3 = dataclasses.replace(LLAMA, qk_norm="head", head_dim=8)
OLMO2 = dataclasses.replace(LLAMA, norm_placement="post", qk_norm="full")
PHI3 = dataclasses.replace(LLAMA, rotary_dim=4, sliding_window=5)
GEMMA2 = dataclasses.replace(
    LLAMA,
    norm_placement="both",
    norm_weight_offset=1.0,
    embedding_scale=24**0.5,
    activation="geglu_tanh",
    attention_scale=10**-0.5,
    attention_softcap=2.0,
    logits_softcap=3.0,
    sliding_window=5,
    full_attention_layers=(1,),
)
GEMMA3 = dataclasses.replace(
    GEMMA2,
    attention_scale=None,
    attention_softcap=None,
    logits_softcap=None,
    qk_norm="head",
    local_rope_theta=100.0,
    rope_scaling=RopeScaling(kind="linear", factor=2.0),
)
MIXTRAL = dataclasses.replace(
    MISTRAL, experts=Experts(num_experts=4, num_experts_per_token=2, intermediate_size=40)
)
QWEN2_MOE = dataclasses.replace(
    QWEN2,
    experts=Experts(
        num_experts=5,
        num_experts_per_token=3,
        intermediate_size=12,
        shared_intermediate_size=20,
        normalize_weights=False,
    ),
)
QWEN3_MOE = dataclasses.replace(
    QWEN3,
    experts=Experts(
        num_experts=5, num_experts_per_token=2, intermediate_size=12, dense_layers=(1,)
    ),
)
_LLAMA3 = RopeScaling(kind="llama3", factor=4.0, original_max_seq_len=16)


def _llama(**changes: Any) -> ModelConfig:
    return dataclasses.replace(LLAMA, **changes)


VARIANTS: dict[str, ModelConfig] = {
    "llama": LLAMA,
    "llama-mha": _llama(num_kv_heads=4),
    "llama-mqa": _llama(num_kv_heads=1),
    "llama-untied": _llama(tie_word_embeddings=False),
    "llama-biases": _llama(attention_bias=True, attention_output_bias=True, mlp_bias=True),
    "llama-linear": _llama(rope_scaling=RopeScaling(kind="linear", factor=2.0)),
    "llama-llama3": _llama(rope_scaling=_LLAMA3, rope_theta=500.0),
    "llama-wide-heads": _llama(head_dim=16),
    "llama-no-ids": _llama(bos_token_id=None, eos_token_ids=(), pad_token_id=None),
    "mistral": MISTRAL,
    "mistral-untied-wide": dataclasses.replace(MISTRAL, tie_word_embeddings=False, head_dim=16),
    "mistral-window-of-two": dataclasses.replace(MISTRAL, sliding_window=2),
    "qwen2": QWEN2,
    "qwen2-untied-windows": dataclasses.replace(
        QWEN2, tie_word_embeddings=False, sliding_window=5, full_attention_layers=(0,)
    ),
    "qwen3": QWEN3,
    "qwen3-biases-windows": dataclasses.replace(
        QWEN3,
        attention_bias=True,
        attention_output_bias=True,
        sliding_window=5,
        full_attention_layers=(1,),
    ),
    "olmo2": OLMO2,
    "olmo2-biases-llama3": dataclasses.replace(
        OLMO2, attention_bias=True, attention_output_bias=True, rope_scaling=_LLAMA3
    ),
    "phi3": PHI3,
    "phi3-mha-no-window": dataclasses.replace(PHI3, num_kv_heads=4, sliding_window=None),
    "gemma2": GEMMA2,
    "gemma2-plain": dataclasses.replace(
        GEMMA2,
        attention_scale=None,
        attention_softcap=None,
        logits_softcap=None,
        sliding_window=None,
        full_attention_layers=(),
        tie_word_embeddings=False,
    ),
    "gemma3_text": GEMMA3,
    "gemma3_text-biases-scale": dataclasses.replace(
        GEMMA3,
        attention_bias=True,
        attention_output_bias=True,
        attention_scale=20**-0.5,
        logits_softcap=4.0,
        rope_scaling=None,
    ),
    "mixtral": MIXTRAL,
    "mixtral-one-of-four": dataclasses.replace(
        MIXTRAL,
        sliding_window=None,
        experts=dataclasses.replace(MIXTRAL.experts, num_experts_per_token=1),
    ),
    "qwen2_moe": QWEN2_MOE,
    "qwen2_moe-windows": dataclasses.replace(
        QWEN2_MOE, attention_bias=False, sliding_window=5, full_attention_layers=(0,)
    ),
    "qwen3_moe": QWEN3_MOE,
    "qwen3_moe-biases-window": dataclasses.replace(
        QWEN3_MOE, attention_bias=True, attention_output_bias=True, sliding_window=5
    ),
    "gpt2": GPT2,
    "gpt2-exact-gelu": dataclasses.replace(GPT2, activation="gelu"),
    "gpt2-untied": dataclasses.replace(GPT2, tie_word_embeddings=False),
    "gpt2-no-ids": dataclasses.replace(
        GPT2, bos_token_id=None, eos_token_ids=(), pad_token_id=None
    ),
    "own-sinusoidal": _llama(positions="sinusoidal"),
    "own-none": _llama(positions="none"),
    "own-learned-rmsnorm": _llama(positions="learned"),
    "own-layernorm-gelu": _llama(norm="layernorm", activation="gelu"),
    "own-qkv-bias": _llama(attention_bias=True, mlp_bias=True),
    "own-output-bias": _llama(attention_output_bias=True),
    "own-odd-heads": _llama(num_heads=5, num_kv_heads=5, head_dim=4),
    "own-mixed-windows": _llama(sliding_window=4, full_attention_layers=(1,)),
    "own-window-gpt2": dataclasses.replace(GPT2, sliding_window=7),
    "own-window-biases": _llama(
        sliding_window=6, attention_bias=True, attention_output_bias=True, mlp_bias=True
    ),
    "own-scaled-rope": _llama(rope_scaling=_LLAMA3, norm="layernorm"),
    "own-mixed-experts": dataclasses.replace(
        QWEN2_MOE, norm_placement="both", positions="learned", attention_softcap=1.0
    ),
    "own-geglu-post": _llama(activation="geglu_tanh", norm_placement="post", rotary_dim=2),
}
"""Name → configuration; the name's first word is the family that it is written as."""


def random_tensors(
    config: ModelConfig, *, seed: int = 0, scale: float = 0.3
) -> dict[str, npt.NDArray[np.float32]]:
    """Every canonical tensor, N(0, scale); norms' weights around 1."""
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, shape in expected_tensors(config).items():
        values = generator.normal(0.0, scale, shape)
        is_norm = "norm" in name and name.endswith("weight")
        tensors[name] = (values + 1.0 if is_norm else values).astype(np.float32)
    return tensors
