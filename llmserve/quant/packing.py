"""Quantized layers as the tensors that compressed-tensors stores, and back, bit for bit.

For a layer `X` the file holds, in the layout that transformers, vLLM and SGLang read:

- `pack-quantized`: `X.weight_packed` int32 [out, ceil(in * bits / 32)], eight integers of 4 bits
  plus 8 in each word, or four of 8 bits plus 128, the first lowest; the unused bits of a row's last
  word are 0; `X.weight_scale` [out, groups] and `X.weight_shape` int64 [2]; where zero points are,
  `X.weight_zero_point` int32 [ceil(out * bits / 32), groups], packed alike along the outputs;
- `int-quantized` (int8): `X.weight` int8 [out, in] and `X.weight_scale` [out, groups]; where zero
  points are, `X.weight_zero_point` int8 [out, groups].

With activation order `X.weight_g_idx` int32 [in] is each input's group; -1 everywhere: none. One
scale per row is stored as [out, 1]. Source: the package compressed-tensors, compressors
`pack_quantized` and `naive_quantized`, version 0.20.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError
from .dtypes import FLOAT_DTYPES, StoredArray, TensorSpec, from_float32, to_float32
from .grids import Bits
from .groups import QuantizedLinear
from .layer_groups import LayerGroup

__all__ = ["checked_groups", "from_stored", "pack_int4", "stored_specs", "to_stored", "unpack_int4"]

_PER_WORD: dict[Bits, int] = {4: 8, 8: 4}
_OFFSET: dict[Bits, int] = {4: 8, 8: 128}  # added to make integers that are not negative


def pack_int4(values: npt.NDArray[np.int8]) -> npt.NDArray[np.int32]:
    """Integers -8..7 [out, in] → int32 words [out, ceil(in / 8)]."""
    out, width = values.shape
    nibbles = np.zeros((out, -(-width // _PER_WORD[4]) * _PER_WORD[4]), np.uint8)
    nibbles[:, :width] = values + np.int8(_OFFSET[4])
    packed = nibbles[:, 0::2] | (nibbles[:, 1::2] << np.uint8(4))
    return np.ascontiguousarray(packed).view("<i4")


def unpack_int4(words: npt.NDArray[np.int32], width: int) -> npt.NDArray[np.int8]:
    """int32 words [out, ceil(width / 8)] → integers -8..7 [out, width]."""
    packed = np.ascontiguousarray(words, dtype="<i4").view(np.uint8)
    nibbles = np.empty((words.shape[0], packed.shape[1] * 2), np.uint8)
    nibbles[:, 0::2] = packed & np.uint8(15)
    nibbles[:, 1::2] = packed >> np.uint8(4)
    return nibbles[:, :width].astype(np.int8) - np.int8(_OFFSET[4])


def stored_specs(shape: tuple[int, int], group: LayerGroup) -> dict[str, TensorSpec]:
    """What the file holds for a quantized layer, by the end of the tensors' names."""
    out, width = shape
    num_groups = width // (group.group_size or width)
    specs = {"weight_scale": TensorSpec(FLOAT_DTYPES, (out, num_groups))}
    if group.packing == "int-quantized":
        specs["weight"] = TensorSpec(("int8",), shape)
        zero_point = TensorSpec(("int8",), (out, num_groups))
    else:
        per_word = _PER_WORD[group.bits]
        specs["weight_packed"] = TensorSpec(("int32",), (out, -(-width // per_word)))
        specs["weight_shape"] = TensorSpec(("int64", "int32"), (2,))
        zero_point = TensorSpec(("int32",), (-(-out // per_word), num_groups))
    if not group.is_symmetric:
        specs["weight_zero_point"] = zero_point
    if group.has_order:
        specs["weight_g_idx"] = TensorSpec(("int32", "int64"), (width,))
    return specs


def to_stored(linear: QuantizedLinear, group: LayerGroup) -> dict[str, StoredArray]:
    """The tensors to be stored for a layer, by the end of their names."""
    tensors = {"weight_scale": from_float32(linear.scales, linear.scale_dtype)}
    zeros = linear.zeros
    if group.packing == "int-quantized":
        tensors["weight"] = StoredArray("int8", linear.values)
        if zeros is not None:
            tensors["weight_zero_point"] = StoredArray("int8", zeros)
    else:
        tensors["weight_packed"] = StoredArray("int32", _pack(linear.values, group.bits))
        tensors["weight_shape"] = StoredArray("int64", np.array(linear.shape, np.int64))
        if zeros is not None:
            packed = np.ascontiguousarray(_pack(np.ascontiguousarray(zeros.T), group.bits).T)
            tensors["weight_zero_point"] = StoredArray("int32", packed)
    if linear.group_of_input is not None:
        tensors["weight_g_idx"] = StoredArray("int32", linear.group_of_input)
    return tensors


def from_stored(
    tensors: Mapping[str, StoredArray], shape: tuple[int, int], group: LayerGroup
) -> QuantizedLinear:
    """The layer that tensors of the expected types and shapes hold.

    Raises `CheckpointError` for a scale that is not finite, a `weight_shape` that is not `shape`,
    or an input without a group.
    """
    scale = tensors["weight_scale"]
    scales = to_float32(scale)
    if not np.isfinite(scales).all():
        raise CheckpointError("weight_scale holds NaN or an infinity")
    zeros = tensors["weight_zero_point"].data if "weight_zero_point" in tensors else None
    if group.packing == "int-quantized":
        values = tensors["weight"].data
    else:
        recorded = tuple(tensors["weight_shape"].data.tolist())
        if recorded != shape:
            raise CheckpointError(f"weight_shape says {recorded}, expected {shape}")
        values = _unpack(tensors["weight_packed"].data, shape[1], group.bits)
        if zeros is not None:
            turned = np.ascontiguousarray(zeros.T)
            zeros = np.ascontiguousarray(_unpack(turned, shape[0], group.bits).T)
    order = None
    if "weight_g_idx" in tensors:
        order = checked_groups(tensors["weight_g_idx"].data, scales.shape[1])
    return QuantizedLinear(group.bits, group.group_size, values, scales, scale.dtype, zeros, order)


def checked_groups(index: npt.NDArray[Any], num_groups: int) -> npt.NDArray[np.int32] | None:
    """The group of each input from a file; None where it says -1 throughout: one after another.

    Raises `CheckpointError` for a group that is not there.
    """
    if (index == -1).all():
        return None
    if index.min() < 0 or index.max() >= num_groups:
        raise CheckpointError(
            f"an input's group is {int(index.min())}..{int(index.max())}; there are {num_groups}"
        )
    return index.astype(np.int32)


def _pack(values: npt.NDArray[np.int8], bits: Bits) -> npt.NDArray[np.int32]:
    if bits == 4:
        return pack_int4(values)
    out, width = values.shape
    codes = np.zeros((out, -(-width // _PER_WORD[8]) * _PER_WORD[8]), np.uint8)
    codes[:, :width] = values.view(np.uint8) ^ np.uint8(_OFFSET[8])
    return codes.view("<i4")


def _unpack(words: npt.NDArray[np.int32], width: int, bits: Bits) -> npt.NDArray[np.int8]:
    if bits == 4:
        return unpack_int4(words, width)
    codes = np.ascontiguousarray(words, dtype="<i4").view(np.uint8) ^ np.uint8(_OFFSET[8])
    return np.ascontiguousarray(codes[:, :width]).view(np.int8)
