"""What the cache stores of keys and values, and where. The bits are the contract.

Of each block and key head: keys [block_size / 16, D, 16], then values [block_size, D]; an int8
cache has the tokens' scales after them, those of the keys first. B blocks of S tokens, KV heads.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...quant.dtypes import Float32Array, StoredArray, from_float32, to_float32
from ..program import Number
from .quantize import quantize_rows

__all__ = ["layer_bytes", "stored"]


def stored(x: Float32Array, kind: Number) -> Float32Array:
    """Heads [..., D] as attention reads them back.

    bfloat16 is rounded to nearest, ties to even; int8 has one scale for each head, its largest
    magnitude divided by 127.
    """
    if kind is Number.FLOAT32:
        return x
    if kind is Number.BFLOAT16:
        return to_float32(from_float32(x, "bfloat16"))
    integers, scales = _integers(x)
    return integers.astype(np.float32) * scales[..., None]


def layer_bytes(keys: Float32Array, values: Float32Array, kind: Number) -> npt.NDArray[np.uint8]:
    """The memory of one layer that holds these [B, S, KV, D]."""
    k, key_scales = _coded(keys, kind)
    v, value_scales = _coded(values, kind)
    blocks, size, num_heads, width = keys.shape
    k = k.reshape(blocks, size // 16, 16, num_heads, width).transpose(0, 3, 1, 4, 2)
    v = v.transpose(0, 2, 1, 3)
    parts = [_bytes_of_heads(k), _bytes_of_heads(v)]
    if kind is Number.INT8:
        scales = (key_scales.transpose(0, 2, 1), value_scales.transpose(0, 2, 1))
        parts += [_bytes_of_heads(one) for one in scales]
    return np.concatenate(parts, axis=2).reshape(-1)


def _coded(x: Float32Array, kind: Number) -> tuple[npt.NDArray[np.generic], Float32Array]:
    """Numbers as they lie in memory, and the scales, which only int8 has."""
    none = np.zeros(x.shape[:-1], np.float32)
    if kind is Number.INT8:
        return _integers(x)
    if kind is Number.BFLOAT16:
        coded: StoredArray = from_float32(x, "bfloat16")
        return coded.data, none
    return x, none


def _integers(x: Float32Array) -> tuple[npt.NDArray[np.int8], Float32Array]:
    width = x.shape[-1]
    rows = quantize_rows(x.reshape(-1, width), width)
    return rows.digits[0].reshape(x.shape), rows.scales.reshape(x.shape[:-1])


def _bytes_of_heads(x: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    """[B, KV, ...] → [B, KV, bytes]."""
    flat = np.ascontiguousarray(x).reshape(*x.shape[:2], -1)
    return flat.view(np.uint8)
