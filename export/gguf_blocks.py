"""How GGUF stores the numbers of a tensor: plain, or 32 to a block with a float16 scale.

- `q8_0`, 34 bytes a block: the scale, then 32 integers -127..127.
- `q4_0`, 18 bytes: the scale, then 16 bytes; byte i holds number i in its lower four bits and
  number i + 16 in its upper ones, each with 8 added.

The integers are those of `llmserve.quant.groups` in groups of 32 with float16 scales, so its bound
holds: no weight is off by more than half its block's scale. Source: the block descriptions in
ggml's documentation of GGUF tensor types (github.com/ggml-org/ggml).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt

from llmserve.errors import ExportError
from llmserve.quant.dtypes import (
    NUMPY_DTYPES,
    Float32Array,
    StoredArray,
    from_float32,
    to_float32,
)
from llmserve.quant.groups import Bits, quantize_rtn

__all__ = [
    "BLOCK_SIZE",
    "TENSOR_TYPES",
    "BlockType",
    "TensorType",
    "decode",
    "encode",
    "rounding_error",
]

BlockType = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
BLOCK_SIZE = 32
"""Numbers in a block of `q8_0` and `q4_0`; it must divide a tensor's innermost extent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorType:
    """One way of storing numbers."""

    code: int
    """The type's number in a tensor's entry."""
    file_code: int
    """The number by which `general.file_type` says that most tensors are of this type."""
    block_size: int
    """Numbers in a block."""
    block_bytes: int
    """Bytes of a block."""

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor."""
        return math.prod(shape) // self.block_size * self.block_bytes


TENSOR_TYPES: Mapping[BlockType, TensorType] = MappingProxyType(
    {
        "f32": TensorType(code=0, file_code=0, block_size=1, block_bytes=4),
        "f16": TensorType(code=1, file_code=1, block_size=1, block_bytes=2),
        "bf16": TensorType(code=30, file_code=32, block_size=1, block_bytes=2),
        "q8_0": TensorType(code=8, file_code=7, block_size=BLOCK_SIZE, block_bytes=34),
        "q4_0": TensorType(code=2, file_code=2, block_size=BLOCK_SIZE, block_bytes=18),
    }
)

_FLOATS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_BITS: dict[str, Bits] = {"q8_0": 8, "q4_0": 4}


def encode(values: Float32Array, kind: BlockType, *, name: str) -> bytes:
    """The stored bytes of `values`, [rows, width] or [width], under the tensor's `name`.

    Raises:
        ExportError: a value is NaN or infinite, or too large for the type.
    """
    if kind in _BITS:
        return _encode_blocks(values, _BITS[kind], name)
    if not np.isfinite(values).all():
        raise ExportError(f"{name} holds NaN or an infinity")
    stored = from_float32(values, _FLOATS[kind])
    if not np.isfinite(to_float32(stored)).all():
        raise ExportError(f"{name} holds a number beyond the range of {stored.dtype}; choose f32")
    return stored.data.tobytes()


def decode(
    stored: npt.NDArray[np.uint8], kind: BlockType
) -> tuple[Float32Array, Float32Array | None]:
    """The numbers that stored bytes stand for, and the blocks' scales.

    Args:
        stored: whole blocks, [bytes].
        kind: how they are stored.

    Returns: [numbers]; [blocks], None for types without blocks.
    """
    if kind in _FLOATS:
        dtype = _FLOATS[kind]
        return to_float32(StoredArray(dtype, stored.view(NUMPY_DTYPES[dtype]))), None
    blocks = stored.reshape(-1, TENSOR_TYPES[kind].block_bytes)
    scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)  # [blocks, 1]
    body = np.ascontiguousarray(blocks[:, 2:])
    integers = body.view(np.int8).astype(np.float32)
    if kind == "q4_0":
        integers = np.concatenate([body & 15, body >> 4], axis=1).astype(np.float32) - 8
    return (integers * scales).reshape(-1), scales[:, 0]


def rounding_error(
    values: Float32Array, scales: Float32Array | None, kind: BlockType
) -> Float32Array:
    """How far each number may be from the one that it was rounded from: half a step.

    `values` and `scales` as `decode` gives them; exact in float32.
    """
    if scales is not None:
        return np.repeat(np.abs(scales) / np.float32(2), BLOCK_SIZE)
    if kind == "f32":
        return np.zeros_like(values)
    steps = {"f16": (2.0**-11, 2.0**-25), "bf16": (2.0**-8, 2.0**-134)}  # the last: subnormal
    relative, least = steps[kind]
    return np.maximum(np.abs(values) * np.float32(relative), np.float32(least))


def _encode_blocks(values: Float32Array, bits: Bits, name: str) -> bytes:
    quantized = quantize_rtn(values, bits, BLOCK_SIZE, scale_dtype="float16", name=name)
    integers = quantized.values.reshape(-1, BLOCK_SIZE)
    scales = from_float32(quantized.scales.reshape(-1, 1), "float16").data
    body = integers if bits == 8 else _nibbles(integers)
    blocks = np.concatenate([scales.view(np.uint8), body.view(np.uint8)], axis=1)
    return blocks.tobytes()


def _nibbles(integers: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Integers -8..7 [blocks, 32] → [blocks, 16]."""
    codes = (integers + np.int8(8)).view(np.uint8)
    half = BLOCK_SIZE // 2
    return codes[:, :half] | (codes[:, half:] << np.uint8(4))
