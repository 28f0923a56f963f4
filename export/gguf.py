"""Exporting a Llama-shaped model folder to GGUF, the file that llama.cpp and its kin open.

One file holds everything: shape, tokenizer and weights. Matrices get the type asked for, norms and
biases stay float32. In `q4_0` files the embedding and the head are `q8_0`, as our own runner has
them (`gguf_layout.py` has names and order). The file is read back and compared with the model
before it appears (`gguf_certificate.py`).

Nothing is read but what is being written: a few megabytes of one tensor at a time.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmserve.checkpoint import Checkpoint
from llmserve.config import ModelConfig
from llmserve.durable import staged_file
from llmserve.errors import ConfigError
from llmserve.families import family_of
from llmserve.layouts import expected_tensors
from llmserve.lineage import extended_lineage
from llmserve.quant.dtypes import Float32Array, StoredArray, to_float32

from .gguf_blocks import BLOCK_SIZE, BlockType, encode
from .gguf_certificate import certify_gguf, without_orphans
from .gguf_file import GgufTensor, write_gguf
from .gguf_layout import ROPE_FACTORS, gguf_name, rope_factors, row_order, shape_metadata
from .gguf_tokenizer import tokenizer_metadata

__all__ = ["GgufExport", "export_gguf"]

_CHUNK = 1 << 22  # numbers that are converted at a time
_QUANTIZED: tuple[BlockType, ...] = ("q8_0", "q4_0")
_OWN_TYPE: dict[str, BlockType] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


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
    path: Path, out: Path | None = None, *, kind: BlockType | None = None, overwrite: bool = False,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> GgufExport:  # fmt: skip
    """Write the model folder `path` as the GGUF file `out`, and its certificate beside it.

    Args:
        path: a model of the family Llama.
        out: the file, which appears complete or not at all; None: `path`-`kind`.gguf.
        kind: type of the matrices; None: the type that the folder's weights have.
        overwrite: replace `out`.
        on_stage: told what is being done.

    Raises:
        CheckpointError: the model cannot be opened.
        ConfigError: llama.cpp's `llama` cannot hold the model, `out` must not be written, or a
            quantized model was to be quantized again.
        ExportError: a weight that is not finite or too large, a tokenizer that llama.cpp lacks, or
            a file that does not hold what the model holds.
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
    tensors = [*_tensors(source, config, kind), *_rope_tensor(config)]
    metadata = {
        **shape_metadata(path.resolve().name, config, kind),
        **tokenizer_metadata(path, config),
        "llmserve.lineage": _lineage(source, kind),
    }
    with without_orphans(out), staged_file(out) as staged:
        on_stage("writing the file")
        write_gguf(staged, metadata, tensors)
        certify_gguf(staged, out, source, config, on_stage=on_stage)
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


def _tensors(source: Checkpoint, config: ModelConfig, kind: BlockType) -> Iterator[GgufTensor]:
    for name, shape in expected_tensors(config).items():
        layer, _, part = name.rpartition(".")
        stored_as = _stored_type(layer, shape, kind)
        yield GgufTensor(
            name=f"{gguf_name(layer)}.{part}",
            shape=shape,
            kind=stored_as,
            chunks=partial(_chunks, source, config, name, stored_as),
        )


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
    order = row_order(name, len(values.data), config)
    step = max(1, _CHUNK * len(values.data) // math.prod(values.shape))
    for start in range(0, len(values.data), step):
        rows = slice(start, start + step)
        part = values.data[rows] if order is None else values.data[order[rows]]
        yield encode(_float32(values.dtype, part), kind, name=name)


def _float32(dtype: str, values: npt.NDArray[np.generic]) -> Float32Array:
    return to_float32(StoredArray(dtype, values))


def _rope_tensor(config: ModelConfig) -> Iterator[GgufTensor]:
    factors = rope_factors(config)
    if factors is None:
        return
    yield GgufTensor(
        name=ROPE_FACTORS,
        shape=factors.shape,
        kind="f32",
        chunks=lambda: (encode(factors, "f32", name=ROPE_FACTORS),),
    )


def _lineage(source: Checkpoint, kind: BlockType) -> str:
    entry = {"source": source.fingerprint, "format": "gguf", "type": kind}
    return json.dumps(json.loads(extended_lineage(source.path, "export", entry)))
