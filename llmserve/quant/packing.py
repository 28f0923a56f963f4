"""Quantized layers as the tensors that compressed-tensors stores, and back, bit for bit.

For a layer `X` the file holds, in the layout that transformers, vLLM and SGLang read:

- int4 (`pack-quantized`): `X.weight_packed` int32 [out, ceil(in / 8)], eight integers plus 8 in
  each word, the first in the lowest four bits; the unused bits of a row's last word are 0;
  `X.weight_scale` [out, groups] and `X.weight_shape` int64 [2];
- int8 (`int-quantized`): `X.weight` int8 [out, in] and `X.weight_scale` [out, groups].

One scale per row is stored as [out, 1]. Source: the package compressed-tensors, compressors
`pack_quantized` and `naive_quantized`, version 0.20.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError
from .dtypes import FLOAT_DTYPES, StoredArray, TensorSpec, from_float32, to_float32
from .groups import Bits, QuantizedLinear

__all__ = ["from_stored", "pack_int4", "stored_specs", "to_stored", "unpack_int4"]

_PER_WORD = 8  # 4-bit integers in an int32
_OFFSET = 8  # added to -8..7 to make 0..15


def pack_int4(values: npt.NDArray[np.int8]) -> npt.NDArray[np.int32]:
    """Integers -8..7 [out, in] → int32 words [out, ceil(in / 8)]."""
    out, width = values.shape
    nibbles = np.zeros((out, -(-width // _PER_WORD) * _PER_WORD), np.uint8)
    nibbles[:, :width] = values + np.int8(_OFFSET)
    packed = nibbles[:, 0::2] | (nibbles[:, 1::2] << np.uint8(4))
    return np.ascontiguousarray(packed).view("<i4")


def unpack_int4(words: npt.NDArray[np.int32], width: int) -> npt.NDArray[np.int8]:
    """int32 words [out, ceil(width / 8)] → integers -8..7 [out, width]."""
    packed = np.ascontiguousarray(words, dtype="<i4").view(np.uint8)
    nibbles = np.empty((words.shape[0], packed.shape[1] * 2), np.uint8)
    nibbles[:, 0::2] = packed & np.uint8(15)
    nibbles[:, 1::2] = packed >> np.uint8(4)
    return nibbles[:, :width].astype(np.int8) - np.int8(_OFFSET)


def stored_specs(
    shape: tuple[int, int], bits: Bits, group_size: int | None
) -> dict[str, TensorSpec]:
    """What the file holds for a quantized layer, by the end of the tensors' names."""
    out, width = shape
    scale = TensorSpec(FLOAT_DTYPES, (out, width // (group_size or width)))
    if bits == 8:
        return {"weight": TensorSpec(("int8",), shape), "weight_scale": scale}
    return {
        "weight_packed": TensorSpec(("int32",), (out, -(-width // _PER_WORD))),
        "weight_scale": scale,
        "weight_shape": TensorSpec(("int64", "int32"), (2,)),
    }


def to_stored(linear: QuantizedLinear) -> dict[str, StoredArray]:
    """The tensors to be stored for a layer, by the end of their names."""
    scale = from_float32(linear.scales, linear.scale_dtype)
    if linear.bits == 8:
        return {"weight": StoredArray("int8", linear.values), "weight_scale": scale}
    return {
        "weight_packed": StoredArray("int32", pack_int4(linear.values)),
        "weight_scale": scale,
        "weight_shape": StoredArray("int64", np.array(linear.shape, np.int64)),
    }


def from_stored(
    tensors: Mapping[str, StoredArray], shape: tuple[int, int], bits: Bits, group_size: int | None
) -> QuantizedLinear:
    """The layer that tensors of the expected types and shapes hold.

    Raises `CheckpointError` for a scale that is not finite or a `weight_shape` that is not `shape`.
    """
    scale = tensors["weight_scale"]
    scales = to_float32(scale)
    if not np.isfinite(scales).all():
        raise CheckpointError("weight_scale holds NaN or an infinity")
    if bits == 8:
        values = tensors["weight"].data
    else:
        recorded = tuple(tensors["weight_shape"].data.tolist())
        if recorded != shape:
            raise CheckpointError(f"weight_shape says {recorded}, expected {shape}")
        values = unpack_int4(tensors["weight_packed"].data, shape[1])
    return QuantizedLinear(bits, group_size, values, scales, scale.dtype)
