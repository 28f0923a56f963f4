"""How a Llama-shaped model lies in a GGUF file: names, values of the header, order of rows.

Both directions: what `gguf.py` writes, and the model that a file describes. llama.cpp turns
neighbouring values of a head (2i and 2i + 1) where Hugging Face's files turn the halves (i and
i + D/2), so the rows of the query and key projections change places.

Shapes: D head_dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from llmserve.config import ModelConfig
from llmserve.errors import CheckpointError
from llmserve.quant.dtypes import Float32Array

from .gguf_blocks import TENSOR_TYPES, BlockType
from .gguf_file import GgufValue

__all__ = [
    "ROPE_FACTORS",
    "described_config",
    "gguf_name",
    "rope_factors",
    "row_order",
    "shape_metadata",
]

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor that holds `rope_factors`."""

_TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_SIZES = {
    "llama.vocab_size": "vocab_size",
    "llama.context_length": "max_seq_len",
    "llama.embedding_length": "hidden_size",
    "llama.block_count": "num_layers",
    "llama.feed_forward_length": "intermediate_size",
    "llama.attention.head_count": "num_heads",
    "llama.attention.head_count_kv": "num_kv_heads",
    "llama.attention.key_length": "head_dim",
}


def shape_metadata(name: str, config: ModelConfig, kind: BlockType) -> dict[str, GgufValue]:
    """The header's values about the model `name`: its shape, and the type of its matrices."""
    values: dict[str, GgufValue] = {
        "general.architecture": "llama",
        "general.name": name,
        "general.file_type": TENSOR_TYPES[kind].file_code,
        "general.quantization_version": 2,
        **{key: getattr(config, field) for key, field in _SIZES.items()},
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope_theta),
    }
    if config.rope_scaling is not None and config.rope_scaling.kind == "linear":
        values["llama.rope.scaling.type"] = "linear"
        values["llama.rope.scaling.factor"] = float(config.rope_scaling.factor)
    return values


def gguf_name(layer: str) -> str:
    """The file's name of a layer, or a norm, by its canonical one; both without `.weight`."""
    if layer in _TOP_NAMES:
        return _TOP_NAMES[layer]
    _, _, index, inner = layer.split(".", 3)
    return f"blk.{index}.{_LAYER_NAMES[inner]}"


def row_order(name: str, num_rows: int, config: ModelConfig) -> npt.NDArray[np.intp] | None:
    """Old row of each new one, where rows change places: value 2i + h of a head was h * D/2 + i."""
    if ".q_proj." not in name and ".k_proj." not in name:
        return None
    rows = np.arange(num_rows).reshape(-1, 2, config.head_dim // 2)  # [heads, half, D/2]
    return rows.transpose(0, 2, 1).reshape(-1)


def rope_factors(config: ModelConfig) -> Float32Array | None:
    """What llama3's stretch divides each rotary frequency by, [D/2]; None without it."""
    if config.rope_scaling is None or config.rope_scaling.kind != "llama3":
        return None
    from llmserve.model.layers import rotary_frequencies

    unscaled = rotary_frequencies(dataclasses.replace(config, rope_scaling=None))
    factors: Float32Array = (unscaled / rotary_frequencies(config)).numpy()
    return factors


def described_config(
    metadata: Mapping[str, Any], tensors: Collection[str], original: ModelConfig
) -> ModelConfig:
    """The configuration that a file's values and names of tensors amount to.

    What no value of the header says (special tokens, the parameters behind `rope_freqs`) is taken
    from `original`.

    Raises `CheckpointError` for a value that is missing or that no model has.
    """
    fields: dict[str, Any] = {field: _value(metadata, key) for key, field in _SIZES.items()}
    fields["norm_eps"] = _value(metadata, "llama.attention.layer_norm_rms_epsilon")
    fields["rope_theta"] = _value(metadata, "llama.rope.freq_base")
    fields["tie_word_embeddings"] = "output.weight" not in tensors
    scaling = original.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        factor = _value(metadata, "llama.rope.scaling.factor")
        fields["rope_scaling"] = dataclasses.replace(scaling, factor=factor)
    return dataclasses.replace(original, dtype="float32", **fields)


def _value(metadata: Mapping[str, Any], key: str) -> Any:
    if key not in metadata:
        raise CheckpointError(f"the header has no {key}")
    return metadata[key]
