"""Exporting a Llama-shaped model folder to GGUF, the file that llama.cpp and its kin open.

One file holds everything: shape, tokenizer and weights. Matrices get the type asked for, norms and
biases stay float32. In `q4_0` files the embedding and the head are `q8_0`, as our own runner has
them. llama.cpp turns neighbouring values of a head (2i and 2i + 1) where Hugging Face's files turn
the halves (i and i + D/2), so the rows of the query and key projections change places.

Nothing is read but what is being written: a few megabytes of one tensor at a time.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmserve.checkpoint import Checkpoint
from llmserve.config import ModelConfig
from llmserve.errors import ConfigError
from llmserve.families import family_of
from llmserve.layouts import expected_tensors
from llmserve.lineage import extended_lineage
from llmserve.quant.dtypes import Float32Array, StoredArray, to_float32

from .gguf_blocks import BLOCK_SIZE, TENSOR_TYPES, BlockType, encode
from .gguf_file import GgufTensor, GgufValue, write_gguf
from .gguf_tokenizer import tokenizer_metadata

__all__ = ["GgufExport", "export_gguf"]

_CHUNK = 1 << 22  # numbers that are converted at a time
_QUANTIZED: tuple[BlockType, ...] = ("q8_0", "q4_0")
_OWN_TYPE: dict[str, BlockType] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
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


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufExport:
    """What was written."""

    path: Path
    """The file."""
    kind: BlockType
    """Type of the matrices."""
    num_bytes: int
    """Size of the file."""
    plain: tuple[str, ...]
    """Matrices that are float16 because whole blocks do not fill their width."""
    dequantized_from: str | None
    """Form of the weights in the model folder, where they were quantized."""


def export_gguf(
    path: Path, out: Path | None = None, *, kind: BlockType | None = None, overwrite: bool = False
) -> GgufExport:
    """Write the model folder `path` as the GGUF file `out`.

    Args:
        path: a model of the family Llama.
        out: the file, which appears complete or not at all; None: `path`-`kind`.gguf.
        kind: type of the matrices; None: the type that the folder's weights have.
        overwrite: replace `out`.

    Raises:
        CheckpointError: the model cannot be opened.
        ConfigError: llama.cpp's `llama` cannot hold the model, `out` must not be written, or a
            quantized model was to be quantized again.
        ExportError: a weight that is not finite or too large, or a tokenizer that llama.cpp lacks.
    """
    source = Checkpoint.open(path)
    config = _plain_config(source.config)
    form = source.quantization.scheme if source.quantization else None
    kind = kind or _OWN_TYPE[config.dtype]
    if form is not None and kind in _QUANTIZED:
        raise ConfigError(
            f"{path} is quantized already ({form}); give the folder of the original model, or one "
            "of the types f32, f16 and bf16"
        )
    out = out or path.absolute().with_name(f"{path.absolute().name}-{kind}.gguf")
    _check_target(out, overwrite=overwrite)
    tensors = [*_tensors(source, config, kind), *_rope_factors(config)]
    metadata = {
        **_shape_metadata(path.resolve().name, config, kind),
        **tokenizer_metadata(path, config),
        "llmserve.lineage": _lineage(source, kind),
    }
    write_gguf(out, metadata, tensors)
    return GgufExport(
        path=out,
        kind=kind,
        num_bytes=out.stat().st_size,
        plain=tuple(t.name for t in tensors if len(t.shape) > 1 and t.kind == "f16" != kind),
        dequantized_from=form,
    )


def _check_target(out: Path, *, overwrite: bool) -> None:
    if out.is_dir():
        raise ConfigError(f"--out names a file; {out} is a folder")
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} exists; give another --out, or --overwrite")


def _plain_config(config: ModelConfig) -> ModelConfig:
    """The configuration without a window that never closes. Raises `ConfigError`."""
    if config.sliding_window is not None and config.sliding_window >= config.max_seq_len:
        config = dataclasses.replace(config, sliding_window=None, full_attention_layers=())
    if config.head is not None:
        raise ConfigError(
            f"GGUF files are written for models of text; this one has a head ({config.head.kind})"
        )
    if family_of(config) != "llama":
        raise ConfigError(
            "GGUF files are written for Llama's shape (rotary positions, RMSNorm, SwiGLU, no "
            f"sliding window); this model is of the family {family_of(config)!r}"
        )
    return config


def _shape_metadata(name: str, config: ModelConfig, kind: BlockType) -> dict[str, GgufValue]:
    values: dict[str, GgufValue] = {
        "general.architecture": "llama",
        "general.name": name,
        "general.file_type": TENSOR_TYPES[kind].file_code,
        "general.quantization_version": 2,
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_seq_len,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope_theta),
    }
    if config.rope_scaling is not None and config.rope_scaling.kind == "linear":
        values["llama.rope.scaling.type"] = "linear"
        values["llama.rope.scaling.factor"] = float(config.rope_scaling.factor)
    return values


def _tensors(source: Checkpoint, config: ModelConfig, kind: BlockType) -> Iterator[GgufTensor]:
    for name, shape in expected_tensors(config).items():
        layer, _, part = name.rpartition(".")
        stored_as = _stored_type(layer, shape, kind)
        yield GgufTensor(
            name=f"{_gguf_name(layer)}.{part}",
            shape=shape,
            kind=stored_as,
            chunks=partial(_chunks, source, config, name, stored_as),
        )


def _gguf_name(layer: str) -> str:
    if layer in _TOP_NAMES:
        return _TOP_NAMES[layer]
    _, _, index, inner = layer.split(".", 3)
    return f"blk.{index}.{_LAYER_NAMES[inner]}"


def _stored_type(layer: str, shape: tuple[int, ...], kind: BlockType) -> BlockType:
    if len(shape) == 1:
        return "f32"
    if kind in _QUANTIZED and shape[1] % BLOCK_SIZE:
        return "f16"
    is_head = layer in ("model.embed_tokens", "lm_head")
    return "q8_0" if kind == "q4_0" and is_head else kind


def _chunks(source: Checkpoint, config: ModelConfig, name: str, kind: BlockType) -> Iterator[bytes]:
    """The tensor's stored bytes, some rows at a time."""
    is_plain = not source.is_quantized(name)
    values = source.stored(name) if is_plain else StoredArray("float32", source.float32(name))
    order = _row_order(name, len(values.data), config)
    step = max(1, _CHUNK * len(values.data) // math.prod(values.shape))
    for start in range(0, len(values.data), step):
        rows = slice(start, start + step)
        part = values.data[rows] if order is None else values.data[order[rows]]
        yield encode(_float32(values.dtype, part), kind, name=name)


def _row_order(name: str, num_rows: int, config: ModelConfig) -> npt.NDArray[np.intp] | None:
    """Old row of each new one, where rows change places: value 2i + h of a head was h * D/2 + i."""
    if ".q_proj." not in name and ".k_proj." not in name:
        return None
    rows = np.arange(num_rows).reshape(-1, 2, config.head_dim // 2)  # [heads, half, D/2]
    return rows.transpose(0, 2, 1).reshape(-1)


def _float32(dtype: str, values: npt.NDArray[np.generic]) -> Float32Array:
    return to_float32(StoredArray(dtype, values))


def _rope_factors(config: ModelConfig) -> Iterator[GgufTensor]:
    """What llama3's stretch divides each rotary frequency by, [D/2]."""
    if config.rope_scaling is None or config.rope_scaling.kind != "llama3":
        return
    from llmserve.model.layers import rotary_frequencies

    unscaled = rotary_frequencies(dataclasses.replace(config, rope_scaling=None))
    factors: Float32Array = (unscaled / rotary_frequencies(config)).numpy()
    yield GgufTensor(
        name="rope_freqs.weight",
        shape=factors.shape,
        kind="f32",
        chunks=lambda: (encode(factors, "f32", name="rope_freqs"),),
    )


def _lineage(source: Checkpoint, kind: BlockType) -> str:
    entry = {"source": source.fingerprint, "format": "gguf", "type": kind}
    return json.dumps(json.loads(extended_lineage(source.path, "export", entry)))
